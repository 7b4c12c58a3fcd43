"""Second moments of the inputs of a block's linears."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import add

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from lillama.errors import ModelError
from lillama.lowrank.gram import Gram
from lillama.modeling.experts import Experts
from lillama.stream.calls import BlockArgs, tree_leaves

logger = logging.getLogger(__name__)

WatchedRun = tuple[BlockArgs, Float[Tensor, "_ _ width"], Bool[Tensor, "_ _"] | None]  # sequences x length (x width)


@dataclass
class InputMomentHooks:
    """Accumulates the Grams of a block's linears while somebody else runs the block.

    Attributes:
        grams: name -> Gram. Linears that are given the very same tensor (query, key and value; gate and up) share one. A
            linear that was given nothing, such as one of an expert that no token was sent to, has none.
        routed: name of a module of experts -> for each expert, the tokens that the run which has just ended sent to it.
        given_all: names of those modules whose experts are given all tokens, the others' as zeros.
        crossing: where in memory lies what the block is given besides its hidden state, such as an encoder's outputs.
    """

    grams: dict[str, Gram] = field(default_factory=dict)
    routed: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    given_all: set[str] = field(default_factory=set)
    crossing: set[int] = field(default_factory=set)
    _seen: dict[str, Tensor] = field(default_factory=dict)

    def call(self, call: BlockArgs, block: nn.Module, hidden: Float[Tensor, "sequences length width"]) -> Tensor:
        """Run the block, whose linears are watched."""
        self.crossing = {_place(leaf) for leaf in tree_leaves([call]) if isinstance(leaf, Tensor)}
        return call(block, hidden)

    def add(self, *masks: Bool[Tensor, "sequences _"] | None) -> None:
        """Add the inputs of the run that has just ended.

        Args:
            masks: true at the real tokens of its sequences; of the stack's own tokens first, then of those of each earlier
                stack, whose outputs its blocks may look at.
        """
        leaders: dict[int, str] = {}
        for name, x in self._seen.items():
            leader = leaders.setdefault(id(x), name)
            if leader == name:
                self.grams.setdefault(name, Gram.zeros(x.shape[-1], x.device)).add(self.real(name, x, *masks))
            else:
                self.grams[name] = self.grams[leader]
        self.forget()

    def forget(self) -> None:
        """Let the inputs of the run that has just ended go."""
        self._seen.clear()

    def real(
        self, name: str, x: Float[Tensor, "*_ width"], *masks: Bool[Tensor, "sequences _"] | None
    ) -> Float[Tensor, "tokens width"]:
        """Return the vectors at the real tokens among the inputs or outputs of a linear, one in a row."""
        experts, _, index = name.rpartition(".")[0].rpartition(".")
        if len(masks) > 1 and name in self._seen and _place(self._seen[name]) in self.crossing:
            return real(x, *masks[1:])
        if experts not in self.routed or not index.isdecimal():
            return real(x, *masks)
        tokens, own = self.routed[experts][int(index)], next(iter(masks), None)
        x = x[tokens] if experts in self.given_all else x
        return x if own is None else x[own.flatten().to(x.device)[tokens]]

    def remember(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return a forward pre-hook for the linear of this name."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._seen[name] = args[0]

        return hook

    def route(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return a forward pre-hook for the experts of this name."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(module, Experts)
            given, *routing = args
            if routing:
                self.routed[name] = module.tokens(routing[0])
            else:
                sent = given.view(module.count, -1, given.shape[-1]).any(dim=-1)
                self.routed[name] = tuple(rows.nonzero()[:, 0] for rows in sent)
                self.given_all.add(name)

        return hook


@contextmanager
def watch_inputs(block: nn.Module, names: Iterable[str]) -> Iterator[InputMomentHooks]:
    """Watch the inputs of the named linears of a block; call `add` after each run."""
    watch, modules = InputMomentHooks(), block.named_modules()
    with ExitStack() as hooks:
        for name, experts in [(name, module) for name, module in modules if isinstance(module, Experts)]:
            hooks.enter_context(experts.register_forward_pre_hook(watch.route(name)))
        for name in names:
            hooks.enter_context(block.get_submodule(name).register_forward_pre_hook(watch.remember(name)))
        yield watch


def shrink_experts(block: nn.Module, grams: Mapping[str, Gram], names: Iterable[str]) -> dict[str, Gram]:
    """Return the Grams of the named linears; those of experts are shrunk towards the mean of their layer.

    An expert sees few tokens, some see none. For an expert e of inputs of width n

        G_e <- G_e + n * sum_i(G_i) / sum_i(count_i)        (i over the experts of the layer that saw a token)

    that is, n tokens like the layer's average one are added, which an expert that saw many tokens hardly feels: linear
    shrinkage to a common target, as of Ledoit and Wolf (2004), with a weight that is fixed rather than estimated.

    Args:
        block: that the names belong to.
        grams: name -> Gram, as measured, of the linears and their siblings (see `with_siblings`).
        names: of linears; all get a Gram.

    Raises:
        ModelError: a linear was never called, or its Gram is not finite.
    """
    names, found = list(names), dict(grams)
    for group in _alike(block, names):
        measured = [grams[name] for name in group if name in grams]
        if measured:
            mean = _mean(measured)
            found |= {name: _add_mean(grams.get(name), mean) for name in group}
            unseen = sum(name not in grams for name in group)
            if unseen:
                logger.info("%s and %d more: no calibration token came to these experts", group[0], unseen - 1)
    missing = next((name for name in names if name not in found), None)
    if missing is not None:
        raise ModelError(
            f"{missing} is not called as a module when its block runs, so that its inputs are not known; leave it dense: "
            f"--ignore '*{missing}'"
        )
    endless = next((name for name in names if not found[name].mean_eigenvalue.isfinite().all()), None)
    if endless is not None:
        raise ModelError(
            f"{endless}: what enters it or comes back to it is NaN or too large on the calibration text; get a sound copy of "
            f"the model, give other --calibration, or leave it dense: --ignore '*{endless}'"
        )
    return {name: found[name] for name in names}


def with_siblings(block: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the named linears, and those that do the same as one of them in other experts of its layer."""
    names = list(names)
    return list(dict.fromkeys([*names, *(name for group in _alike(block, names) for name in group)]))


def _alike(block: nn.Module, names: Iterable[str]) -> Iterator[list[str]]:
    """Yield, for every named linear of an expert, the linears that do the same in all experts of its layer."""
    wanted = set(names)
    for prefix, experts in block.named_modules():
        if isinstance(experts, Experts):
            dot = f"{prefix}." if prefix else ""
            for leaf in experts.leaves:
                group = [f"{dot}{index}.{leaf}" for index in range(experts.count)]
                if wanted.intersection(group):
                    yield group


def _mean(layer: list[Gram]) -> Gram:
    """Return the Gram of as many tokens as it is wide, of the mean of those given."""
    return reduce(add, layer).averaged(layer[0].width)


def _add_mean(own: Gram | None, mean: Gram) -> Gram:
    """Return a Gram with its layer's mean added."""
    return mean if own is None else own + mean


@torch.no_grad()
def collect_input_moments(block: nn.Module, names: Iterable[str], runs: Iterable[WatchedRun]) -> dict[str, Gram]:
    """Run a block and accumulate the Grams of the real tokens that enter the named linears.

    Args:
        block: dense, with its weights.
        names: of linears within the block.
        runs: micro-batches: how the block is called, its inputs, and true at real tokens.
    """
    names = list(names)
    with watch_inputs(block, with_siblings(block, names)) as watch:
        for call, hidden, mask in runs:
            watch.call(call, block, hidden)
            watch.add(mask)
    return shrink_experts(block, watch.grams, names)


def _place(tensor: Shaped[Tensor, "..."]) -> int:
    return tensor.untyped_storage().data_ptr()


def real(x: Float[Tensor, "*_ width"], *masks: Bool[Tensor, "sequences _"] | None) -> Float[Tensor, "tokens width"]:
    """Return the vectors at the real tokens, one in a row; by the first mask that is for so many tokens."""
    x = x.flatten(0, -2)
    mask = next((mask for mask in masks if mask is not None and mask.numel() == len(x)), None)
    return x if mask is None else x[mask.flatten().to(x.device)]
