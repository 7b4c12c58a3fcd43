"""What a language brings: letters, word lists with their forms, and sentence templates, each with its mirror image."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, TypeAdapter, with_config

from lillama.errors import ProbeError, suggestion
from lillama.files.packaged import package_folder
from lillama.files.yaml_text import read_yaml

LanguageName = Literal["en", "fr"]
LANGUAGES: tuple[LanguageName, ...] = get_args(LanguageName)
Replacement = tuple[str, str]
Slots = Mapping[str, Annotated[tuple[str, ...], Field(min_length=1)]]


@with_config(extra="forbid")
@dataclass(frozen=True)
class WordList:
    """Words of one kind.

    Attributes:
        words: one entry each; with `forms`, its forms in that order with spaces between.
        forms: names of the forms; none means that an entry, spaces and all, has one form.
        also: forms that all words share, such as the article that their gender asks for.
    """

    words: Annotated[tuple[str, ...], Field(min_length=1)]
    forms: tuple[str, ...] = ()
    also: Mapping[str, str] = field(default_factory=dict)

    def entries(self) -> tuple[Mapping[str, str], ...]:
        """Return each word as form -> text; the form of an entry without forms is named ''."""
        if not self.forms:
            return tuple({"": word, **self.also} for word in self.words)
        return tuple(dict(zip(self.forms, word.split(), strict=True)) | dict(self.also) for word in self.words)


@with_config(extra="forbid")
@dataclass(frozen=True)
class Mirror:
    """Two minimal pairs that no model of words and pairs of words can tell apart.

    What distinguishes right from wrong in `first` distinguishes wrong from right in `second`, between the same two
    neighbours: whatever log-probability a bigram model gains on the one it loses on the other.

    Attributes:
        slots: name -> the word lists that may fill it.
        first: right and wrong sentence; `{slot}` or `{slot.form}` is replaced.
        second: right and wrong sentence.
    """

    slots: Slots
    first: Replacement
    second: Replacement


@with_config(extra="forbid")
@dataclass(frozen=True)
class Language:
    """All that is known of a language.

    Attributes:
        name: its code.
        title: its name in English.
        vowels: letters that are vowels.
        consonants: letters that are consonants.
        graphemes: letters that together write one sound.
        rules: regular expressions and replacements that finish a sentence, such as elision.
        lists: word lists by name.
        phenomena: phenomenon -> subtype -> template.
    """

    name: LanguageName
    title: str
    vowels: str
    consonants: str
    graphemes: tuple[str, ...]
    rules: tuple[Replacement, ...]
    lists: Mapping[str, WordList]
    phenomena: Mapping[str, Mapping[str, Mirror]]


@cache
def load_language(name: str) -> Language:
    """Read what comes with lillama for a language.

    Raises:
        ProbeError: nothing comes with it.

    Examples:
        >>> sorted(load_language("fr").phenomena)[:2]
        ['adj_noun_order', 'anaphor_gender_agreement']
    """
    if name not in LANGUAGES:
        raise ProbeError(f"language {name}: choose one of {', '.join(LANGUAGES)}{suggestion(name, LANGUAGES)}")
    tree = read_yaml(language_folder() / f"{name}.yaml", ProbeError)
    return TypeAdapter(Language).validate_python(tree)


def language_folder() -> Path:
    """Return the folder of the languages' files."""
    return package_folder("probing/stimuli/languages")
