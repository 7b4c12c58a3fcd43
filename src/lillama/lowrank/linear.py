"""A linear layer in factorised form. Imports torch alone: the same text ships inside portable models."""

from collections.abc import Iterator
from typing import cast

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

    Examples:
        >>> layer = LowRankLinear(64, 96, rank=8, bias=True)
        >>> layer(torch.zeros(2, 64)).shape
        torch.Size([2, 96])
        >>> {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        {'bias': (96,), 'weight': (0,), 'right.weight': (8, 64), 'left.weight': (96, 8)}
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

    @classmethod
    def shaped_like(cls, dense: nn.Linear, rank: int) -> "LowRankLinear":
        """Return a layer that fits in the place of `dense`: its widths, device, type, very bias; the factors are 0."""
        device, dtype = dense.weight.device, dense.weight.dtype
        layer = cls(dense.in_features, dense.out_features, rank, False, "meta", dtype).to_empty(device=device)
        nn.init.zeros_(layer.left.weight)
        nn.init.zeros_(layer.right.weight)
        layer.bias = dense.bias
        return layer.train(dense.training)

    def product(self) -> torch.Tensor:
        """Return the dense weight (out x in), see `multiply`."""
        return multiply(self.left.weight, self.right.weight)

    def dense(self) -> nn.Linear:
        """Return the `nn.Linear` that computes the same, with this layer's very bias."""
        weight = self.left.weight
        layer = nn.Linear(self.in_features, self.out_features, False, "meta", weight.dtype)
        layer.weight = nn.Parameter(self.product().detach(), weight.requires_grad)
        layer.bias = self.bias  # pyright: ignore[reportAttributeAccessIssue]  (torch declares it as always there)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """Describe the shape for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `left @ right`, (out x r) by (r x in), multiplied in at least fp32, in the type of `left`."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return (left.to(wide) @ right.to(wide)).to(left.dtype)


def low_rank_linears(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """Iterate over the names and layers of `model` that are in factorised form."""
    modules = cast(Iterator[tuple[str, nn.Module]], model.named_modules())
    return ((name, layer) for name, layer in modules if isinstance(layer, LowRankLinear))


def merge(model: nn.Module) -> None:
    """Multiply every `LowRankLinear` of `model` back into a dense `nn.Linear`, in place.

    Examples:
        >>> model = nn.Sequential(LowRankLinear(64, 96, rank=8, bias=False))
        >>> merge(model)
        >>> model[0]
        Linear(in_features=64, out_features=96, bias=False)
    """
    for name, layer in list(low_rank_linears(model)):
        model.set_submodule(name, layer.dense())
