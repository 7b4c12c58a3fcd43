"""From a model folder to a smaller one: the public functions."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from lillama.errors import OutputError, RecipeError
from lillama.files.atomic import resolve_path
from lillama.model.remote import remote_code
from lillama.pipeline.compress import claim_target, compress_model, read_texts
from lillama.pipeline.job import Planned, build_job, plan
from lillama.pipeline.search import preview_ranks, refuse_search, search_keep
from lillama.recipes.options import Machine, Overrides, OverridesDict, TimeLimit, refuse_two_sizes
from lillama.recipes.recipe import Recipe, override, pick_recipe, recipe_name
from lillama.runs.result import Result
from lillama.system.progress import Report, silent
from lillama.system.resources import explain_shortage


def compress(
    model: str | Path,
    out: str | Path,
    *,
    max_loss: float | None = None,
    time: str | float | None = None,
    recipe: str | Path | Recipe | None = None,
    rank_plan: str | Path | None = None,
    texts: str | Path | Sequence[str | Path] = (),
    run: str | Path | None = None,
    restart: bool = False,
    machine: Machine | None = None,
    report: Report = silent,
    trust_remote_code: bool = False,
    **options: Unpack[OverridesDict],
) -> Result:
    """Make a smaller model: fewer numbers or fewer bits in its linears, taught to give what the original gives.

    The same call after a kill goes on where it stopped and gives the same bits. `out` appears only when it is complete.

    Args:
        model: local folder or hub id of a model with safetensors weights.
        out: folder to make: an ordinary model folder.
        max_loss: the smallest model is looked for whose loss on held-out calibration sequences rises by at most so many
            nats a token; several models are made on the way.
        time: that the whole work may take: seconds, or a text such as "20m" or "1h30m". Calibration tokens, epochs of
            distillation and steps of recovery are chosen for it, by what this machine does in a second; the model is then
            that of the recipe with these, which the result names. By default what the recipe takes; `default`, where no
            `tokens` are given, an hour at most.
        recipe: name, YAML file, or `Recipe`; None is `bits` where `nbytes` are given and no `bits`, else `default`.
        rank_plan: file of a plan to use instead of a new one.
        texts: files on which perplexity is measured before and after.
        run: folder of the run's artefacts; by default `out` with `.run` at the end.
        restart: forget an earlier run in that folder.
        machine: device, memory and file sizes.
        report: told about progress.
        trust_remote_code: whether code that lies in the model's folder (`auto_map`) may run, as in transformers.
        **options: `keep`, `nbytes`, `calibration`, `tokens`, `seq_len`, `scope`, `bits`, `recover`, `targets`, `ignore`,
            `seed`, which replace the recipe's values; see `lillama.recipes.options.Overrides`.

    Raises:
        LillamaError: something cannot be used; the text says what and how to mend it.

    Examples:
        >>> from tempfile import mkdtemp
        >>> result = compress("demo/model", mkdtemp(), keep=0.8, tokens=512, seq_len=64, texts=["demo/text.txt"])
        >>> result.plan.keep <= 0.8
        True
        >>> import lillama, transformers
        >>> smaller = transformers.AutoModelForCausalLM.from_pretrained(result.path)
    """
    out, overrides = Path(out).expanduser(), Overrides.of(**options)
    refuse_two_sizes(keep=overrides.keep, bytes=overrides.nbytes, max_loss=max_loss, plan=rank_plan)
    recipe = pick_recipe(recipe, overrides)
    wanted, folder = override(recipe, overrides), _run_folder(out, run)
    limit = TimeLimit.of(time, recipe, overrides)
    if max_loss is not None:
        refuse_search(max_loss, folder)
        if time is not None:
            raise RecipeError(
                f"--time {time} and --max-loss {max_loss}: a search makes several models; give one of them"
            )
    with (
        remote_code(trust_remote_code),
        explain_shortage(),
        claim_target(out, folder, restart, read_texts(texts), limit) as target,
    ):
        job = build_job(model, wanted, machine or Machine(), rank_plan, recipe_name(recipe))
        if max_loss is not None:
            return search_keep(job, wanted, target, max_loss, report)
        return compress_model(job, target, report)


def preview(
    model: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    machine: Machine | None = None,
    report: Report = silent,
    trust_remote_code: bool = False,
    **options: Unpack[OverridesDict],
) -> Planned:
    """Measure the spectra of a model's weights: the ranks that they lead to, and the loss predicted for every size.

    The arguments are those of `compress`. Weights and calibration text are read, nothing is written. The prediction is of
    second order and takes the linears as independent: expect the real rise to be larger before teaching.

    Raises:
        LillamaError: something cannot be used; the text says what and how to mend it.

    Examples:
        >>> planned = preview("demo/model", keep=0.8, calibration="demo/text.txt", tokens=512, seq_len=64)
        >>> keep, rise = planned.curve[0]
        >>> keep, 0 < rise < planned.curve[1][1] < planned.rise
        (0.95, True)
    """
    overrides = Overrides.of(**options)
    refuse_two_sizes(keep=overrides.keep, bytes=overrides.nbytes)
    recipe = pick_recipe(recipe, overrides)
    wanted, machine = override(recipe, overrides), machine or Machine()
    with remote_code(trust_remote_code), explain_shortage():
        planned = plan(model, recipe=recipe, machine=machine, trust_remote_code=trust_remote_code, **options)
        wanted = replace(wanted, calibration=planned.recipe.calibration, distill=planned.recipe.distill)
        job = build_job(model, wanted, machine)
        return preview_ranks(job, planned, wanted, report)


def _run_folder(out: Path, run: str | Path | None) -> Path:
    """Return the place of the run folder, beside `out` if nothing else is wanted."""
    if out.name in ("", ".."):
        raise OutputError(f"{out}: OUT is a folder to make; give it a name")
    folder = Path(run).expanduser() if run is not None else out.with_name(f"{out.name}.run")
    inner, outer = resolve_path(folder), resolve_path(out)
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise OutputError(f"{folder}: run folder and OUT lie in each other; choose another --run")
    return folder
