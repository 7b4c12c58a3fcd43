"""Finished rows as Markdown: a table for each model, what the default is worth beside the baselines, what is missing."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from real_models.cases import CASES, Case, Setting, jobs
from real_models.rows import OWN, ROWS

Entry = Mapping[str, Any]

AVERAGE, LAMBADA = "average", "lambada_openai"


def page(rows: Sequence[Entry], setting: Setting) -> str:
    """Return the tables of all models.

    Args:
        rows: of this setting.
        setting: that they share.
    """
    text = (
        "# Recipes compared on three real models\n\nWritten by `python bench/real.py`. All rows of a model have the same "
        "calibration tokens and may store the same bytes: what plain factors with uniform ranks take at that share of the "
        "block parameters. In brackets 95% intervals, by the bootstrap over windows, prompts, documents, utterances or "
        f"sentences.\n\n{measured_on(setting)}\n"
    )
    return text + "".join(section(case, [row for row in rows if row["model"] == case.name]) for case in CASES.values())


def measured_on(setting: Setting) -> str:
    """Return what was measured, in a sentence."""
    part = {"test": "which is reported", "valid": "which choices are made on, and which is not reported"}
    text = f"Part `{setting.part}`, {part[setting.part]}."
    if setting.tokens is not None:
        text += f" Calibrated on {setting.tokens:,} tokens."
    if setting.limit is not None:
        text += (
            f" **A rehearsal: at most {setting.limit} documents of each task, windows and prompts of each text, utterances "
            "of each kind, sentences. Its figures say nothing of the recipes.**"
        )
    return text


def section(case: Case, rows: Sequence[Entry]) -> str:
    """Return one model's part of the page."""
    text = f"\n## {case.name}\n" + (f"\n{case.note}\n" if case.note else "")
    done = sorted((row for row in rows if "reason" not in row), key=_place)
    if done:
        text += "\n" + table(case, done) + (ratios(done) if case.kind == "language" else "")
    return text + absent(case, rows)


def table(case: Case, rows: Sequence[Entry]) -> str:
    """Return the finished rows of a model as a table."""
    cells = {"language": language_cells, "speech": speech_cells, "sentences": sentence_cells}[case.kind]
    parts = [[part(row) for row in rows] for part in (named_cells, cells, lambda row: origin_cells(row, case))]
    head = list(dict.fromkeys(name for part in parts for one in part for name in one))
    lines = [named | measured | origin for named, measured, origin in zip(*parts, strict=True)]
    text = f"| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}\n"
    return text + "".join(f"| {' | '.join(line.get(name, '') for name in head)} |\n" for line in lines)


def named_cells(row: Entry) -> dict[str, str]:
    """Return what says which row it is."""
    title = ROWS[row["row"]].title + (f" within {row['time']}" if row["time"] else "")
    return {"recipe": title, "kept": f"{row['keep']:.0%}", "MB": f"{row['bytes'] / 1e6:.1f}"}


def origin_cells(row: Entry, case: Case) -> dict[str, str]:
    """Return how a row came about."""
    device, unit = row["device"], "utterances" if case.kind == "speech" else "tokens"
    return {
        f"calibration {unit}": f"{row['calibrated_on']:,}" if "calibrated_on" in row else "",
        "s": f"{row['seconds']:,.0f}" if row["seconds"] is not None else "",
        "seed": str(row["seed"]),
        "where": f"{device['name']}, threads: {device['threads']}",
    }


def language_cells(row: Entry) -> dict[str, str]:
    """Return the measures of a language model."""
    cells: dict[str, str] = {}
    texts, tasks = row["measured"]["texts"], row["measured"]["tasks"]
    for text in texts:
        cells[f"perplexity, {text['name']}"] = f"{text['perplexity']:,.2f}"
        cells[f"excess, {text['name']}"] = interval(text["against"]["excess_loss"], ".4f") if "against" in text else ""
    written = [text["against"]["continuation"] for text in texts if "against" in text]
    cells |= {"same leading tokens": "", "repeated 4-grams (original)": ""}
    if written and None not in written:
        cells["same leading tokens"] = f"{fmean(one['leading']['value'] for one in written):.1%}"
        own, original = (fmean(one["repetition"][role] for one in written) for role in ("model", "dense"))
        cells["repeated 4-grams (original)"] = f"{own:.1%} ({original:.1%})"
    for task in tasks:
        if (task["task"], task["metric"]) == (LAMBADA, "acc"):
            cells["LAMBADA"] = interval(task, ".1%")
            dense = task["against"]["value"] if "against" in task else task["value"]
            cells["of the original's"] = f"{task['value'] / dense:.0%}" if dense else ""
        if task["task"] == AVERAGE:
            cells[f"mean of {9 - len(row['measured']['absent_tasks'])} tasks"] = interval(task, ".1%")
    return cells


def speech_cells(row: Entry) -> dict[str, str]:
    """Return the measures of a speech model."""
    cells: dict[str, str] = {}
    for name, found in row["measured"].items():
        cells[f"word error rate, {name}"] = interval(found["word_error_rate"], ".1%")
        cells[f"points more, {name}"] = interval(found["points"], "+.2f") if "points" in found else ""
    return cells


def sentence_cells(row: Entry) -> dict[str, str]:
    """Return the measures of a sentence encoder."""
    found, names = row["measured"], {"cosine": "cosine to the original's", "nearest": "same nearest sentence"}
    cells = {"sentences": str(found["sentences"])}
    return cells | {names[key]: interval(found[key], form) if key in found else "" for key, form in _FORMS.items()}


_FORMS = {"cosine": ".4f", "nearest": ".1%"}


def ratios(rows: Sequence[Entry]) -> str:
    """Return what the default's excess loss is of that of the best baseline, of the same size and seed, on each text."""
    lines: list[str] = []
    for own in (row for row in rows if row["row"] == OWN):
        same = [row for row in rows if (row["keep"], row["seed"]) == (own["keep"], own["seed"])]
        losses = {row["row"]: excess(row) for row in same if ROWS[row["row"]].baseline}
        if not losses:
            continue
        found: list[str] = []
        for text, loss in excess(own).items():
            best = min(losses, key=lambda name: losses[name][text])
            beaten = losses[best][text]
            ratio = f"**{loss / beaten:.2f}**" if beaten > 0 else "no ratio, for that loses nothing"
            found.append(f"{text} {ratio} ({ROWS[best].title})")
        name = named_cells(own)
        lines.append(f"- {name['recipe']} at {name['kept']}, seed {own['seed']}: {', '.join(found)}\n")
    return f"\nExcess loss of the default over that of the best baseline here:\n\n{''.join(lines)}" if lines else ""


def excess(row: Entry) -> dict[str, float]:
    """Return text -> excess loss."""
    return {text["name"]: text["against"]["excess_loss"]["value"] for text in row["measured"]["texts"]}


def absent(case: Case, rows: Sequence[Entry]) -> str:
    """Return which rows are not there, and which tasks, a line each."""
    lines = [f"Failed: {_title(row)}: {row['reason']}" for row in sorted(rows, key=_place) if "reason" in row]
    known = {_key(row) for row in rows}
    wanted = [job for seed in sorted({row["seed"] for row in rows} or {0}) for job in jobs(case, ROWS, seed, None)]
    left = [_title(vars(job)) for job in wanted if _key(vars(job)) not in known]
    lines += [f"Not computed: {'; '.join(left)}."] if left else []
    tasks = dict.fromkeys(task for row in rows for task in row.get("measured", {}).get("absent_tasks", ()))
    lines += [f"Tasks of the paper whose documents are not at hand: {', '.join(tasks)}."] if tasks else []
    return "".join(f"\n{line}\n" for line in lines)


def interval(value: Mapping[str, float | None], form: str) -> str:
    """Return a value with its bounds, if it has any."""
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:{form}}"
    return f"{value['value']:{form}} ({value['low']:{form}} to {value['high']:{form}})"


def _title(row: Entry) -> str:
    return f"{ROWS[row['row']].title} at {row['keep']:.0%}, seed {row['seed']}"


def _key(row: Entry) -> tuple[str, float, int]:
    return row["row"], row["keep"], row["seed"]


def _place(row: Entry) -> tuple[float, int, int, str]:
    return -row["keep"], list(ROWS).index(row["row"]), row["seed"], row["time"] or ""
