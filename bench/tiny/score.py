"""A compressed model beside its dense original, each loaded as anybody would: next tokens, or words written down."""

import json
import math
import wave
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, WhisperForConditionalGeneration

import lillama  # noqa: F401  (from_pretrained learns of compressed models)
from lillama.evaluation.intervals import bootstrap

SEQ_LEN, AT_ONCE, LONGEST, RATE = 128, 16, 6, 16_000


@dataclass(frozen=True)
class Predicted:
    """What a language model says of each window of a text.

    Attributes:
        likeliest: token after each but the last, windows x (length - 1).
        nll: mean negative log-likelihood of each window, in nats a token.
        right: share of each window's tokens that were the likeliest.
    """

    likeliest: Tensor
    nll: Tensor
    right: Tensor


@dataclass(frozen=True)
class Heard:
    """What a speech model makes of each utterance.

    Attributes:
        errors: words left out, put in, or taken for others.
        nll: negative log-likelihood of what was said, in nats.
    """

    errors: Tensor
    nll: Tensor


def next_tokens(model: Path, dense: Path, text: Path) -> dict[str, Any]:
    """Compare what two language models predict; intervals are drawn over the windows."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(dense)(text.read_text(encoding="utf-8"))["input_ids"])
    windows = ids[: len(ids) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
    ours, theirs = predicted(model, windows), predicted(dense, windows)
    same = (ours.likeliest == theirs.likeliest).double().mean(1)
    columns = {
        "model": ours.right, "dense": theirs.right, "same": same, "rise": ours.nll - theirs.nll, "all": torch.ones(len(same))
    }  # fmt: skip
    sums = bootstrap(columns, np.random.default_rng(0))
    return {
        "accuracy": {"dense": theirs.right.mean().item(), "model": ours.right.mean().item()},
        "perplexity": {"dense": math.exp(theirs.nll.mean()), "model": math.exp(ours.nll.mean())},
        "retained": sums.interval(lambda s: s["model"] / s["dense"]).as_json(),
        "excess": sums.interval(lambda s: s["rise"] / s["all"]).as_json(),
        "same": sums.interval(lambda s: s["same"] / s["all"]).as_json(),
        "tokens": windows[:, 1:].numel(),
    }


@torch.no_grad()
def predicted(folder: Path, windows: Tensor) -> Predicted:
    """Run a model over windows of tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    parts = []
    for ids in windows.split(AT_ONCE):
        log_p = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        likeliest = log_p.argmax(-1)
        nll = -log_p.gather(2, ids[:, 1:, None])[..., 0].double()
        parts.append((likeliest, nll.mean(1), (likeliest == ids[:, 1:]).double().mean(1)))
    return Predicted(*(torch.cat(part) for part in zip(*parts, strict=True)))


def written_words(model: Path, dense: Path, speech: Path) -> dict[str, Any]:
    """Compare what two speech models write down; intervals are drawn over the utterances.

    Args:
        model: folder of the one that is judged.
        dense: folder of the original, with its processor.
        speech: folder of sound files with a `metadata.jsonl`.
    """
    features, texts = heard(speech, AutoProcessor.from_pretrained(dense))
    tokenizer = AutoTokenizer.from_pretrained(dense)
    ours, theirs = (heard_by(folder, tokenizer, features, texts) for folder in (model, dense))
    words = torch.tensor([len(text.split()) for text in texts], dtype=torch.float64)
    columns = {"model": ours.errors, "dense": theirs.errors, "words": words, "rise": ours.nll - theirs.nll}
    sums = bootstrap(columns, np.random.default_rng(0))
    rates = {name: (columns[name].sum() / words.sum()).item() for name in ("dense", "model")}
    points = sums.interval(lambda s: 100 * (s["model"] - s["dense"]) / s["words"])
    excess = sums.interval(lambda s: s["rise"] / s["words"]).as_json()
    return {"word_error_rate": rates, "points": points.as_json(), "excess": excess, "words": int(words.sum())}


def heard(speech: Path, processor: Any) -> tuple[Tensor, list[str]]:
    """Return the log-mel features of all sounds of a folder, and what was said."""
    rows = [json.loads(line) for line in (speech / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    features = [processor(sound, sampling_rate=RATE, return_tensors="pt") for sound in _sounds(speech, rows)]
    return torch.cat([one.input_features for one in features]), [row["text"] for row in rows]


def _sounds(speech: Path, rows: Sequence[Mapping[str, str]]) -> Iterator[np.ndarray]:
    for row in rows:
        with wave.open(str(speech / row["file_name"])) as file:
            yield np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16) / 32768


@torch.no_grad()
def heard_by(folder: Path, tokenizer: Any, features: Tensor, texts: Sequence[str]) -> Heard:
    """Let a model write down what it hears, greedily, and ask it how likely what was said is."""
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    said = tokenizer(list(texts), padding=True, return_tensors="pt")
    written: list[str] = []
    nll: list[Tensor] = []
    for part, ids, mask in zip(*(x.split(64) for x in (features, said.input_ids, said.attention_mask)), strict=True):
        chosen = model.generate(input_features=part, max_new_tokens=LONGEST)
        written += tokenizer.batch_decode(chosen, skip_special_tokens=True)
        log_p = model(input_features=part, decoder_input_ids=ids[:, :-1]).logits.float().log_softmax(-1)
        nll.append(-(log_p.gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]).double().sum(1))
    return Heard(errors(written, texts), torch.cat(nll))


def errors(written: Sequence[str], said: Sequence[str]) -> Tensor:
    """Return how many words of each utterance were left out, put in, or taken for others."""
    found = [jiwer.process_words(text, ours) for text, ours in zip(said, written, strict=True)]
    return torch.tensor([one.substitutions + one.deletions + one.insertions for one in found], dtype=torch.float64)
