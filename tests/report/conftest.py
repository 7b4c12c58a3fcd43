"""A run folder and a result, written by hand: reports read artefacts alone, so no model is needed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

KINDS = {"attn.q_proj": (32, 32, 8), "mlp.up_proj": (48, 32, None)}
BLOCKS = [f"layers.{index}" for index in range(3)]


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def put_shape(run: Path) -> None:
    linears = [(f"{block}.{kind}", *shape) for block in BLOCKS for kind, shape in KINDS.items()]
    spec = [
        {"name": block, "index": index, "params": 2560, "linears": [{"name": f"{block}.{kind}"} for kind in KINDS]}
        for index, block in enumerate(BLOCKS)
    ]
    put(run / "spec.json", {"version": 1, "architecture": "Toy", "params": 10_000, "blocks": spec})
    plan = [{"name": name, "out": out, "in": width, "rank": rank} for name, out, width, rank in linears]
    put(run / "plan.json", {"version": 1, "linears": plan})
    save_file({name: np.linspace(3, 0.1, 32) for name, *_ in linears}, run / "spectra.safetensors")


def put_teaching(run: Path) -> None:
    for index, block in enumerate(BLOCKS):
        rows = [[0, 0.5, 0.6], [4, 0.4, 0.5], [8, 0.3, 0.4]]
        log = {"version": 1, "block": block, "steps": 8, "tokens": 800, "initial": 1.1, "final": 0.7 + index,
               "improved": True, "best_step": 8, "retried": False, "curve": rows, "held_out": rows,
               "singular": {"mlp.up_proj": [1.0, 1.1]}}  # fmt: skip
        put(run / "blocks" / f"{index:04}.json", log)
    recipe = {"ranks": {"name": "adaptive"}, "recover": {"epochs": 1}, "seed": 0}
    put(run / "run.json", {"version": 1, "identity": {"recipe": recipe, "plan": "by spectra"}})
    candidates = [{"share": share, "kl": 0.1} for share in (0.0, 1.0)]
    put(run / "allocation.json", {"version": 1, "chosen": 1.0, "candidates": candidates})
    manifest = {"kind": "self", "sources": [], "tokens": 100_000, "wanted": 100_000, "seq_len": 64}
    put(run / "calibration" / "manifest.json", manifest)
    held_out = [[0, 0.2, 2.0, 1.0], [8, 0.1, 1.9, 1.0]]
    log = {"improved": True, "stopped": "", "grown": {}, "curve": [[1, 0.2, 2.0]], "held_out": held_out}
    put(run / "recovered" / "log.json", log)


def put_measures(run: Path) -> None:
    spread = {"min": 1.0, "median": 2.0, "max": 3.0}
    speeds = {"prefill_tokens_per_second": spread, "decode_tokens_per_second": spread}
    model = {"name": "toy", "numbers": 8000, "disk_bytes": 16_000, "peak_bytes": 90_000, "idle_bytes": 40_000}
    cells = [{"batch": 1, "prompt": 64, "new": 8, "model": speeds, "against": speeds}]
    put(
        run / "bench.json",
        {"version": 1, "conditions": {"device": "cpu"}, "model": model, "against": model, "cells": cells},
    )
    interval = {"value": 0.1, "low": 0.0, "high": 0.2}
    sample = {"prompt": "The cat", "same": " sat on", "dense": " the mat.", "model": " a <mat>."}
    samples = [sample, {"prompt": "A dog", "same": " ran.\nIt", "dense": "", "model": ""}]
    against = {"perplexity": 9.0, "excess_loss": interval, "kl": interval, "top1": interval,
               "continuation": {"prompts": 2, "samples": samples}}  # fmt: skip
    text = {"name": "novel", "tokens": 100, "perplexity": 10.0, "bits_per_byte": 1.0, "against": against}
    task = {
        "task": "quiz",
        "metric": "acc",
        "documents": 9,
        "value": 0.5,
        "against": {"value": 0.4, "difference": interval},
    }
    put(run / "evaluation.json", {"version": 1, "texts": [text], "tasks": [task]})
    group = {"label": "agreement", "items": 200, "score": 0.8, "dense": 0.9}
    probe = {"benchmark": "toy-pairs", "items": 200, "overall": 0.8, "chance": 0.5, "compared": {"dense": 0.9},
             "breakdowns": {"phenomenon": [group]}}  # fmt: skip
    put(run / "probe.json", {"version": 1, "results": [probe]})


def put_result(out: Path, run: Path) -> None:
    score = {"perplexity": 10.0, "bits_per_byte": 1.0}
    texts = [{"name": "novel", "tokens": 100, "before": score, "after": score | {"perplexity": 10.1}}]
    result = {"version": 1, "path": str(out), "run": str(run), "keep": 0.8, "texts": texts, "seconds": 60.0,
              "params": {"dense": 10_000, "kept": 8_000}, "bytes": {"dense": 20_000, "kept": 16_000}, "peak_bytes": 10**6,
              "held_out": {"kl": 0.02, "rise": 0.01}, "environment": {"lillama": "0.1.0"}}  # fmt: skip
    put(out / "lillama.json", result)
    put(run / "metrics.json", result)
    (out / "README.md").write_text("# toy, 80% of its parameters\n", encoding="utf-8")


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A run folder whose model is not assembled yet."""
    run = tmp_path / "small.run"
    put_shape(run)
    put_teaching(run)
    return run


@pytest.fixture
def out(unfinished: Path) -> Path:
    """A result, with its run folder and all that the other commands print."""
    folder = unfinished.with_name("small")
    put_result(folder, unfinished)
    put_measures(unfinished)
    return folder


@pytest.fixture
def finish(unfinished: Path) -> Callable[[], None]:
    """Return what ends the unfinished run."""
    return lambda: put_result(unfinished.with_name("small"), unfinished)
