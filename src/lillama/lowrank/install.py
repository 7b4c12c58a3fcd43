"""Put low-rank and narrower layers in the place of dense linears, and back; the model is changed in place."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from lillama.errors import ModelError, suggestion
from lillama.modeling.linear import build_stored, low_rank_linears, mark, merge, prepare, resize
from lillama.modeling.soundness import misfit, refusal, shape_misfit

__all__ = ["install", "install_stored", "low_rank_linears", "merge", "narrow"]


def install(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Swap the named linears for `LowRankLinear` of the given ranks, on the same device (meta too), of the same type.

    The bias stays, the factors are 0: fill them before use. Every name is checked before the first swap.

    Args:
        model: the whole model, or any part of it that the names start from.
        ranks: name of a `nn.Linear`, of a Conv1D or of an expert's linear (see `modeling.experts.Experts`) -> its rank.

    Raises:
        ModelError: a name is not a dense linear of the model, or a rank is below 1 or above what its shape allows.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 96))
        >>> install(model, {"0": 8})
        >>> model[0].rank, model[0].left.weight.shape
        (8, torch.Size([96, 8]))
    """
    install_stored(model, {"ranks": ranks})


def install_stored(model: nn.Module, section: Mapping[str, Any]) -> None:
    """Swap linears for layers of the form that a compressed model is stored in.

    Args:
        model: the whole model, or any part of it that the names start from.
        section: the `quantization_config` of the model: `ranks`, and for other forms than the plain one `storage`,
            `absorbed` and `bits`.

    Raises:
        ModelError: the section is damaged or of a newer lillama, a name is not a dense linear of the model, or a rank is
            above what its shape allows.
    """
    reason = refusal(section)
    if reason:
        raise ModelError(f"{type(model).__name__}: {reason}")
    ranks = section["ranks"]
    names = dict.fromkeys((*ranks, *(section.get("bits") or ())))
    narrow(model, section.get("shapes") or {})
    prepare(model, names)
    modules = cast(Iterator[tuple[str, nn.Module]], model.named_modules())
    linears = {name: layer for name, layer in modules if isinstance(layer, nn.Linear)}
    for name in names:
        if name not in linears:
            raise ModelError(
                f"{name}: no dense nn.Linear of this name in {type(model).__name__}{suggestion(name, linears)}"
            )
        reason = misfit(name, ranks[name], linears[name]) if name in ranks else None
        if reason:
            raise ModelError(reason)
    for name in names:
        model.set_submodule(name, build_stored(name, linears[name], section))
    mark(model)


def narrow(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Swap the named dense layers for ones of fewer rows or columns, of the same class and type; their numbers are 0.

    Args:
        model: the whole model, or any part of it that the names start from.
        shapes: name of a `nn.Linear` or a Conv1D -> rows and columns of its weight.

    Raises:
        ModelError: a name is not a dense layer of the model, or a shape is larger than the layer.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 96))
        >>> narrow(model, {"0": (80, 64)})
        >>> model[0]
        Linear(in_features=64, out_features=80, bias=True)
    """
    modules = cast(Iterator[tuple[str, nn.Module]], model.named_modules())
    dense = {name: layer for name, layer in modules if isinstance(layer, nn.Linear | Conv1D)}
    for name, shape in shapes.items():
        if name not in dense:
            raise ModelError(f"{name}: no dense layer of this name in {type(model).__name__}{suggestion(name, dense)}")
        reason = shape_misfit(name, shape, dense[name])
        if reason:
            raise ModelError(reason)
    for name, (rows, columns) in shapes.items():
        model.set_submodule(name, resize(dense[name], rows, columns))
