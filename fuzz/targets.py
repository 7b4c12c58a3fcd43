"""What is damaged, and which commands read it."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import yaml

from fuzz.isolated import Call
from fuzz.mutate import RAW_YAML, Place, mutated, mutated_bytes, mutated_tensors

WINDOW = "--text text.txt --seq-len 16 --windows 1 --device cpu"
SHORT = "--calibration {} --tokens 128 --seq-len 16 --device cpu --recipe recipe.yaml"
PLAN = "plan model --keep 0.98"
COMPRESS = f"compress model out {SHORT.format('text.txt')}"
EVALUATE = f"evaluate model {WINDOW}"
ENDLESS, HASHED = (
    4 << 30,
    128 << 20,
)  # bytes of a file, which takes no room on the disk; of data, of which a digest is taken
EXPORTS = ("export model exported --format dense", "export model exported --format portable")


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        sound: folders of the material; a case works in a copy of one.
        files: globs of the files of which one is damaged.
        commands: of which one reads it; the first ones are more likely.
        share: cases of each 1000.
        within: the only value of a JSON file that is damaged.
    """

    sound: tuple[str, ...]
    files: tuple[str, ...]
    commands: tuple[str, ...]
    share: int
    within: Place = ()


COMPRESSED = ("plain", "pivot", "int8", "int4", "int3", "narrow")
OTHERS = ("gpt2", "whisper", "mixtral", "mamba", "bert", "t5", "gpt_oss", "gemma3_text", "clip_vision_model", "opt")
TARGETS = {
    "config": Target(
        ("llama",), ("model/config.json",), (PLAN, EVALUATE, COMPRESS), 160
    ),
    "other-configs": Target(OTHERS, ("model/config.json",), (PLAN,), 150),
    "tokenizer": Target(
        ("llama",), ("model/tokenizer.json", "model/tokenizer_config.json", "model/chat_template.jinja"),
        (EVALUATE, f"compress model out {SHORT.format('rows.jsonl')}"), 130,
    ),
    "section": Target(COMPRESSED, ("model/config.json",), (EVALUATE, *EXPORTS), 110, ("quantization_config",)),
    "tensors": Target(COMPRESSED, ("model/model.safetensors",), (EVALUATE, EXPORTS[0]), 80),
    "weights": Target(("llama", "sharded"), ("model/*.safetensors",), (EVALUATE, COMPRESS), 50),
    "plan": Target(("llama",), ("plan.json",), ("plan model --plan plan.json",), 60),
    "index": Target(("sharded",), ("model/model.safetensors.index.json",), (EVALUATE, COMPRESS), 60),
    "recipe": Target(("llama",), ("recipe.yaml",), ("plan model --recipe recipe.yaml",), 80),
    "readme": Target(("finished",), ("model/README.md",), (COMPRESS,), 20),
    "card": Target(COMPRESSED, ("model/README.md",), EXPORTS, 30),
    "run": Target(("finished",), ("out.run/**/*",), (COMPRESS, "report out.run --out out.run/report.html"), 80),
    "generation": Target(("llama",), ("model/generation_config.json",), (f"compress model out {SHORT.format('self')}",), 10),
    "rows": Target(("llama",), ("rows.jsonl",), (f"compress model out {SHORT.format('rows.jsonl')}",), 30),
}  # fmt: skip


def copied(sound: Path, folder: Path) -> None:
    """Copy sound input; what a finished run made of it is left out, so that it is made again."""
    shutil.copytree(sound, folder, ignore=lambda place, _: ["out"] if Path(place) == sound else [])


def call(command: str, sound: Path, folder: Path) -> Call:
    """Return a command as it is called in a copy of sound input."""
    weights = sound / "out" / "model.safetensors"
    made = {"compress": "out", "export": "exported"}.get(command.split()[0], "nothing")
    return Call(command, folder, made, weights if command == COMPRESS and weights.is_file() else None)


@dataclass(frozen=True)
class Case:
    """One damaged input: target, seed and number make it again."""

    target: str
    seed: int
    number: int

    def __str__(self) -> str:
        return f"python -m fuzz {self.target} --seed {self.seed} --case {self.number}"

    def prepared(self, material: Path, folder: Path) -> Call:
        """Copy the sound input into a new folder, damage it there, and return the command that is to read it."""
        chance, target = Random(f"{self.target}/{self.seed}/{self.number}"), TARGETS[self.target]
        sound = material / chance.choice(target.sound)
        copied(sound, folder)
        files = sorted({file for glob in target.files for file in folder.glob(glob) if file.is_file()})
        file = chance.choice(files)
        if chance.random() < 0.03:
            _replace(file, files, chance)
        else:
            _damage(file, chance, target.within)
        if self.target == "run" and chance.random() < 0.3:  # of an unfinished run
            chance.choice(files).unlink(missing_ok=True)
        command = chance.choices(target.commands, [1 / (i + 1) for i in range(len(target.commands))])[0]
        return call(command, sound, folder)


def _replace(file: Path, files: list[Path], chance: Random) -> None:
    """Let a file be gone, a folder, a pipe, a link that leads nowhere, endless, or what another one is."""
    content = chance.choice(files).read_bytes()
    file.unlink()
    match chance.randrange(6):
        case 0:
            file.mkdir()
        case 1:
            os.mkfifo(file)
        case 2:
            file.symlink_to(chance.choice(("nowhere", file.name)))
        case 3:
            file.write_bytes(content)
            os.truncate(file, HASHED if file.suffix == ".jsonl" else ENDLESS)
        case 4:
            file.write_bytes(content)


def _damage(file: Path, chance: Random, within: Place) -> None:
    data = file.read_bytes()
    by_kind: dict[str, Callable[[], bytes]] = {
        ".json": lambda: _encoded(mutated(data.decode(), chance, within=within)),
        ".yaml": lambda: _encoded(mutated(_as_json(data.decode()), chance, RAW_YAML)),
        ".md": lambda: _front_matter(data.decode(), chance),
        ".jsonl": lambda: _line(data.decode(), chance),
        ".safetensors": lambda: mutated_tensors(data, chance),
    }
    structured = file.suffix in by_kind and chance.random() < 0.85
    file.write_bytes(by_kind[file.suffix]() if structured else mutated_bytes(data, chance))


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _as_json(text: str) -> str:
    """Return YAML as JSON, which is YAML too."""
    return json.dumps(yaml.safe_load(text))


def _front_matter(text: str, chance: Random) -> bytes:
    _, head, body = text.split("---\n", 2)
    return _encoded(f"---\n{mutated(_as_json(head), chance, RAW_YAML)}\n---\n{body}")


def _line(text: str, chance: Random) -> bytes:
    first, rest = text.split("\n", 1)
    return _encoded(f"{mutated(first, chance)}\n{rest}")
