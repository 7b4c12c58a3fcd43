"""Whitened singular spectra of all linears: what the loss is predicted to rise by when a rank or a width is kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lillama.files.artefacts import load_tensors, save_tensors
from lillama.lowrank.storage import BITS
from lillama.ranks.plan import RankPlan
from lillama.ranks.widths import WidthCurve

ORDER, RISES, NEURONS = ".order", ".rises", ".neurons"  # behind the name of an FFN's last linear
ROUNDING = ".rounding"  # behind the name of a linear

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
        widths: name of an FFN's last linear -> what its widths lose, by the same second-order expansion.
        rounding: name of a linear -> what it loses by few bits, by the same expansion, in the order of `BITS`.

    Examples:
        >>> Spectra({"up": np.array([3.0, 2.0, 1.0])}).rises("up").tolist()
        [7.0, 2.5, 0.5, 0.0]
    """

    singular: Mapping[str, Values]
    widths: Mapping[str, WidthCurve] = field(default_factory=dict[str, WidthCurve])
    rounding: Mapping[str, Values] = field(default_factory=dict[str, Values])

    def rises(self, name: str) -> Values:
        """Return the predicted rise of the loss, in nats a token, for the ranks 0, 1, ..., full of a linear."""
        return self._curves[name]

    def rise(self, plan: RankPlan) -> float:
        """Return the predicted rise of the loss under a rank plan, in nats a token; interactions are left out."""
        narrower = sum(self.widths[name].rise(width) for name, width in plan.widths.items() if name in self.widths)
        rounded = sum(
            self.rounding[name][BITS.index(bits)] for name, bits in plan.bits.items() if name in self.rounding
        )
        return float(
            sum(self.rises(linear.name)[rank] for linear, rank in plan if rank is not None) + narrower + rounded
        )

    @cached_property
    def _curves(self) -> dict[str, Values]:
        return {name: _tails(values) for name, values in self.singular.items()}

    def save(self, path: Path) -> None:
        """Write the spectra; `load` reads them back."""
        tensors = {name: torch.tensor(values) for name, values in self.singular.items()}
        tensors |= {f"{name}{ROUNDING}": torch.tensor(values) for name, values in self.rounding.items()}
        for name, curve in self.widths.items():
            tensors[f"{name}{ORDER}"] = torch.tensor(curve.order)
            tensors[f"{name}{RISES}"] = torch.tensor(curve.rises)
            tensors[f"{name}{NEURONS}"] = torch.tensor(curve.neurons)
        save_tensors(path, tensors)

    @classmethod
    def load(cls, path: Path) -> "Spectra":
        """Read spectra.

        Raises:
            DamagedError: the file is missing or damaged.
        """
        found = {name: values.numpy() for name, values in load_tensors(path).items()}
        widths = {
            name: WidthCurve(
                found.pop(f"{name}{ORDER}"), found.pop(f"{name}{RISES}"), int(found.pop(f"{name}{NEURONS}"))
            )
            for name in [name.removesuffix(NEURONS) for name in found if name.endswith(NEURONS)]
        }
        rounding = {
            name: found.pop(f"{name}{ROUNDING}")
            for name in [name.removesuffix(ROUNDING) for name in found if name.endswith(ROUNDING)]
        }
        return cls(found, widths, rounding)


def _tails(values: Values) -> Values:
    """Return half of the sums of the squares behind each place."""
    return 0.5 * np.concatenate(([0.0], np.cumsum(values[::-1] ** 2)))[::-1]
