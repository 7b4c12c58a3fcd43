"""How far a model is from another one, summed up over a text, with intervals."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import FiniteFloat
from torch import Tensor
from typing_extensions import TypedDict

from lillama.evaluation.continuation import Continued
from lillama.evaluation.continuation_samples import Sample, SampleJson
from lillama.evaluation.intervals import Interval, IntervalJson, Sums, bootstrap
from lillama.evaluation.perplexity import TextScore
from lillama.evaluation.tally import PairTally, join_tallies


class ComparedJson(TypedDict):
    """A figure of both models, in JSON."""

    model: float
    dense: float
    difference: IntervalJson


class ContinuationJson(TypedDict):
    """How the model goes on after prompts, in JSON."""

    prompts: int
    leading: IntervalJson
    equal: IntervalJson
    repetition: ComparedJson
    samples: list[SampleJson]


class AgreementJson(TypedDict):
    """How far a model is from the dense one, in JSON."""

    perplexity: FiniteFloat
    bits_per_byte: float
    windows: int
    excess_loss: IntervalJson
    excess_bits_per_byte: IntervalJson
    kl: IntervalJson
    top1: IntervalJson
    calibration_error: ComparedJson
    continuation: ContinuationJson | None


@dataclass(frozen=True)
class AgreementSummary:
    """A figure of the model, that of the dense one, and the difference: model less dense."""

    model: float
    dense: float
    difference: Interval

    def as_json(self) -> ComparedJson:
        """Return the value for JSON."""
        return {"model": self.model, "dense": self.dense, "difference": self.difference.as_json()}


@dataclass(frozen=True)
class Continuation:
    """How the model goes on after prompts, compared with what the dense model writes.

    Attributes:
        prompts: how many.
        leading: mean share of a continuation up to the first token where the two part.
        equal: share of the continuations that never part.
        repetition: share of 4-grams that stood in the same continuation before.
        samples: a few of them; a language has none of its own.
    """

    prompts: int
    leading: Interval
    equal: Interval
    repetition: AgreementSummary
    samples: tuple[Sample, ...]

    def as_json(self) -> ContinuationJson:
        """Return the value for JSON."""
        return {
            "prompts": self.prompts,
            "leading": self.leading.as_json(),
            "equal": self.equal.as_json(),
            "repetition": self.repetition.as_json(),
            "samples": [sample.as_json() for sample in self.samples],
        }


@dataclass(frozen=True)
class Agreement:
    """How far a model is from the dense one on a text, or on all texts of a language.

    Attributes:
        model: how well the model predicts the text.
        dense: how well the dense one does.
        windows: that were measured; the intervals come from drawing among them.
        excess_loss: ln(perplexity) less that of the dense model, in nats a token.
        excess_bits: the difference in bits per byte.
        kl: KL(dense || model), in nats a token.
        top1: share of the tokens where both think the same token likeliest.
        calibration: expected calibration error of the likeliest token's probability, in 15 equal bins (Guo et al.,
            arXiv 1706.04599).
        continuation: what both write; None where that was not asked for or the models do not fit in memory.
    """

    model: TextScore
    dense: TextScore
    windows: int
    excess_loss: Interval
    excess_bits: Interval
    kl: Interval
    top1: Interval
    calibration: AgreementSummary
    continuation: Continuation | None

    @property
    def name(self) -> str:
        """Of the text, or of the language."""
        return self.model.name

    def as_json(self) -> AgreementJson:
        """Return what stands under `against` in JSON."""
        return {
            "perplexity": self.dense.perplexity,
            "bits_per_byte": self.dense.bits_per_byte,
            "windows": self.windows,
            "excess_loss": self.excess_loss.as_json(),
            "excess_bits_per_byte": self.excess_bits.as_json(),
            "kl": self.kl.as_json(),
            "top1": self.top1.as_json(),
            "calibration_error": self.calibration.as_json(),
            "continuation": None if self.continuation is None else self.continuation.as_json(),
        }


@dataclass(frozen=True)
class Measured:
    """One text under both models, before it is summed up."""

    pair: PairTally
    continued: Continued | None
    samples: tuple[Sample, ...] = ()


def summary(name: str, texts: Sequence[Measured], seed: int) -> Agreement:
    """Sum up one text, or several as one, with intervals from draws among all their windows."""
    tally = _together([text.pair for text in texts])
    columns = {"tokens": tally.model.tokens, "bytes": tally.bytes, "kl": tally.kl, "same": tally.same}
    for role, one in (("model", tally.model), ("dense", tally.dense)):
        columns |= {f"{role}_nll": one.nll, f"{role}_gaps": one.gaps}
    random = np.random.default_rng(seed)
    sums = bootstrap(columns, random)
    tokens, size = sums.total["tokens"].item(), sums.total["bytes"].item()
    scores = {r: TextScore.of(name, tokens, sums.total[f"{r}_nll"].item(), size) for r in ("model", "dense")}
    continued_texts = [text.continued for text in texts if text.continued is not None]
    samples = texts[0].samples if len(texts) == 1 else ()
    return Agreement(
        model=scores["model"],
        dense=scores["dense"],
        windows=len(tally.kl),
        excess_loss=sums.interval(lambda s: (s["model_nll"] - s["dense_nll"]) / s["tokens"]),
        excess_bits=sums.interval(lambda s: (s["model_nll"] - s["dense_nll"]) / math.log(2) / s["bytes"]),
        kl=sums.interval(lambda s: s["kl"] / s["tokens"]),
        top1=sums.interval(lambda s: s["same"] / s["tokens"]),
        calibration=_calibration(sums),
        continuation=_continuation(continued_texts, samples, random) if continued_texts else None,
    )


def _calibration(sums: Sums) -> AgreementSummary:
    def error(s: Mapping[str, Tensor], role: str) -> Tensor:
        return s[f"{role}_gaps"].abs().sum(-1) / s["tokens"]

    difference = sums.interval(lambda s: error(s, "model") - error(s, "dense"))
    return AgreementSummary(error(sums.total, "model").item(), error(sums.total, "dense").item(), difference)


def _continuation(texts: Iterable[Continued], samples: tuple[Sample, ...], random: np.random.Generator) -> Continuation:
    fields = ("leading", "equal", "model", "dense")
    columns = {field: torch.cat([getattr(text, field) for text in texts]) for field in fields}
    prompts = len(columns["equal"])
    sums = bootstrap(columns | {"prompts": torch.ones(prompts, dtype=torch.float64)}, random)
    repetition = AgreementSummary(
        columns["model"].mean().item(),
        columns["dense"].mean().item(),
        sums.interval(lambda s: (s["model"] - s["dense"]) / s["prompts"]),
    )
    leading, equal = (sums.interval(lambda s, f=field: s[f] / s["prompts"]) for field in ("leading", "equal"))
    return Continuation(prompts, leading, equal, repetition, samples)


def _together(pairs: Sequence[PairTally]) -> PairTally:
    model, dense = join_tallies([pair.model for pair in pairs]), join_tallies([pair.dense for pair in pairs])
    parts = (torch.cat([getattr(pair, field) for pair in pairs]) for field in ("bytes", "kl", "same"))
    return PairTally(model, dense, *parts)
