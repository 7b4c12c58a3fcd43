"""How wide an FFN may be, and what the loss is predicted to rise by at each width."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class WidthCurve:
    """In which order the neurons of an FFN are left out, and what that costs.

    Attributes:
        order: of the neurons that are left out, the first one first.
        rises: predicted rise of the loss, in nats a token, after 0, 1, ... steps.
        neurons: of the whole FFN.

    Examples:
        >>> curve = WidthCurve(np.array([3, 1, 0, 2]), np.array([0.0, 0.1, 0.4]), 8)
        >>> curve.widths.tolist(), curve.rise(6), curve.kept(6).tolist()
        ([8, 6, 4], 0.1, [0, 2, 4, 5, 6, 7])
    """

    order: NDArray[np.int64]
    rises: NDArray[np.float64]
    neurons: int

    @property
    def step(self) -> int:
        """Neurons of a step."""
        return len(self.order) // max(1, len(self.rises) - 1)

    @property
    def widths(self) -> NDArray[np.int64]:
        """Widths that the FFN may have, the whole one first."""
        return self.neurons - self.step * np.arange(len(self.rises))

    def rise(self, width: int) -> float:
        """Return the predicted rise of the loss at a width, between steps that of the narrower one."""
        steps = -(-(self.neurons - width) // max(1, self.step))
        return float(self.rises[min(steps, len(self.rises) - 1)])

    def kept(self, width: int) -> NDArray[np.int64]:
        """Return the indices of the neurons that are kept at a width, in their order.

        A width below the least one of the curve keeps the first of the neurons that would be left then.
        """
        gone = self.order[: self.neurons - width]
        return np.setdiff1d(np.arange(self.neurons), gone)[:width]
