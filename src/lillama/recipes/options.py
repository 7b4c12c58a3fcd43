"""What can be asked for: the flags of the command line and the arguments of `compress`, `plan` and `preview`, written once.

Cyclopts turns each dataclass into flags, and its docstring into their help. Nothing heavy is imported here, so that
`lillama --help` is there at once.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, Unpack

from cyclopts import Parameter

from lillama.errors import RecipeError, printable

if TYPE_CHECKING:
    import torch
    from cyclopts import Token

Many = Parameter(consume_multiple=True, negative=())
Flag = Parameter(negative=(), show_default=False)
Flat = Parameter(name="*")  # the fields of a dataclass, as flags of their own
Unshown = Parameter(name="*", show=False)  # the same, taken without a word in the help

UNASKED = 3600.0  # seconds that the recipe `default` takes at most, where nothing is said of tokens or time
SIZE_DIGITS = 40  # the longest text of a size that is looked at
CPU_TOKENS, ACCELERATOR_TOKENS = 4096, 16384  # computed at once, if the user does not say

Paths = str | Path | Sequence[str | Path]


def parse_size(text: str) -> int:
    """Return the bytes that `4GB`, `512MiB` or a plain number mean.

    Raises:
        RecipeError: the text is no size.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    if len(text) <= SIZE_DIGITS:
        with suppress(ValidationError):
            return int(TypeAdapter(ByteSize).validate_python(text))
    raise RecipeError(f"size {printable(text)!r}: give bytes, or a number with KB, MB, GB, TB, KiB, MiB or GiB")


def parse_duration(text: str) -> float:
    """Return the seconds that `20m`, `1h30m`, `90s` or a plain number mean.

    Raises:
        RecipeError: the text is no time, or none.

    Examples:
        >>> parse_duration("1h30m"), parse_duration("90")
        (5400.0, 90.0)
    """
    parts = re.fullmatch(r"(?:([\d.]{1,9})h)?(?:([\d.]{1,9})m)?(?:([\d.]{1,9})s?)?", text.strip().lower())
    with suppress(ValueError):
        if parts is not None and any(parts.groups()):
            hours, minutes, seconds = (float(part or 0) for part in parts.groups())
            if total := 3600 * hours + 60 * minutes + seconds:
                return total
    raise RecipeError(f"time {printable(text)!r}: give hours, minutes or seconds, for example 1h30m, 20m or 90s")


def _size_of(hint: Any, tokens: "Sequence[Token]") -> int:
    """Convert the word behind a flag, as cyclopts asks for it."""
    return parse_size(tokens[0].value)


SizeFlag = Annotated[int, Parameter(converter=_size_of, metavar="SIZE", show_default=False)]


class OverridesDict(TypedDict, total=False):
    """The fields of `Overrides` as keyword arguments; a single text or path stands for a list of one."""

    keep: float | None
    nbytes: int | None
    calibration: Paths | None
    tokens: int | None
    seq_len: int | None
    scope: Literal["model", "blocks"] | None
    bits: Literal[2, 3, 4, 5, 6, 8] | None
    recover: bool | None
    targets: str | Sequence[str] | None
    ignore: str | Sequence[str] | None
    seed: int | None


@dataclass(frozen=True)
class Overrides:
    """What replaces values of a recipe; None keeps the recipe's.

    Attributes:
        keep: Share of the parameters that remains [default: the recipe's, 0.8].
        nbytes: Size that the weights may have, for example 4GiB, instead of --keep; without --recipe and --bits all numbers
            stay, in as many bits as they are worth (recipe `bits`).
        calibration: Files (.txt .md .jsonl .json .parquet), dataset folders or hub dataset ids; `self` [default] lets the
            model write.
        tokens: Calibration tokens [default: the recipe's].
        seq_len: Tokens of a sequence [default: the recipe's].
        scope: What --keep is a share of: the whole `model` [default] or its `blocks`.
        bits: Store all linears in 8, 6, 5, 4, 3 or 2 bits a number [default: the original's type].
        recover: Recovery, in which all blocks learn together; False, or --no-recover, leaves it out.
        targets: Globs of the linears to factorise, by full name or by name within the block [default: all].
        ignore: Globs of linears to leave dense.
        seed: Of every random choice.

    Examples:
        >>> Overrides.of(calibration="a.txt", tokens=4096).calibration
        ('a.txt',)
    """

    keep: float | None = None
    nbytes: Annotated[SizeFlag | None, Parameter(name="--bytes")] = None
    calibration: Annotated[tuple[str, ...] | None, Many] = None
    tokens: int | None = None
    seq_len: int | None = None
    scope: Literal["model", "blocks"] | None = None
    bits: Literal[2, 3, 4, 5, 6, 8] | None = None
    recover: Annotated[bool | None, Parameter(name="", negative="--no-recover")] = None
    targets: Annotated[tuple[str, ...] | None, Many] = None
    ignore: Annotated[tuple[str, ...] | None, Many] = None
    seed: int | None = None

    @classmethod
    def of(cls, **options: Unpack[OverridesDict]) -> "Overrides":
        """Return the overrides that keyword arguments mean; see `OverridesDict`."""
        lists = {name: as_texts(options.get(name)) for name in ("calibration", "targets", "ignore")}
        return cls(**options | lists)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Machine:
    """How a compression is computed; nothing of it changes what is computed beyond rounding.

    Attributes:
        device: `cpu`, `cuda`, `mps`, ... [default: an accelerator if there is one].
        micro_batch: Sequences that are computed at once; lower it when memory is short [default: as many as hold 4096 tokens,
            16384 on accelerators].
        activation_memory: Memory for activations between blocks, for example 4GB; what is more goes to disk [default: a
            quarter of what is free].
        shard_bytes: Largest size of a weight file of the result [default: 5GB].
        compile: Fuse the steps of each block by torch.compile: somewhat faster after a warm-up of some seconds a block, the
            same result up to rounding.

    Examples:
        >>> import torch
        >>> Machine(device="cpu", micro_batch=4).rows(seq_len=256, device=torch.device("cpu"))
        4
        >>> Machine().rows(seq_len=256, device=torch.device("cpu"))
        16
    """

    device: str | None = None
    micro_batch: int | None = None
    activation_memory: SizeFlag | None = None
    shard_bytes: Annotated[SizeFlag, Parameter(name="--shard-size")] = 5_000_000_000
    compile: Annotated[bool, Flag] = False

    def rows(self, seq_len: int, device: "torch.device") -> int:
        """Return the sequences that are computed at once."""
        tokens = CPU_TOKENS if device.type == "cpu" else ACCELERATOR_TOKENS
        return self.micro_batch or max(1, tokens // seq_len)

    def refuse_senseless(self) -> None:
        """Raise `RecipeError` for a number below what makes sense."""
        for name, least in (("micro_batch", 1), ("activation_memory", 0), ("shard_bytes", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"{name} is {value}; it must be at least {least}")


@dataclass(frozen=True)
class TimeLimit:
    """How long a whole command may take.

    Attributes:
        seconds: of the command.
        asked: whether the user named it, and all of it may be filled; otherwise the recipe says what is most, and what
            would take no longer is left as it is.
    """

    seconds: float
    asked: bool = True

    @classmethod
    def of(cls, wanted: str | float | None, recipe: object, overrides: Overrides) -> "TimeLimit | None":
        """Return the limit that is wanted; an hour for the recipe `default` where the user says nothing of effort.

        Raises:
            RecipeError: the text is no time.
        """
        if wanted is not None:
            return cls(parse_duration(str(wanted)))
        return cls(UNASKED, asked=False) if recipe == "default" and overrides.tokens is None else None


@dataclass(frozen=True)
class RunPlace:
    """Where a run's artefacts lie.

    Attributes:
        run: Run folder, where an unfinished run is found again [default: OUT.run].
        restart: Forget an earlier run in the run folder.
    """

    run: Path | None = None
    restart: Annotated[bool, Flag] = False


def as_texts(values: Paths | None) -> tuple[str, ...] | None:
    """Return texts or paths as a tuple of texts; a single one is a tuple of one, None stays None."""
    if values is None:
        return None
    return (str(values),) if isinstance(values, str | Path) else tuple(map(str, values))


def refuse_two_sizes(**sizes: object) -> None:
    """Raise `RecipeError` where more than one option would decide the size; None is an option that was not given."""
    given = {name: value for name, value in sizes.items() if value is not None}
    if len(given) > 1:
        options = " and ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
        raise RecipeError(f"{options}: each decides the size; give one of them")
