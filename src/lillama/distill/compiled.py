"""torch.compile for the steps of a block: fewer passes over its activations, after a warm-up of some seconds."""

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

logger = logging.getLogger(__name__)

# Ranks differ from block to block, and so does the code that is made for them: each must count alone against the number of
# variants after which torch.compile gives up. Older versions of torch cannot tell them apart.
ALONE: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)

Forward = Callable[[Mapping[str, Tensor] | None, tuple[Any, ...], Mapping[str, Any]], Any]


def forward_of(student: nn.Module) -> Forward:
    """Return the function that runs a block: with its own parameters, or with those given in their place."""

    def forward(working: Mapping[str, Tensor] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if working is None:
            return student(*args, **kwargs)
        return torch.func.functional_call(student, dict(working), args, dict(kwargs))

    return forward


class Compiled:
    """A block's function, compiled on its first call; where torch.compile fails, the function itself is called.

    Args:
        forward: the function.
    """

    def __init__(self, forward: Forward) -> None:
        self._plain = forward
        self._fast: Forward | None = torch.compile(forward, dynamic=False, **ALONE)  # pyright: ignore[reportUnknownMemberType, reportCallIssue]

    def __call__(self, working: Mapping[str, Tensor] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the block."""
        if self._fast is not None:
            try:
                return self._fast(working, args, kwargs)
            except TorchDynamoException as error:
                self._fast = None
                _tell(type(error).__name__, str(error).strip().partition("\n")[0])
        return self._plain(working, args, kwargs)


@cache
def _tell(kind: str, reason: str) -> None:
    """Say once why something is not compiled."""
    logger.warning("torch.compile does not work here, and blocks are taught without it: %s: %s", kind, reason)
