"""Compare recipes on equal terms: same model, calibration tokens, stored parameters and measure; one row each.

    python bench/quality.py                      # all rows at both sizes, then bench/results/quality.{json,md}
    python bench/quality.py --row default --keep 0.8 --out /tmp/row.json     # one row in this process

Every row runs in a process of its own with one thread, so that its peak memory is its own. A row whose file exists already
is not computed again; delete `bench/results/rows` to begin anew.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("LILLAMA_ASSETS", ROOT.parent / "shared" / "assets"))
MODEL = ASSETS / "models" / "eltec-llama-8m"
RESULTS = ROOT / "bench" / "results"
LANGUAGES = ("eng", "fra")
TOKENS, SEQ_LEN, KEEPS, SEED = 131_072, 256, (0.8, 0.6), 0

AA_SVD = {  # whitened init, block MSE on the student's stream (arXiv 2604.02119), its rate scaled from width 4096 to this
    "init": {"name": "whitened"},
    "distill": {"schedule": "sequential", "stream": "student", "loss": {"name": "mse"}, "batch_size": 32,
                "lr": 1e-4, "lr_width": 4096},
}  # fmt: skip
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "svd": ("plain truncated SVD", {"init": {"name": "svd"}, "distill": {"epochs": 0}}),
    "whitened": ("whitened SVD (SVD-LLM)", {"init": {"name": "whitened"}, "distill": {"epochs": 0}}),
    "paper": ("paper: joint, SVD init, L1 + cosine, lr 8.6e-5, one pass", {}),
    "paper-lr": ("paper, lr 1e-3", {"distill": {"lr": 1e-3}}),
    "aa-svd": ("whitened init + block MSE (AA-SVD), the default's passes", AA_SVD),
    "default": ("default", {}),
}


def recipe(row: str) -> Any:
    """Return the recipe of a row, on the common calibration text."""
    from lillama.recipe import load_recipe

    passes = load_recipe("default").distill.epochs
    sources = [{"path": str(ASSETS / "text" / f"{language}.calib.txt")} for language in LANGUAGES]
    common = {"scope": "blocks", "ranks": {"name": "uniform", "multiple_of": 8}, "seed": SEED,
              "calibration": {"sources": sources, "tokens": TOKENS, "seq_len": SEQ_LEN}}  # fmt: skip
    base = load_recipe("paper" if row.startswith("paper") else "default", common)
    changed = load_recipe(base, ROWS[row][1])
    return load_recipe(changed, {"distill": {"epochs": passes}}) if row == "aa-svd" else changed


def measure(row: str, keep: float) -> dict[str, Any]:
    """Compress by one recipe and measure the result."""
    import torch

    import lillama
    from lillama.resources import peak_memory

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        result = lillama.compress(MODEL, Path(folder) / "out", keep=keep, recipe=recipe(row))
        seconds, peak = time.process_time() - start, peak_memory()
        scores = _scores(result.path)
    return {
        "row": row,
        "name": ROWS[row][0],
        "keep_of_blocks": keep,
        "params": result.plan.kept_params,
        "bytes": result.plan.kept_bytes,
        "recipe": result.recipe.hash,
        "distill": result.recipe.as_dict()["distill"],
        "perplexity": scores,
        "cpu_seconds_per_million_tokens": seconds / TOKENS * 1e6,
        "peak_bytes": peak,
    }


def dense() -> dict[str, float]:
    """Measure the original."""
    import torch

    torch.set_num_threads(1)
    return _scores(MODEL)


def _scores(model: Path) -> dict[str, float]:
    import lillama

    texts = [ASSETS / "text" / f"{language}.dev.txt" for language in LANGUAGES]
    return {score.name: score.perplexity for score in lillama.perplexity(model, texts, seq_len=SEQ_LEN)}


def run_all() -> None:
    """Run every row in a process of its own and write the tables."""
    rows = RESULTS / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    jobs = [("dense", 1.0)] + [(row, keep) for keep in KEEPS for row in ROWS]
    for row, keep in jobs:
        out = rows / f"{row}-{keep}.json"
        if not out.is_file():
            command = [sys.executable, __file__, "--row", row, "--keep", str(keep), "--out", str(out)]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            print(out.name, "done", flush=True)
    original = json.loads((rows / "dense-1.0.json").read_text())
    found = [json.loads((rows / f"{row}-{keep}.json").read_text()) for row, keep in jobs[1:]]
    for entry in found:
        entry["excess"] = {name: math.log(value / original[name]) for name, value in entry["perplexity"].items()}
    value = {"version": 1, "model": MODEL.name, "calibration": [f"{x}.calib.txt" for x in LANGUAGES], "tokens": TOKENS,
             "seq_len": SEQ_LEN, "seed": SEED, "dense": original, "rows": found}  # fmt: skip
    (RESULTS / "quality.json").write_text(json.dumps(value, indent=2) + "\n")
    (RESULTS / "quality.md").write_text(table(value))
    print(table(value))


def table(value: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    perplexities = ", ".join(f"{name} {ppl:.3f}" for name, ppl in value["dense"].items())
    text = (
        f"# Recipes compared on {value['model']}\n\n"
        f"Calibrated on {' and '.join(value['calibration'])}, half each, {value['tokens']:,} tokens in sequences of "
        f"{value['seq_len']}; uniform ranks, equal stored parameters, seed {value['seed']}; one thread of a shared CPU.\n"
        f"Excess loss = ln(perplexity) - ln(perplexity of the original), whole dev texts in windows of {value['seq_len']}. "
        f"Perplexity of the original: {perplexities}. Written by `python bench/quality.py`.\n"
    )
    for keep in KEEPS:
        rows = [row for row in value["rows"] if row["keep_of_blocks"] == keep]
        text += f"\n## {keep:.0%} of the block parameters kept ({rows[0]['params']:,} parameters in all)\n\n"
        text += "| recipe | passes | excess eng | excess fra | CPU s per million tokens | peak memory, MB |\n"
        text += "|---|---:|---:|---:|---:|---:|\n"
        for row in rows:
            excess = " | ".join(f"{row['excess'][f'{language}.dev']:.4f}" for language in LANGUAGES)
            text += (
                f"| {row['name']} | {row['distill']['epochs']} | {excess} | {row['cpu_seconds_per_million_tokens']:,.0f} | "
                f"{row['peak_bytes'] / 1e6:,.0f} |\n"
            )
    return text


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=["dense", *ROWS])
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.row is None:
        run_all()
        return
    value = dense() if arguments.row == "dense" else measure(arguments.row, arguments.keep)
    text = json.dumps(value, indent=2) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
