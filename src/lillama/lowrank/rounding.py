"""Rounding that makes up for its own errors: what a number loses, the numbers of its row behind it give back.

GPTQ (Frantar et al., arXiv 2210.17323): the columns of a weight are rounded one after the other; the error of a column, seen
through the second moments of the inputs, is taken off the columns that are still to be rounded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from lillama.lowrank.gram import Gram, Moments
from lillama.lowrank.quantize import best_scale, limits, pack, spread
from lillama.modeling.quantized import middle

DAMPING = 0.01  # of the Gram's mean eigenvalue, as in GPTQ's own code; more where that does not make it regular
ROUNDED_TOKENS = 32_768  # that the inputs of a rounded model are measured on, at most
COLUMNS = 128  # whose errors are carried over to all others at once
WIDEST = 1 << 26  # numbers that are rounded at once


@dataclass(frozen=True)
class Rounded:
    """A weight on the grid of its scales.

    Attributes:
        numbers: the stored integers.
        scale: of each group, or of each row at 8 bits.
        bits: of a number.
        group_size: neighbours in a row that share a scale below 8 bits.
    """

    numbers: Float[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    bits: int
    group_size: int

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight that the stored numbers stand for, in fp32."""
        wide = spread(self.scale, self.numbers.shape[1], self.bits, self.group_size)
        return (self.numbers - middle(self.bits)) * wide

    def stored(self) -> dict[str, Tensor]:
        """Return `qweight` and `scale`, as `QuantizedLinear` stores them."""
        return pack(self.numbers, self.scale, self.bits)


@dataclass(frozen=True)
class Feedback:
    """How the error of one column is made up for by the columns behind it, for inputs of one Gram.

    Attributes:
        order: in which columns are rounded: those of the largest inputs first.
        factor: upper triangular `U` with `U^T U` the inverse of the Gram in that order.
        importance: mean square of the inputs of each column, in the columns' own order.
    """

    order: Int[Tensor, " in"]
    factor: Float[Tensor, "in in"]
    importance: Float[Tensor, " in"]

    @classmethod
    def of(cls, gram: Float64[Tensor, "in in"]) -> "Feedback":
        """Return the feedback for inputs of some Gram; where nothing comes in, nothing is made up for."""
        diagonal = gram.diagonal().clone()
        mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
        order = diagonal.argsort(descending=True, stable=True)
        damping, damped = DAMPING * mean, gram[order][:, order]
        while True:
            lower, failed = _cholesky(damped + damping * torch.eye(len(gram)).to(gram))
            if not failed:
                break
            damping = 10 * damping
        inverse = torch.cholesky_inverse(lower)
        lower, failed = _cholesky(0.5 * (inverse + inverse.T))
        factor = lower.T
        if failed:  # of a Gram whose eigenvalues lie further apart than fp64 can tell
            factor = torch.diag(inverse.diagonal().clamp(min=0).sqrt().clamp(min=torch.finfo(torch.float32).tiny))
        return cls(order, factor.float(), diagonal.clamp(min=1e-6 * mean).float())


def round_weight(
    weight: Float[Tensor, "out in"], feedback: Feedback, widths: Sequence[int], group_size: int
) -> dict[int, Rounded]:
    """Return a weight in each of several widths, every one rounded by itself.

    Args:
        weight: to be rounded.
        feedback: for the inputs that it sees.
        widths: bits of a number.
        group_size: neighbours in a row that share a scale below 8 bits.
    """
    weight = weight.detach().float()
    scales = {bits: best_scale(weight, bits, group_size, feedback.importance) for bits in widths}
    found: dict[int, list[Tensor]] = {bits: [] for bits in widths}
    step = max(1, WIDEST // (weight.shape[1] * len(widths)))
    for start in range(0, len(weight), step):
        rows = weight[start : start + step]
        wide = {b: spread(scale[start : start + step], rows.shape[1], b, group_size) for b, scale in scales.items()}
        for place, numbers in enumerate(_round_rows(rows, wide, feedback).view(len(widths), *rows.shape)):
            found[widths[place]].append(numbers)
    return {bits: Rounded(torch.cat(found[bits]), scales[bits], bits, group_size) for bits in widths}


def rounding_rises(weight: Float[Tensor, "out in"], rounded: Sequence[Rounded], moments: Moments) -> list[float]:
    """Return the predicted rise of the loss by each rounding of a weight, in nats a token.

    To second order and with the linears taken as independent, as for ranks (`Spectra`): for an error `D` half of
    `tr(G_out D G_in D^T)`, with the mean second moments of inputs and gradients.
    """
    inputs, gradients = moments.inputs, moments.gradients
    assert inputs is not None and gradients is not None
    scale = moments.share / (max(1, inputs.count) * max(1, gradients.count))
    rises = list[float]()
    for one in rounded:
        error = (weight.detach().float() - one.weight).to(inputs.absolute)
        through = gradients.product(error.T.to(gradients.absolute).contiguous()).T.to(error)
        rises.append(0.5 * scale * float((inputs.product(error) * through).sum()))
    return rises


def dense_gram(gram: Gram) -> Float64[Tensor, "in in"]:
    """Return a Gram's sum as a matrix, also where only the diagonal is known."""
    return torch.diag(gram.sum) if gram.diagonal else gram.sum


def refit(
    left: Float64[Tensor, "out rank"], across: Float64[Tensor, "rank rank"], inner: Float64[Tensor, "rank rank"]
) -> Float[Tensor, "out rank"]:
    """Return the left factor that makes most of a right factor that has been rounded, by least squares over the inputs.

    Args:
        left: the one that belongs to the right factor `R` before.
        across: `R G R'^T`, for the Gram `G` of the inputs and the rounded factor `R'`.
        inner: `R' G R'^T`.
    """
    damped = inner + DAMPING * 1e-3 * inner.diagonal().mean() * torch.eye(len(inner)).to(inner)
    lower, failed = _cholesky(damped)
    return left.float() if failed else torch.cholesky_solve((left @ across).T, lower).T.float().contiguous()


def _cholesky(matrix: Float64[Tensor, "n n"]) -> tuple[Float64[Tensor, "n n"], bool]:
    """Return the lower Cholesky factor, and whether there is none."""
    lower, failed = cast(Any, torch.linalg).cholesky_ex(matrix)
    return lower, bool(failed)


def _round_rows(
    weight: Float[Tensor, "rows in"], scales: dict[int, Float[Tensor, "rows _"]], feedback: Feedback
) -> Float[Tensor, "all in"]:
    """Return the integers of some rows in each width, one width below the other."""
    order, factor = feedback.order.to(weight.device), feedback.factor.to(weight.device)
    scale = torch.cat([wide.expand(weight.shape)[:, order] for wide in scales.values()]).T.contiguous()
    left = (
        weight[:, order].T.repeat(1, len(scales)).contiguous()
    )  # columns x rows: what is rounded at once lies together
    centre, low, high = (_per_row(scales, len(weight), value, weight) for value in (middle, _low, _high))
    numbers = torch.empty_like(left)
    for start in range(0, len(left), COLUMNS):
        block, square = left[start : start + COLUMNS], factor[start : start + COLUMNS, start : start + COLUMNS]
        errors = torch.empty_like(block)
        for place in range(len(block)):
            column, step = block[place], scale[start + place]
            number = (column / step + centre).round_().clamp_(low, high)
            error = (column - (number - centre) * step) / square[place, place]
            block[place + 1 :].addr_(square[place, place + 1 :], error, alpha=-1)
            numbers[start + place], errors[place] = number, error
        left[start + COLUMNS :] -= factor[start : start + COLUMNS, start + COLUMNS :].T @ errors
    return numbers.T[:, order.argsort()].contiguous()


def _per_row(scales: dict[int, Tensor], rows: int, value: Callable[[int], float], like: Tensor) -> Tensor:
    return torch.cat([torch.full((rows,), float(value(bits))).to(like) for bits in scales])


def _low(bits: int) -> float:
    return limits(bits)[0]


def _high(bits: int) -> float:
    return limits(bits)[1]
