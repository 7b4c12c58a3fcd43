"""Sums over the predicted tokens of each window: of one model, and of two on the same windows."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lillama.errors import ModelError
from lillama.evaluation.windows import Windows
from lillama.model.describe import hidden_size
from lillama.stream.activations import ActivationPlacement, ActivationStore
from lillama.stream.batch import Batch
from lillama.stream.capture import advance, begin, finish, row_slices
from lillama.stream.model import StreamedModel
from lillama.system.memory import tokens_of_logits
from lillama.system.progress import Progress, Report

TOKENS_AT_ONCE = 4096
BINS = 15

LogProbs = Callable[[str, slice], Float[Tensor, "windows predictions vocabulary"]]


@dataclass(frozen=True)
class Tally:
    """Sums over the predicted tokens of each window of a text, under one model.

    Attributes:
        tokens: predicted.
        nll: negative log-likelihood, in nats.
        gaps: for each of 15 equal bins of the likeliest token's probability, how often that token came, less how often it
            was expected to: the sum of its probabilities.
    """

    tokens: Float[Tensor, " windows"]
    nll: Float[Tensor, " windows"]
    gaps: Float[Tensor, "windows bins"]


@dataclass(frozen=True)
class PairTally:
    """Sums over the predicted tokens of each window of a text, under two models.

    Attributes:
        model: the one that is judged.
        dense: the one that it is compared with.
        bytes: of the text that the tokens stand for.
        kl: KL(dense || model), in nats.
        same: tokens where both have the same likeliest one.
    """

    model: Tally
    dense: Tally
    bytes: Float[Tensor, " windows"]
    kl: Float[Tensor, " windows"]
    same: Float[Tensor, " windows"]


@contextmanager
def log_probs(
    model: StreamedModel, texts: Mapping[str, Windows], placement: ActivationPlacement, report: Report
) -> Iterator[LogProbs]:
    """Run windows through a model's blocks, then yield a function that computes log-probabilities a few windows at a time.

    Args:
        model: to be run.
        texts: name -> windows.
        placement: where activations go.
        report: told about every block.

    Raises:
        ModelError: the model's logits are not finite; the function raises it.
    """
    refuse_other_models(model)
    width = hidden_size(model.skeleton.config)
    sizes = [windows.ids.numel() * width * model.dtype.itemsize for windows in texts.values()]
    place = placement.place(sum(sizes))
    total = sum(windows.ids.numel() for windows in texts.values())
    hidden, calls = {}, {}
    try:
        for index, (name, windows) in enumerate(texts.items()):
            store = ActivationStore((*windows.ids.shape, width), model.dtype, placement, place, f"text-{index}")
            hidden[name] = store
            calls[name], _ = begin(model, Batch.of_tokens(windows.ids), lambda shape, s=store: s, _rows(windows))
        for index in range(len(model.names)):
            report(Progress("perplexity", index, len(model.names), model.stacks[-1], index * total))
            block = model.block(index)
            for name, windows in texts.items():
                advance(block, index, calls[name], hidden[name], hidden[name], _rows(windows))
            del block
        report(Progress("perplexity", len(model.names), len(model.names), model.stacks[-1], len(model.names) * total))
        outside = model.outside(head=True)

        @torch.no_grad()
        def read(name: str, rows: slice) -> Tensor:
            logits = finish(model, outside, calls[name], texts[name].ids[rows], hidden[name].read(rows))
            log_p = logits[:, :-1].float().log_softmax(-1)
            if log_p.amax().isnan():
                raise ModelError(
                    f"{name}: the model's logits are not finite on this text; get a sound copy of the model, or "
                    "try another --device"
                )
            return log_p

        yield read
    finally:
        for store in hidden.values():
            store.remove()


@torch.no_grad()
def tally(
    log_p: Float[Tensor, "windows predictions vocabulary"],
    wanted: Int[Tensor, "windows predictions"],
    predicted: Bool[Tensor, "windows predictions"],
) -> Tally:
    """Sum up what a model says of some windows' tokens.

    Args:
        log_p: log-probabilities of every token after the first.
        wanted: the tokens that came.
        predicted: which of them count.
    """
    nll = -log_p.gather(2, wanted.to(log_p.device)[..., None])[..., 0].cpu().double()
    highest, likeliest = (value.cpu() for value in log_p.max(dim=-1))
    probability = highest.double().exp()
    gap = ((likeliest == wanted).double() - probability) * predicted
    bins = (probability * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(len(wanted), BINS, dtype=torch.float64).scatter_add(1, bins, gap)
    return Tally(predicted.sum(1).double(), nll.where(predicted, 0).sum(1), gaps)


def tallies(model: LogProbs, windows: Windows, vocabulary: int) -> Tally:
    """Sum up a whole text under one model."""
    parts = [
        tally(model(windows.name, rows), windows.ids[rows, 1:], windows.predicted(rows))
        for rows in _slices(windows, vocabulary)
    ]
    return join_tallies(parts)


@torch.no_grad()
def pair_tallies(model: LogProbs, dense: LogProbs, windows: Windows, vocabulary: int) -> PairTally:
    """Sum up a whole text under two models at once."""
    ours, theirs, kl, same = [], [], [], []
    for rows in _slices(windows, 3 * vocabulary):
        log_p, log_q = dense(windows.name, rows), model(windows.name, rows)
        predicted = windows.predicted(rows)
        ours.append(tally(log_q, windows.ids[rows, 1:], predicted))
        theirs.append(tally(log_p, windows.ids[rows, 1:], predicted))
        agree = (log_p.argmax(-1) == log_q.argmax(-1)).cpu()
        same.append((agree & predicted).sum(1).double())
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).cpu().double()
        kl.append(divergence.where(predicted, 0).sum(1))
    student, teacher = join_tallies(ours), join_tallies(theirs)
    return PairTally(student, teacher, student.tokens / windows.tokens_per_byte, torch.cat(kl), torch.cat(same))


def join_tallies(parts: list[Tally]) -> Tally:
    """Put tallies of consecutive windows together."""
    return Tally(*(torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "nll", "gaps")))


def _slices(windows: Windows, vocabulary: int) -> Iterator[slice]:
    at_once = max(1, tokens_of_logits(vocabulary) // windows.ids.shape[1])
    return row_slices(len(windows.ids), at_once)


def refuse_other_models(model: StreamedModel) -> None:
    """Refuse models that do not predict each token of a text from those before it."""
    if not model.kind.causal:
        name = type(model.skeleton).__name__
        raise ModelError(
            f"{name} is no causal language model, so that texts have no perplexity under it; leave --text out"
        )


def _rows(windows: Windows) -> int:
    return max(1, TOKENS_AT_ONCE // windows.ids.shape[1])
