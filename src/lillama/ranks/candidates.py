"""Rank plans that were tried before any teaching, and the one that was chosen."""

from dataclasses import dataclass

from pydantic import FiniteFloat
from typing_extensions import TypedDict


class CandidateJson(TypedDict):
    """A rank plan that was tried, in `allocation.json`."""

    share: float
    keep: float
    predicted: float
    kl: float
    rise: float
    narrower: int


class AllocationJson(TypedDict):
    """`allocation.json`."""

    version: int
    chosen: FiniteFloat
    candidates: list[CandidateJson]


@dataclass(frozen=True)
class Candidate:
    """A rank plan, what is predicted of it, and what was measured with its initial factors, before any teaching.

    Attributes:
        share: of the way from `uniform` to `adaptive` ranks.
        keep: share of the whole model's numbers that it stores.
        predicted: rise of the loss by the spectra, in nats a token.
        kl: divergence from the original's predictions on the held-out sequences, in nats a token.
        rise: of the text's own cross-entropy there, in nats a token.
        narrower: FFNs that it makes narrower.
    """

    share: float
    keep: float
    predicted: float
    kl: float
    rise: float
    narrower: int = 0

    def as_json(self) -> CandidateJson:
        """Return the value for JSON."""
        return {
            "share": self.share,
            "keep": self.keep,
            "predicted": self.predicted,
            "kl": self.kl,
            "rise": self.rise,
            "narrower": self.narrower,
        }
