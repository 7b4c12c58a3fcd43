"""How the model's own log-likelihood depends on every linear: one pass forth and one back through the original.

The pass back goes block by block, as the pass forth does: the inputs of every block lie in stores, and so do the gradients
at its outputs, from which a block's part can be computed again at any time.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lillama.distill.grams import real, watched
from lillama.distill.prediction import Head
from lillama.lowrank.factors import Gram, Moments
from lillama.progress import Progress, Report
from lillama.stream.calls import BlockCall, CallTable
from lillama.stream.store import ActivationStore, Shelf
from lillama.stream.streamed import StreamedModel, advance, begin, row_slices

PROBED_TOKENS = 16_384  # on which gradients are measured


@dataclass(frozen=True)
class BackwardRun:
    """A few sequences at one block, on the way back.

    Attributes:
        call: what the block is given besides its hidden state.
        hidden: its inputs.
        mask: true at real tokens; None if all are.
        gradient: of the tokens' log-losses at its outputs.
    """

    call: BlockCall
    hidden: Float[Tensor, "sequences length width"]
    mask: Bool[Tensor, "sequences length"] | None
    gradient: Float[Tensor, "sequences length width"]


@dataclass(frozen=True)
class Fisher:
    """Gradients at the outputs of all blocks for some calibration sequences.

    Attributes:
        rows: the sequences, as indices into the calibration set.
        gradients: one store for each block.
        calls: how blocks are called for these sequences.
        mask: true at their real tokens; None if all are.
        micro_batch: sequences that are computed at once.
        kept: moments of some blocks' linears, which need not be computed again.
    """

    rows: Int[Tensor, " n"]
    gradients: list[ActivationStore]
    calls: CallTable
    mask: Bool[Tensor, "n length"] | None
    micro_batch: int
    kept: dict[int, dict[str, Moments]] = field(default_factory=dict)

    def moments(
        self, index: int, block: nn.Module, names: Iterable[str], read: Callable[[slice], Tensor]
    ) -> dict[str, Moments]:
        """Return the second moments at some linears of a block, as they are kept, or computed again to the same bits.

        Args:
            index: of the block.
            block: dense, with its weights.
            names: of the linears within the block.
            read: returns the block's inputs for some of `rows`.
        """
        names = list(names)
        if index in self.kept:
            return {name: self.kept[index][name] for name in names}
        return moments(block, names, self.runs(index, read))

    def runs(self, index: int, read: Callable[[slice], Tensor]) -> Iterator[BackwardRun]:
        """Yield a block's runs by micro-batches; `read` returns its inputs for some of `rows`."""
        store = self.gradients[index]
        for part in row_slices(len(self.rows), self.micro_batch):
            mask = None if self.mask is None else self.mask[part]
            yield BackwardRun(self.calls.select(index, part, store.device), read(part), mask, store.read(part))

    def remove(self) -> None:
        """Give the stores back."""
        for store in self.gradients:
            store.remove()


Visit = Callable[[int, nn.Module, dict[str, Moments]], None]


def measured(
    model: StreamedModel,
    ids: Int[Tensor, "sequences length"],
    mask: Bool[Tensor, "sequences length"] | None,
    rows: Int[Tensor, " n"],
    shelf: Shelf,
    micro_batch: int,
    generator: torch.Generator,
    names: Callable[[int], Iterable[str]],
    visit: Visit,
    report: Report,
) -> Fisher:
    """Run some sequences forth and back through a model.

    Args:
        model: the original.
        ids: all calibration sequences.
        mask: true at their real tokens; None if all are.
        rows: which of them are used.
        shelf: where activations and gradients go.
        micro_batch: sequences that are computed at once.
        generator: of the sampled labels, on the CPU.
        names: of the linears within a block whose moments are wanted.
        visit: is given each block, from the last to the first, and the moments of its linears.
        report: told about blocks.
    """
    ids, mask = ids[rows], None if mask is None else mask[rows]
    shape, total = (*ids.shape, model.skeleton.config.get_text_config().hidden_size), len(model.blocks)
    place = shelf.place((total + 2) * torch.Size(shape).numel() * model.dtype.itemsize)
    stores = [ActivationStore(shape, model.dtype, shelf, place, f"fisher-{index}") for index in range(total + 1)]
    calls = begin(model, ids, mask, stores[0], micro_batch)
    for index in range(total):
        report(Progress("fisher", index, 2 * total, "forth"))
        advance(model.block(index), index, calls, stores[index], stores[index + 1], micro_batch)
    head = Head(model, model.outside(head=True), calls)
    for part in row_slices(len(ids), micro_batch):
        scored = head.score(ids[part], None if mask is None else mask[part], stores[-1].read(part), generator)
        stores[-1].write(part, scored)
    del head
    fisher = Fisher(rows, stores[1:], calls, mask, micro_batch)
    for index in reversed(range(total)):
        report(Progress("fisher", 2 * total - 1 - index, 2 * total, "back"))
        block, source = model.block(index), stores[index]
        visit(index, block, moments(block, names(index), fisher.runs(index, source.read), source))
    stores[0].remove()
    report(Progress("fisher", 2 * total, 2 * total))
    return fisher


def moments(
    block: nn.Module, names: Iterable[str], runs: Iterable[BackwardRun], sink: ActivationStore | None = None
) -> dict[str, Moments]:
    """Run a block forth and back, and accumulate the second moments at the named linears.

    Args:
        block: dense, with its weights.
        names: of linears within the block.
        runs: micro-batches, in the order of the sequences.
        sink: gets the gradients at the block's inputs, if they are wanted; it may be the store that the inputs lie in.
    """
    names, outputs, gradients, start = list(names), dict[str, Tensor](), dict[str, Gram](), 0
    with ExitStack() as hooks, watched(block, names) as watch, torch.enable_grad():
        for name in names:
            hooks.enter_context(block.get_submodule(name).register_forward_hook(_keep(outputs, name)))
        for run in runs:
            hidden = run.hidden.detach().requires_grad_()
            result = run.call(block, hidden)
            found = torch.autograd.grad(result, [hidden, *(outputs[name] for name in names)], run.gradient)
            watch.add(run.mask)
            for name, gradient in zip(names, found[1:], strict=True):
                gradients.setdefault(name, Gram.zeros(gradient.shape[-1], gradient.device)).add(
                    real(gradient, run.mask)
                )
            if sink is not None:
                sink.write(slice(start, start + len(hidden)), found[0])
            start += len(hidden)
    return {name: Moments(watch.grams[name], gradients[name]) for name in names}


def _keep(outputs: dict[str, Tensor], name: str):
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        outputs[name] = output

    return hook
