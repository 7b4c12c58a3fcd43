"""Probe a model: from a benchmark's name to its figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lillama.errors import ProbeError
from lillama.model.remote import remote_code
from lillama.probing.benchmark import (
    Benchmark,
    ScoreName,
    Unit,
    benchmark_file,
    benchmark_names,
    built_in_sets,
    load_benchmark,
    packaged_data,
)
from lillama.probing.judge import result
from lillama.probing.likelihood import Likelihood, likelihoods
from lillama.probing.likelihood import score as scored
from lillama.probing.pairs import Pair, read_pairs
from lillama.probing.result import Asked, ProbeResult
from lillama.probing.scorer import load_scorer
from lillama.probing.trials import Trial
from lillama.system.progress import Report, silent
from lillama.system.resources import explain_shortage, pick_device


def probe(
    model: str | Path,
    benchmark: str | Path = "syntactic-en",
    data: str | Path | None = None,
    *,
    against: str | Path | None = None,
    score: ScoreName | None = None,
    unit: Unit | None = None,
    batch_tokens: int | None = None,
    device: str | None = None,
    seed: int = 0,
    report: Report = silent,
    trust_remote_code: bool = False,
) -> ProbeResult:
    """Ask a model which text of each minimal pair is likelier.

    Args:
        model: folder or hub id, dense or compressed by lillama; causal or masked.
        benchmark: name of one that comes with lillama, or a YAML file.
        data: folder of its data; by default what comes with lillama, or the YAML file's own folder.
        against: dense model to compare with, on the same pairs.
        score: how a log-probability becomes the score of a text: `mean`, `sum` or `penalised`; by default as the benchmark
            says.
        unit: what `mean` and `penalised` count: `token`, `char`, `word` or `phoneme`; by default as the benchmark says.
        batch_tokens: tokens that are computed at once.
        device: that computes; by default an accelerator if there is one.
        seed: of the bootstrap.
        report: told about every batch.
        trust_remote_code: whether code that lies in a model's folder (`auto_map`) may run, as in transformers.

    Raises:
        LillamaError: the model, the benchmark or its data cannot be used.

    Examples:
        >>> found = probe("demo/model", "syntactic-en", device="cpu")
        >>> found.overall > 0.5, sorted(found.groups)[:2]
        (True, ['adj_noun_order', 'anaphor_gender_agreement'])
    """
    (found,) = probe_all(
        model,
        [benchmark],
        data,
        against=against,
        score=score,
        unit=unit,
        batch_tokens=batch_tokens,
        device=device,
        seed=seed,
        report=report,
        trust_remote_code=trust_remote_code,
    )
    return found


def probe_all(
    model: str | Path,
    benchmarks: Sequence[str | Path],
    data: str | Path | None = None,
    *,
    against: str | Path | None = None,
    score: ScoreName | None = None,
    unit: Unit | None = None,
    batch_tokens: int | None = None,
    device: str | None = None,
    seed: int = 0,
    report: Report = silent,
    trust_remote_code: bool = False,
) -> list[ProbeResult]:
    """Probe a model with several benchmarks, as `probe` does with one; each model is loaded once."""
    rules = [load_benchmark(benchmark) for benchmark in benchmarks]
    pairs = [read_pairs(one, data_folder(name, data)) for one, name in zip(rules, benchmarks, strict=True)]
    texts = [text for one, its in zip(rules, pairs, strict=True) for pair in its for text in present_pairs(one, pair)]

    def asked(name: str | Path) -> dict[str, Likelihood]:
        with remote_code(trust_remote_code), explain_shortage():
            return likelihoods(load_scorer(name, pick_device(device), batch_tokens), texts, report)

    mine = asked(model)
    dense = None if against is None else asked(against)
    results = []
    for one, its in zip(rules, pairs, strict=True):
        how = Asked(str(model), str(against or ""), score or one.score, unit or one.unit)
        trials, identical = judge_pairs(one, how, its, mine)
        others = None if dense is None else judge_pairs(one, how, its, dense)[0]
        results.append(result(one, trials, others, how, identical, seed))
    return results


def present_pairs(benchmark: Benchmark, pair: Pair) -> tuple[str, str]:
    """Return the right and the wrong text as the model sees them."""
    return benchmark.template.replace("{}", pair.good), benchmark.template.replace("{}", pair.bad)


def judge_pairs(
    benchmark: Benchmark, asked: Asked, pairs: Sequence[Pair], found: Mapping[str, Likelihood]
) -> tuple[tuple[Trial, ...], int]:
    """Return the trials of a model, and in how many both texts are the same tokens; these are ties."""
    trials, identical = [], 0
    for pair in pairs:
        good, bad = (found[text] for text in present_pairs(benchmark, pair))
        first = scored(asked.score, asked.unit, pair.good, good)
        same = good.tokens == bad.tokens
        identical += same
        trials.append(Trial(pair, first, first if same else scored(asked.score, asked.unit, pair.bad, bad)))
    return tuple(trials), identical


def data_folder(benchmark: str | Path, data: str | Path | None) -> Path:
    """Return the folder of a benchmark's data.

    Raises:
        ProbeError: the benchmark comes without data and no folder was given.
    """
    if data is not None:
        return Path(data)
    if str(benchmark) in built_in_sets():
        return packaged_data()
    if str(benchmark) in benchmark_names():
        wanted = " ".join(load_benchmark(benchmark).files)
        raise ProbeError(f"benchmark {benchmark} comes without data: give the folder that holds {wanted} as --data")
    return benchmark_file(benchmark).parent
