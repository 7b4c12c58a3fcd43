"""`lillama evaluate`."""

from typing import TYPE_CHECKING, Annotated

from lillama.recipes.options import Flag, Many, SizeFlag

if TYPE_CHECKING:
    from rich.table import Table

    from lillama.evaluation.agreement_summary import AgreementSummary
    from lillama.evaluation.evaluate import Evaluation
    from lillama.evaluation.intervals import Interval


def evaluate(
    model: str,
    /,
    *,
    text: Annotated[list[str] | None, Many] = None,
    tasks: Annotated[list[str] | None, Many] = None,
    against: str | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    windows: int | None = None,
    prompts: int = 32,
    limit: int | None = None,
    seed: int = 0,
    device: str | None = None,
    activation_memory: SizeFlag | None = None,
    trust_remote_code: Annotated[bool, Flag] = False,
    json: Annotated[bool, Flag] = False,
) -> None:
    """Measure MODEL, dense or compressed, on texts and tasks, alone or beside its dense original.

    Parameters
    ----------
    model
        Local folder or hub id.
    text
        Text files, UTF-8; `fra=novel.txt` says the language, and adds a row for all texts of it.
    tasks
        Tasks of the lm-evaluation-harness by name, or YAML files; `lillama` stands for the nine tasks of the paper.
    against
        Dense original, folder or hub id: adds agreement with it, and 95 % confidence intervals of every difference.
    seq_len
        Tokens of a window [default: the model's longest context, at most 2048].
    stride
        Tokens from the beginning of a window to that of the next [default: --seq-len, so that none overlap].
    windows
        Measure at most so many windows of each text, evenly spread [default: all].
    prompts
        With --against: continue at most so many prompts of each text; 0 for none.
    limit
        Documents of each task [default: all].
    seed
        Of the draws behind the intervals.
    device
        `cpu`, `cuda`, `mps`, ... [default: an accelerator if there is one].
    activation_memory
        Memory for activations between blocks; what is more goes to disk [default: a quarter of what is free].
    trust_remote_code
        Run the code that lies in the model's folder (`auto_map` in config.json), for models that need it; read it first.
    json
        Print JSON.
    """
    from lillama.cli import output
    from lillama.evaluation.agreement import Protocol
    from lillama.evaluation.evaluate import evaluate as work

    protocol = Protocol(seq_len, stride, windows, prompts, seed=seed)
    with output.progress(json) as report:
        found = work(
            model,
            text or (),
            against=against,
            tasks=tasks or (),
            protocol=protocol,
            limit=limit,
            device=device,
            activation_memory=activation_memory,
            report=report,
            trust_remote_code=trust_remote_code,
        )
    output.show(found.as_json(), json, lambda: _tables(found))


def _tables(found: "Evaluation") -> None:
    """Print what was measured."""
    from lillama.cli.output import print_tables

    tables = [_texts(found)] if found.texts else []
    tables += [_agreements(found)] if found.agreements else []
    tables += [_continuations(found)] if any(one.continuation for one in found.agreements) else []
    tables += [_tasks(found)] if found.tasks else []
    print_tables(*tables)


def _texts(found: "Evaluation") -> "Table":
    from rich.table import Table

    beside = ("dense", "excess loss") if found.agreements else ()
    table = Table("text", "tokens", "perplexity", "bits per byte", *beside)
    for index, row in enumerate((*found.texts, *found.languages)):
        cells = [row.name, f"{row.tokens:,}", f"{row.perplexity:.3f}", f"{row.bits_per_byte:.4f}"]
        if found.agreements:
            agreement = found.agreements[index]
            cells += [f"{agreement.dense.perplexity:.3f}", _interval(agreement.excess_loss, "+.4f")]
        table.add_row(*cells, end_section=index == len(found.texts) - 1)
    return table


def _agreements(found: "Evaluation") -> "Table":
    from rich.table import Table

    table = Table("text", "windows", "KL, nats", "same top token", "calibration error", "difference")
    for row in found.agreements:
        table.add_row(
            row.name,
            str(row.windows),
            _interval(row.kl, ".4f"),
            _interval(row.top1, ".1%"),
            *_pair(row.calibration, ".4f"),
        )
    return table


def _continuations(found: "Evaluation") -> "Table":
    from rich.table import Table

    table = Table("text", "prompts", "same beginning", "same to the end", "repeated 4-grams", "difference")
    for row in found.agreements:
        if row.continuation is not None:
            one = row.continuation
            table.add_row(
                row.name,
                str(one.prompts),
                _interval(one.leading, ".1%"),
                _interval(one.equal, ".1%"),
                *_pair(one.repetition, ".1%"),
            )
    return table


def _tasks(found: "Evaluation") -> "Table":
    from rich.table import Table

    beside = ("dense", "difference") if found.against is not None else ()
    table = Table("task", "metric", "documents", "score", *beside)
    for row in found.tasks:
        cells = [row.task, row.metric, f"{row.documents:,}", _interval(row.value, ".4g")]
        if row.dense is not None and row.difference is not None:
            cells += [f"{row.dense:.4g}", _interval(row.difference, "+.4g")]
        table.add_row(*cells)
    return table


def _pair(compared: "AgreementSummary", form: str) -> tuple[str, str]:
    """Return both models' figures, and the difference."""
    return f"{compared.model:{form}}\ndense {compared.dense:{form}}", _interval(compared.difference, f"+{form}")


def _interval(interval: "Interval", form: str) -> str:
    """Return a value with its bounds, if it has any."""
    if interval.low is None or interval.high is None:
        return f"{interval.value:{form}}"
    return f"{interval.value:{form}}\n[{interval.low:{form}}, {interval.high:{form}}]"
