import json
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lillama.errors import ModelError
from lillama.model import checkpoint
from lillama.model.checkpoint import INDEX, SINGLE, CheckpointReader, CheckpointWriter


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    types = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return {f"layers.{i}.weight": torch.randn(20, 10 + i).to(types[i % 4]) for i in range(8)} | {
        "empty": torch.empty(0)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a model's: the configuration is there, weights are not."""
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def write(folder: Path, tensors: dict[str, Tensor], shard_bytes: int) -> None:
    with CheckpointWriter(folder, shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    with pytest.raises(ModelError) as refusal:
        yield
    text = str(refusal.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def edit_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(("shard_bytes", "shards"), [(10**9, 1), (3000, 4), (1, 9)])
def test_what_is_written_is_read_back(shard_bytes: int, shards: int, folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, tensors, shard_bytes)
    files = sorted(folder.glob("*.safetensors"))
    reader = CheckpointReader(folder)
    assert len(files) == shards and (folder / INDEX).exists() == (shards > 1) and not list(folder.glob("*.tmp"))
    assert set(reader.names) == set(tensors)
    for name, tensor in tensors.items():
        assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.read(name), tensor)
        assert reader.read(name, "cpu", torch.float64).dtype == torch.float64
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert all(size <= shard_bytes or shards == 9 for size in sizes)


def test_the_index_is_what_other_loaders_expect(folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, tensors, 3000)
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert set(index["weight_map"].values()) == {f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(folder / file)[name], tensors[name])


def test_a_writer_that_is_interrupted_leaves_nothing_that_looks_finished(
    folder: Path, tensors: dict[str, Tensor]
) -> None:
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(folder, 3000) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        raise KeyboardInterrupt
    assert not list(folder.glob("*.safetensors")) and not (folder / INDEX).exists()


def test_only_headers_are_read_until_a_tensor_is_asked_for(
    folder: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, tensors, 3000)
    read: list[str] = []

    class Spy:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.real = real(*args, **kwargs)

        def __enter__(self) -> "Spy":
            return self

        def __exit__(self, *error: object) -> None:
            self.real.__exit__(*error)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self.real.get_tensor(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

    real = checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", Spy)
    monkeypatch.setattr(checkpoint, "_open", lambda file, remedy: Spy(file, framework="pt"))
    reader = CheckpointReader(folder)
    assert all(reader.shape(name) for name in tensors) and not read
    reader.read("layers.3.weight")
    assert read == ["layers.3.weight"]


def test_a_tensor_read_is_independent_of_its_file(folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, tensors, 10**9)
    found = CheckpointReader(folder).read("layers.0.weight")
    (folder / SINGLE).write_bytes(b"")
    assert torch.equal(found, tensors["layers.0.weight"])
    found.zero_()


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    with refused(str(folder), "model.safetensors", "weights is needed"):
        _ = CheckpointReader(folder).files


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt"])
def test_pickled_weights_are_refused_with_the_way_out(name: str, folder: Path) -> None:
    (folder / name).write_bytes(pickle.dumps({"a": 1}))
    with refused(name, "never loaded", "convert them to safetensors"):
        _ = CheckpointReader(folder).files


@pytest.mark.parametrize("target", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", ".", 7])
def test_an_index_that_points_outside_the_folder_is_refused(
    target: Any, folder: Path, tensors: dict[str, Tensor]
) -> None:
    write(folder, tensors, 3000)
    edit_index(folder, **{"layers.0.weight": target})
    with refused(INDEX, "layers.0.weight", "points outside the folder", "not read"):
        _ = CheckpointReader(folder).entries


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "a JSON list"),
        ("{}", "not a readable index"),
        ('{"weight_map": 3}', "not a readable index"),
        ('{"weight_map": ["a"]}', "not a readable index"),
        ('{"weight_map": {}}', "not a readable index"),
    ],
)
def test_an_index_that_is_none_is_refused(content: str, what: str, folder: Path) -> None:
    (folder / INDEX).write_text(content)
    with refused(INDEX, what, "fetch the model again"):
        _ = CheckpointReader(folder).entries


def other(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in tensors.items()}


def test_the_single_file_is_read_where_shards_lie_beside_it(folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, other(tensors), 3000)
    save_file(tensors, folder / SINGLE)
    reader = CheckpointReader(folder)
    assert reader.files == (folder / SINGLE,)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("content", ["[" * 1000, "{}", '{"weight_map": {"a": "../b.safetensors"}}'])
def test_an_index_that_is_not_read_is_not_looked_at(content: str, folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, tensors, 10**9)
    (folder / INDEX).write_text(content)
    assert set(CheckpointReader(folder).names) == set(tensors)


def test_weights_that_the_configuration_names_come_first(folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, other(tensors), 10**9)
    save_file(tensors, folder / "consolidated.safetensors")
    (folder / "config.json").write_text('{"transformers_weights": "consolidated.safetensors"}')
    reader = CheckpointReader(folder)
    assert reader.complete and reader.files == (folder / "consolidated.safetensors",)
    assert torch.equal(reader.read("layers.0.weight"), tensors["layers.0.weight"])


@pytest.mark.parametrize("name", ["../a.safetensors", "pytorch_model.bin", "", 3, [], {}, "a\0.safetensors"])
def test_a_configuration_that_names_weights_elsewhere_is_refused(name: Any, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"transformers_weights": name}))
    with refused("config.json: transformers_weights is", "of this folder"):
        _ = CheckpointReader(folder).files


def test_a_folder_is_complete_with_the_last_of_its_files(folder: Path, tensors: dict[str, Tensor]) -> None:
    assert not CheckpointReader(folder).complete
    write(folder, tensors, 3000)
    assert CheckpointReader(folder).complete
    (folder / "model-00002-of-00004.safetensors").unlink()
    assert not CheckpointReader(folder).complete


def test_a_missing_shard_is_refused(folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, tensors, 3000)
    (folder / "model-00002-of-00004.safetensors").unlink()
    with refused("model-00002-of-00004.safetensors", "missing", "fetch the model again"):
        _ = CheckpointReader(folder).entries


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_and_a_folder_are_no_shards(make: Any, folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, tensors, 3000)
    (folder / "model-00002-of-00004.safetensors").unlink()
    make(folder / "model-00002-of-00004.safetensors")
    with refused("model-00002-of-00004.safetensors", "missing", "fetch the model again"):
        _ = CheckpointReader(folder).entries


@pytest.mark.parametrize("length", [0, 5, 300, -1])
def test_a_truncated_shard_is_refused_before_any_tensor_is_read(
    length: int, folder: Path, tensors: dict[str, Tensor]
) -> None:
    write(folder, tensors, 3000)
    shard = folder / "model-00003-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:length])
    with refused(shard.name, "damaged or truncated", "fetch the model again"):
        _ = CheckpointReader(folder).entries


def test_a_tensor_that_its_shard_does_not_hold_is_refused(folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, tensors, 3000)
    edit_index(folder, **{"layers.9.weight": "model-00001-of-00004.safetensors"})
    with refused("layers.9.weight is not in model-00001-of-00004.safetensors"):
        _ = CheckpointReader(folder).entries


def test_the_index_decides_between_two_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, tensors, 3000)
    last = folder / "model-00004-of-00004.safetensors"
    save_file(load_file(last) | {"layers.0.weight": torch.zeros(20, 10)}, last)
    assert torch.equal(CheckpointReader(folder).read("layers.0.weight"), tensors["layers.0.weight"])


def test_a_tensor_that_is_not_there_is_refused(folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, tensors, 10**9)
    with refused("layers.1.wieght is missing", "did you mean 'layers.1.weight'"):
        CheckpointReader(folder).read("layers.1.wieght")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_a_type_that_is_not_plain_floating_point_is_refused(dtype: torch.dtype, folder: Path) -> None:
    save_file({"a": torch.ones(3).to(dtype)}, folder / SINGLE)
    with refused("tensor a is stored as", "give the unquantised model"):
        CheckpointReader(folder).read("a")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_integers_are_read_as_themselves_when_they_are_asked_for(dtype: torch.dtype, folder: Path) -> None:
    save_file({"a": torch.arange(3).to(dtype), "b": torch.ones(2)}, folder / SINGLE)
    reader = CheckpointReader(folder)
    assert torch.equal(reader.read("a", dtype=dtype), torch.arange(3).to(dtype))
    other = torch.int8 if dtype != torch.int8 else torch.int32
    for name in ("a", "b"):
        with refused(f"tensor {name} is stored as", f"config.json wants {other}"):
            reader.read(name, dtype=other)
    with refused("tensor a is stored as", "give the unquantised model"):
        reader.read("a", dtype=torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 20, -1])
def test_values_that_are_no_numbers_are_refused(
    bad: float, place: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "CHECKED_AT_ONCE", 7)
    weight = torch.ones(5, 6)
    weight.view(-1)[place] = bad
    save_file({"a": weight, "b": torch.ones(2)}, folder / SINGLE)
    with refused("model.safetensors: tensor a holds NaN or infinite values"):
        CheckpointReader(folder).read("a")
    assert CheckpointReader(folder).read("b").sum() == 2


def test_links_as_the_hub_cache_makes_them_are_followed(
    folder: Path, tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    blobs = tmp_path_factory.mktemp("blobs")
    write(folder, tensors, 3000)
    plain = CheckpointReader(folder).fingerprint()
    for i, file in enumerate([*folder.glob("*.safetensors"), folder / INDEX]):
        file.rename(blobs / f"blob{i}")
        file.symlink_to(blobs / f"blob{i}")
    reader = CheckpointReader(folder)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
    assert reader.fingerprint() == plain


def test_every_byte_counts_in_the_fingerprint(folder: Path, tensors: dict[str, Tensor]) -> None:
    write(folder, tensors, 3000)
    seen = {CheckpointReader(folder).fingerprint(), CheckpointReader(folder).fingerprint()}
    assert len(seen) == 1
    shard = folder / "model-00002-of-00004.safetensors"
    content = bytearray(shard.read_bytes())
    for place in (len(content) - 1, len(content) - 777):
        content[place] ^= 1
        shard.write_bytes(content)
        seen.add(CheckpointReader(folder).fingerprint())
    (folder / "config.json").write_text('{"rms_norm_eps": 1e-3}')
    seen.add(CheckpointReader(folder).fingerprint())
    assert len(seen) == 4


def test_the_same_tensors_in_other_shards_are_another_checkpoint(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    prints = set[str]()
    for shard_bytes in (10**9, 3000):
        folder = tmp_path / str(shard_bytes)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        write(folder, tensors, shard_bytes)
        prints.add(CheckpointReader(folder).fingerprint())
    assert len(prints) == 2


def test_the_machines_trouble_is_not_blamed_on_the_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def no_memory(*args: Any, **kwargs: Any) -> None:
        raise checkpoint.SafetensorError("I/O error: Cannot allocate memory (os error 12)")

    save_file({"a": torch.ones(3)}, folder / SINGLE)
    monkeypatch.setattr(checkpoint, "safe_open", no_memory)
    with pytest.raises(checkpoint.SafetensorError, match=re.escape("(os error 12)")):
        CheckpointReader(folder).read("a")
