"""The command line: parse, call the library, print. Errors are one line on standard error."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from lillama.errors import LillamaError, RecipeError

Many = Parameter(consume_multiple=True, negative=())
Flag = Parameter(negative=(), show_default=False)

PATHS = (
    PermissionError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
)  # the user named it

app = App(
    name="lillama",
    help="Make a pretrained language model smaller: low-rank factors, taught block by block.",
    version_flags=["--version"],
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `run` tells of it
)


@app.command
def compress(
    model: str,
    out: Path,
    /,
    *,
    keep: float | None = None,
    recipe: str = "default",
    calibration: Annotated[list[str] | None, Many] = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    scope: Literal["model", "blocks"] | None = None,
    targets: Annotated[list[str] | None, Many] = None,
    ignore: Annotated[list[str] | None, Many] = None,
    seed: int | None = None,
    plan: Path | None = None,
    text: Annotated[list[Path] | None, Many] = None,
    run: Path | None = None,
    restart: Annotated[bool, Flag] = False,
    device: str | None = None,
    micro_batch: int | None = None,
    activation_memory: str | None = None,
    shard_size: str = "5GB",
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
    keep
        Share of the parameters that remains [default: the recipe's, 0.8].
    recipe
        `default`, `paper`, another recipe that comes with lillama, or a YAML file.
    calibration
        Files (.txt .md .jsonl .json .parquet), dataset folders or hub dataset ids; `self` [default] lets the model write.
    tokens
        Calibration tokens [default: the recipe's].
    seq_len
        Tokens of a sequence [default: the recipe's].
    scope
        What --keep is a share of: the whole `model` [default] or its `blocks`.
    targets
        Globs of the linears to factorise, by full name or by name within the block [default: all].
    ignore
        Globs of linears to leave dense.
    seed
        Of every random choice.
    plan
        Rank plan to replay, as an earlier run saved it (plan.json), instead of --keep.
    text
        Text files on which perplexity is measured before and after.
    run
        Run folder, where an unfinished run is found again [default: OUT.run].
    restart
        Forget an earlier run in the run folder.
    device
        `cpu`, `cuda`, `mps`, ... [default: an accelerator if there is one].
    micro_batch
        Sequences that are computed at once; lower it when memory is short.
    activation_memory
        Memory for activations between blocks, for example 4GB; what is more goes to disk [default: a quarter of what is free].
    shard_size
        Largest size of a weight file of the result.
    json
        Print the result as JSON.
    """
    from lillama import cli_output
    from lillama.compression import compress as work
    from lillama.prepare import Machine

    machine = Machine(device, micro_batch, size(activation_memory), size(shard_size) or 0)
    with cli_output.progress(json) as report:
        result = work(model, out, keep=keep, recipe=recipe, calibration=calibration, tokens=tokens, seq_len=seq_len,
                      scope=scope, targets=targets, ignore=ignore, seed=seed, rank_plan=plan, texts=text or (), run=run,
                      restart=restart, machine=machine, report=report)  # fmt: skip
    cli_output.show(result.as_json(), json, lambda: cli_output.compressed(result))


@app.command
def plan(
    model: str,
    /,
    *,
    keep: float | None = None,
    recipe: str = "default",
    calibration: Annotated[list[str] | None, Many] = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    scope: Literal["model", "blocks"] | None = None,
    targets: Annotated[list[str] | None, Many] = None,
    ignore: Annotated[list[str] | None, Many] = None,
    seed: int | None = None,
    plan: Path | None = None,
    run: Path | None = None,
    restart: Annotated[bool, Flag] = False,
    device: str | None = None,
    micro_batch: int | None = None,
    json: Annotated[bool, Flag] = False,
) -> None:
    """Show which rank each linear of MODEL gets, sizes before and after, and what the work needs; loads no weights.

    Parameters
    ----------
    model
        Local folder or hub id; only its configuration is read.
    keep
        Share of the parameters that remains [default: the recipe's, 0.8].
    recipe
        `default`, `paper`, another recipe that comes with lillama, or a YAML file.
    calibration
        As for `compress`.
    tokens
        Calibration tokens [default: the recipe's].
    seq_len
        Tokens of a sequence [default: the recipe's].
    scope
        What --keep is a share of: the whole `model` [default] or its `blocks`.
    targets
        Globs of the linears to factorise, by full name or by name within the block [default: all].
    ignore
        Globs of linears to leave dense.
    seed
        Of every random choice.
    plan
        Rank plan to show instead of making one.
    run
        Taken, as `compress` takes it, but nothing is read or written there.
    restart
        Taken, as `compress` takes it, without effect.
    device
        Where the work would be done.
    micro_batch
        Sequences that would be computed at once.
    json
        Print JSON.
    """
    from lillama import cli_output
    from lillama.prepare import Machine
    from lillama.prepare import plan as work

    planned = work(model, keep=keep, recipe=recipe, calibration=calibration, tokens=tokens, seq_len=seq_len, scope=scope,
                   targets=targets, ignore=ignore, seed=seed, rank_plan=plan,
                   machine=Machine(device, micro_batch))  # fmt: skip
    cli_output.show(planned.as_json(), json, lambda: cli_output.planned(planned))


@app.command
def evaluate(
    model: str,
    /,
    *,
    text: Annotated[list[Path], Many],
    seq_len: int | None = None,
    device: str | None = None,
    activation_memory: str | None = None,
    json: Annotated[bool, Flag] = False,
) -> None:
    """Measure perplexity and bits per byte of MODEL, dense or compressed, on text files.

    Parameters
    ----------
    model
        Local folder or hub id.
    text
        Text files, UTF-8.
    seq_len
        Tokens of a window [default: the model's longest context, at most 2048].
    device
        `cpu`, `cuda`, `mps`, ... [default: an accelerator if there is one].
    activation_memory
        Memory for activations between blocks; what is more goes to disk [default: a quarter of what is free].
    json
        Print JSON.
    """
    from lillama import cli_output
    from lillama.evaluate.perplexity import perplexity

    with cli_output.progress(json) as report:
        scores = perplexity(model, text, seq_len=seq_len, device=device, activation_memory=size(activation_memory),
                            report=report)  # fmt: skip
    rows = [
        {"name": s.name, "tokens": s.tokens, "perplexity": s.perplexity, "bits_per_byte": s.bits_per_byte}
        for s in scores
    ]
    cli_output.show({"version": 1, "texts": rows}, json, lambda: cli_output.scores(scores))


@app.command
def export(source: Path, destination: Path, /, *, format: Literal["dense", "portable"]) -> None:
    """Write a compressed model in a form that loads without lillama.

    Parameters
    ----------
    source
        Folder of a compressed model.
    destination
        Folder to make.
    format
        `dense` multiplies the factors: loads everywhere, as large as the original. `portable` adds the code for
        `trust_remote_code=True`.
    """
    from lillama.hub.export import export as work
    from lillama.resources import shortage_explained

    with shortage_explained():
        work(source, destination, format)
    sys.stdout.write(f"{destination}\n")


def size(text: str | None) -> int | None:
    """Return the bytes that `4GB`, `512MiB` or a plain number mean; None stays None.

    Raises:
        RecipeError: the text is no size.
    """
    if text is None:
        return None
    parts = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    if parts is None:
        raise RecipeError(f"size {text!r}: give bytes, or a number with KB, MB, GB, TB, KiB, MiB or GiB")
    number, prefix, binary = parts.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " "))


def main(tokens: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 0, with 2 for what the user can mend, with 1 for a failure of the machine."""
    sys.exit(run(lambda: app(tokens, exit_on_error=False, print_error=False)))


def run(work: Callable[[], Any]) -> int:
    """Run something and return the exit status; an error becomes one line on standard error."""
    try:
        work()
    except (CycloptsError, LillamaError) as error:
        return _fail(str(error), getattr(error, "exit_status", 2))
    except KeyboardInterrupt:
        return _fail("interrupted; the same `compress` command goes on from here", 1)
    except BrokenPipeError:
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'machine'}: {error.strerror or error}", 2 if isinstance(error, PATHS) else 1)
    return 0


def _fail(text: str, status: int) -> int:
    sys.stderr.write(f"error: {' '.join(text.split())}\n")
    return status


if __name__ == "__main__":
    main()
