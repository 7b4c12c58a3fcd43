"""Figures about what was measured: texts, minimal pairs, speed; and several compressions side by side."""

from collections.abc import Sequence

from lillama.report.evidence import Evidence, Json
from lillama.report.figure import Cell, Figure
from lillama.report.rows import Pair, bars, dumbbells
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
        rows.append(
            (
                one["name"],
                "perplexity",
                against.get("perplexity"),
                one["perplexity"],
                _bounds(against.get("excess_loss")),
            )
        )
        for key, name in (("kl", "KL, nats"), ("top1", "same top token")):
            if key in against:
                rows.append((one["name"], name, None, against[key]["value"], _bounds(against[key])))
    for one in tasks:
        against = one.get("against", {})
        rows.append(
            (one["task"], one["metric"], against.get("value"), one["value"], _bounds(against.get("difference")))
        )
    columns = ("text or task", "measure", "original", "compressed", "difference and 95 % interval")
    return Figure("evaluation", "Evaluation", "The difference of a perplexity is that of the loss, in nats a token.",
                  (), columns, tuple(rows))  # fmt: skip


def probing(evidence: Evidence) -> Figure | None:
    """Draw the accuracies on minimal pairs, original against compressed, for each group of each benchmark."""
    plots, rows = [], list[tuple[Cell, ...]]()
    for found in evidence.probes:
        groups = next(iter(found["breakdowns"].values()), [])
        groups = [group for group in groups if group["score"] is not None]
        total = {"label": "overall", "items": found["items"], "score": found["overall"],
                 "dense": (found.get("compared") or {}).get("dense")}  # fmt: skip
        pairs = [Pair(str(group["label"]), group["dense"], group["score"]) for group in (total, *groups)]
        name = found["benchmark"]
        plots.append(titled(name, dumbbells(f"Accuracy on {name}", pairs, found.get("chance", 0.5))))
        rows += [(name, str(group["label"]), group["items"], _percent(group["dense"]), _percent(group["score"]))
                 for group in (total, *groups)]  # fmt: skip
    if not plots:
        return None
    return Figure(
        "probing", "Minimal pairs", "Share of pairs in which the right text is the likelier one; the dashed line is chance.",
        tuple(plots), ("benchmark", "group", "items", "original, %", "compressed, %"), tuple(rows),
    )  # fmt: skip


def speed(evidence: Evidence) -> Figure | None:
    """Draw tokens per second, memory and bytes on disk."""
    found = evidence["bench"]
    if not found:
        return None
    own, other = found["model"], found.get("against", {})
    plots, rows = [], list[tuple[Cell, ...]]()
    for key, name in SPEEDS:
        pairs = [Pair(f"{cell['batch']} x {cell['prompt']}", _median(cell.get("against"), key), _median(cell["model"], key))
                 for cell in found["cells"]]  # fmt: skip
        plots.append(titled(f"{name}, batch x prompt", bars(f"Speed of {name}", "tokens/s", pairs)))
        rows += [(f"{name}, {pair.label}, tokens/s", pair.dense, pair.kept) for pair in pairs]
    memory = [Pair("peak memory", _peak(other), _peak(own)),
              Pair("on disk", _mega(other.get("disk_bytes")), _mega(own["disk_bytes"]))]  # fmt: skip
    plots.append(titled("memory", bars("Memory and bytes on disk", "MB", memory)))
    rows += [(f"{pair.label}, MB", pair.dense, pair.kept) for pair in memory]
    conditions = ", ".join(f"{key} {value}" for key, value in found["conditions"].items())
    return Figure("speed", "Speed and memory", f"Medians. {conditions}.", tuple(plots),
                  ("measure", "original", "compressed"), tuple(rows))  # fmt: skip


def compared(all_: Sequence[Evidence]) -> Figure | None:
    """Draw the quality of several compressions against their size."""
    finished = [evidence for evidence in all_ if evidence.finished]
    if len(all_) < 2 or not finished:
        return None
    points = [(one.name, 100 * one["metrics"]["keep"], one["metrics"]["held_out"]["kl"]) for one in finished]
    lines = [Line(name, [(keep, divergence)], "kept", marks=True, label=True) for name, keep, divergence in points]
    texts = list(dict.fromkeys(text["name"] for evidence in finished for text in evidence["metrics"]["texts"]))
    axes = Axes("parameters kept, %", "KL, nats", zero_y=True, width=640, height=280)
    return Figure(
        "compared", "Quality against size",
        "Divergence from the original on held-out calibration text; each was measured on its own calibration text.",
        (chart("Divergence against the share of parameters kept", axes, lines),),
        ("model", "parameters kept, %", "KL, nats", "loss rise, nats", *(f"perplexity, {name}" for name in texts)),
        tuple(_compared_row(evidence, texts) for evidence in finished), legend=(),
    )  # fmt: skip


def _compared_row(evidence: Evidence, texts: Sequence[str]) -> tuple[Cell, ...]:
    metrics = evidence["metrics"]
    scores = {text["name"]: text["after"]["perplexity"] for text in metrics["texts"]}
    change = metrics["held_out"]
    return (evidence.name, 100 * metrics["keep"], change["kl"], change["rise"], *(scores.get(name) for name in texts))


def _bounds(found: Json | None) -> str:
    if not found:
        return ""
    low, high = found.get("low"), found.get("high")
    return f"{found['value']:+.4f}" + (f" [{low:+.4f}, {high:+.4f}]" if low is not None and high is not None else "")


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _median(figures: Json | None, key: str) -> float | None:
    return figures[key]["median"] if figures else None


def _peak(model: Json) -> float | None:
    return _mega(model["peak_bytes"] - model["idle_bytes"]) if model else None


def _mega(count: float | None) -> float | None:
    return None if count is None else count / 1e6
