"""A linear layer in factorised form. Imports torch alone: the same text ships inside portable models."""

import torch
from torch import nn


class LowRankLinear(nn.Module):
    """Compute `y = left(right(x)) + bias` in the place of a dense `nn.Linear`.

    `left` (out x rank) and `right` (rank x in) are plain `nn.Linear` children, so that tools which look for linears
    (PEFT, torchao, ONNX) find them. `bias` keeps the dense layer's name. `weight` is an empty buffer that is saved with
    the model: a loader that does not know this layer finds shape (0,) where it wants (out, in) and fails, instead of
    going on with random weights.

    Args:
        in_features: width of `x`.
        out_features: width of `y`.
        rank: width between the factors.
        bias: whether a bias is added.
        device: of the parameters.
        dtype: of the parameters.
    """

    bias: nn.Parameter | None
    weight: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` (..., in) to (..., out)."""
        y = self.left(self.right(x))
        return y if self.bias is None else y + self.bias

    def product(self) -> torch.Tensor:
        """Return the dense weight `left @ right` (out x in), multiplied in fp32, in the factors' type."""
        return (self.left.weight.float() @ self.right.weight.float()).to(self.left.weight.dtype)

    def extra_repr(self) -> str:
        """Describe the shape for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
