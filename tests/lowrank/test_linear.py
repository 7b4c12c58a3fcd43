import pytest
import torch
from torch import nn

from lillama.modeling.linear import LowRankLinear, PivotLinear, build_factorised
from lillama.modeling.quantized import QuantizedLinear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_forward_is_the_dense_product_and_the_bias(bias: bool, leading: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(12, 7, 4, bias, dtype=torch.float64)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x = torch.randn(*leading, 12, dtype=torch.float64)
    wanted = nn.functional.linear(x, layer.left.weight @ layer.right.weight, layer.bias)
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer.dense()(x), wanted)


@pytest.mark.parametrize("bias", [False, True])
def test_the_names_that_are_stored_never_change(bias: bool) -> None:
    state = LowRankLinear(12, 7, 4, bias).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = {"left.weight": (7, 4), "right.weight": (4, 12), "weight": (0,)}
    assert shapes == wanted | ({"bias": (7,)} if bias else {})


def test_a_loader_that_wants_a_dense_weight_fails() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(12, 7, bias=False).load_state_dict(LowRankLinear(12, 7, 4, False).state_dict(), strict=False)


def test_gradients_reach_both_factors_and_the_bias() -> None:
    layer = LowRankLinear(5, 6, 2, True)
    layer(torch.randn(3, 5)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert {name for name, _ in layer.named_parameters()} == {"left.weight", "right.weight", "bias"}


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_the_pivot_form_is_its_rows_in_order(ordered: bool, rank: int) -> None:
    torch.manual_seed(0)
    layer = PivotLinear(12, 7, rank, True, ordered, dtype=torch.float64)
    if layer.order is not None:
        layer.order.copy_(torch.randperm(7))
    p = layer.right.weight
    rows = p if layer.left is None else torch.cat((p, layer.left.weight @ p))
    weight = rows if layer.order is None else rows[layer.order.long()]
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))
    torch.testing.assert_close(layer.dense()(x), layer(x))
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("rank", [4, 7])
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("form", ["plain", "pivot"])
def test_a_layer_to_be_filled_fits_the_dense_one(form: str, bits: int | None, rank: int) -> None:
    dense = nn.Linear(12, 7, device="meta", dtype=torch.bfloat16).eval()
    layer = build_factorised(dense, rank, {"form": form, "bits": bits, "group_size": 4})
    assert (
        layer.bias is dense.bias
        and not layer.training
        and {t.device.type for t in layer.state_dict().values()} == {"meta"}
    )
    assert {type(child) for child in layer.children()} == {QuantizedLinear if bits else nn.Linear}
    assert sum(1 for _ in layer.children()) == (1 if form == "pivot" and rank == 7 else 2)
    assert layer.weight.dtype == torch.bfloat16
