"""From trials to a result: a model's, or those that another system wrote."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from lillama.errors import ProbeError
from lillama.probing.average import Accuracy, average_groups, breakdown, overall
from lillama.probing.benchmark import Benchmark, load_benchmark
from lillama.probing.pairs import pair_name
from lillama.probing.result import Asked, ProbeResult
from lillama.probing.trials import Trial, join_probabilities, read_trials


def judge(
    trials: str | Path | None,
    benchmark: str | Path,
    *,
    probabilities: str | Path | None = None,
    gold: str | Path | None = None,
    seed: int = 0,
) -> ProbeResult:
    """Return a benchmark's figures for what another system wrote.

    Args:
        trials: table of trials; None: `probabilities` and `gold` are given instead.
        benchmark: name or YAML file.
        probabilities: file with a text's name and its probability in every line.
        gold: the benchmark's table of texts.
        seed: of the bootstrap.

    Raises:
        ProbeError: a file cannot be used.
    """
    rules = load_benchmark(benchmark)
    if trials is not None:
        found = read_trials(Path(trials), rules)
    elif probabilities is not None and gold is not None:
        found = join_probabilities(Path(probabilities), Path(gold), rules)
    else:
        raise ProbeError("give a table of trials, or probabilities together with their gold table")
    identical = sum(trial.pair.good == trial.pair.bad for trial in found)
    return result(rules, found, None, None, identical, seed)


def result(
    benchmark: Benchmark,
    trials: Sequence[Trial],
    dense: Sequence[Trial] | None,
    asked: Asked | None,
    identical: int,
    seed: int,
) -> ProbeResult:
    """Average trials, and those of a dense model beside them."""
    items = average_groups(benchmark, trials)
    others = None if dense is None else average_groups(benchmark, dense)
    columns = set.intersection(*(set(item.fields) for item in items))
    groupings = {name: grouping for name, grouping in benchmark.groups.items() if (grouping.column or name) in columns}
    breakdowns = {name: breakdown(name, grouping, items, others, seed) for name, grouping in groupings.items()}
    return ProbeResult(
        benchmark=benchmark.name,
        asked=asked,
        total=overall(items, others, seed),
        breakdowns=breakdowns,
        trials=tuple(trials),
        pairs=len({pair_name(benchmark, trial.pair.fields) for trial in trials}),
        ties=sum(trial.score == 0.5 for trial in trials),
        identical=identical,
        notes=tuple(_notes(benchmark, trials, breakdowns, identical)),
    )


def _notes(
    benchmark: Benchmark,
    trials: Sequence[Trial],
    breakdowns: dict[str, tuple[Accuracy, ...]],
    identical: int,
) -> Iterator[str]:
    """Yield what a reader should know beside the figures."""
    total = len(trials)
    if identical:
        yield f"same text or same tokens twice, counts half: {identical} of {total} trials"
    recorded = sum(trial.good == trial.bad and trial.tie != 0.5 for trial in trials)
    if recorded:
        yield f"equal as printed, the recorded score is taken: {recorded} of {total} trials"
    names = Counter((pair_name(benchmark, trial.pair.fields), trial.pair.fields.get("voice")) for trial in trials)
    if len(names) < total:
        yield f"pair and voice named before, averaged with it: {total - len(names)} of {total} trials"
    for name, grouping in benchmark.groups.items():
        if name not in breakdowns:
            yield f"no column {grouping.column or name}: no breakdown by {name}"
    for name, groups in breakdowns.items():
        empty = [group.label for group in groups if not group.items]
        if empty:
            yield f"empty groups of {name}: {', '.join(empty)}"
