"""Narrower FFNs: in which order neurons are left out, measured once; which ones a plan keeps."""

from collections.abc import Mapping

from torch import nn

from lillama.lowrank.gram import Moments
from lillama.lowrank.neurons import eliminate
from lillama.lowrank.student import NarrowFfn
from lillama.model.spec import BlockSpec
from lillama.ranks.widths import WidthCurve


def measure_widths(block: BlockSpec, teacher: nn.Module, measured: Mapping[str, Moments]) -> dict[str, WidthCurve]:
    """Return, for each FFN of a block by the full name of its last linear, what its widths lose.

    Args:
        block: the block.
        teacher: with its weights.
        measured: name of a linear within the block -> both its moments.
    """
    found: dict[str, WidthCurve] = {}
    for ffn in block.ffns:
        name = block.inner(ffn.outward)
        inputs, gradients = measured[name].inputs, measured[name].gradients
        if inputs is None or gradients is None or inputs.diagonal:
            continue
        scale = measured[name].share / (max(1, inputs.count) * max(1, gradients.count))
        taken = eliminate(teacher.get_parameter(f"{name}.weight").detach(), inputs, gradients)
        found[ffn.outward] = WidthCurve(taken.order.numpy(), 0.5 * scale * taken.errors.numpy(), ffn.neurons)
    return found


def narrow_ffns(block: BlockSpec, widths: Mapping[str, int], curves: Mapping[str, WidthCurve]) -> list[NarrowFfn]:
    """Return the FFNs of a block that become narrower, with the neurons that they keep.

    Args:
        block: the block.
        widths: name within the block of an FFN's last linear -> neurons that it keeps.
        curves: full name of it -> in which order neurons are left out.
    """
    found: list[NarrowFfn] = []
    for ffn in block.ffns:
        name = block.inner(ffn.outward)
        if name in widths:
            inward = tuple(map(block.inner, ffn.inward))
            found.append(NarrowFfn(inward, name, tuple(curves[ffn.outward].kept(widths[name]).tolist())))
    return found
