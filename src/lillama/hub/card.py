"""The model card: what a reader of a compressed model wants to know, as Markdown with the hub's front matter."""

from pathlib import PurePath

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup

from lillama.calibration.pack import Manifest
from lillama.files.publishing import markdown_templates, plain, public_name, public_recipe
from lillama.hub.rights import Rights
from lillama.hub.usage import loading_section
from lillama.runs.result import Result, environment
from lillama.system.resources import readable


def card(
    result: Result,
    *,
    base_model: str,
    recipe_name: str,
    manifest: Manifest,
    rights: Rights,
    kept_initialisations: int = 0,
    plot: str | None = None,
) -> str:
    """Return the README.md of a compressed model.

    Args:
        result: the compression.
        base_model: hub id or local folder of the original; a local path is nobody's business.
        recipe_name: as the user named the recipe.
        manifest: of the calibration text.
        rights: licence and languages of the original.
        kept_initialisations: blocks that training did not improve.
        plot: name of an image beside the card: the share of its numbers that each linear keeps.
    """
    spec, plan = result.plan.spec, result.plan
    on_hub = _is_hub_id(base_model)
    name = base_model if on_hub else PurePath(base_model).name
    sources = [source.path for source in manifest.sources] or ["written by the model itself"]
    templates = markdown_templates("lillama.hub")
    templates.filters["readable"] = readable
    body = templates.get_template("card.md.jinja").render(
        title=f"{PurePath(name).name}, {_size(result)}",
        name=name,
        spec=spec,
        result=result,
        recipe=result.recipe,
        recipe_name=recipe_name,
        recipe_text=yaml.safe_dump(public_recipe(result.recipe.as_dict()), sort_keys=False, allow_unicode=True),
        manifest=manifest,
        sources=[public_name(source) for source in sources],
        compressed=sum(plan.changes(block) for block in spec),
        narrower=len(plan.widths),
        bits=sorted({bits for block in spec for bits in plan.bits_within(block).values()}),
        counted="bytes" if any(map(plan.bits_within, spec)) else "numbers",
        kept_initialisations=kept_initialisations,
        versions=environment(),
        rights=rights,
        plot=plot,
        loading=Markup(loading_section("package", spec.architecture)),
    )
    return f"---\n{_front_matter(base_model if on_hub else None, rights, plan.reduces)}---\n\n{body}\n"


def _size(result: Result) -> str:
    """Return how small the model is: in parameters, or where all of them are kept in bytes."""
    spec, stored = result.plan.spec, result.stored
    if result.plan.reduces:
        return f"{stored.params / spec.params:.0%} of its parameters"
    return f"{stored.bytes / spec.nbytes:.0%} of its bytes"


def _is_hub_id(base_model: str) -> bool:
    """Tell whether a name has the form of a hub id."""
    try:
        validate_repo_id(base_model)
    except HFValidationError:
        return False
    return True


def _front_matter(hub_id: str | None, rights: Rights, low_rank: bool) -> str:
    fields = {
        "library_name": "transformers",
        "license": None if rights.license is None else plain(rights.license),
        "base_model": hub_id,
        "base_model_relation": hub_id and "quantized",  # the nearest of the four that the hub knows
        "language": list(map(plain, rights.languages)) or None,
        "tags": ["lillama", *(["low-rank"] if low_rank else []), "compression"],
    }
    return yaml.safe_dump({name: value for name, value in fields.items() if value is not None}, sort_keys=False)
