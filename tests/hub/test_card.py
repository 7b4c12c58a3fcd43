"""The model card tells what was made, and no word of others takes it over."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from lillama.calibration.pack import Manifest, SourceRecord
from lillama.evaluation.perplexity import TextScore
from lillama.hub import card as module
from lillama.hub.card import card
from lillama.hub.rights import Rights
from lillama.model.spec import BlockSpec, LinearSpec, ModelSpec
from lillama.ranks.plan import RankPlan
from lillama.recipes.recipe import Recipe
from lillama.runs.result import Result, Stored, TextPair
from lillama.stream.head import Change

LINEARS = tuple(LinearSpec(f"layers.{index}.up", 60, 60) for index in range(16))
BLOCKS = tuple(BlockSpec(f"layers.{index}", index, 4000, (linear,)) for index, linear in enumerate(LINEARS))
SPEC = ModelSpec("LlamaForCausalLM", 60, "bfloat16", 2, 1_000_000_000, BLOCKS)
PLAN = RankPlan(SPEC, {linear.name: 10 for linear in LINEARS})
BEFORE = TextScore("wikitext-2", 280_000, math.log(10.0), 0.8)
RESULT = Result(
    path=Path("small"),
    run=Path("small.run"),
    plan=PLAN,
    stored=Stored(799_500_000, 1_599_000_000),
    recipe=Recipe(seed=7),
    texts=(TextPair(BEFORE, replace(BEFORE, nll=math.log(11.5), bits_per_byte=0.84)),),
    held_out=Change(kl=0.1, rise=0.1),
    seconds=1234.0,
    peak_bytes=7_000_000_000,
)


def manifest(*sources: str, tokens: int = 524_288, seq_len: int = 2048) -> Manifest:
    records = tuple(SourceRecord(path, None, None, "train", 1.0, "", 1, 1) for path in sources)
    return Manifest("text", records, "", seq_len, tokens, tokens, 0, None, "")


FACTS: dict[str, Any] = {
    "result": RESULT,
    "base_model": "org/Tiny-1B",
    "recipe_name": "default",
    "manifest": manifest("wiki.txt", "dialogues.jsonl"),
    "rights": Rights("apache-2.0", ("en", "fr")),
    "kept_initialisations": 1,
}


@pytest.fixture(autouse=True)
def versions(monkeypatch) -> None:
    monkeypatch.setattr(module, "environment", lambda: {"lillama": "0.1.0", "torch": "2.13.0"})


def front_matter(text: str) -> dict[str, object]:
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_front_matter_is_what_the_hub_reads() -> None:
    assert front_matter(card(**FACTS)) == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "base_model": "org/Tiny-1B",
        "base_model_relation": "quantized",
        "language": ["en", "fr"],
        "tags": ["lillama", "low-rank", "compression"],
    }


def test_body_tells_all_facts() -> None:
    text = card(**FACTS)
    for told in [
        "# Tiny-1B, 80% of its parameters",
        "| parameters | 1,000,000,000 | 799,500,000 | 80.0 % |",
        "| weights in bfloat16 | 2 GB | 1.6 GB | 80.0 % |",
        "| perplexity, wikitext-2 (280,000 tokens) | 10.000 | 11.500 | +15.0 % |",
        "| bits per byte, wikitext-2 | 0.8000 | 0.8400 | +5.0 % |",
        f"Recipe `default`, hash `{RESULT.recipe.hash}`, seed 7; asked to keep 80 % (model)",
        "text, wiki.txt, dialogues.jsonl; 524,288 tokens in sequences of 2048",
        "16 factorised or narrower, of which 1 kept their initialisation",
        "20.6 minutes, peak memory 7 GB; lillama 0.1.0, torch 2.13.0",
        "```yaml\nkeep: 0.8\nscope: model\n",
        "import lillama\nfrom transformers import AutoModelForCausalLM",
    ]:
        assert told in text


def test_narrower_networks_are_told() -> None:
    spec = RESULT.plan.spec
    narrower = replace(RESULT, plan=replace(RESULT.plan, widths={"layers.0.down": 3, "layers.1.down": 4}))
    assert spec.blocks and "have fewer neurons" not in card(**FACTS)
    assert "or, in 2 feed-forward networks, have fewer neurons, fitted" in card(**FACTS | {"result": narrower})


def test_table_rows_are_not_torn_apart() -> None:
    lines = card(**FACTS).splitlines()
    first = lines.index("|---|---:|---:|---:|")
    assert all(line.startswith("|") for line in lines[first : first + 5])


def test_a_local_path_stays_private() -> None:
    sources = ("/home/someone/notes.txt", "org/texts", "someone/../x/y")
    facts = {"base_model": "/home/someone/models/tiny", "manifest": manifest(*sources), "rights": Rights()}
    text = card(**FACTS | facts)
    assert "text, notes.txt, org/texts, y;" in text
    assert "someone" not in text and text.count("tiny") >= 2
    assert front_matter(text).keys() == {"library_name", "tags"}
    assert "the terms of that model apply" in text


TAKEOVER = (
    "mit\n\n# Owned\n\n[free](https://evil.example) <script>x</script> ``` | \x1b[2J \u202e {{ 7 * 7 }}\n---\ntags: [x]"
)


CHANGES: dict[str, dict[str, Any]] = {
    "license": {"rights": Rights(TAKEOVER)},
    "language": {"rights": Rights("mit", (TAKEOVER, "en"))},
    "base_model": {"base_model": TAKEOVER},
    "architecture": {"result": replace(RESULT, plan=replace(PLAN, spec=replace(SPEC, architecture=TAKEOVER)))},
    "dtype": {"result": replace(RESULT, plan=replace(PLAN, spec=replace(SPEC, dtype=TAKEOVER)))},
    "recipe_name": {"recipe_name": TAKEOVER},
    "recipe": {"result": replace(RESULT, recipe=Recipe(targets=(TAKEOVER,)))},
    "text": {"result": replace(RESULT, texts=(TextPair(replace(BEFORE, name=TAKEOVER), BEFORE),))},
    "source": {"manifest": manifest(TAKEOVER)},
}


@pytest.mark.parametrize("field", CHANGES)
def test_no_word_of_others_takes_the_card_over(field: str, monkeypatch) -> None:
    monkeypatch.setattr(module, "environment", lambda: {TAKEOVER: TAKEOVER})
    text = card(**FACTS | CHANGES[field])
    parser, body = MarkdownIt("commonmark").enable("table"), text.split("---\n", 2)[2]
    tokens, expected = parser.parse(body), parser.parse(card(**FACTS).split("---\n", 2)[2])
    assert [token.type for token in tokens if token.level == 0] == [one.type for one in expected if one.level == 0]
    inner = {child.type for token in tokens for child in token.children or ()}
    assert inner <= {"text", "text_special", "softbreak", "code_inline"}
    assert front_matter(text).keys() <= front_matter(card(**FACTS)).keys()
    assert front_matter(text)["tags"] == ["lillama", "low-rank", "compression"]
    assert all(line.isprintable() for line in text.split("\n"))


def test_the_plot_is_shown_where_there_is_one() -> None:
    assert "![" not in card(**FACTS)
    assert "by block](kept.svg)" in card(**FACTS, plot="kept.svg")


def test_no_measurement_is_said() -> None:
    changes: dict[str, Any] = {"result": replace(RESULT, texts=())}
    assert "Quality was not measured" in card(**FACTS | changes)
