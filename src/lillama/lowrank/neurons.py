"""Which neurons an FFN can do without: pure functions on tensors, computed in fp64.

Neurons are left out from the whole network on, each time the one that is missed least when the weight behind them is
refitted by least squares (Optimal Brain Surgeon for structures, as in ZipLM, arXiv 2302.04089; the refit is
MoDeGPT's of type I, arXiv 2408.09632). What they are missed by is weighted on the side of the outputs as well.
"""

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lillama.lowrank.eigen import eigh
from lillama.lowrank.gram import Gram, exact_device

LEAST = 0.25  # share of the neurons that are never left out
STEPS = 64  # about so many steps would leave out all
FEWEST = 8  # neurons of a step
CANDIDATES = 4  # times as many are looked at for a step


@dataclass(frozen=True)
class Elimination:
    """The order in which the neurons of an FFN are left out.

    Attributes:
        order: of the neurons that are left out, the first one first.
        errors: squared error of the outputs, weighted by their Gram, over all that the Grams are sums of, after 0, 1, ...
            steps.
        step: neurons of a step.
    """

    order: Int[Tensor, " removed"]
    errors: Float[Tensor, " steps"]
    step: int


def step_of(neurons: int) -> int:
    """Return how many neurons are left out at once: a power of two, about a 64th of them.

    Examples:
        >>> step_of(1536), step_of(14336), step_of(56)
        (16, 128, 8)
    """
    return max(FEWEST, 1 << ((neurons // STEPS).bit_length() - 1) if neurons >= STEPS else 0)


def eliminate(
    weight: Float[Tensor, "out neurons"], gram_in: Gram, gram_out: Gram, damping: float = 1e-6
) -> Elimination:
    """Return the order in which neurons are left out, and the error after each step.

    With `P` the inverse of the neurons' Gram `C`, leaving out a set `R` costs `tr(A_R P_RR^-1 A_R^T)`, where `A = G^(1/2) W`
    is the weight behind the neurons that are left, refitted, between which and the outputs lies the root of their Gram `G`;
    then `A <- A - A_R P_RR^-1 P_R` and `P <- P - P_R^T P_RR^-1 P_R`.

    Args:
        weight: `W`, behind the neurons.
        gram_in: `C`, of the neurons' activations.
        gram_out: `G`, of the gradients at the outputs.
        damping: this share of the mean eigenvalue of `C` is added to its diagonal.
    """
    a, step = _outputs_root(gram_out) @ _exact(weight), step_of(weight.shape[1])
    precision, left = torch.cholesky_inverse(_factor(gram_in.sum, damping)), torch.arange(a.shape[1], device=a.device)
    order, errors = list[Tensor](), [0.0]
    while len(left) - step >= LEAST * weight.shape[1]:
        cost = a.square().sum(dim=0) / precision.diagonal()
        cheap = cost.topk(min(CANDIDATES * step, len(left)), largest=False).indices
        gone = cheap[_pick(a[:, cheap].mT @ a[:, cheap], precision[cheap][:, cheap], step)]
        root = _cholesky(precision[gone][:, gone])
        rows = _solve(root, precision[gone])
        lost = _solve(root, a[:, gone].mT)
        order.append(left[gone])
        errors.append(errors[-1] + lost.square().sum().item())
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[gone] = False
        rows = rows[:, stays]
        a = a[:, stays] - lost.mT @ rows
        precision = precision[stays][:, stays] - rows.mT @ rows
        left = left[stays]
    removed = torch.cat(order) if order else left[:0]
    return Elimination(removed.cpu(), torch.tensor(errors, dtype=torch.float64), step)


def refit(
    weight: Float[Tensor, "out neurons"], gram_in: Gram, kept: Int[Tensor, " kept"], damping: float = 1e-6
) -> Float[Tensor, "out kept"]:
    """Return the weight behind the neurons that are kept, which takes over the work of the others by least squares.

    With `S` the kept neurons and `R` the others it is `W_S + W_R C_RS (C_SS)^-1`: `W_S` where none is left out.

    Args:
        weight: `W`, of any floating-point type.
        gram_in: `C`, of the neurons' activations.
        kept: indices of neurons.
        damping: as in `eliminate`.
    """
    w, gram = _exact(weight), gram_in.sum
    gone = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    gone[kept] = False
    taken = torch.cholesky_solve(gram[kept][:, gone] @ w[:, gone].mT, _factor(gram[kept][:, kept], damping))
    return w[:, kept] + taken.mT


def _pick(m: Float[Tensor, "n n"], p: Float[Tensor, "n n"], count: int) -> Int[Tensor, " count"]:
    """Return the neurons of a few that are left out one after the other, each being the one that is missed least then.

    Of two that stand for each other both would be missed little, but not one after the other.

    Args:
        m: products `A^T A` of the weights behind them.
        p: their part of the precision.
        count: how many are left out.
    """
    taken, chosen = torch.zeros(len(m), dtype=torch.bool, device=m.device), list[Tensor]()
    for _ in range(count):
        cost = (m.diagonal() / p.diagonal().clamp(min=torch.finfo(p.dtype).tiny)).masked_fill(taken, float("inf"))
        place = cost.argmin()
        row, own = p[place] / p[place, place], m[place]
        m = m - torch.outer(own, row) - torch.outer(row, own) + own[place] * torch.outer(row, row)
        p = p - torch.outer(row, p[place])
        taken = taken.index_fill(0, place, True)
        chosen.append(place)
    return torch.stack(chosen)


def _outputs_root(gram: Gram) -> Float[Tensor, "out out"]:
    """Return `R` with `R^T R` the Gram, of which the diagonal alone may be known."""
    found = gram.sum
    if gram.diagonal:
        return found.clamp(min=0).sqrt().diag()
    values, q = eigh(found)
    return values.clamp(min=0).sqrt()[:, None] * q.mT


def _factor(gram: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """Return the Cholesky factor of a damped Gram; of zeros that of the identity.

    Products that were rounded may leave a Gram of few vectors with negative eigenvalues: it is damped ten times as much then,
    until it has none.
    """
    mean = gram.diagonal().mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    while True:
        damped = gram.clone()
        damped.diagonal().add_(damping * mean)
        factor, info = _try_cholesky(damped)
        if not info.item() or damping > 1:
            return factor
        damping *= 10


def _cholesky(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    result = torch.linalg.cholesky(matrix)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast(Tensor, result)


def _try_cholesky(matrix: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n n"], Int[Tensor, ""]]:
    """Return the factor and 0, or some matrix and the order of the minor that is not positive."""
    result = torch.linalg.cholesky_ex(matrix)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast(tuple[Tensor, Tensor], result)


def _solve(lower: Float[Tensor, "n n"], right: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    result = torch.linalg.solve_triangular(lower, right, upper=False)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast(Tensor, result)


def _exact(tensor: Tensor) -> Float[Tensor, "..."]:
    return tensor.detach().to(exact_device(tensor.device), torch.float64)
