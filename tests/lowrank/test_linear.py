import pytest
import torch
from torch import nn

from lillama.lowrank.linear import LowRankLinear


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
