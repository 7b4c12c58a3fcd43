"""Gram matrices of the inputs of a block's linears, measured on the calibration sequences."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lillama.lowrank.factors import Gram
from lillama.stream.calls import BlockCall

Run = tuple[BlockCall, Float[Tensor, "_ _ width"], Bool[Tensor, "_ _"] | None]  # sequences x length (x width)


@torch.no_grad()
def collect_grams(block: nn.Module, names: Iterable[str], runs: Iterable[Run]) -> dict[str, Gram]:
    """Run a block and accumulate `sum x x^T` over the real tokens that enter the named linears.

    Linears that are given the very same tensor (query, key and value; gate and up) share one Gram.

    Args:
        block: dense, with its weights.
        names: of linears within the block.
        runs: micro-batches: how the block is called, its inputs, and true at real tokens.
    """
    names = list(names)
    seen: dict[str, Tensor] = {}
    hooks = [block.get_submodule(name).register_forward_pre_hook(_remember(seen, name)) for name in names]
    grams: dict[str, Gram] = {}
    try:
        for call, hidden, mask in runs:
            call(block, hidden)
            for name in names:
                leader = next(other for other in names if seen[other] is seen[name])
                if leader == name:
                    x = seen[name]
                    gram = grams.setdefault(name, Gram.zeros(x.shape[-1], x.device))
                    gram.add(x.flatten(0, -2) if mask is None else x[mask])
                else:
                    grams[name] = grams[leader]
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return grams


def _remember(seen: dict[str, Tensor], name: str):
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0]

    return hook
