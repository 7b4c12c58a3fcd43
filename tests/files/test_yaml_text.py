"""YAML of others: within bounds, in one line when it is wrong, and like PyYAML when it is right."""

from datetime import date
from typing import Any

import pytest
import yaml

from lillama.errors import ModelError, RecipeError
from lillama.files.yaml_text import LONGEST, load_yaml, read_yaml, refuse_unbounded

SOUND: dict[str, Any] = {
    "": None,
    "# nothing\n": None,
    "a: [1, 2.5, x, null, true]": {"a": [1, 2.5, "x", None, True]},
    "a: 1e-3\nb: 2E5": {"a": 1e-3, "b": 2e5},
    "a: &x {b: 1}\nc: *x\nd:\n  <<: *x\n  e: 2": {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}},
    "a: 2024-01-01": {"a": date(2024, 1, 1)},
    "a: |\n  two\n  lines": {"a": "two\nlines"},
    "a: " + "[" * 40 + "]" * 40: {"a": eval("[" * 40 + "]" * 40)},
}

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12)
)
MERGES = "a0: &a0 {k0: 1, k1: 1, k2: 1}\n" + "".join(
    f"a{i + 1}: &a{i + 1}\n  <<: [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12)
)

BROKEN: dict[str, tuple[str, str]] = {
    "syntax": ("a: [1", "line 1, column 6: .*flow sequence"),
    "tab": ("a:\n\t- b", r"line 2, column 1: .*\\t"),
    "two documents": ("a: 1\n---\nb: 2", "line 2, column 1: .*document"),
    "unknown alias": ("a: *b", "undefined alias"),
    "alias of itself": ("a: &a [*a]", "an alias of what it lies in"),
    "aliases of aliases": (BOMB, "values when its aliases are written out"),
    "merges of merges": (MERGES, "values when its aliases are written out"),
    "deep brackets": ("a: " + "[" * 3000, "line 1, column 5.: nested more than 50 deep"),
    "deep braces": ("{a: " * 3000, "nested more than 50 deep"),
    "deep dashes": ("- " * 3000, "nested more than 50 deep"),
    "deep keys": ("? " * 3000, "nested more than 50 deep"),
    "long": ("a" * (LONGEST + 1), "262145 characters, more than the 262144"),
    "control character": ("a: \x07", "special characters"),
    "half a pair as an escape": ('a: "\\ud83d"', "line 1, column 4: half of a surrogate pair is no text"),
    "half a pair": ("a: \ud800", "special characters"),
    "other classes": ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "own tag": ("a: !mine 1", "could not determine a constructor"),
    "list as key": ("? [a]\n: 1", "unhashable key"),
    "no int": ("a: !!int abc", "line 1, column 4: 'abc' is no int"),
    "empty int": ("a: !!int ''", "'' is no int"),
    "huge int": ("a: " + "9" * 5000, "'9{63}... is no int"),
    "huge sexagesimal": ("a: 1" + ":59" * 5000, "is no int"),
    "huge float": ("a: 1" + ":59" * 5000 + ".5", "is no float"),
    "no float": ("a: !!float abc", "'abc' is no float"),
    "no bool": ("a: !!bool abc", "'abc' is no bool"),
    "no time": ("a: !!timestamp abc", "'abc' is no timestamp"),
    "no date": ("a: 2024-13-45", "'2024-13-45' is no timestamp"),
    "no binary": ("a: !!binary é", "failed to convert base64|is no binary"),
    "no set": ("a: !!set 5", "expected a mapping"),
    "no pairs": ("a: !!omap 5", "expected a sequence"),
}


@pytest.mark.parametrize("text", SOUND)
def test_a_sound_document_is_read_as_everybody_means_it(text: str) -> None:
    assert load_yaml(text, "a.yaml") == SOUND[text]


@pytest.mark.parametrize("case", BROKEN)
def test_a_fault_is_one_line_with_the_name_and_the_place(case: str) -> None:
    text, match = BROKEN[case]
    with pytest.raises(RecipeError, match=rf"^a\.yaml: .*({match})") as raised:
        load_yaml(text, "a.yaml")
    assert len(str(raised.value)) < 300 and str(raised.value).isprintable()


def test_the_caller_says_which_kind_of_error_it_is() -> None:
    with pytest.raises(ModelError, match=r"^README\.md: "):
        load_yaml("a: [", "README.md", ModelError)


def test_what_is_written_is_read_back() -> None:
    value = {"a": [1, 0.5, "x: y", None], "b": {"c": "true", "d": "2024-01-01"}}
    assert load_yaml(yaml.safe_dump(value), "a.yaml") == value


def test_files_are_read_no_further_than_the_bound(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 1e-3", encoding="utf-8-sig")
    assert read_yaml(path) == {"a": 1e-3}
    path.write_bytes(b"a: caf\xe9")
    for read in (read_yaml, refuse_unbounded):
        with pytest.raises(ModelError, match=r"a\.yaml: not readable as YAML: byte 0xe9 is not UTF-8"):
            read(path, ModelError)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: nothing is written, and nothing of it may be kept in memory
    for read in (read_yaml, refuse_unbounded):
        with pytest.raises(RecipeError, match=f"{LONGEST + 1} characters, more than the {LONGEST} that are read"):
            read(path)


@pytest.mark.parametrize("case", ["syntax", "aliases of aliases", "deep brackets", "long"])
def test_bounds_hold_for_what_others_read(case, tmp_path):
    text, match = BROKEN[case]
    path = tmp_path / "task.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=match):
        refuse_unbounded(path)
    path.write_text("task: own\nprocess: !function own.process\n", encoding="utf-8")
    refuse_unbounded(path)
