"""Perplexity and bits per byte of a text, computed block by block: the model is never in memory as a whole."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from typing_extensions import TypedDict

from lillama.corpus.texts import read_text
from lillama.evaluation.tally import log_probs, tallies
from lillama.evaluation.windows import Texts, Windows, cut_windows, default_length, name_texts
from lillama.files.artefacts import Positive
from lillama.model.kind import refuse_too_long
from lillama.model.remote import remote_code
from lillama.model.source import locate
from lillama.model.tokenizer import embeddings_of, load_tokenizer
from lillama.stream.activations import ActivationPlacement
from lillama.stream.model import StreamedModel, open_streamed
from lillama.system.progress import Report, silent
from lillama.system.resources import explain_shortage, pick_device


class ScoreJson(TypedDict):
    """How well a text is predicted, in JSON."""

    name: str
    tokens: int
    perplexity: Positive
    bits_per_byte: float


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts one text.

    Attributes:
        name: of the text.
        tokens: tokens predicted.
        nll: mean negative log-likelihood of a token, in nats.
        bits_per_byte: the same in bits, for each UTF-8 byte of the text instead of each token.

    Examples:
        >>> round(TextScore("novel", tokens=1000, nll=3.0, bits_per_byte=1.1).perplexity, 2)
        20.09
    """

    name: str
    tokens: int
    nll: float
    bits_per_byte: float

    @classmethod
    def of(cls, name: str, tokens: float, nll: float, size: float) -> "TextScore":
        """Return the score of `tokens` tokens that stand for `size` bytes, from the sum of their losses in nats."""
        return cls(name, round(tokens), nll / tokens, nll / math.log(2) / size)

    @property
    def perplexity(self) -> float:
        """`exp(nll)`."""
        return math.exp(min(self.nll, 700.0))

    def as_json(self) -> ScoreJson:
        """Return the score as `lillama evaluate --json` prints it."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


def pool_scores(name: str, scores: Sequence[TextScore]) -> TextScore:
    """Return the score of several texts as one: every token weighs the same, and so does every byte."""
    tokens = sum(score.tokens for score in scores)
    nll = sum(score.nll * score.tokens for score in scores)
    size = sum(score.nll * score.tokens / math.log(2) / score.bits_per_byte for score in scores)
    return TextScore.of(name, tokens, nll, size)


def score_texts(
    model: StreamedModel, texts: Mapping[str, Windows], placement: ActivationPlacement, report: Report
) -> list[TextScore]:
    """Score texts with one pass over the model's blocks.

    In each window every token but the first is predicted from those before it in the window, the usual protocol of
    compression papers (GPTQ, arXiv 2210.17323); where windows overlap, each token is predicted once. Bits per byte are the
    same sum over the bytes that these tokens stand for.

    Args:
        model: to be measured.
        texts: name -> windows.
        placement: where activations go.
        report: told about every block.
    """
    vocabulary = model.skeleton.config.get_text_config().vocab_size
    scores = []
    with log_probs(model, texts, placement, report) as read:
        for name, windows in texts.items():
            sums = tallies(read, windows, vocabulary)
            tokens, nll = sums.tokens.sum().item(), sums.nll.sum().item()
            scores.append(TextScore.of(name, tokens, nll, tokens / windows.tokens_per_byte))
    return scores


def perplexity(
    model: str | Path,
    texts: Texts,
    *,
    seq_len: int | None = None,
    stride: int | None = None,
    windows: int | None = None,
    device: str | None = None,
    activation_memory: int | None = None,
    report: Report = silent,
    trust_remote_code: bool = False,
) -> list[TextScore]:
    """Measure perplexity and bits per byte of text files, with one block of the model in memory at a time.

    Args:
        model: folder or hub id, dense or compressed by lillama.
        texts: text files, UTF-8.
        seq_len: tokens of a window; by default the model's longest context, at most 2048.
        stride: tokens from the beginning of a window to that of the next; by default `seq_len`, so that none overlap. A
            smaller one gives every token more context, and takes `seq_len / stride` times as long.
        windows: at most so many of each text, evenly spread; by default all.
        device: that computes; by default an accelerator if there is one.
        activation_memory: bytes that activations may take in memory before they go to disk; by default a quarter of what
            is free.
        report: told about every block.
        trust_remote_code: whether code that lies in the model's folder (`auto_map`) may run, as in transformers.

    Raises:
        LillamaError: the model or a text cannot be used.

    Examples:
        >>> for score in perplexity("demo/model", ["demo/text.txt"], seq_len=64, device="cpu"):
        ...     print(score.name, score.tokens > 0, 1 < score.perplexity < 1000)
        text True True
    """
    with remote_code(trust_remote_code), explain_shortage(), TemporaryDirectory(prefix="lillama-") as folder:
        chosen = pick_device(device)
        path = locate(model)
        contents = {name: read_text(file) for name, file in name_texts(texts).items()}
        streamed = open_streamed(path, chosen)
        tokenizer = load_tokenizer(path)
        length = default_length(streamed) if seq_len is None else seq_len
        refuse_too_long(length, streamed.kind)
        known = embeddings_of(streamed.skeleton)
        pieces = {
            name: cut_windows(name, text, tokenizer, length, stride, windows, known) for name, text in contents.items()
        }
        return score_texts(streamed, pieces, ActivationPlacement.on(chosen, Path(folder), activation_memory), report)
