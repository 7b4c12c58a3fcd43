"""Words of others are mere text in Markdown, and names tell nothing of this machine."""

import re
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from lillama.files.publishing import (
    as_code_block,
    escape_markdown,
    markdown_templates,
    plain,
    public_name,
    public_recipe,
    unescape_markdown,
)

HOSTILE = [
    "apache-2.0\n\n# Owned\n\n[free](https://evil.example)",
    "# heading", "## x", "- item", "+ item", "1. one", "2) two", "---", "===", "```", "~~~", "> quote", "    code",
    "<script>alert(1)</script>", "<img src=x onerror=y>", "&lt;b&gt;", "![i](x)", "[a]: http://b", "a | b | c", "*a* _b_ `c`",
    "https://evil.example/x", "www.evil.example", "mail@evil.example", "$x$", "\\", "a\\|b",
    "\x1b[2J", "\u202egpj.exe", "a\ud800b",
    "\u2028# x", "a\tb", "{{ 7 * 7 }}", "{% raw %}",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_a_word_is_one_line_that_takes_nothing_over(text: str) -> None:
    told = escape_markdown(text)
    told.encode("utf-8")
    assert told.isprintable() and "\n" not in told
    assert "://" not in told and "www." not in told and "@" not in told  # which some readers make links of
    opened, inline, closed = MarkdownIt("commonmark").enable("table").parse(told)
    assert (opened.type, inline.type, closed.type) == ("paragraph_open", "inline", "paragraph_close")
    assert {child.type for child in inline.children or ()} <= {"text", "text_special"}
    assert "".join(child.content for child in inline.children or ()) == plain(text)
    assert unescape_markdown(told) == plain(text)


@pytest.mark.parametrize(
    "text", ["apache-2.0", "wiki.txt, a_b.jsonl", "-1.5 %", "+15.0 %", "Tiny-1B, 80% of its parameters"]
)
def test_a_usual_word_stays_as_it_is(text: str) -> None:
    assert escape_markdown(text) == text


def test_nobody_writes_a_book_into_a_name() -> None:
    assert len(plain("a" * 10**6)) == 1000


@pytest.mark.parametrize("text", ["a: 1", "a: |\n  ```\n  # x", "`````"])
def test_no_line_ends_the_block_of_code_it_stands_in(text: str) -> None:
    first, *body, last = as_code_block(text, "yaml").split("\n")
    assert first == f"{last}yaml" and set(last) == {"`"} and len(last) >= 3
    assert not any(re.match(rf"\s*{last}", line) for line in body) and "\n".join(body) == text


def test_every_value_in_a_template_is_escaped() -> None:
    environment = markdown_templates("lillama.hub")
    rendered = environment.from_string("{{ a }} {{ a | coded }} {{ b | map('told') | join(', ') }}").render(
        a="<b>`", b=["|", "#"]
    )
    assert rendered == "&lt;b&gt;\\` <b>' \\|, \\#"


def test_what_lies_here_is_told_by_its_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "private" / "notes").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    local = [
        str(tmp_path / "private" / "notes"),
        "private/notes",
        "./private/notes",
        "../x/notes",
        "~/a/notes",
        "a/b/c/notes",
    ]
    assert {public_name(path) for path in local} == {"notes"}
    assert (
        public_name("org/texts") == "org/texts" and public_name("texts") == "texts" and public_name("/") == "a folder"
    )
    recipe = {
        "keep": 0.8,
        "calibration": {"tokens": 5, "sources": [{"path": "/home/me/x.txt", "weight": 1.0}, {"path": "org/t"}]},
    }
    told = public_recipe(recipe)
    assert "home" not in yaml.safe_dump(told)
    assert told["calibration"]["sources"] == [{"path": "x.txt", "weight": 1.0}, {"path": "org/t"}]
    assert told["keep"] == 0.8 and "/home/me/x.txt" in str(recipe)


@pytest.mark.parametrize(
    "recipe", [{}, {"calibration": 5}, {"calibration": {"sources": 5}}, {"calibration": {"sources": [5]}}]
)
def test_a_damaged_recipe_is_told_as_it_is(recipe: dict) -> None:
    assert public_recipe(recipe) == recipe
