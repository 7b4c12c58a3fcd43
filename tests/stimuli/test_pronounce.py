"""What engines say is plain segments; a missing one names the remedy."""

import shutil
import sys

import pytest

from lillama.errors import ProbeError
from lillama.probing.stimuli.pronounce import Espeak, Gruut, pattern


def test_gruut_knows_words_and_guesses_the_rest():
    pytest.importorskip("gruut")
    engine = Gruut("fr")
    assert engine(["lapin", "choulon"]) == [("l", "a", "p", "ɛ̃"), ("ʃ", "u", "l", "ɔ̃")]
    assert engine.known(["lapin", "choulon"]) == {"lapin"}


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_espeak_speaks_each_word():
    assert Espeak("en")(["flimp", "wugger"])[0] == ("f", "l", "ɪ", "m", "p")  # noqa: RUF001
    assert Espeak("en").known(["flimp"]) == set()


def test_missing_engines(monkeypatch):
    monkeypatch.setitem(sys.modules, "gruut.g2p", None)
    with pytest.raises(ProbeError, match="need the extra `phonemes`"):
        Gruut("en")(["word"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ProbeError, match="need the program espeak-ng"):
        Espeak("en")(["word"])


def test_patterns_of_pronunciations():
    assert pattern(("ʃ", "u", "l", "ɔ̃")) == "CVCV"
    assert pattern(("t͡ʃ", "aɪ", "l", "d")) == "CVCC"  # noqa: RUF001
