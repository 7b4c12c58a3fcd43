import pytest
import torch

from lillama.errors import ModelError
from lillama.lowrank import quantize as module
from lillama.lowrank.encode import encode_factors
from lillama.lowrank.quantize import quantize
from lillama.lowrank.storage import Storage
from lillama.modeling.quantized import QuantizedLinear

WEIGHTS = {
    "gaussian": lambda: torch.randn(24, 130),
    "odd": lambda: torch.randn(5, 7),
    "outlier": lambda: torch.randn(8, 128).index_put((torch.tensor([3]), torch.tensor([40])), torch.tensor(90.0)),
    "small": lambda: 1e-9 * torch.randn(8, 64),
    "zero": lambda: torch.zeros(4, 64),
}


def layer(weight: torch.Tensor, bits: int, group_size: int = 64) -> QuantizedLinear:
    made = QuantizedLinear(weight.shape[1], weight.shape[0], bits, group_size)
    made.load_state_dict(quantize(weight, bits, group_size))
    return made


def scales(made: QuantizedLinear) -> torch.Tensor:
    found = made.scale.view(torch.bfloat16).float().abs()
    return found if made.bits == 8 else found.repeat_interleave(made.group_size, 1)[:, : made.in_features]


@pytest.mark.parametrize("name", WEIGHTS)
def test_at_8_bits_no_number_is_off_by_more_than_half_a_scale(name: str) -> None:
    torch.manual_seed(0)
    weight = WEIGHTS[name]()
    made = layer(weight, 8)
    assert ((made.weight - weight).abs() <= scales(made) / 2 * (1 + 1e-5)).all()
    assert made.scale.view(torch.bfloat16).float().max() <= weight.abs().max() / 127.5 * (1 + 2**-7) + 1e-30


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", WEIGHTS)
def test_below_8_bits_clipping_lowers_the_squared_error_and_touches_nothing_else(
    name: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight = WEIGHTS[name]()
    made = layer(weight, bits)
    monkeypatch.setattr(module, "SHRUNK", ())
    whole = layer(weight, bits)
    off, unclipped = ((found.weight - weight).abs() for found in (made, whole))
    assert (unclipped <= scales(whole) / 2 * (1 + 1e-5)).all()
    assert (off <= scales(made) / 2 * (1 + 1e-5))[weight.abs() <= (2**bits - 1) / 2 * scales(made)].all()
    errors = [
        torch.nn.functional.pad(part, (0, -part.shape[1] % 64)).unflatten(1, (-1, 64)) for part in (off, unclipped)
    ]
    clipped, exact = (error.square().sum(2) for error in errors)
    assert (clipped <= exact * (1 + 1e-5)).all() and (
        name != "gaussian" or bits > 4 or clipped.sum() < 0.95 * exact.sum()
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_of_the_model_do_not_touch_what_is_stored(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = layer(torch.randn(24, 96), bits)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    x = torch.randn(5, 96)
    wanted = torch.nn.functional.linear(x, made.weight)
    made = made.half().float().to(dtype)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    assert made(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(made(x.to(dtype)).float(), wanted, rtol=0, atol=100 * torch.finfo(dtype).eps)


def test_at_8_bits_sums_do_not_leave_the_range_of_fp16() -> None:
    made = layer(torch.ones(1, 4096), 8)
    assert made(torch.ones(1, 4096, dtype=torch.float16)).item() == pytest.approx(4096, rel=0.01)


def test_an_even_number_of_inputs_is_asked_for() -> None:
    with pytest.raises(ModelError, match="7 inputs cannot be stored in 4 bits"):
        encode_factors(torch.ones(6, 2), torch.ones(2, 7), Storage("plain", 4), None, torch.float32)
