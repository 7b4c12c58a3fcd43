"""A model without weights."""

import copy

import transformers
from accelerate import init_empty_weights
from transformers import PretrainedConfig, PreTrainedModel

from lillama.errors import ModelError, suggestion


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
        with init_empty_weights(include_buffers=False):
            model = model_class(copy.deepcopy(config))
    except Exception as error:  # noqa: BLE001  (transformers' classes raise all kinds for wrong values)
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"config.json: {architecture} cannot be built with these values: {reason}") from None
    model.tie_weights()
    return model.eval().requires_grad_(False)
