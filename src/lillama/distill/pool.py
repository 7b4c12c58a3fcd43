"""Blocks under training that need not fit into memory together."""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from lillama.distill.learner import Learner
from lillama.files.artefacts import load_tensors, save_tensors
from lillama.system.resources import trim_memory


class LearnerPool:
    """Learners by block index; those that find no room in memory are kept in files between their steps.

    Args:
        make: returns a learner with its initial weights.
        folder: for the files.
        resident: how many learners may be in memory.
    """

    def __init__(self, make: Callable[[int], Learner], folder: Path, resident: int) -> None:
        self.make, self.folder, self.resident = make, folder, max(1, resident)
        self._live: dict[int, Learner] = {}
        self._parked: dict[int, tuple[int, float]] = {}

    def __getitem__(self, index: int) -> Learner:
        if index not in self._live:
            while len(self._live) >= self.resident:
                self._park(next(iter(self._live)))
            self._live[index] = self.make(index)
            if index in self._parked:
                steps, self._live[index].lr = self._parked[index]
                self._live[index].resume(load_tensors(self._file("learner", index)), steps)
        return self._live[index]

    def replace(self, index: int, learner: Learner) -> None:
        """Go on with another learner for a block."""
        self._live[index] = learner

    def state(self, index: int) -> dict[str, Tensor]:
        """Return a copy of a student's parameters; mapped from a file if memory is short."""
        state = self[index].state()
        if not self._parked:
            return state
        save_tensors(self._file("best", index), state)
        return load_file(self._file("best", index))

    def _park(self, index: int) -> None:
        learner = self._live.pop(index)
        save_tensors(self._file("learner", index), learner.snapshot())
        self._parked[index] = learner.step_count, learner.lr
        del learner
        trim_memory()

    def _file(self, kind: str, index: int) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{kind}-{index:04}.safetensors"
