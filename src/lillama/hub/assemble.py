"""Put a compressed model folder together: finished blocks, everything else from the original, one block at a time."""

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lillama.errors import ModelError
from lillama.files.atomic import read_json, write_json
from lillama.hub.companions import carry_along, without_code
from lillama.lowrank.encode import encode_dense, encode_factors
from lillama.lowrank.install import install
from lillama.lowrank.permute import absorb
from lillama.lowrank.pivot import Pivoting, in_order, pivot_rows
from lillama.lowrank.storage import Storage
from lillama.model.checkpoint import FETCH_AGAIN, NAMED, CheckpointWriter
from lillama.model.spec import BlockSpec
from lillama.model.weights import Weights
from lillama.modeling.experts import fuse, native_names
from lillama.modeling.linear import build_factorised, mark
from lillama.modeling.quantizer import LowRankConfig
from lillama.ranks.plan import RankPlan
from lillama.version import __version__

logger = logging.getLogger(__name__)

LEFT, RIGHT = ".left.weight", ".right.weight"


def assemble(
    folder: Path,
    weights: Weights,
    plan: RankPlan,
    compressed: Callable[[BlockSpec], Mapping[str, Tensor] | None],
    rounded: Callable[[BlockSpec], Mapping[str, Tensor]],
    template: Callable[[BlockSpec], nn.Module],
    recipe_hash: str,
    shard_bytes: int,
    code: bool = False,
) -> dict[str, Pivoting]:
    """Write config, weights and companions of a compressed model into an empty folder.

    Every tensor is written in the type that the original stores it in, a factor in that of the weight it stands for.

    Args:
        folder: to be filled.
        weights: of the original.
        plan: of the compressed model.
        compressed: returns the state of a block (name within it -> tensor, the factors in the plain form, of any
            floating-point type), or None if it stays as it is.
        rounded: returns the integers and scales of those of its weights that are rounded already; others of few bits are
            rounded to the nearest.
        template: returns a block without weights, its experts and Conv1Ds as linears, in the shapes that it has before
            linears are factorised.
        recipe_hash: goes into config.json.
        shard_bytes: largest size of a weight file.
        code: whether the code that the original's settings name goes along.

    Returns:
        full name -> how well the pivots of a linear stand for its other rows; empty for the plain form.
    """
    spec, storage = plan.spec, plan.storage
    source, names = weights.reader.folder, weights.sources
    carry_along(source, folder, code)
    outside = [name for name in names if not any(name.startswith(f"{block.name}.") for block in spec)]
    how: dict[str, Pivoting] = {}
    absorbed: list[str] = []
    with CheckpointWriter(folder, shard_bytes) as writer:
        for name, tensor in weights.read(outside):
            writer.write(name, tensor)
        for block in spec:
            dot, state = f"{block.name}.", compressed(block)
            if state is None:
                for name, tensor in weights.read(name for name in names if name.startswith(dot)):
                    writer.write(name, tensor)
                continue
            inside, bits = plan.ranks_within(block), plan.bits_within(block)
            own, stored = template(block), dict(state)
            rows, found = _pivots(own, inside, stored) if storage.form == "pivot" else ({}, {})
            few = [name for name in bits if name not in inside]
            stored, natives = _native(own, inside, few, stored), native_names(own)
            originals = {name: _original(name, {*inside, *few}) for name in stored}
            types = {name: weights.dtype(dot + natives.get(old, old)) for name, old in originals.items()}
            storages = {name: replace(storage, bits=bits.get(name)) for name in (*inside, *few)}
            for name, tensor in _storage_of(stored, storages, rows, rounded(block), types):
                writer.write(f"{dot}{name}", tensor)
            how |= {f"{dot}{name}": value for name, value in found.items()}
            absorbed += [
                f"{dot}{name}" for name, order in rows.items() if inside[name] < len(order) and in_order(order)
            ]
    config = without_code(read_json(source / "config.json", ModelError, FETCH_AGAIN), source, code)
    config.pop(NAMED, None)  # the weights are written under the usual names
    _write_config(folder, config, plan, absorbed, recipe_hash)
    _log(how)
    return how


def _pivots(
    template: nn.Module, ranks: Mapping[str, int], state: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Pivoting]]:
    """Choose the pivots of all factorised linears of a block; permute its state where that absorbs their order."""
    found = {name: pivot_rows(state[f"{name}{LEFT}"]) for name in ranks}
    rows = {name: order for name, (order, _) in found.items()}
    absorb(template, ranks, state, rows)
    return rows, {name: how for name, (_, how) in found.items()}


def _native(
    template: nn.Module, ranks: Mapping[str, int], few: Sequence[str], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return a block's state with experts and Conv1Ds that stayed dense as the original has them.

    Dense weights that are to be stored in few bits (`few`) stay linears: they are the right factor of nothing else.
    """
    block, state = copy.deepcopy(template), dict(state)
    install(block, ranks)
    for name in few:
        linear = cast(nn.Linear, block.get_submodule(name))
        block.set_submodule(name, build_factorised(linear, linear.out_features, {"form": "pivot"}, ordered=False))
        weight = state.pop(f"{name}.weight")
        state |= {f"{name}{RIGHT}": weight, f"{name}.weight": weight.new_empty(0)}
    mark(block)
    block.load_state_dict(state, strict=False, assign=True)
    fuse(block)
    native = block.state_dict()
    return {name: tensor for name, tensor in native.items() if not tensor.is_meta}


def _storage_of(
    state: Mapping[str, Tensor],
    storages: Mapping[str, Storage],
    rows: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor],
    types: Mapping[str, torch.dtype],
) -> Iterator[tuple[str, Tensor]]:
    """Yield names within the block and tensors as they are written."""
    factors = {f"{name}{side}" for name in storages for side in (LEFT, RIGHT)}
    for name, tensor in state.items():
        if name not in factors:
            yield name, tensor.to(types[name])
    for name, storage in storages.items():
        left, right = state.get(f"{name}{LEFT}"), state[f"{name}{RIGHT}"]
        if f"{name}.right.qweight" in rounded:
            yield from ((key, tensor) for key, tensor in rounded.items() if key.startswith(f"{name}."))
        elif left is None:
            yield from ((f"{name}.{leaf}", tensor) for leaf, tensor in encode_dense(right, storage).items())
        else:
            stored = encode_factors(left, right, storage, rows.get(name), types[f"{name}{LEFT}"])
            yield from ((f"{name}.{leaf}", tensor) for leaf, tensor in stored.items())


def _original(name: str, stored: Collection[str]) -> str:
    """Return the name of the original's tensor that a student's tensor stands for."""
    linear = name.removesuffix(LEFT).removesuffix(RIGHT)
    return f"{linear}.weight" if linear in stored else name


def _write_config(
    folder: Path,
    config: Mapping[str, Any],
    plan: RankPlan,
    absorbed: list[str],
    recipe_hash: str,
) -> None:
    facts: dict[str, Any] = {"lillama_version": __version__, "recipe_hash": recipe_hash}
    known = None if (plan.storage.form, plan.storage.bits) == ("plain", None) else dict(plan.storage.as_json())
    shapes = {name: list(shape) for name, shape in plan.shapes.items()}
    few = {linear.name: plan.storage_of(linear.name).bits for linear, _ in plan}
    bits = {name: own for name, own in few.items() if own and (plan[name] is None or own != plan.storage.bits)}
    known = dict(plan.storage.as_json()) if bits else known
    low_rank = LowRankConfig(ranks=plan.factorised, storage=known, absorbed=absorbed, shapes=shapes, bits=bits, **facts)
    section = {"quantization_config": low_rank.to_dict()} if plan.compresses else {}
    write_json(folder / "config.json", dict(config) | section)


def _log(how: Mapping[str, Pivoting]) -> None:
    if how:
        worst = max(how, key=lambda name: how[name].condition)
        logger.info(
            "pivots of %d linears: largest coefficient %.2f, largest condition number %.0f (%s)",
            len(how),
            max(value.largest for value in how.values()),
            how[worst].condition,
            worst,
        )
