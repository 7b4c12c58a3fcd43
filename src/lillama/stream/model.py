"""A model on disk whose blocks are in memory one at a time."""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from lillama.errors import ModelError
from lillama.lowrank.install import install_stored
from lillama.model.checkpoint import CheckpointReader
from lillama.model.describe import find_stacks, refuse_quantized
from lillama.model.kind import kind_of
from lillama.model.skeleton import skeleton
from lillama.model.source import computed_dtype, load_config, quantization
from lillama.model.spec import Kind
from lillama.model.tied import untie
from lillama.model.weights import Weights, fill_module
from lillama.modeling.experts import unfuse
from lillama.modeling.soundness import fault


@dataclass(frozen=True)
class StreamedModel:
    """A model on disk that is run block by block.

    Attributes:
        skeleton: without weights; factorised linears already installed, if the model on disk is compressed.
        stacks: names of the lists of blocks, from input to output; an encoder-decoder has two.
        reader: of its weights.
        device: that computes.
        dtype: of weights and activations in memory.
        split_gate_up: whether gate and up of an expert are two linears.
    """

    skeleton: PreTrainedModel
    stacks: tuple[str, ...]
    reader: CheckpointReader
    device: torch.device
    dtype: torch.dtype
    split_gate_up: bool = False

    @cached_property
    def weights(self) -> Weights:
        """Its weights; every shape is checked on the way."""
        return Weights.of(self.skeleton, self.reader)

    @cached_property
    def kind(self) -> Kind:
        """What it takes and what it predicts."""
        return kind_of(self.skeleton)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The blocks' names, of all stacks."""
        inner = ((stack, self.skeleton.get_submodule(stack).named_children()) for stack in self.stacks)
        return tuple(f"{stack}.{name}" for stack, children in inner for name, _ in children)

    def template(self, index: int) -> nn.Module:
        """Return a block without weights, these as linears (see `modeling.experts`)."""
        block = copy.deepcopy(self.skeleton.get_submodule(self.names[index]))
        unfuse(block, split=lambda _: self.split_gate_up)
        return block

    def indices(self, stack: int) -> range:
        """Return the indices of a stack's blocks."""
        sizes = [len(list(self.skeleton.get_submodule(name).children())) for name in self.stacks]
        return range(sum(sizes[:stack]), sum(sizes[: stack + 1]))

    def stack_of(self, index: int) -> int:
        """Return the stack of a block."""
        return next(stack for stack in range(len(self.stacks)) if index in self.indices(stack))

    def block(self, index: int, stored: bool = False) -> nn.Module:
        """Read one block into memory, its weights as linears, in the model's type or in those that they are stored in."""
        block = self.stored_block(self.names[index], None if stored else self.dtype)
        unfuse(block, split=lambda _: self.split_gate_up)
        return block

    def stored_block(self, name: str, dtype: torch.dtype | None) -> nn.Module:
        """Read one block into memory as its class has it, in a type; None keeps the stored ones.

        Raises:
            ModelError: a tensor holds what it cannot.
        """
        block = fill_module(self.skeleton.get_submodule(name), name, self.weights, self.device, dtype)
        reason = fault(block, name)
        if reason:
            raise ModelError(f"{self.reader.folder}: {reason}")
        return block

    def outside(self, head: bool) -> PreTrainedModel:
        """Read all that is not a block into memory; the blocks stay on the meta device.

        Args:
            head: whether the output layer is read too, if it does not share the input embeddings.
        """
        apart = [f"{name}." for name in (*self.stacks, *self._other_stacks)]
        wanted = [name for name in self.weights.sources if not name.startswith(tuple(apart))]
        output = self.skeleton.get_output_embeddings()
        if not head and output is not None and output.weight is not self.skeleton.get_input_embeddings().weight:
            unwanted = {name for name, module in self.skeleton.named_modules() if module is output}
            wanted = [name for name in wanted if name.rpartition(".")[0] not in unwanted]
        model = fill_module(self.skeleton, "", self.weights, self.device, self.dtype, wanted)
        assert isinstance(model, PreTrainedModel)
        return model

    @cached_property
    def _other_stacks(self) -> list[str]:
        """Lists of modules that no text runs through, such as the blocks of a vision tower."""
        config = self.skeleton.config
        if self.kind.stacks > 1 or type(config.get_text_config()) is type(config):
            return []
        lists = [name for name, module in self.skeleton.named_modules() if isinstance(module, nn.ModuleList)]
        text = self.stacks[0].rpartition(".")[0]
        return [name for name in lists if not name.startswith(f"{text}." if text else "")]


def open_streamed(
    folder: Path, device: torch.device, dtype: torch.dtype | None = None, split_gate_up: bool = False
) -> StreamedModel:
    """Open a model folder, dense or compressed, to be run block by block.

    Args:
        folder: of the model.
        device: that computes.
        dtype: of weights and activations in memory; None takes fp32 on the CPU and the stored type elsewhere.
        split_gate_up: whether gate and up of an expert are two linears; a compressed model tells itself.

    Raises:
        ModelError: the model cannot be used.
    """
    config = load_config(folder)
    found = quantization(config)
    if found is not None and found.get("quant_method") != "lillama":
        refuse_quantized(config)
    model, reader = skeleton(config), CheckpointReader(folder)
    untie(model, reader)
    stacks = find_stacks(model)  # before linears are swapped: quantised ones would not be recognised
    if found is not None:
        install_stored(model, found)
    return StreamedModel(model, stacks, reader, device, dtype or computed_dtype(config, device), split_gate_up)
