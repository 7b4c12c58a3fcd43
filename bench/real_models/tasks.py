"""Tasks of the lm-evaluation-harness over local files: its own definitions, with the data taken from the assets."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from lillama.evaluation.harness import METRICS, Task, find_tasks


@dataclass(frozen=True)
class Local:
    """A task whose documents lie in a file.

    Attributes:
        definition: of the harness, below its folder of tasks.
        file: with the documents, JSON lines.
        changes: keys that replace those of the definition, for documents in other fields than it expects.
    """

    definition: str
    file: str
    changes: dict[str, Any] = field(default_factory=dict)


TASKS = {
    "lambada_openai": Local("lambada/lambada_openai.yaml", "lambada_openai.jsonl"),
    "arc_challenge": Local("arc/arc_challenge.yaml", "arc_challenge.jsonl"),
    "arc_easy": Local("arc/arc_easy.yaml", "arc_easy.jsonl"),
    "piqa": Local("piqa/piqa.yaml", "piqa.jsonl"),
    "logiqa": Local("logiqa/logiqa.yaml", "logiqa.jsonl"),
    "openbookqa": Local("openbookqa/openbookqa.yaml", "openbookqa.jsonl"),
    "social_iqa": Local("siqa/siqa.yaml", "social_iqa.jsonl"),
    "truthfulqa_mc2": Local("truthfulqa/truthfulqa_mc2.yaml", "truthfulqa_mc.jsonl"),
    "winogrande": Local("winogrande/default.yaml", "winogrande.jsonl"),
    "boolq": Local("super_glue/boolq/default.yaml", "boolq.jsonl"),
    "hellaswag": Local("hellaswag/hellaswag.yaml", "hellaswag_orig1000.jsonl"),
    "copa": Local("super_glue/copa/default.yaml", "copa.jsonl", {
        "doc_to_text": "{{query}}", "doc_to_choice": "choices", "doc_to_target": "gold",
    }),
}  # fmt: skip


def present(data: Path) -> list[str]:
    """Return the tasks whose documents lie in a folder."""
    return [name for name, task in TASKS.items() if (data / task.file).is_file()]


def load_tasks(names: Sequence[str], data: Path, folder: Path) -> list[Task]:
    """Load tasks with their documents; those of the paper count by the metric that it takes, and towards the average.

    Args:
        names: keys of `TASKS`.
        data: folder with the documents.
        folder: an empty folder for the YAML files.
    """
    files = [str(write_task(name, data, folder)) for name in names]
    found = find_tasks(files) if files else []
    return [replace(task, metric=METRICS.get(name)) for name, task in zip(names, found, strict=True)]


def write_task(name: str, data: Path, folder: Path) -> Path:
    """Write the YAML of a task and return its file."""
    task = TASKS[name]
    tree = {
        "include": str(_definitions() / task.definition),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data / task.file)}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree | task.changes), encoding="utf-8")
    return file


def _definitions() -> Path:
    spec = find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "tasks"
