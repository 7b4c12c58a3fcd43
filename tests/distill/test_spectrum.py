import pytest
import torch

from lillama.distill.log import DistillLog
from lillama.distill.spectrum import largest_singular_value, largest_singular_values


@pytest.mark.parametrize("shape", [(30, 8, 50), (50, 20, 30), (5, 1, 3), (3, 3, 40), (200, 60, 100)])
def test_it_is_the_products_largest_singular_value(shape):
    out, rank, width = shape
    generator = torch.Generator().manual_seed(rank)
    left, right = torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator)
    exact = torch.linalg.svdvals(left.double() @ right.double())[0].item()
    assert largest_singular_value(left, right) == pytest.approx(exact, rel=2e-3)
    assert largest_singular_value(left, right) <= exact * (1 + 1e-5)


def test_many_nearly_equal_ones_cost_little_precision():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(400, 200, generator=generator)).Q for _ in range(2))
    assert 0.98 < largest_singular_value(left * torch.linspace(1, 0.9, 200), right.T) <= 1 + 1e-5


def test_no_factors_no_value():
    assert largest_singular_value(torch.zeros(4, 2), torch.zeros(2, 5)) == 0


def test_the_factorised_linears_are_named(toy):
    student = toy.student()
    found = largest_singular_values(student)
    assert list(found) == ["up", "down"]
    assert found["up"] == pytest.approx(torch.linalg.svdvals(student.up.product())[0].item(), rel=1e-4)


def test_growth_is_told_from_one_and_a_half_on():
    log = DistillLog(
        "b", 4, 100, 1e-3, 2.0, 1.0, True, 4, False, (), (), {"a": (2.0, 2.9), "b": (2.0, 3.1), "c": (0.0, 1.0)}
    )
    assert log.grown == {"b": pytest.approx(1.55)}
