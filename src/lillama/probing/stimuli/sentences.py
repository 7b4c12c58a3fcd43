"""Sentences from templates: each right one beside a wrong one, each pair beside its mirror image."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lillama.probing.stimuli.language import Language, Mirror
from lillama.probing.stimuli.vocabulary import Vocabulary

BLANK = re.compile(r"\{(\w+)(?:\.(\w+))?\}")
TOKEN = re.compile(r"[\w-]+['’]?|[^\w\s]")  # noqa: RUF001
FEWEST = 3  # known words that a list needs for being cut down to them
TRIES = 30  # drawn for each sentence wanted, before a template counts as exhausted

Entry = Mapping[str, str]
Lists = Mapping[str, Sequence[Entry]]


@dataclass(frozen=True)
class SentencePair:
    """A right sentence and a wrong one.

    Attributes:
        type: the phenomenon.
        subtype: the template.
        right: the grammatical sentence.
        wrong: the ungrammatical one.
    """

    type: str
    subtype: str
    right: str
    wrong: str


def sentence_pairs(language: Language, lists: Lists, pairs: int, seed: int) -> list[SentencePair]:
    """Draw sentence pairs, always together with their mirror images, and equally many of each phenomenon.

    Args:
        language: its templates.
        lists: words for their slots, as `usable_lists` gives them.
        pairs: in all; rounded down to what can be shared out equally.
        seed: of the draws.
    """
    share = max(1, pairs // (2 * len(language.phenomena)))
    found: list[SentencePair] = []
    for phenomenon, templates in language.phenomena.items():
        for position, (subtype, template) in enumerate(templates.items()):
            wanted = share // len(templates) + (position < share % len(templates))
            chance = random.Random(f"{seed} {language.name} {phenomenon} {subtype}")
            for mirrored in _draw(language, template, lists, wanted, chance):
                found += [SentencePair(phenomenon, subtype, right, wrong) for right, wrong in mirrored]
    return found


def usable_lists(language: Language, vocabulary: Vocabulary | None) -> tuple[Lists, tuple[str, ...]]:
    """Return the words whose forms a vocabulary holds, and the names of lists that are left whole for want of such words."""
    every = {name: words.entries() for name, words in language.lists.items()}
    if vocabulary is None:
        return every, ()
    kept = {
        name: [entry for text, entry in zip(words.words, every[name], strict=True) if _is_known(text, vocabulary)]
        for name, words in language.lists.items()
    }
    whole = tuple(name for name, entries in kept.items() if len(entries) < FEWEST)
    return {name: every[name] if name in whole else kept[name] for name in every}, whole


def tokens(sentence: str) -> tuple[str, ...]:
    """Return the words and marks of a sentence in small letters, an elided word with its apostrophe.

    >>> tokens("L'oiseau ne dort pas.")
    ("l'", 'oiseau', 'ne', 'dort', 'pas', '.')
    """
    return tuple(TOKEN.findall(sentence.casefold()))


def _draw(
    language: Language, template: Mirror, lists: Lists, wanted: int, chance: random.Random
) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Yield `wanted` fillings of a template and its mirror image, or fewer where there are no more; no pair comes twice."""
    seen: set[str] = set()
    slots = {slot: [entry for name in names for entry in lists[name]] for slot, names in template.slots.items()}
    for _ in range(TRIES * wanted):
        if wanted == 0:
            return
        entries = {slot: chance.choice(choices) for slot, choices in slots.items()}
        first, second = (_write_pair(language, pair, entries) for pair in (template.first, template.second))
        if not seen & {*first, *second}:
            seen |= {*first, *second}
            wanted -= 1
            yield first, second


def _write_pair(language: Language, pair: tuple[str, str], entries: Mapping[str, Entry]) -> tuple[str, str]:
    """Return both sentences as they are written: blanks filled, spelling rules applied, a capital first."""
    right, wrong = (BLANK.sub(lambda blank: entries[blank[1]][blank[2] or ""], sentence) for sentence in pair)
    for pattern, replacement in language.rules:
        right, wrong = re.sub(pattern, replacement, right), re.sub(pattern, replacement, wrong)
    return right[0].upper() + right[1:], wrong[0].upper() + wrong[1:]


def _is_known(text: str, vocabulary: Vocabulary) -> bool:
    """Return whether a vocabulary counts all words of a text; marks and elided words such as `l'` pass."""
    return all(vocabulary.counts.get(token, 0) > 0 for token in tokens(text) if token[-1].isalpha())
