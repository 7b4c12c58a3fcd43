"""What a model takes in its files: the types that its tensors are stored in, not those that `config.json` tells of."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from lillama.model.spec import BlockSpec, LinearSpec, ModelSpec
from lillama.model.weights import Weights
from lillama.modeling.experts import native_names


def read_sizes(spec: ModelSpec, weights: Weights, template: Callable[[int], nn.Module]) -> ModelSpec:
    """Return a description with the types and bytes of the stored tensors.

    Args:
        spec: of the model, from its configuration.
        weights: of the same model.
        template: returns a block by its index, without weights, its experts and Conv1Ds as linears.
    """
    numbers: Counter[torch.dtype] = Counter()
    for name in weights.sources:
        if name not in weights.integers:
            numbers[weights.dtype(name)] += weights.numbers(name)
    usual = max(numbers, key=lambda dtype: (numbers[dtype], str(dtype)))
    blocks = spec.blocks if len(numbers) == 1 else tuple(_with_types(block, weights, template, usual) for block in spec)
    return replace(
        spec,
        dtype=str(usual).removeprefix("torch."),
        bytes_per_param=usual.itemsize,
        blocks=blocks,
        stored_bytes=sum(weights.nbytes(name) for name in weights.sources),
    )


def _with_types(
    block: BlockSpec, weights: Weights, template: Callable[[int], nn.Module], usual: torch.dtype
) -> BlockSpec:
    """Return a block with the bytes a number of those linears that are stored in another type than is usual."""
    natives = native_names(template(block.index))

    def typed(linear: LinearSpec) -> LinearSpec:
        inner = f"{linear.name.removeprefix(f'{block.name}.')}.weight"
        dtype = weights.dtype(f"{block.name}.{natives.get(inner, inner)}")
        return linear if dtype == usual else replace(linear, itemsize=dtype.itemsize)

    return replace(block, linears=tuple(map(typed, block.linears)))
