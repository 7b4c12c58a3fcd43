"""A compressed model that was damaged or tampered with is refused by name: never random weights, never a traceback."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.hub.conftest import RANKS, Saved
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from lillama.errors import ModelError
from lillama.hub.export import export
from lillama.hub.portable import portable_code
from lillama.modeling.quantizer import LowRankConfig
from lillama.modeling.soundness import FORMAT_VERSION, refusal
from lillama.stream.model import open_streamed

Q = "model.layers.1.self_attn.q_proj"
STORAGE: dict[str, Any] = {"form": "pivot", "bits": 4, "group_size": 64}
ABSENT: Any = object()

SECTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "rank as text": ({"ranks": {Q: "8"}}, f"{Q}: rank '8' is not possible"),
    "rank null": ({"ranks": {Q: None}}, f"{Q}: rank None is not possible"),
    "rank a fraction": ({"ranks": {Q: 1.5}}, f"{Q}: rank 1.5 is not possible"),
    "rank a whole float": ({"ranks": {Q: 8.0}}, f"{Q}: rank 8.0 is not possible"),
    "rank true": ({"ranks": {Q: True}}, f"{Q}: rank True is not possible"),
    "rank zero": ({"ranks": {Q: 0}}, f"{Q}: rank 0 is not possible"),
    "rank negative": ({"ranks": {Q: -4}}, f"{Q}: rank -4 is not possible"),
    "rank a list": ({"ranks": {Q: [8]}}, f"{Q}: rank \\[8\\] is not possible"),
    "rank infinite": ({"ranks": {Q: float("inf")}}, f"{Q}: rank inf is not possible"),
    "rank above the shape": ({"ranks": {Q: 65}}, f"{Q}: rank 65 is not possible: the linear has 64 outputs"),
    "rank a million": ({"ranks": {Q: 10**6}}, f"{Q}: rank 1000000 is not possible"),
    "rank beyond 64 bits": ({"ranks": {Q: 2**63}}, f"{Q}: rank 9223372036854775808 is not possible"),
    "ranks a list": ({"ranks": []}, r"ranks are \[\]: a mapping"),
    "ranks null": ({"ranks": None}, "ranks are None: a mapping"),
    "ranks missing": ({"ranks": ABSENT}, "ranks are None: a mapping"),
    "ranks a number": ({"ranks": 8}, "ranks are 8: a mapping"),
    "storage a word": ({"storage": "x"}, "storage is 'x': a mapping"),
    "storage a list": ({"storage": [1]}, r"storage is \[1\]: a mapping"),
    "storage empty": ({"storage": {}}, "storage is {}: form must be one of"),
    "form unknown": ({"storage": STORAGE | {"form": "pivto"}}, "form must be one of"),
    "form a list": ({"storage": STORAGE | {"form": ["pivot"]}}, "form must be one of"),
    "bits unknown": ({"storage": STORAGE | {"bits": 7}}, "bits one of"),
    "bits as text": ({"storage": STORAGE | {"bits": "4"}}, "bits one of"),
    "bits a float": ({"storage": STORAGE | {"bits": 4.0}}, "bits one of"),
    "group zero": ({"storage": STORAGE | {"group_size": 0}}, r"storage\.group_size is 0: an even number"),
    "group negative": ({"storage": STORAGE | {"group_size": -64}}, r"storage\.group_size is -64"),
    "group odd": ({"storage": STORAGE | {"group_size": 7}}, r"storage\.group_size is 7"),
    "group as text": ({"storage": STORAGE | {"group_size": "64"}}, r"storage\.group_size is '64'"),
    "group null": ({"storage": STORAGE | {"group_size": None}}, r"storage\.group_size is None"),
    "group missing": ({"storage": {"form": "pivot", "bits": 4}}, r"storage\.group_size is None"),
    "absorbed a number": ({"storage": STORAGE, "absorbed": 5}, "absorbed is 5: a list"),
    "absorbed a word": ({"storage": STORAGE, "absorbed": Q}, f"absorbed is '{Q}': a list"),
    "absorbed numbers": ({"storage": STORAGE, "absorbed": [5]}, r"absorbed is \[5\]: a list"),
    "absorbed a stranger": (
        {"storage": STORAGE, "absorbed": ["lm_head"]},
        "absorbed names 'lm_head', which has no rank",
    ),
    "absorbed without pivots": ({"absorbed": [Q]}, "the form is not pivot"),
    "own bits a number": ({"bits": 4}, "bits are 4: a mapping"),
    "own bits unknown": ({"storage": STORAGE, "bits": {Q: 7}}, f"{Q}: bits 7 are none of"),
    "own bits null": ({"storage": STORAGE, "bits": {Q: None}}, f"{Q}: bits None are none of"),
    "own bits without a group": ({"bits": {Q: 4}}, r"storage\.group_size is missing"),
    "shapes a list": ({"shapes": [Q]}, "shapes are .*: a mapping of names"),
    "shape a number": ({"shapes": {Q: 8}}, "shape 8 is not possible: rows and columns"),
    "shape of three": ({"shapes": {Q: [8, 8, 8]}}, r"shape \[8, 8, 8\] is not possible"),
    "shape of nothing": ({"shapes": {Q: [0, 32]}}, r"shape \[0, 32\] is not possible"),
    "shape of fractions": ({"shapes": {Q: [8.0, 32]}}, r"shape \[8.0, 32\] is not possible"),
    "shape of millions": ({"shapes": {Q: [10**9, 32]}}, r"shape \[1000000000, 32\] is not possible: the linear has"),
    "version as text": ({"format_version": "2"}, "format_version is '2': a whole number"),
    "version a fraction": ({"format_version": 1.5}, r"format_version is 1\.5: a whole number"),
    "version zero": ({"format_version": 0}, "format_version is 0: a whole number"),
    "version true": ({"format_version": True}, "format_version is True: a whole number"),
    "version later": ({"format_version": FORMAT_VERSION + 1}, "newer lillama: upgrade"),
    "version of 91 digits": ({"format_version": 10**90}, r"format_version 1000*\.\.\. was written by a newer"),
    "a method for a key": ({"to_dict": "x"}, "to_dict is no key of a section of lillama"),
}


def tampered(source: Path, folder: Path, changes: dict[str, Any]) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    section = config["quantization_config"] | changes
    config["quantization_config"] = {key: value for key, value in section.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rewritten(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 400, text
    return text


@pytest.mark.parametrize("case", SECTIONS)
def test_a_section_that_cannot_be_is_refused_by_all_its_readers(case: str, saved: Saved, tmp_path: Path) -> None:
    changes, message = SECTIONS[case]
    folder = tampered(saved.folder, tmp_path / "model", changes)
    with pytest.raises(ValueError, match=message) as raised:
        AutoModelForCausalLM.from_pretrained(folder)
    one_line(raised.value)
    for form in ("dense", "portable"):
        with pytest.raises(ModelError, match=message) as raised:
            export(folder, tmp_path / "out", form)
        one_line(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    if case != "a method for a key":  # the streamed reader makes no object of the section
        with pytest.raises(ModelError, match=message) as raised:
            open_streamed(folder, torch.device("cpu"))
        one_line(raised.value)


@pytest.mark.parametrize("section", ["x", 5, [1], True, ["lillama"]])
def test_a_section_that_is_no_mapping_is_refused(section: Any, saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved.folder, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": section}))
    with pytest.raises(ModelError, match=r"quantization_config|transformers cannot use this configuration"):
        open_streamed(tmp_path / "model", torch.device("cpu"))
    with pytest.raises(ModelError, match="not a model compressed by lillama"):
        export(tmp_path / "model", tmp_path / "out", "dense")
    assert "a mapping is expected" in (refusal(section) or "")


@pytest.mark.parametrize("text", ["[]", "5", "null", '"x"', "[" * 100_000])
def test_a_configuration_that_is_no_mapping_is_no_compressed_model(text: str, saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved.folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json: .*; write or fetch the model again"):
        export(tmp_path / "model", tmp_path / "out", "portable")


def test_sound_sections_are_not_refused(each: Saved) -> None:
    section = json.loads((each.folder / "config.json").read_text())["quantization_config"]
    assert refusal(section) is None
    assert LowRankConfig.from_dict(section).to_dict() == section
    absent = {"format_version": None, "storage": None, "absorbed": None}
    assert refusal({"ranks": {Q: 8}} | absent) is None
    assert refusal({"ranks": {Q: 8}, "storage": {"form": "plain", "bits": 4, "group_size": 2**40}}) is None


def test_a_group_wider_than_the_row_costs_nothing(int4: Saved, tmp_path: Path) -> None:
    storage = {"storage": STORAGE | {"group_size": 2**40}}
    narrow = {name: rank for name, rank in RANKS.items() if name.endswith("q_proj")}
    small = rewritten(int4.folder, tmp_path / "one", lambda tensors: None)
    layer = AutoModelForCausalLM.from_pretrained(small).get_submodule(next(iter(narrow))).right
    before = layer.weight
    layer.group_size = storage["storage"]["group_size"]
    assert torch.equal(layer.weight, before)


def of_factors(folder: Path) -> list[str]:
    """Names of the tensors of the factorised linears, and of one dense linear in their block."""
    names = load_file(folder / "model.safetensors")
    ranks = json.loads((folder / "config.json").read_text())["quantization_config"]["ranks"]
    return [name for name in names if name.startswith((*(f"{rank}." for rank in ranks), "model.layers.0.self_attn.q"))]


def test_a_missing_tensor_is_never_made_up(each: Saved, tmp_path: Path) -> None:
    for number, name in enumerate(of_factors(each.folder)):
        folder = rewritten(each.folder, tmp_path / f"{number}", lambda tensors, name=name: tensors.pop(name))
        for loader in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
            with pytest.raises(ValueError, match="this tensor is missing from the weights") as raised:
                loader.from_pretrained(folder)
            assert name.removeprefix("model.") in one_line(raised.value)
        if load_file(each.folder / "model.safetensors")[name].numel():  # the mark of an absent weight is for others
            for form in ("dense", "portable"):
                with pytest.raises(ModelError, match=rf"{re.escape(name)} is missing"):
                    export(folder, tmp_path / "out", form)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_in_its_own_class_every_weight_is_asked_for(name: str, saved: Saved, tmp_path: Path) -> None:
    folder = rewritten(saved.folder, tmp_path / "model", lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: this tensor is missing"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_tensor_of_another_shape_is_never_made_up(each: Saved, tmp_path: Path) -> None:
    for number, name in enumerate(of_factors(each.folder)):
        folder = rewritten(
            each.folder, tmp_path / f"{number}", lambda tensors, name=name: tensors.update({name: torch.zeros(2, 3)})
        )
        with pytest.raises((RuntimeError, ValueError), match=r"mismatched|is of type"):
            AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises(ValueError, match=r"this tensor is missing|is of type"):
            AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
        if load_file(each.folder / "model.safetensors")[name].numel():
            for form in ("dense", "portable"):
                with pytest.raises(ModelError, match=re.escape(name)):
                    export(folder, tmp_path / "out", form)


def swapped(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[0] = tensor[1]
    return tensor


D = "model.layers.0.mlp.down_proj"
INTEGERS: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "order beyond the rows": ("pivot", "order", lambda t: t + 10**6, "is no permutation of the 64 rows"),
    "order negative": ("pivot", "order", lambda t: t - 1, "is no permutation of the 64 rows"),
    "order with a row twice": ("pivot", "order", swapped, "is no permutation of the 64 rows"),
    "order of 64 bits": ("pivot", "order", lambda t: t.long(), "int32"),
    "order of fractions": ("pivot", "order", lambda t: t.float(), "int32"),
    "order of a model at 4 bits": ("int4", "order", lambda t: t * 0, "is no permutation of the 64 rows"),
    "scale NaN": ("int8", "left.scale", lambda t: t * 0 + 0x7FC0, "no scales"),
    "scale infinite": ("int4", "right.scale", lambda t: t * 0 - 0x80, "no scales"),
    "scale zero": ("int8", "left.scale", lambda t: t * 0, "no scales"),
    "scale negative": ("int8", "left.scale", lambda t: -t, "no scales"),
    "scale of 32 bits": ("int4", "right.scale", lambda t: t.int(), "int16"),
    "scale in floating point": ("int8", "right.scale", lambda t: t.view(torch.bfloat16), "int16|no scales"),
    "numbers with another sign": ("int8", "left.qweight", lambda t: t.view(torch.uint8), "int8"),
    "nibbles with a sign": ("int4", "left.qweight", lambda t: t.view(torch.int8), "uint8"),
    "numbers in floating point": ("int8", "left.qweight", lambda t: t.float(), "int8"),
    "a factor of integers": ("pivot", "left.weight", lambda t: t.to(torch.int8), r"int8|I8"),
}


CAST = {"order of fractions", "numbers in floating point"}  # by transformers, which keeps their values


@pytest.mark.parametrize("case", INTEGERS)
def test_integers_that_cannot_be_are_refused_by_all_readers(
    case: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    form, leaf, change, message = INTEGERS[case]
    source, name = request.getfixturevalue(form).folder, f"{D}.{leaf}"
    folder = rewritten(source, tmp_path / "model", lambda tensors: tensors.update({name: change(tensors[name])}))
    if case not in CAST:
        with pytest.raises(ValueError, match=rf"{re.escape(name)} .*({message})") as raised:
            AutoModelForCausalLM.from_pretrained(folder)
        one_line(raised.value)
    for form in ("dense", "portable"):
        with pytest.raises(ModelError, match=rf"{re.escape(name)} .*({message})") as raised:
            export(folder, tmp_path / "out", form)
        one_line(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_factors_that_are_no_numbers_are_refused(value: float, saved: Saved, tmp_path: Path) -> None:
    name = f"{D}.left.weight"
    folder = rewritten(saved.folder, tmp_path / "model", lambda tensors: tensors[name].view(-1)[3].fill_(value))
    with pytest.raises(ModelError, match=rf"{re.escape(name)} holds NaN or infinite values"):
        export(folder, tmp_path / "out", "dense")


def test_the_portable_code_refuses_the_same(int4: Saved) -> None:
    module: dict[str, Any] = {"__name__": "portable"}
    exec(compile(portable_code("LlamaConfig"), "modeling_lillama.py", "exec"), module)
    with pytest.raises(ValueError, match=f"{Q}: rank '8' is not possible"):
        module["LowRankConfig"](ranks={Q: "8"})
    model = AutoModelForCausalLM.from_pretrained(int4.folder)
    assert module["fault"](model) is None  # of classes that it does not know
