"""Figures about what was measured: texts, minimal pairs, speed; and several compressions side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Literal

from lillama.evaluation.continuation_samples import SampleJson
from lillama.evaluation.evaluate import TextJson
from lillama.evaluation.intervals import IntervalJson
from lillama.evaluation.speed import FiguresJson, SubjectJson
from lillama.probing.result import CHANCE
from lillama.report.artefacts import Evidence
from lillama.report.charts import ChartPair, bars, dumbbells
from lillama.report.figure import Cell, Figure, Passage
from lillama.report.schemas import has
from lillama.report.summary import dense_of
from lillama.report.svg import Axes, Line, chart, with_title

COMPARED: tuple[tuple[Literal["kl", "top1"], str, str], ...] = (
    ("kl", "KL, nats", ".4f"),
    ("top1", "same top token", ".1%"),
)
Speed = Literal["prefill_tokens_per_second", "decode_tokens_per_second"]
SPEEDS: tuple[tuple[Speed, str], ...] = (
    ("prefill_tokens_per_second", "prefill"),
    ("decode_tokens_per_second", "decode"),
)


def evaluation(evidence: Evidence) -> Figure | None:
    """Tell what `lillama evaluate` found on each text and task."""
    found = evidence.evaluation
    texts, tasks = found["texts"] if has(found, "texts") else [], found.get("tasks", [])
    if not texts and not tasks:
        return None
    rows: list[tuple[Cell, ...]] = []
    for one in texts:
        against = one.get("against")
        excess = _bounds(against["excess_loss"], "+.4f") if against and has(against, "excess_loss") else ""
        dense = against["perplexity"] if against and has(against, "perplexity") else None
        rows.append((one["name"], "perplexity", dense, one["perplexity"], excess))
        for key, name, form in COMPARED:
            if against and has(against, key):
                rows.append((one["name"], name, None, None, _bounds(against[key], form)))
    for one in tasks:
        beside = one.get("against")
        difference = _bounds(beside["difference"], "+.4f") if beside and has(beside, "difference") else ""
        dense = beside["value"] if beside and has(beside, "value") else None
        rows.append((one["task"], one["metric"], dense, one["value"], difference))
    columns = ("text or task", "measure", "original", "compressed", "difference and 95 % interval")
    return Figure(
        "evaluation",
        "Evaluation",
        "The difference of a perplexity is that of the loss, in nats a token. KL and the share of tokens that both think "
        "likeliest are themselves measures of the difference.",
        (),
        columns,
        tuple(rows),
    )


def samples(evidence: Evidence) -> Figure | None:
    """Set what the two models write after the same prompts side by side."""
    texts = evidence.evaluation["texts"] if has(evidence.evaluation, "texts") else []
    passages = tuple(
        Passage(text["name"], one["prompt"], one["same"], one["dense"], one["model"])
        for text in texts
        for one in _samples(text)
    )
    if not passages:
        return None
    return Figure(
        "samples",
        "What both write",
        "Prompts cut from the texts, continued with the likeliest token each time; marked from the first token where the "
        "two part. One token changes all that follow, so early parting alone is no fault.",
        (),
        ("text", "prompt", "both", "original", "compressed"),
        tuple(map(astuple, passages)),
        passages=passages,
    )


def probing(evidence: Evidence) -> Figure | None:
    """Draw the accuracies on minimal pairs, original against compressed, for each group of each benchmark."""
    plots, rows = [], list[tuple[Cell, ...]]()
    for found in evidence.probes:
        breakdowns = found["breakdowns"] if has(found, "breakdowns") else {}
        scored = [group for group in next(iter(breakdowns.values()), []) if group["score"] is not None]
        items = [found["items"] if has(found, "items") else None, *(group["items"] for group in scored)]
        total = ChartPair("overall", dense_of(found), found["overall"])
        pairs = [
            total,
            *(ChartPair(one["label"], one["dense"] if has(one, "dense") else None, one["score"]) for one in scored),
        ]
        name, chance = found["benchmark"], found["chance"] if has(found, "chance") else CHANCE
        plots.append(with_title(name, dumbbells(f"Accuracy on {name}", pairs, chance)))
        rows += [
            (name, pair.label, count, _percent(pair.dense), _percent(pair.kept))
            for pair, count in zip(pairs, items, strict=True)
        ]
    if not plots:
        return None
    return Figure(
        "probing",
        "Minimal pairs",
        "Share of pairs in which the right text is the likelier one; the dashed line is chance.",
        tuple(plots),
        ("benchmark", "group", "items", "original, %", "compressed, %"),
        tuple(rows),
    )


def speed(evidence: Evidence) -> Figure | None:
    """Draw tokens per second, memory and bytes on disk."""
    found = evidence.bench
    if not found:
        return None
    own, other = found["model"] if has(found, "model") else None, found.get("against")
    cells = found["cells"] if has(found, "cells") else []
    plots, rows = [], list[tuple[Cell, ...]]()
    for key, name in SPEEDS:
        pairs = [
            ChartPair(
                f"{cell['batch']} x {cell['prompt']}", _median(cell.get("against"), key), _median(cell["model"], key)
            )
            for cell in cells
        ]
        plots.append(with_title(f"{name}, batch x prompt", bars(f"Speed of {name}", "tokens/s", pairs)))
        rows += [(f"{name}, {pair.label}, tokens/s", pair.dense, pair.kept) for pair in pairs]
    memory = [ChartPair("peak memory", _peak(other), _peak(own)), ChartPair("on disk", _disk(other), _disk(own))]
    plots.append(with_title("memory", bars("Memory and bytes on disk", "MB", memory)))
    rows += [(f"{pair.label}, MB", pair.dense, pair.kept) for pair in memory]
    told = found["conditions"] if has(found, "conditions") else {}
    conditions = ", ".join(f"{key} {value}" for key, value in told.items())
    return Figure(
        "speed",
        "Speed and memory",
        f"Medians. {conditions}.",
        tuple(plots),
        ("measure", "original", "compressed"),
        tuple(rows),
    )


def comparison(all_: Sequence[Evidence]) -> Figure | None:
    """Draw the quality of several compressions against their size."""
    finished = [one for one in all_ if has(one.metrics, "keep") and has(_change(one), "kl")]
    if len(all_) < 2 or not finished:
        return None
    lines = [
        Line(one.name, [(100 * one.metrics["keep"], one.metrics["held_out"]["kl"])], "kept", True, label=str(place))
        for place, one in enumerate(finished, 1)
    ]
    texts = list(dict.fromkeys(text["name"] for one in finished for text in one.texts))
    axes = Axes("parameters kept, %", "KL, nats", zero_y=True, room=0.06, width=480, height=300)
    return Figure(
        "compared",
        "Quality against size",
        "Divergence from the original on held-out calibration text; each was measured on its own calibration text. The "
        "numbers beside the dots are those of the table.",
        (chart("Divergence against the share of parameters kept", axes, lines),),
        ("no.", "model", "kept, %", "KL, nats", "loss rise, nats", *(f"perplexity, {name}" for name in texts)),
        tuple(_compared_row(place, one, texts) for place, one in enumerate(finished, 1)),
        legend=(),
        open=True,
    )


def _compared_row(place: int, evidence: Evidence, texts: Sequence[str]) -> tuple[Cell, ...]:
    metrics = evidence.metrics
    scores = {text["name"]: text["after"]["perplexity"] for text in evidence.texts}
    change = metrics["held_out"]
    rise = change["rise"] if has(change, "rise") else None
    measured = (100 * metrics["keep"], change["kl"], rise, *(scores.get(name) for name in texts))
    return (place, evidence.name, *measured)


def _change(evidence: Evidence) -> Mapping[str, object]:
    """Return what is known of the predictions on held-out calibration text."""
    return evidence.metrics["held_out"] if has(evidence.metrics, "held_out") else {}


def _samples(text: TextJson) -> list[SampleJson]:
    against = text.get("against")
    written = against["continuation"] if against and has(against, "continuation") else None
    return written["samples"] if written and has(written, "samples") else []


def _bounds(found: IntervalJson, form: str) -> str:
    low, high = found["low"] if has(found, "low") else None, found["high"] if has(found, "high") else None
    return f"{found['value']:{form}}" + (
        f" [{low:{form}}, {high:{form}}]" if low is not None and high is not None else ""
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _median(figures: FiguresJson | None, key: Speed) -> float | None:
    return figures[key]["median"] if figures and has(figures, key) else None


def _peak(model: SubjectJson | None) -> float | None:
    if model is None or not has(model, "peak_bytes") or not has(model, "idle_bytes"):
        return None
    return (model["peak_bytes"] - model["idle_bytes"]) / 1e6


def _disk(model: SubjectJson | None) -> float | None:
    return model["disk_bytes"] / 1e6 if model and has(model, "disk_bytes") else None
