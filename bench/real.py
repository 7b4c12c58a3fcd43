"""Recipes compared on three real models on equal terms: SmolLM2-135M, Whisper-base, all-MiniLM-L6-v2.

    python bench/real.py                                       # all rows that are missing, then bench/results/real.{json,md}
    python bench/real.py --model minilm --only default 0.8     # one row, in this process
    python bench/real.py --part valid                          # what choices are made on
    python bench/real.py --limit 2 --tokens 4096               # a rehearsal, with rows and tables of its own
    python bench/real.py --tables                              # only write the tables again

The models come from `python bench/models.py NAME`, the texts, tasks and recordings from `$LILLAMA_ASSETS`. A row whose file
exists already is not computed again; one that failed is tried anew. Every row gets the same calibration tokens and the bytes
that plain factors with uniform ranks take at its share of the block parameters. Needs `lm_eval`, `jiwer`, `soundfile` and
`espeak-ng`. Ends with status 2 where something is not there, with 1 where a row failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lillama.cli.process import quieten
from lillama.errors import LillamaError
from lillama.files.atomic import write_json
from lillama.recipes.options import parse_duration
from real_models.cases import CASES, KEEPS, Case, Job, Place, Setting, jobs
from real_models.rows import ROWS, Order
from real_models.tables import page

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("LILLAMA_ASSETS", ROOT.parent / "shared" / "assets"))
RESULTS = ROOT / "bench" / "results"
OUT = RESULTS / "rows" / "real"


def row_file(job: Job, setting: Setting, place: Place) -> Path:
    """Return where a row lies when it is done; rows of another setting lie in another folder."""
    return place.out / setting.name / f"{job.name}.json"


def compute(job: Job, setting: Setting, place: Place) -> dict[str, Any]:
    """Make a model as a row says, measure it, and return the row."""
    import torch
    import transformers

    import lillama
    from lillama.model.checkpoint import CheckpointReader
    from lillama.runs.result import environment
    from lillama.system.resources import pick_device
    from real_models import language, sentences, speech

    transformers.utils.logging.disable_progress_bar()
    case, row = CASES[job.model], ROWS[job.row]
    kind = {"language": language, "sentences": sentences, "speech": speech}[case.kind]
    device, tokens = pick_device(place.device), setting.tokens or case.tokens
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    names = [Path(source["path"]).name for source in case.sources]
    entry = vars(job) | {
        "part": setting.part,
        "limit": setting.limit,
        "calibration": {"sources": names, "tokens": tokens, "seq_len": case.seq_len},
        "device": {"name": name, "threads": torch.get_num_threads()},
        "environment": environment(),
        "seconds": None,
    }
    with tempfile.TemporaryDirectory() as folder:
        model, dense = case.folder, None
        if row.make is not None:
            model, dense = Path(folder) / "out", case.folder
            calibration = {"sources": kind.calibration(case, place, tokens), "tokens": tokens, "seq_len": case.seq_len}
            plain = lillama.plan(dense, recipe="baselines/svd", keep=job.keep, scope="blocks").plan
            order = Order(dense, job.keep, plain.kept_bytes, calibration, job.seed, place.device, job.time)
            start = time.monotonic()
            told = row.make(order, model)
            entry |= {**told, "seconds": time.monotonic() - start, "allowed_bytes": plain.kept_bytes}
        reader = CheckpointReader(model)
        entry.setdefault("bytes", sum(reader.nbytes(name) for name in reader.names))
        entry["measured"] = kind.measure(case, setting, place, model, dense)
    return entry


def is_done(file: Path) -> bool:
    """Tell whether a row was computed; one that failed was not."""
    return file.is_file() and "reason" not in json.loads(file.read_text(encoding="utf-8"))


def run_one(job: Job, setting: Setting, place: Place) -> int:
    """Compute a row in this process unless it is done, print it, and return a status."""
    file = row_file(job, setting, place)
    if not is_done(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            entry = compute(job, setting, place)
        except LillamaError as error:
            entry = vars(job) | {"reason": str(error)}
        write_json(file, entry)
    found = json.loads(file.read_text(encoding="utf-8"))
    print(json.dumps(found, indent=2))
    return 1 if "reason" in found else 0


def run_all(cases: Iterable[Case], setting: Setting, place: Place, seed: int, seconds: str | None) -> int:
    """Compute the rows that are missing, each in a process of its own, write the tables, and return a status."""
    status = 0
    for case in cases:
        reason = case.lacking(setting.part, place.assets)
        if reason is not None:
            print(f"error: {reason}", file=sys.stderr)
            status = 2
            continue
        for job in jobs(case, ROWS, seed, seconds):
            if not is_done(row_file(job, setting, place)):
                status = max(status, run_apart(job, setting, place))
    write_tables(setting, place.out)
    return status


def run_apart(job: Job, setting: Setting, place: Place) -> int:
    """Compute a row in a process of its own; what ends that is written down in its place."""
    options = {"--part": setting.part, "--limit": setting.limit, "--tokens": setting.tokens, "--time": job.time}
    options |= {"--seed": job.seed, "--device": place.device, "--out": place.out}
    words = [word for key, value in options.items() if value is not None for word in (key, str(value))]
    call = [sys.executable, __file__, "--model", job.model, "--only", job.row, str(job.keep), *words]
    file = row_file(job, setting, place)
    file.unlink(missing_ok=True)
    ran = subprocess.run(
        call, stdout=subprocess.DEVNULL, check=False, env=os.environ | {"LILLAMA_ASSETS": str(place.assets)}
    )
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, vars(job) | {"reason": f"its process ended with status {ran.returncode}"})
    entry = json.loads(file.read_text(encoding="utf-8"))
    print(job.name, entry.get("reason") or json.dumps(entry["measured"]), flush=True)
    return 1 if "reason" in entry else 0


def write_tables(setting: Setting, out: Path) -> None:
    """Write what the finished rows of a setting say: beside the other results, or beside the rows if these lie elsewhere."""
    files = sorted((out / setting.name).glob("*.json"))
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    folder, name = RESULTS if out == OUT else out, "real" if setting == Setting() else f"real-{setting.name}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", {"version": 1, "setting": vars(setting), "rows": rows})
    (folder / f"{name}.md").write_text(page(rows, setting), encoding="utf-8")
    print(page(rows, setting))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(CASES), help="its rows alone")
    parser.add_argument("--only", nargs=2, metavar=("ROW", "KEEP"), help="one row of --model, in this process")
    parser.add_argument("--part", choices=("test", "valid"), default="test", help="what is measured on")
    parser.add_argument(
        "--limit", type=_positive, help="documents, windows, prompts, utterances, sentences: a rehearsal"
    )
    parser.add_argument("--tokens", type=_positive, help="of calibration, for every model [its own number]")
    parser.add_argument("--time", help="that the row `default` may take, as `lillama compress --time` [what it takes]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="an accelerator if there is one, by default")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="of the rows")
    parser.add_argument("--tables", action="store_true", help="only write the tables again")
    given = parser.parse_args(words)
    if given.only:
        row, keep = given.only
        known = {(job.row, job.keep) for case in CASES.values() for job in jobs(case, ROWS, 0, None)}
        if given.model is None or (row, _number(keep)) not in known:
            sizes = " or ".join(map(str, KEEPS))
            parser.error(f"--only wants --model, a row of {', '.join(ROWS)}, and {sizes} (1.0 for the original)")
    return given


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def main(words: list[str] | None = None) -> int:
    """Do what the command line asks for, and return the status to end with."""
    given = parse(words)
    setting, place = Setting(given.part, given.limit, given.tokens), Place(ASSETS, given.out.absolute(), given.device)
    if given.tables:
        write_tables(setting, place.out)
        return 0
    try:
        if given.time is not None:
            parse_duration(given.time)
    except LillamaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    cases = [CASES[given.model]] if given.model else list(CASES.values())
    if given.only is None:
        return run_all(cases, setting, place, given.seed, given.time)
    reason = cases[0].lacking(setting.part, place.assets)
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    row, keep = given.only
    return run_one(
        Job(given.model, row, float(keep), given.seed, given.time if ROWS[row].timed else None), setting, place
    )


if __name__ == "__main__":
    quieten()
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing comes from a hub
    sys.exit(main())
