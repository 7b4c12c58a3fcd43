"""Artefacts of a run folder, JSON and tensors: each carries a digest of itself, so that a damaged one is never used.

The digest lies in the file itself, under `seal`, and appears with it in one rename; it covers the file's name too, so that no
artefact passes for another. JSON that stands for files of tensors
(the log of a block, the state of a training) names their digests too: these files belong together.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, FiniteFloat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lillama.errors import DamagedError
from lillama.files.atomic import atomic_file, digest, read_small, write_json

SEAL, TENSORS = "seal", "tensors"
# Numbers in JSON. The schema of an artefact stands beside what writes it; what reads it may be given anything, and checks it.
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(gt=0)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def save_json(path: Path, value: Mapping[str, Any], tensors: Mapping[str, str] | None = None) -> None:
    """Write a JSON object with its seal, atomically.

    Args:
        path: of the file.
        value: the object.
        tensors: name of a file beside it -> seal, of the files of tensors that belong to it.
    """
    whole = json.loads(json.dumps({**value, **({} if tensors is None else {TENSORS: dict(tensors)})}))
    write_json(path, whole | {SEAL: digest([path.name, whole])})


def load_json(path: Path) -> dict[str, Any]:
    """Read what `save_json` wrote, without the seal.

    Raises:
        DamagedError: the file is missing, or is not what was written.
    """
    try:
        value = json.loads(read_small(path).decode())
        seal = value.pop(SEAL)
    except FileNotFoundError:
        raise DamagedError(path, "is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(path) from None
    if digest([path.name, value]) != seal:
        raise DamagedError(path)
    return value


def load_whole(path: Path) -> dict[str, Any]:
    """Read a JSON object, and check the files of tensors that belong to it.

    Raises:
        DamagedError: one of them is missing, or is not what was written.
    """
    value = load_json(path)
    for name, seal in value.get(TENSORS, {}).items():
        if check_seal(path.with_name(name)) != seal:
            raise DamagedError(path.with_name(name), f"does not belong to {path.name}")
    return value


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a few tensors to one safetensors file, atomically; return their seal."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seal = seal_of(path.name, held)
    with atomic_file(path) as temporary:
        write_tensors(temporary, held, {SEAL: seal})
    return seal


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of one file, as `save_tensors` writes it, into memory of their own.

    Raises:
        DamagedError: the file is missing, or is not what was written.
    """
    with _open(path) as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (no dict)
        if seal_of(path.name, tensors) != _seal(file):
            raise DamagedError(path)
    return tensors


def check_seal(path: Path) -> str:
    """Return the seal of a file of tensors; one tensor is in memory at a time.

    Raises:
        DamagedError: the file is missing, or is not what was written.
    """
    with _open(path) as file:
        seal = _digest(path.name, ((name, file.get_tensor(name)) for name in sorted(file.keys())))
        if seal != _seal(file):
            raise DamagedError(path)
    return seal


def seal_of(file: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors in memory, for a file of that name: of names, types, shapes and bytes."""
    return _digest(file, ((name, tensors[name]) for name in sorted(tensors)))


def write_tensors(file: Path, tensors: dict[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """Write contiguous tensors to a safetensors file; `notes` go into its header.

    One note at most: safetensors writes several in an order that changes from one process to the next.
    """
    file.touch()  # safetensors makes files that only their owner may read; this one gets the mode that is usual here
    mode = file.stat().st_mode
    save_file(tensors, file, metadata=dict(notes or {"format": "pt"}))
    file.chmod(mode)


def _digest(file: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    found = hashlib.sha256(file.encode(errors="surrogatepass"))
    for name, tensor in tensors:
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _seal(file: safe_open) -> str | None:
    return (file.metadata() or {}).get(SEAL)


@contextmanager
def _open(path: Path) -> Iterator[safe_open]:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not path.is_file():  # a pipe would never end
        raise DamagedError(path, "is missing")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        if "os error" in str(error):  # the machine's trouble, not the file's
            raise
        raise DamagedError(path, f"is damaged or truncated ({error})") from None
