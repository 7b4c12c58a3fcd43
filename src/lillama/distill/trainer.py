"""The training loop: batches, checks on held-out sequences, the best state, snapshots to resume from.

What a step is, and what it is measured by, a `Training` says: one block alone (`block.py`), all blocks on every batch
(`joint.py`), or all blocks end to end (`lillama.recovery`). A snapshot of the whole training is written now and then, so that a
killed run goes on to the same bits.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from lillama.distill.history import History, Measurement, State
from lillama.distill.pool import LearnerPool
from lillama.distill.split import Batches
from lillama.files.artefacts import load_json, load_tensors, save_json, save_tensors
from lillama.files.atomic import atomic_folder
from lillama.system.progress import Progress, Report

REPORT_SECONDS = 0.2
SNAPSHOT_SECONDS = 300.0
BEST = "best."


@dataclass
class TrainingState:
    """How far a training is.

    Attributes:
        histories: name -> what is remembered of one block, or of several that have one loss.
        done: optimiser steps taken.
        seconds: that these took, interruptions left out.
        stopped: why training ended before its last step; empty if it did not.
    """

    histories: dict[str, History]
    done: int = 0
    seconds: float = 0.0
    stopped: str = ""


@runtime_checkable
class Training(Protocol):
    """What a step is, and what it is measured by.

    Attributes:
        keeps_start: whether the state before the first step is kept too, while it is the best.
    """

    keeps_start: ClassVar[bool]

    @property
    def pool(self) -> LearnerPool:
        """The blocks under training."""
        ...

    @property
    def groups(self) -> Mapping[str, tuple[int, ...]]:
        """Name of a history -> indices of the blocks whose best state it keeps."""
        ...

    def step(self, batch: Int[Tensor, " n"], histories: Mapping[str, History]) -> Float[Tensor, ""]:
        """Take a step with every learner, note the losses; return what is shown of them, which stays on the device."""
        ...

    def measure(self, histories: Mapping[str, History]) -> Mapping[str, Measurement]:
        """Return for each history what is measured on the held-out sequences."""
        ...

    def review(self, state: TrainingState) -> None:
        """Look at a check, the one at the start included: go on, set `state.stopped`, or mend what went wrong."""
        ...


@dataclass(frozen=True)
class Trainer:
    """The loop.

    Attributes:
        batches: sequences of every step.
        checks: how often the held-out loss is measured after the start.
        folder: for the snapshot to resume from.
        task: the name of the task in reports.
        detail: what is trained, for reports.
        snapshot_seconds: between two snapshots.
    """

    batches: Batches
    checks: int
    folder: Path
    task: str = "steps"
    detail: str = "all blocks"
    snapshot_seconds: float = SNAPSHOT_SECONDS

    def fit(self, training: Training, report: Report) -> TrainingState:
        """Train from the beginning, or from the last snapshot, to the last step or until the training stops itself.

        The learners are left in their last state, the best one lies in the histories.
        """
        begun, saved, told, steps, checks = (
            time.monotonic(),
            time.monotonic(),
            0.0,
            len(self.batches),
            self.check_steps(),
        )
        state = _resume(training, self.folder)
        before, shown = state.seconds, list[Float[Tensor, ""]]()
        if not state.done:
            _check(training, state)
        for batch in islice(self.batches, state.done, None):
            if state.stopped:
                break
            shown = [*shown[-1:], training.step(batch, state.histories)]
            state.done += 1
            if time.monotonic() - told > REPORT_SECONDS or state.done == steps:
                told = time.monotonic()
                tokens = max(history.tokens for history in state.histories.values())
                loss = shown[0].item()  # of the step before: the device is done with it
                report(Progress(self.task, state.done, steps, self.detail, tokens, loss))
            if state.done in checks:
                _check(training, state)
            state.seconds = before + time.monotonic() - begun
            overdue = time.monotonic() - saved > self.snapshot_seconds
            if overdue and state.done < steps and not state.stopped:
                _save(training, state, self.folder)
                saved = time.monotonic()
        state.seconds = before + time.monotonic() - begun
        return state

    def check_steps(self) -> set[int]:
        """Return the steps after which the held-out loss is measured; the last one is among them."""
        return {math.ceil(len(self.batches) * k / self.checks) for k in range(1, self.checks + 1)}


def _check(training: Training, state: TrainingState) -> None:
    """Measure the held-out losses, and keep the states that are the best so far."""
    for name, found in training.measure(state.histories).items():
        kept = training.groups[name] if state.done or training.keeps_start else ()
        states = partial(_states, training.pool, kept)
        state.histories[name].check(state.done, found, states)
    training.review(state)


def _states(pool: LearnerPool, indices: tuple[int, ...]) -> dict[int, State]:
    return {index: pool.state(index) for index in indices}


def _save(training: Training, state: TrainingState, folder: Path) -> None:
    """Write a snapshot: of each learner parameters, moments and best parameters, then all else."""
    with atomic_folder(folder) as place:
        seals, lrs = dict[str, str](), dict[str, float]()
        for name, indices in training.groups.items():
            for index in indices:
                learner, file = training.pool[index], place / _file(index)
                best = {f"{BEST}{key}": t for key, t in state.histories[name].best_states.get(index, {}).items()}
                seals[file.name] = save_tensors(file, learner.snapshot() | best)
                lrs[str(index)] = learner.lr
        histories = {name: history.as_json() for name, history in state.histories.items()}
        value = {"done": state.done, "seconds": state.seconds, "lr": lrs, "histories": histories}
        save_json(place / "state.json", value, seals)


def _resume(training: Training, folder: Path) -> TrainingState:
    """Return the state of the last snapshot, with the learners as they were then; or that of a beginning."""
    if not (folder / "state.json").is_file():
        return TrainingState({name: History() for name in training.groups})
    value = load_json(folder / "state.json")
    state = TrainingState({}, value["done"], value["seconds"])
    for name, indices in training.groups.items():
        states = dict[int, State]()
        for index in indices:
            learner = training.pool[index]
            learner.lr = value["lr"][str(index)]
            learner.resume(load_tensors(folder / _file(index)), state.done)
            mapped = load_file(folder / _file(index))  # so that the best states need not fit into memory
            states[index] = {key.removeprefix(BEST): t for key, t in mapped.items() if key.startswith(BEST)}
        best_states = {index: best for index, best in states.items() if best}
        state.histories[name] = History.from_json(value["histories"][name], best_states)
    return state


def _file(index: int) -> str:
    return f"{index:04}.safetensors"
