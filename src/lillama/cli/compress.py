"""`lillama compress`."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lillama.recipes.options import Flag, Flat, Machine, Many, Overrides, RunPlace

if TYPE_CHECKING:
    from lillama.runs.result import Result


def compress(
    model: str,
    out: Path,
    /,
    *,
    recipe: str | None = None,
    overrides: Annotated[Overrides, Flat] = Overrides(),
    max_loss: float | None = None,
    time: Annotated[str | None, Parameter(metavar="DURATION")] = None,
    plan: Path | None = None,
    text: Annotated[list[Path] | None, Many] = None,
    place: Annotated[RunPlace, Flat] = RunPlace(),
    machine: Annotated[Machine, Flat] = Machine(),
    log_dir: Path | None = None,
    wandb: Annotated[bool, Flag] = False,
    trust_remote_code: Annotated[bool, Flag] = False,
    json: Annotated[bool, Flag] = False,
) -> None:
    """Make MODEL smaller and write it to OUT, an ordinary model folder.

    The same command goes on where an earlier one was stopped, and gives the same bits.

    Parameters
    ----------
    model
        Local folder or hub id of a model with safetensors weights.
    out
        Folder to make.
    recipe
        `default`, `bits`, `paper`, another recipe that comes with lillama, or a YAML file [default: `bits` where --bytes is
        given and --bits is not, else `default`].
    max_loss
        Instead of --keep: find the smallest model whose loss on held-out calibration text rises by at most so many nats a
        token; several models are made on the way.
    time
        Time that the whole command may take, for example 20m or 1h30m: calibration tokens, distillation and recovery are chosen
        for it [default: what the recipe takes, of `default` without --tokens an hour at most].
    plan
        Rank plan to replay, as an earlier run saved it (plan.json), instead of --keep.
    text
        Text files on which perplexity is measured before and after.
    log_dir
        Folder for TensorBoard's event files: the loss of each block, and of recovery.
    wandb
        With --log-dir: log to Weights & Biases too.
    trust_remote_code
        Run the code that lies in the model's folder (`auto_map` in config.json), for models that need it; read it first.
    json
        Print the result as JSON.
    """
    from lillama.cli import output
    from lillama.pipeline.api import compress as work

    with ExitStack() as stack:
        report = stack.enter_context(output.progress(json))
        if log_dir is not None:
            from lillama.report.live import log_live

            report = stack.enter_context(
                log_live(report, log_dir, ("tensorboard", "wandb") if wandb else ("tensorboard",))
            )
        result = work(
            model,
            out,
            recipe=recipe,
            max_loss=max_loss,
            time=time,
            rank_plan=plan,
            texts=text or (),
            machine=machine,
            report=report,
            trust_remote_code=trust_remote_code,
            **vars(place),
            **vars(overrides),
        )
    output.show(result.as_json(), json, lambda: _table(result))


def _table(result: "Result") -> None:
    """Print what was made, what it costs, and how to load it."""
    from rich.table import Table

    from lillama.cli.output import print_tables, say
    from lillama.hub.usage import auto_class
    from lillama.system.resources import duration, readable

    spec, stored = result.plan.spec, result.stored
    table = Table("", "original", "compressed", "", title=str(result.path))
    before = spec.params, spec.nbytes
    table.add_row("parameters", f"{before[0]:,}", f"{stored.params:,}", f"{stored.params / before[0]:.1%}")
    table.add_row("bytes", readable(before[1]), readable(stored.bytes), f"{stored.bytes / before[1]:.1%}")
    for pair in result.texts:
        old, new = pair.before, pair.after
        change = new.perplexity / old.perplexity - 1
        table.add_row(f"perplexity, {old.name}", f"{old.perplexity:.3f}", f"{new.perplexity:.3f}", f"{change:+.1%}")
        table.add_row(f"bits per byte, {old.name}", f"{old.bits_per_byte:.4f}", f"{new.bits_per_byte:.4f}", "")
    table.add_row("held-out loss", "", f"{result.held_out.rise:+.4f} nats", "")
    table.add_row("held-out KL", "", f"{result.held_out.kl:.4f} nats", "")
    table.add_row("time", "", duration(result.seconds), "")
    table.add_row("peak memory", "", readable(result.peak_bytes), "")
    print_tables(table)
    loader = f"transformers.{auto_class(spec.architecture)}.from_pretrained({str(result.path)!r})"
    say(f"import lillama, transformers; model = {loader}")
