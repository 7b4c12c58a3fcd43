"""How the factors of a weight start, before they are taught: strategies that a recipe can name."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field, with_config
from torch import Tensor

from lillama.lowrank.factors import Factors, scaled_svd, truncated_svd, two_sided_svd, whitened_svd
from lillama.lowrank.gram import Gram, Moments

# Each initialiser says whether it needs the Gram of the inputs and that of the gradients at the outputs, and whether it takes
# several weights of one shape at once, stacked, of whose factors the beginnings are the factors at smaller ranks.

LEAST_SCALE = 1e-6  # of an input that is always 0, as in ASVD's own code


@with_config(extra="forbid")
@dataclass(frozen=True)
class Svd:
    """Truncated singular value decomposition of the weight alone, as published (arXiv 2412.16719)."""

    name: Literal["svd"] = "svd"
    needs_gram: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False
    stacks: ClassVar[bool] = True

    def __call__(
        self, weight: Float[Tensor, "... out in"], rank: int, moments: Moments, generator: torch.Generator
    ) -> Factors:
        """Return the factors of a weight at a rank."""
        return truncated_svd(weight, rank)


@with_config(extra="forbid")
@dataclass(frozen=True)
class Scaled:
    """The best factors for inputs scaled by their mean magnitude (ASVD, arXiv 2312.05821).

    Attributes:
        alpha: exponent of the mean magnitude; 0 is plain SVD.
    """

    name: Literal["scaled"] = "scaled"
    alpha: Annotated[float, Field(ge=0)] = 0.5
    needs_gram: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = False
    stacks: ClassVar[bool] = False

    def __call__(
        self, weight: Float[Tensor, "... out in"], rank: int, moments: Moments, generator: torch.Generator
    ) -> Factors:
        """Return the factors of a weight at a rank."""
        inputs = _require(moments.inputs, "Gram matrix of the inputs", self.name)
        return scaled_svd(weight, (inputs.absolute / max(1, inputs.count)) ** self.alpha + LEAST_SCALE, rank)


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
    needs_gradient: ClassVar[bool] = False
    stacks: ClassVar[bool] = True

    def __call__(
        self, weight: Float[Tensor, "... out in"], rank: int, moments: Moments, generator: torch.Generator
    ) -> Factors:
        """Return the factors of a weight at a rank."""
        inputs = _require(moments.inputs, "Gram matrix of the inputs", self.name)
        return whitened_svd(weight, inputs, rank, self.damping)


@with_config(extra="forbid")
@dataclass(frozen=True)
class TwoSided:
    """The best factors for the inputs that the linear sees and for how much its outputs matter to the model.

    Attributes:
        damping: share of each Gram's mean eigenvalue that is added to its diagonal.
        identity: weight `a` of the identity in the gradients' Gram (out x out): `G <- (1 - a) G + a tr(G) / out I`; 1 is
            `whitened`.
    """

    name: Literal["two-sided"] = "two-sided"
    damping: Annotated[float, Field(ge=0)] = 1e-6
    identity: Annotated[float, Field(ge=0, le=1)] = 0.1
    needs_gram: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = True
    stacks: ClassVar[bool] = True

    def __call__(
        self, weight: Float[Tensor, "... out in"], rank: int, moments: Moments, generator: torch.Generator
    ) -> Factors:
        """Return the factors of a weight at a rank."""
        inputs = _require(moments.inputs, "Gram matrix of the inputs", self.name)
        gradients = _require(moments.gradients, "Gram matrix of the gradients at the outputs", self.name)
        if self.identity == 1:
            return whitened_svd(weight, inputs, rank, self.damping)
        mixed = (self.identity + self.damping) / (1 - self.identity)  # of a Gram only the scale is lost
        return two_sided_svd(weight, inputs, gradients, rank, self.damping, mixed)


@with_config(extra="forbid")
@dataclass(frozen=True)
class Random:
    """Gaussian factors whose product has the weight's mean square: the control that knows nothing of the weight."""

    name: Literal["random"] = "random"
    needs_gram: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False
    stacks: ClassVar[bool] = False

    def __call__(
        self, weight: Float[Tensor, "... out in"], rank: int, moments: Moments, generator: torch.Generator
    ) -> Factors:
        """Return the factors of a weight at a rank."""
        scale = (weight.float().pow(2).mean().item() / rank) ** 0.25
        left, right = (
            (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(weight.device, torch.float32)
            for shape in ((weight.shape[0], rank), (rank, weight.shape[1]))
        )
        return Factors(left, right)


Known = Svd | Scaled | Whitened | TwoSided | Random


@runtime_checkable
class OwnInitialiser(Protocol):
    """An initialiser of the user's, a frozen dataclass: runs and recipes know it by its name and its fields.

    Attributes:
        name: by which runs know it, none of lillama's.
        needs_gram: whether it wants the Gram of the inputs.
        needs_gradient: whether it wants the Gram of the gradients at the outputs.
        stacks: whether it takes several weights of one shape at once, stacked, of whose factors the beginnings are the
            factors at smaller ranks.
    """

    name: str
    needs_gram: bool
    needs_gradient: bool
    stacks: bool

    def __call__(
        self, weight: Float[Tensor, "... out in"], rank: int, moments: Moments, generator: torch.Generator
    ) -> Factors:
        """Return the factors of a weight at a rank."""
        ...


Initialiser = Known | OwnInitialiser


def _require(gram: Gram | None, what: str, name: str) -> Gram:
    if gram is None:
        raise ValueError(f"the initialisation {name} needs the {what}")
    return gram
