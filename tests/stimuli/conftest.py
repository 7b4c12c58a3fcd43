"""The languages that come with lillama, and sets of each."""

import pytest

from lillama.probing.stimuli.language import LANGUAGES, Language, load_language
from lillama.probing.stimuli.sets import StimuliSet, built_in_vocabulary, lexical_set, syntactic_set


@pytest.fixture(scope="session", params=LANGUAGES)
def language(request) -> Language:
    return load_language(request.param)


@pytest.fixture(scope="session")
def words(language) -> StimuliSet:
    """The set that comes with lillama, made anew."""
    return lexical_set(language, built_in_vocabulary(language), "test", pairs=1200, seed=0)


@pytest.fixture(scope="session")
def sentences(language) -> StimuliSet:
    return syntactic_set(language, None, "test", pairs=600, seed=1)
