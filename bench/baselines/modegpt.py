"""MoDeGPT-like: a Llama made smaller by modular decomposition (arXiv 2408.09632), as a row to compare with.

Written anew from the paper's formulas, which `modules.py` names. How much each block loses is the paper's

    share removed of block i = L * average * softmax(-s / e)_i,     s_i = 1 - mean cosine of the block's inputs and outputs

with blocks at most `MOST` removed, what is beyond that going to the others in proportion, as public implementations do it.
The paper sets `e` for each model; here several are tried, equal shares among them, and the one whose model has the lowest
loss on held-out calibration sequences is taken. Within a block all modules lose the same share, but for rounding. Statistics
are those of the original, measured once.

transformers' Llama has one size of head and one FFN width: what was removed is written as zeros, which computes the same.
`modegpt.json` beside the configuration tells how many numbers the method keeps.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from baselines.modules import Neurons, reduce_ffn, reduce_values, score_pairs
from baselines.whole import Ids, Weights, input_grams, load_whole, mean_loss, put_weights, save_whole
from lillama.errors import BudgetError, DataError, ModelError
from lillama.model.describe import describe
from lillama.model.source import load_config
from lillama.model.spec import ModelSpec
from lillama.ranks.plan import budget

VERSION, FILE = 1, "modegpt.json"
SMOOTHINGS = (math.inf, 0.2, 0.1, 0.05, 0.025)  # `e`; inf stands for equal shares
MOST = 0.8  # of a block that is removed, unless all lose more
HELD_OUT, HELD_TOKENS = 8, 8192  # one sequence of so many, and no more tokens than that


@dataclass(frozen=True)
class Widths:
    """What is kept of a block.

    Attributes:
        pairs: of dimensions, in each head's queries and keys.
        values: dimensions of each head's values.
        neurons: of the FFN.
    """

    pairs: int
    values: int
    neurons: int


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama's block."""

    hidden: int
    heads: int
    groups: int
    dims: int
    neurons: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Shape":
        """Return the sizes of a model's blocks.

        Raises:
            ModelError: they are not those of a Llama without biases.
        """
        config: Any = model.config
        if config.model_type != "llama" or any(name.endswith("_proj.bias") for name, _ in model.named_parameters()):
            raise ModelError(
                f"{config.model_type}: this baseline is written for a Llama without biases; take another model"
            )
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        return cls(config.hidden_size, heads, groups, config.head_dim, config.intermediate_size)

    @property
    def whole(self) -> Widths:
        """What the original keeps."""
        return Widths(self.dims // 2, self.dims, self.neurons)

    def attention(self, widths: Widths) -> int:
        """Return the numbers that are kept of queries, keys, values and outputs."""
        return self.hidden * (self.heads + self.groups) * (2 * widths.pairs + widths.values)

    def numbers(self, widths: Widths) -> int:
        """Return the numbers that are kept of a block's linears."""
        return self.attention(widths) + 3 * self.hidden * widths.neurons


@dataclass(frozen=True)
class Statistics:
    """What was measured at one block of the original.

    Attributes:
        influence: 1 - mean cosine of the block's inputs and outputs.
        inputs: second moments of what enters queries, keys and values.
        pairs: scores of the pairs of dimensions.
        neurons: of the FFN.
    """

    influence: float
    inputs: Float[Tensor, "in in"]
    pairs: Float[Tensor, "groups pairs"]
    neurons: Neurons


@dataclass(frozen=True)
class Kept:
    """What a compressed model keeps, counted as if what was removed were not there.

    Attributes:
        params: numbers of the whole model.
        block_params: of its blocks.
        keep: share of the blocks' numbers.
        smoothing: `e` that was taken.
        losses: `e` -> loss on held-out sequences, in nats a token; empty where only one was to be tried.
        blocks: from input to output.
    """

    params: int
    block_params: int
    keep: float
    smoothing: float
    losses: dict[float, float]
    blocks: tuple[Widths, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the value for JSON, where equal shares have the smoothing null."""
        found = asdict(self) | {"smoothing": _finite(self.smoothing)}
        return {"version": VERSION} | found | {"losses": [[_finite(e), loss] for e, loss in self.losses.items()]}


@torch.no_grad()
def compress(
    model_folder: Path,
    calibration_ids: Ids,
    keep_of_block_parameters: float,
    out_folder: Path,
    *,
    smoothings: Sequence[float] = SMOOTHINGS,
    device: str | None = None,
) -> Kept:
    """Make a Llama smaller, and write it as an ordinary model folder.

    Args:
        model_folder: of the original.
        calibration_ids: token ids, sequences x length; where several smoothings are tried, at most an eighth of them
            is held out.
        keep_of_block_parameters: share of the blocks' numbers that remains.
        out_folder: folder to make.
        smoothings: `e` of the shares removed, of which the best is taken.
        device: that computes; by default an accelerator if there is one.

    Raises:
        BudgetError: so little cannot be kept.
        DataError: there is one calibration sequence alone.
        ModelError: the model is no Llama without biases.
    """
    spec = describe(load_config(model_folder))
    model = load_whole(model_folder, device)
    shape, names = Shape.of(model), [block.name for block in spec]
    held = held_out(calibration_ids) if len(smoothings) > 1 else 0
    found = measure(model, shape, names, calibration_ids[: len(calibration_ids) - held])
    dense = {linear.name: model.get_parameter(f"{linear.name}.weight").clone() for linear in spec.linears}
    plans = {
        e: plan_widths(shape, spec, [one.influence for one in found], keep_of_block_parameters, e) for e in smoothings
    }
    tried: dict[float, float] = {}
    for e, widths in plans.items():
        put_weights(model, smaller(shape, names, dense, found, widths))
        if held:
            tried[e] = mean_loss(model, calibration_ids[-held:])
    best = min(tried, key=lambda e: tried[e]) if tried else smoothings[-1]
    if best != smoothings[-1]:
        put_weights(model, smaller(shape, names, dense, found, plans[best]))
    removed = sum(shape.numbers(shape.whole) - shape.numbers(widths) for widths in plans[best])
    left = spec.block_params - removed
    kept = Kept(spec.params - removed, left, left / spec.block_params, best, tried, tuple(plans[best]))
    save_whole(model, model_folder, out_folder, spec.dtype, {FILE: kept.as_json()})
    return kept


def held_out(ids: Ids) -> int:
    """Return how many sequences smoothings are compared on.

    Raises:
        DataError: there are not enough.
    """
    if len(ids) < 2:
        raise DataError("calibration: one sequence alone; to choose a smoothing, one more is needed to be held out")
    return max(1, min(len(ids) // HELD_OUT, HELD_TOKENS // ids.shape[1]))


def plan_widths(
    shape: Shape, spec: ModelSpec, influences: Sequence[float], keep: float, smoothing: float
) -> list[Widths]:
    """Return what is kept of each block: at most `keep` of all blocks' numbers, and less by no more than a neuron.

    Raises:
        BudgetError: so little cannot be kept.
    """
    dense = shape.numbers(shape.whole)
    most = budget(spec, keep, "blocks") - spec.params + dense * len(influences)
    target, spent, found = 0.0, 0, list[Widths]()
    for removed in shares_removed(influences, 1 - most / (dense * len(influences)), smoothing):
        target += (1 - removed) * dense
        heads = [max(1, round((1 - removed) * all_of)) for all_of in (shape.dims // 2, shape.dims)]
        attention = shape.attention(Widths(*heads, neurons=0))
        neurons = int((target - spent - attention + 1e-6) / (3 * shape.hidden))
        found.append(Widths(*heads, neurons=min(max(neurons, 1), shape.neurons)))
        spent += shape.numbers(found[-1])
    if spent > most:
        raise BudgetError(f"keep {keep} of the blocks cannot be reached: at least {spent:,} numbers remain; keep more")
    return found


def shares_removed(influences: Sequence[float], average: float, smoothing: float) -> list[float]:
    """Return the share of each block that is removed."""
    weights = torch.softmax(-torch.tensor(influences, dtype=torch.float64) / smoothing, dim=0)
    shares, most = len(weights) * average * weights, max(MOST, average)
    while (over := shares > most + 1e-12).any():
        beyond, free = (shares[over] - most).sum(), shares < most - 1e-12
        shares[over] = most
        shares[free] += beyond * weights[free] / weights[free].sum()
    return shares.tolist()


def measure(model: PreTrainedModel, shape: Shape, names: Sequence[str], ids: Ids) -> list[Statistics]:
    """Return the statistics of the named blocks on calibration sequences."""
    inner = [f"{name}.{part}" for name in names for part in ("self_attn.q_proj", "mlp.down_proj")]
    with _watch(model, names) as sums:
        grams = input_grams(model, ids, inner)
    tokens = ids.numel()
    return [
        Statistics(
            1 - sums[name].sum().item() / tokens,
            grams[f"{name}.self_attn.q_proj"].sum / tokens,
            score_pairs(
                sums[f"{name}.self_attn.q_proj"].view(shape.heads, -1) / tokens,
                sums[f"{name}.self_attn.k_proj"].view(shape.groups, -1) / tokens,
            ),
            Neurons.of(grams[f"{name}.mlp.down_proj"].sum / tokens),
        )
        for name in names
    ]


def smaller(
    shape: Shape, names: Sequence[str], dense: Weights, found: Sequence[Statistics], plan: Sequence[Widths]
) -> Weights:
    """Return the weights of all blocks' linears, with zeros in the place of what is removed."""
    weights: Weights = {}
    for name, statistics, widths in zip(names, found, plan, strict=True):
        weights |= _smaller_ffn(f"{name}.mlp", dense, statistics, widths)
        weights |= _smaller_queries(f"{name}.self_attn", shape, dense, statistics, widths)
        weights |= _smaller_values(f"{name}.self_attn", shape, dense, statistics, widths)
    return weights


def _smaller_ffn(name: str, dense: Weights, statistics: Statistics, widths: Widths) -> Weights:
    gate, up, down = (dense[f"{name}.{part}"] for part in ("gate_proj", "up_proj", "down_proj"))
    found = reduce_ffn(statistics.neurons, down, widths.neurons)
    new = [torch.zeros_like(weight) for weight in (gate, up, down)]
    for weight, old in zip(new, (gate, up), strict=False):
        weight[found.kept] = old[found.kept]
    new[2][:, found.kept] = found.down.to(down)
    return dict(zip((f"{name}.gate_proj", f"{name}.up_proj", f"{name}.down_proj"), new, strict=True))


def _smaller_queries(name: str, shape: Shape, dense: Weights, statistics: Statistics, widths: Widths) -> Weights:
    best = statistics.pairs.topk(widths.pairs).indices
    kept = torch.zeros_like(statistics.pairs).scatter_(1, best, 1).repeat(1, 2)  # of each group's dimensions
    masks = {"q_proj": kept.repeat_interleave(shape.heads // shape.groups, dim=0), "k_proj": kept}
    return {
        f"{name}.{part}": dense[f"{name}.{part}"] * mask.view(-1, 1).to(dense[f"{name}.{part}"])
        for part, mask in masks.items()
    }


def _smaller_values(name: str, shape: Shape, dense: Weights, statistics: Statistics, widths: Widths) -> Weights:
    value, output = dense[f"{name}.v_proj"], dense[f"{name}.o_proj"]
    values = value.view(shape.groups, shape.dims, -1)
    outputs = output.view(len(output), shape.groups, -1, shape.dims).permute(1, 2, 0, 3)
    new_values, new_outputs = torch.zeros_like(values), torch.zeros_like(outputs)
    for group in range(shape.groups):
        found = reduce_values(statistics.inputs, values[group], outputs[group], widths.values)
        new_values[group, : widths.values] = found.value.to(value)
        new_outputs[group, ..., : widths.values] = found.outputs.to(output)
    return {
        f"{name}.v_proj": new_values.reshape(value.shape),
        f"{name}.o_proj": new_outputs.permute(2, 0, 1, 3).reshape(output.shape),
    }


@contextmanager
def _watch(model: PreTrainedModel, names: Sequence[str]) -> Iterator[dict[str, Float[Tensor, " n"]]]:
    """Sum up cosines at blocks, and squares at the outputs of queries and keys, while somebody else runs the model."""
    sums: dict[str, Float[Tensor, " n"]] = {}

    def add(name: str, found: Float[Tensor, "*tokens n"]) -> None:
        total = found.double().flatten(0, -2).sum(dim=0)
        sums[name] = sums[name] + total if name in sums else total

    def squares(name: str) -> Any:
        return lambda module, args, output: add(name, output.square())

    def cosines(name: str) -> Any:
        return lambda module, args, output: add(name, F.cosine_similarity(args[0], output, dim=-1)[..., None])

    with ExitStack() as hooks:
        for name in names:
            block: nn.Module = model.get_submodule(name)
            hooks.enter_context(block.register_forward_hook(cosines(name)))
            for part in ("self_attn.q_proj", "self_attn.k_proj"):
                hooks.enter_context(block.get_submodule(part).register_forward_hook(squares(f"{name}.{part}")))
        yield sums


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
