"""What a model is run on: rows of whatever its forward takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lillama.model.spec import Kind


@dataclass(frozen=True)
class Batch:
    """Sequences, one in each row of every tensor.

    Attributes:
        inputs: what the model's forward is given, by its own names.
        ids: the tokens that the head predicts each from those before it; None for a model without a language-modelling
            head.
        masks: true at real positions, for each stack of blocks that pads; its index -> rows x length. Padding enters neither
            Grams nor losses.
    """

    inputs: Mapping[str, Tensor]
    ids: Int[Tensor, "rows length"] | None = None
    masks: Mapping[int, Bool[Tensor, "rows _"]] = field(default_factory=dict)

    @classmethod
    def of_tokens(cls, ids: Int[Tensor, "rows length"], mask: Bool[Tensor, "rows length"] | None = None) -> "Batch":
        """Return what a decoder alone is run on."""
        if mask is None:
            return cls({"input_ids": ids}, ids)
        return cls({"input_ids": ids, "attention_mask": mask.long()}, ids, {0: mask})

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> "Batch":
        return Batch(
            {name: tensor[rows] for name, tensor in self.inputs.items()},
            None if self.ids is None else self.ids[rows],
            {stack: mask[rows] for stack, mask in self.masks.items()},
        )

    def forward_inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the inputs on a device; features and pixels in the type that the model computes in."""
        types = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in self.inputs.items()}
        return {name: tensor.to(device, types[name]) for name, tensor in self.inputs.items()}

    def masks_at(self, stack: int) -> tuple[Bool[Tensor, "rows _"] | None, ...]:
        """Return the mask of a stack's own positions, and then those of the earlier stacks; None where nothing is padded."""
        return self.masks.get(stack), *(self.masks.get(earlier) for earlier in range(stack))

    @property
    def most_padded(self) -> int | None:
        """The row with most padding that the model itself is told of; None if it is told of none."""
        mask = self.inputs.get("attention_mask")
        return None if mask is None or bool(mask.all()) else int(mask.sum(dim=1).argmin())


def batch_of(
    kind: Kind,
    ids: Int[Tensor, "rows length"],
    mask: Bool[Tensor, "rows length"] | None,
    inputs: Mapping[str, Tensor],
) -> Batch:
    """Return what a model is run on for calibration.

    An encoder-decoder without inputs of its own reads the first half of each sequence and is asked for the second.

    Args:
        kind: of the model.
        ids: the tokens.
        mask: true for a real token; None if all are.
        inputs: what else the model's forward takes; `encoder_mask` tells the encoder's real positions.
    """
    given = dict(inputs)
    if kind.stacks == 1:
        return Batch.of_tokens(ids, mask) if not given else Batch(given)
    masks = {} if "encoder_mask" not in given else {0: given.pop("encoder_mask")}
    if not given:
        half = ids.shape[1] // 2
        given, ids = {"input_ids": ids[:, :half]}, ids[:, half:]
    if kind.decoder_start is not None:
        ids = torch.cat([torch.full_like(ids[:, :1], kind.decoder_start), ids], dim=1)
        mask = None if mask is None else torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
    masks |= {} if mask is None else {1: mask}
    return Batch(given | {"decoder_input_ids": ids}, ids, masks)


def heads_only(kind: Kind, width: int, ids: Int[Tensor, "rows length"]) -> dict[str, object]:
    """Return inputs that lead `ids` to the head with as little as possible before it, blocks being passed over.

    Args:
        kind: of the model.
        width: of the activations between its blocks.
        ids: the tokens.
    """
    if kind.stacks == 1:
        return {"input_ids": ids}
    return {"decoder_input_ids": ids, "encoder_outputs": (torch.zeros(len(ids), 1, width, device=ids.device),)}
