"""Engines that tell how words and pseudo-words are pronounced; each is its own configuration.

A new engine is one frozen dataclass with `__call__` and `known`, added to `Pronouncer` at the end of the file.
"""

import re
import shutil
import sqlite3
import subprocess
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pydantic import with_config

from lillama.errors import ProbeError
from lillama.probing.stimuli.language import LanguageName
from lillama.probing.stimuli.ngrams import Segments

IPA_VOWELS = frozenset("aɑɐɒæeɛəɘɜɝɚɞiɪɨɯɤoɔɵøœɶuʊʉʌyʏ")  # noqa: RUF001
NO_SEGMENT = re.compile(r"\(\w+\)|[ˈˌː.\d]")


@with_config(extra="forbid")
@dataclass(frozen=True)
class Gruut:
    """Pronunciation lexicons and a model for all other words (gruut, MIT licence; extra `phonemes`).

    Attributes:
        language: of the words.
    """

    language: LanguageName
    name: Literal["gruut"] = "gruut"

    def __call__(self, words: Sequence[str]) -> list[Segments]:
        """Return the phonemes of each word, in IPA, without stress."""
        lexicon, guess = self._engine
        return [_plain(lexicon[word].split() if word in lexicon else guess(word)) for word in words]

    def known(self, words: Sequence[str]) -> set[str]:
        """Return those words that the lexicon holds: they are no pseudo-words."""
        return set(words) & self._engine[0].keys()

    @cached_property
    def _engine(self) -> tuple[Mapping[str, str], Callable[[str], Sequence[str]]]:
        """The lexicon, first pronunciations last so that they stay, and the model; gruut itself scans it for each word."""
        try:
            from gruut.g2p import GraphemesToPhonemes  # pyright: ignore[reportMissingImports]
            from gruut.utils import find_lang_dir  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ProbeError("phonemes by gruut need the extra `phonemes`: pip install 'lillama[phonemes]'") from error
        folder = find_lang_dir({"en": "en-us", "fr": "fr-fr"}[self.language])
        if folder is None:
            raise ProbeError(f"gruut has no data for {self.language}: pip install 'lillama[phonemes]'")
        with closing(sqlite3.connect(folder / "lexicon.db")) as lexicon:
            rows = lexicon.execute("SELECT word, phonemes FROM word_phonemes ORDER BY pron_order DESC").fetchall()
        return dict(rows), GraphemesToPhonemes(folder / "g2p" / "model.crf")


@with_config(extra="forbid")
@dataclass(frozen=True)
class Espeak:
    """The program espeak-ng, called where it is installed; lillama does not contain it.

    Attributes:
        language: of the words.
    """

    language: LanguageName
    name: Literal["espeak"] = "espeak"

    def __call__(self, words: Sequence[str]) -> list[Segments]:
        """Return the phonemes of each word, in IPA, without stress."""
        program = shutil.which("espeak-ng")
        if program is None:
            raise ProbeError("phonemes by espeak need the program espeak-ng: install it, or take --phonemes gruut")
        command = [program, "-q", "--ipa", "--sep= ", "-v", self.language]
        lines = "".join(f"{word}\n" for word in words)
        done = subprocess.run(command, input=lines, capture_output=True, text=True, encoding="utf-8", check=False)
        spoken = done.stdout.splitlines()
        if done.returncode or len(spoken) != len(words):
            said = done.stderr.strip() or f"{len(spoken)} pronunciations of {len(words)} words"
            raise ProbeError(f"espeak-ng failed: {said}")
        return [_plain(line.split()) for line in spoken]

    def known(self, words: Sequence[str]) -> set[str]:
        """Return nothing: espeak-ng does not tell words from pseudo-words."""
        return set()


Pronouncer = Gruut | Espeak


def pattern(phonemes: Segments) -> str:
    """Return consonants and vowels of a pronunciation.

    >>> pattern(("ʃ", "iː", "p"))
    'CVC'
    """
    return "".join("V" if set(unicodedata.normalize("NFD", phoneme)) & IPA_VOWELS else "C" for phoneme in phonemes)


def change_sound(first: Segments, second: Segments) -> int:
    """Return how many phonemes differ between two pronunciations of the same length."""
    return sum(ours != theirs for ours, theirs in zip(first, second, strict=True))


def _plain(phonemes: Sequence[str]) -> Segments:
    """Return phonemes without marks of stress, length, syllables and tongue (`(en)`)."""
    return tuple(plain for phoneme in phonemes if (plain := NO_SEGMENT.sub("", phoneme)))
