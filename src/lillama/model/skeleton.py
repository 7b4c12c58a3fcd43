"""A model without weights."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from lillama.errors import ModelError, suggestion

LARGE = 1 << 28  # numbers; no buffer has so many
WRONG_VALUES = (  # what transformers' classes raise for values that do not fit together
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)


class _LargeOnMeta(TorchFunctionMode):
    """Make large tensors on the meta device: parameters would be allocated, if only for a moment, before they go there."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES:
            size = kwargs.get("size", args)
            size = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
            if math.prod(size) > LARGE:
                kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model that a configuration names, with its parameters on the meta device and its buffers real.

    Raises:
        ModelError: transformers has no such class, or it cannot be built with these values.
    """
    if not config.architectures:
        raise ModelError(
            'config.json: `architectures` names no model class; add it, for example as ["SomeForCausalLM"]'
        )
    architecture = config.architectures[0]
    model_class = getattr(transformers, architecture, None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        known = [name for name in dir(transformers) if name.endswith(("ForCausalLM", "ForConditionalGeneration"))]
        raise ModelError(
            f"config.json: architectures names {architecture}, which transformers {transformers.__version__} does not "
            f"have{suggestion(architecture, known)}; upgrade transformers, or the model needs remote code, which is "
            "not run"
        )
    try:
        with init_empty_weights(include_buffers=False), _LargeOnMeta():
            model = model_class(copy.deepcopy(config))
    except WRONG_VALUES as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"config.json: {architecture} cannot be built with these values: {reason}") from None
    model.tie_weights()
    return model.eval().requires_grad_(False)
