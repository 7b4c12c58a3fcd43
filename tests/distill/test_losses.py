import math

import pytest
import torch
import torch.nn.functional as F

from lillama.distill.losses import L1Cosine, Mse, TokenMse

LOSSES = (L1Cosine(), Mse(), TokenMse())
STUDENT, TEACHER = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [6.0, 8.0]])


def test_l1_cosine_by_hand():
    expected = [(1 + 2) / 2 + math.log(2), (3 + 4) / 2 + math.log(1 + math.exp(-1))]
    torch.testing.assert_close(L1Cosine()(STUDENT, TEACHER), torch.tensor(expected))


def test_mse_by_hand():
    torch.testing.assert_close(Mse()(STUDENT, TEACHER), torch.tensor([(1 + 4) / 2, (9 + 16) / 2]))
    assert Mse().scale(TEACHER) == (0 + 4 + 36 + 64) / 4


def test_token_mse_by_hand():
    torch.testing.assert_close(TokenMse()(STUDENT, TEACHER), torch.tensor([(5 / 2) / (4 / 2), (25 / 2) / (100 / 2)]))


def test_cosine_part_lies_in_its_range_and_does_not_see_the_scale():
    y = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    a = torch.cat([y[:100], -y[100:]]) * torch.rand(200, 1, generator=torch.Generator().manual_seed(1)) * 100
    a[50:150] += torch.randn(100, 8, generator=torch.Generator().manual_seed(2))
    part = L1Cosine()(a, y) - (a - y).abs().mean(-1)
    assert part.min() >= 0.3132 and part.max() <= 1.3133
    torch.testing.assert_close(part.min(), -F.logsigmoid(torch.tensor(1.0)), atol=1e-5, rtol=0)
    scaled = L1Cosine()(7 * a, y) - (7 * a - y).abs().mean(-1)
    torch.testing.assert_close(scaled, part, atol=1e-4, rtol=0)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_the_teachers_own_output_is_the_minimum(loss):
    y = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    best = loss(y, y)
    assert best.shape == (5, 3)
    assert (loss(y + 0.1, y) > best).all()
    assert (best < 0.3133).all()


@pytest.mark.parametrize("loss", [Mse(), TokenMse()], ids=lambda loss: loss.name)
def test_a_student_of_zeros_has_loss_one(loss):
    y = 5 * torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    assert loss(torch.zeros_like(y), y).mean().item() / loss.scale(y) == pytest.approx(1)


def test_a_silent_teacher_has_a_finite_unit_and_loss():
    silent = torch.zeros(3, 8)
    assert Mse().scale(silent) > 0
    assert TokenMse()(silent, silent).isfinite().all()
