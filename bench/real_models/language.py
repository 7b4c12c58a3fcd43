"""A language model beside its original: texts, greedy continuations, tasks."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lillama.evaluation.agreement import Protocol
from lillama.evaluation.evaluate import evaluate
from lillama.evaluation.harness import METRICS
from lillama.evaluation.tasks import score_tasks
from lillama.files.atomic import atomic_file
from real_models.cases import INSTRUCTIONS, Case, Place, Setting
from real_models.tasks import load_tasks, present

PROMPTS = 64  # of each text


def calibration(case: Case, place: Place, tokens: int) -> list[dict[str, Any]]:
    """Return the sources of calibration text; instructions are put together with their answers first."""
    found = []
    for source in case.sources:
        file = place.assets / source["path"]
        path = write_answered(file, place.out / file.name) if source["path"] == INSTRUCTIONS else file
        found.append({**source, "path": str(path)})
    return found


def write_answered(file: Path, out: Path) -> Path:
    """Write each instruction of a file with its inputs and answers as one text, and return the file of these."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    parts = [
        [row["instruction"], *(one[key] for one in row["instances"] for key in ("input", "output"))] for row in rows
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as temporary:
        lines = (json.dumps({"text": "\n".join(filter(None, texts))}) + "\n" for texts in parts)
        temporary.write_text("".join(lines), encoding="utf-8")
    return out


def measure(case: Case, setting: Setting, place: Place, model: Path, dense: Path | None) -> dict[str, Any]:
    """Measure a model on texts, and on tasks in the part `test`.

    Args:
        case: with the texts.
        setting: part and limit.
        place: of the texts and tasks.
        model: folder of the model.
        dense: folder of the original; None for the original itself.
    """
    limit, texts = setting.limit, [place.assets / file for file in case.measured[setting.part]]
    protocol = Protocol(windows=limit, prompts=PROMPTS if limit is None else limit)
    found = evaluate(model, texts, against=dense, protocol=protocol, device=place.device).as_json()["texts"]
    data = place.assets / "eval"
    names = present(data) if setting.part == "test" else []
    with TemporaryDirectory() as folder:
        tasks = load_tasks(names, data, Path(folder))
        scores = score_tasks(model, tasks, dense, limit=limit, device=place.device) if tasks else []
    absent = [name for name in METRICS if name not in names] if setting.part == "test" else []
    return {"texts": found, "tasks": [score.as_json() for score in scores], "absent_tasks": absent}
