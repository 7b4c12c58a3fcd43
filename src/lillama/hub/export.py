"""Compressed models for those who have no lillama: multiplied out to dense weights, or with the code beside them."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lillama.errors import ModelError, OutputError
from lillama.files import atomic_folder, write_json
from lillama.hub.card import Loading, with_loading
from lillama.hub.portable import CODE, compressed_config, make_portable
from lillama.lowrank.linear import shaped_like
from lillama.model.checkpoint import CheckpointReader, CheckpointWriter

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".ot", ".pkl"}
OWN = {"config.json", "README.md"}
FOLDERS = ("additional_chat_templates",)
TOMBSTONE = ".weight"
FACTORS = tuple(f".{side}.{leaf}" for side in ("left", "right") for leaf in ("weight", "qweight", "scale"))


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
    _multiply_out(CheckpointReader(source), folder, config["quantization_config"].get("storage"))
    auto_map = {name: target for name, target in config.get("auto_map", {}).items() if Path(CODE).stem not in target}
    dropped = {"quantization_config", "auto_map"}
    kept = {key: value for key, value in config.items() if key not in dropped}
    write_json(folder / "config.json", kept | ({"auto_map": auto_map} if auto_map else {}))
    carry_along(source, folder)
    _annotate(source, folder, "dense")


def _portable(source: Path, folder: Path) -> None:
    for file in _files(source):
        _copy(file, source, folder)
    make_portable(folder)
    _annotate(source, folder, "portable")


FORMATS: dict[str, Callable[[Path, Path], None]] = {"dense": _dense, "portable": _portable}


def _multiply_out(reader: CheckpointReader, folder: Path, storage: Mapping[str, Any] | None) -> None:
    """Copy all tensors, with the product of its factors in the place of each empty `weight`."""
    layers = {
        name.removesuffix(TOMBSTONE) for name in reader.names if name.endswith(TOMBSTONE) and reader.shape(name) == (0,)
    }
    if not layers:
        raise ModelError(f"{reader.folder}: config.json names ranks, but the weights hold no factors: damaged")
    parts = {layer + part for layer in layers for part in (*FACTORS, ".order")}
    with CheckpointWriter(folder) as writer:
        for name in reader.names:
            layer = name.removesuffix(TOMBSTONE)
            if layer in layers:
                writer.write(name, _dense_weight(layer, reader, storage))
            elif name not in parts:
                writer.write(name, reader.read(name))


def _dense_weight(name: str, reader: CheckpointReader, storage: Mapping[str, Any] | None) -> Tensor:
    """Return the weight of a factorised layer, whose widths and rank are read off its stored tensors."""
    form, bits = (storage["form"], storage["bits"]) if storage else ("plain", None)
    leaf = "qweight" if bits else "weight"
    rank, columns = reader.shape(f"{name}.right.{leaf}")
    left = f"{name}.left.{leaf}"
    others = reader.shape(left)[0] if left in reader.names else 0
    out_features = others + rank if form == "pivot" else others
    in_features = 2 * columns if bits == 4 else columns
    dense = nn.Linear(in_features, out_features, False, "meta", reader.dtype(name + TOMBSTONE))
    layer = shaped_like(dense, rank, storage, f"{name}.order" in reader.names)
    state = {
        part: reader.read(f"{name}.{part}", dtype=None if wanted.is_floating_point() else wanted.dtype)
        for part, wanted in layer.state_dict().items()
    }
    layer.load_state_dict(state, assign=True)
    return layer.dense().weight


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
