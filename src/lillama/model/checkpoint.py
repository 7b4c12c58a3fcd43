"""Weights come and go one tensor at a time: a lazy reader of safetensors folders and a writer of shards."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lillama.errors import ModelError, printable, suggestion
from lillama.files.artefacts import write_tensors
from lillama.files.atomic import digest, file_digest, read_json, write_json
from lillama.model.remote import runs_code

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
INDEX_SUFFIX, NAMED = ".safetensors.index.json", "transformers_weights"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "model.ckpt")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
KNOWN = DTYPES | INTEGERS  # others (8 bits and fewer) are never read; they are counted as bytes
CHECKED_AT_ONCE = 1 << 24  # numbers
FETCH_AGAIN = "fetch the model again"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its file, shape and type as the file's header tells."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class CheckpointReader:
    """Read single tensors of a safetensors folder: `model.safetensors`, or shards with an index.

    Where both are there the single file is read, as transformers does; a configuration that names its weights
    (`transformers_weights`) decides before that. Only headers are read until a tensor is asked for, and nothing stays
    mapped afterwards.

    Args:
        folder: a model folder as `save_pretrained` writes it.
    """

    folder: Path

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The weight files, each inside the folder (a symbolic link may lead elsewhere, as in the hub's cache).

        Raises:
            ModelError: no weights, only pickled weights, a missing shard, or an index entry outside the folder.
        """
        if self._index is not None:
            return tuple(self.folder / name for name in sorted(set(self._index.values())))
        if self._chosen is not None:
            return (self._chosen,)
        pickled = [name for name in PICKLES if (self.folder / name).exists()]
        if pickled:
            raise ModelError(
                f"{self.folder / pickled[0]}: pickled weights are never loaded, for they can run code; convert them "
                "to safetensors (for example https://huggingface.co/spaces/safetensors/convert)"
            )
        raise ModelError(f"{self.folder}: no {SINGLE} and no {INDEX} found; a model folder with weights is needed")

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Name of every stored tensor -> its entry."""
        index = self._index or {}
        entries: dict[str, TensorEntry] = {}
        for file in self.files:
            with _open(file, FETCH_AGAIN) as shard:
                for name in shard.keys():  # noqa: SIM118  (a safetensors handle, not a dict)
                    if index.get(name, file.name) == file.name:
                        view = shard.get_slice(name)
                        entries[name] = TensorEntry(file, tuple(view.get_shape()), view.get_dtype())
        for name, file in index.items():
            if name not in entries:
                raise ModelError(f"{self._chosen}: tensor {name} is not in {file}; {FETCH_AGAIN}")
        return entries

    @property
    def complete(self) -> bool:
        """Whether weights lie in the folder, every file of them."""
        return self._chosen is not None and all(file.is_file() for file in self.files)

    @cached_property
    def _chosen(self) -> Path | None:
        """The file that transformers would look for weights in: one of weights, or an index; None if there is none."""
        config = self.folder / "config.json"
        named = read_json(config, ModelError, FETCH_AGAIN).get(NAMED) if config.is_file() else None
        if named is not None:
            if not (_is_inside(named) and named.endswith((".safetensors", INDEX_SUFFIX))):
                raise ModelError(
                    f"{config}: {NAMED} is {printable(named)}; a .safetensors file of this folder, or its index, is needed"
                )
            return self.folder / named
        return next((path for path in (self.folder / SINGLE, self.folder / INDEX) if path.is_file()), None)

    @cached_property
    def _index(self) -> Mapping[str, str] | None:
        """Name of every tensor -> name of its file, as the index says; None if no index counts."""
        chosen = self._chosen
        return _weight_map(chosen) if chosen is not None and chosen.name.endswith(INDEX_SUFFIX) else None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all stored tensors."""
        return tuple(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, read from the header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's stored type.

        Raises:
            ModelError: the type is not a plain floating-point type (a quantised checkpoint, for example).
        """
        found = self._entry(name).dtype
        if found not in DTYPES:
            raise ModelError(
                f"{self._entry(name).file.name}: tensor {name} is stored as {found}; only "
                f"{', '.join(DTYPES)} can be read: give the unquantised model"
            )
        return DTYPES[found]

    def nbytes(self, name: str, dtype: torch.dtype | None = None) -> int:
        """Return the bytes that a tensor takes in its file, or in memory where floating-point ones become `dtype`."""
        stored = self._entry(name).dtype
        wanted = dtype if dtype is not None and stored in DTYPES else KNOWN.get(stored, torch.uint8)
        return math.prod(self.shape(name)) * wanted.itemsize

    def check(self, name: str, wanted: torch.dtype | None) -> None:
        """Refuse a tensor that cannot be read as `wanted`: integers are read as themselves, and when asked for, only.

        Raises:
            ModelError: the tensor is missing or of a type that does not do.
        """
        if wanted is None or wanted.is_floating_point:
            self.dtype(name)
        elif INTEGERS.get(self._entry(name).dtype) != wanted:
            raise ModelError(
                f"{self._entry(name).file.name}: tensor {name} is stored as {self._entry(name).dtype}, config.json wants "
                f"{wanted}; they do not belong together"
            )

    def read(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor into memory of its own.

        Args:
            name: of the tensor.
            device: where it goes.
            dtype: that it is converted to; None keeps the stored type. Integers are read only if their very type is
                given.

        Raises:
            ModelError: the tensor is missing, not floating-point, or holds NaN or infinite values.
        """
        self.check(name, dtype)
        with _open(self._entry(name).file, FETCH_AGAIN) as shard:
            tensor = shard.get_tensor(name)
        if not all(piece.isfinite().all() for piece in tensor.flatten().split(CHECKED_AT_ONCE)):
            raise ModelError(
                f"{self._entry(name).file.name}: tensor {name} holds NaN or infinite values; get a sound copy"
            )
        return tensor.to(device, dtype or tensor.dtype, copy=True)

    def fingerprint(self) -> str:
        """Return a hash of `config.json`, of every byte of the weights, and of code that may run, in hexadecimal."""
        code = sorted(self.folder.glob("*.py")) if runs_code() else []
        return digest({file.name: file_digest(file) for file in (self.folder / "config.json", *self.files, *code)})

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise ModelError(f"{self.folder}: tensor {name} is missing{suggestion(name, self.entries)}")
        return self.entries[name]


class CheckpointWriter:
    """Write tensors to shards and an index, as `save_pretrained` names them; hold at most one shard in memory.

    A context manager: the index is written when the block ends without an error. Give it a folder that is renamed into
    place afterwards (`files.atomic_folder`): the shards get their final names only at the end.

    Args:
        folder: an existing, empty folder.
        shard_bytes: a shard is closed before it would grow beyond this.
    """

    def __init__(self, folder: Path, shard_bytes: int = 5_000_000_000) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[tuple[str, ...]] = []
        self._bytes = 0

    def __enter__(self) -> "CheckpointWriter":
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Add one tensor; it must not change afterwards."""
        if self._pending and _bytes(self._pending.values()) + tensor.nbytes > self.shard_bytes:
            self._close_shard()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._bytes += tensor.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        self._close_shard()
        total = len(self._shards)
        if total == 1:
            _temporary(self.folder, 0).rename(self.folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            final = f"model-{index + 1:05}-of-{total:05}.safetensors"
            _temporary(self.folder, index).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        write_json(self.folder / INDEX, {"metadata": {"total_size": self._bytes}, "weight_map": weight_map})

    def _close_shard(self) -> None:
        write_tensors(_temporary(self.folder, len(self._shards)), self._pending)
        self._shards.append(tuple(self._pending))
        self._pending = {}


def _open(file: Path, remedy: str) -> safe_open:
    if not file.is_file():  # a pipe would never end
        raise ModelError(f"{file}: this file of weights is missing; {remedy}")
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        if "os error" in str(error):  # the machine's trouble, not the file's
            raise
        raise ModelError(f"{file}: damaged or truncated ({error}); {remedy}") from None


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index, ModelError, FETCH_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(
            f"{index}: not a readable index of weights (weight_map is {printable(weight_map)}, an object is needed); "
            f"{FETCH_AGAIN}"
        )
    for name, file in weight_map.items():
        if not _is_inside(file):
            raise ModelError(
                f"{index}: tensor {printable(name)} points outside the folder ({printable(file)}); such a model is not read"
            )
    return weight_map


def _is_inside(name: Any) -> TypeGuard[str]:
    """Tell whether a file's name stays in its folder."""
    return isinstance(name, str) and "\0" not in name and name not in ("", "..") and Path(name).name == name


def _temporary(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05}.tmp"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
