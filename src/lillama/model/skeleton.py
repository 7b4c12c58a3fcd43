"""A model without weights, and the filling of one part of it at a time."""

import copy
import logging
from collections.abc import Iterator
from itertools import chain

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from lillama.errors import ModelError, suggestion
from lillama.model.checkpoint import CheckpointReader

logger = logging.getLogger(__name__)


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
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"config.json: {architecture} cannot be built with these values: {reason}") from None
    model.tie_weights()
    return model.eval().requires_grad_(False)


def stored_names(model: PreTrainedModel, reader: CheckpointReader) -> dict[str, str]:
    """Map every stored tensor of the skeleton to its name in the checkpoint.

    Shared parameters appear once, under the name that the model gives first. A checkpoint of the bare base model (names
    without `model.`) serves too, and names that transformers itself renames while it loads.

    Raises:
        ModelError: a tensor is missing, has another shape, or a type that cannot be read.
    """
    prefix = f"{model.base_model_prefix}."
    present = _renamed(model, reader)
    names: dict[str, str] = {}
    for name, wanted in _stored(model):
        candidates = chain((name, name.removeprefix(prefix), prefix + name), _tied_names(model, name))
        found = next((present[n] for n in candidates if n in present), None)
        if found is None:
            raise ModelError(f"{reader.folder}: tensor {name} is missing from the weights; fetch the model again")
        if reader.shape(found) != tuple(wanted.shape):
            raise ModelError(
                f"{reader.folder}: tensor {name} has shape {reader.shape(found)}, the configuration wants "
                f"{tuple(wanted.shape)}; config.json and weights do not belong together"
            )
        reader.check(found, wanted.dtype)
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
        dtype: of the weights in memory; integers keep their own.
    """
    module = copy.deepcopy(template)
    dot = f"{prefix}." if prefix else ""
    state = {
        name: reader.read(names[dot + name], device, dtype if wanted.is_floating_point() else wanted.dtype)
        for name, wanted in _stored(module)
        if dot + name in names
    }
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


def _renamed(model: PreTrainedModel, reader: CheckpointReader) -> dict[str, str]:
    """Map every name in the checkpoint, and what transformers makes of it when it loads, to the name in the checkpoint."""
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    names: dict[str, str] = {}
    for stored in reader.entries:
        name = stored
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        names[name] = stored
    return names | {stored: stored for stored in reader.entries}


def _tied_names(model: PreTrainedModel, name: str) -> Iterator[str]:
    """Yield the names of parameters that the named one is tied to, for it may be saved under any of them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    yield from (other for other, parameter in parameters.items() if parameter is parameters.get(name))
