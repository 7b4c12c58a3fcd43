"""`lillama bench`."""

from typing import TYPE_CHECKING, Annotated, Literal

from lillama.recipes.options import Flag, Many

if TYPE_CHECKING:
    from lillama.evaluation.speed import SpeedComparison, Spread


def bench(
    model: str,
    /,
    *,
    against: str | None = None,
    batch: Annotated[list[int], Many] = [1, 4],  # noqa: B006  (read only)
    prompt: Annotated[list[int], Many] = [128, 512],  # noqa: B006
    new: int = 32,
    repeats: int = 5,
    device: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    threads: int | None = None,
    seed: int = 0,
    trust_remote_code: Annotated[bool, Flag] = False,
    json: Annotated[bool, Flag] = False,
) -> None:
    """Measure how fast MODEL, dense or compressed, reads prompts and writes after them, and what memory it takes.

    Parameters
    ----------
    model
        Local folder or hub id.
    against
        Another model to compare with, usually the dense original; the two run in turn.
    batch
        Sequences at once, one or more values.
    prompt
        Tokens of a prompt, one or more values.
    new
        Tokens to write after each prompt.
    repeats
        Runs at every batch and length, after one to warm up.
    device
        `cpu`, `cuda`, `mps`, ... [default: an accelerator if there is one].
    dtype
        Type of the weights in memory [default: the stored one].
    threads
        Threads of the CPU [default: torch's choice].
    seed
        Of the prompts' random tokens.
    trust_remote_code
        Run the code that lies in the model's folder (`auto_map` in config.json), for models that need it; read it first.
    json
        Print JSON.
    """
    from lillama.cli import output
    from lillama.evaluation.speed import benchmark

    with output.progress(json) as report:
        result = benchmark(
            model,
            against,
            batch=batch,
            prompt=prompt,
            new=new,
            repeats=repeats,
            device=device,
            dtype=dtype,
            threads=threads,
            seed=seed,
            report=report,
            trust_remote_code=trust_remote_code,
        )
    output.show(result.as_json(), json, lambda: _tables(result))


def _tables(result: "SpeedComparison") -> None:
    """Print sizes, then speeds as medians, with the ratio and its spread where there is another model."""
    from rich.table import Table

    from lillama.cli.output import print_tables
    from lillama.system.resources import readable

    names = [one.name for one in result.subjects]
    sizes = Table("", *names, *["ratio"][: result.paired])
    for label, form, values in (
        ("numbers in the weight files", "{:,}".format, [one.numbers for one in result.subjects]),
        ("bytes on disk", readable, [one.disk_bytes for one in result.subjects]),
        ("peak memory, loading included", readable, [one.peak_bytes - one.idle_bytes for one in result.footprints]),
    ):
        ratio = [f"{own / other:.2f}" for own, other in [values] if other] if result.paired else []
        sizes.add_row(label, *map(form, values), *ratio)
    speeds = Table("batch", "prompt", "", *names, *["times as fast"][: result.paired])
    for cell in result.cells:
        figures = [cell.figures(index) for index in range(len(names))]
        ratios = cell.ratios() if result.paired else {}
        for label, scale, key in (
            ("first token, ms", 1000, "first_token_seconds"),
            ("prefill, tokens/s", 1, "prefill_tokens_per_second"),
            ("decode, tokens/s", 1, "decode_tokens_per_second"),
        ):
            medians = [f"{scale * figure[key].median:,.1f}" for figure in figures]
            ratio = [_ratio(ratios.get(key.split("_")[0]))][: result.paired]
            speeds.add_row(str(cell.batch), str(cell.prompt), label, *medians, *ratio)
    print_tables(sizes, speeds)


def _ratio(spread: "Spread | None") -> str:
    return "" if spread is None else f"{spread.median:.2f} ({spread.min:.2f}-{spread.max:.2f})"
