"""Texts as windows: what perplexity and agreement are measured on."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lillama.errors import DataError
from lillama.model.tokenizer import encode_text
from lillama.stream.model import StreamedModel

LONGEST = 2048
LABEL = re.compile(r"([A-Za-z][\w-]*)=(.+)", re.DOTALL)

Texts = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Windows:
    """A text as consecutive windows of equal length.

    Attributes:
        name: of the text.
        ids: the windows; tokens after the last whole one are left out.
        tokens_per_byte: of the whole text.
        stride: from the beginning of a window to that of the next; None: the windows' length, so that none overlap.
    """

    name: str
    ids: Int[Tensor, "windows length"]
    tokens_per_byte: float
    stride: int | None = None

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return int(self.predicted(slice(None)).sum())

    def predicted(self, rows: slice) -> Bool[Tensor, "windows predictions"]:
        """Return which tokens after the first of each window are predicted.

        In the text's first window all are. A later one predicts the last `stride`: those before them were predicted in the
        windows before it, and only stand there as context.
        """
        count, length = self.ids.shape
        later = torch.arange(count)[rows, None] > 0
        return ~later | (torch.arange(1, length) >= length - (self.stride or length))


def default_length(model: StreamedModel) -> int:
    """Return the model's longest context, at most 2048 tokens."""
    return min(model.kind.max_positions or LONGEST, LONGEST)


def cut_windows(
    name: str,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    stride: int | None = None,
    most: int | None = None,
    embeddings: int | None = None,
) -> Windows:
    """Tokenise a text without special tokens and cut it into windows; a shorter text is one window.

    Args:
        name: of the text.
        text: to be cut.
        tokenizer: of the model.
        length: tokens of a window.
        stride: from window to window; by default `length`.
        most: keep so many windows, spread evenly over the text; by default all.
        embeddings: tokens that the model has embeddings for; None knows no bound.

    Raises:
        DataError: windows or text have fewer than two tokens, or the stride leaves tokens out.
    """
    if length < 2:
        raise DataError(f"seq_len is {length}; windows of at least two tokens are needed to measure perplexity")
    if stride is not None and not 1 <= stride <= length:
        raise DataError(f"stride is {stride}; it must lie between 1 and the window's {length} tokens")
    if most is not None and most < 1:
        raise DataError(f"windows is {most}; at least one is needed")
    (ids,) = encode_text(tokenizer, [text], embeddings, name, add_special_tokens=False)["input_ids"]
    if len(ids) < 2:
        raise DataError(f"{name}: {len(ids)} tokens; a text of at least two is needed to measure perplexity")
    length = min(length, len(ids))
    step = min(stride or length, length)
    windows = torch.tensor(ids).unfold(0, length, step)
    return Windows(name, windows[spread(len(windows), most)], len(ids) / len(text.encode()), step)


def spread(total: int, most: int | None) -> Int[Tensor, " chosen"]:
    """Return at most `most` indices below `total`, evenly spread; the first is 0.

    >>> spread(10, 4).tolist()
    [0, 2, 5, 7]
    """
    count = min(total, total if most is None else most)
    return torch.arange(count) * total // max(count, 1)


def name_texts(texts: Texts) -> dict[str, Path]:
    """Return name -> path of text files; the name is the file's, or the whole path where two files share one."""
    paths = [path for _, path in label_texts(texts)]
    stems = [path.name.split(".txt")[0] for path in paths]
    return {stem if stems.count(stem) == 1 else str(path): path for stem, path in zip(stems, paths, strict=True)}


def label_texts(texts: Texts) -> list[tuple[str | None, Path]]:
    """Part `language=path` into both; a path without a label, or a file whose name has one in it, has no language.

    >>> [language for language, _ in label_texts(["fra=livre.txt", "novel.txt"])]
    ['fra', None]
    """
    found: list[tuple[str | None, Path]] = []
    for text in [texts] if isinstance(texts, str | Path) else texts:
        parts = None if _is_there(text) else LABEL.fullmatch(str(text))
        found.append((parts[1], Path(parts[2])) if parts else (None, Path(text)))
    return found


def _is_there(text: str | Path) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # too long for a name, or in a folder that may not be looked at: `read_text` tells
        return False


def languages(texts: Texts) -> dict[str, list[str]]:
    """Return language -> names of its texts, in order; texts without a language are in none."""
    names = {path: name for name, path in name_texts(texts).items()}
    found: dict[str, list[str]] = {}
    for language, path in dict.fromkeys(label_texts(texts)):
        if language is not None:
            found.setdefault(language, []).append(names[path])
    return found
