"""torch.compile for the steps of a block: fewer passes over its activations, after a warm-up of some seconds."""

import logging
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lillama.stream.calls import hidden_of

logger = logging.getLogger(__name__)

MOST_OPERATIONS = 200  # in a block that is compiled; one of low-rank linears has about 100 in a Llama, 140 in a Gemma 2


class Compiled(nn.Module):
    """A block, compiled on its first call; where torch.compile cannot do so, it runs as it is.

    It has to become one graph: what comes between several of them, as where experts are given their tokens, is different on
    every call and would be compiled as often. Nor are loops of many steps unrolled.

    Args:
        block: that runs, with gradients.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.fast: Callable[..., Any] | None = None
        self._tried = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        if not self._tried:
            self._tried, self.fast = True, self._compiled(args, kwargs)
        return self.block(*args, **kwargs) if self.fast is None else self.fast(*args, **kwargs)

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        """Return the compiled block; None if that fails."""
        try:
            return self._trial(args, kwargs)
        except torch.OutOfMemoryError:
            raise
        except (
            RuntimeError,
            OSError,
        ) as error:  # the compiler's own, and of its files; any other comes again without it
            reason, _, _ = str(error).strip().partition("\n")
            _tell(f"{type(error).__name__}: {reason}")
            return None

    def _trial(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        """Return the compiled block after a forward and a backward pass; None if compiling would take too long."""
        with torch.no_grad(), _Counter() as counter:
            self.block(*args, **kwargs)
        if counter.count > MOST_OPERATIONS:
            _tell(f"a block of {counter.count} operations, which would take very long; at most {MOST_OPERATIONS}")
            return None
        fast: Callable[..., Any] = torch.compile(_own_code(self.block), dynamic=False, fullgraph=True)  # pyright: ignore[reportUnknownMemberType]
        output = hidden_of(fast(*args, **kwargs))
        parameters = [parameter for parameter in self.block.parameters() if parameter.requires_grad]
        torch.autograd.grad(output.sum(), parameters, allow_unused=True)
        return fast


def _own_code(block: nn.Module) -> Callable[..., Any]:
    """Return a function that runs a block, with a code object of its own.

    Ranks differ from block to block, and so does what torch.compile makes of them; for each code object it gives up after
    some variants.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return block(*args, **kwargs)

    return FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)


class _Counter(TorchDispatchMode):
    """Counts operations on tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@cache
def _tell(reason: str) -> None:
    """Say once why something is not compiled."""
    logger.warning("torch.compile is of no help here, and blocks are taught without it: %s", reason)
