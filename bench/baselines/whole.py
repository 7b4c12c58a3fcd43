"""A whole model in memory: what published baselines share that do their work outside lillama's stream of blocks."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from lillama.files.atomic import atomic_folder, write_json
from lillama.hub.companions import carry_along
from lillama.lowrank.gram import Gram
from lillama.model.load import load
from lillama.moments.inputs import watch_inputs
from lillama.system.resources import pick_device

MICRO_BATCH = 512  # tokens that are computed at once, and at least one sequence
Ids = Int[Tensor, "sequences length"]
Weights = dict[str, Float[Tensor, "out in"]]


def load_whole(folder: Path, device: str | None) -> PreTrainedModel:
    """Return a model with its weights in fp32, on a device, by default an accelerator if there is one."""
    return load(folder, pick_device(device), dtype="float32")


def parts(ids: Ids) -> Iterator[Ids]:
    """Yield the sequences by micro-batches."""
    yield from ids.split(max(1, MICRO_BATCH // ids.shape[1]))


def losses(model: PreTrainedModel, ids: Ids) -> Float[Tensor, ""]:
    """Return the sum over all predicted tokens of the log-losses, in nats."""
    ids = ids.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def mean_loss(model: PreTrainedModel, ids: Ids) -> float:
    """Return the loss in nats a predicted token."""
    return sum(losses(model, part).item() for part in parts(ids)) / ids[:, 1:].numel()


def gradients(model: PreTrainedModel, ids: Ids, names: Iterable[str]) -> Weights:
    """Return the gradients of the mean loss at the weights of the named linears."""
    weights = {name: model.get_parameter(f"{name}.weight") for name in names}
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for part in parts(ids):
        loss = losses(model, part) / ids[:, 1:].numel()
        for name, gradient in zip(found, torch.autograd.grad(loss, list(weights.values())), strict=True):
            found[name] += gradient
    return found


@torch.no_grad()
def input_grams(model: PreTrainedModel, ids: Ids, names: Iterable[str]) -> dict[str, Gram]:
    """Return the second moments of the inputs of the named linears; those that are given the same tensor share one."""
    with watch_inputs(model, names) as watch:
        for part in parts(ids):
            model(input_ids=part.to(model.device), use_cache=False)
            watch.add()
    return watch.grams


@torch.no_grad()
def put_weights(model: PreTrainedModel, weights: Mapping[str, Float[Tensor, "out in"]]) -> None:
    """Put weights into the named linears of a model, in place."""
    for name, weight in weights.items():
        model.get_parameter(f"{name}.weight").copy_(weight)


def save_whole(model: PreTrainedModel, source: Path, out: Path, dtype: str, notes: Mapping[str, Any]) -> None:
    """Write a model folder that takes all but the weights from another one.

    Args:
        model: with the weights; it is in the stored type afterwards.
        source: folder of the original.
        out: folder to make.
        dtype: that weights are stored in.
        notes: name of a JSON file beside the configuration -> its content.
    """
    model.to(getattr(torch, dtype))
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        carry_along(source, folder)
        for name, content in notes.items():
            write_json(folder / name, content)
