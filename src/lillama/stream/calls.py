"""What the model gives each of its blocks: captured once, replayed with any hidden state.

Nothing is assumed of a block's signature but that the hidden state is its first positional argument, or is named
`hidden_states`, and that it returns the new one alone or first in a tuple.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lillama.errors import ModelError
from lillama.stream.activations import PerSequenceTensor

HIDDEN = "hidden_states"


@dataclass(frozen=True)
class BlockArgs:
    """What a block is given besides its hidden state: attention mask, position embeddings, cache ("layer kwargs").

    Attributes:
        args: positional arguments after the hidden state.
        kwargs: keyword arguments without the hidden state.
        positional: whether the hidden state is the first positional argument.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    positional: bool = True

    def __call__(self, block: Callable[..., Any], hidden: Float[Tensor, "sequences length width"]) -> Tensor:
        """Run a block on `hidden` (sequences x length x width) and return the new hidden state."""
        if self.positional:
            return hidden_of(block(hidden, *self.args, **self.kwargs))
        return hidden_of(block(**{HIDDEN: hidden}, **self.kwargs))


@dataclass(frozen=True)
class Rowwise:
    """Stands in a captured call for a tensor that grows with the number of sequences.

    Attributes:
        key: of the table that holds its rows.
        dim: the dimension that grows; for `n` sequences it has size `n * k`, the `k` of a sequence side by side.
    """

    key: int
    dim: int

    def rows(self, tensor: Shaped[Tensor, "..."], count: int) -> Tensor:
        """Return a tensor of `count` sequences as rows: count x (the tensor's shape, with `k` at `dim`)."""
        return tensor.unflatten(self.dim, (count, tensor.shape[self.dim] // count)).movedim(self.dim, 0)

    def joined(self, rows: Shaped[Tensor, "count ..."]) -> Tensor:
        """Undo `rows`."""
        return rows.movedim(0, self.dim).flatten(self.dim, self.dim + 1)


@dataclass
class BlockInputs:
    """The calls of all blocks for all calibration sequences; tensors that blocks or sequences share are held once.

    Attributes:
        calls: one for each block of a stack; a tensor that grows with the number of sequences is replaced by `Rowwise`.
        tables: for each key of a `Rowwise`, its rows.
        extra_outputs: for each class of block, what it returns after the hidden state, or None if it returns that alone.
        first: index of the stack's first block in the model.
    """

    calls: list[BlockArgs] = field(default_factory=list)
    tables: dict[int, PerSequenceTensor] = field(default_factory=dict)
    extra_outputs: dict[type[nn.Module], tuple[Any, ...] | None] = field(default_factory=dict)
    first: int = 0

    def remove(self) -> None:
        """Give the tables back; the calls must not be used afterwards."""
        for table in self.tables.values():
            table.remove()

    def select(self, index: int, rows: slice | Tensor, device: torch.device) -> BlockArgs:
        """Return the call of block `index` for some sequences."""
        call = self.calls[index - self.first]

        def fill(leaf: Any) -> Any:
            return leaf.joined(self.tables[leaf.key].read(rows)).to(device) if isinstance(leaf, Rowwise) else leaf

        return map_call(fill, call)


def split_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, BlockArgs]:
    """Part a block's arguments into the hidden state and the rest.

    Raises:
        ModelError: the hidden state is not where it is expected.
    """
    if args and isinstance(args[0], Tensor):
        return args[0], BlockArgs(tuple(args[1:]), dict(kwargs))
    if isinstance(kwargs.get(HIDDEN), Tensor):
        return kwargs[HIDDEN], BlockArgs((), {k: v for k, v in kwargs.items() if k != HIDDEN}, positional=False)
    raise ModelError(f"a block is called without a hidden state: arguments {list(kwargs)}; not supported yet")


def map_call(function: Callable[[Any], Any], call: BlockArgs) -> BlockArgs:
    """Apply a function to every leaf of a call's arguments, inside all that torch has registered as a tree too.

    These are tuples, named ones among them, lists, dicts and the outputs of models (`ModelOutput`).
    """
    args, kwargs = pytree.tree_map(function, (call.args, call.kwargs))
    return BlockArgs(args, kwargs, call.positional)


def tree_leaves(calls: Iterable[BlockArgs]) -> list[Any]:
    """Return the leaves of all arguments, in order."""
    return [leaf for call in calls for leaf in pytree.tree_leaves((call.args, call.kwargs))]


def hidden_of(output: Any) -> Tensor:
    """Return the hidden state of a block's output."""
    return output[0] if isinstance(output, tuple | list) else output
