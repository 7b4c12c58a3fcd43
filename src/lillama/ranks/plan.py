"""A rank plan: which rank and which bits each linear gets, how wide each FFN stays, what that costs, and its form on disk."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NotRequired, cast

from typing_extensions import TypedDict

from lillama.errors import RecipeError, printable, suggestion
from lillama.files.artefacts import Size, save_json
from lillama.files.atomic import read_json
from lillama.lowrank.storage import BITS, Storage, StorageJson
from lillama.model.spec import BlockSpec, LinearSpec, ModelSpec

VERSION = 1
Scope = Literal["model", "blocks"]
Shape = tuple[int, int]  # rows and columns of a weight
PLAIN = Storage("plain")
NEAREST = 8  # bits from which weights are rounded to the nearest
PlannedJson = TypedDict(
    "PlannedJson",
    {
        "name": str,
        "out": Size,
        "in": Size,
        "rank": Size | None,
        "kept": NotRequired[Sequence[Size]],
        "bits": NotRequired[Size],
    },
)  # `kept`: rows and columns of the linears of narrower FFNs; `bits`: where they are the linear's own


class PlanJson(TypedDict):
    """`plan.json`; `widths` is missing where every FFN has its own width."""

    version: int
    architecture: str
    storage: StorageJson
    linears: list[PlannedJson]
    widths: NotRequired[dict[str, Size]]


@dataclass(frozen=True)
class RankPlan:
    """A rank for every linear of a model; None leaves it dense. An FFN may be made narrower, its linears stay dense then.

    Attributes:
        spec: of the model that the plan is for.
        ranks: name of every linear of the spec -> rank or None.
        storage: form in which weights are stored, which decides what a rank costs.
        widths: name of an FFN's last linear -> neurons that are kept; FFNs that it does not name keep all.
        bits: name of a linear -> bits of its stored numbers, in the place of those of `storage`.

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
    widths: Mapping[str, int] = field(default_factory=dict[str, int])
    bits: Mapping[str, int] = field(default_factory=dict[str, int])

    def __getitem__(self, name: str) -> int | None:
        return self.ranks[name]

    def __iter__(self) -> Iterator[tuple[LinearSpec, int | None]]:
        return ((linear, self.ranks[linear.name]) for linear in self.spec.linears)

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Name -> rows and columns of the linears of narrower FFNs, in the model's order."""
        found: dict[str, Shape] = {}
        linears = {linear.name: linear for linear in self.spec.linears}
        for ffn in self.spec.ffns:
            width = self.widths.get(ffn.outward)
            if width is not None:
                found |= {name: (width, linears[name].in_features) for name in ffn.inward}
                found[ffn.outward] = linears[ffn.outward].out_features, width
        return found

    def shape(self, linear: LinearSpec) -> Shape:
        """Return rows and columns of what a linear's weight becomes, before it is factorised."""
        return self.shapes.get(linear.name, (linear.out_features, linear.in_features))

    def numbers(self, linear: LinearSpec) -> int:
        """Return the numbers that are stored for a linear."""
        return self.storage.numbers(*self.shape(linear), self.ranks[linear.name])

    def nbytes(self, linear: LinearSpec) -> int:
        """Return the bytes that are stored for a linear."""
        storage = self.storage_of(linear.name)
        return storage.nbytes(*self.shape(linear), self.ranks[linear.name], self.spec.itemsize(linear))

    def storage_of(self, name: str) -> Storage:
        """Return how a linear is stored."""
        return replace(self.storage, bits=self.bits[name]) if name in self.bits else self.storage

    @property
    def kept_params(self) -> int:
        """Numbers stored for the whole model under this plan."""
        removed = sum(linear.params - self.numbers(linear) for linear in self.spec.linears)
        return self.spec.params - removed - self._lost_biases

    @property
    def kept_bytes(self) -> int:
        """Bytes stored for the whole model under this plan."""
        spec = self.spec
        removed = sum(one.params * spec.itemsize(one) - self.nbytes(one) for one in spec.linears)
        return spec.nbytes - removed - self._lost_biases * spec.bytes_per_param

    @property
    def _lost_biases(self) -> int:
        """Biases of the neurons that are left out."""
        return sum(ffn.biases * (ffn.neurons - self.widths.get(ffn.outward, ffn.neurons)) for ffn in self.spec.ffns)

    @property
    def keep(self) -> float:
        """Share of the whole model's parameters that remains."""
        return self.kept_params / self.spec.params

    def ranks_within(self, block: BlockSpec) -> dict[str, int]:
        """Return name within a block -> rank of its linears that are factorised."""
        ranks = ((block.inner(linear.name), self.ranks[linear.name]) for linear in block.linears)
        return {name: rank for name, rank in ranks if rank is not None}

    def widths_within(self, block: BlockSpec) -> dict[str, int]:
        """Return name within a block of the last linear of a narrower FFN -> neurons that it keeps."""
        return {block.inner(ffn.outward): self.widths[ffn.outward] for ffn in block.ffns if ffn.outward in self.widths}

    def shapes_within(self, block: BlockSpec) -> dict[str, Shape]:
        """Return name within a block -> shape of its linears that belong to narrower FFNs."""
        names = (linear.name for linear in block.linears if linear.name in self.shapes)
        return {block.inner(name): self.shapes[name] for name in names}

    def changes(self, block: BlockSpec) -> bool:
        """Return whether anything of a block is compressed."""
        return bool(self.ranks_within(block) or self.widths_within(block))

    def bits_within(self, block: BlockSpec) -> dict[str, int]:
        """Return name within a block -> bits of its linears that are stored in few bits."""
        bits = {block.inner(linear.name): self.storage_of(linear.name).bits for linear in block.linears}
        return {name: few for name, few in bits.items() if few is not None}

    def rounded_within(self, block: BlockSpec) -> dict[str, int]:
        """Return name within a block -> bits of the linears that are rounded with feedback, not just to the nearest.

        At 8 bits there is nothing to be saved; and rows that are stored as pivots change places afterwards.
        """
        if not self.storage.feedback or (self.storage.form == "pivot" and self.ranks_within(block)):
            return {}
        return {name: few for name, few in self.bits_within(block).items() if few < NEAREST}

    @property
    def reduces(self) -> bool:
        """Whether anything of the model becomes smaller before it is stored."""
        return bool(self.factorised or self.widths)

    @property
    def compresses(self) -> bool:
        """Whether anything of the model is compressed."""
        return self.reduces or any(self.bits_within(block) for block in self.spec)

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
        if self.widths:
            value["widths"] = dict(self.widths)
        save_json(path, value)

    def rows(self) -> list[PlannedJson]:
        """Return all linears with their ranks, for JSON."""
        rows: list[PlannedJson] = []
        for linear, rank in self:
            row: PlannedJson = {"name": linear.name, "out": linear.out_features, "in": linear.in_features, "rank": rank}
            if linear.name in self.shapes:
                row["kept"] = list(self.shapes[linear.name])
            if linear.name in self.bits:
                row["bits"] = self.bits[linear.name]
            rows.append(row)
        return rows

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
        bits: dict[str, int] = {}
        for row in cast(list[Any], linears):
            name, rank = _check(row, shapes, path)
            if name in ranks:
                raise RecipeError(f"{path}: linear {name} stands there twice; leave one of the two")
            ranks[name] = rank
            if row.get("bits") is not None:
                bits[name] = _check_bits(row["bits"], name, path)
        widths = _check_widths(content.get("widths"), spec, ranks, path)
        return cls(spec, {name: ranks.get(name) for name in shapes}, storage, widths, bits)


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


def _check_bits(found: Any, name: str, path: Path) -> int:
    if type(found) is not int or found not in BITS:
        raise RecipeError(f"{path}: linear {name}: bits {printable(found)} are none of {', '.join(map(str, BITS))}")
    return found


def _check_widths(found: Any, spec: ModelSpec, ranks: Mapping[str, int | None], path: Path) -> dict[str, int]:
    """Return the widths of a plan if the model can have them."""
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise RecipeError(f"{path}: widths are {printable(found)}; names of linears with whole numbers are needed")
    ffns = {ffn.outward: ffn for ffn in spec.ffns}
    for name, width in cast(dict[str, Any], found).items():
        if name not in ffns:
            raise RecipeError(
                f"{path}: widths name {printable(name)}, which is the last linear of no FFN{suggestion(name, ffns)}"
            )
        if type(width) is not int or not 1 <= width <= ffns[name].neurons:
            raise RecipeError(
                f"{path}: width {printable(width)} of {name} is not a whole number from 1 to {ffns[name].neurons}"
            )
        factorised = next((linear for linear in ffns[name].linears if ranks.get(linear) is not None), None)
        if factorised is not None:
            raise RecipeError(
                f"{path}: {factorised} has a rank and {name} a width; the linears of a narrower FFN stay dense: leave one"
            )
    return cast(dict[str, int], found)


def budget(spec: ModelSpec, keep: float, scope: Scope) -> int:
    """Return the parameters that the whole model may hold, for `keep` as a share of the model or of its blocks."""
    return (
        int(keep * spec.params) if scope == "model" else spec.params - spec.block_params + int(keep * spec.block_params)
    )
