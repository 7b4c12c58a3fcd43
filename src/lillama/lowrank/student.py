"""A block's student: a copy of the teacher whose linears are factorised."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lillama.lowrank.batching import stacks
from lillama.lowrank.gram import Moments, exact_device
from lillama.lowrank.initialisers import Initialiser
from lillama.lowrank.install import install, narrow
from lillama.lowrank.neurons import refit
from lillama.system.resources import trim_memory


@dataclass(frozen=True)
class NarrowFfn:
    """An FFN of a block that becomes narrower.

    Attributes:
        inward: names within the block of the linears that lead to the neurons.
        outward: name of the linear behind them.
        kept: indices of the neurons that are kept.
    """

    inward: tuple[str, ...]
    outward: str
    kept: tuple[int, ...]

    def shapes(self, block: nn.Module) -> dict[str, tuple[int, int]]:
        """Return name -> rows and columns of its linears, as they become."""
        found = {name: (len(self.kept), block.get_parameter(f"{name}.weight").shape[1]) for name in self.inward}
        return found | {self.outward: (block.get_parameter(f"{self.outward}.weight").shape[0], len(self.kept))}


@torch.no_grad()
def narrow_teacher(
    template: nn.Module, teacher: nn.Module, ffns: Iterable[NarrowFfn], moments: Mapping[str, Moments]
) -> tuple[nn.Module, nn.Module]:
    """Return the template and the teacher of a block with narrower FFNs, the weights behind the kept neurons refitted.

    Without such FFNs they are returned as they are.

    Args:
        template: the block without weights, on the meta device; it is left as it is.
        teacher: the block with its weights; it is left as it is, and shares those that stay with the result.
        ffns: those that become narrower.
        moments: name within the block -> what was measured at the last linears of the FFNs.
    """
    ffns = list(ffns)
    if not ffns:
        return template, teacher
    shapes = {name: shape for ffn in ffns for name, shape in ffn.shapes(teacher).items()}
    small, block = copy.deepcopy(template), copy.deepcopy(template)
    narrow(small, shapes)
    narrow(block, shapes)
    state = dict(teacher.state_dict())
    for ffn in ffns:
        kept = torch.tensor(ffn.kept, device=state[f"{ffn.outward}.weight"].device)
        for name in ffn.inward:
            state |= {key: state[key][kept] for key in (f"{name}.weight", f"{name}.bias") if key in state}
        gram, weight = moments[ffn.outward].inputs, state[f"{ffn.outward}.weight"]
        assert gram is not None  # whoever narrows measures what comes to the neurons
        state[f"{ffn.outward}.weight"] = refit(weight, gram, kept.to(gram.absolute.device)).to(weight)
    block.load_state_dict(state, strict=False, assign=True)
    for name, buffer in teacher.named_buffers():
        if name not in state:
            owner, _, leaf = name.rpartition(".")
            block.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    return small, block.eval().requires_grad_(False)


def build_student(
    template: nn.Module,
    teacher: nn.Module,
    ranks: Mapping[str, int],
    init: Initialiser,
    moments: Mapping[str, Moments],
    generator: torch.Generator,
) -> nn.Module:
    """Return a copy of a block with low-rank linears, its parameters in fp32, on the teacher's device.

    Args:
        template: the block without weights, on the meta device; it is left as it is.
        teacher: the block with its weights.
        ranks: name within the block -> rank; all else is copied.
        init: computes the factors.
        moments: name within the block -> what `init` needs to know of the linear.
        generator: source of randomness, on the CPU.
    """
    student = copy.deepcopy(template)
    install(student, ranks)
    dense = dict(teacher.named_parameters())
    state: dict[str, Tensor] = {}
    weights = {name: dense.pop(f"{name}.weight").detach() for name in ranks}
    device = next(teacher.parameters()).device
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    for names in stacks(shapes, exact_device(device)) if init.stacks else [[name] for name in ranks]:
        known = [moments.get(name, Moments()) for name in names]
        state |= _factors(
            init, [weights[name] for name in names], {name: ranks[name] for name in names}, known, generator
        )
        trim_memory()
    state |= dense
    state |= _marks(student, device)
    state = {name: tensor.detach().to(device, torch.float32, copy=True).contiguous() for name, tensor in state.items()}
    student.load_state_dict(state | _buffers(teacher), strict=False, assign=True)
    return student.to(device).requires_grad_(False)


def _factors(
    init: Initialiser,
    weights: Sequence[Tensor],
    ranks: Mapping[str, int],
    moments: Sequence[Moments],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the factors, in fp32, of some linears of one shape."""
    if len(weights) == 1:
        ((name, rank),) = ranks.items()
        factors = init(weights[0], rank, moments[0], generator)
        return {f"{name}.left.weight": factors.left.float(), f"{name}.right.weight": factors.right.float()}
    factors = init(torch.stack(list(weights)), max(ranks.values()), Moments.stack(moments), generator)
    state: dict[str, Tensor] = {}
    for (name, rank), left, right in zip(ranks.items(), factors.left.float(), factors.right.float(), strict=True):
        state[f"{name}.left.weight"], state[f"{name}.right.weight"] = left[:, :rank].clone(), right[:rank].clone()
    return state


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the buffers that a module saves; the others come with the template."""
    saved = module.state_dict()
    return {name: buffer.clone() for name, buffer in module.named_buffers() if name in saved}


def _marks(student: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Return the empty buffers that stand in the place of dense weights."""
    return {name: torch.empty_like(b, device=device) for name, b in student.named_buffers() if not b.numel()}


def load_student(
    template: nn.Module, ranks: Mapping[str, int], state: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Return a block with low-rank linears and the weights of a finished student.

    Args:
        template: the block without weights; it is left as it is.
        ranks: name within the block -> rank.
        state: name within the block -> parameter.
        device: of the copy.
        dtype: of its parameters; buffers keep their own, which may be finer (a router's correction in fp32).
    """
    student = copy.deepcopy(template)
    install(student, ranks)
    parameters = {name for name, _ in student.named_parameters()}
    moved = {name: tensor.to(device, dtype if name in parameters else None) for name, tensor in state.items()}
    student.load_state_dict(_marks(student, device) | moved, assign=True)
    return student.to(device).eval().requires_grad_(False)
