"""Change one choice of the default recipe at a time: what does it cost or bring?

    python bench/ablation.py                       # all rows, then bench/results/ablation.{json,md}
    python bench/ablation.py --row stream-both     # one row in this process

The same model and texts as `quality.py`, with a quarter of the tokens and the first 100,000 characters of each dev text: small
enough to be run again whenever a choice is in doubt. 80 % of the block parameters kept.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from quality import ASSETS, LANGUAGES, MODEL, RESULTS, SEED

TOKENS, SEQ_LEN, KEEP, CHARACTERS = 32_768, 256, 0.8, 100_000
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("default", {}),
    "init-svd": ("plain SVD init", {"init": {"name": "svd"}}),
    "stream-both": ("both streams (twice the work)", {"distill": {"stream": "both"}}),
    "stream-teacher": ("teacher's stream", {"distill": {"stream": "teacher"}}),
    "loss-l1-cosine": ("published loss, L1 + cosine", {"distill": {"loss": {"name": "l1-cosine"}}}),
    "loss-token-mse": ("squared error relative to each token", {"distill": {"loss": {"name": "token-mse"}}}),
    "lr-half": ("half the learning rate", {"distill": {"lr": 1e-3}}),
    "lr-double": ("twice the learning rate", {"distill": {"lr": 4e-3}}),
    "batch-32": ("batches of 32 sequences", {"distill": {"batch_size": 32}}),
    "schedule-joint": ("joint schedule", {"distill": {"schedule": "joint"}}),
}


def scores(model: Path) -> dict[str, float]:
    """Return the negative log-likelihood of the shortened dev texts."""
    import lillama

    with tempfile.TemporaryDirectory() as folder:
        texts = []
        for language in LANGUAGES:
            whole = (ASSETS / "text" / f"{language}.dev.txt").read_text(encoding="utf-8")
            texts.append(Path(folder) / f"{language}.dev.txt")
            texts[-1].write_text(whole[:CHARACTERS], encoding="utf-8")
        return {score.name: score.nll for score in lillama.perplexity(model, texts, seq_len=SEQ_LEN)}


def measure(row: str) -> dict[str, Any]:
    """Compress with one choice changed and measure the excess loss."""
    import torch

    import lillama
    from lillama.recipe import load_recipe

    torch.set_num_threads(1)
    sources = [{"path": str(ASSETS / "text" / f"{language}.calib.txt")} for language in LANGUAGES]
    calibration = {"sources": sources, "tokens": TOKENS, "seq_len": SEQ_LEN}
    recipe = load_recipe("default", {"scope": "blocks", "seed": SEED, "calibration": calibration} | ROWS[row][1])
    with tempfile.TemporaryDirectory() as folder:
        result = lillama.compress(MODEL, Path(folder) / "out", keep=KEEP, recipe=recipe)
        after, before = scores(result.path), scores(MODEL)
    excess = {name: after[name] - before[name] for name in before}
    return {"row": row, "name": ROWS[row][0], "excess": excess, "params": result.plan.kept_params}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    text = (
        f"# One choice changed at a time, on {MODEL.name}\n\n"
        f"{KEEP:.0%} of the block parameters kept, {TOKENS:,} calibration tokens (half English, half French) in sequences of "
        f"{SEQ_LEN}, seed {SEED}. Excess loss in nats on the first {CHARACTERS:,} characters of each dev text. "
        "Written by `python bench/ablation.py`.\n\n"
        "| change | excess eng | excess fra | mean against default |\n|---|---:|---:|---:|\n"
    )
    means = {row["row"]: math.fsum(row["excess"].values()) / len(row["excess"]) for row in rows}
    for row in rows:
        values = " | ".join(f"{row['excess'][f'{language}.dev']:.4f}" for language in LANGUAGES)
        text += f"| {row['name']} | {values} | {means[row['row']] / means['default'] - 1:+.0%} |\n"
    return text


def main() -> None:
    """Run one row, or all in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=list(ROWS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.row:
        text = json.dumps(measure(arguments.row), indent=2) + "\n"
        arguments.out.write_text(text) if arguments.out else print(text)
        return
    folder = RESULTS / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    for row in ROWS:
        out = folder / f"ablation-{row}.json"
        if not out.is_file():
            subprocess.run([sys.executable, __file__, "--row", row, "--out", str(out)], check=True)
            print(row, "done", flush=True)
    rows = [json.loads((folder / f"ablation-{row}.json").read_text()) for row in ROWS]
    (RESULTS / "ablation.json").write_text(json.dumps({"version": 1, "rows": rows}, indent=2) + "\n")
    (RESULTS / "ablation.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
