"""Perplexity and bits per byte of a text, computed block by block: the model is never in memory as a whole."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lillama.calibration.documents import read_text
from lillama.calibration.gather import load_tokenizer
from lillama.errors import CalibrationError, ModelError
from lillama.model.source import locate, refuse_too_long
from lillama.progress import Progress, Report, silent
from lillama.resources import pick_device, shortage_explained
from lillama.stream.calls import CallTable
from lillama.stream.store import ActivationStore, Shelf
from lillama.stream.streamed import StreamedModel, advance, begin, finish, open_streamed, row_slices

LONGEST = 2048
LOGIT_BYTES = 256 << 20
TOKENS_AT_ONCE = 4096


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

    @property
    def perplexity(self) -> float:
        """`exp(nll)`."""
        return math.exp(min(self.nll, 700.0))


@dataclass(frozen=True)
class Windows:
    """A text as consecutive windows of equal length.

    Attributes:
        name: of the text.
        ids: the windows; tokens after the last whole one are left out.
        tokens_per_byte: of the whole text.
    """

    name: str
    ids: Int[Tensor, "windows length"]
    tokens_per_byte: float


def default_length(model: StreamedModel) -> int:
    """Return the model's longest context, at most 2048 tokens."""
    longest = getattr(model.skeleton.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    return min(longest, LONGEST)


def cut(name: str, text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Windows:
    """Tokenise a text without special tokens and cut it into windows; a shorter text is one window.

    Raises:
        CalibrationError: windows or text have fewer than two tokens.
    """
    if length < 2:
        raise CalibrationError(f"seq_len is {length}; windows of at least two tokens are needed to measure perplexity")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise CalibrationError(f"{name}: {len(ids)} tokens; a text of at least two is needed to measure perplexity")
    length = min(length, len(ids))
    whole = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return Windows(name, whole, len(ids) / len(text.encode()))


def score_texts(model: StreamedModel, texts: Mapping[str, Windows], shelf: Shelf, report: Report) -> list[TextScore]:
    """Score texts with one pass over the model's blocks.

    In each window every token but the first is predicted from those before it in the window, the usual protocol of
    compression papers (GPTQ, arXiv 2210.17323). Bits per byte are the same sum over the bytes that these tokens stand for.

    Args:
        model: to be measured.
        texts: name -> windows; names are used for files.
        shelf: where activations go.
        report: told about every block.
    """
    width = model.skeleton.config.get_text_config().hidden_size
    sizes = [windows.ids.numel() * width * model.dtype.itemsize for windows in texts.values()]
    place = shelf.place(sum(sizes))
    total = sum(windows.ids.numel() for windows in texts.values())
    hidden, calls = {}, {}
    try:
        for index, (name, windows) in enumerate(texts.items()):
            hidden[name] = ActivationStore((*windows.ids.shape, width), model.dtype, shelf, place, f"text-{index}")
            calls[name] = begin(model, windows.ids, None, hidden[name], _rows(windows, TOKENS_AT_ONCE))
        for index in range(len(model.blocks)):
            report(Progress("perplexity", index, len(model.blocks), model.stack, index * total))
            block = model.block(index)
            for name, windows in texts.items():
                advance(block, index, calls[name], hidden[name], hidden[name], _rows(windows, TOKENS_AT_ONCE))
        outside = model.outside(head=True)
        scores = [_score(model, outside, calls[name], windows, hidden[name]) for name, windows in texts.items()]
        report(Progress("perplexity", len(model.blocks), len(model.blocks), model.stack, len(model.blocks) * total))
        return scores
    finally:
        for store in hidden.values():
            store.remove()


@torch.no_grad()
def _score(
    model: StreamedModel, outside: PreTrainedModel, calls: CallTable, windows: Windows, hidden: ActivationStore
) -> TextScore:
    """Turn the last block's outputs into the likelihood of every window's tokens after the first."""
    vocabulary = model.skeleton.config.get_text_config().vocab_size
    at_once = max(1, LOGIT_BYTES // (4 * vocabulary * windows.ids.shape[1]))
    total = torch.zeros((), dtype=torch.float64)
    for rows in row_slices(len(windows.ids), at_once):
        logits = finish(model, outside, calls, windows.ids[rows], None, hidden.read(rows))
        wanted = windows.ids[rows, 1:].to(logits.device)
        losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), wanted.flatten(), reduction="sum")
        total += losses.double().cpu()
    tokens = windows.ids[:, 1:].numel()
    nll = total.item() / tokens
    if not math.isfinite(nll):
        raise ModelError(f"{windows.name}: the model's logits are not finite on this text; try another --device")
    return TextScore(windows.name, tokens, nll, nll / math.log(2) * windows.tokens_per_byte)


def _rows(windows: Windows, tokens: int) -> int:
    return max(1, tokens // windows.ids.shape[1])


def perplexity(
    model: str | Path,
    texts: str | Path | Sequence[str | Path],
    *,
    seq_len: int | None = None,
    device: str | None = None,
    activation_memory: int | None = None,
    report: Report = silent,
) -> list[TextScore]:
    """Measure perplexity and bits per byte of text files, with one block of the model in memory at a time.

    Args:
        model: folder or hub id, dense or compressed by lillama.
        texts: text files, UTF-8.
        seq_len: tokens of a window; by default the model's longest context, at most 2048.
        device: that computes; by default an accelerator if there is one.
        activation_memory: bytes that activations may take in memory before they go to disk; by default a quarter of what
            is free.
        report: told about every block.

    Raises:
        LillamaError: the model or a text cannot be used.

    Examples:
        >>> for score in perplexity("demo/model", ["demo/text.txt"], seq_len=64, device="cpu"):
        ...     print(score.name, score.tokens > 0, 1 < score.perplexity < 1000)
        text True True
    """
    with shortage_explained(), TemporaryDirectory(prefix="lillama-") as folder:
        chosen = pick_device(device)
        path = locate(model)
        tokenizer = load_tokenizer(path)
        contents = {name: read_text(file) for name, file in named(texts).items()}
        streamed = open_streamed(path, chosen)
        length = default_length(streamed) if seq_len is None else seq_len
        refuse_too_long(length, streamed.skeleton.config)
        windows = {name: cut(name, text, tokenizer, length) for name, text in contents.items()}
        return score_texts(streamed, windows, Shelf.on(chosen, Path(folder), activation_memory), report)


def named(texts: str | Path | Sequence[str | Path]) -> dict[str, Path]:
    """Return name -> path of text files; the name is the file's, or the whole path where two files share one."""
    paths = [Path(text) for text in ([texts] if isinstance(texts, str | Path) else texts)]
    stems = [path.name.split(".txt")[0] for path in paths]
    return {stem if stems.count(stem) == 1 else str(path): path for stem, path in zip(stems, paths, strict=True)}
