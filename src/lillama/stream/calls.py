"""How the model calls each of its blocks: captured once, replayed with any hidden state.

Nothing is assumed of a block's signature but that the hidden state is its first positional argument, or is named
`hidden_states`, and that it returns the new one alone or first in a tuple.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lillama.errors import ModelError

HIDDEN = "hidden_states"


@dataclass(frozen=True)
class BlockCall:
    """What a block is given besides its hidden state.

    Attributes:
        args: positional arguments after the hidden state.
        kwargs: keyword arguments without the hidden state.
        positional: whether the hidden state is the first positional argument.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    positional: bool = True

    def __call__(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Run a block on `hidden` (sequences x length x width) and return the new hidden state."""
        if self.positional:
            return first(block(hidden, *self.args, **self.kwargs))
        return first(block(**{HIDDEN: hidden}, **self.kwargs))


@dataclass(frozen=True)
class Rowwise:
    """Stands in a captured call for a tensor with one row for each calibration sequence."""

    key: int


@dataclass
class CallTable:
    """The calls of all blocks for all calibration sequences; tensors that blocks or sequences share are held once.

    Attributes:
        calls: one for each block; a tensor that differs between sequences is replaced by `Rowwise`.
        rows: for each `Rowwise`, all its rows (sequences x ...).
        rests: for each class of block, what it returns after the hidden state, or None if it returns that alone.
    """

    calls: list[BlockCall] = field(default_factory=list)
    rows: dict[int, Tensor] = field(default_factory=dict)
    rests: dict[type[nn.Module], tuple[Any, ...] | None] = field(default_factory=dict)

    def select(self, index: int, rows: slice | Tensor, device: torch.device) -> BlockCall:
        """Return the call of block `index` for some sequences."""
        call = self.calls[index]

        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, Rowwise):
                return leaf
            table = self.rows[leaf.key]
            return table[rows.to(table.device) if isinstance(rows, Tensor) else rows].to(device)

        return map_call(fill, call)


def split_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, BlockCall]:
    """Part a block's arguments into the hidden state and the rest.

    Raises:
        ModelError: the hidden state is not where it is expected.
    """
    if args and isinstance(args[0], Tensor):
        return args[0], BlockCall(tuple(args[1:]), dict(kwargs))
    if isinstance(kwargs.get(HIDDEN), Tensor):
        return kwargs[HIDDEN], BlockCall((), {k: v for k, v in kwargs.items() if k != HIDDEN}, positional=False)
    raise ModelError(f"a block is called without a hidden state: arguments {list(kwargs)}; not supported yet")


def map_call(function: Callable[[Any], Any], call: BlockCall) -> BlockCall:
    """Apply a function to every leaf of a call's arguments, inside tuples, lists and dicts too."""
    return BlockCall(tuple(_map(function, a) for a in call.args), _map(function, call.kwargs), call.positional)


def first(output: Any) -> Tensor:
    """Return the hidden state of a block's output."""
    return output[0] if isinstance(output, tuple | list) else output


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, tuple | list):
        return type(tree)(_map(function, item) for item in tree)
    if isinstance(tree, dict):
        return {key: _map(function, item) for key, item in tree.items()}
    return function(tree)
