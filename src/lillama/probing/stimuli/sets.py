"""Sets of minimal pairs: their rows, and how far n-gram models get with them."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from lillama.probing.stimuli.language import LANGUAGES, Language, language_folder, load_language
from lillama.probing.stimuli.lexical import LexicalScale, scale, word_pairs, words_of
from lillama.probing.stimuli.ngrams import NGrams, Segments, count_ngrams
from lillama.probing.stimuli.pronounce import Pronouncer, change_sound, pattern
from lillama.probing.stimuli.pseudowords import MOST_CHANGED
from lillama.probing.stimuli.sentences import sentence_pairs, tokens, usable_lists
from lillama.probing.stimuli.vocabulary import Vocabulary, read_known, read_word_list

StimulusTask = Literal["lexical", "syntactic"]
SetRow = Mapping[str, str | int]
Control = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class StimuliSet:
    """Minimal pairs of one task and one language.

    Attributes:
        task: `lexical` or `syntactic`.
        language: code of the language.
        source: how the set was made.
        rows: one pair each, in the columns of the built-in benchmark of this name.
        control: part of the set -> n-gram model -> share of pairs it gets right; 0.5 is chance.
        whole: word lists that were used whole, since the vocabulary holds hardly any of their words.
    """

    task: StimulusTask
    language: str
    source: str
    rows: tuple[SetRow, ...]
    control: Control
    whole: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the set and of its files."""
        return f"{self.task}-{self.language}"


def built_in_vocabulary(language: Language) -> Vocabulary:
    """Return the words that come with lillama, with their counts in novels.

    Examples:
        >>> built_in_vocabulary(load_language("en")).counts["rabbit"] > 0
        True
    """
    return read_word_list(language_folder() / f"words-{language.name}.csv")


@cache
def real_words() -> frozenset[str]:
    """Return all that comes with lillama and is a word, in any of its languages."""
    languages = [load_language(name) for name in LANGUAGES]
    found = set(read_known(language_folder() / "real-words.txt"))
    for language in languages:
        found |= built_in_vocabulary(language).known
        found |= {form for words in language.lists.values() for entry in words.entries() for form in entry.values()}
    return frozenset(found)


def lexical_set(
    language: Language, vocabulary: Vocabulary, source: str, pairs: int, seed: int, pronouncer: Pronouncer | None = None
) -> StimuliSet:
    """Build words beside pseudo-words.

    Args:
        language: of the words.
        vocabulary: words to choose from, and what is no pseudo-word besides `real_words`.
        source: told with the set.
        pairs: at most so many.
        seed: of the choice.
        pronouncer: also matches and balances what is heard.

    Raises:
        ProbeError: the vocabulary has no word that four pseudo-words resemble.
    """
    counts = {word: vocabulary.counts[word] for word in words_of(language, vocabulary.counts)}
    vocabulary = vocabulary.with_known(real_words())
    letters = scale("letters", tuple, counts)
    if pronouncer is None:
        scales, found = [letters], word_pairs(language, vocabulary, [letters], pairs, seed)
        sounds: dict[str, Segments] = {}
    else:
        words = list(counts)
        sounds = dict(zip(words, pronouncer(words), strict=True))
        scales = [letters, scale("phonemes", sounds.__getitem__, counts)]
        found = word_pairs(language, vocabulary, scales, pairs, seed, _audible(pronouncer, sounds))
    rows = tuple(
        {
            "id": number,
            "word": pair.word,
            "non word": pair.pseudo,
            "length": len(sounds.get(pair.word, pair.word)),
            "frequency": pair.frequency,
        }
        | ({"phonemes": " ".join(sounds[pair.word]), "non phonemes": " ".join(sounds[pair.pseudo])} if sounds else {})
        for number, pair in enumerate(found, 1)
    )
    written = [(pair.word, pair.pseudo) for pair in found]
    return StimuliSet(
        "lexical", language.name, source, rows, {scale.name: _lexical_control(scale, written) for scale in scales}
    )


def syntactic_set(
    language: Language, vocabulary: Vocabulary | None, source: str, pairs: int, seed: int, texts: Iterable[str] = ()
) -> StimuliSet:
    """Build right sentences beside wrong ones, six phenomena.

    Args:
        language: its templates and word lists.
        vocabulary: only its words are used, list by list; None uses all.
        source: told with the set.
        pairs: at most so many; equally many of each phenomenon, and always together with their mirror images.
        seed: of the choice.
        texts: on which the control models are trained besides the set's own right sentences.
    """
    lists, whole = usable_lists(language, vocabulary)
    found = sentence_pairs(language, lists, pairs, seed)
    rows = tuple(
        {
            "id": number,
            "type": pair.type,
            "subtype": f"{pair.type}.{pair.subtype}",
            "sentence": pair.right,
            "non sentence": pair.wrong,
        }
        for number, pair in enumerate(found, 1)
    )
    cut = {pair: (tokens(pair.right), tokens(pair.wrong)) for pair in found}
    models = _word_models("set", Counter(right for right, _ in cut.values()))
    text = Counter(tokens(text) for text in texts)
    models |= _word_models("text", text) if text else {}
    parts = {name: [words for pair, words in cut.items() if pair.type == name] for name in language.phenomena}
    control = {name: {kind: model.accuracy(pairs) for kind, model in models.items()} for name, pairs in parts.items()}
    return StimuliSet("syntactic", language.name, source, rows, control, whole)


def _audible(pronouncer: Pronouncer, sounds: dict[str, Segments]) -> Callable[[str, Sequence[str]], Sequence[str]]:
    """Return what keeps the pseudo-words that sound as alike as they look, and like no word; fills `sounds`."""
    heard = frozenset(sounds.values())

    def fits(word: str, candidates: Sequence[str]) -> Sequence[str]:
        known = pronouncer.known(candidates)
        unknown = [pseudo for pseudo in candidates if pseudo not in known]
        sounds.update(zip(unknown, pronouncer(unknown), strict=True))
        return [
            pseudo
            for pseudo in unknown
            if sounds[pseudo] not in heard
            and pattern(sounds[pseudo]) == pattern(sounds[word])
            and change_sound(sounds[pseudo], sounds[word]) <= MOST_CHANGED
        ]

    return fits


def _lexical_control(scale: LexicalScale, pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    cut = [(scale.segments(word), scale.segments(pseudo)) for word, pseudo in pairs]
    return {name: model.accuracy(cut) for name, model in scale.models.items()}


def _word_models(name: str, sentences: Mapping[Segments, float]) -> dict[str, NGrams]:
    return {f"{kind} of {name}": count_ngrams(sentences, order) for order, kind in ((1, "unigram"), (2, "bigram"))}
