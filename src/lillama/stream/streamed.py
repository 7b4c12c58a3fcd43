"""A model whose blocks are in memory one at a time: the parts before, between and after them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from lillama.errors import ModelError
from lillama.lowrank.install import install_stored
from lillama.model.checkpoint import CheckpointReader
from lillama.model.describe import find_stack, refuse_quantized
from lillama.model.skeleton import filled, skeleton, stored_names
from lillama.model.source import load_config, quantization, stored_dtype
from lillama.stream.calls import BlockCall, CallTable, Rowwise, leaves, map_call, split_call
from lillama.stream.store import ActivationStore, RowTable

Forward = Callable[[int, nn.Module, tuple[Any, ...], Mapping[str, Any]], Any]


class _AllCaptured(Exception):
    """Ends a forward pass at its last block, before the head is computed."""


@dataclass(frozen=True)
class StreamedModel:
    """A model on disk that is run block by block.

    Attributes:
        skeleton: without weights; factorised linears already installed, if the model on disk is compressed.
        stack: name of the list of blocks.
        reader: of its weights.
        device: that computes.
        dtype: of weights and activations in memory.
    """

    skeleton: PreTrainedModel
    stack: str
    reader: CheckpointReader
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def names(self) -> dict[str, str]:
        """Name in the model -> name in the checkpoint; every shape is checked on the way."""
        return stored_names(self.skeleton, self.reader)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The blocks' skeletons."""
        return tuple(self.skeleton.get_submodule(self.stack).children())

    def block(self, index: int) -> nn.Module:
        """Read one block into memory."""
        return filled(self.blocks[index], f"{self.stack}.{index}", self.names, self.reader, self.device, self.dtype)

    def outside(self, head: bool) -> PreTrainedModel:
        """Read all that is not a block into memory; the blocks stay on the meta device.

        Args:
            head: whether the output layer is read too, if it does not share the input embeddings.
        """
        wanted = {k: v for k, v in self.names.items() if not k.startswith(f"{self.stack}.")}
        output = self.skeleton.get_output_embeddings()
        if not head and output is not None and output.weight is not self.skeleton.get_input_embeddings().weight:
            unwanted = {name for name, module in self.skeleton.named_modules() if module is output}
            wanted = {k: v for k, v in wanted.items() if k.rpartition(".")[0] not in unwanted}
        model = filled(self.skeleton, "", wanted, self.reader, self.device, self.dtype)
        assert isinstance(model, PreTrainedModel)
        model.tie_weights()
        return model


def open_streamed(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> StreamedModel:
    """Open a model folder, dense or compressed, to be run block by block.

    Args:
        folder: of the model.
        device: that computes.
        dtype: of weights and activations in memory; None takes fp32 on the CPU and the stored type elsewhere.

    Raises:
        ModelError: the model cannot be used.
    """
    config = load_config(folder)
    found = quantization(config)
    if found is not None and found.get("quant_method") != "lillama":
        refuse_quantized(config)
    model = skeleton(config)
    stack = find_stack(model)  # before linears are swapped: quantised ones would not be recognised
    if found is not None:
        install_stored(model, found)
    computed = dtype or (torch.float32 if device.type == "cpu" else stored_dtype(config))
    return StreamedModel(model, stack, CheckpointReader(folder), device, computed)


def row_slices(total: int, size: int) -> Iterator[slice]:
    """Cut `total` rows into consecutive slices of at most `size`."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


@torch.no_grad()
def begin(
    model: StreamedModel,
    ids: Int[Tensor, "sequences length"],
    mask: Bool[Tensor, "sequences length"] | None,
    hidden: ActivationStore,
    micro_batch: int,
) -> CallTable:
    """Run what comes before the blocks: write the first block's inputs to `hidden`, return how the blocks are called.

    Models pass no mask at all when no sequence of a batch is padded. The most padded sequence therefore goes along with
    every batch, so that all batches call the blocks in the same way.
    """
    outside, table = model.outside(head=False), CallTable()
    padded = [] if mask is None or bool(mask.all()) else [int(mask.sum(dim=1).argmin())]

    def capture(rows: list[int]) -> tuple[Tensor, list[BlockCall]]:
        return _capture(model, outside, table, ids[rows], None if mask is None else mask[rows])

    row = padded or [0]
    table.calls = _marked(capture(2 * row)[1], capture(3 * row)[1])
    for rows in row_slices(len(ids), micro_batch):
        chosen = [*range(rows.start, rows.stop), *padded]
        count = rows.stop - rows.start
        inputs, calls = capture(chosen)
        hidden.write(rows, inputs[:count])
        for mark, leaf in _rowwise_leaves(table.calls, calls).items():
            values = mark.rows(leaf, len(chosen))[:count]
            table.tables.setdefault(mark.key, RowTable(hidden, f"{hidden.name}-call-{mark.key}")).write(rows, values)
    return table


@torch.no_grad()
def advance(
    block: nn.Module, index: int, calls: CallTable, source: ActivationStore, sink: ActivationStore, micro_batch: int
) -> None:
    """Run a block on all rows of `source` and write its outputs to `sink`, which may be the same store."""
    for rows in row_slices(source.shape[0], micro_batch):
        sink.write(rows, calls.select(index, rows, source.device)(block, source.read(rows)))


def finish(
    model: StreamedModel,
    outside: PreTrainedModel,
    calls: CallTable,
    ids: Int[Tensor, "sequences length"],
    mask: Bool[Tensor, "sequences length"] | None,
    hidden: Float[Tensor, "sequences length width"],
) -> Float[Tensor, "sequences length vocabulary"]:
    """Run what comes after the blocks on the last block's outputs and return the logits.

    Args:
        model: that is streamed.
        outside: from `model.outside(head=True)`.
        calls: from `begin`.
        ids: the sequences' token ids.
        mask: true at real tokens.
        hidden: the last block's outputs.

    Raises:
        ModelError: the model has no language-modelling head.
    """
    if outside.get_output_embeddings() is None:
        raise ModelError(
            f"{type(outside).__name__} has no language-modelling head; give a model for causal language modelling"
        )

    def forward(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return _returned(hidden, calls.rests[type(block)])

    with _blocks_replaced(model, outside, forward):
        return outside(**_inputs(model, ids, mask)).logits


def _capture(
    model: StreamedModel,
    outside: PreTrainedModel,
    table: CallTable,
    ids: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, list[BlockCall]]:
    """Run the outside of the model with blocks that pass their input on.

    Returns:
        the hidden state that enters the first block, and how each block is called.
    """
    captured: list[tuple[Tensor, BlockCall]] = []

    def forward(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        hidden, call = split_call(args, kwargs)
        captured.append((hidden, call))
        if type(block) not in table.rests:
            output = model.block(index)(*args, **kwargs)
            table.rests[type(block)] = tuple(output[1:]) if isinstance(output, tuple | list) else None
        if index == len(model.blocks) - 1:
            raise _AllCaptured
        return _returned(hidden, table.rests[type(block)])

    with _blocks_replaced(model, outside, forward), suppress(_AllCaptured):
        outside(**_inputs(model, ids, mask))
    return captured[0][0], [call for _, call in captured]


@contextmanager
def _blocks_replaced(model: StreamedModel, outside: nn.Module, forward: Forward) -> Iterator[None]:
    """Let every block of `outside` run `forward` instead of its own; its attributes stay readable."""
    blocks = list(outside.get_submodule(model.stack).children())
    for index, block in enumerate(blocks):
        block.forward = lambda *args, _index=index, _block=block, **kwargs: forward(_index, _block, args, kwargs)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _inputs(model: StreamedModel, ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": ids.to(model.device), "use_cache": False}
    return inputs if mask is None else inputs | {"attention_mask": mask.to(model.device, torch.long)}


def _returned(hidden: Tensor, rest: tuple[Any, ...] | None) -> Any:
    return hidden if rest is None else (hidden, *rest)


def _marked(two: list[BlockCall], three: list[BlockCall]) -> list[BlockCall]:
    """Return calls for two sequences with every tensor replaced by `Rowwise` that is longer in those for three."""
    keys: dict[int, int] = {}
    others = iter(leaves(three))

    def mark(leaf: Any) -> Any:
        other = next(others)
        sizes = enumerate(zip(leaf.shape, other.shape, strict=True)) if isinstance(leaf, Tensor) else ()
        grown = [dim for dim, (size, larger) in sizes if 3 * size == 2 * larger != 0]
        return Rowwise(keys.setdefault(id(leaf), len(keys)), grown[0]) if grown else leaf

    return [map_call(mark, call) for call in two]


def _rowwise_leaves(templates: list[BlockCall], calls: list[BlockCall]) -> dict[Rowwise, Tensor]:
    """Collect the tensors of captured calls that stand where the templates have a `Rowwise`."""
    pairs = zip(leaves(templates), leaves(calls), strict=True)
    return {mark: leaf for mark, leaf in pairs if isinstance(mark, Rowwise)}
