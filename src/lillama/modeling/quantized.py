"""A matrix of few bits, as it is stored and as it computes. Imports torch alone: the same text ships inside portable models."""

import torch
from torch import nn

SCALE = torch.bfloat16  # of quantised weights; its bits are stored as int16


class QuantizedLinear(nn.Module):
    """A matrix whose numbers are integers of 8, 6, 5, 4, 3 or 2 bits times a scale: a factor, or a dense weight.

    8 bits: `qweight` int8 (out x in), one scale a row. Below, each `group_size` neighbours in a row share a scale. 4 bits:
    `qweight` uint8 (out x in/2) holds q + 8 of two neighbours, the first in the low half. Other widths b: `qweight` uint8
    (out x b in/8) holds q + (2^b - 1)/2, an integer from 0, in b planes, the lowest bits first; in each of them 8
    neighbours make a byte, the first in its lowest bit. `scale` holds the bits of bfloat16 as int16: `.half()` and loading
    in another type change floating-point buffers only.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bits: of a number.
        group_size: numbers that share a scale below 8 bits.
        device: of the buffers.
    """

    qweight: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        groups = 1 if bits == 8 else -(-in_features // group_size)
        columns = {8: in_features, 4: -(-in_features // 2)}.get(bits, bits * -(-in_features // 8))
        stored = torch.int8 if bits == 8 else torch.uint8
        self.register_buffer("qweight", torch.zeros(out_features, columns, device=device, dtype=stored))
        self.register_buffer("scale", torch.zeros(out_features, groups, device=device, dtype=torch.int16))

    @property
    def weight(self) -> torch.Tensor:
        """The weight (out x in) in fp32."""
        return self.dequantized(torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` (..., in) to (..., out), with a weight in the type of `x`."""
        if self.bits == 8 and x.dtype != torch.float16:  # sums of integers could leave the range of fp16
            return nn.functional.linear(x, self.qweight.to(x.dtype)) * self.scale.view(SCALE).to(x.dtype).T
        return nn.functional.linear(x, self.dequantized(x.dtype))

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (out x in) in a type."""
        scale = self.scale.view(SCALE).to(dtype)
        if self.bits == 8:
            return self.qweight.to(dtype) * scale
        scales = scale.repeat_interleave(min(self.group_size, self.in_features), dim=1)
        return (self.numbers()[:, : self.in_features].to(dtype) - middle(self.bits)) * scales[:, : self.in_features]

    def numbers(self) -> torch.Tensor:
        """Return the integers from 0, below 8 bits, uint8 (out x in), with what fills the last byte behind them."""
        if self.bits == 4:
            return torch.stack((self.qweight & 15, self.qweight >> 4), dim=-1).flatten(1)
        places = torch.arange(8, device=self.qweight.device, dtype=torch.uint8)
        planes = self.qweight.view(self.out_features, self.bits, -1, 1) >> places & 1
        numbers = planes[:, 0]
        for plane in range(1, self.bits):
            numbers = numbers | planes[:, plane] << plane
        return numbers.flatten(1)

    def extra_repr(self) -> str:
        """Describe the shape for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def middle(bits: int) -> float:
    """Return the stored integer that stands for 0: between two of them, but at 8 and 4 bits."""
    known = {8: 0.0, 4: 8.0}
    return known[bits] if bits in known else (2.0**bits - 1) / 2
