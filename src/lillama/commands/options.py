"""Options that several commands share."""

import re
from decimal import Decimal

from cyclopts import Parameter

from lillama.errors import RecipeError, shown

Many = Parameter(consume_multiple=True, negative=())
Flag = Parameter(negative=(), show_default=False)


def size(text: str | None) -> int | None:
    """Return the bytes that `4GB`, `512MiB` or a plain number mean; None stays None.

    Raises:
        RecipeError: the text is no size.
    """
    if text is None:
        return None
    parts = re.fullmatch(r"(\d{1,30}(?:\.\d{0,30})?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    if parts is None:
        raise RecipeError(f"size {shown(text)!r}: give bytes, or a number with KB, MB, GB, TB, KiB, MiB or GiB")
    number, prefix, binary = parts.groups()
    return int(Decimal(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " "))
