"""The tables of bench/real.py: shares, ratios, and what is missing."""

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from real_models.cases import CASES, Setting
from real_models.tables import absent, interval, page, section

LM, MINILM = CASES["smollm2-135m"], CASES["minilm"]


def bounded(value: float, spread: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


def row(model: str, name: str, keep: float, measured: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "model": model, "row": name, "keep": keep, "seed": 0, "time": None, "bytes": 80_000_000, "seconds": 60.0,
        "calibrated_on": 4096, "device": {"name": "cpu", "threads": 1}, "measured": measured,
    } | changes  # fmt: skip


def language(name: str, keep: float, *losses: float, lambada: float = 0.2, **changes: Any) -> dict[str, Any]:
    texts = []
    for text, loss in zip(("wikitext2", "eng.dev"), losses, strict=True):
        repetition = {"model": 0.2, "dense": 0.1}
        continuation = {"leading": bounded(0.3), "repetition": repetition}
        against = {"excess_loss": bounded(loss), "continuation": continuation}
        texts.append({"name": text, "perplexity": 30.0, "against": against})
    asked = [
        {"task": "lambada_openai", "metric": "acc", **bounded(lambada), "against": {"value": 0.4}},
        {"task": "average", "metric": "mean", **bounded(0.41), "against": {"value": 0.42}},
    ]
    return row("smollm2-135m", name, keep, {"texts": texts, "tasks": asked, "absent_tasks": ["logiqa"]}, **changes)


def dense() -> dict[str, Any]:
    texts = [{"name": name, "perplexity": 20.0} for name in ("wikitext2", "eng.dev")]
    asked = [{"task": "lambada_openai", "metric": "acc", **bounded(0.4)}]
    return row("smollm2-135m", "dense", 1.0, {"texts": texts, "tasks": asked, "absent_tasks": ["logiqa"]}, seconds=None)


def test_the_default_is_held_against_the_best_baseline_of_each_text() -> None:
    rows = [
        dense(), language("svd-llm", 0.6, 3.0, 1.0), language("aa-svd-25", 0.6, 1.5, 2.0), language("default", 0.6, 0.75, 0.8),
        language("svd-llm", 0.8, 0.1, 0.1), language("svd-llm", 0.6, 0.1, 0.1, seed=1),
    ]  # fmt: skip
    text = section(LM, rows)
    assert "default at 60%, seed 0: wikitext2 **0.50** (AA-SVD, its 25 epochs), eng.dev **0.80** (SVD-LLM)\n" in text


def test_a_baseline_that_loses_nothing_gives_no_ratio() -> None:
    text = section(LM, [language("svd-llm", 0.8, 0.0, 0.1), language("default", 0.8, 0.01, 0.01)])
    assert "wikitext2 no ratio, for that loses nothing (SVD-LLM), eng.dev **0.10**" in text


def test_lambada_is_a_share_of_the_originals() -> None:
    lines = section(LM, [dense(), language("default", 0.8, 0.2, 0.2, lambada=0.3)]).splitlines()
    (head,) = [line for line in lines if line.startswith("| recipe |")]
    column = head.split(" | ").index("of the original's")
    cells = {line.split(" | ")[0]: line.split(" | ") for line in lines if line.startswith("| ")}
    assert cells["| the original"][column] == "100%" and cells["| default"][column] == "75%"
    assert head.split(" | ")[-1] == "where |", "the original, which has not all measures, comes first"
    assert cells["| default"][head.split(" | ").index("excess, eng.dev")] == "0.2000 (0.1900 to 0.2100)"
    assert cells["| the original"][head.split(" | ").index("excess, eng.dev")] == ""
    assert "mean of 8 tasks" in head and "Tasks of the paper whose documents are not at hand: logiqa." in lines


def test_rows_that_are_missing_or_failed_are_named() -> None:
    failed = {"model": "smollm2-135m", "row": "default", "keep": 0.6, "seed": 0, "time": None, "reason": "no memory"}
    text = absent(LM, [language("default", 0.8, 0.1, 0.1), failed])
    assert "Failed: default at 60%, seed 0: no memory\n" in text
    assert "Not computed: the original at 100%, seed 0; paper, rate 1e-3 at 80%, seed 0; SVD-LLM at 80%" in text
    assert "default at 80%" not in text
    assert absent(MINILM, []).count("seed 0") == 9, "all of them"


def test_the_default_within_a_time_is_a_row_of_its_own_and_stands_for_the_default() -> None:
    rows = [language("svd-llm", 0.8, 0.4, 0.4), language("default", 0.8, 0.1, 0.2, time="20m")]
    text = section(LM, rows)
    assert "| default within 20m | 80% |" in text and "- default within 20m at 80%, seed 0: wikitext2 **0.25**" in text
    assert "default at 80%" not in absent(LM, rows)


def test_the_heading_says_what_a_rehearsal_is() -> None:
    assert "A rehearsal" not in page([], Setting())
    text = page([], Setting("valid", limit=2, tokens=4096))
    assert "Part `valid`" in text and "at most 2 documents" in text and "Calibrated on 4,096 tokens." in text
    assert LM.note in text, "what the original's weights are"


def test_speech_and_sentences_have_tables_of_their_own() -> None:
    heard = {"recordings": {"word_error_rate": bounded(0.05), "points": bounded(1.0)}}
    near = {"sentences": 9, "cosine": bounded(0.98), "nearest": bounded(0.9, 0.05)}
    text = page([row("whisper-base", "default", 0.8, heard), row("minilm", "default", 0.6, near)], Setting())
    assert (
        "word error rate, recordings | points more, recordings | calibration utterances |" in text
        and "5.0% (4.0% to 6.0%)" in text
    )
    assert "| default | 60% | 80.0 | 9 | 0.9800 (0.9700 to 0.9900) | 90.0% (85.0% to 95.0%) | 4,096 | 60 | 0 |" in text


def test_a_value_without_bounds_stands_alone() -> None:
    assert interval({"value": 0.5, "low": None, "high": None}, ".1%") == "50.0%"
