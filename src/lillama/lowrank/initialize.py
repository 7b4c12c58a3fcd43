"""How the factors of a weight start, before they are taught: strategies that a recipe can name."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, with_config
from torch import Tensor

from lillama.lowrank.factors import Factors, Gram, truncated_svd, whitened_svd


@with_config(extra="forbid")
@dataclass(frozen=True)
class Svd:
    """Truncated singular value decomposition of the weight alone, as published (arXiv 2412.16719)."""

    name: Literal["svd"] = "svd"
    needs_gram: ClassVar[bool] = False

    def __call__(
        self, weight: Float[Tensor, "out in"], rank: int, gram: Gram | None, generator: torch.Generator
    ) -> Factors:
        """Return the factors of a weight at a rank."""
        return truncated_svd(weight, rank)


@with_config(extra="forbid")
@dataclass(frozen=True)
class Whitened:
    """The best factors for the inputs that the linear really sees (SVD-LLM, arXiv 2403.07378).

    Attributes:
        damping: share of the Gram's mean eigenvalue that is added to its diagonal.
    """

    name: Literal["whitened"] = "whitened"
    damping: Annotated[float, Field(ge=0)] = 1e-6
    needs_gram: ClassVar[bool] = True

    def __call__(
        self, weight: Float[Tensor, "out in"], rank: int, gram: Gram | None, generator: torch.Generator
    ) -> Factors:
        """Return the factors of a weight at a rank."""
        if gram is None:
            raise ValueError("the whitened initialisation needs the Gram matrix of the inputs")
        return whitened_svd(weight, gram.sum, rank, self.damping)


@with_config(extra="forbid")
@dataclass(frozen=True)
class Random:
    """Gaussian factors whose product has the weight's mean square: the control that knows nothing of the weight."""

    name: Literal["random"] = "random"
    needs_gram: ClassVar[bool] = False

    def __call__(
        self, weight: Float[Tensor, "out in"], rank: int, gram: Gram | None, generator: torch.Generator
    ) -> Factors:
        """Return the factors of a weight at a rank."""
        scale = (weight.float().pow(2).mean().item() / rank) ** 0.25
        left, right = (
            (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(weight.device, torch.float32)
            for shape in ((weight.shape[0], rank), (rank, weight.shape[1]))
        )
        return Factors(left, right)


Initialiser = Svd | Whitened | Random
