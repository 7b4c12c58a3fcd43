"""`lillama plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from lillama.recipes.options import Flag, Flat, Machine, Overrides, RunPlace, Unshown

if TYPE_CHECKING:
    from rich.table import Table

    from lillama.pipeline.job import Planned
    from lillama.ranks.plan import RankPlan


def plan(
    model: str,
    /,
    *,
    preview: Annotated[bool, Flag] = False,
    recipe: str | None = None,
    overrides: Annotated[Overrides, Flat] = Overrides(),
    plan: Path | None = None,
    machine: Annotated[Machine, Flat] = Machine(),
    _place: Annotated[RunPlace, Unshown] = RunPlace(),
    trust_remote_code: Annotated[bool, Flag] = False,
    json: Annotated[bool, Flag] = False,
) -> None:
    """Show which rank each linear of MODEL gets, sizes before and after, and what the work needs; loads no weights.

    Parameters
    ----------
    model
        Local folder or hub id; of weights that lie in the folder only the headers are read.
    preview
        Read weights and calibration text, and show the ranks by spectra and the loss predicted for every size.
    recipe
        `default`, `bits`, `paper`, another recipe that comes with lillama, or a YAML file [default: `bits` where --bytes is
        given and --bits is not, else `default`].
    plan
        Rank plan to show instead of making one.
    trust_remote_code
        Run the code that lies in the model's folder (`auto_map` in config.json), for models that need it; read it first.
    json
        Print JSON.
    """
    from lillama.cli import output
    from lillama.errors import RecipeError
    from lillama.pipeline.api import preview as look
    from lillama.pipeline.job import plan as work

    if preview and plan is not None:
        raise RecipeError(f"--preview and --plan {plan}: a saved plan needs no spectra; give one of them")
    with output.progress(json) as report:
        if preview:
            planned = look(
                model,
                recipe=recipe,
                machine=machine,
                report=report,
                trust_remote_code=trust_remote_code,
                **vars(overrides),
            )
        else:
            planned = work(
                model,
                recipe=recipe,
                rank_plan=plan,
                machine=machine,
                trust_remote_code=trust_remote_code,
                **vars(overrides),
            )
    output.show(planned.as_json(), json, lambda: _tables(planned))


def _tables(plan: "Planned") -> None:
    """Print a rank plan and what it needs."""
    from rich.table import Table

    from lillama.cli.output import print_tables
    from lillama.system.resources import duration, readable

    spec, ranks, needs = plan.plan.spec, plan.plan, plan.estimate
    shown = [spec.blocks[index] for index in _some(len(spec.blocks))]
    table = Table("linear", *(f"block {block.index}" for block in shown), title=spec.architecture)
    kinds = {linear.name.removeprefix(f"{block.name}."): linear for block in spec for linear in block.linears}
    for inner, linear in kinds.items():
        cells = (_cell(ranks, f"{block.name}.{inner}") for block in shown)
        table.add_row(f"{inner} ({linear.out_features} x {linear.in_features})", *cells)
    facts = Table(show_header=False)
    facts.add_row("parameters", f"{spec.params:,} -> {ranks.kept_params:,} ({ranks.keep:.2%} kept)")
    facts.add_row("bytes", f"{readable(spec.nbytes)} -> {readable(ranks.kept_bytes)} in {spec.dtype}")
    facts.add_row(
        "memory", f"about {readable(needs.memory_bytes)}, and {readable(needs.activation_bytes)} of activations"
    )
    facts.add_row("disk", f"about {readable(needs.disk_bytes)} for result and run folder")
    bound = "about" if plan.limit is None else "a limit of"
    facts.add_row("time", f"{bound} {duration(needs.seconds or 0)} on this machine")
    if plan.rise is not None:
        facts.add_row("loss", f"about {plan.rise:+.4f} nats a token before recovery, by the spectra")
    if plan.outline:
        known = ("bits", "one width for all") if ranks.bits else ("ranks", "those of `uniform`")
        facts.add_row(known[0], f"{known[1]}; `compress` moves budget when it has read the weights (see --preview)")
    print_tables(table, facts, _ladder(plan), *([_curve(plan)] if plan.curve else []))


def _cell(plan: "RankPlan", linear: str) -> str:
    """Return the rank of a linear, or its shape in a narrower FFN, and its bits where these are few."""
    rank, bits = plan.ranks.get(linear), plan.storage_of(linear).bits
    shape, factors = plan.shapes.get(linear), "dense" if rank is None else str(rank)
    form = factors if shape is None else " x ".join(map(str, shape))
    return form if bits is None else f"{form}, {bits} bits"


def _ladder(plan: "Planned") -> "Table":
    from rich.table import Table

    from lillama.system.resources import duration

    title = "what fits into some time on this machine, about (compress --time)"
    table = Table(
        "time", "calibration tokens", "closed form", "epochs of distillation", "epochs of recovery", title=title
    )
    for rung in plan.ladder:
        row = f"{rung.tokens:,}", f"{rung.distill_tokens:,}", str(rung.distill_epochs), f"{rung.recover_epochs:g}"
        table.add_row(duration(rung.seconds), *row)
    return table


def _curve(plan: "Planned") -> "Table":
    from rich.table import Table

    table = Table("keep", "predicted rise of the loss, nats a token", title="from spectra, before teaching")
    for keep, rise in plan.curve:
        table.add_row(f"{keep:.2f}", f"{rise:.4f}")
    return table


def _some(count: int) -> list[int]:
    """Return a few block indices: first, middle, last."""
    return sorted({0, count // 2, count - 1})
