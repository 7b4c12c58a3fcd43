"""Figures about what was measured: texts, minimal pairs, speed; and several compressions side by side."""

from collections.abc import Sequence
from dataclasses import astuple

from lillama.report.artefacts import Evidence, Json
from lillama.report.charts import Pair, bars, dumbbells
from lillama.report.figure import Cell, Figure, Passage
from lillama.report.svg import Axes, Line, chart, titled

SPEEDS = (("prefill_tokens_per_second", "prefill"), ("decode_tokens_per_second", "decode"))


def evaluation(evidence: Evidence) -> Figure | None:
    """Tell what `lillama evaluate` found on each text and task."""
    found = evidence["evaluation"]
    texts, tasks = found.get("texts", []), found.get("tasks", [])
    if not texts and not tasks:
        return None
    rows: list[tuple[Cell, ...]] = []
    for one in texts:
        against = one.get("against", {})
        excess = _bounds(against.get("excess_loss"), "+.4f")
        rows.append((one["name"], "perplexity", against.get("perplexity"), one["perplexity"], excess))
        for key, name, form in (("kl", "KL, nats", ".4f"), ("top1", "same top token", ".1%")):
            if key in against:
                rows.append((one["name"], name, None, None, _bounds(against[key], form)))
    for one in tasks:
        against = one.get("against", {})
        difference = _bounds(against.get("difference"), "+.4f")
        rows.append((one["task"], one["metric"], against.get("value"), one["value"], difference))
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
    texts = evidence["evaluation"].get("texts", [])
    found = [(one["name"], (one.get("against", {}).get("continuation") or {}).get("samples", [])) for one in texts]
    passages = tuple(
        Passage(name, one["prompt"], one["same"], one["dense"], one["model"]) for name, parts in found for one in parts
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
        groups = next(iter(found.get("breakdowns", {}).values()), [])
        groups = [group for group in groups if group["score"] is not None]
        total = {
            "label": "overall",
            "items": found.get("items"),
            "score": found["overall"],
            "dense": (found.get("compared") or {}).get("dense"),
        }
        pairs = [Pair(group["label"], group.get("dense"), group["score"]) for group in (total, *groups)]
        name = found["benchmark"]
        plots.append(titled(name, dumbbells(f"Accuracy on {name}", pairs, found.get("chance", 0.5))))
        rows += [
            (name, group["label"], group["items"], _percent(group.get("dense")), _percent(group["score"]))
            for group in (total, *groups)
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
    found = evidence["bench"]
    if not found:
        return None
    own, other, cells = found.get("model", {}), found.get("against", {}), found.get("cells", [])
    plots, rows = [], list[tuple[Cell, ...]]()
    for key, name in SPEEDS:
        pairs = [
            Pair(f"{cell['batch']} x {cell['prompt']}", _median(cell.get("against"), key), _median(cell["model"], key))
            for cell in cells
        ]
        plots.append(titled(f"{name}, batch x prompt", bars(f"Speed of {name}", "tokens/s", pairs)))
        rows += [(f"{name}, {pair.label}, tokens/s", pair.dense, pair.kept) for pair in pairs]
    memory = [
        Pair("peak memory", _peak(other), _peak(own)),
        Pair("on disk", _mega(other.get("disk_bytes")), _mega(own.get("disk_bytes"))),
    ]
    plots.append(titled("memory", bars("Memory and bytes on disk", "MB", memory)))
    rows += [(f"{pair.label}, MB", pair.dense, pair.kept) for pair in memory]
    conditions = ", ".join(f"{key} {value}" for key, value in found.get("conditions", {}).items())
    return Figure(
        "speed",
        "Speed and memory",
        f"Medians. {conditions}.",
        tuple(plots),
        ("measure", "original", "compressed"),
        tuple(rows),
    )


def compared(all_: Sequence[Evidence]) -> Figure | None:
    """Draw the quality of several compressions against their size."""
    finished = [one for one in all_ if "keep" in one["metrics"] and "kl" in one["metrics"].get("held_out", {})]
    if len(all_) < 2 or not finished:
        return None
    lines = [
        Line(
            one.name, [(100 * one["metrics"]["keep"], one["metrics"]["held_out"]["kl"])], "kept", True, label=str(place)
        )
        for place, one in enumerate(finished, 1)
    ]
    texts = list(dict.fromkeys(text["name"] for one in finished for text in one["metrics"].get("texts", ())))
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
    metrics = evidence["metrics"]
    scores = {text["name"]: text["after"]["perplexity"] for text in metrics.get("texts", ())}
    change = metrics["held_out"]
    measured = (100 * metrics["keep"], change["kl"], change.get("rise"), *(scores.get(name) for name in texts))
    return (place, evidence.name, *measured)


def _bounds(found: Json | None, form: str) -> str:
    if not found:
        return ""
    low, high = found.get("low"), found.get("high")
    return f"{found['value']:{form}}" + (
        f" [{low:{form}}, {high:{form}}]" if low is not None and high is not None else ""
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _median(figures: Json | None, key: str) -> float | None:
    return figures[key]["median"] if figures and key in figures else None


def _peak(model: Json) -> float | None:
    known = "peak_bytes" in model and "idle_bytes" in model
    return _mega(model["peak_bytes"] - model["idle_bytes"]) if known else None


def _mega(count: float | None) -> float | None:
    return None if count is None else count / 1e6
