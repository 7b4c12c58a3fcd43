"""Words beside pseudo-words, chosen so that n-gram models of letters, or of phonemes, stay at chance."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import add

from lillama.errors import ProbeError
from lillama.probing.stimuli.language import Language
from lillama.probing.stimuli.ngrams import NGrams, Segments, count_ngrams
from lillama.probing.stimuli.pseudowords import phonotactics
from lillama.probing.stimuli.vocabulary import Vocabulary

PER_WORD = 4  # pseudo-words beside each word
SHORTEST = 4  # letters of a word; below, most strings are words
CANDIDATES = 200  # pseudo-words of a word that are looked at
SHORTLIST = 60  # of these, the nearest in transition probability, from which the balance chooses
FARTHEST = 1.5  # nats between word and pseudo-word, in log-probability of the transitions

Segmented = Callable[[str], Segments]


@dataclass(frozen=True)
class WordPair:
    """A word and a pseudo-word.

    Attributes:
        word: the real one.
        pseudo: the other.
        frequency: of the word in the vocabulary.
    """

    word: str
    pseudo: str
    frequency: int


@dataclass(frozen=True)
class LexicalScale:
    """One way to cut words into segments, and the n-gram models that must not tell words from pseudo-words.

    Attributes:
        name: letters or phonemes.
        segments: of a word.
        models: name -> model.
    """

    name: str
    segments: Segmented
    models: Mapping[str, NGrams]

    def signs(self, word: str, pseudo: str) -> tuple[int, ...]:
        """Return for each model 1 if it prefers the word, -1 if the pseudo-word, 0 for a tie."""
        pair = self.segments(word), self.segments(pseudo)
        values = (model.preference(*pair) for model in self.models.values())
        return tuple((value > 0) - (value < 0) for value in values)

    def distance(self, word: str, pseudo: str) -> float:
        """Return how far apart word and pseudo-word are in log-probability of their transitions, in nats."""
        return abs(self.models["bigram of words"].preference(self.segments(word), self.segments(pseudo)))


def scale(name: str, segments: Segmented, counts: Mapping[str, int]) -> LexicalScale:
    """Train the n-gram models of one way to cut words: on each word once, and on each as often as it occurs."""
    once: dict[Segments, float] = {}
    often: dict[Segments, float] = {}
    for word, number in counts.items():
        cut = segments(word)
        once[cut] = once.get(cut, 0) + 1
        often[cut] = often.get(cut, 0) + number
    models = {
        f"{kind} of {what}": count_ngrams(sequences, order)
        for what, sequences in (("words", once), ("running text", often))
        for order, kind in ((1, "unigram"), (2, "bigram"))
    }
    return LexicalScale(name, segments, models)


def word_pairs(
    language: Language,
    vocabulary: Vocabulary,
    scales: Sequence[LexicalScale],
    pairs: int,
    seed: int,
    fits: Callable[[str, Sequence[str]], Sequence[str]] = lambda word, pseudo: pseudo,
) -> list[WordPair]:
    """Choose words, frequent ones more often, and four pseudo-words for each.

    Each choice brings the balance of all n-gram models nearest to zero; among equals the pseudo-word nearest to its word
    in transition probability is taken.

    Args:
        language: letters and graphemes.
        vocabulary: words to choose from, and what is no pseudo-word.
        scales: what is balanced; the first also ranks the candidates.
        pairs: at most so many.
        seed: of the choice.
        fits: keeps of a word's pseudo-words those that may stand beside it.

    Raises:
        ProbeError: no word has enough pseudo-words.
    """
    rules = phonotactics(language, words_of(language, vocabulary.counts))
    totals = [0] * sum(len(scale.models) for scale in scales)
    used: set[str] = set()
    found: list[WordPair] = []
    chance = random.Random(f"{seed} {language.name}")
    for word in _shuffle(words_of(language, vocabulary.counts), vocabulary.counts, chance):
        if len(found) + PER_WORD > pairs:
            break
        candidates = _candidates(rules.neighbours(word, chance), vocabulary.known, used, scales[0], word)
        signs = {pseudo: _signs(scales, word, pseudo) for pseudo in fits(word, candidates)}
        if len(signs) >= PER_WORD:
            chosen = _balance(signs, totals)
            used |= set(chosen)
            found += [WordPair(word, pseudo, vocabulary.counts[word]) for pseudo in chosen]
    if not found:
        raise ProbeError(
            f"{vocabulary.source}: no word of at least {SHORTEST} letters has {PER_WORD} pseudo-words that sound like the "
            f"others; give a vocabulary of some hundred words, or ask for at least {PER_WORD} pairs"
        )
    return found


def words_of(language: Language, counts: Iterable[str]) -> list[str]:
    """Return the words that can stand in a set: the language's small letters alone, enough of them, one a vowel."""
    vowels, letters = set(language.vowels), set(language.vowels + language.consonants)
    return [word for word in counts if len(word) >= SHORTEST and vowels & set(word) and set(word) <= letters]


def _shuffle(words: Iterable[str], counts: Mapping[str, int], chance: random.Random) -> list[str]:
    """Return words in random order, large counts tending to come first (A-Res, Efraimidis and Spirakis 2006)."""
    keys = {word: chance.random() ** (1 / (1 + counts[word]) ** 0.5) for word in sorted(words)}
    return sorted(keys, key=lambda word: (-keys[word], word))


def _candidates(
    neighbours: Iterable[str], known: frozenset[str], used: set[str], first: LexicalScale, word: str
) -> list[str]:
    """Return a word's pseudo-words near it in transition probability, the nearest first."""
    free = islice((pseudo for pseudo in neighbours if pseudo not in known and pseudo not in used), CANDIDATES)
    near = sorted((first.distance(word, pseudo), pseudo) for pseudo in free)
    return [pseudo for distance, pseudo in near[:SHORTLIST] if distance <= FARTHEST]


def _signs(scales: Sequence[LexicalScale], word: str, pseudo: str) -> tuple[int, ...]:
    return tuple(sign for scale in scales for sign in scale.signs(word, pseudo))


def _balance(signs: Mapping[str, tuple[int, ...]], totals: list[int]) -> list[str]:
    """Take pseudo-words one after the other, nearest first among those that bring `totals` (changed) nearest to zero."""
    left = dict(signs)
    chosen: list[str] = []
    for _ in range(PER_WORD):
        best = min(left, key=lambda pseudo: sum(value**2 for value in map(add, totals, left[pseudo])))
        totals[:] = map(add, totals, left.pop(best))
        chosen.append(best)
    return chosen
