"""Best low-rank approximations of a weight: pure functions on tensors, computed in fp64."""

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

LEAST_DAMPING = 1e-12  # keeps the square root of a rank-deficient Gram invertible


@dataclass(frozen=True)
class Factors:
    """The pair that stands for a weight `W (out x in) ~ left @ right`.

    Attributes:
        left: out x r.
        right: r x in.
    """

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"]


@dataclass
class Gram:
    """The uncentred second moment `sum x x^T` of a linear's inputs, and how many inputs went in.

    Products are taken in the inputs' type (at least fp32) and summed in fp64; where the device has no fp64 (Apple's), the
    sum lies on the CPU.
    """

    sum: Float[Tensor, "in in"]
    count: int = 0

    @classmethod
    def zeros(cls, features: int, device: torch.device) -> "Gram":
        """Return the Gram of no inputs."""
        return cls(torch.zeros(features, features, dtype=torch.float64, device=exact_device(device)))

    def add(self, x: Float[Tensor, "tokens in"]) -> None:
        """Add a batch of inputs in place."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.sum += (x.T @ x).to(self.sum.device)
        self.count += len(x)


def truncated_svd(weight: Float[Tensor, "out in"], rank: int) -> Factors:
    """Return the factors that minimise `||W - left @ right||_F` (Eckart-Young), `sqrt(S)` on both sides.

    Args:
        weight: `W`, of any floating-point type.
        rank: from 1 to min(out, in).
    """
    u, s, vh = _svd(_exact(weight))
    root = s[:rank].sqrt()
    return Factors(u[:, :rank] * root, root[:, None] * vh[:rank])


def whitened_svd(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], rank: int, damping: float = 1e-6
) -> Factors:
    """Return the factors that minimise `||(W - left @ right) X||_F`, where `gram = X X^T` (SVD-LLM, arXiv 2403.07378).

    With `G` the damped Gram, the best product is `U U^T W`, `U` the leading eigenvectors of `W G W^T`. When `out > in` the
    same product is reached from `S W^T W S`, `S` the symmetric square root of `G`, so that only a matrix of the smaller side
    is decomposed. Nothing is factorised by Cholesky: rank-deficient Grams are fine. Each pair of a column of `left` and a
    row of `right` is scaled to equal norms, as `sqrt(S)` on both sides does without whitening.

    Args:
        weight: `W`, of any floating-point type.
        gram: symmetric, positive semi-definite; any scale.
        rank: from 1 to min(out, in).
        damping: this share of the Gram's mean eigenvalue is added to its diagonal, and at least 1e-12 of it.
    """
    w, g = _exact(weight), _exact(gram)
    out_features, in_features = w.shape
    mean_eigenvalue = g.trace() / in_features
    floor = max(damping, LEAST_DAMPING) * mean_eigenvalue if mean_eigenvalue > 0 else torch.ones_like(mean_eigenvalue)
    if out_features <= in_features:
        left = _leading(w @ g @ w.T + floor * (w @ w.T), rank)
        return _balanced(left, left.T @ w)
    eigenvalues, q = _eigh(g)
    eigenvalues = eigenvalues.clamp(min=0) + floor
    white = (w @ q) * eigenvalues.sqrt()
    v = _leading(white.T @ white, rank)
    return _balanced(white @ v, (v / eigenvalues.sqrt()[:, None]).T @ q.T)


def exact_device(device: torch.device) -> torch.device:
    """Return the device itself if it computes in fp64, else the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to(exact_device(tensor.device), torch.float64)


def _svd(matrix: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor, Tensor]:
    result = torch.linalg.svd(matrix, full_matrices=False)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast(tuple[Tensor, Tensor, Tensor], result)


def _eigh(matrix: Float[Tensor, "n n"]) -> tuple[Tensor, Tensor]:
    result = torch.linalg.eigh(matrix)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast(tuple[Tensor, Tensor], result)


def _leading(matrix: Float[Tensor, "n n"], rank: int) -> Float[Tensor, "n rank"]:
    """Return the eigenvectors of the largest eigenvalues, the largest first."""
    _, vectors = _eigh(matrix)
    return vectors[:, -rank:].flip(1)


def _balanced(left: Float[Tensor, "out rank"], right: Float[Tensor, "rank in"]) -> Factors:
    tiny = torch.finfo(left.dtype).tiny
    left_norms, right_norms = left.square().sum(dim=0).sqrt(), right.square().sum(dim=1).sqrt()
    ratio = (right_norms.clamp(min=tiny) / left_norms.clamp(min=tiny)).sqrt()
    return Factors(left * ratio, right / ratio[:, None])
