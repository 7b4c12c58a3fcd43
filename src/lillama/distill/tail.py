"""The recovery tail: all compressed blocks learn together to give the original's predictions.

The gradient of each block is clipped by its own norm and the block steps as soon as its gradient is complete, so that no two
blocks need their gradients at once. A state of the whole training is written now and then, so that a killed run goes on to
the same bits.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lillama.artefacts import load_json, load_tensors, save_json, save_tensors
from lillama.distill.block import REPORT_SECONDS, Rows, batches, step_total
from lillama.distill.end_to_end import Chain, Part
from lillama.distill.joint import SNAPSHOT_SECONDS
from lillama.distill.learner import Learner
from lillama.distill.prediction import Compared, Head
from lillama.distill.recover import HeldOut, RecoverConfig, RecoverLog, RecoverTrace
from lillama.files import atomic_folder
from lillama.progress import Progress, Report
from lillama.stream.batch import Batch
from lillama.stream.store import ActivationStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TailData:
    """What the tail learns from.

    Attributes:
        batch: all calibration sequences.
        targets: the original's last outputs for them.
        rows: training and held-out sequences.
        micro_batch: sequences that are computed at once.
    """

    batch: Batch
    targets: ActivationStore
    rows: Rows
    micro_batch: int


@dataclass(frozen=True)
class Tail:
    """The training.

    Attributes:
        chain: the blocks.
        head: what comes after them.
        data: what they learn from.
        config: of the tail.
        lr: peak learning rate.
        seed: of the order of the batches.
        folder: for the state to resume from.
        snapshot_seconds: between two of these states.
    """

    chain: Chain
    head: Head
    data: TailData
    config: RecoverConfig
    lr: float
    seed: int
    folder: Path
    snapshot_seconds: float = SNAPSHOT_SECONDS

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return step_total(self.data.rows, self.config.training)

    def run(self, report: Report) -> tuple[RecoverLog, dict[int, dict[str, Tensor]]]:
        """Train.

        Returns:
            the record, and block index -> parameters of the best state; nothing if none was better than the start.
        """
        begun, saved, told = time.monotonic(), time.monotonic(), 0.0
        trace, before = self._resume()
        done = len(trace.losses)
        if not done:
            trace.check(0, self.measure(), self._states)
            trace.stopped = "" if trace.checks[0][1].finite else "not finite"
        for batch in islice(batches(self.data.rows, self.config.training, self.seed), done, None):
            if trace.stopped:
                break
            self._step(batch, trace)
            done += 1
            if time.monotonic() - told > REPORT_SECONDS or done == self.steps:
                told = time.monotonic()
                report(Progress("recover", done, self.steps, "all blocks", trace.tokens, trace.losses[-1][0].item()))
            if done in self.config.check_steps(self.steps):
                trace.check(done, self.measure(), self._states)
                trace.stopped = trace.reason_to_stop(self.config.patience())
            if time.monotonic() - saved > self.snapshot_seconds and done < self.steps and not trace.stopped:
                self._snapshot(trace, before + time.monotonic() - begun)
                saved = time.monotonic()
        _tell(trace)
        return trace.log(self.lr, before + time.monotonic() - begun), trace.best_states

    def measure(self) -> HeldOut:
        """Measure the blocks as they are now on the held-out sequences."""
        rows, sums, lengths = self.data.rows.held_out, torch.zeros(2), 0.0
        for batch in rows.split(self.config.batch_size):
            parts = Part.of(batch, self.data.micro_batch)
            for part, own in zip(parts, self.chain.outputs(parts), strict=True):
                teacher = self.data.targets.read(part.ids)
                sums += self._compared(part, own, teacher, None).sums.cpu()
                ratio = own.float().norm(dim=-1) / teacher.float().norm(dim=-1)
                mask = self.data.batch[part.ids].masks.get(len(self.head.model.stacks) - 1)
                lengths += (ratio if mask is None else ratio[mask.to(ratio.device)]).sum().item()
        tokens, predicted = self._counts(rows)
        return HeldOut(sums[0].item() / tokens, sums[1].item() / predicted, lengths / tokens)

    def _step(self, batch: Tensor, trace: RecoverTrace) -> None:
        """Let every block take one step on a batch.

        Gradients are of sums over tokens, so that those of half-precision activations do not underflow; the masters' are
        divided by the number of tokens.
        """
        parts = Part.of(batch, self.data.micro_batch)
        tokens, predicted = self._counts(batch)
        weights = 1 - self.config.lm, self.config.lm * tokens / predicted
        sums, gradients = torch.zeros(2, device=self.chain.inputs.device), list[Tensor]()
        for part, own in zip(parts, self.chain.forward(parts), strict=True):
            found = self._compared(part, own, self.data.targets.read(part.ids), weights)
            assert found.gradient is not None
            sums += found.sums
            gradients.append(found.gradient)
        for index in self.chain.backward(parts, gradients):
            _update(self.chain.bench[index], tokens)
        trace.tokens += tokens
        trace.losses.append(sums / torch.tensor([tokens, predicted], device=sums.device))

    def _compared(self, part: Part, own: Tensor, teacher: Tensor, weights: tuple[float, float] | None) -> Compared:
        return self.head.compare(self.data.batch[part.ids], own, teacher, weights)

    def _counts(self, rows: Tensor) -> tuple[int, int]:
        """Return the real tokens of some sequences, and how many of them have a next one; at least one each."""
        tokens, predicted = self.head.counts(self.data.batch[rows], self.data.targets.shape[1])
        return max(1, tokens), max(1, predicted)

    def _states(self) -> dict[int, dict[str, Tensor]]:
        return {index: self.chain.bench.state(index) for index in self._trained()}

    def _trained(self) -> Iterator[int]:
        return (index for index in self.chain.blocks if index in self.chain.trained)

    def _snapshot(self, trace: RecoverTrace, seconds: float) -> None:
        with atomic_folder(self.folder) as folder:
            seals = dict[str, str]()
            for index in self._trained():
                file = folder / f"{index:04}.safetensors"
                best = {f"best.{name}": tensor for name, tensor in trace.best_states.get(index, {}).items()}
                seals[file.name] = save_tensors(file, self.chain.bench[index].snapshot() | best)
            save_json(folder / "state.json", {"seconds": seconds, "trace": trace.as_json()}, seals)

    def _resume(self) -> tuple[RecoverTrace, float]:
        """Return trace and seconds of the last snapshot, or of a beginning."""
        if not (self.folder / "state.json").is_file():
            return RecoverTrace(self.config.lm), 0.0
        state = load_json(self.folder / "state.json")
        done, best = len(state["trace"]["losses"]), dict[int, dict[str, Tensor]]()
        for index in self._trained():
            file = self.folder / f"{index:04}.safetensors"
            self.chain.bench[index].resume(load_tensors(file), done)
            if state["trace"]["best"]:  # mapped, so that the whole model does not come into memory
                best[index] = {n.removeprefix("best."): t for n, t in load_file(file).items() if n.startswith("best.")}
        return RecoverTrace.from_json(self.config.lm, state["trace"], best), state["seconds"]


def _update(learner: Learner, tokens: int) -> None:
    """Take an optimiser step on the gradients of a sum over tokens."""
    for parameter in learner.student.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(tokens)
    learner.update()


def _tell(trace: RecoverTrace) -> None:
    """Warn where the tail ended otherwise than planned."""
    kept = (
        f"the state after step {trace.checks[trace.best][0]} is kept" if trace.best else "the blocks stay as they were"
    )
    if trace.stopped in ("not finite", "diverged"):
        logger.warning("recovery: loss %s by step %d; %s; lower recover.lr", trace.stopped, len(trace.losses), kept)
    elif not trace.best:
        logger.warning("recovery did not improve on the held-out sequences; %s", kept)
