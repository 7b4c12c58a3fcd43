"""Quality against bytes: bits chosen by linear, one width for all, and fewer numbers, at equal stored bytes.

    python bench/pareto.py                                # all rows, then bench/results/pareto.{json,md}
    python bench/pareto.py --only mixed eltec-llama-8m 0.22 0 # one row in this process, printed

Bytes are a share of what the linears of the blocks take in bf16, scales counted; embeddings and head stay as they are.
`nearest` and `feedback` store all linears in the largest width that fits. Models, texts and windows are those of `quality.py`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from quality import CASES, RESULTS, ROWS, SEQ_LEN, WINDOWS

SHARES = (0.5, 0.35, 0.28, 0.22, 0.17)
MODELS = ("eltec-llama-8m", "stories260K")
HALF = 2  # bytes of a number in bf16
LABELS = {
    "nearest": "one width, rounded to the nearest",
    "feedback": "one width, rounded with feedback (GPTQ)",
    "mixed": "bits by linear (recipe `bits`)",
    "default": "fewer numbers in 16 bits (recipe `default`)",
}
WIDTHS = (8, 6, 5, 4, 3, 2)


def changes(row: str, model: Path, share: float) -> tuple[str, dict[str, Any]] | None:
    """Return the recipe of a row and what replaces its values; None where no width is small enough."""
    import lillama
    from lillama.lowrank.storage import Storage

    spec = lillama.plan(model, keep=1.0).plan.spec
    linears = sum(linear.params for linear in spec.linears)
    own = sum(linear.params * spec.itemsize(linear) for linear in spec.linears)
    most = spec.nbytes - own + int(share * HALF * linears)
    if row == "mixed":
        return "bits", {"bytes": most}
    if row == "default":
        return "default", {"bytes": most}
    for bits in WIDTHS:
        storage = Storage("plain", bits)
        taken = sum(storage.nbytes(one.out_features, one.in_features, None, spec.itemsize(one)) for one in spec.linears)
        if taken <= share * HALF * linears:
            own_storage = {"form": "plain", "bits": bits, "feedback": row == "feedback"}
            return "bits", {"ranks": {"name": "uniform"}, "keep": 1.0, "storage": own_storage}
    return None


def measure(row: str, name: str, share: float, seed: int) -> dict[str, Any]:
    """Make a model of a size and measure the excess loss."""
    import torch

    import lillama
    from lillama.errors import BudgetError
    from lillama.evaluation.agreement import Protocol, agreement

    torch.set_num_threads(1)
    case = CASES[name]
    made = changes(row, case.folder, share)
    entry: dict[str, Any] = {"row": row, "model": name, "share": share, "seed": seed, "excess": None, "bits": None}
    if made is None:
        return entry
    base, tree = made
    sources = [{"path": str(path)} for path in case.texts("calib")]
    calibration = {"sources": sources, "tokens": case.tokens, "seq_len": SEQ_LEN}
    recipe = lillama.load_recipe(base, {"seed": seed, "calibration": calibration, **tree})
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = lillama.compress(case.folder, Path(folder) / "out", recipe=recipe)
        except BudgetError:
            return entry
        protocol = Protocol(seq_len=SEQ_LEN, windows=WINDOWS, prompts=1)
        found = agreement(result.path, case.folder, case.texts("dev"), protocol)
        own = [bits for block in result.plan.spec for bits in result.plan.bits_within(block).values()]
    entry["excess"] = {one.name: one.as_json()["excess_loss"]["value"] for one in found}
    entry |= {"bytes": result.stored.bytes, "seconds": result.seconds, "kl": result.held_out.kl}
    return entry | {"bits": {str(bits): own.count(bits) for bits in sorted(set(own))}}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    text = (
        "# Quality against bytes\n\n"
        "Bytes of the linears of the blocks as a share of bf16, scales counted, the same limit for all rows of a column. "
        "Excess loss in nats on the dev texts, mean of the languages; of several seeds the mean. Calibration as in "
        "`bench/quality.py`. Nothing is trained but in `default`. Written by `python bench/pareto.py`.\n"
    )
    for model in MODELS:
        text += f"\n| `{model}` | {' | '.join(f'{share:g}' for share in SHARES)} |\n|---|{'---:|' * len(SHARES)}\n"
        for name, label in LABELS.items():
            cells = [_cell(rows, model, name, share) for share in SHARES]
            if any(cells):
                text += f"| {label} | {' | '.join(cells)} |\n"
    return text


def _cell(rows: list[dict[str, Any]], model: str, row: str, share: float) -> str:
    found = [one for one in rows if (one["model"], one["row"], one["share"]) == (model, row, share) and one["excess"]]
    if not found:
        return ""
    return f"{statistics.fmean(statistics.fmean(one['excess'].values()) for one in found):.4f}"


def write_tables() -> None:
    """Write what the finished rows say."""
    rows = [json.loads(path.read_text()) for path in sorted(ROWS.glob("pareto-*.json"))]
    (RESULTS / "pareto.json").write_text(json.dumps({"version": 1, "rows": rows}, indent=2) + "\n")
    (RESULTS / "pareto.md").write_text(table(rows))
    print(table(rows))


def main() -> None:
    """Run one row, or all in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs=4, metavar=("ROW", "MODEL", "SHARE", "SEED"))
    parser.add_argument("--tables", action="store_true", help="only write the tables again")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.only:
        row, model, share, seed = given.only
        text = json.dumps(measure(row, model, float(share), int(seed)), indent=2) + "\n"
        given.out.write_text(text) if given.out else print(text)
        return
    ROWS.mkdir(parents=True, exist_ok=True)
    for seed, model, row, share in product((0, 1, 2), MODELS, LABELS, SHARES) if not given.tables else ():
        out = ROWS / f"pareto-{model}-{row}-{share}-{seed}.json"
        if not out.is_file():
            command = [sys.executable, __file__, "--only", row, model, str(share), str(seed), "--out", str(out)]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            print(out.name, json.loads(out.read_text())["excess"], flush=True)
    write_tables()


if __name__ == "__main__":
    main()
