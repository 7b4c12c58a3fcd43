"""Teach transformers to load low-rank models with its own classes: linears are swapped before the weights arrive.

`config.json` carries `quantization_config = {"quant_method": "lillama", "ranks": {module: rank}, "format_version": 1}`;
version 2 adds `storage` and `absorbed` for weights that are not stored as two plain factors, version 3 `shapes` for dense
layers of fewer neurons, version 4 `bits` for dense weights of few bits and for bits other than 8. Importing this
module registers the method. Its text also ships inside portable models (see
`portable.py`), therefore it imports nothing of lillama but what ships with it, on one line.
"""

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lillama.modeling.linear import build_stored, low_rank_linears, mark, merge, prepare, resize
from lillama.modeling.soundness import AGAIN, fault, misfit, refusal, shape_misfit

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
else:
    Model = nn.Module  # the import of transformers' own class may be what brings us here: it does not exist yet

METHOD = "lillama"


class LowRankConfig(QuantizationConfigMixin):
    """The `quantization_config` of a low-rank model; nothing is believed of a section that lay in a file.

    Args:
        ranks: name of a linear in the full model -> rank of its factors.
        format_version: of names and layout in the weight files; by default the lowest that will do.
        storage: `form`, `bits` and `group_size` of the stored weights; None is the plain form, not quantised.
        absorbed: linears in the pivot form whose rows stand pivots first in the model itself.
        shapes: name of a dense layer in the full model -> rows and columns of its weight, where it is narrower than the
            rest of the configuration says.
        bits: name of a linear in the full model -> bits of its stored numbers: of one that has no rank, which stays dense, and
            of one whose bits are not those of `storage`.
        extra: further facts (version of lillama, hash of the recipe), kept as they are.

    Raises:
        ValueError: the section is damaged, or the model was written in a newer format.
    """

    def __init__(
        self,
        ranks: Any = None,
        format_version: Any = None,
        storage: Any = None,
        absorbed: Any = None,
        shapes: Any = None,
        bits: Any = None,
        **extra: Any,
    ) -> None:
        version = format_version
        if version is None:
            few = (storage or {}).get("bits") if isinstance(storage, dict) else None
            version = 4 if bits or few not in (None, 8) else 3 if shapes else 2 if storage else 1
        section = {
            "format_version": version,
            "ranks": ranks,
            "storage": storage,
            "absorbed": absorbed,
            "shapes": shapes,
            "bits": bits,
        }
        _refuse(refusal(section))
        _refuse(next((f"{key} is no key of a section of lillama" for key in extra if hasattr(type(self), key)), None))
        self.__dict__.update(extra)
        self.ranks: dict[str, int] = ranks
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]  (an enum that cannot be extended)
        self.storage, self.absorbed = storage, absorbed or []
        self.shapes: dict[str, tuple[int, int]] = shapes or {}
        self.bits: dict[str, int] = bits or {}
        self.format_version = version

    def to_dict(self) -> dict[str, Any]:
        """Return the section as it is written; what version 1 does not know appears only where it says something."""
        section = super().to_dict()
        for key in ("storage", "absorbed", "shapes", "bits"):
            if not section[key]:
                del section[key]
        return section


class LowRankQuantizer(HfQuantizer):
    """Swap linears before loading; afterwards the model is one of ordinary floating-point weights."""

    requires_calibration = True  # a dense checkpoint with this config is an error, not a compression
    quantization_config: LowRankConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def _process_model_before_weight_loading(self, model: Model, **kwargs: Any) -> Model:
        """Swap each linear with a rank; those that a part of the full model does not have are left out, as is usual.

        A bare base model lacks the prefix of the full one (`model.layers.0` is `layers.0`), and the reverse. What is
        missed here cannot pass silently: the empty `weight` in the file does not fit a dense linear.
        """
        prefix, config = f"{model.base_model_prefix}.", self.quantization_config
        stored = tuple(dict.fromkeys((*config.ranks, *config.bits)))
        aliases = {name: (name, name.removeprefix(prefix), prefix + name) for name in (*stored, *config.shapes)}
        layers = dict(model.named_modules())
        for name, (rows, columns) in config.shapes.items():
            known = next((known for known in aliases[name] if hasattr(layers.get(known), "weight")), None)
            if known is not None:
                _refuse(shape_misfit(name, (rows, columns), layers[known]))
                model.set_submodule(known, resize(layers[known], rows, columns))
        prepare(model, {known for name in stored for known in aliases[name]})
        linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        for name in stored:
            known = next((known for known in aliases[name] if known in linears), None)
            if known is not None:
                _refuse(misfit(name, config.ranks[name], linears[known]) if name in config.ranks else None)
                model.set_submodule(known, build_stored(name, linears[known], vars(config)))
        mark(model)
        return model

    def _process_model_after_weight_loading(self, model: Model, **kwargs: Any) -> Model:
        """Refuse what was not loaded, and what cannot be; make of the model one of ordinary weights.

        `.half()` and `.float()` are allowed, and the code file of a portable model is forgotten when it is not in use.

        Raises:
            ValueError: a tensor was missing, or no order, no scale, or of the wrong type: transformers would go on with
                random numbers.
        """
        config = self.quantization_config
        missing = next(_missing(model, (*config.ranks, *config.bits, *config.shapes)), None)
        _refuse(missing and f"{missing}: this tensor is missing from the weights; {AGAIN}")
        _refuse(fault(model))
        model.is_quantized = False  # pyright: ignore[reportArgumentType]
        sources = type(model).__module__, type(model.config).__module__
        if not any(source.startswith("transformers_modules") for source in sources):
            model.config.__dict__.pop("auto_map", None)  # `save_pretrained` would name a file that it does not write
        return model

    def _dequantize(self, model: Model, dtype: Any = None) -> Model:
        """Multiply the factors; types stay as they are."""
        merge(model)
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whether `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whether Trainer may train the weights themselves."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model."""
        return True


def _missing(model: Model, ranks: Collection[str]) -> Iterator[str]:
    """Yield the tensors that came from no file, and hold what transformers fills such gaps with.

    It marks what it loads. Where the class is the very one that was saved, every parameter must be; where it is another
    one, whose head is new, all of the blocks that hold factors. Buffers, the integers of a quantised factor among them,
    must be where no hooks moved them (which loses the mark).
    """
    prefix, own = f"{model.base_model_prefix}.", type(model).__name__ in (model.config.architectures or ())
    blocks = tuple({start for name in ranks for start in _block(name, prefix)})
    layers = tuple(f"{name}." for name, _ in low_rank_linears(model))
    moved = any(hasattr(module, "_hf_hook") for module in model.modules())
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        wanted = name.startswith(layers) and not moved if name in buffers else own or name.startswith(blocks)
        if wanted and not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
            yield name


def _block(name: str, prefix: str) -> tuple[str, ...]:
    """Return how the names of a linear's block begin, in the full model and in the bare base model; none outside blocks."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    if number is None:
        return ()
    start = f"{'.'.join(parts[: number + 1])}."
    return start, start.removeprefix(prefix), prefix + start


def _refuse(reason: str | None) -> None:
    if reason:
        raise ValueError(reason)


def declare(model: Model, config: LowRankConfig) -> None:
    """Let `save_pretrained` write `config` beside the weights of a model that was factorised in memory."""
    model.config.quantization_config = config
    model.hf_quantizer = LowRankQuantizer(config, pre_quantized=True)  # pyright: ignore[reportArgumentType]


# Not by transformers' decorators: those refuse a second registration, and a portable model may have come first.
AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, LowRankConfig)
AUTO_QUANTIZER_MAPPING.setdefault(METHOD, LowRankQuantizer)
