"""Find the repeated blocks of a model and their linears, from the configuration alone."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PretrainedConfig, PreTrainedModel

from lillama.errors import ModelError
from lillama.model.ffn import find_ffns
from lillama.model.kind import kind_of
from lillama.model.skeleton import skeleton
from lillama.model.source import quantization, stored_dtype
from lillama.model.spec import BlockSpec, FfnSpec, LinearSpec, ModelSpec
from lillama.modeling.experts import Experts, unfuse

# Linears that are left dense whatever the targets say: glob of the name within the block -> the reason.
LEFT = {
    "*dt_proj": "state-space code reads its weight itself, past the module",
    "*x_proj": "fused state-space kernels read its weight itself, past the module",
    "*q_a_proj": "the first factor of a pair that is low-rank already (multi-head latent attention)",
    "*kv_a_proj*": "the first factor of a pair that is low-rank already (multi-head latent attention)",
    "*router*": "the router of a mixture of experts: small, and every choice of experts hangs on it",
}

CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
)  # experts of a token

UNKNOWN_SHARE = 0.2  # of a block, that may lie in weights of an unknown form


def describe(
    config: PretrainedConfig, targets: Sequence[str] = ("*",), ignore: Sequence[str] = (), split_gate_up: bool = False
) -> ModelSpec:
    """Describe a model as blocks of linears, without reading any weight.

    Blocks are the members of the outermost `nn.ModuleList`s that hold linears; an encoder-decoder has two such stacks. Of a
    model of several modalities the language tower is taken. Experts that are fused in 3-D parameters count as linears of
    their own. The head and the embeddings lie outside the blocks and are never touched.

    Args:
        config: of a model that transformers knows.
        targets: globs; a linear is taken if its full name or its name within the block matches one of them.
        ignore: globs of linears to leave dense, in the same two forms.
        split_gate_up: whether gate and up of an expert count as two linears.

    Raises:
        ModelError: the model is quantised already, has no stack of blocks, has parts that cannot be factorised yet, or no
            linear matches.

    Examples:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        ...                      vocab_size=100, architectures=["LlamaForCausalLM"])
        >>> spec = describe(config, targets=["mlp.*"])
        >>> [linear.name for linear in spec.blocks[0].linears]
        ['model.layers.0.mlp.gate_proj', 'model.layers.0.mlp.up_proj', 'model.layers.0.mlp.down_proj']
    """
    refuse_quantized(config)
    return describe_model(skeleton(config), targets, ignore, split_gate_up)


def describe_model(
    model: PreTrainedModel, targets: Sequence[str] = ("*",), ignore: Sequence[str] = (), split_gate_up: bool = False
) -> ModelSpec:
    """Describe a skeleton or a loaded model; see `describe`."""
    named = [
        (f"{stack}.{name}", block)
        for stack in find_stacks(model)
        for name, block in model.get_submodule(stack).named_children()
    ]
    alike: dict[object, _Inside] = {}  # most blocks of a model are made alike, and are looked into once
    blocks: list[BlockSpec] = []
    for index, (name, block) in enumerate(named):
        form = _form(block)
        if form not in alike:
            alike[form] = _inside(model, name, block, split_gate_up)
        linears = (replace(one, name=f"{name}.{one.name}") for one in alike[form].linears)
        chosen = {
            one.name: one for one in linears if matches(one.name, name, targets) and not matches(one.name, name, ignore)
        }
        ffns = (_full_names(ffn, name) for ffn in alike[form].ffns)
        whole = tuple(ffn for ffn in ffns if chosen.keys() >= set(ffn.linears))
        blocks.append(BlockSpec(name, index, _count(block), tuple(chosen.values()), whole))
    if not any(block.linears for block in blocks):
        without = f" without {', '.join(ignore)}" if ignore else ""
        raise ModelError(f"targets {', '.join(targets)}{without}: no linear matches; give globs such as 'mlp.*'")
    dtype = stored_dtype(model.config)
    return ModelSpec(
        architecture=type(model).__name__,
        hidden_size=hidden_size(model.config),
        dtype=str(dtype).removeprefix("torch."),
        bytes_per_param=dtype.itemsize,
        params=_count(model),
        blocks=tuple(blocks),
        kind=kind_of(model),
    )


def hidden_size(config: PretrainedConfig) -> int:
    """Return the width of the activations between blocks.

    Raises:
        ModelError: the configuration does not tell one.
    """
    text = config.get_text_config()
    found = getattr(text, "hidden_size", None) or getattr(text, "d_model", None)
    if not isinstance(found, int):
        raise ModelError(f"{type(config).__name__}: hidden_size is {found}; a model of one width is needed")
    return found


def refuse_quantized(config: PretrainedConfig) -> None:
    """Raise `ModelError` for a model that is compressed or quantised already."""
    found = quantization(config)
    if found is not None:
        method = found.get("quant_method", "unknown")
        raise ModelError(
            "the model is already compressed by lillama; start from the original (or `lillama export --format dense`)"
            if method == "lillama"
            else f"the model is already quantised ({method}); start from the original weights"
        )


def find_stacks(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the stacks of blocks, from input to output.

    Raises:
        ModelError: there is none, or more than the two of an encoder-decoder.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [
        name
        for name, module in lists
        if not any(name.startswith(f"{other}.") for other, _ in lists) and _holds_weights(module)
    ]
    wanted = kind_of(model).stacks
    found = _of_the_text(model, outermost) if wanted == 1 else outermost
    if len(found) != wanted:
        name, named = type(model).__name__, ", ".join(found) or "none"
        raise ModelError(
            f"{name}: {wanted} stack{'s' * (wanted > 1)} of repeated blocks with linears needed, found {len(found)} ({named})"
        )
    return tuple(found)


def matches(name: str, block: str, globs: Sequence[str]) -> bool:
    """Tell whether a linear's full name, or its name within the block, matches one of the globs."""
    inner = name.removeprefix(f"{block}.")
    return any(fnmatchcase(name, glob) or fnmatchcase(inner, glob) for glob in globs)


def _of_the_text(model: PreTrainedModel, stacks: list[str]) -> list[str]:
    """Leave out the towers of other modalities, whose configuration is not that of the text."""
    text = type(model.config.get_text_config())
    if len(stacks) < 2 or text is type(model.config):
        return stacks
    towers = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}

    def tower(stack: str) -> PreTrainedModel:
        return towers[max((name for name in towers if f"{stack}.".startswith(f"{name}." if name else "")), key=len)]

    return [stack for stack in stacks if type(tower(stack).config) is text]


def _holds_weights(stack: nn.ModuleList) -> bool:
    return any(isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D" for part in stack.modules())


def _form(block: nn.Module) -> object:
    """Return what is equal for blocks whose parts and shapes are."""
    return (
        tuple((name, type(module)) for name, module in block.named_modules()),
        tuple((name, parameter.shape) for name, parameter in block.named_parameters()),
    )


@dataclass(frozen=True)
class _Inside:
    """The linears of a block that may be factorised, and the feed-forward networks among them, by their names within it."""

    linears: tuple[LinearSpec, ...]
    ffns: tuple[FfnSpec, ...]


def _full_names(ffn: FfnSpec, block: str) -> FfnSpec:
    """Return the network by the full names of its linears."""
    return replace(ffn, inward=tuple(f"{block}.{name}" for name in ffn.inward), outward=f"{block}.{ffn.outward}")


def _inside(model: PreTrainedModel, name: str, block: nn.Module, split_gate_up: bool) -> _Inside:
    opened = copy.deepcopy(block)
    unfuse(opened, split=lambda _: split_gate_up)
    _refuse_unknown_weights(type(model).__name__, name, opened)
    kept, shares = set(_names_kept_dense(opened)), _shares(model.config, opened)
    linears = tuple(
        LinearSpec(inner, module.out_features, module.in_features, shares.get(inner, 1.0))
        for inner, module in opened.named_modules()
        if isinstance(module, nn.Linear) and inner not in kept and not any(fnmatchcase(inner, glob) for glob in LEFT)
    )
    return _Inside(linears, find_ffns(opened, linears))


def _shares(config: PretrainedConfig, opened: nn.Module) -> dict[str, float]:
    """Return, for each linear of an expert, the share of the tokens that comes to it if all experts are alike busy."""
    text = config.get_text_config()
    chosen = next((found for key in CHOSEN if isinstance(found := getattr(text, key, None), int)), None)
    return {
        f"{prefix}.{name}" if prefix else name: 1.0 if chosen is None else min(1.0, chosen / experts.count)
        for prefix, experts in opened.named_modules()
        if isinstance(experts, Experts)
        for name, _ in experts.linears()
    }


def _refuse_unknown_weights(kind: str, name: str, opened: nn.Module) -> None:
    """Refuse a block much of which would stay as it is because it lies in 3-D weights of an unknown form."""
    unknown = {
        f"{prefix}.{leaf}": (module, parameter)
        for prefix, module in opened.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 2 and 1 not in parameter.shape and not isinstance(module, _ConvNd)
    }
    if sum(parameter.numel() for _, parameter in unknown.values()) > UNKNOWN_SHARE * _count(opened):
        largest = max(unknown, key=lambda leaf: unknown[leaf][1].numel())
        module, parameter = unknown[largest]
        raise ModelError(
            f"{kind}: {name}.{largest} has the shape {tuple(parameter.shape)}; weights fused in this way "
            f"({type(module).__name__}) are not supported yet, and most of the block would stay as it is"
        )


def _names_kept_dense(block: nn.Module) -> Iterable[str]:
    """Yield the linears that are not factorised for what they stand beside: routers, and parts of torch's own attention."""
    for name, module in block.named_modules():
        dot = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):  # reads its weights itself
            yield from (f"{dot}{inner}" for inner, _ in module.named_modules())
        for child, experts in module.named_children():
            if isinstance(experts, Experts):
                yield from (
                    f"{dot}{inner}"
                    for inner, part in module.named_modules()
                    if isinstance(part, nn.Linear)
                    and part.out_features == experts.count
                    and not inner.startswith(f"{child}.")
                )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
