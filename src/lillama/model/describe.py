"""Find the repeated blocks of a model and their linears, from the configuration alone."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lillama.errors import ModelError
from lillama.model.skeleton import skeleton
from lillama.model.source import quantization, stored_dtype
from lillama.model.spec import BlockSpec, LinearSpec, ModelSpec


def describe(config: PretrainedConfig, targets: Sequence[str] = ("*",), ignore: Sequence[str] = ()) -> ModelSpec:
    """Describe a model as blocks of linears, without reading any weight.

    Blocks are the children of the model's one outermost `nn.ModuleList` that holds linears. The head and the embeddings
    lie outside it and are never touched.

    Args:
        config: of a model that transformers knows.
        targets: globs; a linear is taken if its full name or its name within the block matches one of them.
        ignore: globs of linears to leave dense, in the same two forms.

    Raises:
        ModelError: the model is quantised already, has no or several stacks of blocks, has parts that cannot be
            factorised yet, or no linear matches.

    Examples:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        ...                      vocab_size=100, architectures=["LlamaForCausalLM"])
        >>> spec = describe(config, targets=["mlp.*"])
        >>> [linear.name for linear in spec.blocks[0].linears]
        ['model.layers.0.mlp.gate_proj', 'model.layers.0.mlp.up_proj', 'model.layers.0.mlp.down_proj']
    """
    refuse_quantized(config)
    return describe_model(skeleton(config), targets, ignore)


def describe_model(model: PreTrainedModel, targets: Sequence[str] = ("*",), ignore: Sequence[str] = ()) -> ModelSpec:
    """Describe a skeleton or a loaded model; see `describe`."""
    stack = find_stack(model)
    blocks = tuple(
        BlockSpec(f"{stack}.{index}", index, _count(block), _linears(block, f"{stack}.{index}", targets, ignore))
        for index, block in enumerate(model.get_submodule(stack).children())
    )
    if not any(block.linears for block in blocks):
        without = f" without {', '.join(ignore)}" if ignore else ""
        raise ModelError(f"targets {', '.join(targets)}{without}: no linear matches; give globs such as 'mlp.*'")
    dtype = stored_dtype(model.config)
    return ModelSpec(
        architecture=type(model).__name__,
        hidden_size=model.config.get_text_config().hidden_size,
        dtype=str(dtype).removeprefix("torch."),
        bytes_per_param=dtype.itemsize,
        params=_count(model),
        blocks=blocks,
    )


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


def find_stack(model: nn.Module) -> str:
    """Return the name of the outermost `nn.ModuleList` whose members hold linears.

    Raises:
        ModelError: there is none or more than one, or blocks hold fused expert tensors. A parameter counts as such if it
            has three dimensions, none of size 1 (as the kernels of depthwise convolutions have).
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [
        (name, module)
        for name, module in lists
        if not any(name.startswith(f"{other}.") for other, _ in lists)
        and any(isinstance(part, nn.Linear) for part in module.modules())
    ]
    kind = type(model).__name__
    if len(outermost) != 1:
        found = ", ".join(name for name, _ in outermost) or "none"
        raise ModelError(f"{kind}: one stack of blocks with linears is needed, found {found}; not supported yet")
    name, stack = outermost[0]
    fused = next((n for n, p in stack.named_parameters() if p.dim() == 3 and 1 not in p.shape), None)
    if fused is not None:
        raise ModelError(
            f"{kind}: {name}.{fused} is a fused tensor of experts; mixtures of experts are not supported yet"
        )
    return name


def matches(name: str, block: str, globs: Sequence[str]) -> bool:
    """Tell whether a linear's full name, or its name within the block, matches one of the globs."""
    inner = name.removeprefix(f"{block}.")
    return any(fnmatchcase(name, glob) or fnmatchcase(inner, glob) for glob in globs)


def _linears(block: nn.Module, prefix: str, targets: Sequence[str], ignore: Sequence[str]) -> tuple[LinearSpec, ...]:
    return tuple(
        LinearSpec(f"{prefix}.{name}", module.out_features, module.in_features)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
        and matches(f"{prefix}.{name}", prefix, targets)
        and not matches(f"{prefix}.{name}", prefix, ignore)
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
