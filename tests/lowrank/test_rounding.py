"""Rounding with feedback: what it saves, against the algorithm to the letter, and what is stored of it."""

import pytest
import torch
from torch import Tensor

from lillama.lowrank.gram import Gram, Moments
from lillama.lowrank.quantize import best_scale, limits, nearest, quantize, spread
from lillama.lowrank.rounding import DAMPING, Feedback, dense_gram, refit, round_weight, rounding_rises
from lillama.lowrank.storage import BITS
from lillama.modeling.quantized import QuantizedLinear, middle

GROUP = 16


def inputs(tokens: int = 400, width: int = 40, seed: int = 0) -> Tensor:
    """Correlated inputs, some of their columns much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return mixed * torch.rand(width, generator=generator)


def weight(rows: int = 12, width: int = 40) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


def lost(x: Tensor, w: Tensor, rounded: Tensor) -> float:
    return float((x @ (w - rounded).T).square().sum())


@pytest.mark.parametrize("width", [40, 300])  # errors are carried over at once behind each 128 columns
@pytest.mark.parametrize("bits", BITS)
def test_feedback_loses_less_than_rounding_to_the_nearest(bits: int, width: int) -> None:
    x, w = inputs(1000, width), weight(width=width)
    feedback = Feedback.of((x.T @ x).double())
    rounded = round_weight(w, feedback, (bits,), GROUP)[bits]
    layer = QuantizedLinear(width, len(w), bits, GROUP)
    layer.load_state_dict(quantize(w, bits, GROUP))
    assert lost(x, w, rounded.weight) < 0.9 * lost(x, w, layer.weight)
    layer.load_state_dict(rounded.stored())
    assert torch.equal(layer.weight, rounded.weight)
    low, high = limits(bits)
    assert rounded.numbers.min() >= low and rounded.numbers.max() <= high


@pytest.mark.parametrize("bits", [3, 8])
def test_it_is_gptq_to_the_letter(bits: int) -> None:
    """Each column is rounded, its error over the inverse Gram's diagonal is taken off all columns that are left."""
    x, w = inputs(), weight()
    gram = (x.T @ x).double()
    order = gram.diagonal().argsort(descending=True, stable=True)
    left = w[:, order].double()
    inner = gram[order][:, order]
    inner = inner + DAMPING * inner.diagonal().mean() * torch.eye(len(inner), dtype=torch.float64)
    feedback = Feedback.of(gram)
    scale = spread(best_scale(w, bits, GROUP, feedback.importance), 40, bits, GROUP).expand(w.shape)[:, order].double()
    wanted, rest = torch.empty_like(left), list(range(40))
    for column in range(40):
        inverse = torch.linalg.inv(inner[rest][:, rest])
        step = scale[:, column : column + 1]
        number = nearest(left[:, column : column + 1].clone(), step, bits)
        wanted[:, column : column + 1] = (number - middle(bits)) * step
        error = (left[:, column : column + 1] - wanted[:, column : column + 1]) / inverse[0, 0]
        left[:, rest] -= error @ inverse[:1]
        rest = rest[1:]
    found = round_weight(w, feedback, (bits,), GROUP)[bits].weight[:, order].double()
    assert (found - wanted).abs().gt(
        1e-3
    ).double().mean() < 0.02  # a number in fifty may lie at the edge of two integers
    assert lost(x, w, found[:, order.argsort()].float()) == pytest.approx(
        lost(x, w, wanted[:, order.argsort()].float()), rel=0.1
    )


def test_widths_that_are_rounded_together_are_those_that_are_rounded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = inputs(), weight()
    feedback = Feedback.of((x.T @ x).double())
    together = round_weight(w, feedback, BITS, GROUP)
    monkeypatch.setattr("lillama.lowrank.rounding.WIDEST", 5 * 40)  # five rows at once
    for bits in BITS:
        alone = round_weight(w, feedback, (bits,), GROUP)[bits]
        assert torch.equal(alone.numbers, together[bits].numbers) and torch.equal(alone.scale, together[bits].scale)


@pytest.mark.parametrize("kind", ["nothing", "one token", "columns that are never used", "huge"])
def test_inputs_of_all_kinds_leave_a_sound_weight(kind: str) -> None:
    x, w = inputs(), weight()
    if kind == "nothing":
        x = torch.zeros_like(x)
    elif kind == "one token":
        x = x[:1]
    elif kind == "huge":
        x = 1e15 * x
    else:
        x[:, ::3] = 0
    rounded = round_weight(w, Feedback.of(x.double().T @ x.double()), (4,), GROUP)[4]
    assert rounded.weight.isfinite().all()
    assert (rounded.weight - w).square().mean() < 0.5 * w.square().mean()


def test_the_predicted_rise_is_half_of_the_trace_between_both_moments() -> None:
    x, g, w = inputs(), torch.randn(300, 12, generator=torch.Generator().manual_seed(2)), weight()
    grams = []
    for vectors in (x, g):
        gram = Gram.zeros(vectors.shape[1], torch.device("cpu"))
        gram.add(vectors)
        grams.append(gram)
    rounded = round_weight(w, Feedback.of(dense_gram(grams[0])), BITS, GROUP)
    rises = rounding_rises(w, [rounded[bits] for bits in BITS], Moments(grams[0], grams[1], share=0.5))
    inner, outer = (x.T @ x).double() / 400, (g.T @ g).double() / 300
    for bits, rise in zip(BITS, rises, strict=True):
        error = (w - rounded[bits].weight).double()
        assert rise == pytest.approx(0.25 * float((outer @ error @ inner @ error.T).trace()), rel=1e-6)
    assert rises == sorted(rises, reverse=True)


def test_a_left_factor_is_fitted_to_the_rounded_right_one() -> None:
    x, left = inputs().double(), torch.randn(9, 6, generator=torch.Generator().manual_seed(3)).double()
    right = torch.randn(6, 40, generator=torch.Generator().manual_seed(4)).double()
    rounded = right + 0.1 * torch.randn(6, 40, generator=torch.Generator().manual_seed(5)).double()
    gram = x.T @ x
    found = refit(left, right @ gram @ rounded.T, rounded @ gram @ rounded.T).double()
    exact = torch.linalg.lstsq(x @ rounded.T, x @ right.T @ left.T).solution.T
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-2)
    errors = [(x @ (left @ right - one @ rounded).T).square().sum() for one in (found, left)]
    assert errors[0] < errors[1]
