"""Second moments of the inputs of a block's linears."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lillama.lowrank.factors import Gram
from lillama.stream.calls import BlockCall

Run = tuple[BlockCall, Float[Tensor, "_ _ width"], Bool[Tensor, "_ _"] | None]  # sequences x length (x width)


@dataclass
class GramWatch:
    """Accumulates the Grams of a block's linears while somebody else runs the block.

    Attributes:
        grams: name -> Gram. Linears that are given the very same tensor (query, key and value; gate and up) share one.
    """

    grams: dict[str, Gram] = field(default_factory=dict)
    _seen: dict[str, Tensor] = field(default_factory=dict)

    def add(self, mask: Bool[Tensor, "sequences length"] | None) -> None:
        """Add the inputs of the run that has just ended.

        Args:
            mask: true at the real tokens of its sequences; None if all are.
        """
        leaders: dict[int, str] = {}
        for name, x in self._seen.items():
            leader = leaders.setdefault(id(x), name)
            if leader == name:
                self.grams.setdefault(name, Gram.zeros(x.shape[-1], x.device)).add(real(x, mask))
            else:
                self.grams[name] = self.grams[leader]
        self._seen.clear()

    def remember(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return a forward pre-hook for the linear of this name."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._seen[name] = args[0]

        return hook


@contextmanager
def watched(block: nn.Module, names: Iterable[str]) -> Iterator[GramWatch]:
    """Watch the inputs of the named linears of a block; call `add` after each run."""
    watch = GramWatch()
    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(block.get_submodule(name).register_forward_pre_hook(watch.remember(name)))
        yield watch


@torch.no_grad()
def collect_grams(block: nn.Module, names: Iterable[str], runs: Iterable[Run]) -> dict[str, Gram]:
    """Run a block and accumulate the Grams of the real tokens that enter the named linears.

    Args:
        block: dense, with its weights.
        names: of linears within the block.
        runs: micro-batches: how the block is called, its inputs, and true at real tokens.
    """
    with watched(block, names) as watch:
        for call, hidden, mask in runs:
            call(block, hidden)
            watch.add(mask)
    return watch.grams


def real(x: Tensor, mask: Tensor | None) -> Float[Tensor, "tokens width"]:
    """Return the vectors at the real tokens, one in a row."""
    return x.flatten(0, -2) if mask is None else x[mask.to(x.device)]
