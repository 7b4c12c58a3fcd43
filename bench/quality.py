"""Compare recipes on equal terms: same model, calibration tokens, stored bytes and measure; one row for each seed.

    python bench/quality.py                      # all rows, then bench/results/quality.{json,md,png}
    python bench/quality.py --model stories260K --only default 0.8 0          # one row, printed

Every row runs in a process of its own with one thread. A row whose file exists already is not computed again; delete
`bench/results/rows` to begin anew. The size of every row is what plain factors with uniform ranks take at that share of the
block parameters; recipes that store their weights otherwise get the same bytes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("LILLAMA_ASSETS", ROOT.parent / "shared" / "assets"))
RESULTS = ROOT / "bench" / "results"
ROWS, SAMPLES = RESULTS / "rows", RESULTS / "samples"
SEQ_LEN, WINDOWS, KEEPS = 256, 160, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
LONG = "aa-svd-25"
EVERYWHERE = ("default", "aa-svd", "svd-llm", "paper-lr")  # at every size and seed
ONCE = ("default-8bit", LONG)  # at every size, with one seed
COMPARED = ("svd-llm", "aa-svd", LONG, "paper", "paper-lr")  # the best of these is the baseline of the goals


@dataclass(frozen=True)
class Case:
    """A model and its texts.

    Attributes:
        name: of its folder.
        tokens: of calibration.
        seeds: of the rows that are run with several.
        first: shares of the blocks that the goals are about, which come first.
    """

    name: str
    tokens: int
    seeds: tuple[int, ...] = (0, 1, 2)
    first: tuple[float, ...] = (0.8, 0.6)

    @property
    def folder(self) -> Path:
        """Return where the model lies."""
        return ASSETS / "models" / self.name

    def texts(self, part: str) -> list[Path]:
        """Return the text files to calibrate on (`calib`) or to measure on (`dev`)."""
        if self.name == "stories260K":
            return [sampled(self.folder, part)]
        return [ASSETS / "text" / f"{language}.{part}.txt" for language in ("eng", "fra")]

    def jobs(self) -> Iterable[tuple[str, float, int]]:
        """Yield row, share of the blocks, seed; what the goals are about comes first."""
        keeps = (*self.first, *(keep for keep in KEEPS if keep not in self.first))
        one, *others = self.seeds
        yield from ((row, keep, one) for keep in keeps for row in (*EVERYWHERE, *ONCE))
        yield from ((row, keep, seed) for keep in keeps for seed in others for row in EVERYWHERE)
        yield from ((row, keep, one) for keep in self.first for row in RECIPES if row not in (*EVERYWHERE, *ONCE))


CASES = {case.name: case for case in (Case("eltec-llama-8m", 32_768), Case("stories260K", 65_536))}
RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "svd": ("plain SVD", "baselines/svd", {}),
    "asvd": ("ASVD, without its search", "baselines/asvd", {}),
    "svd-llm": ("SVD-LLM", "baselines/svd-llm", {}),
    "paper": ("paper, its rate of 8.6e-5", "paper", {"ranks": {"name": "uniform", "multiple_of": 8}}),
    "paper-lr": ("paper, rate 1e-3", "paper", {"distill": {"lr": 1e-3}}),
    "aa-svd": ("AA-SVD, 4 epochs", "baselines/aa-svd", {"distill": {"epochs": 4}}),
    "aa-svd-25": ("AA-SVD, its 25 epochs", "baselines/aa-svd", {}),
    "default": ("default", "default", {}),
    "default-8bit": ("default, factors in 8 bits", "default", {"storage": {"bits": 8}}),
}


def sampled(folder: Path, part: str) -> Path:
    """Return a text that a model has written itself: 512 sequences to calibrate on, 128 others to measure on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, (count, seed) = SAMPLES / f"{folder.name}.{part}.txt", {"calib": (512, 1), "dev": (128, 2)}[part]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        torch.manual_seed(seed)
        start = torch.full((count, 1), model.config.bos_token_id)
        ids = model.generate(start, max_new_tokens=SEQ_LEN, do_sample=True, temperature=1.0, top_k=0,
                             attention_mask=torch.ones_like(start), pad_token_id=0)  # fmt: skip
        stories = tokenizer.batch_decode(ids, skip_special_tokens=True)
        path.write_text("\n\n".join(story.strip() for story in stories) + "\n", encoding="utf-8")
    return path


def measure(case: Case, row: str, keep: float, seed: int) -> dict[str, Any]:
    """Compress by one recipe and measure the result."""
    import torch

    import lillama
    from lillama.evaluation.agreement import Protocol, agreement
    from lillama.recipes.recipe import load_recipe
    from lillama.system.resources import peak_memory

    torch.set_num_threads(1)
    _, base, changes = RECIPES[row]
    sources = [{"path": str(path)} for path in case.texts("calib")]
    common = {
        "scope": "blocks",
        "seed": seed,
        "calibration": {"sources": sources, "tokens": case.tokens, "seq_len": SEQ_LEN},
    }
    recipe = load_recipe(load_recipe(base, changes), common)
    plain = lillama.plan(case.folder, recipe="baselines/svd", keep=keep, scope="blocks").plan
    size = {"keep": keep} if recipe.storage.form == "plain" else {"nbytes": plain.kept_bytes}
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        result = lillama.compress(case.folder, Path(folder) / "out", recipe=recipe, **size)
        seconds, peak = time.process_time() - start, peak_memory()
        found = agreement(
            result.path, case.folder, case.texts("dev"), Protocol(seq_len=SEQ_LEN, windows=WINDOWS, prompts=64)
        )
    values = [one.as_json() for one in found]
    names = [one.name for one in found]
    return {
        "model": case.name,
        "row": row,
        "keep_of_blocks": keep,
        "seed": seed,
        "params": result.stored.params,
        "bytes": result.stored.bytes,
        "allowed_bytes": plain.kept_bytes,
        "recipe": result.recipe.hash,
        "excess": {name: value["excess_loss"]["value"] for name, value in zip(names, values, strict=True)},
        "against": dict(zip(names, values, strict=True)),
        "cpu_seconds": seconds,
        "peak_bytes": peak,
    }


def mean_excess(entry: dict[str, Any]) -> float:
    """Return the excess loss, averaged over the texts."""
    return statistics.fmean(entry["excess"].values())


def run_all(cases: Iterable[Case]) -> None:
    """Run every row in a process of its own, and write tables and plot."""
    ROWS.mkdir(parents=True, exist_ok=True)
    for case in cases:
        for row, keep, seed in case.jobs():
            out = ROWS / f"{case.name}-{row}-{keep}-{seed}.json"
            if not out.is_file():
                only = ["--model", case.name, "--only", row, str(keep), str(seed), "--out", str(out)]
                subprocess.run([sys.executable, __file__, *only], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                print(out.name, round(mean_excess(json.loads(out.read_text())), 4), flush=True)
    write_tables()


def write_tables() -> None:
    """Write what the finished rows say."""
    found = [json.loads(path.read_text()) for path in sorted(ROWS.glob("*.json"))]
    found = [entry for entry in found if "keep_of_blocks" in entry]
    settings = {case.name: {"tokens": case.tokens, "seq_len": SEQ_LEN} for case in CASES.values()}
    (RESULTS / "quality.json").write_text(
        json.dumps({"version": 2, "models": settings, "rows": found}, indent=2) + "\n"
    )
    text = "# Recipes compared at equal stored bytes\n\nWritten by `python bench/quality.py`.\n"
    for case in CASES.values():
        text += table(case, [entry for entry in found if entry["model"] == case.name])
    (RESULTS / "quality.md").write_text(text)
    plot(found, RESULTS / "quality.png")
    print(text)


def table(case: Case, rows: list[dict[str, Any]]) -> str:
    """Return the results of one model as Markdown."""
    text = (
        f"\n## {case.name}\n\nCalibrated on {case.tokens:,} tokens of "
        f"{' and '.join(path.name for path in case.texts('calib'))} in sequences of {SEQ_LEN}. Excess loss = ln(perplexity) - "
        f"ln(perplexity of the original) on {' and '.join(path.name for path in case.texts('dev'))}, at most {WINDOWS} "
        "windows spread evenly over each, averaged over the texts; "
        "mean over the seeds, their number and largest distance from the mean in brackets.\n\n"
        f"| recipe | {' | '.join(f'{keep:.0%}' for keep in KEEPS)} | CPU s at 80% |\n|---|{'---:|' * (len(KEEPS) + 1)}\n"
    )
    for row, (name, _, _) in RECIPES.items():
        cells = [
            _cell([entry for entry in rows if entry["row"] == row and entry["keep_of_blocks"] == k]) for k in KEEPS
        ]
        seconds = [entry["cpu_seconds"] for entry in rows if entry["row"] == row and entry["keep_of_blocks"] == 0.8]
        text += f"| {name} | {' | '.join(cells)} | {f'{statistics.fmean(seconds):,.0f}' if seconds else ''} |\n"
    ratios = [_ratio(rows, keep) for keep in KEEPS]
    text += f"| **default / best of SVD-LLM, AA-SVD (4 and 25 epochs), paper** | {' | '.join(ratios)} | |\n"
    text += "\nWhat the models write: greedy continuations of 64 prompts a text by 32 tokens, seed 0.\n\n"
    text += (
        "| recipe | kept | same leading tokens | wholly equal | repeated 4-grams (original) | top-1 agreement | KL |\n"
    )
    text += "|---|---:|---:|---:|---:|---:|---:|\n"
    for row, (name, _, _) in RECIPES.items():
        for keep in (0.8, 0.6):
            text += _written(name, [e for e in rows if (e["row"], e["keep_of_blocks"], e["seed"]) == (row, keep, 0)])
    return text


def _cell(entries: list[dict[str, Any]]) -> str:
    values = [mean_excess(entry) for entry in entries]
    if not values:
        return ""
    mean = statistics.fmean(values)
    spread = max(abs(value - mean) for value in values)
    return f"{mean:.4f}" + (f" ({len(values)}: {spread:.4f})" if len(values) > 1 else "")


def _ratio(rows: list[dict[str, Any]], keep: float) -> str:
    """Return the default's excess over that of the best other recipe, each time on the seeds that both were run with."""
    found = {(e["row"], e["seed"]): mean_excess(e) for e in rows if e["keep_of_blocks"] == keep}
    own = {seed for row, seed in found if row == "default"}
    ratios = [
        statistics.fmean(found["default", seed] for seed in seeds)
        / statistics.fmean(found[row, seed] for seed in seeds)
        for row in COMPARED
        if (seeds := {seed for other, seed in found if other == row} & own)
    ]
    return f"**{max(ratios):.2f}**" if ratios else ""


def _written(name: str, entries: list[dict[str, Any]]) -> str:
    if not entries:
        return ""
    (entry,) = entries
    texts = list(entry["against"].values())
    both = [text["continuation"] for text in texts]
    if any(one is None for one in both):
        return ""

    def mean(values: Iterable[float]) -> float:
        return statistics.fmean(values)

    leading, equal = (mean(one[key]["value"] for one in both) for key in ("leading", "equal"))
    own, original = (mean(one["repetition"][key] for one in both) for key in ("model", "dense"))
    top1, kl = (mean(text[key]["value"] for text in texts) for key in ("top1", "kl"))
    return (
        f"| {name} | {entry['keep_of_blocks']:.0%} | {leading:.1%} | {equal:.1%} | {own:.1%} ({original:.1%}) | {top1:.1%} | "
        f"{kl:.4f} |\n"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw excess loss against stored size, one panel for each model; what lost nothing has no place on the log axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [case.name for case in CASES.values() if any(entry["model"] == case.name for entry in rows)]
    figure, panels = plt.subplots(1, len(names), figsize=(6.2 * len(names), 4.6), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        for index, (row, (label, _, _)) in enumerate(RECIPES.items()):
            means = {keep: [mean_excess(e) for e in rows if _key(e) == (name, row, keep)] for keep in KEEPS}
            points = [(keep, statistics.fmean(values)) for keep, values in means.items() if values]
            points = [(keep, mean) for keep, mean in points if mean > 0]
            if points:
                bold = (
                    {"linewidth": 2.4, "color": "black"}
                    if row == "default"
                    else {"linewidth": 1.2, "color": f"C{index}"}
                )
                panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label, **bold)
        panel.set(
            title=name, xlabel="bytes kept, as a share of the blocks", ylabel="excess loss, nats a token", yscale="log"
        )
        panel.grid(alpha=0.3, which="both")
        panel.invert_xaxis()
    handles = {
        label: line for panel in panels[0] for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.tight_layout()
    figure.legend(
        list(handles.values()), list(handles), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=5
    )
    figure.savefig(path, dpi=130, bbox_inches="tight")


def _key(entry: dict[str, Any]) -> tuple[str, str, float]:
    return entry["model"], entry["row"], entry["keep_of_blocks"]


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(CASES))
    parser.add_argument("--only", nargs=3, metavar=("ROW", "KEEP", "SEED"))
    parser.add_argument("--tables", action="store_true", help="only write the tables and the plot again")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.tables:
        write_tables()
    elif given.only is None:
        run_all([CASES[given.model]] if given.model else CASES.values())
    else:
        row, keep, seed = given.only
        text = json.dumps(measure(CASES[given.model], row, float(keep), int(seed)), indent=2) + "\n"
        given.out.write_text(text) if given.out else print(text)


if __name__ == "__main__":
    main()
