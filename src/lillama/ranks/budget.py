"""What a rank plan may store, in numbers or in bytes, and what each rank costs of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

from lillama.errors import BudgetError
from lillama.lowrank.storage import Storage
from lillama.model.spec import LinearSpec, ModelSpec
from lillama.ranks.allocators import resolve_numbers, tolerance, unreachable
from lillama.ranks.plan import RankPlan, Scope, Shape


@dataclass(frozen=True)
class Budget:
    """What a plan may store.

    Attributes:
        spec: of the model.
        storage: form in which factorised weights are stored.
        most: numbers or bytes of the whole model.
        slack: what may be left over.
        in_bytes: whether bytes are counted.
    """

    spec: ModelSpec
    storage: Storage
    most: int
    slack: float
    in_bytes: bool

    @classmethod
    def of(cls, spec: ModelSpec, keep: float, scope: Scope, storage: Storage, nbytes: int | None) -> "Budget":
        """Return the budget of bytes, or where there is none that of a share."""
        if nbytes is None:
            return cls(spec, storage, resolve_numbers(spec, keep, scope), tolerance(spec, scope), False)
        return cls(spec, storage, nbytes, tolerance(spec, "model") * spec.bytes_per_param, True)

    def cost(self, linear: LinearSpec, rank: int | None, shape: Shape | None = None) -> int:
        """Return what a linear costs at a rank, of a narrower FFN at its shape."""
        return self._cost(*(shape or (linear.out_features, linear.in_features)), rank, self.spec.itemsize(linear))

    def useful(self, linear: LinearSpec, rank: int) -> int | None:
        """Return a rank, or None (dense) where it would not cost less than the dense weight."""
        possible = rank <= min(linear.out_features, linear.in_features)
        return rank if possible and self.cost(linear, rank) < self.cost(linear, None) else None

    def spare(self, plan: RankPlan) -> int:
        """Return what is left; negative where the ranks are too high."""
        shapes = plan.shapes
        return self.for_linears - sum(self.cost(linear, rank, shapes.get(linear.name)) for linear, rank in plan)

    def refuse(self, smallest: RankPlan, keep: float, scope: Scope) -> None:
        """Raise `BudgetError` if even the smallest plan is too large."""
        if self.spare(smallest) >= 0:
            return
        if not self.in_bytes:
            raise unreachable(smallest, keep, scope)
        raise BudgetError(
            f"bytes {self.most:,} are not reachable: the smallest model of this kind takes {smallest.kept_bytes:,}; "
            "allow more, lower ranks.floor, or store fewer bits (storage.bits)"
        )

    @cached_property
    def _cost(self) -> Callable[[int, int, int | None, int], int]:
        def cost(rows: int, columns: int, rank: int | None, itemsize: int) -> int:
            if self.in_bytes:
                return self.storage.nbytes(rows, columns, rank, itemsize)
            return self.storage.numbers(rows, columns, rank)

        return cache(cost)

    @cached_property
    def for_linears(self) -> int:
        """What all linears together may cost."""
        spec = self.spec
        if not self.in_bytes:
            return self.most - spec.params + sum(linear.params for linear in spec.linears)
        return self.most - spec.nbytes + sum(linear.params * spec.itemsize(linear) for linear in spec.linears)
