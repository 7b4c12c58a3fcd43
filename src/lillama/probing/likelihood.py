"""How likely a model finds texts: each text once, sequences of equal length together, so that nothing is padded."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lillama.errors import ModelError, ProbeError
from lillama.model.tokenizer import embeddings_of, refuse_unknown
from lillama.model.tokenizer import encode_text as tokenised
from lillama.probing.benchmark import ScoreName, Unit
from lillama.probing.scorer import Scorer
from lillama.system.progress import Progress, Report

Ids = tuple[int, ...]
SHOWN = 60


@dataclass(frozen=True)
class Tokens:
    """A text as the model sees it.

    Attributes:
        ids: with special tokens.
        places: of the tokens that are scored.
    """

    ids: Ids
    places: Ids


@dataclass(frozen=True)
class Likelihood:
    """What a model says of one text.

    Attributes:
        total: log-probability of its scored tokens, in nats; of a masked model, the pseudo-log-likelihood.
        tokens: which they are.
    """

    total: float
    tokens: Tokens


def likelihoods(scorer: Scorer, texts: Sequence[str], report: Report) -> dict[str, Likelihood]:
    """Return each text's likelihood.

    A causal model predicts every token from those before it; the first from the tokenizer's BOS token, and where there is
    none it is not scored. A masked model predicts every token from all others, one mask at a time (Salazar et al., ACL
    2020, arXiv 1910.14659).

    Args:
        scorer: the model.
        texts: duplicates are computed once.
        report: told about every batch.

    Raises:
        ProbeError: a text has no token to score, or is longer than the model's context.
        ModelError: a log-probability is not finite.
    """
    distinct = list(dict.fromkeys(texts))
    tokens = dict(zip(distinct, encode_pairs(scorer, distinct), strict=True))
    _refuse(scorer, tokens)
    totals = _totals(scorer, set(tokens.values()), report)
    wrong = [text for text in distinct if not math.isfinite(totals[tokens[text]])]
    if wrong:
        raise ModelError(
            f"{scorer.name}: the log-probabilities of {len(wrong)} texts are not finite, the first is {_excerpt(wrong[0])}; "
            "get a sound copy of the model, or try another --device"
        )
    return {text: Likelihood(totals[tokens[text]], tokens[text]) for text in distinct}


def encode_pairs(scorer: Scorer, texts: Sequence[str]) -> list[Tokens]:
    """Tokenise texts and mark what is scored."""
    if scorer.masked:
        found = _tokenise(scorer, texts, return_special_tokens_mask=True)
        rows = zip(found["input_ids"], found["special_tokens_mask"], strict=True)
        return [Tokens(tuple(ids), tuple(i for i, mark in enumerate(special) if not mark)) for ids, special in rows]
    first: Any = scorer.tokenizer.bos_token_id
    start = () if first is None else (first,)
    refuse_unknown(scorer.tokenizer, start, embeddings_of(scorer.model), "tokenizer's beginning-of-text token")
    found = _tokenise(scorer, texts, add_special_tokens=False)
    return [Tokens((*start, *ids), tuple(range(1, len(start) + len(ids)))) for ids in found["input_ids"]]


def _tokenise(scorer: Scorer, texts: Sequence[str], **options: bool) -> dict[str, list[list[int]]]:
    return tokenised(scorer.tokenizer, texts, embeddings_of(scorer.model), "probed texts", **options)


def score(kind: ScoreName, unit: Unit, text: str, likelihood: Likelihood) -> float:
    """Turn a log-probability into the score by which two texts are compared.

    `sum` is the log-probability. `mean` divides it by the number of units. `penalised` divides it by `((5 + n) / 6) ** 0.8`
    for n units (Wu et al., 2016, arXiv 1609.08144; PenLP in Lau et al., TACL 2020).

    Examples:
        >>> cat = Likelihood(-6.0, Tokens((0, 7, 9), (1, 2)))
        >>> score("sum", "token", "cat", cat), score("mean", "token", "cat", cat), score("mean", "char", "cat", cat)
        (-6.0, -3.0, -2.0)
    """
    match unit:
        case "token":
            count = len(likelihood.tokens.places)
        case "char":
            count = len(text)
        case "word" | "phoneme":
            count = len(text.split())
    match kind:
        case "sum":
            return likelihood.total
        case "mean":
            return likelihood.total / count
        case "penalised":
            return likelihood.total / ((5 + count) / 6) ** 0.8


@torch.inference_mode()
def _totals(scorer: Scorer, sequences: set[Tokens], report: Report) -> dict[Tokens, float]:
    """Return the summed log-probability of each sequence's scored tokens."""
    totals = dict.fromkeys(sequences, 0.0)
    rows = (
        [(one, place) for one in sequences for place in one.places]
        if scorer.masked
        else [(one, 0) for one in sequences]
    )
    rows.sort(key=lambda row: (len(row[0].ids), row[0].ids, row[1]))  # a fixed order: the same batches, the same bits
    done = tokens = 0
    for batch in _batches(rows, scorer.batch_tokens):
        ids = torch.tensor([one.ids for one, _ in batch], device=scorer.model.device)
        values = _mask_each(scorer, ids, [place for _, place in batch]) if scorer.masked else _causal(scorer, ids)
        for (one, _), value in zip(batch, values.tolist(), strict=True):
            totals[one] += value
        done, tokens = done + len(batch), tokens + ids.numel()
        report(Progress("probe", done, len(rows), tokens=tokens))
    return totals


def _causal(scorer: Scorer, ids: Int[Tensor, "rows length"]) -> Float[Tensor, " rows"]:
    logits = scorer.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    chosen = logits.gather(2, ids[:, 1:, None]).squeeze(2) - logits.logsumexp(2)
    return chosen.double().sum(1)


def _mask_each(scorer: Scorer, ids: Int[Tensor, "rows length"], places: list[int]) -> Float[Tensor, " rows"]:
    """Return the log-probability of the token at one place of each row, which is masked there."""
    rows = torch.arange(len(places), device=ids.device)
    wanted = ids[rows, places]
    masked = ids.index_put(
        (rows, torch.tensor(places, device=ids.device)), ids.new_tensor(scorer.tokenizer.mask_token_id)
    )
    logits = scorer.model(input_ids=masked, attention_mask=torch.ones_like(masked)).logits[rows, places].float()
    return (logits.gather(1, wanted[:, None]).squeeze(1) - logits.logsumexp(1)).double()


def _batches(rows: list[tuple[Tokens, int]], at_once: int) -> Iterator[list[tuple[Tokens, int]]]:
    for length, group in groupby(rows, key=lambda row: len(row[0].ids)):
        same = list(group)
        step = max(1, at_once // length)
        yield from (same[start : start + step] for start in range(0, len(same), step))


def _refuse(scorer: Scorer, tokens: dict[str, Tokens]) -> None:
    """Refuse texts without a scored token, and texts longer than the context."""
    empty = [text for text, one in tokens.items() if not one.places]
    if empty:
        reason = (
            ""
            if scorer.masked or scorer.tokenizer.bos_token_id is not None
            else ": without a BOS token the first is not scored"
        )
        raise ProbeError(
            f"{len(empty)} texts have no token that {scorer.name} can score{reason}; the first is {_excerpt(empty[0])}"
        )
    longest = scorer.longest
    long = [text for text, one in tokens.items() if longest is not None and len(one.ids) > longest]
    if long:
        count = len(tokens[long[0]].ids)
        raise ProbeError(
            f"{len(long)} texts are longer than the {longest} tokens of {scorer.name}, the first has {count}: "
            f"{_excerpt(long[0])}; leave them out of the data"
        )


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")
