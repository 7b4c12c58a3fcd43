"""Second moments of vectors, summed up in fp64: of the inputs of a linear, and of the gradients at its outputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

WIDEST = 1 << 14  # outputs; of the gradients at more than so many only the diagonal of the Gram is kept
TILE = 256  # columns of a Gram that are computed at once


@dataclass
class Gram:
    """Uncentred moments of vectors: `sum x x^T`, or only its diagonal, `sum |x|`, and how many went in.

    Products are taken in the vectors' type (at least fp32) and summed in fp64; where the device has no fp64 (Apple's), the
    sums lie on the CPU. Of the symmetric sum only what lies on and above the diagonal is held. Several Grams of one kind may
    be stacked (`...`), to be computed with at once.

    Attributes:
        tiles: of each `TILE` rows, the columns from the first of these rows on; or the diagonal alone.
        absolute: `sum |x|`.
        count: of the vectors.
    """

    tiles: list[Float[Tensor, "... _ _"] | Float[Tensor, "... _"]]
    absolute: Float[Tensor, "... n"]
    count: int = 0

    @classmethod
    def zeros(cls, features: int, device: torch.device, widest: int | None = None) -> "Gram":
        """Return the Gram of no vectors; of vectors longer than `widest` only the diagonal is kept."""
        shapes = [(features,)] if widest is not None and features > widest else list(_shapes(features))
        zeros = [
            torch.zeros(shape, dtype=torch.float64, device=exact_device(device)) for shape in ((features,), *shapes)
        ]
        return cls(zeros[1:], zeros[0])

    @classmethod
    def stack(cls, grams: Sequence["Gram"]) -> "Gram":
        """Return copies of Grams of equally long vectors, stacked; `count` is of all of them."""
        tiles = [torch.stack(tiles) for tiles in zip(*(gram.tiles for gram in grams), strict=True)]
        return cls(tiles, torch.stack([gram.absolute for gram in grams]), sum(gram.count for gram in grams))

    @property
    def width(self) -> int:
        """Length of the vectors."""
        return self.absolute.shape[-1]

    @property
    def sum(self) -> Float[Tensor, "... n n"] | Float[Tensor, "... n"]:
        """The sum, or its diagonal; put together anew each time."""
        if self.diagonal:
            return self.tiles[0].clone()
        whole = self.absolute.new_empty(*self.absolute.shape, self.width)
        for start in range(0, self.width, TILE):
            whole[..., start : start + TILE] = self._columns(start)
        return whole

    @property
    def diagonal(self) -> bool:
        """Whether only the diagonal of the sum is known."""
        return self.tiles[0].dim() == self.absolute.dim()

    @property
    def mean_eigenvalue(self) -> Float[Tensor, "..."]:
        """Mean of the sum's eigenvalues."""
        own = self.tiles if self.diagonal else [tile.diagonal(dim1=-2, dim2=-1) for tile in self.tiles]
        return torch.stack([part.sum(dim=-1) for part in own]).sum(dim=0) / self.width

    def product(self, w: Float[Tensor, "... m n"]) -> Float[Tensor, "... m n"]:
        """Return `w @ sum` for a matrix in fp64; the sum is not put together."""
        if self.diagonal:
            return w * self.tiles[0][..., None, :]
        result = torch.empty_like(w)
        for start in range(0, self.width, TILE):
            result[..., start : start + TILE] = w @ self._columns(start)
        return result

    def add(self, x: Float[Tensor, "tokens n"]) -> None:
        """Add a batch of vectors in place."""
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        self.absolute += x.abs().sum(dim=0).to(self.absolute.device)
        self.count += len(x)
        if self.diagonal:
            self.tiles[0] += x.square().sum(dim=0).to(self.absolute.device)
            return
        for start, tile in zip(range(0, self.width, TILE), self.tiles, strict=True):
            tile += (x[:, start : start + TILE].T @ x[:, start:]).to(tile.device)

    def __add__(self, other: "Gram") -> "Gram":
        tiles = [own + its for own, its in zip(self.tiles, other.tiles, strict=True)]
        return Gram(tiles, self.absolute + other.absolute, self.count + other.count)

    def averaged(self, count: int) -> "Gram":
        """Return the Gram of so many vectors that are on average like these."""
        share = count / self.count
        return Gram([tile * share for tile in self.tiles], self.absolute * share, count)

    def _columns(self, start: int) -> Float[Tensor, "... n _"]:
        """Return the columns of the sum that belong to the rows of one tile."""
        before = zip(range(0, start, TILE), self.tiles, strict=False)
        above = [tile[..., start - first : start - first + TILE] for first, tile in before]
        return torch.cat([*above, self.tiles[start // TILE].mT], dim=-2)


@dataclass(frozen=True)
class Moments:
    """What was measured at one linear on the calibration text; None where nothing was.

    Attributes:
        inputs: Gram of what enters it.
        gradients: Gram of the gradients at its outputs.
        share: vectors that come to it, for each token that the model predicts; below 1 for one of several experts.
    """

    inputs: Gram | None = None
    gradients: Gram | None = None
    share: float = 1.0

    @classmethod
    def stack(cls, moments: Sequence["Moments"]) -> "Moments":
        """Return copies of the moments of linears of one shape, stacked."""
        return cls(_stack([found.inputs for found in moments]), _stack([found.gradients for found in moments]))


def _stack(grams: Sequence[Gram | None]) -> Gram | None:
    """Return Grams stacked; None where one of them is missing."""
    known = [gram for gram in grams if gram is not None]
    return Gram.stack(known) if len(known) == len(grams) else None


def gram_size(features: int, widest: int | None = None) -> int:
    """Return the numbers that a Gram stores: the tiled upper triangle of features x features, or the diagonal alone.

    Args:
        features: length of the vectors.
        widest: length up to which more than the diagonal is kept; None sets no bound.
    """
    if widest is not None and features > widest:
        return features
    whole, rest = divmod(features, TILE)
    return TILE * (whole * features - TILE * whole * (whole - 1) // 2) + rest**2


def exact_device(device: torch.device) -> torch.device:
    """Return the device itself if it computes in fp64, else the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def _shapes(features: int) -> list[tuple[int, int]]:
    return [(min(TILE, features - start), features - start) for start in range(0, features, TILE)]
