"""Strings that could be words: one or two letters of a word changed, the rest as it was."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from lillama.probing.stimuli.language import Language
from lillama.probing.stimuli.ngrams import EDGE

MOST_CHANGED = 2
RARE = 0.0005  # three letters in a row that a smaller share of the words has are no model for pseudo-words


@dataclass(frozen=True)
class Phonotactics:
    """Which letters follow which in the words of a language.

    Attributes:
        language: its vowels and graphemes.
        trigrams: every three letters in a row that enough words hold, edges included.

    Examples:
        >>> import random
        >>> from lillama.probing.stimuli.language import load_language
        >>> rules = phonotactics(load_language("en"), ["cat", "cot", "bat", "bit"])
        >>> sorted(rules.neighbours("cot", random.Random(0)))
        ['bat', 'bit', 'cat']
    """

    language: Language
    trigrams: frozenset[tuple[str, ...]]

    @cached_property
    def followers(self) -> Mapping[tuple[str, ...], tuple[str, ...]]:
        """Which letters may follow two letters, in alphabetical order."""
        found: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
        for first, second, third in sorted(self.trigrams):
            found[first, second].append(third)
        return {pair: tuple(letters) for pair, letters in found.items()}

    def pattern(self, word: str) -> str:
        """Return consonants and vowels of a word, grapheme by grapheme, with the letters of each: `sheep` is C2 V2 C1."""
        return " ".join(
            f"{'V' if grapheme[0] in self.language.vowels else 'C'}{len(grapheme)}" for grapheme in self.graphemes(word)
        )

    def graphemes(self, word: str) -> Iterator[str]:
        """Cut a word into graphemes, the longest first."""
        start = 0
        while start < len(word):
            sizes = [len(g) for g in self.language.graphemes if word.startswith(g, start)]
            size = max(sizes, default=1)
            yield word[start : start + size]
            start += size

    def neighbours(self, word: str, chance: random.Random) -> Iterator[str]:
        """Yield in random order what differs from a word in one or two letters and has its pattern and nothing unheard of."""
        pattern = self.pattern(word)
        grown = self._grown(word)
        chance.shuffle(grown)
        for letters, changed in grown:
            found = "".join(letters)
            if changed and (*letters[-2:], EDGE) in self.trigrams and self.pattern(found) == pattern:
                yield found

    def _grown(self, word: str) -> list[tuple[tuple[str, ...], int]]:
        """Return the letters of all candidates, with the number of those changed; their last two may lead nowhere."""
        grown: list[tuple[tuple[str, ...], int]] = [((EDGE, EDGE), 0)]
        for letter in word:
            vowel = letter in self.language.vowels
            grown = [
                ((*letters, other), changed + (other != letter))
                for letters, changed in grown
                for other in self.followers.get(letters[-2:], ())
                if changed + (other != letter) <= MOST_CHANGED
                and other != EDGE
                and (other in self.language.vowels) == vowel
            ]
        return grown


def phonotactics(language: Language, words: Iterable[str]) -> Phonotactics:
    """Learn from words which three letters stand in a row."""
    words = list(words)
    counts = Counter(
        trigram
        for word in words
        for trigram in set(zip((EDGE, EDGE, *word), (EDGE, *word, EDGE), (*word, EDGE), strict=False))
    )
    least = max(1.0, RARE * len(words))
    return Phonotactics(language, frozenset(trigram for trigram, number in counts.items() if number >= least))
