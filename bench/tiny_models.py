"""Small trained models of five kinds, made smaller by `paper` and `default`: how much of their score is left?

    python bench/tiny_models.py                              # train what is missing, all rows, then the tables
    python bench/tiny_models.py --only phi default 0.8       # one row, printed
    python bench/tiny_models.py --tables                     # only write the tables again

Language models learn from the English training text, the Whisper from what espeak-ng speaks of it; they lie in
`bench/results/tiny` as ordinary model folders and are trained once (`--retrain` begins anew). Beside each lies the same model
before training: what compression does to it shows nothing, which its tables are there to show. Needs `jiwer` and, to train,
`espeak-ng`; with `mambapy` the Mamba takes a quarter of the time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny.goals import Checked, plan_goals, score_goals

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("LILLAMA_ASSETS", ROOT.parent / "shared" / "assets"))
RESULTS = ROOT / "bench" / "results"
MODELS = RESULTS / "tiny"
ROWS, SPEECH = MODELS / "rows", MODELS / "speech"
KINDS, KEEPS, TOKENS, SEQ_LEN = ("mixtral", "mamba", "gpt2", "phi", "whisper"), (0.8, 0.6), 32_768, 128
FAR, CONTROLLED = 0.3, ("default", "paper")  # far enough that a model which shrinks easily shows a loss
RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "default": ("default", "default", {}),
    "paper": ("paper, its rate of 8.6e-5", "paper", {}),
    "paper-lr": ("paper, rate 1e-3", "paper", {"distill": {"lr": 1e-3}}),
}

HEAD = (
    "# Small trained models of five kinds\n\nWritten by `python bench/tiny_models.py`. About a million parameters each, "
    f"trained for some minutes on one core; 20% and 40% of the block parameters are removed, and {1 - FAR:.0%} to see it "
    f"hurt. Language models calibrate on {TOKENS:,} tokens of eng.calib.txt in sequences of {SEQ_LEN} and predict those of "
    f"eng.dev.txt; the Whisper calibrates on {TOKENS // SEQ_LEN} spoken phrases and writes down others, none of which was "
    "heard in training. Share retained: of the original's next-token accuracy. Excess loss: nats a token, or a spoken word. In "
    "brackets 95% intervals, by the bootstrap over windows or utterances.\n\n"
)
CONTROL = (
    "\nThe same models with the weights that training began with. They predict nothing, so there is nothing to lose: shares "
    "near 100% and excess losses near 0 in these tables say nothing for a method.\n"
)


@dataclass(frozen=True)
class Job:
    """One row: a model, a recipe, and the share of the block parameters that it keeps."""

    model: str
    recipe: str
    keep: float

    @property
    def file(self) -> Path:
        """Return where the row lies when it is done."""
        return ROWS / f"{self.model}-{self.recipe}-{self.keep}.json"


def jobs(kinds: tuple[str, ...]) -> Iterator[Job]:
    """Yield the rows: the sizes of the goals first, then what they are to be seen against."""
    yield from (Job(kind, recipe, keep) for kind in kinds for recipe in RECIPES for keep in KEEPS)
    for kind in kinds:
        yield from (Job(kind, recipe, FAR) for recipe in CONTROLLED)
        yield from (Job(f"{kind}-random", recipe, keep) for recipe in CONTROLLED for keep in KEEPS)


def train(kind: str) -> None:
    """Train the model of a kind; it and its beginning lie in `MODELS` then."""
    import torch

    from tiny import speech, text_models

    torch.set_num_threads(1)
    if kind != "whisper":
        text_models.make(text_models.KINDS[kind], MODELS / kind, ASSETS)
        return
    if not (SPEECH / "train" / "metadata.jsonl").is_file():
        speech.speak(SPEECH, ASSETS)
    speech.make(MODELS / kind, SPEECH)


def measure(job: Job) -> dict[str, Any]:
    """Make a model smaller and compare it with the original."""
    import torch

    import lillama
    from lillama.recipes.recipe import load_recipe
    from tiny import score

    torch.set_num_threads(1)
    spoken, dense = job.model.startswith("whisper"), MODELS / job.model
    source = SPEECH / "calib" if spoken else ASSETS / "text" / "eng.calib.txt"
    calibration = {"sources": [{"path": str(source)}], "tokens": TOKENS, "seq_len": SEQ_LEN}
    _, base, changes = RECIPES[job.recipe]
    recipe = load_recipe(load_recipe(base, changes), {"scope": "blocks", "calibration": calibration})
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        result = lillama.compress(dense, Path(folder) / "out", recipe=recipe, keep=job.keep)
        seconds = time.process_time() - start
        found = (
            score.written_words(result.path, dense, SPEECH / "dev")
            if spoken
            else score.next_tokens(result.path, dense, ASSETS / "text" / "eng.dev.txt")
        )
    spec = result.plan.spec
    return {
        "params": {"dense": spec.params, "blocks": spec.block_params, "kept": result.stored.params},
        "score": found,
        "cpu_seconds": seconds,
    }


def attempted(job: Job) -> dict[str, Any]:
    """Return a row, or the reason why there is none."""
    from lillama import LillamaError

    entry: dict[str, Any] = {"model": job.model, "recipe": job.recipe, "keep": job.keep}
    try:
        return entry | measure(job)
    except LillamaError as error:
        return entry | {"reason": str(error)}


def run_all(kinds: tuple[str, ...], retrain: bool) -> None:
    """Train and compute what is missing, kind after kind, each row in a process of its own; write the tables."""
    ROWS.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        if retrain or not (MODELS / kind / "config.json").is_file():
            for file in ROWS.glob(f"{kind}-*.json"):
                file.unlink()
            _run("--train", kind).check_returncode()
        for job in jobs((kind,)):
            if not job.file.is_file() or "reason" in json.loads(job.file.read_text()):
                run(job)
        write_tables()
    print((RESULTS / "tiny_models.md").read_text())


def run(job: Job) -> None:
    """Compute one row in a process of its own; what stops it is written down in its place."""
    ran = _run("--only", job.model, job.recipe, str(job.keep), "--out", str(job.file), stderr=subprocess.PIPE)
    if ran.returncode:
        entry = {"model": job.model, "recipe": job.recipe, "keep": job.keep}
        entry["reason"] = (ran.stderr.strip().splitlines() or ["killed"])[-1]
        job.file.write_text(json.dumps(entry, indent=2) + "\n")
    print(job.file.stem, json.dumps(json.loads(job.file.read_text())), flush=True)


def _run(*options: str, stderr: int | None = None) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, __file__, *options], os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, stderr=stderr, text=True, env=environment)


def write_tables() -> None:
    """Write what the finished rows say, and the checks of the goals."""
    rows = [json.loads(job.file.read_text()) for job in jobs(KINDS) if job.file.is_file()]
    goals = [*score_goals(rows, tuple(RECIPES)), *plan_goals()]
    checked = [one.as_json() for one in goals]
    found = {"version": 1, "tokens": TOKENS, "seq_len": SEQ_LEN, "rows": rows, "goals": checked}
    (RESULTS / "tiny_models.json").write_text(json.dumps(found, indent=2) + "\n")
    (RESULTS / "tiny_models.md").write_text(page(rows, goals))


def page(rows: list[dict[str, Any]], goals: list[Checked]) -> str:
    """Return all tables as Markdown."""
    parts: dict[str, list[dict[str, Any]]] = {"Trained": [], "Not trained: the control": []}
    for row in rows:
        parts["Not trained: the control" if row["model"].endswith("-random") else "Trained"].append(row)
    text = HEAD + goal_table(goals)
    for title, those in parts.items():
        text += f"\n## {title}\n" + (CONTROL if title != "Trained" else "")
        text += language_table([row for row in those if not row["model"].startswith("whisper")])
        text += speech_table([row for row in those if row["model"].startswith("whisper")])
    return text


def goal_table(goals: list[Checked]) -> str:
    """Return the checks of the goals as Markdown."""
    marks = {True: "pass", False: "**fail**", None: "open"}
    lines = "".join(f"| {one.goal} | {one.found} | {marks[one.met]} |\n" for one in goals)
    return f"| goal | found | |\n|---|---|---|\n{lines}"


def language_table(rows: list[dict[str, Any]]) -> str:
    """Return what language models keep as Markdown."""

    def cells(row: dict[str, Any]) -> list[str]:
        score = row["score"]
        perplexity, accuracy = score["perplexity"], score["accuracy"]
        return [
            f"{perplexity['dense']:,.1f} → {perplexity['model']:,.1f}", f"{accuracy['dense']:.2%} → {accuracy['model']:.2%}",
            interval(score["retained"], ".1%"), interval(score["excess"], ".4f"), f"{score['same']['value']:.1%}",
        ]  # fmt: skip

    measures = ["perplexity", "next-token accuracy", "share retained", "excess loss", "same as the original"]
    return _table(rows, measures, cells)


def speech_table(rows: list[dict[str, Any]]) -> str:
    """Return what speech models keep as Markdown."""

    def cells(row: dict[str, Any]) -> list[str]:
        rate = row["score"]["word_error_rate"]
        points, excess = interval(row["score"]["points"], "+.2f"), interval(row["score"]["excess"], ".4f")
        return [f"{rate['dense']:.1%} → {rate['model']:.1%}", points, excess]

    return _table(rows, ["word error rate", "points more", "excess loss"], cells)


def _table(rows: list[dict[str, Any]], measures: list[str], cells: Callable[[dict[str, Any]], list[str]]) -> str:
    if not rows:
        return ""
    head = ["model", "parameters (in blocks)", "recipe", "blocks kept", *measures, "CPU s"]
    text = f"\n| {' | '.join(head)} |\n|---|---:|---|---:|{'---:|' * (len(measures) + 1)}\n"
    for row in rows:
        found = [f"not supported: {row['reason']}", *[""] * len(measures)]
        if "reason" not in row:
            found = [*cells(row), f"{row['cpu_seconds']:,.0f}"]
        name = [row["model"], _params(row), RECIPES[row["recipe"]][0], f"{row['keep']:.0%}"]
        text += f"| {' | '.join([*name, *found])} |\n"
    return text


def _params(row: dict[str, Any]) -> str:
    return f"{row['params']['dense']:,} ({row['params']['blocks']:,})" if "params" in row else ""


def interval(value: dict[str, float], form: str) -> str:
    """Return a value with its interval, as text."""
    return f"{value['value']:{form}} ({value['low']:{form}} to {value['high']:{form}})"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=KINDS, help="train and compute this kind alone")
    parser.add_argument("--only", nargs=3, metavar=("MODEL", "RECIPE", "KEEP"), help="one row in this process")
    parser.add_argument("--retrain", action="store_true", help="train anew what is there already")
    parser.add_argument("--train", choices=KINDS, help="only train this kind")
    parser.add_argument("--tables", action="store_true", help="only write the tables again")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.tables:
        write_tables()
    elif given.train:
        train(given.train)
    elif given.only is None:
        run_all((given.model,) if given.model else KINDS, given.retrain)
    else:
        model, recipe, keep = given.only
        text = json.dumps(attempted(Job(model, recipe, float(keep))), indent=2) + "\n"
        given.out.write_text(text) if given.out else print(text)


if __name__ == "__main__":
    main()
