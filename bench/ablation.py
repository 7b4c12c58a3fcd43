"""Each part of the default recipe switched off alone, and switched on alone: what does it bring?

    python bench/ablation.py                            # all rows, then bench/results/ablation.{json,md}
    python bench/ablation.py --only no-recovery 0       # one row in this process, printed

The same model, texts and sizes as `quality.py`, with fewer tokens and the first 100,000 characters of each dev text: small
enough to be run again whenever a choice is in doubt. All rows take the same bytes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from quality import CASES, RESULTS, ROWS, SEQ_LEN

CASE, TOKENS, KEEP, CHARACTERS, SEEDS = CASES["eltec-llama-8m"], 16_384, 0.6, 100_000, (0, 1)
UNIFORM, PLAIN, WHITENED = (
    {"ranks": {"name": "uniform"}},
    {"storage": {"form": "plain"}},
    {"init": {"name": "whitened"}},
)
NO_TAIL = {"recover": {"epochs": 0}}
BASE = UNIFORM | PLAIN | WHITENED | NO_TAIL  # local distillation alone
DEFAULT: dict[str, Any] = {}
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("default", DEFAULT),
    "no-allocation": ("- adaptive ranks (uniform)", UNIFORM),
    "no-narrow": ("- narrower FFNs (ranks alone)", {"ranks": {"name": "adaptive", "narrow": False}}),
    "no-pivot": ("- pivot storage (plain factors)", PLAIN),
    "local": ("+ local distillation of every block", {"distill": {"blocks": "all"}}),
    "no-recovery": ("- recovery tail", NO_TAIL),
    "no-two-sided": ("- two-sided whitening (one-sided)", WHITENED),
    "base": ("local distillation alone: uniform, plain, whitened", BASE),
    "only-allocation": ("+ adaptive ranks", BASE | {"ranks": {"name": "adaptive"}}),
    "only-pivot": ("+ pivot storage", BASE | {"storage": {"form": "pivot"}}),
    "only-recovery": ("+ recovery tail", BASE | {"recover": {"epochs": 8}}),
    "only-two-sided": ("+ two-sided whitening", BASE | {"init": {"name": "two-sided"}}),
    "only-look-ahead": ("+ look-ahead 0.5", BASE | {"distill": {"look_ahead": 0.5}}),
    "only-sub-blocks": ("+ loss by sub-block 0.3", BASE | {"distill": {"sub_blocks": 0.3}}),
    "only-adaptive-target": ("+ adaptive target 0.5", BASE | {"distill": {"adaptive": 0.5}}),
    "only-norm": ("+ norm term 0.1", BASE | {"distill": {"norm": 0.1}}),
    "local-look-ahead": ("+ local distillation, look-ahead 0.5", {"distill": {"blocks": "all", "look_ahead": 0.5}}),
    "local-sub-blocks": (
        "+ local distillation, loss by sub-block 0.3",
        {"distill": {"blocks": "all", "sub_blocks": 0.3}},
    ),
    "local-adaptive-target": (
        "+ local distillation, adaptive target 0.5",
        {"distill": {"blocks": "all", "adaptive": 0.5}},
    ),
    "local-norm": ("+ local distillation, norm term 0.1", {"distill": {"blocks": "all", "norm": 0.1}}),
    "local-l1-cosine": (
        "+ local distillation, published loss",
        {"distill": {"blocks": "all", "loss": {"name": "l1-cosine"}}},
    ),
}


def measure(row: str, seed: int) -> dict[str, Any]:
    """Compress with one choice changed and measure the excess loss."""
    import torch

    import lillama
    from lillama.recipes.recipe import load_recipe

    torch.set_num_threads(1)
    sources = [{"path": str(path)} for path in CASE.texts("calib")]
    calibration = {"sources": sources, "tokens": TOKENS, "seq_len": SEQ_LEN}
    recipe = load_recipe("default", {"scope": "blocks", "seed": seed, "calibration": calibration} | CHANGES[row][1])
    plain = lillama.plan(CASE.folder, recipe="baselines/svd", keep=KEEP, scope="blocks").plan
    with tempfile.TemporaryDirectory() as folder:
        result = lillama.compress(CASE.folder, Path(folder) / "out", recipe=recipe, nbytes=plain.kept_bytes)
        after, before = _losses(result.path, Path(folder)), _losses(CASE.folder, Path(folder))
    excess = {name: after[name] - before[name] for name in before}
    return {"ablation": row, "seed": seed, "excess": excess, "bytes": result.stored.bytes}


def _losses(model: Path, folder: Path) -> dict[str, float]:
    """Return the mean negative log-likelihood of the shortened dev texts."""
    import lillama

    texts = []
    for path in CASE.texts("dev"):
        texts.append(folder / path.name)
        texts[-1].write_text(path.read_text(encoding="utf-8")[:CHARACTERS], encoding="utf-8")
    return {score.name: score.nll for score in lillama.perplexity(model, texts, seq_len=SEQ_LEN)}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    text = (
        f"# Parts of the default switched off and on, on {CASE.name}\n\n"
        f"{KEEP:.0%} of the block parameters in plain factors, the same bytes for all rows; {TOKENS:,} calibration tokens "
        f"(half English, half French) in sequences of {SEQ_LEN}. Excess loss in nats on the first {CHARACTERS:,} characters of "
        "each dev text, averaged over the two; seeds in the columns. Written by `python bench/ablation.py`.\n\n"
        f"| change | {' | '.join(f'seed {seed}' for seed in SEEDS)} | mean | against default |\n"
        f"|---|{'---:|' * (len(SEEDS) + 2)}\n"
    )
    found = {(row["ablation"], row["seed"]): statistics.fmean(row["excess"].values()) for row in rows}
    means = {name: [found[name, seed] for seed in SEEDS if (name, seed) in found] for name in CHANGES}
    for name, (label, _) in CHANGES.items():
        if means[name]:
            cells = " | ".join(f"{found[name, seed]:.4f}" if (name, seed) in found else "" for seed in SEEDS)
            same = [found["default", seed] for seed in SEEDS if (name, seed) in found]
            change = statistics.fmean(means[name]) / statistics.fmean(same) - 1
            text += f"| {label} | {cells} | {statistics.fmean(means[name]):.4f} | {change:+.0%} |\n"
    return text


def write_tables() -> None:
    """Write what the finished rows say."""
    rows = [json.loads(path.read_text()) for path in sorted(ROWS.glob("ablation-*.json"))]
    (RESULTS / "ablation.json").write_text(json.dumps({"version": 2, "tokens": TOKENS, "rows": rows}, indent=2) + "\n")
    (RESULTS / "ablation.md").write_text(table(rows))
    print(table(rows))


def main() -> None:
    """Run one row, or all in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs=2, metavar=("ROW", "SEED"))
    parser.add_argument("--tables", action="store_true", help="only write the tables again")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.only:
        text = json.dumps(measure(given.only[0], int(given.only[1])), indent=2) + "\n"
        given.out.write_text(text) if given.out else print(text)
        return
    ROWS.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS if not given.tables else ():
        for row in CHANGES:
            out = ROWS / f"ablation-{row}-{seed}.json"
            if not out.is_file():
                command = [sys.executable, __file__, "--only", row, str(seed), "--out", str(out)]
                subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                print(out.name, json.loads(out.read_text())["excess"], flush=True)
    write_tables()


if __name__ == "__main__":
    main()
