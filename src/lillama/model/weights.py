"""The weights of a model under the names that its class gives them, however the checkpoint keeps them.

transformers renames and converts tensors while it loads: experts that lie one by one in a checkpoint become one 3-D tensor,
for example. The same rules, its own, are applied here, to one tensor at a time.
"""

import copy
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from lillama.errors import ModelError, first_line
from lillama.model.checkpoint import CheckpointReader

logger = logging.getLogger(__name__)

SHOWN_NAMES = 3
DERIVED = {"inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}  # once stored, now computed
WRAPPERS = {  # part of a name -> how what is inside is saved
    "_orig_mod.": "torch.compile: `model._orig_mod.save_pretrained`",
    "module.": "data parallel: `model.module.save_pretrained`",
    "_fsdp_wrapped_module.": "FSDP: save its full state dict",
    "_checkpoint_wrapped_module.": "activation checkpointing: save before it is applied",
    "base_model.model.": "PEFT: `merge_and_unload()` before `save_pretrained`",
    "base_layer.": "PEFT: `merge_and_unload()` before `save_pretrained`",
}
WRAPPED = re.compile("|".join(rf"(?<![^.]){re.escape(part)}" for part in WRAPPERS))


@dataclass(frozen=True)
class TensorSource:
    """What one tensor of a model, or several of them, are made of.

    Attributes:
        target: name that transformers gives the result.
        keys: tensors in the checkpoint, each with the pattern of the converter that its name matches.
        converter: that makes one of the others; None if there is one tensor, which is taken as it is.
    """

    target: str
    keys: tuple[tuple[str, str], ...]
    converter: WeightConverter | None = None

    def made(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return name in the model -> tensor, from name in the checkpoint -> tensor."""
        if self.converter is None:
            return {self.target: tensors[self.keys[0][0]]}
        converter = copy.deepcopy(self.converter)
        for key, pattern in self.keys:
            converter.add_tensor(self.target, key, pattern, tensors[key])  # pyright: ignore[reportArgumentType]
        try:
            made = converter.convert(self.target, model=model, config=model.config)
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ModelError(
                f"{self.target}: cannot be made of {self.keys[0][0]} and {len(self.keys) - 1} more tensors "
                f"({first_line(error)}); fetch the model again"
            ) from None
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


@dataclass(frozen=True)
class Weights:
    """The stored tensors of a model; each is read when it is asked for.

    Shared parameters appear once, under the name that the model gives first.

    Attributes:
        model: skeleton, of its native class.
        reader: of the checkpoint.
        sources: name in the model -> what it is made of, and under which name that comes out.
        integers: names of tensors of whole numbers -> their type, which they always keep.
    """

    model: PreTrainedModel
    reader: CheckpointReader
    sources: Mapping[str, tuple[TensorSource, str]]
    integers: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, model: PreTrainedModel, reader: CheckpointReader) -> "Weights":
        """Find every tensor of a skeleton in a checkpoint, without reading any.

        A checkpoint of the bare base model (names without `model.`) serves too.

        Raises:
            ModelError: a tensor is missing, has another shape, or a type that cannot be read.
        """
        prefix, present = f"{model.base_model_prefix}.", _present(model, reader)
        found: dict[str, tuple[TensorSource, str]] = {}
        tied = {names[0]: names for names in _common_part(model)}
        for name, wanted in store_names(model):
            candidates = (name, name.removeprefix(prefix), prefix + name, *tied.get(name, ()))
            known = next((n for n in candidates if n in present), None)
            if known is None:
                raise missing(reader, name)
            source, shape = present[known]
            if shape != tuple(wanted.shape):
                raise ModelError(
                    f"{reader.folder}: tensor {name} has shape {shape}, the configuration wants "
                    f"{tuple(wanted.shape)}; config.json and weights do not belong together"
                )
            for key, _ in source.keys:
                reader.check(key, wanted.dtype)
            found[name] = source, known
        integers = {name: tensor.dtype for name, tensor in store_names(model) if not tensor.is_floating_point()}
        _warn_of_unused(model, reader, present)
        return cls(model, reader, found, integers)

    @property
    def keys(self) -> Iterator[str]:
        """Names in the checkpoint of all that the model is made of."""
        return (key for source in {id(s): s for s, _ in self.sources.values()}.values() for key, _ in source.keys)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type that a tensor is stored in."""
        return self.reader.dtype(self.sources[name][0].keys[0][0])

    def numbers(self, name: str) -> int:
        """Return how many numbers a tensor has."""
        return self.model.get_parameter_or_buffer(name).numel()

    def nbytes(self, name: str) -> int:
        """Return the bytes that a tensor takes where it is written in its stored type."""
        dtype = self.integers.get(name)
        return self.numbers(name) * (self.dtype(name) if dtype is None else dtype).itemsize

    def _exact(self, name: str) -> bool:
        """Tell whether transformers keeps a tensor in fp32 whatever the model computes in."""
        return any(part in name for part in self.model._keep_in_fp32_modules_strict or ())

    def read(
        self, names: Iterable[str], device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors in a type; None keeps the stored one."""
        made: dict[int, dict[str, Tensor]] = {}
        for name in names:
            source, known = self.sources[name]
            if source.converter is None:
                wanted = None if dtype is not None and self._exact(name) else dtype
                yield name, self.reader.read(source.keys[0][0], device, self.integers.get(name, wanted))
                continue
            if id(source) not in made:
                tensors = {key: self.reader.read(key, device, dtype) for key, _ in source.keys}
                made[id(source)] = source.made(self.model, tensors)
            yield name, made[id(source)].pop(known)


def fill_module(
    template: nn.Module,
    prefix: str,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype | None,
    wanted: Iterable[str] | None = None,
) -> nn.Module:
    """Return a copy of a skeleton's module with its weights read from the checkpoint.

    Args:
        template: a module of the skeleton; it is left as it is.
        prefix: the module's full name in the model, empty for the model itself.
        weights: of the model.
        device: where the weights go.
        dtype: of the weights in memory, None for the stored ones; integers keep their own.
        wanted: full names of the tensors that are read, by default all; parameters that are not stay on the meta device.
    """
    module, dot = copy.deepcopy(template), f"{prefix}." if prefix else ""
    chosen = weights.sources.keys() if wanted is None else frozenset(wanted)
    names = [dot + name for name, _ in store_names(module) if dot + name in chosen]
    state = {name.removeprefix(dot): tensor for name, tensor in weights.read(names, device, dtype)}
    shared = _common_part(module)
    module.load_state_dict(state, strict=False, assign=True)
    for first, *others in shared:
        for name in others:
            parent, _, leaf = name.rpartition(".")
            module.get_submodule(parent).register_parameter(leaf, module.get_parameter(first))
    for name, buffer in list(module.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        moved = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)  # empty, or unfilled
        owner.register_buffer(leaf, moved, persistent=leaf not in owner._non_persistent_buffers_set)
    return module.requires_grad_(False)


def store_names(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what a checkpoint stores of a module: parameters, shared ones once, and persistent, non-empty buffers."""
    yield from module.named_parameters()
    kept = set(module.state_dict(keep_vars=True))
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in kept and buffer.numel())


def missing(reader: CheckpointReader, name: str) -> ModelError:
    """Return the error for a tensor that the weights lack, with the remedy where it is there under a wrapper's name."""
    for key in reader.names:
        inner = WRAPPED.sub("", key)
        if inner != key and (inner == name or inner.endswith(f".{name}") or name.endswith(f".{inner}")):
            found = sorted(set(WRAPPED.findall(key)))
            return ModelError(
                f"{reader.folder}: tensor {name} is stored as {key}: the model was saved inside a wrapper "
                f"({', '.join(found)}); save what is inside it ({' or '.join(WRAPPERS[part] for part in found)})"
            )
    return ModelError(f"{reader.folder}: tensor {name} is missing from the weights; fetch the model again")


def warn_of_unused(folder: Path, names: Iterable[str]) -> None:
    """Say that stored tensors are not part of the model that `config.json` tells of, if there are any."""
    unused = sorted(names, key=dot_natural_key)
    if unused:
        shown = ", ".join(unused[:SHOWN_NAMES]) + (", ..." if len(unused) > SHOWN_NAMES else "")
        logger.warning(
            "%s: %d stored tensors are not part of the model that config.json tells of and are left out: %s",
            folder,
            len(unused),
            shown,
        )


def _warn_of_unused(
    model: PreTrainedModel, reader: CheckpointReader, present: Mapping[str, tuple[TensorSource, tuple[int, ...]]]
) -> None:
    """Find the stored tensors that have no place in a model, and that its class does not leave out by itself."""
    prefix, known = f"{model.base_model_prefix}.", set(model.state_dict())
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    silent = [
        *(model._keys_to_ignore_on_load_unexpected or ()),
        *(DERIVED[name] for name in DERIVED if name in buffers),
    ]
    used = {
        key
        for target, (source, _) in present.items()
        if not known.isdisjoint((target, target.removeprefix(prefix), prefix + target))
        for key, _ in source.keys
    }
    unused = (key for key in reader.names if key not in used)
    warn_of_unused(reader.folder, (key for key in unused if not any(re.search(pattern, key) for pattern in silent)))


def plain_targets(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Return name that transformers gives it -> tensor in the checkpoint, for tensors that it takes as they are."""
    renamed, _ = _rename(model, keys)
    return {target: key for key, (target, pattern) in renamed.items() if pattern is None}


def _rename(
    model: PreTrainedModel, keys: Iterable[str]
) -> tuple[dict[str, tuple[str, str | None]], dict[str, WeightConverter]]:
    """Return what transformers makes of the checkpoint's names.

    Returns:
        tensor in the checkpoint -> its name in the model, and the pattern of the converter that takes it, if one does; and
        pattern -> converter.
    """
    steps, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    found = {
        key: rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        for key in sorted(keys, key=dot_natural_key)
    }
    return found, {pattern: converter for converter in converters for pattern in converter.source_patterns}


def _present(model: PreTrainedModel, reader: CheckpointReader) -> dict[str, tuple[TensorSource, tuple[int, ...]]]:
    """Map every name under which the checkpoint's tensors can be found to their source and shape."""
    renamed, by_pattern = _rename(model, reader.entries)
    groups: dict[str, list[tuple[str, str]]] = {}
    found: dict[str, tuple[TensorSource, tuple[int, ...]]] = {}
    for key, (target, pattern) in renamed.items():
        if pattern is None:
            found[target] = TensorSource(target, ((key, ""),)), reader.shape(key)
        else:
            groups.setdefault(target, []).append((key, pattern))
    for target, keys in groups.items():
        source = TensorSource(target, tuple(keys), by_pattern[keys[0][1]])
        shapes = {key: torch.empty(reader.shape(key), device="meta") for key, _ in keys}
        found |= {name: (source, tuple(tensor.shape)) for name, tensor in source.made(model, shapes).items()}
    return found | {
        key: (TensorSource(key, ((key, ""),)), reader.shape(key)) for key in reader.entries if key not in found
    }


def _common_part(module: nn.Module) -> Iterable[list[str]]:
    """Return, for each parameter, all of its names; it may be saved under any of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names.values()
