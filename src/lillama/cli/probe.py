"""`lillama probe`."""

from os.path import lexists
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from lillama.errors import ProbeError
from lillama.recipes.options import Flag

if TYPE_CHECKING:
    from lillama.evaluation.intervals import Interval
    from lillama.probing.average import Accuracy
    from lillama.probing.result import ProbeResult


def probe(
    model: str | None = None,
    /,
    *,
    benchmark: str | None = None,
    data: Path | None = None,
    against: str | None = None,
    score: Literal["mean", "sum", "penalised"] | None = None,
    unit: Literal["token", "char", "word", "phoneme"] | None = None,
    trials: Path | None = None,
    probabilities: Path | None = None,
    gold: Path | None = None,
    trials_out: Path | None = None,
    batch_tokens: int | None = None,
    device: str | None = None,
    seed: int = 0,
    trust_remote_code: Annotated[bool, Flag] = False,
    json: Annotated[bool, Flag] = False,
) -> None:
    """Ask MODEL, dense or compressed, which text of each minimal pair is likelier: grammatical sentences, real words.

    Without --benchmark the English and French sets that come with lillama are used. With --trials, or --probabilities and
    --gold, no model is asked: the figures are those of what another system wrote.

    Parameters
    ----------
    model
        Local folder or hub id of a causal or masked language model.
    benchmark
        `babyslm-lexical`, `babyslm-syntactic`, `blimp`, `zorro`, a set that comes with lillama, or a YAML file.
    data
        Folder of the benchmark's data [default: what comes with lillama, or the YAML file's folder].
    against
        Dense model to compare with.
    score
        `mean` log-probability of a unit, their `sum`, or `penalised` by length [default: as the benchmark says].
    unit
        What `mean` and `penalised` count; words and phonemes are separated by spaces [default: as the benchmark says].
    trials
        Table of trials that another system wrote, with the benchmark's column names.
    probabilities
        File with the name of a text and its probability in every line.
    gold
        The benchmark's table of texts, for --probabilities.
    trials_out
        Table to make, with every pair and its two scores (.csv or .tsv).
    batch_tokens
        Tokens that are computed at once; lower it when memory is short.
    device
        `cpu`, `cuda`, `mps`, ... [default: an accelerator if there is one].
    seed
        Of the confidence intervals.
    trust_remote_code
        Run the code that lies in the model's folder (`auto_map` in config.json), for models that need it; read it first.
    json
        Print JSON.
    """
    from lillama.cli import output
    from lillama.probing.benchmark import built_in_sets, load_benchmark
    from lillama.probing.judge import judge
    from lillama.probing.result import VERSION, ProbesJson
    from lillama.probing.trials import write_trials

    names = built_in_sets() if benchmark is None else [benchmark]
    given = trials is not None or probabilities is not None or gold is not None
    _check(model, benchmark, given=given, many=len(names) > 1, data=data, trials_out=trials_out)
    if model is None:
        results = [judge(trials, names[0], probabilities=probabilities, gold=gold, seed=seed)]
    else:
        from lillama.probing.measure import probe_all

        with output.progress(json) as report:
            results = probe_all(
                model,
                names,
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
    if trials_out is not None:
        _refuse_taken(trials_out)  # once more, for something may have come in the meantime
        write_trials(trials_out, load_benchmark(names[0]), results[0].trials)
    values = [result.as_json() for result in results]
    several: ProbesJson = {"version": VERSION, "results": values}
    value = several if benchmark is None else values[0]
    output.show(value, json, lambda: _tables(results))


def _check(
    model: str | None, benchmark: str | None, *, given: bool, many: bool, data: Path | None, trials_out: Path | None
) -> None:
    """Refuse options that do not go together."""
    if model is None and not given:
        raise ProbeError("give a MODEL to probe, or what another system wrote as --trials")
    if model is not None and given:
        raise ProbeError(f"give MODEL {model}, or --trials, --probabilities and --gold, but not both")
    if benchmark is None and given:
        raise ProbeError("--trials and --probabilities need --benchmark, which says how to average them")
    if benchmark is None and data is not None:
        raise ProbeError("--data needs --benchmark, which says how to read it")
    if many and trials_out is not None:
        raise ProbeError("--trials-out takes one benchmark: name it with --benchmark")
    if trials_out is not None:
        _refuse_taken(trials_out)


def _refuse_taken(trials_out: Path) -> None:
    """Refuse a place for trials where there is a file already, or no folder for one."""
    if not trials_out.parent.is_dir():
        raise ProbeError(f"{trials_out.parent}: no such folder; make it, or choose another place for --trials-out")
    if lexists(trials_out):
        raise ProbeError(f"{trials_out}: exists already; remove it, or choose another place for --trials-out")


def _tables(results: "list[ProbeResult]") -> None:
    """Print one table for each benchmark, and its notes."""
    from rich.table import Table

    from lillama.cli.output import print_tables, say

    for result in results:
        compared = result.total.dense is not None
        table = Table(title=f"{result.benchmark}: {result.pairs:,} pairs, {result.ties:,} ties")
        for column in ("", "items", "right", "95 %", *(("dense", "change", "95 %") if compared else ())):
            table.add_column(column, justify="right" if column else "left", overflow="fold", no_wrap=bool(column))
        shown: list[list[list[str]]] = []
        for name, groups in result.breakdowns.items():
            rows = [[group.label, *_cells(group, compared)] for group in groups]
            if rows not in shown:  # subtypes may be the types again
                table.add_row(f"by {name}", style="italic")
                for row in rows:
                    table.add_row(*row)
                table.add_section()
            shown.append(rows)
        table.add_row("overall", *_cells(result.total, compared))
        table.add_row("chance", "", "50.0")
        print_tables(table)
        for note in result.notes:
            say(f"note: {note}")


def _cells(group: "Accuracy", compared: bool) -> list[str]:
    """Return a group's figures in percent."""

    def percent(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{100 * value:{sign}.1f}"

    def span(interval: "Interval | None", sign: str = "") -> str:
        if interval is None or interval.low is None:
            return "-"
        return f"{percent(interval.low, sign)}..{percent(interval.high, sign)}"

    cells = [f"{group.items:,}", percent(group.score), span(group.interval)]
    if not compared:
        return cells
    return [*cells, percent(group.dense), percent(group.difference, "+"), span(group.difference_interval, "+")]
