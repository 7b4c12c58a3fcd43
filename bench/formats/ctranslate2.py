"""Read the weights of a CTranslate2 model, as its converters write them into `model.bin`.

All numbers are little-endian. The file is a version (u32), the name and the revision (u32) of what kind of model it is, the
number of its variables (u32); for each variable a name, the number of its dimensions (u8), each dimension (u32), a type (u8),
the number of its bytes (u32) and these; then the number of aliases (u32), and for each its name and that of a variable. A name
is its length (u16), which counts a zero at its end, and as many bytes.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lillama.errors import ModelError

VERSION = 6
TYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)  # by their numbers


@dataclass(frozen=True)
class Contents:
    """What a `model.bin` holds.

    Attributes:
        kind: of model, such as `WhisperSpec`.
        tensors: variables by name, each in the type and shape that it is stored in; aliases stand for the same tensor.
    """

    kind: str
    tensors: Mapping[str, Tensor]


def read_contents(file: Path) -> Contents:
    """Read a whole `model.bin` into memory.

    Raises:
        ModelError: it is of another version, ends early, goes on after its end, or holds a variable that no such file has.
    """
    with file.open("rb") as stream:
        try:
            contents = _read(stream)
        except (struct.error, UnicodeDecodeError, KeyError, ValueError) as error:
            raise ModelError(f"{file}: damaged, or no CTranslate2 model ({error}); get a sound copy") from None
        if stream.read(1):
            raise ModelError(f"{file}: goes on after its end, so that it is damaged; get a sound copy")
    return contents


def _read(stream: BinaryIO) -> Contents:
    version = _number(stream, "I")
    if version != VERSION:
        raise ValueError(f"version {version} of the format, {VERSION} is read")
    kind = _name(stream)
    _number(stream, "I")
    tensors = dict(_variable(stream) for _ in range(_number(stream, "I")))
    for _ in range(_number(stream, "I")):
        alias = _name(stream)
        tensors[alias] = tensors[_name(stream)]
    return Contents(kind, tensors)


def _variable(stream: BinaryIO) -> tuple[str, Tensor]:
    name = _name(stream)
    shape = [_number(stream, "I") for _ in range(_number(stream, "B"))]
    number, nbytes = _number(stream, "B"), _number(stream, "I")
    if number >= len(TYPES):
        raise ValueError(f"{name} is of a type {number}")
    if nbytes != math.prod(shape) * TYPES[number].itemsize or not nbytes:
        raise ValueError(f"{name} takes {nbytes} bytes and is {shape} of {TYPES[number]}")
    return name, torch.frombuffer(bytearray(_bytes(stream, nbytes)), dtype=TYPES[number]).view(shape)


def _number(stream: BinaryIO, kind: str) -> int:
    kind = "<" + kind
    return struct.unpack(kind, stream.read(struct.calcsize(kind)))[0]


def _name(stream: BinaryIO) -> str:
    return _bytes(stream, _number(stream, "H")).removesuffix(b"\0").decode()


def _bytes(stream: BinaryIO, number: int) -> bytes:
    found = stream.read(number)
    if len(found) != number:
        raise ValueError("it ends early")
    return found
