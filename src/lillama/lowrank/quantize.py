"""Weights as integers of few bits times a scale: which scales, which integers, and how `QuantizedLinear` holds them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lillama.modeling.quantized import QuantizedLinear, middle

SHRUNK = tuple(1 - step / 40 for step in range(1, 27))  # clipped ranges that are tried, as shares of the whole


def quantize(weight: Float[Tensor, "out in"], bits: int, group_size: int) -> dict[str, Tensor]:
    """Return `qweight` and `scale` of a weight as `QuantizedLinear` stores them, every number rounded to the nearest.

    Integers lie symmetric about 0; at 4 bits from -8 to 7, where a negative scale turns them round. At 8 bits the scale is the
    smallest with which no number of the row is off by more than half of it. Below, each group takes the scale with the least
    squared error among that one and smaller ones, which clip the group's largest numbers.

    Args:
        weight: to be stored.
        bits: 8, 6, 5, 4, 3 or 2.
        group_size: neighbours in a row that share a scale below 8 bits.
    """
    scale = best_scale(weight, bits, group_size)
    return pack(nearest(weight.detach().float(), spread(scale, weight.shape[1], bits, group_size), bits), scale, bits)


def dequantize(weight: Float[Tensor, "out in"], bits: int, group_size: int) -> Float[Tensor, "out in"]:
    """Return a weight as it is, in fp32, after it has been stored in few bits."""
    layer = QuantizedLinear(weight.shape[1], weight.shape[0], bits, group_size, weight.device)
    layer.load_state_dict(quantize(weight, bits, group_size))
    return layer.weight


def best_scale(
    weight: Float[Tensor, "out in"], bits: int, group_size: int, importance: Float[Tensor, " in"] | None = None
) -> Float[Tensor, "out groups"]:
    """Return the scales with the least squared error among the whole range and the clipped ones, of bfloat16's values.

    Args:
        weight: to be stored.
        bits: of a number; at 8 the range is whole, and the group is the row.
        group_size: neighbours in a row that share a scale.
        importance: weight of each column's squared error; None weighs all the same.
    """
    rows, columns = weight.shape
    group = columns if bits == 8 else group_size
    groups = F.pad(weight.detach().float(), (0, -columns % group)).view(rows, -1, group)
    whole = _round_up((groups.abs().amax(dim=2) / _reach(bits)).clamp(min=torch.finfo(torch.float32).tiny))
    if bits == 8:
        return whole
    if bits == 4:  # whose integers reach further below 0: there the largest number belongs
        whole = torch.where(groups.amax(dim=2) > -groups.amin(dim=2), -whole, whole)
    weights = torch.ones(columns, device=weight.device) if importance is None else importance.float()
    weights = F.pad(weights, (0, -columns % group)).view(1, -1, group)
    best, least = whole, _squared_error(groups, whole, bits, weights)
    for share in SHRUNK:
        trial = _round_up(share * whole)
        error = _squared_error(groups, trial, bits, weights)
        best, least = torch.where(error < least, trial, best), torch.minimum(error, least)
    return best


def nearest(weight: Float[Tensor, "*shape"], scale: Float[Tensor, "*_"], bits: int) -> Float[Tensor, "*shape"]:
    """Return the stored integers nearest to a weight, by scales that broadcast to it."""
    low, high = limits(bits)
    return (weight / scale + middle(bits)).round_().clamp_(low, high)


def limits(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest stored integer."""
    return (-128, 127) if bits == 8 else (0, 2**bits - 1)


def spread(scale: Float[Tensor, "out groups"], columns: int, bits: int, group_size: int) -> Float[Tensor, "out _"]:
    """Return the scale of each number of a weight of so many columns; of a whole row where one is for all."""
    return scale if bits == 8 else scale.repeat_interleave(group_size, dim=1)[:, :columns]


def pack(numbers: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"], bits: int) -> dict[str, Tensor]:
    """Return `qweight` and `scale` of integers and their scales, as `QuantizedLinear` stores them."""
    return {"qweight": _pack(numbers, bits), "scale": scale.to(torch.bfloat16).view(torch.int16)}


def _pack(numbers: Float[Tensor, "out in"], bits: int) -> Tensor:
    if bits == 8:
        return numbers.to(torch.int8)
    if bits == 4:
        pairs = F.pad(numbers.to(torch.uint8), (0, numbers.shape[1] % 2), value=8)
        return pairs[:, 0::2] | pairs[:, 1::2] << 4
    eights = F.pad(numbers.to(torch.uint8), (0, -numbers.shape[1] % 8)).view(len(numbers), -1, 8)
    places = torch.arange(8, device=numbers.device, dtype=torch.uint8)
    planes = [((eights >> plane & 1) << places).sum(dim=2, dtype=torch.uint8) for plane in range(bits)]
    return torch.cat(planes, dim=1)


def _reach(bits: int) -> float:
    """Return how far from 0 the integers lie on the average of both sides."""
    return (2**bits - 1) / 2


def _squared_error(
    groups: Float[Tensor, "out groups group"],
    scale: Float[Tensor, "out groups"],
    bits: int,
    importance: Float[Tensor, "1 groups group"],
) -> Float[Tensor, "out groups"]:
    rounded = (nearest(groups, scale[:, :, None], bits) - middle(bits)) * scale[:, :, None]
    return ((groups - rounded).square() * importance).sum(dim=2)


def _round_up(scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups"]:
    """Round to bfloat16, away from 0, so that the range is never cut."""
    return ((scale.view(torch.int32) + 0xFFFF) >> 16 << 16).view(torch.float32)
