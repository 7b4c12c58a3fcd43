"""Find the feed-forward networks of a block: linears between which each neuron stands by itself."""

from collections.abc import Sequence

from torch import nn

from lillama.model.spec import FfnSpec, LinearSpec

# How transformers names the linears that lead to the neurons, and the one behind them; the first that fits is taken.
NAMES = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
    (("c_fc_0", "c_fc_1"), "c_proj"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("lin1",), "lin2"),
    (("intermediate.dense",), "output.dense"),
    (("intermediate_dense",), "output_dense"),
)


def find_ffns(block: nn.Module, linears: Sequence[LinearSpec]) -> tuple[FfnSpec, ...]:
    """Return the feed-forward networks of a block whose linears may all be changed, by their names within it.

    Those of experts are left out: experts are stored together, and have one width. So are those that do more between the
    linears than to treat each neuron by itself, which shows in further parameters of the neurons' number.

    Args:
        block: may be on the meta device.
        linears: of the block, that may be factorised, by their names within it.
    """
    known = {linear.name: linear for linear in linears if linear.share == 1.0}
    found = list[FfnSpec]()
    for name, outward in known.items():
        for inward, last in NAMES:
            prefix = name.removesuffix(last)
            names = tuple(f"{prefix}{leaf}" for leaf in inward)
            if prefix == name or (prefix and not prefix.endswith(".")) or not known.keys() >= set(names):
                continue
            if all(known[one].out_features == outward.in_features for one in names):
                found += _alone(block, names, outward)
                break
    return tuple(found)


def _alone(block: nn.Module, inward: tuple[str, ...], outward: LinearSpec) -> list[FfnSpec]:
    """Return the network if nothing else beside its linears has as many numbers as it has neurons."""
    neurons, own = outward.in_features, {f"{name}.bias" for name in inward}
    others = (parameter for name, parameter in block.named_parameters() if name not in own and parameter.dim() == 1)
    if neurons == outward.out_features or any(len(parameter) == neurons for parameter in others):
        return []
    biases = sum(block.get_submodule(name).bias is not None for name in inward)
    return [FfnSpec(inward, outward.name, outward.in_features, biases)]
