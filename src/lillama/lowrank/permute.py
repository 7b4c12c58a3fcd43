"""Put the rows of a weight in the order of its pivots, where the neighbours allow it: the layer then needs no order."""

from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lillama.lowrank.pivot import in_order
from lillama.lowrank.student import load_student

PROBE_TOKENS = 7
TOLERANCE = 1e-9  # of the largest output, in fp64


def absorb(
    template: nn.Module, ranks: Mapping[str, int], state: dict[str, Tensor], rows: dict[str, Int[Tensor, " out"]]
) -> None:
    """Permute rows of some linears and the columns of the one that reads them all, in place.

    A candidate is a linear whose inputs are as many as its siblings' outputs, in the same parent module, such as `down`
    after `gate` and `up`, or `fc2` after `fc1`. Whether the structure allows it is not looked up but tried: the parent is
    run in fp64 on random tokens before and after, and any difference undoes the change. Attention therefore stays as it
    is, and so does a parent that needs more than one input. A linear can take in the order of one of its siblings: of the
    one with the largest rank.

    Args:
        template: the block without weights; it is left as it is.
        ranks: name within the block -> rank of the factorised linears.
        state: name within the block -> tensor, in the plain form.
        rows: name within the block -> its rows, the pivots first; `0, 1, ...` afterwards where the order was absorbed.
    """
    for parent, reader, siblings in list(_candidates(template)):
        open_orders = [name for name in siblings if name in rows and not in_order(rows[name])]
        if not open_orders:
            continue
        order = rows[max(open_orders, key=lambda name: ranks[name])]
        permuted = _permute(state, order, siblings, reader)
        if _same(template, parent, ranks, state, state | permuted):
            state |= permuted
            rows |= {name: order.argsort()[rows[name]] for name in siblings if name in rows}


def _candidates(template: nn.Module) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield parent, reader, and the siblings that may write all of the reader's inputs."""
    for parent, module in cast(Iterator[tuple[str, nn.Module]], template.named_modules()):
        dot = f"{parent}." if parent else ""
        linears = {f"{dot}{name}": child for name, child in module.named_children() if isinstance(child, nn.Linear)}
        for reader, linear in linears.items():
            siblings = [
                name for name, other in linears.items() if name != reader and other.out_features == linear.in_features
            ]
            if siblings:
                yield parent, reader, tuple(siblings)


def _permute(
    state: Mapping[str, Tensor], order: Int[Tensor, " out"], siblings: tuple[str, ...], reader: str
) -> dict[str, Tensor]:
    """Return what changes when the siblings write, and the reader reads, in another order."""
    rows = [f"{name}.{leaf}" for name in siblings for leaf in ("left.weight", "weight", "bias")]
    columns = next(name for name in (f"{reader}.right.weight", f"{reader}.weight") if name in state)
    permuted = {name: state[name][order] for name in rows if name in state and state[name].numel()}
    return permuted | {columns: state[columns][:, order]}


def _same(
    template: nn.Module,
    parent: str,
    ranks: Mapping[str, int],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> bool:
    """Whether a part of the block computes the same with both states."""
    outputs: list[Tensor] = []
    for state in (before, after):
        module = _part(template, parent, ranks, state)
        width = next(child.in_features for child in module.modules() if isinstance(child, nn.Linear))
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, PROBE_TOKENS, width, generator=generator, dtype=torch.float64)
        output = _output(module, x)
        if output is None:
            return False
        outputs.append(output)
    first, second = outputs
    return first.shape == second.shape and bool((first - second).abs().max() <= TOLERANCE * first.abs().max())


def _part(template: nn.Module, parent: str, ranks: Mapping[str, int], state: Mapping[str, Tensor]) -> nn.Module:
    dot = f"{parent}." if parent else ""
    inside = {name.removeprefix(dot): rank for name, rank in ranks.items() if name.startswith(dot)}
    weights = {name.removeprefix(dot): tensor for name, tensor in state.items() if name.startswith(dot)}
    module = template.get_submodule(parent)
    return load_student(module, inside, weights, torch.device("cpu"), torch.float64)


@torch.no_grad()
def _output(module: nn.Module, x: Tensor) -> Tensor | None:
    """Return the first output of a module for one input, or None if it needs more, or another."""
    try:
        signature(module.forward).bind(x)
        found: Any = module(x)
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError):
        return None
    first = cast(tuple[Any, ...], found)[0] if isinstance(found, tuple) else found
    return first if isinstance(first, Tensor) else None
