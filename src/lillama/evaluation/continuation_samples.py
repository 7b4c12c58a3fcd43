"""A few of the continuations as text, for a reader to see what the figures stand for."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import TypedDict

from lillama.evaluation.windows import spread

SAMPLES = 4  # of each text


class SampleJson(TypedDict):
    """What two models write after one prompt, in JSON."""

    prompt: str
    same: str
    dense: str
    model: str


@dataclass(frozen=True)
class Sample:
    """What two models write after one prompt.

    Attributes:
        prompt: cut from the text.
        same: what both write, up to the first token where they part.
        dense: how the dense model goes on from there; empty where the two never part.
        model: how the model does.
    """

    prompt: str
    same: str
    dense: str
    model: str

    def as_json(self) -> SampleJson:
        """Return the value for JSON."""
        return {"prompt": self.prompt, "same": self.same, "dense": self.dense, "model": self.model}


def samples(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Int[Tensor, "prompts length"],
    model: Int[Tensor, "prompts new"],
    dense: Int[Tensor, "prompts new"],
    most: int = SAMPLES,
) -> tuple[Sample, ...]:
    """Return at most `most` prompts with both continuations, spread evenly over the prompts."""
    rows = spread(len(prompts), most)
    parts = (ids[rows].tolist() for ids in (prompts, model, dense))
    return tuple(_sample(tokenizer, *ids) for ids in zip(*parts, strict=True))


def _sample(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], model: Sequence[int], dense: Sequence[int]
) -> Sample:
    """Decode each text as a whole: a letter can be cut between two tokens, and a space can belong to the next one."""
    parted = next((place for place, (a, b) in enumerate(zip(model, dense, strict=True)) if a != b), len(model))
    texts = [prompt, [*prompt, *model[:parted]], [*prompt, *dense], [*prompt, *model]]
    asked, both, theirs, ours = (str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in texts)
    start, end = (_common_part(text, theirs, ours) for text in (asked, both))
    return Sample(ours[:start], ours[start:end], theirs[end:], ours[end:])


def _common_part(*texts: str) -> int:
    """Return how many letters all texts begin with.

    >>> _common_part("other", "others", "otter")
    2
    """
    return sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False)))
