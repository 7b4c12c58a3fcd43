"""Compressed models for those who have no lillama: multiplied out to dense weights, or with the code beside them."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from lillama.errors import ModelError, OutputError
from lillama.files.atomic import atomic_folder, refuse_present, write_json
from lillama.hub.companions import carry_along, is_inside, without_code
from lillama.hub.portable import CODE, compressed_config, make_portable
from lillama.hub.usage import Loading, with_loading
from lillama.model.checkpoint import INDEX, SINGLE, CheckpointReader, CheckpointWriter
from lillama.model.remote import remote_code
from lillama.model.source import refuse_adapter, stored_dtype
from lillama.model.weights import Weights, store_names
from lillama.modeling.linear import low_rank_linears, merge
from lillama.stream.model import StreamedModel, open_streamed

logger = logging.getLogger(__name__)

PLOT = "lillama-kept.svg"  # which the model card shows
LARGEST_README = 1 << 22  # bytes


def export(
    source: str | Path,
    destination: str | Path,
    format: Literal["dense", "portable"],
    trust_remote_code: bool = False,
) -> None:
    """Write a compressed model in a form that loads without lillama.

    Args:
        source: folder of a compressed model.
        destination: folder to make; it appears only when it is complete.
        format: `dense` multiplies the factors, one layer at a time: loads everywhere, as large as the original.
            `portable` copies the model and adds `modeling_lillama.py` for `trust_remote_code=True`: stays small.
        trust_remote_code: whether code that lies in the model's folder (`auto_map`) may run, as in transformers, and goes
            along.

    Raises:
        OutputError: `destination` exists, or `format` is neither of the two.
        ModelError: `source` is not a model compressed by lillama, or it is damaged.

    Examples:
        >>> from tempfile import mkdtemp
        >>> from lillama import compress, load_recipe
        >>> untaught = load_recipe("default", {"distill": {"epochs": 0}})
        >>> result = compress("demo/model", mkdtemp(), keep=0.8, recipe=untaught, tokens=256, seq_len=64)
        >>> export(result.path, f"{result.path}-dense", "dense")
    """
    source, destination = Path(source), Path(destination)
    if format not in FORMATS:
        raise OutputError(f"{format!r} is not an export format; choose one of {', '.join(FORMATS)}")
    refuse_present(destination)
    compressed_config(source)
    refuse_adapter(source)
    _refuse_pipes(source)
    with remote_code(trust_remote_code), atomic_folder(destination) as folder:
        FORMATS[format](source, folder, trust_remote_code)
        refuse_present(destination)  # once more, for something may have come in the meantime


def _refuse_pipes(source: Path) -> None:
    """Refuse weights that are no files: a pipe would be waited for without end."""
    other = next((file for file in CheckpointReader(source).files if file.exists() and not file.is_file()), None)
    if other is not None:
        raise ModelError(f"{other}: no ordinary file; fetch the model again")


def _dense(source: Path, folder: Path, code: bool) -> None:
    _multiply_out(source, folder)
    config = {key: value for key, value in compressed_config(source).items() if key != "quantization_config"}
    if Path(CODE).stem in str(config.get("auto_map")):  # lillama's own, which a dense model does not need
        del config["auto_map"]
    write_json(folder / "config.json", without_code(config, source, code))
    carry_along(source, folder, code, frozenset({PLOT}))
    _annotate(source, folder, "dense")


def _portable(source: Path, folder: Path, code: bool) -> None:
    model = open_streamed(source, torch.device("cpu"))
    for name in model.names:
        model.stored_block(name, None)  # what is damaged does not leave
    index, files = source / INDEX, model.reader.files
    for file in (*files, *([index] if index.is_file() and source / SINGLE not in files else [])):
        shutil.copyfile(file, folder / file.name)
    write_json(folder / "config.json", without_code(compressed_config(source), source, code))
    carry_along(source, folder, code, frozenset({PLOT}))
    make_portable(folder)
    _annotate(source, folder, "portable")


FORMATS: dict[str, Callable[[Path, Path, bool], None]] = {"dense": _dense, "portable": _portable}


def _multiply_out(source: Path, folder: Path) -> None:
    """Write all tensors under the original's names, factors multiplied, one block at a time; types stay as stored."""
    model = open_streamed(source, torch.device("cpu"))
    weights, blocks = model.weights, tuple(f"{name}." for name in model.names)
    with CheckpointWriter(folder) as writer:
        for name, tensor in weights.read(name for name in weights.sources if not name.startswith(blocks)):
            _write(writer, model, {name: tensor})
        for name in model.names:
            block = model.stored_block(name, None)
            for inner, layer in low_rank_linears(block):
                layer.weight = layer.weight.to(_stored_type(weights, f"{name}.{inner}"))
            merge(block)
            _write(writer, model, {f"{name}.{inner}": tensor for inner, tensor in store_names(block)})


def _write(writer: CheckpointWriter, model: StreamedModel, tensors: dict[str, Tensor]) -> None:
    """Write tensors under the names, and in the pieces, in which `save_pretrained` would."""
    for name, tensor in revert_weight_conversion(model.skeleton, tensors).items():
        writer.write(name, tensor.clone())


def _stored_type(weights: Weights, linear: str) -> torch.dtype:
    """Return the type that a factorised weight had: that of its factors, or where these are quantised of its empty place."""
    factor, place = f"{linear}.right.weight", f"{linear}.weight"
    if factor in weights.sources:
        return weights.dtype(factor)
    return weights.reader.dtype(place) if place in weights.reader.entries else stored_dtype(weights.model.config)


def _annotate(source: Path, folder: Path, loading: Loading) -> None:
    """Write the README of the export: the source's own, with the section on loading that fits the format."""
    architectures = compressed_config(source).get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else ""
    text = _readme(source / "README.md") or f"# {source.resolve().name}\n"
    (folder / "README.md").write_text(with_loading(text, loading, str(architecture)), encoding="utf-8")


def _readme(file: Path) -> str:
    """Return the README of a model; empty where there is none that a reader could want."""
    if not file.is_file():
        return ""
    try:
        if not is_inside(file, file.parent):
            reason = "it is a link that leads out of the folder"
        elif file.stat().st_size > LARGEST_README:
            reason = f"it is longer than {LARGEST_README} bytes"
        else:
            return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    logger.warning("%s: left out, for %s", file, reason)
    return ""
