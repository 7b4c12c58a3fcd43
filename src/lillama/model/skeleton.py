"""A model without weights."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from lillama.errors import ModelError, printable, suggestion
from lillama.model.foreign import explain_errors
from lillama.model.remote import needs_code, runs_code

LARGE = 1 << 28  # numbers; no buffer has so many
MOST_NUMBERS, MOST_TENSORS = 10**14, 1 << 18  # of a model; the largest public ones have 2 * 10**12, and 10**5
FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
RANGES = (torch.arange, torch.linspace)
DRAWS = (Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.trunc_normal_, init.xavier_uniform_)


class _LargeOnMeta(TorchFunctionMode):
    """Make large tensors on the meta device: parameters would be allocated, if only for a moment, before they go there.

    What no model has, by its numbers or by its tensors, is refused before memory or time are spent on it.
    """

    numbers = tensors = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS:  # of weights that are not there: slow, and without effect
            drawn = args[0] if args else kwargs["tensor"]
            return drawn if drawn.is_meta else func(*args, **kwargs)
        if func in RANGES and any(isinstance(value, int | float) and abs(value) > LARGE for value in args):
            raise ValueError(f"a range up to {printable(max(map(abs, args)))}, longer than any model's")
        if func in FACTORIES:
            size = kwargs.get("size", args)
            size = size[0] if size and isinstance(size[0], Sequence) else size
            numbers = math.prod(size) if all(isinstance(one, int) for one in size) else 0
            self._count(numbers, size)
            if numbers > LARGE:
                kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)

    def _count(self, numbers: int, size: Sequence[int]) -> None:
        self.numbers, self.tensors = self.numbers + numbers, self.tensors + 1
        if self.numbers > MOST_NUMBERS:
            raise ValueError(f"a tensor of {' x '.join(map(printable, size))} makes it larger than any model is")
        if self.tensors > MOST_TENSORS:
            raise ValueError(f"it would have more than {MOST_TENSORS:,} tensors, more than any model has")


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model that a configuration names, with its parameters on the meta device and its buffers real.

    Raises:
        ModelError: transformers has no such class, or it cannot be built with these values.
    """
    kind = model_class(config)
    with explain_errors(f"config.json: {kind.__name__} cannot be built with these values"):
        with init_empty_weights(include_buffers=False), _LargeOnMeta():
            model = kind(copy.deepcopy(config))
        model.tie_weights()
    return model.eval().requires_grad_(False)


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the class that a configuration names: transformers' own, or the model's where its code may run.

    Raises:
        ModelError: there is no such class, or its code may not run.
    """
    if not config.architectures:
        raise ModelError(
            'config.json: `architectures` names no model class; add it, for example as ["SomeForCausalLM"]'
        )
    architecture = config.architectures[0]
    references = (getattr(config, "auto_map", None) or {}).values()
    own = next((one for one in references if isinstance(one, str) and one.rpartition(".")[2] == architecture), None)
    if own is not None and runs_code():
        with explain_errors(f"config.json: the code of {architecture} ({own}) cannot be used"):
            return get_class_from_dynamic_module(own, config._name_or_path)
    with explain_errors(f"config.json: {printable(architecture)} of transformers cannot be imported"):
        found = getattr(transformers, architecture, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    if own is not None:
        raise needs_code("config.json", own)
    known = [name for name in dir(transformers) if name.endswith(("ForCausalLM", "ForConditionalGeneration"))]
    raise ModelError(
        f"config.json: architectures names {printable(architecture)}, which transformers {transformers.__version__} does not "
        f"have{suggestion(architecture, known)}; upgrade transformers"
    )
