"""A rank plan: which rank each linear gets, what that costs, and its form on disk."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from typing_extensions import TypedDict

from lillama.errors import RecipeError, printable, suggestion
from lillama.files.artefacts import Size, save_json
from lillama.files.atomic import read_json
from lillama.lowrank.storage import Storage, StorageJson
from lillama.model.spec import BlockSpec, LinearSpec, ModelSpec

VERSION = 1
Scope = Literal["model", "blocks"]
PLAIN = Storage("plain")
PlannedJson = TypedDict("PlannedJson", {"name": str, "out": Size, "in": Size, "rank": Size | None})


class PlanJson(TypedDict):
    """`plan.json`."""

    version: int
    architecture: str
    storage: StorageJson
    linears: list[PlannedJson]


@dataclass(frozen=True)
class RankPlan:
    """A rank for every linear of a model; None leaves it dense.

    Attributes:
        spec: of the model that the plan is for.
        ranks: name of every linear of the spec -> rank or None.
        storage: form in which factorised weights are stored, which decides what a rank costs.

    Examples:
        >>> from lillama.model.spec import BlockSpec, LinearSpec, ModelSpec
        >>> block = BlockSpec("layers.0", 0, 9000, (LinearSpec("layers.0.up", 120, 60),))
        >>> plan = RankPlan(ModelSpec("Toy", 60, "float32", 4, 10000, (block,)), {"layers.0.up": 20})
        >>> plan["layers.0.up"], plan.kept_params, plan.keep
        (20, 6400, 0.64)
    """

    spec: ModelSpec
    ranks: Mapping[str, int | None]
    storage: Storage = PLAIN

    def __getitem__(self, name: str) -> int | None:
        return self.ranks[name]

    def __iter__(self) -> Iterator[tuple[LinearSpec, int | None]]:
        return ((linear, self.ranks[linear.name]) for linear in self.spec.linears)

    def numbers(self, linear: LinearSpec) -> int:
        """Return the numbers that are stored for a linear."""
        return self.storage.numbers(linear.out_features, linear.in_features, self.ranks[linear.name])

    def nbytes(self, linear: LinearSpec) -> int:
        """Return the bytes that are stored for a linear."""
        rank, itemsize = self.ranks[linear.name], self.spec.itemsize(linear)
        return self.storage.nbytes(linear.out_features, linear.in_features, rank, itemsize)

    @property
    def kept_params(self) -> int:
        """Numbers stored for the whole model under this plan."""
        return self.spec.params - sum(linear.params - self.numbers(linear) for linear in self.spec.linears)

    @property
    def kept_bytes(self) -> int:
        """Bytes stored for the whole model under this plan."""
        spec = self.spec
        return spec.nbytes - sum(one.params * spec.itemsize(one) - self.nbytes(one) for one in spec.linears)

    @property
    def keep(self) -> float:
        """Share of the whole model's parameters that remains."""
        return self.kept_params / self.spec.params

    def within(self, block: BlockSpec) -> dict[str, int]:
        """Return name -> rank of the linears of one block that are factorised."""
        ranks = ((linear.name, self.ranks[linear.name]) for linear in block.linears)
        return {name: rank for name, rank in ranks if rank is not None}

    @property
    def factorised(self) -> dict[str, int]:
        """Name -> rank of all linears that are factorised, in the model's order."""
        return {linear.name: rank for linear, rank in self if rank is not None}

    def save(self, path: Path) -> None:
        """Write the plan as JSON; `load` reads it back."""
        value: PlanJson = {
            "version": VERSION,
            "architecture": self.spec.architecture,
            "storage": self.storage.as_json(),
            "linears": self.rows(),
        }
        save_json(path, value)

    def rows(self) -> list[PlannedJson]:
        """Return all linears with their ranks, for JSON."""
        return [
            {"name": linear.name, "out": linear.out_features, "in": linear.in_features, "rank": rank}
            for linear, rank in self
        ]

    @classmethod
    def load(cls, path: Path, spec: ModelSpec, storage: Storage = PLAIN) -> "RankPlan":
        """Read a plan and check it against the model that it is to be used for.

        Linears of the model that the file does not name stay dense. How weights are stored is not read from the file.

        Raises:
            RecipeError: the file is no plan, or names a linear, a shape or a rank that the model cannot have,
                or one linear twice.
        """
        content = read_json(path, RecipeError, "give a plan that an earlier run saved (plan.json)")
        linears = content.get("linears")
        if "version" not in content or not isinstance(linears, list):
            raise RecipeError(f"{path}: not a rank plan (`version`, and `linears` as a list, are needed)")
        if content["version"] != VERSION:
            raise RecipeError(
                f"{path}: rank plan of version {printable(content['version'])}, this lillama reads version {VERSION}"
            )
        shapes = {linear.name: (linear.out_features, linear.in_features) for linear in spec.linears}
        ranks: dict[str, int | None] = {}
        for row in cast(list[Any], linears):
            name, rank = _check(row, shapes, path)
            if name in ranks:
                raise RecipeError(f"{path}: linear {name} stands there twice; leave one of the two")
            ranks[name] = rank
        return cls(spec, {name: ranks.get(name) for name in shapes}, storage)


def _check(row: Any, shapes: Mapping[str, tuple[int, int]], path: Path) -> tuple[str, int | None]:
    """Return name and rank of a plan's row if the model can have them."""
    found = cast(dict[str, Any], row if isinstance(row, dict) else {})
    if not found.keys() >= {"name", "out", "in", "rank"}:
        raise RecipeError(f"{path}: not a rank plan: {printable(cast(Any, row))} is no row with name, out, in and rank")
    name, shape, rank = found["name"], (found["out"], found["in"]), found["rank"]
    if not isinstance(name, str):
        raise RecipeError(f"{path}: {printable(name)} is no name of a linear; a text is needed")
    if name not in shapes:
        raise RecipeError(f"{path}: linear {printable(name)} is not in the model{suggestion(name, shapes)}")
    if shapes[name] != shape:
        raise RecipeError(
            f"{path}: linear {name} is {printable(shape[0])} x {printable(shape[1])} in the plan, "
            f"{shapes[name][0]} x {shapes[name][1]} in the model"
        )
    if rank is not None and not (type(rank) is int and 1 <= rank <= min(shapes[name])):
        raise RecipeError(
            f"{path}: linear {name}: rank {printable(rank)} is not a whole number from 1 to {min(shapes[name])}"
        )
    return name, rank


def budget(spec: ModelSpec, keep: float, scope: Scope) -> int:
    """Return the parameters that the whole model may hold, for `keep` as a share of the model or of its blocks."""
    return (
        int(keep * spec.params) if scope == "model" else spec.params - spec.block_params + int(keep * spec.block_params)
    )
