import pytest
import torch
from torch import nn

from lillama.errors import ModelError
from lillama.lowrank.install import install, low_rank_linears, merge
from lillama.modeling.linear import LowRankLinear, multiply


class Part(nn.Module):
    def __init__(self, bias: bool, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.up_proj = nn.Linear(12, 20, bias, device, dtype)
        self.down_proj = nn.Linear(20, 12, bias, device, dtype)
        self.norm = nn.LayerNorm(12)


CASES = [
    (bias, dtype, device)
    for bias in (False, True)
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    for device in ("cpu", "meta")
]


@pytest.mark.parametrize(("bias", "dtype", "device"), CASES)
def test_install_keeps_device_type_bias_and_mode(bias: bool, dtype: torch.dtype, device: str) -> None:
    model = Part(bias, dtype, device).eval()
    kept = model.up_proj.bias
    install(model, {"up_proj": 5})
    assert [(name, layer.rank) for name, layer in low_rank_linears(model)] == [("up_proj", 5)]
    layer = model.get_submodule("up_proj")
    assert isinstance(layer, LowRankLinear)
    assert layer.bias is kept and not layer.training
    assert {(tensor.device.type, tensor.dtype) for tensor in layer.state_dict().values()} == {(device, dtype)}
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items() if name != "bias"} == {
        "left.weight": (20, 5),
        "right.weight": (5, 12),
        "weight": (0,),
    }
    assert type(model.down_proj) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merge_computes_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Part(True, dtype, "cpu")
    install(model, {"up_proj": 5, "down_proj": 7})
    for _, layer in low_rank_linears(model):
        nn.init.normal_(layer.left.weight, std=0.3)
        nn.init.normal_(layer.right.weight, std=0.3)
    x = torch.randn(4, 12, dtype=dtype)
    before = model.down_proj(model.up_proj(x))
    merge(model)
    assert type(model.up_proj) is nn.Linear and not list(low_rank_linears(model))
    torch.testing.assert_close(
        model.down_proj(model.up_proj(x)), before, rtol=8 * torch.finfo(dtype).eps ** 0.5, atol=0.03
    )
    assert torch.linalg.matrix_rank(model.down_proj.weight.double(), rtol=1e-2) == 7


def test_install_leaves_the_random_state_alone() -> None:
    model = Part(True, torch.float32, "cpu")
    state = torch.random.get_rng_state()
    install(model, {"up_proj": 5})
    merge(model)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_product_is_accumulated_in_fp32() -> None:
    left, right = torch.ones(1, 4096, dtype=torch.bfloat16), torch.ones(4096, 1, dtype=torch.bfloat16)
    assert multiply(left, right).item() == 4096
    assert multiply(left.double() / 3, right.double()).item() == pytest.approx(4096 / 3, rel=1e-12)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"up_prj": 4}, "did you mean 'up_proj'"),
        ({"norm": 4}, r"no dense nn\.Linear"),
        ({"up_proj": 0}, "rank 0 is not possible"),
    ],
)
def test_install_refuses_before_it_changes_anything(ranks: dict[str, int], message: str) -> None:
    model = Part(True, torch.float32, "cpu")
    with pytest.raises(ModelError, match=message):
        install(model, {"down_proj": 3} | ranks)
    assert not list(low_rank_linears(model))


def test_install_refuses_a_layer_that_is_low_rank_already() -> None:
    model = Part(True, torch.float32, "cpu")
    install(model, {"up_proj": 5})
    with pytest.raises(ModelError, match=r"no dense nn\.Linear"):
        install(model, {"up_proj": 5})
