"""Second moments of the gradients at the outputs of every linear: an empirical Fisher, factored layer by layer.

One forward and one backward pass through the original, for the log-likelihood of labels that are sampled from the model's own
predictions, as in K-FAC (Martens and Grosse, arXiv 1503.05671). The backward pass goes block by block, as the forward pass
does: the inputs of every block lie in stores, and so do the gradients at its outputs, from which the moments of a block's
linears can be computed again at any time.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lillama.lowrank.gram import WIDEST, Gram, Moments
from lillama.moments.inputs import InputMomentHooks, shrink_experts, watch_inputs, with_siblings
from lillama.moments.probes import Probes
from lillama.stream.activations import ActivationPlacement, ActivationStore, StoreFactory
from lillama.stream.batch import Batch
from lillama.stream.calls import BlockArgs, BlockInputs, Rowwise, tree_leaves
from lillama.stream.capture import advance, begin, embed_with_grad, overflow, row_leaves, row_slices
from lillama.stream.head import Head
from lillama.stream.model import StreamedModel
from lillama.system.progress import Progress, Report

Masks = tuple[Bool[Tensor, "sequences _"] | None, ...]

PROBED_TOKENS = 16_384  # on which gradients are measured


@dataclass(frozen=True)
class BackwardRun:
    """A few sequences at one block, in the backward pass.

    Attributes:
        call: what the block is given besides its hidden state.
        hidden: its inputs.
        masks: true at real tokens: at the block's own, then at those of each earlier stack.
        gradient: of the tokens' log-losses at its outputs.
    """

    call: BlockArgs
    hidden: Float[Tensor, "sequences length width"]
    masks: Masks
    gradient: Float[Tensor, "sequences length width"]


@dataclass(frozen=True)
class GradientCache:
    """Gradients at the outputs of all blocks for some calibration sequences, and second moments that are computed from them.

    Attributes:
        rows: the sequences, as indices into the calibration set.
        batch: the sequences themselves.
        gradients: one store for each block.
        calls: for each block, how its stack is called for these sequences.
        stacks: for each block, its stack.
        tokens: that the model predicts.
        micro_batch: sequences that are computed at once.
        probes: the sequences' activations before a block, for moments that are computed again.
        kept: moments of some blocks' linears, which need not be computed again.
    """

    rows: Int[Tensor, " n"]
    batch: Batch
    gradients: list[ActivationStore]
    calls: list[BlockInputs]
    stacks: list[int]
    tokens: int
    micro_batch: int
    probes: Probes
    kept: dict[int, dict[str, Moments]] = field(default_factory=dict)

    def moments(self, index: int, block: nn.Module, names: Iterable[str], inputs: bool = True) -> dict[str, Moments]:
        """Return the second moments at some linears of a block, as they are kept, or computed again to the same bits.

        Args:
            index: of the block.
            block: dense, with its weights.
            names: of the linears within the block.
            inputs: whether those of the inputs are wanted too.
        """
        names = list(names)
        if index in self.kept:
            return {name: self.kept[index][name] for name in names}
        runs = self.runs(index, self.probes.before(index).read)
        found = collect_block_moments(block, names, runs, self.tokens, inputs=inputs)
        self.probes.advance(block)  # while it is at hand
        return found

    def runs(self, index: int, read: Callable[[slice], Tensor]) -> Iterator[BackwardRun]:
        """Yield a block's runs by micro-batches; `read` returns its inputs for some of `rows`."""
        store, masks = self.gradients[index], self.batch.masks_at(self.stacks[index])
        for part in row_slices(len(self.rows), self.micro_batch):
            some = tuple(None if mask is None else mask[part] for mask in masks)
            yield BackwardRun(self.calls[index].select(index, part, store.device), read(part), some, store.read(part))

    def remove(self) -> None:
        """Give the stores back."""
        for store in (*self.gradients, *{id(table): table for table in self.calls}.values(), self.probes):
            store.remove()


GradientVisit = Callable[[int, nn.Module, dict[str, Moments]], None]


def collect_gradient_moments(
    model: StreamedModel,
    batch: Batch,
    rows: Int[Tensor, " n"],
    placement: ActivationPlacement,
    micro_batch: int,
    generator: torch.Generator,
    names: Callable[[int], Iterable[str]],
    visit: GradientVisit,
    report: Report,
) -> GradientCache:
    """Run some sequences forward and backward through a model, and collect the second moments at its linears block by block.

    Args:
        model: the original.
        batch: all calibration sequences.
        rows: which of them are used.
        placement: where activations and gradients go.
        micro_batch: sequences that are computed at once.
        generator: of the sampled labels, on the CPU.
        names: of the linears within a block whose moments are wanted.
        visit: is given each block, from the last to the first, and the moments of its linears.
        report: told about blocks.

    Raises:
        ModelError: activations or predictions are not finite.
    """
    batch, total, stacks = batch[rows], len(model.names), range(len(model.stacks))
    new = StoreFactory(placement, model.dtype, "fisher", total + len(stacks))
    tables = list[BlockInputs]()
    stores = list[list[ActivationStore]]()  # of a stack: its input, then each block's output
    for stack in stacks:
        before = {earlier: outputs[-1] for earlier, outputs in enumerate(stores)}
        table, first = begin(model, batch, new, micro_batch, stack, before)
        stores.append([first])
        for index in model.indices(stack):
            report(Progress("fisher", index, 2 * total, "forward"))
            source, sink = stores[stack][-1], new(first.shape)
            if not advance(model.block(index), index, table, source, sink, micro_batch):
                raise overflow(f"the output of {model.names[index]}", model.dtype)
            stores[stack].append(sink)
        tables.append(table)
    head = Head(model, model.outside(head=True), tables[-1])
    tokens, _ = head.counts(batch, stores[-1][-1].shape[1])
    for part in row_slices(len(batch), micro_batch):
        stores[-1][-1].write(part, head.score(batch[part], stores[-1][-1].read(part), generator))
    del head
    owner = [stack for stack in stacks for _ in model.indices(stack)]
    gradients = [store for outputs in stores for store in outputs[1:]]
    probes = Probes(model, batch, placement, micro_batch)
    cache = GradientCache(
        rows, batch, gradients, [tables[stack] for stack in owner], owner, tokens, micro_batch, probes
    )
    for stack in reversed(stacks):
        crossing = _Crossing(tables[stack], replace(new, name=f"fisher-crossing-{stack}", made=[]))
        for index in reversed(model.indices(stack)):
            report(Progress("fisher", 2 * total - 1 - index, 2 * total, "backward"))
            block, source = model.block(index), stores[stack][index - model.indices(stack).start]
            back = crossing.sink(index, source) if stack else _into(source)
            visit(
                index, block, collect_block_moments(block, names(index), cache.runs(index, source.read), tokens, back)
            )
        if stack:
            _cross(model, batch, stack, stores, crossing, micro_batch)
            crossing.new.remove()
        stores[stack][0].remove()
    report(Progress("fisher", 2 * total, 2 * total))
    return cache


Sink = Callable[[slice, Tensor, list[tuple[Tensor, Tensor | None]]], None]


def collect_block_moments(
    block: nn.Module,
    names: Iterable[str],
    runs: Iterable[BackwardRun],
    tokens: int,
    sink: Sink | None = None,
    inputs: bool = True,
) -> dict[str, Moments]:
    """Run a block forward and backward, and accumulate the second moments at the named linears.

    Args:
        block: dense, with its weights.
        names: of linears within the block.
        runs: micro-batches, in the order of the sequences.
        tokens: that the model predicts in all of them.
        sink: gets, for some rows, the gradients at the block's inputs, and all else that the block was given with its
            gradient, where it has one.
        inputs: whether the moments of the inputs are wanted too.
    """
    names, start = list(names), 0
    together = with_siblings(block, names)
    with ExitStack() as hooks, watch_inputs(block, together) as watch, torch.enable_grad():
        reached = _Gradients(watch)
        for name in together:
            hooks.enter_context(block.get_submodule(name).register_forward_hook(reached.remember(name)))
        for run in runs:
            hidden = run.hidden.detach().requires_grad_()
            given = [leaf for leaf in tree_leaves([run.call]) if isinstance(leaf, Tensor)] if sink is not None else []
            for leaf in given:
                leaf.requires_grad_(leaf.is_floating_point()).grad = None
            reached.masks = run.masks
            watch.call(run.call, block, hidden).backward(run.gradient)
            reached.end()
            if inputs:
                watch.add(*run.masks)
            watch.forget()
            if sink is not None:
                entered = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
                sink(slice(start, start + len(hidden)), entered, [(leaf, leaf.grad) for leaf in given])
            start += len(hidden)
    entering = shrink_experts(block, watch.grams, names) if inputs else {}
    gradients = shrink_experts(block, reached.grams, names)
    share = {name: gram.count / tokens for name, gram in reached.grams.items()}
    return {name: Moments(entering.get(name), gradients[name], share.get(name, 0)) for name in names}


@dataclass
class _Gradients:
    """Accumulates the Grams of the gradients at linears' outputs, each as soon as the backward pass comes there.

    Attributes:
        watch: knows which tokens come to a linear.
        grams: name -> Gram.
        masks: true at the real tokens of the present run, as `BackwardRun` has them.
    """

    watch: InputMomentHooks
    grams: dict[str, Gram] = field(default_factory=dict)
    masks: Masks = ()
    _awaited: dict[str, tuple[RemovableHandle, Tensor]] = field(default_factory=dict)

    def remember(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        """Return a forward hook for the linear of this name; of a run's calls the last one counts."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Float[Tensor, "*_ width"]) -> None:
            if name in self._awaited:
                self._awaited[name][0].remove()
            hanging = output if output.requires_grad else output.requires_grad_()  # one that hangs on no input
            self._awaited[name] = hanging.register_hook(partial(self._add, name)), _zeros(output)

        return hook

    def end(self) -> None:
        """Count zeros where the backward pass has not come; call it after each run."""
        for name in list(self._awaited):
            self._add(name, self._awaited[name][1])

    def _add(self, name: str, gradient: Float[Tensor, "*_ width"]) -> None:
        del self._awaited[name]
        gram = self.grams.setdefault(name, Gram.zeros(gradient.shape[-1], gradient.device, WIDEST))
        gram.add(self.watch.real(name, gradient, *self.masks))


def _zeros(like: Float[Tensor, "*shape"]) -> Tensor:
    """Return zeros that take no memory."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)


def _into(store: ActivationStore) -> Sink:
    return lambda rows, gradient, given: store.write(rows, gradient)


@dataclass(frozen=True)
class _Crossing:
    """Gradients at what the blocks of a stack were given by an earlier stack, besides their hidden state.

    Attributes:
        table: how the blocks are called.
        new: makes stores.
        found: key of a `Rowwise` -> gradients, summed over the blocks.
    """

    table: BlockInputs
    new: StoreFactory
    found: dict[int, ActivationStore] = field(default_factory=dict)

    def sink(self, index: int, store: ActivationStore) -> Sink:
        """Return what takes the gradients of a block."""
        marks = [
            leaf
            for leaf in tree_leaves([self.table.calls[index - self.table.first]])
            if isinstance(leaf, Rowwise | Tensor)
        ]

        def take(
            rows: slice, gradient: Float[Tensor, "sequences length width"], given: list[tuple[Tensor, Tensor | None]]
        ) -> None:
            for mark, (_, back) in zip(marks, given, strict=True):
                if isinstance(mark, Rowwise) and back is not None:
                    self._add(mark, rows, mark.rows(back, len(gradient)), store.shape[0])
            store.write(rows, gradient)

        return take

    def _add(self, mark: Rowwise, rows: slice, gradient: Float[Tensor, "sequences ..."], total: int) -> None:
        if mark.key not in self.found:
            self.found[mark.key] = self.new((total, *gradient.shape[1:]))
            self.found[mark.key].write(slice(0, total), torch.zeros(()))
        store = self.found[mark.key]
        store.write(rows, store.read(rows) + gradient)


def _cross(
    model: StreamedModel, batch: Batch, stack: int, stores: list[list[ActivationStore]], crossing: _Crossing, rate: int
) -> None:
    """Turn the gradients at what enters a stack into those at the outputs of the stack before it."""
    outside, source, end = model.outside(head=False), stores[stack][0], stores[stack - 1][-1]
    for rows in row_slices(len(batch), rate):
        before = {earlier: stores[earlier][-1].read(rows) for earlier in range(stack - 1)}
        leaf = end.read(rows).requires_grad_()
        with torch.enable_grad():
            hidden, calls = embed_with_grad(model, outside, batch[rows], stack, before | {stack - 1: leaf})
        ends = [(hidden, source.read(rows))]
        for mark, given in row_leaves(crossing.table.calls, calls).items():
            if mark.key in crossing.found:
                ends.append((given, mark.joined(crossing.found[mark.key].read(rows))))
        ends = [(tensor, gradient) for tensor, gradient in ends if tensor.requires_grad]
        back = (
            torch.autograd.grad([t for t, _ in ends], [leaf], [g for _, g in ends], allow_unused=True)[0]
            if ends
            else None
        )
        end.write(rows, torch.zeros_like(leaf) if back is None else back)
