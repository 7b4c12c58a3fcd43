from dataclasses import replace

import pytest
import yaml
from markdown_it import MarkdownIt

from lillama.hub.card import Calibration, CardFacts, Measured, auto_class, card, with_loading

FACTS = CardFacts(
    base_model="org/Tiny-1B",
    architecture="LlamaForCausalLM",
    recipe_name="default",
    recipe_text="ranks:\n  uniform: {multiple_of: 64}\nkeep: 0.8\n",
    recipe_hash="cafe0123",
    keep=0.8,
    scope="whole model",
    params_dense=1_000_000_000,
    params_kept=799_500_000,
    bytes_dense=2_000_000_000,
    bytes_kept=1_599_000_000,
    dtype="bfloat16",
    calibration=Calibration("files", ("wiki.txt", "dialogues.jsonl"), 524_288, 2048),
    seed=7,
    metrics=(Measured("wikitext-2", 280_000, 10.0, 11.5, 0.8, 0.84),),
    blocks_compressed=16,
    blocks_kept_initialisation=1,
    seconds=1234.0,
    peak_bytes=7_000_000_000,
    versions={"lillama": "0.1.0", "torch": "2.13.0"},
    license="apache-2.0",
    languages=("en", "fr"),
)


def front_matter(text: str) -> dict[str, object]:
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_front_matter_is_what_the_hub_reads() -> None:
    assert front_matter(card(FACTS)) == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "base_model": "org/Tiny-1B",
        "base_model_relation": "quantized",
        "language": ["en", "fr"],
        "tags": ["lillama", "low-rank", "compression"],
    }


def test_body_tells_all_facts() -> None:
    text = card(FACTS)
    for told in [
        "# Tiny-1B, 80% of its parameters",
        "| parameters | 1,000,000,000 | 799,500,000 | 80.0 % |",
        "| weights in bfloat16 | 2 GB | 1.6 GB | 80.0 % |",
        "| perplexity, wikitext-2 (280,000 tokens) | 10.000 | 11.500 | +15.0 % |",
        "| bits per byte, wikitext-2 | 0.8000 | 0.8400 | +5.0 % |",
        "Recipe `default`, hash `cafe0123`, seed 7; asked to keep 80 % (whole model)",
        "files, wiki.txt, dialogues.jsonl; 524,288 tokens in sequences of 2048",
        "16 compressed, of which 1 kept their initialisation",
        "20.6 minutes, peak memory 7 GB; lillama 0.1.0, torch 2.13.0",
        f"```yaml\n{FACTS.recipe_text}```",
        "import lillama\nfrom transformers import AutoModelForCausalLM",
    ]:
        assert told in text


def test_table_rows_are_not_torn_apart() -> None:
    lines = card(FACTS).splitlines()
    first = lines.index("|---|---:|---:|---:|")
    assert all(line.startswith("|") for line in lines[first : first + 5])


def test_a_local_path_stays_private() -> None:
    calibration = Calibration("files", ("/home/someone/notes.txt", "org/texts", "someone/../x/y"), 4096, 128)
    facts = replace(FACTS, base_model="/home/someone/models/tiny", calibration=calibration, license=None, languages=())
    text = card(facts)
    assert "files, notes.txt, org/texts, y;" in text
    assert "someone" not in text and text.count("tiny") >= 2
    assert front_matter(text).keys() == {"library_name", "tags"}
    assert "the terms of that model apply" in text


TAKEOVER = (
    "mit\n\n# Owned\n\n[free](https://evil.example) <script>x</script> ``` | \x1b[2J \u202e {{ 7 * 7 }}\n---\ntags: [x]"
)


@pytest.mark.parametrize(
    "field", ["license", "base_model", "architecture", "recipe_name", "recipe_text", "dtype", "text"]
)
def test_no_word_of_others_takes_the_card_over(field: str) -> None:
    changes = {field: TAKEOVER} | {"recipe_hash": TAKEOVER, "languages": (TAKEOVER, "en")}
    if field == "text":
        changes = {"metrics": (replace(FACTS.metrics[0], text=TAKEOVER),)}
        changes |= {"calibration": replace(FACTS.calibration, sources=(TAKEOVER,)), "versions": {TAKEOVER: TAKEOVER}}
    text = card(replace(FACTS, **changes))
    parser, body = MarkdownIt("commonmark").enable("table"), text.split("---\n", 2)[2]
    tokens, expected = parser.parse(body), parser.parse(card(FACTS).split("---\n", 2)[2])
    assert [token.type for token in tokens if token.level == 0] == [one.type for one in expected if one.level == 0]
    inner = {child.type for token in tokens for child in token.children or ()}
    assert inner <= {"text", "text_special", "softbreak", "code_inline"}
    assert front_matter(text).keys() <= front_matter(card(FACTS)).keys()
    assert front_matter(text)["tags"] == ["lillama", "low-rank", "compression"]
    assert all(line.isprintable() for line in text.split("\n"))


def test_the_plot_is_shown_where_there_is_one() -> None:
    assert "![" not in card(FACTS)
    assert "by block](kept.svg)" in card(replace(FACTS, plot="kept.svg"))


def test_no_measurement_is_said() -> None:
    assert "Quality was not measured" in card(replace(FACTS, metrics=()))


@pytest.mark.parametrize("readme", [card(FACTS), "# Something else\n", ""])
def test_loading_section_is_rewritten_or_added(readme: str) -> None:
    dense = with_loading(readme, "dense", "OwnModel")
    assert dense.count("## How to load it") == 1
    assert "import lillama" not in dense and "import AutoModel\n" in dense
    assert with_loading(with_loading(dense, "portable", "OwnModel"), "dense", "OwnModel") == dense
    kept = [line for line in readme.splitlines() if line.startswith(("#", "|")) and "load" not in line]
    assert all(line in dense for line in kept)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("LlamaModel", "AutoModel"),
        ("LlamaForSequenceClassification", "AutoModelForSequenceClassification"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("MambaForCausalLM", "AutoModelForCausalLM"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq"),
        ("BertForMaskedLM", "AutoModelForMaskedLM"),
        ("OurOwnModel", "AutoModel"),
    ],
)
def test_auto_class_follows_transformers(architecture: str, expected: str) -> None:
    assert auto_class(architecture) == expected
