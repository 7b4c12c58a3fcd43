"""Compressed models for those who have no lillama: multiplied out to dense weights, or with the code beside them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from lillama.errors import OutputError
from lillama.files import atomic_folder, write_json
from lillama.hub.card import Loading, with_loading
from lillama.hub.portable import CODE, compressed_config, make_portable
from lillama.lowrank.linear import low_rank_linears, merge
from lillama.model.checkpoint import CheckpointWriter
from lillama.model.source import stored_dtype
from lillama.model.weights import Weights, stored
from lillama.stream.streamed import StreamedModel, open_streamed

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".ot", ".pkl"}
OWN = {"config.json", "README.md"}
FOLDERS = ("additional_chat_templates",)


def export(source: str | Path, destination: str | Path, format: Literal["dense", "portable"]) -> None:
    """Write a compressed model in a form that loads without lillama.

    Args:
        source: folder of a compressed model.
        destination: folder to make; it appears only when it is complete.
        format: `dense` multiplies the factors, one layer at a time: loads everywhere, as large as the original.
            `portable` copies the model and adds `modeling_lillama.py` for `trust_remote_code=True`: stays small.

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
    if destination.exists():
        raise OutputError(f"{destination}: exists already; remove it or name another folder")
    compressed_config(source)
    with atomic_folder(destination) as folder:
        FORMATS[format](source, folder)


def carry_along(source: Path, destination: Path) -> None:
    """Copy what belongs to a model beside its weights: tokenizer, generation settings, chat templates, licence.

    Never weights or their index, never code, never `config.json` and `README.md`, which a new model writes itself.
    """
    for file in _files(source):
        apart = file.name in OWN or file.name.endswith(".index.json") or file.suffix == ".py"
        if not apart and not WEIGHTS & set(file.suffixes):
            _copy(file, source, destination)


def _dense(source: Path, folder: Path) -> None:
    config = compressed_config(source)
    _multiply_out(source, folder)
    auto_map = {name: target for name, target in config.get("auto_map", {}).items() if Path(CODE).stem not in target}
    dropped = {"quantization_config", "auto_map"}
    kept = {key: value for key, value in config.items() if key not in dropped}
    write_json(folder / "config.json", kept | ({"auto_map": auto_map} if auto_map else {}))
    carry_along(source, folder)
    _annotate(source, folder, "dense")


def _portable(source: Path, folder: Path) -> None:
    model = open_streamed(source, torch.device("cpu"))
    for name in model.names:
        model.stored_block(name, None)  # a damaged model does not leave
    for file in _files(source):
        _copy(file, source, folder)
    make_portable(folder)
    _annotate(source, folder, "portable")


FORMATS: dict[str, Callable[[Path, Path], None]] = {"dense": _dense, "portable": _portable}


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
            _write(writer, model, {f"{name}.{inner}": tensor for inner, tensor in stored(block)})


def _write(writer: CheckpointWriter, model: StreamedModel, tensors: dict[str, Tensor]) -> None:
    """Write tensors under the names, and in the pieces, in which `save_pretrained` would."""
    for name, tensor in revert_weight_conversion(model.skeleton, tensors).items():
        writer.write(name, tensor.clone())


def _stored_type(weights: Weights, linear: str) -> torch.dtype:
    """Return the type of a factorised weight: that of its factors, or the model's own where these are quantised."""
    factor = f"{linear}.right.weight"
    return weights.dtype(factor) if factor in weights.sources else stored_dtype(weights.model.config)


def _annotate(source: Path, folder: Path, loading: Loading) -> None:
    """Write the README of the export: the source's own, with the section on loading that fits the format."""
    architecture = (compressed_config(source).get("architectures") or [""])[0]
    readme = source / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else f"# {source.resolve().name}\n"
    (folder / "README.md").write_text(with_loading(text, loading, architecture), encoding="utf-8")


def _files(source: Path) -> Iterator[Path]:
    """Yield the visible files of a model folder; most folders in it (caches, other formats) are not of the model."""
    for folder in (source, *(source / name for name in FOLDERS)):
        yield from sorted(path for path in folder.glob("[!.]*") if path.is_file())


def _copy(file: Path, source: Path, destination: Path) -> None:
    target = destination / file.relative_to(source)
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(file, target)
