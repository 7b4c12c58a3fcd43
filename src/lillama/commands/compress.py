"""`lillama compress`."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from lillama.commands.options import Flag, Many, size

if TYPE_CHECKING:
    from lillama.result import Result


def compress(
    model: str,
    out: Path,
    /,
    *,
    keep: float | None = None,
    bytes: str | None = None,
    max_loss: float | None = None,
    recipe: str = "default",
    calibration: Annotated[list[str] | None, Many] = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    scope: Literal["model", "blocks"] | None = None,
    bits: Literal[4, 8] | None = None,
    no_recover: Annotated[bool, Flag] = False,
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
    compile: Annotated[bool, Flag] = False,
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
    keep
        Share of the parameters that remains [default: the recipe's, 0.8].
    bytes
        Size that the weights may have, for example 4GiB, instead of --keep.
    max_loss
        Instead of --keep: find the smallest model whose loss on held-out calibration text rises by at most so many nats a
        token; several models are made on the way.
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
    bits
        Store the factors in 8 or 4 bits a number [default: the original's type].
    no_recover
        Leave out the recovery tail, in which all blocks learn together.
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
    compile
        Fuse the steps of each block by torch.compile: somewhat faster after a warm-up of some seconds a block, the same result
        up to rounding.
    log_dir
        Folder for TensorBoard's event files: the loss of each block, and of recovery.
    wandb
        With --log-dir: log to Weights & Biases too.
    trust_remote_code
        Run the code that lies in the model's folder (`auto_map` in config.json), for models that need it; read it first.
    json
        Print the result as JSON.
    """
    from lillama import cli_output
    from lillama.compression import compress as work
    from lillama.prepare import Machine

    machine = Machine(device, micro_batch, size(activation_memory), size(shard_size) or 0, compile)
    with ExitStack() as stack:
        report = stack.enter_context(cli_output.progress(json))
        if log_dir is not None:
            from lillama.report.live import logged

            report = stack.enter_context(
                logged(report, log_dir, ("tensorboard", "wandb") if wandb else ("tensorboard",))
            )
        result = work(model, out, keep=keep, nbytes=size(bytes), max_loss=max_loss, recipe=recipe,
                      calibration=calibration, tokens=tokens, seq_len=seq_len, scope=scope, bits=bits,
                      recover=not no_recover, targets=targets, ignore=ignore, seed=seed, rank_plan=plan,
                      texts=text or (), run=run, restart=restart, machine=machine, report=report,
                      trust_remote_code=trust_remote_code)  # fmt: skip
    cli_output.show(result.as_json(), json, lambda: _table(result))


def _table(result: "Result") -> None:
    """Print what was made, what it costs, and how to load it."""
    from rich.table import Table

    from lillama.cli_output import duration, print_tables, say
    from lillama.hub.card import auto_class
    from lillama.resources import readable

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
