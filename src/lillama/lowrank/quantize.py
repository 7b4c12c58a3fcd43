"""Weights of 8 and 4 bits, by torchao's arithmetic; `QuantizedLinear` runs them without it."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lillama.errors import RecipeError
from lillama.modeling.linear import QuantizedLinear

SHRUNK = tuple(
    1 - step / 40 for step in range(1, 21)
)  # clipped ranges that are tried at 4 bits, as shares of the whole


def refuse_without_torchao() -> None:
    """Refuse to quantise where torchao is not installed.

    Raises:
        RecipeError: it is not.
    """
    if find_spec("torchao") is None:
        raise RecipeError("storage.bits is set and torchao is not installed: pip install 'lillama[quant]'")


def quantize(weight: Float[Tensor, "out in"], bits: int, group_size: int) -> dict[str, Tensor]:
    """Return `qweight` and `scale` of a weight as `QuantizedLinear` stores them.

    Integers are symmetric about 0. At 8 bits the scale is the smallest with which no number of the row is off by more than
    half of it. At 4 bits each group takes the scale with the least squared error among that one and smaller ones, which
    clip the group's largest numbers.

    Args:
        weight: to be stored.
        bits: 8 or 4.
        group_size: neighbours in a row that share a scale at 4 bits.

    Raises:
        RecipeError: torchao is not installed.
    """
    refuse_without_torchao()
    columns = weight.shape[1]
    even = columns + columns % 2
    group = even if bits == 8 else group_size
    padded = F.pad(weight.detach().float(), (0, -columns % group))  # torchao takes no group of one number
    if bits == 8:
        scale = _whole_range(padded, group, 8)
        return {"qweight": _integers(padded, scale, 8)[:, :columns].contiguous(), "scale": _bits(scale)}
    scale = _best_range(padded, group)
    nibbles = (_integers(padded, scale, 4)[:, :even] + 8).to(torch.uint8)
    return {"qweight": nibbles[:, 0::2] | nibbles[:, 1::2] << 4, "scale": _bits(scale)}


def dequantize(weight: Float[Tensor, "out in"], bits: int, group_size: int) -> Float[Tensor, "out in"]:
    """Return a weight as it is, in fp32, after it has been stored in few bits."""
    layer = QuantizedLinear(weight.shape[1], weight.shape[0], bits, group_size)
    layer.load_state_dict(quantize(weight, bits, group_size))
    return layer.weight


def _best_range(weight: Float[Tensor, "out in"], group_size: int) -> Float[Tensor, "out groups"]:
    """Return the scales of the least squared error among the whole range and the clipped ones."""
    whole = _whole_range(weight, group_size, 4)
    best, least = whole, _squared_error(weight, whole)
    for share in SHRUNK:
        trial = _round_up(share * whole)
        error = _squared_error(weight, trial)
        best, least = torch.where(error < least, trial, best), torch.minimum(error, least)
    return best


def _whole_range(weight: Float[Tensor, "out in"], group_size: int, bits: int) -> Float[Tensor, "out groups"]:
    tiny = torch.finfo(torch.float32).tiny
    scale, _ = _arithmetic().choose_qparams_affine(
        weight, _arithmetic().MappingType.SYMMETRIC, (1, group_size), torch.int8, *_limits(bits), tiny, torch.float32
    )
    return _round_up(scale.view(len(weight), -1))


def _integers(weight: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"], bits: int) -> Tensor:
    block = (1, weight.shape[1] // scale.shape[1])
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return _arithmetic().quantize_affine(weight, block, scale, zero, torch.int8, *_limits(bits))


def _squared_error(weight: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups"]:
    groups = (len(weight), scale.shape[1], -1)
    rounded = _integers(weight, scale, 4).view(groups) * scale[:, :, None]
    return (weight.view(groups) - rounded).square().sum(dim=2)


def _arithmetic() -> Any:
    """Return torchao's primitives; the package is optional, slow to import, and untyped."""
    return import_module("torchao.quantization.quant_primitives")


def _limits(bits: int) -> tuple[int, int]:
    return -(1 << bits - 1), (1 << bits - 1) - 1


def _round_up(scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out groups"]:
    """Round to bfloat16, away from 0, so that the range is never cut."""
    return ((scale.view(torch.int32) + 0xFFFF) >> 16 << 16).view(torch.float32)


def _bits(scale: Float[Tensor, "out groups"]) -> Tensor:
    return scale.to(torch.bfloat16).view(torch.int16)
