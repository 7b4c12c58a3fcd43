"""Weights that are not matrices of an `nn.Linear`: experts fused into 3-D tensors, and GPT-2's transposed Conv1D.

`unfuse` swaps them for linears that compute the same, so that all that knows linears can work on them; `fuse` undoes it.
Imports torch alone: the same text ships inside portable models.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import Any, cast

import torch
from torch import nn

DOWN, UPS = "down_proj", ("gate_up_proj", "up_proj")
GATE, UP = "gate", "up"
BIAS = "_bias"
WHOLE = "whole_shape"  # attribute of a narrowed layer: the shape of the weight that it was made from


class TransposedLinear(nn.Linear):
    """An `nn.Linear` in the place of a Conv1D, whose weight is stored as (in x out)."""


class Experts(nn.Module):
    """Routed experts with linears of their own, in the place of a module that fuses them into 3-D parameters.

    Expert `e` is the child `e`, with the linears `gate_up` (or `up`) and `down`; split, with `gate`, `up` and `down`. What
    lies between them stays that of the fused module's own class. While a linear of any expert is not dense, two empty
    buffers bear the names of the fused parameters: a loader that does not know this class finds shapes that do not fit and
    fails, instead of going on with random weights.

    Args:
        fused: with parameters (experts x ...); may be on the meta device.
        split: whether gates and ups are linears of their own, where the rows of the one come before those of the other.
    """

    def __init__(self, fused: nn.Module, split: bool = False) -> None:
        super().__init__()
        parameters = dict(fused.named_parameters(recurse=False))
        self.up_name = next(name for name in UPS if name in parameters)
        self.split = split and self.up_name == UPS[0] and bool(getattr(fused, "is_concatenated", True))
        self.transposed = bool(getattr(fused, "is_transposed", True))  # Llama 4's are, and do not say
        self.count = len(parameters[DOWN])
        for name, child in fused.named_children():
            self.add_module(name, child)
        for index in range(self.count):
            expert = nn.Module()
            for leaf in self.leaves:
                native = self.native(leaf)
                bias = parameters.get(native + BIAS)
                weight = parameters[native][index]
                rows = self._rows(leaf, weight.T if self.transposed else weight)
                expert.add_module(leaf, _linear(rows, None if bias is None else self._rows(leaf, bias[index])))
            self.add_module(str(index), expert)
        shell = copy.copy(fused)
        shell.__dict__["_parameters"] = {name: nn.Parameter(p.to("meta"), False) for name, p in parameters.items()}
        self._shell = (shell,)  # in a tuple, so that its tensors are not this module's
        self.train(fused.training)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the experts' weighted answers.

        Args:
            hidden_states: tokens x width. Without routing, each expert's tokens one after the other, already weighted.
            top_k_index: tokens x k, the chosen experts.
            top_k_weights: of the same shape.
        """
        if top_k_index is None or top_k_weights is None:
            parts = hidden_states.view(self.count, -1, hidden_states.shape[-1])
            return torch.cat([self._answer(index, part) for index, part in enumerate(parts)])
        if not len(hidden_states):
            return hidden_states
        order, counts = self._order(top_k_index)
        parts = hidden_states[order // top_k_index.shape[-1]].split(counts)
        answers = torch.cat([self._answer(index, part) for index, part in enumerate(parts) if len(part)])
        answers = answers * top_k_weights.flatten()[order, None]
        answers = torch.zeros_like(answers).index_copy(0, order, answers)
        return answers.view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)

    def tokens(self, top_k_index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return, for each expert, which tokens come to it, in the order in which it sees them."""
        order, counts = self._order(top_k_index)
        return (order // top_k_index.shape[-1]).split(counts)

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of an expert's linears, the last one that of `down`."""
        return (GATE, UP, _short(DOWN)) if self.split else (_short(self.up_name), _short(DOWN))

    def native(self, leaf: str) -> str:
        """Return the name of the fused parameter that a linear of this name is part of."""
        return DOWN if leaf == _short(DOWN) else self.up_name

    def linears(self) -> Iterable[tuple[str, nn.Module]]:
        """Yield the name within this module and the linear, expert by expert."""
        names = (f"{index}.{leaf}" for index in range(self.count) for leaf in self.leaves)
        return ((name, self.get_submodule(name)) for name in names)

    def fused(self) -> nn.Module:
        """Return the fused module with these weights; all linears must be dense."""
        fused = copy.copy(self._shell[0])
        fused.__dict__["_modules"] = {name: self.get_submodule(name) for name, _ in fused.named_children()}
        fused.__dict__["_parameters"] = {name: self._stacked(name) for name in fused.__dict__["_parameters"]}
        return fused.train(self.training)

    def join(self) -> None:
        """Undo `split`, in place; all gates and ups must be dense."""
        if not self.split:
            return
        for index in range(self.count):
            expert, down = nn.Module(), self.get_submodule(f"{index}.{_short(DOWN)}")
            weight, bias = (self._whole(index, self.up_name, kind) for kind in ("weight", "bias"))
            expert.add_module(_short(self.up_name), _linear(cast(torch.Tensor, weight), bias))
            expert.add_module(_short(DOWN), down)
            self.set_submodule(str(index), expert.train(self.training))
        self.split = False

    def mark(self) -> None:
        """Add the empty buffers that stop a loader which does not know this class."""
        first = cast(torch.Tensor, self.get_submodule(f"0.{_short(DOWN)}").weight)
        for name, rows in ((self.up_name, 2), (DOWN, 1)):  # loaders halve the first, to part gates from ups
            empty = torch.empty(self.count, rows, 0, dtype=first.dtype, device=first.device)
            self.register_buffer(name, empty)

    def _order(self, top_k_index: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        chosen = top_k_index.flatten()
        return chosen.argsort(stable=True), torch.bincount(chosen, minlength=self.count).tolist()

    def _answer(self, index: int, x: torch.Tensor) -> torch.Tensor:
        shell: Any = self._shell[0]
        ups = [self.get_submodule(f"{index}.{leaf}")(x) for leaf in self.leaves[:-1]]
        x = torch.cat(ups, dim=-1) if self.split else ups[0]
        x = _gate(shell, x) if self.up_name == UPS[0] else shell.act_fn(x)
        x = self.get_submodule(f"{index}.{_short(DOWN)}")(x)
        return shell.post_expert_norm(x) if getattr(shell, "has_post_expert_norm", False) else x

    def _rows(self, leaf: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows of a weight or bias that a linear of this name takes."""
        return tensor.chunk(2)[leaf == UP] if self.split and leaf in (GATE, UP) else tensor

    def _whole(self, index: int, native: str, kind: str) -> torch.Tensor | None:
        """Return an expert's part of a fused parameter, (out x in) or (out); None without bias."""
        linears = (self.get_submodule(f"{index}.{leaf}") for leaf in self.leaves if self.native(leaf) == native)
        parts = [getattr(linear, kind) for linear in linears]
        return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)

    def _stacked(self, name: str) -> nn.Parameter:
        kind = "bias" if name.endswith(BIAS) else "weight"
        found = [self._whole(index, name.removesuffix(BIAS), kind) for index in range(self.count)]
        tensors = [
            tensor.T if self.transposed and kind == "weight" else tensor for tensor in found if tensor is not None
        ]
        grad = any(p.requires_grad for _, linear in self.linears() for p in linear.parameters())
        return nn.Parameter(torch.stack(tensors).detach(), requires_grad=grad)


def is_fused(module: nn.Module) -> bool:
    """Tell whether a module holds experts fused into 3-D parameters."""
    parameters = dict(module.named_parameters(recurse=False))
    known = {name + tail for name in (*UPS, DOWN) for tail in ("", BIAS)}
    matrices = [parameters[name].dim() == 3 for name in (*UPS, DOWN) if name in parameters]
    routed = hasattr(module, "is_transposed") or len(signature(module.forward).parameters) == 1  # or given all tokens
    return DOWN in parameters and len(matrices) == 2 and all(matrices) and parameters.keys() <= known and routed


def unfuse(
    model: nn.Module,
    wanted: Callable[[str], bool] = lambda name: True,
    split: Callable[[str], bool] = lambda name: False,
) -> None:
    """Swap fused experts and Conv1Ds for linears over the very same numbers, in place.

    Args:
        model: or any part of one; on the meta device too.
        wanted: tells by a module's name whether it is swapped.
        split: tells by the name of a module of experts whether their gates and ups become linears of their own.
    """
    for name, module in list(model.named_modules()):
        if is_fused(module) and wanted(name):
            model.set_submodule(name, Experts(module, split(name)))
        elif type(module).__name__ == "Conv1D" and wanted(name):
            conv: Any = module
            linear = _linear(conv.weight.T, conv.bias, TransposedLinear)
            if WHOLE in conv.__dict__:
                linear.__dict__[WHOLE] = conv.__dict__[WHOLE][::-1]
            model.set_submodule(name, linear.train(conv.training))


def fuse(model: nn.Module) -> None:
    """Undo `unfuse`, in place, wherever all linears are dense; and a split where all gates and ups are."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            low = {inner.rpartition(".")[2] for inner, linear in module.linears() if not isinstance(linear, nn.Linear)}
            if not low:
                model.set_submodule(name, module.fused())
            elif low == {_short(DOWN)}:
                module.join()
        elif type(module) is TransposedLinear:
            model.set_submodule(name, _conv1d(module))


def native_names(model: nn.Module) -> Mapping[str, str]:
    """Return, for an unfused model, name of a tensor of its linears -> name of the native tensor that it is part of."""
    names: dict[str, str] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Experts):
            dot = f"{prefix}." if prefix else ""
            for name, linear in module.linears():
                native = f"{dot}{module.native(name.rpartition('.')[2])}"
                names |= {
                    f"{dot}{name}.{leaf}": native + BIAS * (leaf == "bias") for leaf, _ in linear.named_parameters()
                }
    return names


def routers(block: nn.Module) -> list[str]:
    """Return the names of the parameters that choose among experts, in an unfused block."""
    found: list[str] = []
    for prefix, module in block.named_modules():
        counts = {child: part.count for child, part in module.named_children() if isinstance(part, Experts)}
        for name, parameter in module.named_parameters() if counts else ():
            beside = name.partition(".")[0] not in counts
            if beside and parameter.shape[0] in counts.values() and parameter.dim() <= 2:
                found.append(f"{prefix}.{name}" if prefix else name)
    return found


def _gate(shell: Any, x: torch.Tensor) -> torch.Tensor:
    if hasattr(shell, "_apply_gate"):
        return shell._apply_gate(x)
    gate, up = x.chunk(2, dim=-1)
    return up * shell.act_fn(gate)


def _short(name: str) -> str:
    return name.removesuffix("_proj")


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    linear = kind(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return linear


def _conv1d(linear: nn.Linear) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=linear.weight.requires_grad)
    conv.bias = linear.bias
    return conv.train(linear.training)
