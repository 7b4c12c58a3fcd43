"""A recipe says what is computed; two runs with equal recipes, models and data give equal results."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import yaml
from pydantic import Field, GetCoreSchemaHandler, TypeAdapter, ValidationError, with_config
from pydantic_core import core_schema

from lillama.calibration.sample import CalibrationConfig, parse_sources
from lillama.distill.config import DistillConfig
from lillama.distill.losses import Loss
from lillama.errors import RecipeError, printable, suggestion
from lillama.files.atomic import digest
from lillama.files.packaged import package_folder
from lillama.files.yaml_text import read_yaml
from lillama.lowrank.initialisers import Initialiser, Known, TwoSided
from lillama.lowrank.storage import Storage
from lillama.ranks.adaptive import Adaptive, Allocator
from lillama.ranks.plan import Scope
from lillama.recipes.options import Overrides
from lillama.recovery.config import RecoveryConfig

Tree = dict[str, Any]


@dataclass(frozen=True)
class OneOf:
    """Marks a key that takes one of lillama's strategies by name, or in Python one of the user's own."""

    known: Any

    def own(self, strategy: object) -> bool:
        """Tell whether a strategy is a class of the user's."""
        known = (dict, *get_args(self.known))
        return is_dataclass(strategy) and callable(strategy) and not isinstance(strategy, known)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Read one of lillama's by its name; leave one of the user's as it is, and write down its name and fields."""
        return core_schema.no_info_wrap_validator_function(
            lambda value, read: value if self.own(value) else read(value),
            handler.generate_schema(Annotated[self.known, Field(discriminator="name")]),
            serialization=core_schema.wrap_serializer_function_ser_schema(
                lambda value, write: {"name": value.name} | asdict(value) if self.own(value) else write(value)
            ),
        )


INITIALISER = OneOf(Known)


@with_config(extra="forbid")
@dataclass(frozen=True)
class Recipe:
    """What is computed, from the size wanted to the seed. The defaults are the recipe `default`.

    Attributes:
        keep: share of the parameters that remains.
        scope: what `keep` is a share of: the whole `model`, or its `blocks` alone.
        bytes: that the whole model may take; it decides the size in the place of `keep`.
        targets: globs of the linears to factorise, as in `describe`.
        ignore: globs of linears to leave dense.
        split_gate_up: whether gate and up of an expert get factors of their own; otherwise they share the right one.
        ranks: how ranks are given to linears.
        storage: in which form factorised weights are stored, and in how many bits all linears.
        init: how factors start.
        distill: how blocks are taught.
        recover: how all blocks are taught together in the end.
        calibration: which text is used.
        seed: of every random choice.

    Examples:
        >>> Recipe().distill.stream
        'student'
        >>> recipe = load_recipe("paper", {"keep": 0.7, "distill": {"epochs": 2}})
        >>> recipe.keep, recipe.distill.epochs, recipe.init.name
        (0.7, 2, 'svd')
    """

    keep: Annotated[float, Field(gt=0, le=1)] = 0.8
    scope: Scope = "model"
    bytes: Annotated[int, Field(ge=1)] | None = None
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    split_gate_up: bool = False
    ranks: Annotated[Allocator, Field(discriminator="name")] = field(default_factory=Adaptive)
    storage: Storage = field(default_factory=Storage)
    init: Annotated[Initialiser, INITIALISER] = field(default_factory=TwoSided)
    distill: DistillConfig = field(default_factory=DistillConfig)
    recover: RecoveryConfig = field(default_factory=RecoveryConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def as_dict(self) -> Tree:
        """Return the recipe as nested JSON values, every key written out."""
        return _adapter().dump_python(self, mode="json")

    def as_yaml(self) -> str:
        """Return the recipe as YAML that `load_recipe` reads back."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)

    def distill_in(self, last_stack: bool) -> DistillConfig:
        """Return how the blocks of the last stack, which is the one that recovery reaches, or of another one are taught."""
        recovered = last_stack and self.recover.wanted and self.recover.trains == "all"
        taught = self.distill.blocks == "all" or not recovered
        return self.distill if taught else replace(self.distill, epochs=0)

    @property
    def hash(self) -> str:
        """SHA-256 of what the recipe says, in hexadecimal."""
        return digest(self.as_dict())


def load_recipe(recipe: "str | Path | Recipe" = "default", overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return a recipe by name, from a YAML file, or as it is, with some values replaced.

    Keys that a file leaves out keep the values of `default`. A strategy (`ranks`, `init`, `distill.loss`) that is
    replaced by one of another `name` brings its own defaults.

    Args:
        recipe: name of a recipe that comes with lillama, path of a YAML file, or a recipe. A recipe in Python may hold an
            initialiser of your own, see `OwnInitialiser`.
        overrides: nested values that replace the recipe's.

    Raises:
        RecipeError: no such recipe, an unknown key (the nearest is suggested), or a value of the wrong type.

    Examples:
        >>> load_recipe("default", {"distill": {"epochs": 8}}).distill.epochs
        8
        >>> load_recipe("defualt")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        lillama.errors.RecipeError: recipe defualt: neither a file nor one of ...default, paper, ...; did you mean 'default'?
    """
    if isinstance(recipe, Recipe):
        base = recipe
    else:
        path = recipe_file(str(recipe))
        base = _validate(_merge(Recipe().as_dict(), _read(path)), f"{path}: ")
    own = {"init": base.init} if INITIALISER.own(base.init) else {}
    return _validate(_merge(base.as_dict() | own, overrides or {}), "")


def pick_recipe(recipe: "str | Path | Recipe | None", overrides: Overrides) -> "str | Path | Recipe":
    """Return the recipe that is meant where none is named: `bits` for a size in bytes alone, else `default`."""
    if recipe is not None:
        return recipe
    return "bits" if overrides.nbytes is not None and overrides.bits is None else "default"


def override(recipe: "str | Path | Recipe", overrides: Overrides) -> Recipe:
    """Return a recipe, read like `load_recipe`, with the values replaced that are not None."""
    given = {name: value for name, value in vars(overrides).items() if value is not None}
    tree = {key: given[key] for key in ("keep", "scope", "targets", "ignore", "seed") if key in given}
    tree["calibration"] = {key: given[key] for key in ("tokens", "seq_len") if key in given}
    if overrides.nbytes is not None:
        tree["bytes"] = overrides.nbytes
    if overrides.calibration is not None:
        tree["calibration"]["sources"] = [asdict(source) for source in parse_sources(overrides.calibration)]
    if overrides.bits is not None:  # rounded to 4 bits, pivots err twice as much (docs/findings.md)
        tree["storage"] = {"bits": overrides.bits} | ({"form": "plain"} if overrides.bits < 8 else {})
    if overrides.recover is False:
        tree["recover"] = {"epochs": 0, "steps": None}
    return load_recipe(recipe, tree)


def recipe_name(recipe: "str | Path | Recipe") -> str:
    """Return what a reader knows a recipe by: the name, or the file's name, that it was asked for."""
    return "(a Recipe in Python)" if isinstance(recipe, Recipe) else Path(recipe).name


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with lillama: `default`, `baselines/svd`, ..."""
    folder = package_folder("recipes")
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def recipe_file(recipe: str) -> Path:
    """Return the file of a named recipe, or the path itself if it is one.

    Raises:
        RecipeError: there is no such recipe or file.
    """
    if recipe in recipe_names():
        return package_folder("recipes") / f"{recipe}.yaml"
    if Path(recipe).is_file():
        return Path(recipe)
    names = recipe_names()
    raise RecipeError(f"recipe {recipe}: neither a file nor one of {', '.join(names)}{suggestion(recipe, names)}")


@cache
def _adapter() -> Any:
    return TypeAdapter(Recipe)


def _read(path: Path) -> Tree:
    tree = read_yaml(path)
    if not isinstance(tree, dict | None):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, found {type(tree).__name__}")
    odd = next((key for key in tree or {} if not isinstance(key, str)), None)
    if odd is not None:
        raise RecipeError(f"{path}: unknown key {printable(odd)}")
    return tree or {}


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if (
            isinstance(value, Mapping)
            and isinstance(old, Mapping)
            and value.get("name", old.get("name")) == old.get("name")
        ):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _validate(tree: Tree, origin: str) -> Recipe:
    """Turn nested values into a recipe; `origin` begins the text of an error."""
    try:
        recipe = _adapter().validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part not in _strategy_names()]
        key = ".".join(place)
        if first["type"] == "unexpected_keyword_argument":
            last = str(first["loc"][-1])  # maybe the name of a strategy where none belongs
            key = key if place[-1:] == [last] else ".".join([*place, last])
            raise RecipeError(f"{origin}unknown key {key}{suggestion(last, _keys(Recipe))}") from None
        if first["type"] == "union_tag_invalid":
            context = first.get("ctx", {})
            found, known = str(context["tag"]), context["expected_tags"].replace("'", "").split(", ")
            choice = f"it must be one of {', '.join(known)}{suggestion(found, known)}"
            raise RecipeError(f"{origin}{key}.name is {found!r}: {choice}") from None
        expected = first["msg"].replace("Input should be ", "it must be ")
        raise RecipeError(f"{origin}{key} is {first['input']!r:.100}: {expected}") from None
    numbers = {"tokens": recipe.calibration.tokens, "seq_len": recipe.calibration.seq_len}
    for key, value in numbers.items():
        if value < 1:
            raise RecipeError(f"{origin}calibration.{key} is {value}: it must be at least 1")
    return recipe


def _keys(kind: Any) -> set[str]:
    """Return the names of all fields of a dataclass, and of the dataclasses that its annotations speak of."""
    inner = [_keys(part) for part in get_args(kind)]
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        inner += [{part.name} | _keys(hints[part.name]) for part in fields(kind)]
    return set[str]().union(*inner)


@cache
def _strategy_names() -> frozenset[str]:
    """Return the names of all strategies: where a value went wrong, pydantic names them beside the keys."""
    strategies = (*get_args(Allocator), *get_args(Known), *get_args(Loss))
    return frozenset(strategy.name for strategy in strategies)
