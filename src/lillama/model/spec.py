"""What a model is made of: linears, blocks, the whole. Frozen values without tensors."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from typing_extensions import TypedDict


@dataclass(frozen=True)
class Kind:
    """What kind of model it is: what it takes, what it predicts, how long its inputs may be.

    Attributes:
        takes: name of the main input of its forward: `input_ids`, `input_features`, `input_values`, `pixel_values`.
        predicts: each token from those before it (`next`), masked tokens from both sides (`masked`), or nothing, for lack of
            a language-modelling head.
        stacks: of blocks; an encoder-decoder has two.
        max_positions: tokens of a text that it has positions for; None where nothing bounds them.
        max_source_positions: of an utterance in the encoder; None where nothing bounds them.
        max_target_positions: tokens that the decoder of such an encoder writes; None where nothing bounds them.
        decoder_start: token before the first that a decoder writes; None where the configuration tells none.
    """

    takes: str = "input_ids"
    predicts: Literal["next", "masked", "nothing"] = "next"
    stacks: int = 1
    max_positions: int | None = None
    max_source_positions: int | None = None
    max_target_positions: int | None = None
    decoder_start: int | None = None

    @property
    def takes_tokens(self) -> bool:
        """Whether it reads text."""
        return self.takes == "input_ids"

    @property
    def causal(self) -> bool:
        """Whether it is one stack that predicts each token of a sequence from those before it."""
        return self.stacks == 1 and self.predicts == "next"


class LinearJson(TypedDict):
    """A linear in `spec.json`."""

    name: str
    out_features: int
    in_features: int
    share: float
    itemsize: int | None


class BlockJson(TypedDict):
    """A block in `spec.json`."""

    name: str
    index: int
    params: int
    linears: list[LinearJson]


class SpecJson(TypedDict):
    """`spec.json`."""

    architecture: str
    hidden_size: int
    dtype: str
    bytes_per_param: int
    params: int
    blocks: list[BlockJson]
    stored_bytes: int | None


@dataclass(frozen=True)
class LinearSpec:
    """One two-dimensional weight `W (out x in)` that may be factorised.

    Attributes:
        name: full name of its module in the model, for example `model.layers.0.mlp.up_proj`.
        out_features: rows of `W`.
        in_features: columns of `W`.
        share: of the tokens that comes to it; less than 1 in an expert.
        itemsize: bytes of a stored number, where they are others than the model's.
    """

    name: str
    out_features: int
    in_features: int
    share: float = 1.0
    itemsize: int | None = None

    @property
    def params(self) -> int:
        """Numbers in the dense weight; the bias is not counted, it stays."""
        return self.out_features * self.in_features

    @property
    def break_even_rank(self) -> float:
        """The rank at which two factors hold as many numbers as the dense weight: `out*in / (out+in)`."""
        return self.params / (self.out_features + self.in_features)

    def params_at(self, rank: int | None) -> int:
        """Numbers stored at `rank`, or for the dense weight when `rank` is None."""
        return self.params if rank is None else rank * (self.out_features + self.in_features)

    def as_json(self) -> LinearJson:
        """Return the value for JSON."""
        return {
            "name": self.name,
            "out_features": self.out_features,
            "in_features": self.in_features,
            "share": self.share,
            "itemsize": self.itemsize,
        }


@dataclass(frozen=True)
class FfnSpec:
    """A feed-forward network: linears that lead to its neurons, something that treats each neuron by itself, one linear behind.

    Any of its neurons may be left out (the network is then narrower), for no other number of the model knows of them.

    Attributes:
        inward: full names of the linears that the neurons are outputs of: up, and gate where there is one.
        outward: full name of the linear that the neurons are inputs of: down.
        neurons: how many there are.
        biases: of each neuron.
    """

    inward: tuple[str, ...]
    outward: str
    neurons: int
    biases: int = 0

    @property
    def linears(self) -> tuple[str, ...]:
        """Full names of all its linears."""
        return (*self.inward, self.outward)


@dataclass(frozen=True)
class BlockSpec:
    """One repeated unit of the model.

    Attributes:
        name: full name of its module, for example `model.layers.0`.
        index: position from the input.
        params: stored parameters, all kinds.
        linears: the linears that may be factorised, in the module's order.
        ffns: the feed-forward networks among these that may be made narrower.
    """

    name: str
    index: int
    params: int
    linears: tuple[LinearSpec, ...]
    ffns: tuple[FfnSpec, ...] = ()

    @property
    def stack(self) -> str:
        """Full name of the list of blocks that it is one of."""
        return self.name.rpartition(".")[0]

    def inner(self, name: str) -> str:
        """Return the name within the block of a module by its full name."""
        return name.removeprefix(f"{self.name}.")

    @property
    def active_params(self) -> float:
        """Parameters that a token meets: of the experts, those that it is sent to."""
        return self.params - sum((1 - linear.share) * linear.params for linear in self.linears)

    def as_json(self) -> BlockJson:
        """Return the value for JSON."""
        linears = [linear.as_json() for linear in self.linears]
        return {"name": self.name, "index": self.index, "params": self.params, "linears": linears}


@dataclass(frozen=True)
class ModelSpec:
    """A model seen as blocks of linears.

    Attributes:
        architecture: class name, for example `LlamaForCausalLM`.
        hidden_size: width of the activations between blocks.
        dtype: stored type of most parameters, as torch names it (`bfloat16`): that of the weights where they are at hand,
            else what the configuration says.
        bytes_per_param: of that type.
        params: stored parameters of the whole model; shared ones count once.
        blocks: from input to output.
        stored_bytes: of all that is stored, as the weight files' headers tell; None where there are no weights at hand.
        kind: what it takes and predicts.

    Examples:
        >>> block = BlockSpec("layers.0", 0, 7300, (LinearSpec("layers.0.up", 120, 60),))
        >>> spec = ModelSpec("Toy", 60, "float32", 4, 10000, (block,))
        >>> spec.block_params, [linear.break_even_rank for linear in spec.linears]
        (7300, [40.0])
    """

    architecture: str
    hidden_size: int
    dtype: str
    bytes_per_param: int
    params: int
    blocks: tuple[BlockSpec, ...]
    stored_bytes: int | None = None
    kind: Kind = Kind()

    @property
    def nbytes(self) -> int:
        """Bytes of the whole model in its weight files, without their headers."""
        return self.params * self.bytes_per_param if self.stored_bytes is None else self.stored_bytes

    def itemsize(self, linear: LinearSpec) -> int:
        """Return the bytes of a stored number of a linear."""
        return self.bytes_per_param if linear.itemsize is None else linear.itemsize

    @cached_property
    def linears(self) -> tuple[LinearSpec, ...]:
        """All linears that may be factorised, from input to output."""
        return tuple(linear for block in self.blocks for linear in block.linears)

    @cached_property
    def ffns(self) -> tuple[FfnSpec, ...]:
        """All feed-forward networks that may be made narrower, from input to output."""
        return tuple(ffn for block in self.blocks for ffn in block.ffns)

    @property
    def block_params(self) -> int:
        """Stored parameters of all blocks together."""
        return sum(block.params for block in self.blocks)

    def __iter__(self) -> Iterator[BlockSpec]:
        return iter(self.blocks)

    def as_json(self) -> SpecJson:
        """Return the value for JSON."""
        return {
            "architecture": self.architecture,
            "hidden_size": self.hidden_size,
            "dtype": self.dtype,
            "bytes_per_param": self.bytes_per_param,
            "params": self.params,
            "blocks": [block.as_json() for block in self.blocks],
            "stored_bytes": self.stored_bytes,
        }
