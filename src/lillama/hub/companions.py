"""What goes along with a model's weights: tokenizer, settings, templates, licence, and nothing that runs or leads outside.

One rule for a compressed model and for an export of one. Files are chosen by what they are, not by what they are not.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lillama.files.atomic import write_json

logger = logging.getLogger(__name__)

DATA = {
    ".json",
    ".jinja",
    ".txt",
    ".model",
    ".tiktoken",
    ".spm",
    ".bpe",
    ".codes",
    ".vocab",
    ".tsv",
    ".md",
    ".rst",
    ".pdf",
}
TERMS = re.compile(r"(licen[cs]e|notice|copying|copyright|authors|use_policy|terms)[\w-]*(\.\d+)*", re.IGNORECASE)
OWN = {"config.json", "README.md"}  # which a new model writes itself
OTHERS = {"lillama.json", "adapter_config.json", "trainer_state.json", "training_args.json"}  # of a run, an adapter
FOLDERS = ("additional_chat_templates",)
PARTS = "modules.json"  # of sentence-transformers: names folders with settings, and small weights, of their own
CODE_KEYS = ("auto_map", "custom_pipelines")  # name code that lies in the model's folder
LONGEST_NAME = 255  # bytes
LARGEST = 1 << 20  # bytes of settings, and of a file of code, that are read
RELATIVE = re.compile(r"^\s*(?:from|import)\s+\.([\w.]*)(?:\s+import\s+([^#\n]+))?", re.MULTILINE)


def carry_along(source: Path, destination: Path, code: bool = False, also: frozenset[str] = frozenset()) -> None:
    """Copy what belongs to a model beside its weights: tokenizer, generation settings, chat templates, licence, modules.

    Never weights of the model, nor `config.json` and `README.md`; never a link that leads out of the folder, but for those
    of the hub's cache. The settings that are copied do not name code that is not.

    Args:
        source: a model folder.
        destination: an existing folder.
        code: whether the code that the settings name is copied with them, for models that are read with it.
        also: names of further files.
    """
    left_out: list[str] = []
    for name in dict.fromkeys(_companions(source, also)):
        if is_inside(source / name, source):
            _copy(source / name, destination / name, source, code)
        else:
            left_out.append(name)
    if left_out:
        logger.warning(
            "%s: links that lead out of the folder are not followed, these are left out: %s; put the files themselves "
            "there if they belong to the model",
            source,
            ", ".join(left_out),
        )
    for name in code_files(source) if code else ():
        _copy(source / name, destination / name, source, code)


def without_code(settings: Mapping[str, Any], source: Path, code: bool = False) -> dict[str, Any]:
    """Return settings that name code only where that goes along: what transformers' own classes read needs none.

    Args:
        settings: of the model, its tokenizer or its processor.
        source: the model's folder.
        code: whether code is carried along.
    """
    if code and set(_by_name(settings)) <= set(code_files(source)):
        return dict(settings)
    return {key: value for key, value in settings.items() if key not in CODE_KEYS}


def code_files(source: Path) -> tuple[str, ...]:
    """Return the files of code that the settings of a model name, and those in its folder that these import relatively."""
    found: list[str] = []
    wanted = [name for file in sorted(source.glob("*config.json")) for name in _by_name(_settings(file))]
    while wanted:
        name = wanted.pop()
        file = source / name
        if name not in found and file.is_file() and file.stat().st_size <= LARGEST and is_inside(file, source):
            found.append(name)
            wanted += _find_imports(file.read_text(encoding="utf-8", errors="replace"), PurePosixPath(name).parent)
    return tuple(sorted(found))


def is_inside(file: Path, source: Path) -> bool:
    """Tell whether a file lies in a model folder, links followed, or where the hub's cache keeps that folder's files."""
    try:
        folder, target = source.resolve(), file.resolve()
    except (OSError, RuntimeError, ValueError):  # links in a circle, a name that no file can have
        return False
    cached = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
    return cached or target.is_relative_to(folder)


def _companions(source: Path, also: frozenset[str]) -> Iterator[str]:
    """Yield the name within the folder of every file that belongs to a model, and of links that may lead outside."""
    for file in sorted(source.glob("[!.]*")):
        if file.is_file() and file.name not in OWN and (_is_data(file) or file.name in also):
            yield file.name
    parts = _parts(source)
    for folder in (*FOLDERS, *parts):
        if not is_inside(source / folder, source):
            yield folder
            continue
        for file in sorted((source / folder).rglob("[!.]*")):
            name = file.relative_to(source).as_posix()
            weights = file.suffix == ".safetensors" and not file.name.startswith("adapter_") and folder in parts
            if file.is_file() and (_is_data(file) or weights):
                yield name
            elif file.suffix in (".bin", ".pt", ".pth"):
                logger.warning("%s: %s is left out: pickles can run code; convert it to safetensors", source, name)


def _is_data(file: Path) -> bool:
    """Whether a file is of a kind that goes along, by its name."""
    apart = file.name in OTHERS or file.name.endswith(".index.json")
    return not apart and (file.suffix.lower() in DATA or TERMS.fullmatch(file.name) is not None)


def _parts(source: Path) -> tuple[str, ...]:
    """Return the folders that `modules.json` names; what leads outside is left out, and said so."""
    file = source / PARTS
    if not file.is_file() or not is_inside(file, source):
        return ()
    listed = _json(file)
    paths = [one.get("path") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else [None]
    if not all(isinstance(path, str) for path in paths):
        logger.warning("%s: does not list folders of modules as sentence-transformers does; none goes along", file)
        return ()
    named = [path for path in dict.fromkeys(map(str, paths)) if PurePosixPath(path).parts]
    outside = [path for path in named if not re.fullmatch(r"(?!\.)[^\\:\0]+", path) or _climbs(path)]
    if outside:
        logger.warning("%s: names folders that are none within the model's, they are left out: %s", file, outside)
    return tuple(path for path in named if path not in outside)


def _climbs(path: str) -> bool:
    """Tell whether a path leads out of the folder that it starts from, into a hidden one, or is none at all."""
    parts = PurePosixPath(path).parts
    names = (part.encode(errors="replace").decode() == part and len(part.encode()) <= LONGEST_NAME for part in parts)
    return PurePosixPath(path).is_absolute() or any(part.startswith(".") for part in parts) or not all(names)


def _copy(file: Path, target: Path, source: Path, code: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    settings = _settings(file) if file.name.endswith("config.json") else {}
    if any(key in settings for key in CODE_KEYS):
        write_json(target, without_code(settings, source, code))
    else:
        shutil.copyfile(file, target)


def _settings(file: Path) -> Mapping[str, Any]:
    found = _json(file)
    return found if isinstance(found, dict) else {}


def _json(file: Path) -> Any:
    """Return what a small JSON file holds, None if it is none: whoever cannot do without says so."""
    if not file.is_file() or file.stat().st_size > LARGEST:
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def _by_name(settings: Mapping[str, Any]) -> list[str]:
    """Return the files of code that settings name; that of other repositories (`org/name--module.Class`) is no file here."""
    auto, pipelines = (settings.get(key) for key in CODE_KEYS)
    values = list(auto.values()) if isinstance(auto, dict) else []
    if isinstance(pipelines, dict):
        values += [one.get("impl") for one in pipelines.values() if isinstance(one, dict)]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    modules = [one.rpartition(".")[0] for one in flat if isinstance(one, str) and "--" not in one]
    return [f"{module}.py" for module in modules if module.isidentifier()]


def _find_imports(text: str, folder: PurePosixPath) -> Iterator[str]:
    """Yield the files that code in a folder may import relatively: `from .x import y`, `from . import x`."""
    for module, names in RELATIVE.findall(text):
        words = [module.replace(".", "/")] if module else re.findall(r"\w+", names)
        for word in words:
            yield from (str(folder / f"{word}.py"), str(folder / word / "__init__.py"))
