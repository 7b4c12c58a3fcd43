"""Activations of all calibration sequences between two blocks, kept on the device, on the host or on disk."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

from lillama.errors import ResourceError
from lillama.system.memory import MemoryBudget
from lillama.system.resources import FULL, free_disk

Place = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class ActivationPlacement:
    """Where stores are put and how large they may be together.

    Attributes:
        device: that computes.
        folder: for stores on disk.
        device_bytes: budget on the device; without effect when the device is the CPU.
        host_bytes: budget in the host's memory; what does not fit goes to disk.
    """

    device: torch.device
    folder: Path
    device_bytes: int
    host_bytes: int

    @classmethod
    def on(
        cls, device: torch.device, folder: Path, activation_memory: int | None, memory: MemoryBudget | None = None
    ) -> "ActivationPlacement":
        """Return a placement with budgets of `activation_memory` bytes, or of the share that activations have of `memory`.

        Args:
            device: that computes.
            folder: for stores on disk.
            activation_memory: bytes on the device, and in the host's memory.
            memory: that all which is computed has in common; None asks for it now.
        """
        if activation_memory is not None:
            return cls(device, folder, activation_memory, activation_memory)
        memory = memory or MemoryBudget.of(device)
        return cls(device, folder, memory.activations, memory.host_activations)

    def place(self, nbytes: int) -> Place:
        """Return where stores of `nbytes` together go."""
        if self.device.type != "cpu" and nbytes <= self.device_bytes:
            return "device"
        return "host" if nbytes <= self.host_bytes else "disk"


class ActivationStore:
    """A tensor (sequences x length x width, or other) read and written by rows, wherever it lies.

    On disk it is a memory-mapped file; each access maps it, copies its rows and unmaps it, so that resident memory stays
    that of one micro-batch. The file's space is reserved when it is made.

    Args:
        shape: sequences, length, width; or sequences and whatever belongs to each.
        dtype: of the activations.
        placement: device and folder.
        place: as `ActivationPlacement.place` chose.
        name: of the file, if on disk.

    Raises:
        ResourceError: the disk has no room.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, placement: ActivationPlacement, place: Place, name: str
    ) -> None:
        self.shape, self.dtype, self.name = shape, dtype, name
        self.placement, self.device = placement, placement.device
        self.place: Place = place
        self._path = placement.folder / f"{name}.activations"
        self._tensor: Tensor | None = None
        if place == "disk":
            _reserve(self._path, torch.Size(shape).numel() * dtype.itemsize)
        else:
            self._tensor = torch.empty(shape, dtype=dtype, device=placement.device if place == "device" else "cpu")

    def read(self, rows: slice | Tensor) -> Tensor:
        """Return the rows (of the store's shape but for their number) in memory of their own, on the device.

        Nothing waits for a CUDA device: indices are staged, and what lies on the host is copied from pinned memory, so that
        the next micro-batch is on its way while this one is computed.
        """
        view = self._view()
        if view.device.type == self.device.type:
            return view[rows.to(view.device, non_blocking=True)] if isinstance(rows, Tensor) else view[rows].clone()
        found = view[rows]
        return (
            found.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else found.to(self.device)
        )

    def write(self, rows: slice, values: Shaped[Tensor, "..."]) -> None:
        """Overwrite consecutive rows."""
        self._view()[rows] = values.detach().to(self.dtype)

    def remove(self) -> None:
        """Give the store's memory or file back; it must not be used afterwards."""
        self._tensor = None
        if self.place == "disk":
            self._path.unlink(missing_ok=True)

    def _view(self) -> Tensor:
        if self._tensor is not None:
            return self._tensor
        size = torch.Size(self.shape).numel()
        return torch.from_file(str(self._path), shared=True, size=size, dtype=self.dtype).view(self.shape)


@dataclass(frozen=True)
class StoreFactory:
    """Makes stores of one purpose when their shape is known; called with a shape it returns the next one.

    Attributes:
        placement: where they go.
        dtype: of the activations.
        name: of their files, with a number behind it.
        together: how many stores of such a size there will be, which decides where each goes.
        made: those made so far.
    """

    placement: ActivationPlacement
    dtype: torch.dtype
    name: str
    together: int = 1
    made: list[ActivationStore] = field(default_factory=list)

    def __call__(self, shape: tuple[int, ...]) -> ActivationStore:
        """Return a new store."""
        place = self.placement.place(self.together * torch.Size(shape).numel() * self.dtype.itemsize)
        self.made.append(ActivationStore(shape, self.dtype, self.placement, place, f"{self.name}-{len(self.made)}"))
        return self.made[-1]

    def remove(self) -> None:
        """Give all of them back."""
        for store in self.made:
            store.remove()


def _reserve(path: Path, nbytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    refusal = ResourceError(
        f"{path.parent}: no room for {nbytes / 1e9:.1f} GB of activations; free space, choose another --run folder, or "
        "lower --tokens"
    )
    with path.open("wb") as file:
        if sys.platform == "darwin":  # has no posix_fallocate
            if nbytes > free_disk(path):
                raise refusal
            file.truncate(nbytes)
            return
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            path.unlink(missing_ok=True)
            if error.errno not in FULL:
                raise
            raise refusal from None


class PerSequenceTensor:
    """One tensor for each sequence; while all are equal only one is held, then they lie where the activations lie.

    Args:
        beside: the activations of the same sequences.
        name: of the file, if on disk.
    """

    def __init__(self, beside: ActivationStore, name: str) -> None:
        self._beside, self._name = beside, name
        self._first: Tensor | None = None
        self._store: ActivationStore | None = None

    def write(self, rows: slice, values: Shaped[Tensor, "..."]) -> None:
        """Set the tensors of some sequences; slices come in order, from the first sequence on."""
        if self._first is None:
            self._first = values[:1].clone()
        if self._store is None:
            if bool((values == self._first).all()):
                return
            shape = (self._beside.shape[0], *values.shape[1:])
            self._store = ActivationStore(shape, values.dtype, self._beside.placement, self._beside.place, self._name)
            self._store.write(slice(0, rows.start), self._first)
        self._store.write(rows, values)

    def remove(self) -> None:
        """Give memory or file back."""
        if self._store is not None:
            self._store.remove()

    def read(self, rows: slice | Tensor) -> Tensor:
        """Return the tensors of some sequences, stacked, on the device."""
        if self._store is not None:
            return self._store.read(rows)
        assert self._first is not None
        total = self._beside.shape[0]
        count = len(rows) if isinstance(rows, Tensor) else len(range(*rows.indices(total)))
        return self._first.expand(count, *self._first.shape[1:]).contiguous()
