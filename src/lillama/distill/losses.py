"""What "the same activations" means: losses between a student's and a teacher's hidden states, one value a token."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import with_config
from torch import Tensor


@with_config(extra="forbid")
@dataclass(frozen=True)
class L1Cosine:
    """The published loss `mean_d |a - y| - log sigmoid cos(a, y)` (arXiv 2412.16719).

    The cosine part lies in [0.3133, 1.3133] and does not see the scale.
    """

    name: Literal["l1-cosine"] = "l1-cosine"

    def __call__(
        self, student: Float[Tensor, "*batch d"], teacher: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch"]:
        """Return the loss of each token."""
        distance = (student - teacher).abs().mean(-1)
        return distance - F.logsigmoid(F.cosine_similarity(student, teacher, dim=-1))

    def scale(self, teacher: Float[Tensor, "*batch d"]) -> float:
        """Return what losses of this block are divided by: 1, as published."""
        return 1.0


@with_config(extra="forbid")
@dataclass(frozen=True)
class Mse:
    """The squared error `mean_d (a - y)^2`, in units of the teacher's mean square over the held-out tokens."""

    name: Literal["mse"] = "mse"

    def __call__(
        self, student: Float[Tensor, "*batch d"], teacher: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch"]:
        """Return the loss of each token."""
        return (student - teacher).pow(2).mean(-1)

    def scale(self, teacher: Float[Tensor, "*batch d"]) -> float:
        """Return the teacher's mean square, so that a student which returns zero has a loss of about 1."""
        return max(teacher.float().pow(2).mean().item(), 1e-30)


@with_config(extra="forbid")
@dataclass(frozen=True)
class TokenMse:
    """The squared error of each token over the token's own mean square: every token weighs the same."""

    name: Literal["token-mse"] = "token-mse"

    def __call__(
        self, student: Float[Tensor, "*batch d"], teacher: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch"]:
        """Return the loss of each token."""
        return (student - teacher).pow(2).mean(-1) / teacher.pow(2).mean(-1).clamp(min=1e-12)

    def scale(self, teacher: Float[Tensor, "*batch d"]) -> float:
        """Return 1: the loss is relative already."""
        return 1.0


Loss = L1Cosine | Mse | TokenMse


def length_error(student: Float[Tensor, "*batch d"], teacher: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Return `(|a| - |y|)^2 / |y|^2` of each token: what a loss that does not see the scale leaves free."""
    wanted = torch.linalg.vector_norm(teacher, dim=-1).clamp(min=1e-6)
    return (torch.linalg.vector_norm(student, dim=-1) / wanted - 1).pow(2)
