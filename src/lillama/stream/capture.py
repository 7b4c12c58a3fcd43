"""Block inputs captured as GPTQ and AWQ do: hidden states and keyword arguments of each block's call, replayed block by block.

What comes before the blocks (embeddings) and after them (last norm, head) runs here too.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from lillama.errors import ModelError, first_line
from lillama.model.describe import hidden_size
from lillama.stream.activations import ActivationStore, PerSequenceTensor
from lillama.stream.batch import Batch, heads_only
from lillama.stream.calls import BlockArgs, BlockInputs, Rowwise, map_call, split_call, tree_leaves
from lillama.stream.model import StreamedModel

SQUARABLE = torch.finfo(torch.float32).max ** 0.5
# Of what comes behind the blocks: its weights may lack, or it wants what blocks of another width would have made.
FAILURES = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
Forward = Callable[[int, nn.Module, tuple[Any, ...], Mapping[str, Any]], Any]
NewStore = Callable[[tuple[int, ...]], ActivationStore]
Before = Mapping[int, ActivationStore]


class _AllCaptured(Exception):
    """Ends a forward pass at the last block of a stack, before what comes after it is computed."""


def row_slices(total: int, size: int) -> Iterator[slice]:
    """Cut `total` rows into consecutive slices of at most `size`."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


@torch.no_grad()
def begin(
    model: StreamedModel, batch: Batch, new: NewStore, micro_batch: int, stack: int = 0, before: Before | None = None
) -> tuple[BlockInputs, ActivationStore]:
    """Run what comes before a stack of blocks.

    Models pass no mask at all when no sequence of a batch is padded. The most padded sequence therefore goes along with
    every batch, so that all batches call the blocks in the same way.

    Args:
        model: that is streamed.
        batch: what it is run on.
        new: returns a store for activations of a shape, one row for each sequence.
        micro_batch: sequences that are computed at once.
        stack: whose blocks come next.
        before: for each earlier stack, the outputs of its last block.

    Returns:
        how the stack's blocks are called, and the inputs of the first of them.

    Raises:
        ModelError: blocks are not called one after the other, each once.
    """
    capture = _Capture(model, model.outside(head=False), stack, before or {})
    padded = [] if batch.most_padded is None else [batch.most_padded]
    row = padded or [0]
    capture.check(batch[2 * row])
    templates = _mark_growing(capture(batch, 2 * row)[1], capture(batch, 3 * row)[1])
    table, hidden = BlockInputs(templates, first=model.indices(stack).start, extra_outputs=capture.extra_outputs), None
    for rows in row_slices(len(batch), micro_batch):
        chosen = [*range(rows.start, rows.stop), *padded]
        count = rows.stop - rows.start
        inputs, calls = capture(batch, chosen)
        hidden = hidden or new((len(batch), *inputs.shape[1:]))
        hidden.write(rows, inputs[:count])
        for mark, leaf in row_leaves(table.calls, calls).items():
            values = mark.rows(leaf, len(chosen))[:count]
            table.tables.setdefault(mark.key, PerSequenceTensor(hidden, f"{hidden.name}-call-{mark.key}")).write(
                rows, values
            )
    assert hidden is not None
    return table, hidden


def embed_with_grad(
    model: StreamedModel, outside: PreTrainedModel, batch: Batch, stack: int, before: Mapping[int, Tensor]
) -> tuple[Tensor, list[BlockArgs]]:
    """Return what enters a stack of blocks, and how each is called, with the graph that leads there.

    Args:
        model: that is streamed.
        outside: from `model.outside`.
        batch: what it is run on.
        stack: whose blocks come next.
        before: outputs of the earlier stacks for these sequences.
    """
    return _Capture(model, outside, stack, {})(batch, list(range(len(batch))), before)


@torch.no_grad()
def advance(
    block: nn.Module, index: int, calls: BlockInputs, source: ActivationStore, sink: ActivationStore, micro_batch: int
) -> bool:
    """Run a block on all rows of `source` and write its outputs to `sink`, which may be the same store.

    Returns:
        whether all outputs are finite, and their squares too, of which losses are made.

    Raises:
        ModelError: the block's outputs are of another shape than its inputs.
    """
    finite = torch.ones((), dtype=torch.bool, device=source.device)
    for rows in row_slices(source.shape[0], micro_batch):
        hidden = source.read(rows)
        output = calls.select(index, rows, source.device)(block, hidden)
        if output.shape != hidden.shape:
            raise ModelError(
                f"{type(block).__name__} {index} turns activations of shape {tuple(hidden.shape[1:])} into "
                f"{tuple(output.shape[1:])}; only models whose blocks are all of one width can be compressed"
            )
        finite &= torch.linalg.vector_norm(output, dtype=torch.float32) < SQUARABLE  # not, if one is NaN
        sink.write(rows, output)
    return bool(finite)


def overflow(what: str, dtype: torch.dtype) -> ModelError:
    """Return the error for a model whose weights are finite and whose activations are not."""
    kind = str(dtype).removeprefix("torch.")
    return ModelError(
        f"{what} of the original holds NaN, infinite or far too large values on the calibration text, computed in {kind}; "
        "get a sound copy of the model, or give other --calibration"
    )


def finish(
    model: StreamedModel,
    outside: PreTrainedModel,
    calls: BlockInputs,
    ids: Int[Tensor, "sequences length"],
    hidden: Float[Tensor, "sequences length width"],
) -> Float[Tensor, "sequences length vocabulary"]:
    """Run what comes after the blocks on the last block's outputs and return the logits.

    Args:
        model: that is streamed.
        outside: from `model.outside(head=True)`.
        calls: of the last stack, from `begin`.
        ids: the sequences' token ids.
        hidden: the last block's outputs.

    Raises:
        ModelError: the model has no language-modelling head.
    """
    if outside.get_output_embeddings() is None:
        raise ModelError(
            f"{type(outside).__name__} has no language-modelling head; give a model for causal language modelling"
        )

    def forward(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return _give_back(hidden, calls.extra_outputs[type(block)])

    try:
        with _replace_blocks(model, outside, forward):
            inputs = heads_only(model.kind, hidden_size(outside.config), ids.to(model.device))
            return outside(**inputs, **_without_cache(outside)).logits
    except (AttributeError, TypeError) as error:  # some decoders want more of the encoder than its outputs
        raise ModelError(f"{type(outside).__name__}: its head cannot be run by itself ({error})") from None


@dataclass
class _Capture:
    """Runs the outside of a model with blocks that pass their input on, up to the last block of a stack.

    Attributes:
        model: that is streamed.
        outside: all of it but the blocks.
        stack: whose blocks' calls are captured.
        before: outputs of the earlier stacks.
        extra_outputs: class of block -> what it returns after the hidden state, or None if it returns that alone.
    """

    model: StreamedModel
    outside: PreTrainedModel
    stack: int
    before: Before
    extra_outputs: dict[type[nn.Module], tuple[Any, ...] | None] = field(default_factory=dict)
    _earlier: dict[type[nn.Module], tuple[Any, ...] | None] = field(default_factory=dict)
    _alive: dict[tuple[bool, type[nn.Module]], nn.Module] = field(default_factory=dict)

    def check(self, batch: Batch) -> None:
        """Refuse a model whose blocks do not run one after the other, each once; the forward pass goes on to its end."""
        seen: list[int] = []
        reason = ""

        def forward(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            seen.append(index)
            hidden, _ = split_call(args, kwargs)
            return _give_back(hidden, self._rest(index, block, args, kwargs))

        try:
            with _replace_blocks(self.model, self.outside, forward):
                self.outside(**self._inputs(batch))
        except (ModelError, torch.OutOfMemoryError):
            raise
        except FAILURES as error:
            reason = f" ({first_line(error)})"
        known = self.model.indices(self.stack)
        missed = [self.model.names[index] for index in known if index not in seen]
        if [index for index in seen if index < known.stop] != list(range(known.stop)):
            what = f"{missed[0]} is not reached{reason}" if missed else "blocks run more than once, or in another order"
            raise self._refusal(what)

    def __call__(
        self, batch: Batch, rows: list[int], before: Mapping[int, Tensor] | None = None
    ) -> tuple[Tensor, list[BlockArgs]]:
        """Return the hidden state that enters the stack's first block, and how each of its blocks is called."""
        ready = before or {stack: store.read(torch.tensor(rows)) for stack, store in self.before.items()}
        captured: list[tuple[Tensor, BlockArgs]] = []
        last = {self.model.indices(stack).stop - 1: stack for stack in range(len(self.model.stacks))}

        def forward(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            hidden, call = split_call(args, kwargs)
            if index in self.model.indices(self.stack):
                captured.append((hidden, call))
            rest = self._rest(index, block, args, kwargs)
            if last.get(index) == self.stack:
                raise _AllCaptured
            return _give_back(ready.get(last[index], hidden) if index in last else hidden, rest)

        with _replace_blocks(self.model, self.outside, forward), suppress(_AllCaptured):
            self.outside(**self._inputs(batch[rows]))
        return captured[0][0], [call for _, call in captured]

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        return batch.forward_inputs(self.model.device, self.model.dtype) | _without_cache(self.outside)

    def _refusal(self, what: str) -> ModelError:
        return ModelError(
            f"{type(self.outside).__name__}: {what}; only models whose blocks run one after the other, all of one width, can "
            "be compressed"
        )

    def _rest(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what a block gives besides its hidden state; only a block that does so is run again for every batch."""
        kind, here = type(block), index in self.model.indices(self.stack)
        extra_outputs = self.extra_outputs if here else self._earlier
        if kind in extra_outputs and not extra_outputs[kind]:
            return extra_outputs[kind]
        real = self._alive.get((here, kind)) or self.model.block(index)
        try:
            with torch.no_grad():
                output = real(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise self._refusal(
                f"{self.model.names[index]} cannot run on what enters the first block ({reason})"
            ) from None
        extra_outputs[kind] = rest = tuple(output[1:]) if isinstance(output, tuple | list) else None
        if rest:
            self._alive[here, kind] = real
        return rest


@contextmanager
def _replace_blocks(model: StreamedModel, outside: nn.Module, forward: Forward) -> Iterator[None]:
    """Let every block of `outside` run `forward` instead of its own; its attributes stay readable."""
    blocks = [outside.get_submodule(name) for name in model.names]
    for index, block in enumerate(blocks):
        block.forward = lambda *args, _index=index, _block=block, **kwargs: forward(_index, _block, args, kwargs)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _without_cache(model: PreTrainedModel) -> dict[str, Any]:
    known = inspect.signature(model.forward).parameters
    passed_on = model.can_generate() and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    return {"use_cache": False} if passed_on or "use_cache" in known else {}


def _give_back(hidden: Float[Tensor, "sequences length width"], rest: tuple[Any, ...] | None) -> Any:
    return hidden if rest is None else (hidden, *rest)


def _mark_growing(two: list[BlockArgs], three: list[BlockArgs]) -> list[BlockArgs]:
    """Return calls for two sequences with every tensor replaced by `Rowwise` that is longer in those for three."""
    keys: dict[int, int] = {}
    others = iter(tree_leaves(three))

    def mark(leaf: Any) -> Any:
        other = next(others)
        sizes = enumerate(zip(leaf.shape, other.shape, strict=True)) if isinstance(leaf, Tensor) else ()
        grown = [dim for dim, (size, larger) in sizes if 3 * size == 2 * larger != 0]
        return Rowwise(keys.setdefault(id(leaf), len(keys)), grown[0]) if grown else leaf

    return [map_call(mark, call) for call in two]


def row_leaves(templates: list[BlockArgs], calls: list[BlockArgs]) -> dict[Rowwise, Tensor]:
    """Return the tensors of captured calls that stand where the templates have a `Rowwise`."""
    pairs = zip(tree_leaves(templates), tree_leaves(calls), strict=True)
    return {mark: leaf for mark, leaf in pairs if isinstance(mark, Rowwise)}
