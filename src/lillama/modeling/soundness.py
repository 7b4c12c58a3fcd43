"""What the section of a compressed model and its stored factors must fulfil.

Each function returns the reason of a refusal, or None: who calls knows the folder and the kind of error. Imports torch and
`linear` alone, on one line: the same text ships inside portable models.
"""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, cast

import torch
from torch import nn

from lillama.modeling.linear import Factorised, low_rank_linears

# Of names and layout in the weight files; 1 knows the plain form alone, in floating point, 2 no other shapes, 3 no dense
# weights of few bits, of bits 4 and 8 alone, and no negative scales.
FORMAT_VERSION = 4
FORMS, BITS = ("plain", "pivot"), (None, 2, 3, 4, 5, 6, 8)
AGAIN = "fetch the model again"
INFINITE = 0x7F80  # the bits of a scale of infinity, and of all that is smaller and positive below them
SIZE = 0x7FFF  # all bits of a scale but its sign


def refusal(section: Any) -> str | None:
    """Return why the `quantization_config` of a compressed model cannot be read here, or None."""
    if not isinstance(section, Mapping):
        return f"quantization_config is {_excerpt(section)}: a mapping is expected; {AGAIN}"
    section = cast(Mapping[str, Any], section)
    version = section.get("format_version")
    if version is not None and not _whole(version, 1):
        return f"format_version is {_excerpt(version)}: a whole number of at least 1 is expected; {AGAIN}"
    if version is not None and version > FORMAT_VERSION:
        return (
            f"format_version {_excerpt(version)} was written by a newer lillama: upgrade (this one reads up to "
            f"{FORMAT_VERSION})"
        )
    ranks, storage = section.get("ranks"), section.get("storage")
    return (
        _ranks(ranks)
        or _shapes(section.get("shapes"))
        or _storage(storage)
        or _bits(section.get("bits"), storage)
        or _absorb(section.get("absorbed"), ranks, storage)
    )


def shape_misfit(name: str, shape: Sequence[int], dense: nn.Module) -> str | None:
    """Return why a shape is none that a dense layer may be narrowed to, or None.

    Args:
        name: of the layer in the full model.
        shape: rows and columns of the weight.
        dense: an `nn.Linear` or a Conv1D; may be on the meta device.
    """
    weight = cast(torch.Tensor, dense.weight)
    rows, columns = weight.shape if isinstance(dense, nn.Linear) else reversed(weight.shape)
    if shape[0] <= rows and shape[1] <= columns:
        return None
    return f"{name}: shape {_excerpt(list(shape))} is not possible: the linear has {rows} x {columns}; {AGAIN}"


def misfit(name: str, rank: int, linear: nn.Linear) -> str | None:
    """Return why a rank is none of a linear, or None.

    Args:
        name: of the linear in the full model.
        rank: a whole number of at least 1.
        linear: the dense one; may be on the meta device.
    """
    most = linear.out_features
    if rank <= most:
        return None
    return f"{name}: rank {_excerpt(rank)} is not possible: the linear has {most} outputs; {AGAIN}, or lower the rank"


def fault(model: nn.Module, prefix: str = "") -> str | None:
    """Return what the stored numbers of factorised layers cannot be, or None.

    An order is a permutation of the rows, integers have the type of their form, scales are positive and finite. Numbers
    in floating point are asked for their type only: whether they are finite is the reader's business. Tensors on the meta
    device are passed over.

    Args:
        model: or any part of it.
        prefix: its name in the full model, for the text.
    """
    for name, layer in low_rank_linears(model):
        for leaf, tensor in layer.state_dict(keep_vars=True).items():
            reason = None if tensor.is_meta else _unsound(leaf, tensor, layer)
            if reason is not None:
                return f"{prefix}.{name}.{leaf} {reason}; {AGAIN}".removeprefix(".")
    return None


def _unsound(leaf: str, tensor: torch.Tensor, layer: Factorised) -> str | None:
    last = leaf.rpartition(".")[2]
    integers = {"order": torch.int32, "scale": torch.int16}
    if last == "qweight":
        factor = layer.get_submodule(leaf.rpartition(".")[0])
        integers["qweight"] = torch.int8 if getattr(factor, "bits", 8) == 8 else torch.uint8
    if tensor.dtype != integers.get(last, tensor.dtype if tensor.is_floating_point() else None):
        return f"is of type {tensor.dtype}, but {integers.get(last, 'floating point')} is expected"
    if last == "order" and not _permutes(tensor):
        return f"is no permutation of the {len(tensor)} rows"
    if last == "scale":
        turned = getattr(layer.get_submodule(leaf.rpartition(".")[0]), "bits", 8) == 4  # where a scale may be negative
        size = tensor & SIZE if turned else tensor
        if not bool(((size > 0) & (size < INFINITE)).all()):
            return f"holds values that are no scales (0, {'' if turned else 'negative, '}infinite or NaN)"
    return None


def _permutes(order: torch.Tensor) -> bool:
    return torch.equal(order.sort().values, torch.arange(len(order), dtype=order.dtype, device=order.device))


def _ranks(ranks: Any) -> str | None:
    if not isinstance(ranks, Mapping):
        return f"ranks are {_excerpt(ranks)}: a mapping of names to ranks is expected; {AGAIN}"
    for name, rank in cast(Mapping[Any, Any], ranks).items():
        if not isinstance(name, str):
            return f"ranks name {_excerpt(name)}: the name of a linear is expected; {AGAIN}"
        if not _whole(rank, 1):
            return f"{name}: rank {_excerpt(rank)} is not possible; leave the layer out of the ranks to keep it dense"
    return None


def _shapes(shapes: Any) -> str | None:
    if shapes is None:
        return None
    if not isinstance(shapes, Mapping):
        return f"shapes are {_excerpt(shapes)}: a mapping of names to rows and columns is expected; {AGAIN}"
    for name, shape in cast(Mapping[Any, Any], shapes).items():
        if not isinstance(name, str):
            return f"shapes name {_excerpt(name)}: the name of a linear is expected; {AGAIN}"
        sizes = cast(list[Any], shape) if isinstance(shape, list | tuple) else []
        if len(sizes) != 2 or not all(_whole(size, 1) for size in sizes):
            return f"{name}: shape {_excerpt(shape)} is not possible: rows and columns are expected; {AGAIN}"
    return None


def _storage(storage: Any) -> str | None:
    if storage is None:
        return None
    if not isinstance(storage, Mapping):
        return f"storage is {_excerpt(storage)}: a mapping of form, bits and group_size is expected; {AGAIN}"
    storage = cast(Mapping[str, Any], storage)
    bits, group = storage.get("bits"), storage.get("group_size")
    if storage.get("form") not in FORMS or bits not in BITS or isinstance(bits, bool | float):
        return f"storage is {_excerpt(storage)}: form must be one of {FORMS}, bits one of {BITS}; {AGAIN}"
    if (bits is not None or group is not None) and (not _whole(group, 2) or group % 2):
        return f"storage.group_size is {_excerpt(group)}: an even number of at least 2 is expected; {AGAIN}"
    return None


def _bits(bits: Any, storage: Any) -> str | None:
    if bits is None:
        return None
    if not isinstance(bits, Mapping):
        return f"bits are {_excerpt(bits)}: a mapping of names to bits is expected; {AGAIN}"
    for name, own in cast(Mapping[Any, Any], bits).items():
        if not isinstance(name, str):
            return f"bits name {_excerpt(name)}: the name of a linear is expected; {AGAIN}"
        if not _whole(own, 1) or own not in BITS:
            return f"{name}: bits {_excerpt(own)} are none of {BITS[1:]}; {AGAIN}"
    if bits and not _whole(cast(Mapping[str, Any], storage or {}).get("group_size"), 2):
        return f"bits are given, but storage.group_size is missing; {AGAIN}"
    return None


def _absorb(absorbed: Any, ranks: Mapping[str, Any], storage: Any) -> str | None:
    if absorbed is None:
        return None
    names = cast(list[Any], absorbed) if isinstance(absorbed, list | tuple) else [None]
    if not all(isinstance(name, str) for name in names):
        return f"absorbed is {_excerpt(absorbed)}: a list of names of linears is expected; {AGAIN}"
    stranger = next((name for name in names if name not in ranks), None)
    if stranger is not None:
        return f"absorbed names {_excerpt(stranger)}, which has no rank; {AGAIN}"
    if names and cast(Mapping[str, Any], storage or {}).get("form") != "pivot":
        return f"absorbed is {_excerpt(absorbed)}, but the form is not pivot; {AGAIN}"
    return None


def _whole(value: Any, least: int) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= least


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
