"""What a range finder saves against decomposing a whole matrix, and stacks of matrices against one after the other.

    python bench/decompositions.py            # writes bench/results/decompositions.{json,md}; a minute or two

On the accelerator if there is one, otherwise on one CPU thread; medians by the clock.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lillama.lowrank.eigen import FAR_BELOW, eigh, krylov
from lillama.system.resources import pick_device

RESULTS = Path(__file__).resolve().parent / "results"
SIDES, PARTS, REPEATS = (512, 1024, 2048), (64, 32, 16), 3
STACKS = ((64, 128), (16, 512), (4, 1024))
SINGULAR: dict[str, Callable[[Tensor], Tensor]] = {"1/i": lambda i: 1 / i, "1/sqrt(i)": lambda i: i**-0.5}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a run, after one that does not count."""
    taken: list[float] = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def matrices(side: int, device: torch.device) -> dict[str, Tensor]:
    """Return symmetric matrices by how the singular values of their roots fall; those of `random` are of a Gaussian one."""
    generator = torch.Generator().manual_seed(side)
    weight = torch.randn(side, side, generator=generator, dtype=torch.float64).to(device)
    q, i = torch.linalg.qr(weight)[0], torch.arange(1, side + 1, dtype=torch.float64, device=device)
    found = {name: (q * fall(i).square()) @ q.T for name, fall in SINGULAR.items()}
    return found | {"random": weight @ weight.T / side}


def range_finder(device: torch.device) -> list[dict[str, Any]]:
    """Compare the range finder with the whole decomposition."""
    rows: list[dict[str, Any]] = []
    for side in SIDES:
        for name, matrix in matrices(side, device).items():
            values, whole = eigh(matrix)[0], seconds(lambda matrix=matrix: eigh(matrix), device)
            for part in PARTS:
                rank = side // part
                found = krylov(matrix, rank)
                least, excess = values[:-rank].sum(), None
                if found is not None:
                    excess = ((matrix.trace() - (found * (matrix @ found)).sum()) / least - 1).item()
                taken = seconds(lambda matrix=matrix, rank=rank: krylov(matrix, rank), device)
                rows.append(
                    {"side": side, "singular": name, "part": part, "whole": whole, "found": taken, "excess": excess}
                )
    return rows


def stacked(device: torch.device) -> list[dict[str, Any]]:
    """Compare stacks of matrices with the same matrices one after the other."""
    rows: list[dict[str, Any]] = []
    for count, side in STACKS:
        stack = torch.stack(list(matrices(side, device).values()))[torch.arange(count) % 3]
        alone = seconds(lambda stack=stack: [eigh(matrix) for matrix in stack], device)
        rows.append({"count": count, "side": side, "alone": alone, "stacked": seconds(lambda s=stack: eigh(s), device)})
    return rows


def table(device: torch.device, found: list[dict[str, Any]], stacks: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    place = "one CPU thread" if device.type == "cpu" else torch.cuda.get_device_name(device)
    text = (
        f"# Decompositions\n\nfp64, on {place}; medians of {REPEATS}, by the clock.\n"
        "Written by `python bench/decompositions.py`.\n\n"
        "Leading eigenvectors of symmetric matrices whose roots have singular values that fall as named. Excess: what the\n"
        "vectors that were found leave beyond the least error; none where the residual was too large, and the whole matrix is\n"
        f"decomposed after all. Compressing looks for them up to a rank of 1/{FAR_BELOW} of the side.\n\n"
        "| side | singular values | rank / side | whole, s | range finder, s | ratio | excess |\n"
        "|---:|---|---:|---:|---:|---:|---:|\n"
    )
    for row in found:
        excess = "not taken" if row["excess"] is None else f"{max(0.0, row['excess']):.0e}"
        text += (
            f"| {row['side']} | {row['singular']} | 1/{row['part']} | {row['whole']:.3f} | {row['found']:.3f} "
            f"| {row['whole'] / row['found']:.1f} | {excess} |\n"
        )
    text += "\nStacks:\n\n| matrices | side | one by one, s | stacked, s | ratio |\n|---:|---:|---:|---:|---:|\n"
    for row in stacks:
        ratio = row["alone"] / row["stacked"]
        text += f"| {row['count']} | {row['side']} | {row['alone']:.3f} | {row['stacked']:.3f} | {ratio:.2f} |\n"
    return text


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    device = pick_device(None)
    found, stacks = range_finder(device), stacked(device)
    RESULTS.mkdir(parents=True, exist_ok=True)
    values = {"version": 1, "device": str(device), "range_finder": found, "stacks": stacks}
    (RESULTS / "decompositions.json").write_text(json.dumps(values, indent=2) + "\n")
    (RESULTS / "decompositions.md").write_text(table(device, found, stacks))
    print(table(device, found, stacks))


if __name__ == "__main__":
    main()
