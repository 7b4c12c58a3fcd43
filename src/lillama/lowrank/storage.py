"""How a weight is stored, and what that costs: arithmetic on shapes, without tensors."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field, with_config
from typing_extensions import TypedDict

ORDER_BYTES, SCALE_BYTES = 4, 2
Form = Literal["plain", "pivot"]
Bits = Literal[2, 3, 4, 5, 6, 8]
BITS: tuple[Bits, ...] = get_args(Bits)
GroupSize = Annotated[int, Field(ge=2, multiple_of=2)]


class StorageJson(TypedDict):
    """How weights are stored, in `plan.json`."""

    form: Form
    bits: Bits | None
    group_size: GroupSize


@with_config(extra="forbid")
@dataclass(frozen=True)
class Storage:
    """The form in which a weight of rank r (out x in) is written, and the type of its numbers.

    `plain` is left (out x r) and right (r x in). `pivot` is r of the weight's own rows (r x in), the coefficients of the
    other rows in these (out - r x r), and the order of all rows (PIFA, arXiv 2501.19090): the same weight in r^2 numbers
    less. At r = out there are no other rows, and nothing but the weight is left.

    Attributes:
        form: `plain` or `pivot`.
        bits: of a stored number, of dense weights too: 8 with one scale a row, 6 to 2 with one scale a group, or None for the
            original's own type.
        group_size: neighbours in a row that share a scale below 8 bits.
        feedback: whether weights are rounded so that what enters them comes out right, not each number to the nearest.

    Examples:
        >>> Storage("plain").numbers(96, 64, 32), Storage("pivot").numbers(96, 64, 32)
        (5120, 4192)
        >>> Storage("plain").largest_rank(96, 64, 5120), Storage("pivot").largest_rank(96, 64, 5120)
        (32, 42)
        >>> Storage("pivot", bits=8).nbytes(96, 64, 32, itemsize=2)
        4672
    """

    form: Form = "pivot"
    bits: Bits | None = None
    group_size: GroupSize = 64
    feedback: bool = True

    def as_json(self) -> StorageJson:
        """Return the value for JSON: what a reader of the weights must know."""
        return {"form": self.form, "bits": self.bits, "group_size": self.group_size}

    def factors(self, out_features: int, in_features: int, rank: int) -> tuple[tuple[int, int], ...]:
        """Return rows and columns of the stored matrices: left, unless it is empty, and right."""
        rows = out_features - rank if self.form == "pivot" else out_features
        return ((rows, rank), (rank, in_features)) if rows else ((rank, in_features),)

    def order(self, out_features: int, rank: int) -> int:
        """Return the length of the stored order of rows; 0 where there is none."""
        return out_features if self.form == "pivot" and rank < out_features else 0

    def numbers(self, out_features: int, in_features: int, rank: int | None) -> int:
        """Return the stored numbers, the order of rows among them; scales are not counted, nor is the bias.

        Args:
            out_features: rows of the weight.
            in_features: columns of the weight.
            rank: of the factors; None for the dense weight.
        """
        if rank is None:
            return out_features * in_features
        matrices = self.factors(out_features, in_features, rank)
        return sum(rows * columns for rows, columns in matrices) + self.order(out_features, rank)

    def nbytes(self, out_features: int, in_features: int, rank: int | None, itemsize: int) -> int:
        """Return the bytes in the weight files: factors, scales and order; neither bias nor file headers.

        Args:
            out_features: rows of the weight.
            in_features: columns of the weight.
            rank: of the factors; None for the dense weight.
            itemsize: bytes of a number in the original's type.
        """
        if rank is None:
            return self._matrix_bytes(out_features, in_features, itemsize)
        matrices = self.factors(out_features, in_features, rank)
        stored = sum(self._matrix_bytes(rows, columns, itemsize) for rows, columns in matrices)
        return stored + ORDER_BYTES * self.order(out_features, rank)

    def largest_rank(self, out_features: int, in_features: int, numbers: int) -> int:
        """Return the largest rank that stores at most so many numbers; 0 if there is none."""
        full = min(out_features, in_features)
        if self.numbers(out_features, in_features, full) <= numbers:
            return full
        return bisect_right(range(1, full), numbers, key=lambda rank: self.numbers(out_features, in_features, rank))

    def _matrix_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        if self.bits is None:
            return rows * columns * itemsize
        if self.bits == 8:
            return rows * (columns + SCALE_BYTES)
        numbers = -(-columns // 2) if self.bits == 4 else self.bits * -(-columns // 8)
        return rows * (numbers + SCALE_BYTES * -(-columns // self.group_size))
