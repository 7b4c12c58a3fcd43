"""All that can be asked of a model, in one call."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from lillama.errors import RecipeError
from lillama.evaluation.agreement import Protocol, measure
from lillama.evaluation.agreement_summary import Agreement, AgreementJson, summary
from lillama.evaluation.harness import find_tasks
from lillama.evaluation.perplexity import ScoreJson, TextScore, perplexity, pool_scores
from lillama.evaluation.tasks import TaskJson, TaskScore, score_tasks
from lillama.evaluation.windows import Texts, languages
from lillama.model.remote import remote_code
from lillama.system.progress import Report, silent


class TextJson(ScoreJson):
    """A text, or all texts of a language, in JSON."""

    against: NotRequired[AgreementJson]


class EvaluationJson(TypedDict):
    """What `lillama evaluate --json` prints."""

    version: int
    against: NotRequired[str]
    texts: list[TextJson]
    languages: NotRequired[list[TextJson]]
    tasks: NotRequired[list[TaskJson]]


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model.

    Attributes:
        against: the dense model that it was compared with, if it was.
        texts: how well it predicts each text.
        languages: the same for all texts of a language, where texts have one.
        agreements: how far the model is from the dense one, on each text, then on each language; none without it.
        tasks: scores in tasks of the lm-evaluation-harness.

    Examples:
        >>> Evaluation(None, (TextScore("novel", 1000, 3.0, 1.1),), (), (), ()).as_json()["texts"][0]["tokens"]
        1000
    """

    against: str | None
    texts: tuple[TextScore, ...]
    languages: tuple[TextScore, ...]
    agreements: tuple[Agreement, ...]
    tasks: tuple[TaskScore, ...]

    def as_json(self) -> EvaluationJson:
        """Return the value that `lillama evaluate --json` prints; `version` counts its breaking changes."""
        rows: list[TextJson] = [{**score.as_json()} for score in (*self.texts, *self.languages)]
        for row, agreement in zip(rows, self.agreements, strict=False):
            row["against"] = agreement.as_json()
        texts = rows[: len(self.texts)]
        found: EvaluationJson = {"version": 1, "texts": texts}
        if self.against is not None:
            found = {"version": 1, "against": self.against, "texts": texts}
        if self.languages:
            found["languages"] = rows[len(self.texts) :]
        if self.tasks:
            found["tasks"] = [task.as_json() for task in self.tasks]
        return found


def evaluate(
    model: str | Path,
    texts: Texts = (),
    *,
    against: str | Path | None = None,
    tasks: str | Sequence[str] = (),
    protocol: Protocol | None = None,
    limit: int | None = None,
    device: str | None = None,
    activation_memory: int | None = None,
    report: Report = silent,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Measure a model on texts and tasks, alone or beside its dense original.

    Perplexities and agreement are computed with one block in memory at a time; continuations and tasks need the whole model.

    Args:
        model: folder or hub id, dense or compressed by lillama.
        texts: text files, UTF-8; `language=path` puts a text into a language.
        against: the dense original. Every difference comes with a 95 % confidence interval.
        tasks: names or YAML files of the lm-evaluation-harness; `lillama` stands for the nine of the paper and their
            average.
        protocol: windows, prompts and seed.
        limit: documents of each task; by default all.
        device: that computes; by default an accelerator if there is one.
        activation_memory: bytes that activations may take in memory before they go to disk; by default a quarter of what
            is free.
        report: told about progress.
        trust_remote_code: whether code that lies in a model's folder (`auto_map`) may run, as in transformers.

    Raises:
        LillamaError: a model, a text or a task cannot be used.

    Examples:
        >>> found = evaluate("demo/model", ["eng=demo/text.txt"], protocol=Protocol(seq_len=64), device="cpu")
        >>> [(score.name, score.tokens > 0) for score in (*found.texts, *found.languages)]
        [('text', True), ('eng', True)]
    """
    protocol = protocol or Protocol()
    texts = [texts] if isinstance(texts, str | Path) else list(texts)
    if not texts and not tasks:
        raise RecipeError("nothing to measure; give --text FILE ... or --tasks NAME ...")
    found = find_tasks(tasks) if tasks else []
    scores, grouped, agreements = [], [], []
    with remote_code(trust_remote_code):
        if against is not None and texts:
            measured = measure(model, against, texts, protocol, device, activation_memory, report)
            members = [(name, [name]) for name in measured] + list(languages(texts).items())
            agreements = [summary(name, [measured[one] for one in parts], protocol.seed) for name, parts in members]
            scores = [agreement.model for agreement in agreements]
            scores, grouped = scores[: len(measured)], scores[len(measured) :]
        elif texts:
            scores = perplexity(
                model,
                texts,
                seq_len=protocol.seq_len,
                stride=protocol.stride,
                windows=protocol.windows,
                device=device,
                activation_memory=activation_memory,
                report=report,
            )
            by_name = {score.name: score for score in scores}
            grouped = [pool_scores(name, [by_name[part] for part in parts]) for name, parts in languages(texts).items()]
        answers = (
            score_tasks(model, found, against, limit=limit, seed=protocol.seed, device=device, report=report)
            if found
            else []
        )
    dense = None if against is None else str(against)
    return Evaluation(dense, tuple(scores), tuple(grouped), tuple(agreements), tuple(answers))
