"""torch.compile for the steps of a block: fewer passes over its activations, after a warm-up of some seconds."""

import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

logger = logging.getLogger(__name__)

# Ranks differ from block to block, and so does the code that is made for them: each must count alone against the number of
# variants after which torch.compile gives up. Older versions of torch cannot tell them apart.
ALONE: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)
MOST_OPERATIONS = 200  # in a block that is compiled; one of low-rank linears has about 100 in a Llama, 140 in a Gemma 2


class Compiled(nn.Module):
    """A block, compiled on its first call; where torch.compile cannot do so, it runs as it is.

    It has to become one graph: what comes between several of them, as where experts are given their tokens, is different on
    every call and would be compiled as often. Nor are loops of many steps unrolled.

    Args:
        block: that runs.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

        def run(*args: Any, **kwargs: Any) -> Any:
            return block(*args, **kwargs)

        self._fast: Callable[..., Any] | None = torch.compile(run, dynamic=False, fullgraph=True, **ALONE)  # pyright: ignore[reportUnknownMemberType, reportCallIssue]
        self._counted = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        if not self._counted:
            self._count(args, kwargs)
        if self._fast is not None:
            try:
                return self._fast(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # of several kinds; one that is not of the compiler comes again below
                self._give_up(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        return self.block(*args, **kwargs)

    def _count(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give up on a block of too many operations; finding out takes one pass through it."""
        self._counted = True
        with torch.no_grad(), _Counter() as counter:
            self.block(*args, **kwargs)
        if counter.count > MOST_OPERATIONS:
            self._give_up(
                f"a block of {counter.count} operations, which would take very long; at most {MOST_OPERATIONS}"
            )

    def _give_up(self, reason: str) -> None:
        self._fast = None
        _tell(reason)


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
