"""A benchmark of several hidden sizes, each in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def by_size(
    script: str,
    sizes: Iterable[int],
    measure: Callable[[int], dict[str, Any]],
    table: Callable[[list[dict[str, Any]]], str],
) -> None:
    """Measure each hidden size in a process of its own, or the one that the command line names in this one.

    The caches of `torch.compile` begin empty in these processes.

    Args:
        script: path of the benchmark; its results are named like it.
        sizes: to measure.
        measure: returns the figures of a size.
        table: turns the figures of all sizes into Markdown.
    """
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]))))
        return
    found: list[dict[str, Any]] = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as empty:
            done = subprocess.run(
                [sys.executable, script, str(size)], check=True, stdout=subprocess.PIPE, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": empty},
            )  # fmt: skip
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(found[-1], flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = Path(script).stem
    (RESULTS / f"{name}.json").write_text(json.dumps({"version": 1, "sizes": found}, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(table(found))
    print(table(found))
