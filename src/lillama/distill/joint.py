"""The joint schedule: every batch runs through all blocks, and each student takes a step on it (arXiv 2412.16719).

Blocks need not fit in memory together: learners that find no room wait in files between their steps. A state of the whole
training is written now and then, so that a killed run goes on to the same bits.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lillama.artefacts import load_json, load_tensors, save_json, save_tensors
from lillama.distill.block import REPORT_SECONDS, Rows, batches, check_steps, retry, step_total
from lillama.distill.config import DistillConfig
from lillama.distill.learner import Learner
from lillama.distill.objective import MicroBatch, real_tokens
from lillama.distill.spectrum import largest_singular_values
from lillama.distill.trace import DistillLog, Trace
from lillama.errors import TrainingError
from lillama.files import atomic_folder
from lillama.progress import Progress, Report
from lillama.resources import trim_memory
from lillama.stream.calls import BlockArgs, BlockInputs
from lillama.stream.store import ActivationStore

SNAPSHOT_SECONDS = 300.0


@dataclass(frozen=True)
class JointData:
    """What all blocks are taught on.

    Attributes:
        calls: how blocks are called.
        hidden: inputs of the first block.
        mask: true at real tokens; None if all are.
        micro_batch: sequences that are computed at once.
        own_calls: how blocks are called in the student's stream; None if alike.
        own_hidden: what enters the first block there; None if the same.
    """

    calls: BlockInputs
    hidden: ActivationStore
    mask: Tensor | None
    micro_batch: int
    own_calls: BlockInputs | None = None
    own_hidden: ActivationStore | None = None


class Bench:
    """Learners by block index; those that find no room in memory are kept in files.

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


@dataclass
class JointTraining:
    """All blocks under training.

    Attributes:
        names: index -> name of the blocks that are trained.
        last: index of the last of them; blocks above it need not run.
        teacher: returns the teacher's block of an index.
        bench: the learners.
        data: what they are taught on.
        rows: training and held-out sequences.
        config: of the distillation.
        seed: of the order of the batches.
        folder: for states to resume from.
        snapshot_seconds: between two of these states.
    """

    names: Mapping[int, str]
    last: int
    teacher: Callable[[int], nn.Module]
    bench: Bench
    data: JointData
    rows: Rows
    config: DistillConfig
    seed: int
    folder: Path
    snapshot_seconds: float = SNAPSHOT_SECONDS

    def run(self, report: Report) -> Iterator[tuple[int, Learner, DistillLog]]:
        """Train, then yield each block's index, its learner in its best state, and its log.

        Raises:
            TrainingError: a loss was not finite at half the learning rate either.
        """
        traces, tokens, done, retried = self._resume()
        steps, saved, told = step_total(self.rows, self.config), time.monotonic(), 0.0
        if not done:
            self._check(traces, 0)
            for index, trace in traces.items():
                trace.singular = largest_singular_values(self.bench[index].student)
        for batch in islice(batches(self.rows, self.config, self.seed), done, None):
            tokens += self._step(batch, traces)
            done += 1
            if time.monotonic() - told > REPORT_SECONDS or done == steps:
                told = time.monotonic()
                loss = sum(trace.recent_loss() for trace in traces.values()) / len(traces)
                report(Progress("steps", done, steps, "all blocks", tokens, loss))
            if done in check_steps(self.config, steps):
                self._check(traces, done)
                self._retry_bad(traces, retried)
            if time.monotonic() - saved > self.snapshot_seconds and done < steps:
                self._snapshot(traces, tokens, done, retried)
                saved = time.monotonic()
        for index, trace in traces.items():
            learner = self.bench[index]
            learner.restore(trace.best_state)
            singular = largest_singular_values(learner.student)
            yield index, learner, trace.log(self.names[index], learner.lr, tokens, index in retried, singular)

    def _step(self, batch: Tensor, traces: Mapping[int, Trace]) -> int:
        """Let every block take one step on a batch; return the batch's real tokens."""
        tokens = 0
        for index, micro_batches in self._through(batch):
            tokens = sum(micro.tokens for micro in micro_batches)
            traces[index].losses.append(self.bench[index].step(micro_batches, tokens))
        return tokens

    def _through(self, batch: Tensor) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Take a batch from block to block; yield those of the trained ones, and go on with what they are then."""
        parts = batch.split(self.data.micro_batch)
        teacher = [self.data.hidden.read(part) for part in parts]
        own, device = self.data.own_hidden, self.data.hidden.device
        student, parted = list(teacher) if own is None else [own.read(part) for part in parts], own is not None
        for index in range(self.data.calls.first, self.last + 1):
            block = self.teacher(index)
            calls = [self.data.calls.select(index, part, device) for part in parts]
            own_calls = calls
            if self.data.own_calls is not None:
                own_calls = [self.data.own_calls.select(index, part, device) for part in parts]
            with torch.no_grad():
                targets = [call(block, x) for call, x in zip(calls, teacher, strict=True)]
            if index in self.names:
                yield (
                    index,
                    [
                        self._micro_batch((call, own_call), block, x, own if parted else None, y, part)
                        for call, own_call, x, own, y, part in zip(
                            calls, own_calls, teacher, student, targets, parts, strict=True
                        )
                    ],
                )
                if index < self.last and self.config.stream != "teacher":
                    through = self.bench[index].forward
                    student = [through(call, own) for call, own in zip(own_calls, student, strict=True)]
                    del through  # the learner finds its way to a file before the next one is read
                    parted = True
            elif parted:
                with torch.no_grad():
                    student = [call(block, own) for call, own in zip(own_calls, student, strict=True)]
            if not parted:
                student = targets
            teacher = targets

    @torch.no_grad()
    def _micro_batch(
        self,
        calls: tuple[BlockArgs, BlockArgs],
        block: nn.Module,
        teacher: Tensor,
        student: Tensor | None,
        target: Tensor,
        part: Tensor,
    ) -> MicroBatch:
        config, mask = self.config, self.data.mask
        inputs = {"teacher": teacher} if config.stream != "student" or student is None else {}
        own_target = None
        if config.stream != "teacher" and student is not None:
            inputs["student"] = student
            own_target = torch.lerp(target, calls[1](block, student), config.adaptive) if config.adaptive else None
        here = None if mask is None else mask[part].to(target.device, non_blocking=True)
        tokens = real_tokens(mask, part, target.shape[1])
        return MicroBatch(calls[0], inputs, target, here, tokens, own_target, own_call=calls[1])

    def _check(self, traces: Mapping[int, Trace], step: int) -> None:
        """Measure the held-out loss of every block and keep the states that are the best so far."""
        sums = {index: (0, dict[str, float]()) for index in traces}
        for part in self.rows.held_out.split(self.config.batch_size):
            for index, micro_batches in self._through(part):
                count = sum(micro.tokens for micro in micro_batches)
                tokens, losses = sums[index]
                means = self.bench[index].validate(micro_batches)
                sums[index] = tokens + count, {s: losses.get(s, 0.0) + mean * count for s, mean in means.items()}
        for index, (tokens, losses) in sums.items():
            means = {stream: loss / tokens for stream, loss in losses.items()}
            traces[index].check(step, means, partial(self.bench.state, index))
            if not traces[index].best_state:
                raise TrainingError(f"{self.names[index]}: the loss is not finite at step 0; the original overflows")

    def _retry_bad(self, traces: Mapping[int, Trace], retried: set[int]) -> None:
        """Send blocks whose loss was not finite back to their best state, at half the rate for the rest of the steps."""
        for index, trace in traces.items():
            bad = trace.first_bad_step()
            if bad is None:
                continue
            learner = self.bench[index]
            learner.restore(trace.best_state)
            again = retry(learner, self.names[index], bad, index in retried)
            again.step_count = learner.step_count
            self.bench.replace(index, again)
            trace.forget_bad()
            retried.add(index)

    def _snapshot(self, traces: Mapping[int, Trace], tokens: int, done: int, retried: set[int]) -> None:
        with atomic_folder(self.folder) as folder:
            seals = dict[str, str]()
            for index, trace in traces.items():
                learner, file = self.bench[index], folder / f"{index:04}.safetensors"
                best = {f"best.{name}": tensor for name, tensor in trace.best_state.items()}
                seals[file.name] = save_tensors(file, learner.snapshot() | best)
            rows: dict[str, Any] = {str(index): trace.as_json() for index, trace in traces.items()}
            lrs = {str(index): self.bench[index].lr for index in traces}
            state = {"done": done, "tokens": tokens, "retried": sorted(retried), "lr": lrs, "traces": rows}
            save_json(folder / "state.json", state, seals)

    def _resume(self) -> tuple[dict[int, Trace], int, int, set[int]]:
        """Return traces, tokens, steps done and retried blocks of the last snapshot, or of a beginning."""
        if not (self.folder / "state.json").is_file():
            return {index: Trace() for index in self.names}, 0, 0, set()
        state = load_json(self.folder / "state.json")
        traces = {}
        for index in self.names:
            tensors = load_tensors(self.folder / f"{index:04}.safetensors")
            learner = self.bench[index]
            learner.lr = state["lr"][str(index)]
            learner.resume(tensors, state["done"])
            best = {name.removeprefix("best."): t for name, t in tensors.items() if name.startswith("best.")}
            traces[index] = Trace.from_json(state["traces"][str(index)], best)
        return traces, state["tokens"], state["done"], set(state["retried"])
