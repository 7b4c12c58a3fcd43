"""Licence and languages of the original: whatever its README holds, they are read in no time or unknown."""

import os
from pathlib import Path

import pytest

from lillama.hub.rights import Rights, rights_of
from lillama.pipeline.api import compress

BOMB = "license: mit\na0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12)
)
TOLD: dict[str, tuple[str, Rights]] = {
    "both": ("license: apache-2.0\nlanguage:\n- en\n- fr", Rights("apache-2.0", ("en", "fr"))),
    "one language": ("language: en", Rights(None, ("en",))),
    "Norwegian": ("language: [no, en]", Rights(None, ("no", "en"))),
    "several licences": ("license: [mit, gpl]", Rights("mit, gpl")),
    "other keys are not read": ("tags: [\nlicense: mit\ntitle: *x", Rights("mit")),
    "scores of many tasks": ("model-index:\n" + "- a: 1\n  b: [1, 2]\n" * 40_000 + "license: mit", Rights("mit")),
    "bomb beside": (BOMB, Rights("mit")),
    "a number": ("language: 5", Rights()),
    "a date": ("language: 2024-01-01\nlicense: mit", Rights("mit")),
    "wrong parts": ("language: [5, en, null, [fr], {a: b}]\nlicense: {name: mit}", Rights(None, ("en",))),
    "nothing": ("", Rights()),
    "null": ("license:\nlanguage: ~", Rights()),
    "two lines": ("license: |\n  # Owned\n  [x](https://y)", Rights("# Owned [x](https://y)")),
}
UNREADABLE: dict[str, str] = {
    "no timestamp": "license: !!timestamp x",
    "no date": "license: 2024-13-45",
    "bomb": BOMB.replace("license: mit\n", "").replace("a", "language") + "license: *language9",
    "deep": "license: " + "[" * 5000,
    "long": "license: " + "x" * 300_000,
    "other classes": "license: !!python/object/apply:os.system [ls]",
    "syntax": "license: [a",
}


@pytest.mark.parametrize("case", TOLD)
def test_what_is_sound_is_read(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text, expected = TOLD[case]
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n# Model\n", encoding="utf-8")
    assert rights_of(tmp_path) == expected and not caplog.records


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_unknown_in_one_line(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{UNREADABLE[case]}\n---\n", encoding="utf-8")
    assert rights_of(tmp_path) == Rights()
    (record,) = caplog.records
    assert "README.md: its metadata cannot be read (" in record.getMessage() and "\n" not in record.getMessage()


@pytest.mark.parametrize(
    "content", [b"", b"# no front matter", b"---\nlicense: mit\n", b"text\n---\nlicense: mit\n---\n"]
)
def test_without_front_matter_nothing_is_known(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(content)
    assert rights_of(tmp_path) == Rights()


def test_what_is_no_text_is_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert rights_of(tmp_path) == Rights() and len(caplog.records) == 1


def test_pipes_links_and_folders_are_no_readme(tmp_path: Path) -> None:
    for name in ("pipe", "link", "folder", "none"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / "README.md")
    (tmp_path / "secret.md").write_text("---\nlicense: secret\n---\n")
    (tmp_path / "link" / "README.md").symlink_to("../secret.md")
    (tmp_path / "folder" / "README.md").mkdir()
    assert {rights_of(tmp_path / name) for name in ("pipe", "link", "folder", "none")} == {Rights()}


@pytest.mark.parametrize(
    "front", ["language: 5", "license: !!timestamp x", "license: |\n  # Owned\n  <script>x</script>"]
)
def test_no_readme_ends_a_run_or_takes_its_card_over(front: str, make_model, quick, tmp_path: Path) -> None:
    model = make_model()
    (model / "README.md").write_text(f"---\n{front}\n---\n", encoding="utf-8")
    result = compress(model, tmp_path / "small", recipe=quick(distill={"epochs": 0}, calibration={"tokens": 64}))
    card = (result.path / "README.md").read_text(encoding="utf-8")
    body = card.split("---\n", 2)[2]
    assert "\n# Owned" not in body and "<script>" not in body and str(tmp_path) not in card
