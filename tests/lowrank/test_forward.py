"""A bias costs no copy, and hooks, autocast and adapters find what they find around a dense linear."""

import pytest
import torch
from torch import nn

from lillama.modeling.linear import LowRankLinear, PivotLinear, add_bias


@pytest.fixture
def layer() -> LowRankLinear:
    torch.manual_seed(0)
    layer = LowRankLinear(12, 20, rank=5, bias=True)
    assert layer.bias is not None
    nn.init.normal_(layer.bias)
    return layer


X = torch.linspace(-1, 1, 36).view(3, 12)


def test_with_and_without_gradients_the_outputs_are_equal(layer):
    trained = layer(X)
    expected = X @ layer.product().T + layer.bias
    assert torch.allclose(trained, expected, atol=1e-6)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for _ in range(2):  # nothing is left behind by the first
                torch.testing.assert_close(layer(X), trained.detach(), rtol=0, atol=1e-6)
    trained.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((20,), 3.0))


def test_without_gradients_nothing_is_copied():
    y, bias = torch.zeros(3, 4), torch.arange(4.0)
    with torch.no_grad():
        assert add_bias(y, bias) is y and torch.equal(y[2], bias)
    assert add_bias(y, bias) is not y and torch.equal(y[2], bias)
    assert add_bias(y, None) is y


@pytest.mark.parametrize("gradients", [True, False])
def test_autocast_gives_the_type_that_a_dense_linear_gives(layer, gradients):
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
        assert layer(X).dtype == nn.Linear(12, 20)(X).dtype == torch.bfloat16


def test_full_backward_hooks_on_the_factors_work(layer):
    seen: list[tuple[int, ...]] = []
    for factor in (layer.left, layer.right):
        factor.register_full_backward_hook(lambda module, inputs, outputs: seen.append(tuple(outputs[0].shape)))
    layer(X.clone().requires_grad_()).sum().backward()
    assert seen == [(3, 20), (3, 5)]


@pytest.mark.parametrize("gradients", [True, False])
def test_an_adapter_on_left_is_not_passed_by(layer, gradients):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(target_modules=["0.left"], r=2))
    adapter = dict(model.named_modules())["base_model.model.0.left"]
    nn.init.normal_(adapter.lora_B["default"].weight)
    with torch.set_grad_enabled(gradients):
        assert torch.allclose(model(X), adapter(layer.right(X)) + layer.bias, atol=1e-6)
        assert not torch.allclose(model(X), adapter.base_layer(layer.right(X)) + layer.bias, atol=1e-2)


@pytest.mark.parametrize("shape", [(12,), (3, 12), (0, 12), (2, 3, 12), (2, 0, 3, 12)])
def test_the_pivot_form_takes_inputs_of_any_dimension(shape):
    layer = PivotLinear(12, 20, rank=5, bias=True)
    assert layer.left is not None and layer.order is not None
    for factor in (layer.left, layer.right):
        nn.init.normal_(factor.weight)
    layer.order.copy_(torch.randperm(20))
    x = torch.randn(shape)
    assert torch.allclose(layer(x), layer.dense()(x), atol=1e-5)
