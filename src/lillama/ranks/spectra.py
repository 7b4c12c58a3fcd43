"""Whitened singular spectra of all linears: what the loss is predicted to rise by when a rank is kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lillama.files.artefacts import load_tensors, save_tensors
from lillama.ranks.plan import RankPlan

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Spectra:
    """The singular values of `G_out^(1/2) W G_in^(1/2)` of every linear, in units of the square root of a nat.

    `G_in` is the mean of `x x^T` over calibration tokens, `G_out` that of `g g^T`, `g` the gradient of a token's
    log-likelihood at the linear's output under the model's own distribution (Fisher). To second order, and with the layers
    taken as independent (K-FAC, arXiv 1503.05671), a change `D` of the weight raises the loss of a token by half of
    `||G_out^(1/2) D G_in^(1/2)||_F^2`: the best factors of rank r raise it by half of the squares behind the r-th.

    Attributes:
        singular: name of a linear -> its singular values, the largest first.

    Examples:
        >>> Spectra({"up": np.array([3.0, 2.0, 1.0])}).rises("up").tolist()
        [7.0, 2.5, 0.5, 0.0]
    """

    singular: Mapping[str, Values]

    def rises(self, name: str) -> Values:
        """Return the predicted rise of the loss, in nats a token, for the ranks 0, 1, ..., full of a linear."""
        return self._curves[name]

    def rise(self, plan: RankPlan) -> float:
        """Return the predicted rise of the loss under a rank plan, in nats a token; interactions are left out."""
        return float(sum(self.rises(linear.name)[rank] for linear, rank in plan if rank is not None))

    @cached_property
    def _curves(self) -> dict[str, Values]:
        return {name: _tails(values) for name, values in self.singular.items()}

    def save(self, path: Path) -> None:
        """Write the spectra; `load` reads them back."""
        save_tensors(path, {name: torch.tensor(values) for name, values in self.singular.items()})

    @classmethod
    def load(cls, path: Path) -> "Spectra":
        """Read spectra.

        Raises:
            DamagedError: the file is missing or damaged.
        """
        return cls({name: values.numpy() for name, values in load_tensors(path).items()})


def _tails(values: Values) -> Values:
    """Return half of the sums of the squares behind each place."""
    return 0.5 * np.concatenate(([0.0], np.cumsum(values[::-1] ** 2)))[::-1]
