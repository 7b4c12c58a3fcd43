"""Parameters that a configuration ties and the weights do not: each keeps its own, as when transformers loads the model."""

import logging
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from lillama.model.checkpoint import CheckpointReader
from lillama.model.weights import plain_targets

logger = logging.getLogger(__name__)

COMPARED_AT_ONCE = 1 << 24  # numbers


def untie(model: PreTrainedModel, reader: CheckpointReader) -> None:
    """Give tied parameters of a skeleton one of their own each where the weights hold both with different values.

    transformers ties what its classes name where only one of the two is stored, or both are equal; it keeps both where they
    differ. So does this, in place, in the same order.

    Args:
        model: without weights, tied by its configuration.
        reader: of its weights.
    """
    tied: Mapping[str, str] = model.all_tied_weights_keys  # name -> the one that it is tied to
    stored = _storage_of(model, reader, {*tied, *tied.values()}) if tied else {}
    for target, source in tied.items():
        if target not in stored:
            continue
        if source not in stored:
            stored[source] = stored[target]
        elif not _equal(reader, stored[target], stored[source]):
            _separate(model, target)
            logger.warning(
                "%s: config.json ties %s to %s, but the weights hold different values of both; both are kept",
                reader.folder,
                target,
                source,
            )


def _storage_of(model: PreTrainedModel, reader: CheckpointReader, names: set[str]) -> dict[str, str]:
    """Return tied name in the model -> tensor in the checkpoint, for those that are there."""
    shapes = {
        tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False) if name in names
    }
    found = plain_targets(model, (key for key, entry in reader.entries.items() if entry.shape in shapes))
    prefix = f"{model.base_model_prefix}."
    aliases = {name: (name, name.removeprefix(prefix), prefix + name) for name in names}
    return {name: found[known] for name, kinds in aliases.items() for known in kinds[::-1] if known in found}


def _equal(reader: CheckpointReader, one: str, other: str) -> bool:
    if one == other:
        return True
    if reader.shape(one) != reader.shape(other):
        return False
    wide = torch.promote_types(reader.dtype(one), reader.dtype(other))
    pieces = zip(*(reader.read(name).flatten().split(COMPARED_AT_ONCE) for name in (one, other)), strict=True)
    return all(torch.equal(left.to(wide), right.to(wide)) for left, right in pieces)


def _separate(model: nn.Module, name: str) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    own = torch.empty_like(getattr(owner, leaf), requires_grad=False)
    owner.register_parameter(leaf, nn.Parameter(own, requires_grad=False))
