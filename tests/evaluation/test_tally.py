"""Calibration error and divergence against their definitions."""

import pytest
import torch

from lillama.evaluation.tally import BINS, join_tallies, pair_tallies, tallies, tally
from lillama.evaluation.windows import Windows

EVERY = torch.ones(1, 1000, dtype=torch.bool)


def says(*probabilities: float, tokens: int = 1000) -> torch.Tensor:
    """Log-probabilities of a model that says the same at every token of one window."""
    return torch.tensor(probabilities).log().expand(1, tokens, len(probabilities))


def error(one) -> float:
    return (one.gaps.sum(0).abs().sum() / one.tokens.sum()).item()


@pytest.mark.parametrize("right", [0.55, 0.7, 0.9])
def test_a_calibrated_model_has_no_calibration_error(right):
    wanted = (torch.arange(1000)[None] >= 1000 * right).long()
    assert error(tally(says(right, 1 - right), wanted, EVERY)) == pytest.approx(0, abs=1e-6)


def test_calibration_error_is_the_gap_between_confidence_and_success():
    wanted = (torch.arange(1000)[None] >= 500).long()
    assert error(tally(says(0.9, 0.1), wanted, EVERY)) == pytest.approx(0.4, abs=1e-6)
    assert error(tally(says(1.0, 0.0), wanted * 0, EVERY)) == 0  # certain and right: the last bin takes 1 too


def test_errors_of_different_confidence_do_not_cancel():
    sure, unsure = tally(says(0.9, 0.1), EVERY.long(), EVERY), tally(says(0.6, 0.4), 0 * EVERY.long(), EVERY)
    assert error(join_tallies([sure, unsure])) == pytest.approx((0.9 + 0.4) / 2, abs=1e-6)
    assert (join_tallies([sure, unsure]).gaps != 0).any(0).sum() == 2 and sure.gaps.shape == (1, BINS)


def test_tokens_that_are_context_do_not_count():
    wanted = torch.randint(2, (1, 1000), generator=torch.Generator().manual_seed(0))
    some = torch.arange(1000)[None] >= 990
    few = tally(says(0.8, 0.2), wanted, some)
    alone = tally(says(0.8, 0.2, tokens=10), wanted[:, 990:], some[:, 990:])
    assert few.tokens.item() == 10
    assert few.nll.item() == pytest.approx(alone.nll.item()) and few.gaps.allclose(alone.gaps)


def test_divergence_is_that_of_torch():
    chance = torch.Generator().manual_seed(0)
    dense, model = (torch.randn(3, 7, 11, generator=chance).log_softmax(-1) for _ in range(2))
    windows = Windows("a", torch.randint(11, (3, 8), generator=chance), 0.5)
    pair = pair_tallies(lambda _, rows: model[rows], lambda _, rows: dense[rows], windows, 11)
    wanted = torch.nn.functional.kl_div(model.double(), dense.double(), reduction="none", log_target=True).sum((1, 2))
    assert pair.kl.tolist() == pytest.approx(wanted.tolist(), rel=1e-5)
    assert pair.same.tolist() == (dense.argmax(-1) == model.argmax(-1)).sum(1).tolist()
    assert pair.bytes.tolist() == [14, 14, 14]
    assert pair.model.nll.equal(tallies(lambda _, rows: model[rows], windows, 11).nll)
