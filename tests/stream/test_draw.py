"""Labels are drawn as often as the predictions say."""

import pytest
import torch

from lillama.stream.draw import GROUP, draw


@pytest.mark.parametrize("size", [1, 7, GROUP, GROUP + 1, 1000])
def test_entries_come_as_often_as_they_should(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    chances = torch.randn(size, generator=generator).mul(2).exp()
    chances[::3] = 0 if size > 1 else 1
    drawn = draw(chances.expand(50_000, -1), torch.rand(50_000, generator=generator))
    shares, wanted = drawn[:, 0].bincount(minlength=size) / 50_000, chances / chances.sum()
    assert not shares[wanted == 0].any()
    assert ((shares - wanted).abs() <= 5 * (wanted / 50_000).sqrt() + 5 / 50_000).all()


def test_the_running_sum_decides() -> None:
    chances = torch.zeros(4, 600)
    chances[:, [0, 255, 256, 599]] = 0.25
    assert draw(chances, torch.tensor([0.0, 0.26, 0.51, 0.99])).flatten().tolist() == [0, 255, 256, 599]


def test_rows_do_not_depend_on_each_other() -> None:
    generator = torch.Generator().manual_seed(1)
    chances, uniform = torch.rand(64, 3000, generator=generator), torch.rand(64, generator=generator)
    apart = torch.cat([draw(chances[row : row + 1], uniform[row : row + 1]) for row in range(64)])
    assert (draw(chances, uniform) == apart).float().mean() > 0.98  # a sum's last bit may move one across a border
