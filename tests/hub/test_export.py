import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.hub.conftest import RANKS, Saved
from transformers import AutoModelForCausalLM

from lillama.errors import ModelError, OutputError
from lillama.hub import export as module
from lillama.hub.export import export
from lillama.lowrank.install import low_rank_linears

BESIDE = {
    "tokenizer.json": "{}",
    "tokenizer.model": "pieces",
    "vocab.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "preprocessor_config.json": "{}",
    "LICENSE": "terms",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}
LOAD = """
import pathlib, sys, torch
sys.modules["lillama"] = None
from transformers import AutoModelForCausalLM
folder, logits = map(pathlib.Path, sys.argv[1:3])
model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(report.values()) and type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
with torch.no_grad():
    torch.testing.assert_close(model(torch.arange(3, 23)[None]).logits, torch.load(logits), rtol=0, atol=2e-5)
"""


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def complete(saved: Saved, tmp_path: Path) -> Path:
    """A compressed model with all the files that a real one has."""
    shutil.copytree(saved.folder, tmp_path / "complete")
    write(tmp_path / "complete", BESIDE | {"README.md": "---\nlibrary_name: transformers\n---\n\n# Card\n"})
    return tmp_path / "complete"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_dense_loads_without_lillama(complete: Path, saved: Saved, tmp_path: Path, fresh: Callable[..., None]) -> None:
    export(complete, tmp_path / "dense", "dense")
    torch.save(saved.logits, tmp_path / "logits.pt")
    fresh(LOAD, tmp_path / "dense", tmp_path / "logits.pt")
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md"} | BESIDE.keys()
    assert names(tmp_path / "dense") == expected
    readme = (tmp_path / "dense" / "README.md").read_text()
    assert readme.startswith("---\nlibrary_name") and "This is the dense export" in readme


def test_dense_is_the_product_in_the_stored_type(each: Saved, tmp_path: Path) -> None:
    export(each.folder, tmp_path / "dense", "dense")
    before, after = load_file(each.folder / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    layers = dict(low_rank_linears(AutoModelForCausalLM.from_pretrained(each.folder)))
    gone = {name for name in before if name.rsplit(".", 2)[0] in layers or name.endswith(".order")}
    assert after.keys() == before.keys() - gone
    for name, tensor in after.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            assert torch.equal(tensor, before[name])
        else:
            product = layer.double().product().double()
            torch.testing.assert_close(tensor.double(), product, rtol=2**-8, atol=1e-5)
            assert tensor.dtype == before[name].dtype == each.logits.dtype


def test_portable_keeps_everything_and_can_be_made_dense(complete: Path, tmp_path: Path) -> None:
    export(complete, tmp_path / "portable", "portable")
    assert names(tmp_path / "portable") == names(complete) | {"modeling_lillama.py"}
    assert (tmp_path / "portable" / "model.safetensors").read_bytes() == (complete / "model.safetensors").read_bytes()
    assert "trust_remote_code=True" in (tmp_path / "portable" / "README.md").read_text()
    export(tmp_path / "portable", tmp_path / "dense", "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"auto_map", "quantization_config"} & config.keys()
    assert not list((tmp_path / "dense").glob("*.py"))
    readme = (tmp_path / "dense" / "README.md").read_text()
    assert readme.count("## How to load it") == 1 and "trust_remote_code" not in readme


@pytest.mark.parametrize("form", ["dense", "portable"])
def test_refusals_leave_nothing_behind(form: str, complete: Path, tmp_path: Path) -> None:
    before = names(tmp_path)
    with pytest.raises(OutputError, match="exists already"):
        export(complete, complete, form)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelError, match=r"no config\.json"):
        export(tmp_path / "nowhere", tmp_path / "out", form)  # pyright: ignore[reportArgumentType]
    config = json.loads((complete / "config.json").read_text())
    for text, message in [
        ("{", "not valid JSON"),
        (json.dumps(config | {"quantization_config": None}), "not a model compressed by lillama"),
        (json.dumps(config | {"quantization_config": {"quant_method": "awq"}}), "quant_method is awq"),
        (json.dumps(config | {"quantization_config": {"quant_method": "lillama", "format_version": 9}}), "upgrade"),
    ]:
        (complete / "config.json").write_text(text)
        with pytest.raises(ModelError, match=message):
            export(complete, tmp_path / "out", form)  # pyright: ignore[reportArgumentType]
    assert names(tmp_path) == before


def test_damaged_weights_leave_nothing_behind(complete: Path, tmp_path: Path) -> None:
    tensors = load_file(complete / "model.safetensors")
    gone = f"{next(iter(RANKS))}.right.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, complete / "model.safetensors")
    with pytest.raises(ModelError, match=gone):
        export(complete, tmp_path / "dense", "dense")
    assert {path.name for path in tmp_path.iterdir()} == {"complete"}


def test_an_unknown_format_is_refused(complete: Path, tmp_path: Path) -> None:
    unchecked = inspect.unwrap(export)  # in tests a type checker stands before the function
    with pytest.raises(OutputError, match="'gguf' is not an export format; choose one of dense, portable"):
        unchecked(complete, tmp_path / "out", "gguf")


@pytest.mark.parametrize("form", ["dense", "portable"])
def test_what_comes_while_the_work_goes_on_stays(
    form: str, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotated = module._annotate

    def late(source: Path, folder: Path, loading: Any) -> None:
        annotated(source, folder, loading)
        write(tmp_path / "out", {"mine": "mine"})

    monkeypatch.setattr(module, "_annotate", late)
    with pytest.raises(OutputError, match="out: exists already"):
        export(complete, tmp_path / "out", form)  # pyright: ignore[reportArgumentType]
    assert names(tmp_path / "out") == {"mine"} and {path.name for path in tmp_path.iterdir()} == {"complete", "out"}


def test_the_type_is_that_of_the_files_and_not_of_the_configuration(int8: Saved, tmp_path: Path) -> None:
    shutil.copytree(int8.folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    export(tmp_path / "model", tmp_path / "dense", "dense")
    export(int8.folder, tmp_path / "sound", "dense")
    found, sound = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "sound"))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(tensor, sound[name]) for name, tensor in found.items())
