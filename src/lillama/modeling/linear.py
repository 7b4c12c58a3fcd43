"""Linear layers in factorised form. Imports torch and its neighbours alone: the same text ships inside portable models."""

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from lillama.modeling.experts import GATE, UP, WHOLE, Experts, fuse, unfuse
from lillama.modeling.quantized import QuantizedLinear


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
    dense_class: type[nn.Linear] = nn.Linear  # of the layer in whose place this one stands

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
        self.right: Factor = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left: Factor = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` (..., in) to (..., out)."""
        return add_bias(self.left(self.right(x)), self.bias)

    def product(self) -> torch.Tensor:
        """Return the dense weight (out x in), see `multiply`."""
        return multiply(self.left.weight, self.right.weight)

    def dense(self) -> nn.Linear:
        """Return the `nn.Linear` that computes the same, of this layer's type, with its very bias."""
        return densify(self)

    def extra_repr(self) -> str:
        """Describe the shape for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PivotLinear(nn.Module):
    """Compute the same from `rank` rows of the weight itself and the coefficients of its other rows in these.

    `right` (rank x in) holds the pivot rows, `left` (out - rank x rank) the coefficients, and `order` (out) says where
    each row of the weight stands among both (PIFA, arXiv 2501.19090). It is a form to store and to run a finished layer
    in. Where the neighbours stand in the layer's own order there is no `order`; at rank = out there is no `left` either.
    `bias` and `weight` are as in `LowRankLinear`.

    Args:
        in_features: width of `x`.
        out_features: width of `y`.
        rank: of the weight, at most `out_features`.
        bias: whether a bias is added.
        ordered: whether the rows of the weight stand in another order than pivots first.
        device: of the parameters.
        dtype: of the parameters.

    Examples:
        >>> layer = PivotLinear(64, 96, rank=8, bias=False)
        >>> {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        {'weight': (0,), 'order': (96,), 'right.weight': (8, 64), 'left.weight': (88, 8)}
    """

    bias: nn.Parameter | None
    order: torch.Tensor | None
    weight: torch.Tensor
    dense_class: type[nn.Linear] = nn.Linear  # of the layer in whose place this one stands

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        ordered: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        others = out_features - rank
        self.right: Factor = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left: Factor | None = nn.Linear(rank, others, bias=False, device=device, dtype=dtype) if others else None
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))
        order = torch.arange(out_features, device=device, dtype=torch.int32) if ordered and others else None
        self.register_buffer("order", order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` (..., in) to (..., out)."""
        y = self.right(x)
        if self.left is not None:
            y = torch.cat((y, self.left(y)), dim=-1)
        if self.order is not None:
            flat = y.reshape(-1, self.out_features)  # a matrix: on more dimensions index_select is ten times slower
            y = flat.index_select(-1, self.order).view(y.shape)
        return add_bias(y, self.bias)

    def product(self) -> torch.Tensor:
        """Return the dense weight (out x in), see `multiply`."""
        rows = self.right.weight
        if self.left is not None:
            rows = torch.cat((rows, multiply(self.left.weight, rows)))
        return rows if self.order is None else rows.index_select(0, self.order)

    def dense(self) -> nn.Linear:
        """Return the `nn.Linear` that computes the same, of this layer's type, with its very bias."""
        return densify(self)

    def extra_repr(self) -> str:
        """Describe the shape for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


Factor = nn.Linear | QuantizedLinear
Factorised = LowRankLinear | PivotLinear


def build_factorised(
    dense: nn.Linear, rank: int, storage: Mapping[str, Any] | None = None, ordered: bool = True
) -> Factorised:
    """Return a layer that fits in the place of `dense`: its widths, device, type, very bias; all else is 0.

    Args:
        dense: may be on the meta device.
        rank: of the factors.
        storage: `form`, `bits` and `group_size` of a stored layer; None is the plain form, not quantised.
        ordered: whether a layer in the pivot form has an order of rows.
    """
    storage = storage or {}
    shape = (dense.in_features, dense.out_features, rank, False)
    if storage.get("form") == "pivot":
        layer = PivotLinear(*shape, ordered, "meta", dense.weight.dtype)
    else:
        layer = LowRankLinear(*shape, "meta", dense.weight.dtype)
    if storage.get("bits"):
        for side, factor in list(layer.named_children()):
            rows, columns = cast(nn.Linear, factor).weight.shape
            layer.set_submodule(side, QuantizedLinear(columns, rows, storage["bits"], storage["group_size"], "meta"))
    layer = layer.to_empty(device=dense.weight.device)
    for tensor in layer.state_dict().values():
        tensor.zero_()
    layer.bias = dense.bias
    layer.dense_class = type(dense)
    if WHOLE in dense.__dict__:
        layer.__dict__[WHOLE] = dense.__dict__[WHOLE]
    return layer.train(dense.training)


def build_stored(name: str, dense: nn.Linear, section: Mapping[str, Any]) -> Factorised:
    """Return the layer that a linear is stored as, fit for the place of `dense`; all its numbers but the bias are 0.

    A dense weight of few bits is the pivot form of full rank: all its rows are pivots, and nothing else is stored.

    Args:
        name: of the linear in the section.
        dense: may be on the meta device.
        section: as in `config.json`, with `ranks`, and `storage`, `absorbed` and `bits` where they say something.
    """
    rank, storage = section["ranks"].get(name), dict(section.get("storage") or {})
    own = (section.get("bits") or {}).get(name)
    if own is not None:
        storage["bits"] = own
    if rank is None:
        return build_factorised(dense, dense.out_features, {**storage, "form": "pivot"}, ordered=False)
    return build_factorised(dense, rank, storage, name not in (section.get("absorbed") or ()))


def resize(dense: nn.Module, out_features: int, in_features: int) -> nn.Module:
    """Return a dense layer of the same class and type on the same device, of another shape; its numbers are 0.

    Args:
        dense: an `nn.Linear`, or transformers' Conv1D; may be on the meta device.
        out_features: width of the output.
        in_features: width of the input.
    """
    weight, bias = cast(torch.Tensor, dense.weight), cast("torch.Tensor | None", dense.bias)
    layer = copy.copy(dense)
    layer.__dict__["_parameters"] = {}
    shape = (out_features, in_features) if isinstance(dense, nn.Linear) else (in_features, out_features)
    layer.weight = nn.Parameter(weight.new_zeros(shape), weight.requires_grad)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.new_zeros(out_features)))
    names = ("out_features", "in_features") if isinstance(dense, nn.Linear) else ("nf", "nx")
    layer.__dict__.update(zip(names, (out_features, in_features), strict=True))
    layer.__dict__[WHOLE] = getattr(dense, WHOLE, tuple(weight.shape))
    return layer


def widen(layer: nn.Module) -> None:
    """Give a layer that was narrowed by `resize` its whole shape back, in place: what it lacks is 0.

    Of an FFN all linears must be: the neurons that were left out then get 0 behind them, and change nothing.
    """
    whole = cast(tuple[int, int] | None, layer.__dict__.pop(WHOLE, None))
    if whole is None:
        return
    weight, bias = cast(torch.Tensor, layer.weight), cast("torch.Tensor | None", layer.bias)
    grown = weight.new_zeros(whole)
    grown[: weight.shape[0], : weight.shape[1]] = weight.detach()
    layer.weight = nn.Parameter(grown, weight.requires_grad)
    out_features, in_features = whole if isinstance(layer, nn.Linear) else whole[::-1]
    if bias is not None:
        whole_bias = bias.new_zeros(out_features)
        whole_bias[: len(bias)] = bias.detach()
        layer.bias = nn.Parameter(whole_bias, bias.requires_grad)
    names = ("out_features", "in_features") if isinstance(layer, nn.Linear) else ("nf", "nx")
    layer.__dict__.update(zip(names, (out_features, in_features), strict=True))


def prepare(model: nn.Module, names: Collection[str]) -> None:
    """Swap fused experts and Conv1Ds that hold any of the named linears for linears, in place.

    Gates and ups of experts are split where one of them is named.
    """
    experts = {full: full.rpartition(".")[0].rpartition(".")[0] for full in names}
    apart = {holder for full, holder in experts.items() if full.rpartition(".")[2] in (GATE, UP)}
    unfuse(model, {*experts, *experts.values()}.__contains__, apart.__contains__)


def mark(model: nn.Module) -> None:
    """Let loaders that do not know this package fail on experts with factorised linears; see `Experts.mark`."""
    for module in model.modules():
        if isinstance(module, Experts) and any(not isinstance(linear, nn.Linear) for _, linear in module.linears()):
            module.mark()


def add_bias(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `y + bias` in the type of `y`; without gradients `y` itself is changed, which spares a copy.

    With gradients a backward hook may have made `y` a view that must not be changed.
    """
    if bias is None:
        return y
    return y + bias.to(y.dtype) if torch.is_grad_enabled() else y.add_(bias)


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `left @ right`, (out x r) by (r x in), multiplied in at least fp32, in the type of `left`."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return (left.to(wide) @ right.to(wide)).to(left.dtype)


def densify(layer: Factorised) -> nn.Linear:
    """Return the dense form of a layer, see `LowRankLinear.dense`."""
    dense = layer.dense_class(layer.in_features, layer.out_features, False, "meta", layer.weight.dtype)
    weight = layer.product().detach().to(layer.weight.dtype)
    dense.weight = nn.Parameter(weight, layer.right.weight.requires_grad)
    dense.bias = layer.bias  # pyright: ignore[reportAttributeAccessIssue]  (torch declares it as always there)
    if WHOLE in layer.__dict__:
        dense.__dict__[WHOLE] = layer.__dict__[WHOLE]
    return dense.train(layer.training)


def low_rank_linears(model: nn.Module) -> Iterator[tuple[str, Factorised]]:
    """Iterate over the names and layers of `model` that are in factorised form."""
    modules = cast(Iterator[tuple[str, nn.Module]], model.named_modules())
    return ((name, layer) for name, layer in modules if isinstance(layer, LowRankLinear | PivotLinear))


def merge(model: nn.Module) -> None:
    """Multiply every factorised layer of `model` back into a dense one, as the original has it, in place.

    Narrower FFNs get their neurons back, with zeros behind them.

    Examples:
        >>> model = nn.Sequential(LowRankLinear(64, 96, rank=8, bias=False))
        >>> merge(model)
        >>> model[0]
        Linear(in_features=64, out_features=96, bias=False)
    """
    for name, layer in list(low_rank_linears(model)):
        model.set_submodule(name, densify(layer))
    for layer in model.modules():
        widen(layer)
    fuse(model)
