"""The bridge to the lm-evaluation-harness: find tasks, ask a model, read its answers; needs `lillama[eval]`."""

import io
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError
from jaxtyping import Float
from jinja2 import TemplateError
from torch import Tensor
from yaml import YAMLError

from lillama.errors import RecipeError, first_line
from lillama.files.yaml_text import refuse_unbounded
from lillama.model.load import load, refuse_too_large
from lillama.model.tokenizer import load_tokenizer, refuse_unknown_ids
from lillama.system.progress import Progress, Report
from lillama.system.resources import explain_shortage

BATCH = 8
FEWSHOT_SEED = 1234  # the harness's own
YAML = (".yaml", ".yml")
SUITE = "lillama"
METRICS = {  # of the nine zero-shot tasks of the Lillama paper (arXiv 2412.16719)
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
    "piqa": "acc_norm",
    "logiqa": "acc_norm",
    "openbookqa": "acc_norm",
    "social_iqa": "acc",
    "truthfulqa_mc2": "acc",
    "winogrande": "acc",
    "boolq": "acc",
}
KINDS = {  # how a metric comes from the mean over documents
    "mean": lambda mean: mean,
    "perplexity": lambda mean: torch.exp(-mean),
    "bits": lambda mean: -mean / math.log(2),
}
UNUSABLE = (
    AssertionError,
    AttributeError,
    DatasetsError,
    HfHubHTTPError,
    ImportError,
    LookupError,
    NotImplementedError,
    OSError,
    RecursionError,
    TemplateError,
    TypeError,
    ValueError,
    YAMLError,
)


@dataclass(frozen=True)
class Task:
    """A task or a group of tasks, its data loaded.

    Attributes:
        name: as it was asked for.
        loaded: what the harness made of it.
        metric: the one that counts in the suite; None for a task that is not asked for as a part of it.
    """

    name: str
    loaded: Any
    metric: str | None = None


@dataclass(frozen=True)
class Answers:
    """What one model reached in one metric of one task.

    Attributes:
        value: as the harness computes it.
        documents: that were asked.
        kind: which of `KINDS` turns the mean over documents into the value.
        parts: value and weight of each document; None where the metric is no mean over documents.
    """

    value: float
    documents: int
    kind: str = "mean"
    parts: Float[Tensor, "documents 2"] | None = None


def find_tasks(tasks: str | Sequence[str]) -> list[Task]:
    """Load tasks with their data.

    Args:
        tasks: names, YAML files, or `lillama` for the nine tasks of the paper.

    Raises:
        RecipeError: a task is unknown or its data cannot be had, or the harness is not installed.
    """
    wanted = [tasks] if isinstance(tasks, str) else tasks
    names = list(dict.fromkeys(task for name in wanted for task in (METRICS if name == SUITE else [name])))
    metrics = METRICS if SUITE in wanted else {}
    manager_class = _module("lm_eval.tasks").TaskManager
    with _quiet():
        manager = manager_class(include_defaults=not all(Path(name).suffix in YAML for name in names))
        for name in names:
            _refuse_unknown(name, manager.all_tasks)
        found = []
        for name in names:
            with _explain(name):
                found.append(Task(name, manager.load([name]), metrics.get(name)))
        return found


def ask(
    folder: Path, tasks: Sequence[Task], limit: int | None, device: torch.device, role: str, report: Report
) -> dict[tuple[str, str], Answers]:
    """Let a whole model answer tasks.

    Args:
        folder: of the model.
        tasks: from `find_tasks`.
        limit: documents of each task; None: all.
        device: that computes.
        role: shown beside the progress.
        report: told about every task.

    Returns:
        (task, metric) -> answers.
    """
    model_class, evaluate = _module("lm_eval.models.huggingface").HFLM, _module("lm_eval").evaluate
    answers: dict[tuple[str, str], Answers] = {}
    refuse_too_large(folder, device)
    model, tokenizer = load(folder, device), load_tokenizer(folder)
    with _quiet(), refuse_unknown_ids(model, tokenizer, str(folder)):
        asked = model_class(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
        for done, task in enumerate(tasks):
            report(Progress("tasks", done, len(tasks), f"{task.name}, {role}"))
            with _explain(task.name):
                for leaf in task.loaded["tasks"].values():
                    if leaf.get_config("num_fewshot") is None:
                        leaf.set_config("num_fewshot", 0)
                    leaf.set_fewshot_seed(seed=FEWSHOT_SEED)
                read = _read(evaluate(lm=asked, task_dict=task.loaded, limit=limit, bootstrap_iters=0))
                answers |= {key: value for key, value in read.items() if task.metric in (None, key[1])}
    report(Progress("tasks", len(tasks), len(tasks)))
    return answers


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise RecipeError(f"tasks need {error.name}, which is not installed: pip install 'lillama[eval]'") from None


def _read(results: Any) -> dict[tuple[str, str], Answers]:
    """Return the harness's results: one entry for each metric of each task or group."""
    found = {}
    for task, entry in results["results"].items():
        for key, value in entry.items():
            metric, _, part = key.partition(",")
            if not part or metric.endswith("_stderr"):
                continue
            samples = [sample for sample in results["samples"].get(task, ()) if sample["filter"] == part]
            items = [sample[metric] for sample in samples if metric in sample]
            name = metric if part == "none" else key
            found[task, name] = _answers(float(value), int(entry.get("sample_len", len(items))), items)
    return found


def _answers(value: float, documents: int, items: Sequence[Any]) -> Answers:
    """Find out whether a metric is a mean over documents, weighted or not, from its value alone."""
    try:
        parts = torch.tensor(items, dtype=torch.float64)
    except (TypeError, ValueError):
        return Answers(value, documents)
    if parts.ndim == 1:
        parts = torch.stack([parts, torch.ones_like(parts)], dim=1)
    if parts.ndim == 2 and parts.shape[1] == 2 and len(parts):
        mean = parts[:, 0].sum() / parts[:, 1].sum()
        for kind, function in KINDS.items():
            if math.isclose(function(mean).item(), value, rel_tol=1e-6, abs_tol=1e-9):
                return Answers(value, documents, kind, parts)
    return Answers(value, documents)


def _refuse_unknown(name: str, known: Sequence[str]) -> None:
    if Path(name).suffix in YAML:
        if not Path(name).is_file():
            raise RecipeError(f"{name}: no such task file")
        refuse_unbounded(Path(name))
    elif name not in known:
        near = get_close_matches(name, known, n=3)
        hint = f"nearest: {', '.join(near)}" if near else "`lm_eval ls tasks` lists all, or give a YAML file"
        raise RecipeError(f"no task {name!r}; {hint}")


@contextmanager
def _explain(name: str) -> Iterator[None]:
    """Turn what goes wrong in a task into one line."""
    try:
        with explain_shortage():
            yield
    except UNUSABLE as error:
        reason = first_line(error)
        raise RecipeError(
            f"task {name}: cannot be used ({type(error).__name__}: {reason}); if its data is not on this machine, fetch it "
            "once with a network, or give a YAML task over local files"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's bars and advice off the terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
