"""Scores of a model in tasks of the lm-evaluation-harness, alone or beside its dense original."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NotRequired

import numpy as np
import torch
from jaxtyping import Float
from pydantic import FiniteFloat
from torch import Tensor
from typing_extensions import TypedDict

from lillama.errors import RecipeError
from lillama.evaluation.harness import KINDS, Answers, Task, ask
from lillama.evaluation.intervals import Interval, IntervalJson, bootstrap
from lillama.model.source import locate
from lillama.system.progress import Report, silent
from lillama.system.resources import explain_shortage, pick_device

AVERAGE = "average"


class TaskAgainstJson(TypedDict):
    """The dense model's score in a task, in JSON."""

    value: FiniteFloat | None
    difference: IntervalJson


class TaskJson(IntervalJson):
    """One metric of one task, in JSON."""

    task: str
    metric: str
    documents: int
    against: NotRequired[TaskAgainstJson]


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: its name, or `average` of the suite.
        metric: as the harness names it.
        documents: that were asked.
        value: of the model; bounds are missing where the metric is no mean over documents.
        dense: of the dense model, if there is one to compare with.
        difference: value less dense.
    """

    task: str
    metric: str
    documents: int
    value: Interval
    dense: float | None = None
    difference: Interval | None = None

    def as_json(self) -> TaskJson:
        """Return the value for JSON."""
        value = self.value.as_json()
        found: TaskJson = {"task": self.task, "metric": self.metric, "documents": self.documents, **value}
        if self.difference is not None:
            found["against"] = {"value": self.dense, "difference": self.difference.as_json()}
        return found


@dataclass(frozen=True)
class Drawn:
    """One metric of one task under each model, and under each draw of the documents, the same for all models.

    Attributes:
        values: role -> value.
        draws: role -> values of the draws; None where the metric is no mean over documents.
    """

    task: str
    metric: str
    documents: int
    values: Mapping[str, float]
    draws: Mapping[str, Float[Tensor, " draws"]] | None

    def score(self) -> TaskScore:
        """Return values with intervals."""
        values, draws = self.values, self.draws
        value = Interval.of(values["model"], None if draws is None else draws["model"])
        if "dense" not in values:
            return TaskScore(self.task, self.metric, self.documents, value)
        apart = None if draws is None else draws["model"] - draws["dense"]
        difference = Interval.of(values["model"] - values["dense"], apart)
        return TaskScore(self.task, self.metric, self.documents, value, values["dense"], difference)


def score_tasks(
    model: str | Path,
    tasks: Sequence[Task],
    against: str | Path | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    device: str | None = None,
    report: Report = silent,
) -> list[TaskScore]:
    """Let a model answer tasks of the lm-evaluation-harness; it must fit in memory as a whole.

    Args:
        model: folder or hub id, dense or compressed by lillama.
        tasks: from `find_tasks`; where the paper's suite is among them, the last score is its average.
        against: model to compare with, on the same documents.
        limit: documents of each task; by default all.
        seed: of the draws of the bootstrap.
        device: that computes; by default an accelerator if there is one.
        report: told about every task.

    Raises:
        LillamaError: a model or a task cannot be used.
    """
    if limit is not None and limit < 1:
        raise RecipeError(f"limit is {limit}; at least one document is needed")
    with explain_shortage():
        chosen = pick_device(device)
        folders = {"model": locate(model)} | ({} if against is None else {"dense": locate(against)})
        answers = {role: ask(folder, tasks, limit, chosen, role, report) for role, folder in folders.items()}
    random = np.random.default_rng(seed)
    drawn = [_draw(*key, {role: given[key] for role, given in answers.items()}, random) for key in answers["model"]]
    suite = {(leaf, task.metric) for task in tasks if task.metric is not None for leaf in task.loaded["tasks"]}
    averaged = [_average([one for one in drawn if (one.task, one.metric) in suite])] if suite else []
    return [one.score() for one in [*drawn, *averaged]]


def _draw(task: str, metric: str, answers: Mapping[str, Answers], random: np.random.Generator) -> Drawn:
    """Draw documents of one task, if its metric is the same kind of mean over them under every model."""
    ours = answers["model"]
    values = {role: one.value for role, one in answers.items()}
    parts = {role: one.parts for role, one in answers.items() if one.parts is not None and one.kind == ours.kind}
    drawn = bootstrap(parts, random).draws if len(parts) == len(answers) else None
    kind = KINDS[ours.kind]
    draws = None if drawn is None else {role: kind(sums[:, 0] / sums[:, 1]) for role, sums in drawn.items()}
    return Drawn(task, metric, ours.documents, values, draws)


def _average(drawn: Sequence[Drawn]) -> Drawn:
    """Return the mean of scores; each task weighs the same, and its documents are drawn apart from the others'."""
    documents = sum(one.documents for one in drawn)
    roles = drawn[0].values
    values = {role: fmean(one.values[role] for one in drawn) for role in roles}
    known = [one.draws for one in drawn if one.draws is not None]
    if len(known) < len(drawn):
        return Drawn(AVERAGE, "mean", documents, values, None)
    draws = {role: torch.stack([one[role] for one in known]).mean(0) for role in roles}
    return Drawn(AVERAGE, "mean", documents, values, draws)
