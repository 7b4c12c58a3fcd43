"""From the plain factors of a weight to the tensors that a layer of another form is stored as."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lillama.errors import ModelError
from lillama.lowrank.pivot import in_order, refit, to_pivots
from lillama.lowrank.quantize import dequantize, quantize
from lillama.lowrank.storage import Storage


def encode_factors(
    left: Float[Tensor, "out rank"],
    right: Float[Tensor, "rank in"],
    storage: Storage,
    rows: Int[Tensor, " out"] | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return name within the layer -> tensor, as a layer of `linear.build_factorised` for this storage loads them.

    In the pivot form the coefficients are fitted to the pivot rows as they are after quantisation.

    Args:
        left: the one plain factor.
        right: the other.
        storage: the form wanted.
        rows: as `pivot_rows` gives, for the pivot form; None for the plain one.
        dtype: of stored numbers that are not quantised.

    Raises:
        ModelError: 4 bits for an odd number of inputs.
    """
    if storage.bits == 4 and right.shape[1] % 2:
        raise ModelError(f"a weight of {right.shape[1]} inputs cannot be stored in 4 bits: two numbers make a byte")
    if rows is None:
        return _encode_factor("left", left, storage, dtype) | _encode_factor("right", right, storage, dtype)
    pivots = to_pivots(left, right, rows)
    tensors = _encode_factor("right", pivots.right, storage, dtype)
    if not in_order(rows):
        tensors["order"] = pivots.order.to(torch.int32)
    if not len(pivots.left):
        return tensors
    coefficients = pivots.left
    if storage.bits:
        coefficients = refit(pivots, dequantize(pivots.right, storage.bits, storage.group_size))
    return tensors | _encode_factor("left", coefficients, storage, dtype)


def encode_dense(weight: Float[Tensor, "out in"], storage: Storage) -> dict[str, Tensor]:
    """Return name within the layer -> tensor of a dense weight of few bits, rounded to the nearest."""
    assert storage.bits is not None
    return {f"right.{leaf}": tensor for leaf, tensor in quantize(weight, storage.bits, storage.group_size).items()}


def _encode_factor(
    side: str, factor: Float[Tensor, "rows columns"], storage: Storage, dtype: torch.dtype
) -> dict[str, Tensor]:
    if not storage.bits:
        return {f"{side}.weight": factor.to(dtype)}
    return {f"{side}.{leaf}": tensor for leaf, tensor in quantize(factor, storage.bits, storage.group_size).items()}
