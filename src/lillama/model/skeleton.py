"""A model without weights, and the filling of one part of it at a time."""

import copy
import logging
from collections.abc import Iterator

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lillama.errors import ModelError, suggestion
from lillama.model.checkpoint import CheckpointReader

logger = logging.getLogger(__name__)


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model that a configuration names, with its parameters on the meta device and its buffers real.

    Raises:
        ModelError: transformers has no such class.
    """
    architecture = (config.architectures or ["(none)"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        known = [name for name in dir(transformers) if name.endswith(("ForCausalLM", "ForConditionalGeneration"))]
        raise ModelError(
            f"config.json: architectures names {architecture}, which transformers {transformers.__version__} does not "
            f"have{suggestion(architecture, known)}; upgrade transformers, or the model needs remote code, which is "
            "not run"
        )
    with init_empty_weights(include_buffers=False):
        model = model_class(copy.deepcopy(config))
    model.tie_weights()
    return model.eval().requires_grad_(False)


def stored_names(model: PreTrainedModel, reader: CheckpointReader) -> dict[str, str]:
    """Map every stored tensor of the skeleton to its name in the checkpoint.

    Shared parameters appear once, under the name that the model gives first. A checkpoint of the bare base model (names
    without `model.`) serves too.

    Raises:
        ModelError: a tensor is missing, has another shape, or a type that cannot be read.
    """
    prefix = f"{model.base_model_prefix}."
    names: dict[str, str] = {}
    for name, wanted in _stored(model):
        found = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in reader.entries), None)
        found = found or _tied_name(model, name, reader)
        if found is None:
            raise ModelError(f"{reader.folder}: tensor {name} is missing from the weights; fetch the model again")
        if reader.shape(found) != tuple(wanted.shape):
            raise ModelError(
                f"{reader.folder}: tensor {name} has shape {reader.shape(found)}, the configuration wants "
                f"{tuple(wanted.shape)}; config.json and weights do not belong together"
            )
        reader.dtype(found)
        names[name] = found
    unused = set(reader.names) - set(names.values())
    if unused:
        logger.info("%d stored tensors are not part of the model, for example %s", len(unused), min(unused))
    return names


def filled(
    template: nn.Module,
    prefix: str,
    names: dict[str, str],
    reader: CheckpointReader,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """Return a copy of a skeleton's module with its weights read from the checkpoint.

    Args:
        template: a module of the skeleton; it is left as it is.
        prefix: the module's full name in the model, empty for the model itself.
        names: as `stored_names` gives; parameters that it does not name stay on the meta device.
        reader: of the checkpoint.
        device: where the weights go.
        dtype: of the weights in memory.
    """
    module = copy.deepcopy(template)
    dot = f"{prefix}." if prefix else ""
    state = {name: reader.read(names[dot + name], device, dtype) for name, _ in _stored(module) if dot + name in names}
    module.load_state_dict(state, strict=False, assign=True)
    for name, buffer in list(module.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        moved = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)  # empty, or unfilled
        owner.register_buffer(leaf, moved, persistent=leaf not in owner._non_persistent_buffers_set)
    return module.requires_grad_(False)


def _stored(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a checkpoint stores of a module: parameters, shared ones once, and persistent, non-empty buffers."""
    yield from module.named_parameters()
    kept = set(module.state_dict(keep_vars=True))
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in kept and buffer.numel())


def _tied_name(model: PreTrainedModel, name: str, reader: CheckpointReader) -> str | None:
    """Return the stored name of a parameter that is saved under the name of one it is tied to."""
    parameter = model.get_parameter(name) if name in dict(model.named_parameters()) else None
    same = (n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter)
    return next((n for n in same if n in reader.entries), None)
