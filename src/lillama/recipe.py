"""A recipe says what is computed; two runs with equal recipes, models and data give equal results."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError, with_config

from lillama.calibration.gather import CalibrationConfig, parse_sources
from lillama.distill.config import DistillConfig
from lillama.errors import RecipeError, suggestion
from lillama.files import digest
from lillama.lowrank.initialize import Initialiser, Whitened
from lillama.ranks.allocate import Allocator, Uniform
from lillama.ranks.plan import Scope

Tree = dict[str, Any]


@with_config(extra="forbid")
@dataclass(frozen=True)
class Recipe:
    """What is computed, from the size wanted to the seed. The defaults are the recipe `default`.

    Attributes:
        keep: share of the parameters that remains.
        scope: what `keep` is a share of: the whole `model`, or its `blocks` alone.
        targets: globs of the linears to factorise, as in `describe`.
        ignore: globs of linears to leave dense.
        ranks: how ranks are given to linears.
        init: how factors start.
        distill: how blocks are taught.
        calibration: which text is used.
        seed: of every random choice.

    Examples:
        >>> Recipe().distill.stream
        'both'
        >>> recipe = load_recipe("paper", {"keep": 0.7, "distill": {"epochs": 2}})
        >>> recipe.keep, recipe.distill.epochs, recipe.init.name
        (0.7, 2, 'svd')
    """

    keep: Annotated[float, Field(gt=0, le=1)] = 0.8
    scope: Scope = "model"
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    ranks: Annotated[Allocator, Field(discriminator="name")] = field(default_factory=Uniform)
    init: Annotated[Initialiser, Field(discriminator="name")] = field(default_factory=Whitened)
    distill: DistillConfig = field(default_factory=DistillConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    seed: int = 0

    def as_dict(self) -> Tree:
        """Return the recipe as nested JSON values, every key written out."""
        return _adapter().dump_python(self, mode="json")

    def as_yaml(self) -> str:
        """Return the recipe as YAML that `load_recipe` reads back."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)

    @property
    def hash(self) -> str:
        """SHA-256 of what the recipe says, in hexadecimal."""
        return digest(self.as_dict())


def load_recipe(recipe: "str | Path | Recipe" = "default", overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return a recipe by name, from a YAML file, or as it is, with some values replaced.

    Keys that a file leaves out keep the values of `default`. A strategy (`ranks`, `init`, `distill.loss`) that is
    replaced by one of another `name` brings its own defaults.

    Args:
        recipe: name of a recipe that comes with lillama, path of a YAML file, or a recipe.
        overrides: nested values that replace the recipe's.

    Raises:
        RecipeError: no such recipe, an unknown key (the nearest is suggested), or a value of the wrong type.
    """
    if isinstance(recipe, Recipe):
        tree, origin = recipe.as_dict(), "recipe"
    else:
        path = recipe_file(str(recipe))
        tree, origin = _read(path), path.name
    return _validated(_merged(tree, overrides or {}), origin)


def chosen(
    recipe: "str | Path | Recipe",
    *,
    keep: float | None = None,
    scope: str | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    calibration: Sequence[str] | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
) -> Recipe:
    """Return a recipe with the options replaced that are not None, as the command line gives them."""
    sources = None if calibration is None else [asdict(source) for source in parse_sources(calibration)]
    top = {"keep": keep, "scope": scope, "targets": targets, "ignore": ignore, "seed": seed}
    inner = {"sources": sources, "tokens": tokens, "seq_len": seq_len}
    given = {key: value for key, value in top.items() if value is not None}
    return load_recipe(recipe, given | {"calibration": {k: v for k, v in inner.items() if v is not None}})


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with lillama."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def recipe_file(recipe: str) -> Path:
    """Return the file of a named recipe, or the path itself if it is one.

    Raises:
        RecipeError: there is no such recipe or file.
    """
    if recipe in recipe_names():
        return Path(str(_folder())) / f"{recipe}.yaml"
    if Path(recipe).is_file():
        return Path(recipe)
    names = recipe_names()
    raise RecipeError(f"recipe {recipe}: neither a file nor one of {', '.join(names)}{suggestion(recipe, names)}")


def _folder():
    return files("lillama") / "recipes"


@cache
def _adapter() -> TypeAdapter[Recipe]:
    return TypeAdapter(Recipe)


def _read(path: Path) -> Tree:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict | None):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, found {type(tree).__name__}")
    return tree or {}


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        same = (
            isinstance(value, Mapping)
            and isinstance(old, Mapping)
            and value.get("name", old.get("name")) == old.get("name")
        )
        merged[key] = _merged(old, value) if same else value
    return merged


def _validated(tree: Tree, origin: str) -> Recipe:
    try:
        return _adapter().validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        key = ".".join(place)
        if first["type"] == "unexpected_keyword_argument":
            raise RecipeError(f"{origin}: unknown key {key}{suggestion(place[-1], _known_keys())}") from None
        raise RecipeError(f"{origin}: {key} is {first['input']!r}: {first['msg']}") from None


def _known_keys() -> set[str]:
    def walk(value: Any) -> set[str]:
        if not is_dataclass(value):
            return set()
        return {name.name for name in fields(value)}.union(*(walk(getattr(value, name.name)) for name in fields(value)))

    return walk(Recipe()) | {"multiple_of", "min_rank", "step", "damping", "path", "field", "weight", "split", "config"}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-3` is a number, as everybody means it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
