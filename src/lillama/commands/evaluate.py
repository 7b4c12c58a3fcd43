"""`lillama evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from lillama.commands.options import Flag, Many, size

if TYPE_CHECKING:
    from lillama.evaluate.perplexity import TextScore


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
    cli_output.show({"version": 1, "texts": rows}, json, lambda: _table(scores))


def _table(rows: "list[TextScore]") -> None:
    """Print perplexities."""
    from rich.table import Table

    from lillama.cli_output import print_tables

    table = Table("text", "tokens", "perplexity", "bits per byte")
    for row in rows:
        table.add_row(row.name, f"{row.tokens:,}", f"{row.perplexity:.3f}", f"{row.bits_per_byte:.4f}")
    print_tables(table)
