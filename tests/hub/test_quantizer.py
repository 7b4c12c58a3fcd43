import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.hub.conftest import FULL, RANKS, Saved, X, compress
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from lillama.lowrank.install import low_rank_linears
from lillama.modeling.linear import LowRankLinear
from lillama.modeling.quantizer import LowRankConfig
from lillama.modeling.soundness import FORMAT_VERSION


def load(folder: Path, **options: object) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def test_round_trips_are_exact(each: Saved, tmp_path: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(each.folder, output_loading_info=True)
    assert type(model) is LlamaForCausalLM and not any(report.values())
    assert {name: layer.rank for name, layer in low_rank_linears(model)}.items() >= RANKS.items()
    torch.testing.assert_close(model(X).logits, each.logits)
    model.save_pretrained(tmp_path / "again", max_shard_size="50kB")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(load(tmp_path / "again")(X).logits, each.logits)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (each.folder, tmp_path / "again"))
    assert before["quantization_config"] == after["quantization_config"]


def test_the_section_of_the_plain_form_is_of_version_1(saved: Saved) -> None:
    assert json.loads((saved.folder / "config.json").read_text())["quantization_config"] == {
        "quant_method": "lillama",
        "ranks": RANKS,
        "format_version": 1,
        "lillama_version": "0.1.0",
        "recipe_hash": "cafe",
    }


def test_the_section_of_other_forms_is_of_a_later_version(int4: Saved) -> None:
    section = json.loads((int4.folder / "config.json").read_text())["quantization_config"]
    assert section["format_version"] == 4 and "absorbed" not in section  # where scales may be negative
    versions = {
        bits: LowRankConfig({}, storage={"form": "pivot", "bits": bits, "group_size": 64}) for bits in (None, 8, 3)
    }
    assert {bits: config.format_version for bits, config in versions.items()} == {None: 2, 8: 2, 3: 4}
    assert section["storage"] == {"form": "pivot", "bits": 4, "group_size": 64}


LAYER = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("form", "layer", "tensors"),
    [
        ("biased", LAYER, {"left.weight": (64, 12), "right.weight": (12, 160), "bias": (64,), "weight": (0,)}),
        ("pivot", LAYER, {"left.weight": (52, 12), "right.weight": (12, 160), "order": (64,), "weight": (0,)}),
        ("pivot", *FULL, {"right.weight": (32, 64), "weight": (0,)}),
        (
            "int8",
            LAYER,
            {
                "left.qweight": (64, 12),
                "left.scale": (64, 1),
                "right.qweight": (12, 160),
                "right.scale": (12, 1),
                "bias": (64,),
                "weight": (0,),
            },
        ),
        (
            "int4",
            LAYER,
            {
                "left.qweight": (52, 6),
                "left.scale": (52, 1),
                "right.qweight": (12, 80),
                "right.scale": (12, 3),
                "order": (64,),
                "bias": (64,),
                "weight": (0,),
            },
        ),
    ],
)
def test_names_and_shapes_on_disk_are_public_for_ever(
    form: str, layer: str, tensors: dict[str, tuple[int, ...]], request: pytest.FixtureRequest
) -> None:
    stored = load_file(request.getfixturevalue(form).folder / "model.safetensors")
    found = {name: tensor for name, tensor in stored.items() if name.startswith(f"{layer}.")}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        f"{layer}.{name}": shape for name, shape in tensors.items()
    }
    types = {"order": torch.int32, "scale": torch.int16, "qweight": torch.uint8 if form == "int4" else torch.int8}
    for name, tensor in found.items():
        leaf = name.rpartition(".")[2]
        assert tensor.dtype == types[leaf] if leaf in types else tensor.is_floating_point()


@torch.no_grad()
def test_bare_base_model_loads_and_saves(each: Saved, tmp_path: Path) -> None:
    base = AutoModel.from_pretrained(each.folder)
    torch.testing.assert_close(base(X).last_hidden_state, each.hidden)
    base.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path)(X).last_hidden_state, each.hidden)


def test_another_head_loads(each: Saved) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(each.folder, num_labels=3)
    assert dict(low_rank_linears(model)).keys() >= RANKS.keys()
    torch.testing.assert_close(model.model(X).last_hidden_state, each.hidden)


@torch.no_grad()
def test_a_part_of_the_model_loads(tmp_path: Path) -> None:
    ranks = {"encoder.block.0.layer.0.SelfAttention.q": 4, "decoder.block.0.layer.0.SelfAttention.q": 4}
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, pad_token_id=0)
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config).eval()
    compress(model, ranks)
    model.save_pretrained(tmp_path)
    encoder = T5EncoderModel.from_pretrained(tmp_path)
    assert [name for name, _ in low_rank_linears(encoder)] == list(ranks)[:1]
    torch.testing.assert_close(encoder(X).last_hidden_state, model.encoder(X).last_hidden_state)


@torch.no_grad()
def test_types_and_device_map(each: Saved) -> None:
    stored = load_file(each.folder / "model.safetensors")
    integers = {name for name, tensor in stored.items() if not tensor.is_floating_point()}
    for dtype in (torch.bfloat16, torch.float16):
        model = load(each.folder, device_map="auto", dtype=dtype)
        state = model.state_dict()
        assert {tensor.dtype for name, tensor in state.items() if name not in integers} == {dtype}
        assert all(torch.equal(state[name], stored[name]) for name in integers)
        torch.testing.assert_close(model(X).logits.float(), each.logits.float(), rtol=0, atol=0.25)
    cast, loaded = load(each.folder).to(torch.bfloat16).state_dict(), load(each.folder, dtype="bfloat16").state_dict()
    assert cast.keys() == loaded.keys() and all(torch.equal(cast[name], loaded[name]) for name in cast)
    model = load(each.folder).half().float()
    assert model.dtype == torch.float32 and all(
        torch.equal(model.state_dict()[name], stored[name]) for name in integers
    )


@torch.no_grad()
def test_generate(each: Saved) -> None:
    chosen = load(each.folder).generate(X, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert chosen.shape == (1, X.shape[1] + 4)
    assert chosen[0, X.shape[1]] == each.logits[0, -1].argmax()


@pytest.mark.parametrize("form", ["saved", "int4"])
@torch.no_grad()
def test_compile(form: str, request: pytest.FixtureRequest) -> None:
    saved: Saved = request.getfixturevalue(form)
    compiled = torch.compile(load(saved.folder), backend="aot_eager", fullgraph=True)
    tolerance = 1e-5 if saved.logits.dtype == torch.float32 else 0.1
    torch.testing.assert_close(compiled(X).logits, saved.logits, rtol=0, atol=tolerance)


@torch.no_grad()
def test_dequantize_gives_an_ordinary_model(each: Saved, tmp_path: Path) -> None:
    dense = load(each.folder).dequantize()
    assert not list(low_rank_linears(dense))
    tolerance = 2e-5 if each.logits.dtype == torch.float32 else 0.2
    torch.testing.assert_close(dense(X).logits, each.logits, rtol=0, atol=tolerance)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    torch.testing.assert_close(load(tmp_path)(X).logits, dense(X).logits)


def test_trainer_trains_the_factors(saved: Saved, tmp_path: Path) -> None:
    model = load(saved.folder)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    rows = [{"input_ids": X[0], "labels": X[0]}] * 4
    Trainer(model, arguments, train_dataset=rows).train()  # pyright: ignore
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {f"{name}.{side}.weight" for name in RANKS for side in ("left", "right")} <= moved


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own business
@pytest.mark.parametrize("form", ["saved", "pivot"])
@torch.no_grad()
def test_peft_sees_both_factors(form: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    saved: Saved = request.getfixturevalue(form)
    model = peft.get_peft_model(load(saved.folder), peft.LoraConfig(target_modules="all-linear", r=2))
    adapted = {name.removeprefix("base_model.model.") for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert {f"{name}.{side}.lora_A" for name in RANKS for side in ("left", "right")} <= adapted
    torch.testing.assert_close(model(X).logits, saved.logits)  # an untrained adapter adds nothing
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    logits = model(X).logits
    assert not torch.allclose(logits, saved.logits)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(saved.folder), tmp_path / "adapter")
    torch.testing.assert_close(again(X).logits, logits)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(X).logits, logits, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load(tmp_path / "merged")(X).logits, merged(X).logits)


def test_a_newer_format_is_refused(saved: Saved, tmp_path: Path) -> None:
    config = json.loads((saved.folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = FORMAT_VERSION + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="newer lillama: upgrade"):
        load(tmp_path)


@pytest.mark.parametrize("storage", [{"form": "pivto", "bits": None}, {"form": "plain", "bits": 7}])
def test_a_storage_that_nobody_knows_is_refused(storage: dict[str, object], saved: Saved, tmp_path: Path) -> None:
    config = json.loads((saved.folder / "config.json").read_text())
    config["quantization_config"] |= {"format_version": 2, "storage": storage}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="form must be one of"):
        load(tmp_path)


def test_a_dense_checkpoint_is_not_compressed_by_the_config(saved: Saved, tmp_path: Path) -> None:
    load(saved.folder).dequantize().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        load(tmp_path, quantization_config=LowRankConfig(ranks=RANKS))


def test_a_raw_read_of_the_weight_fails(saved: Saved) -> None:
    layer = load(saved.folder).get_submodule("model.layers.1.self_attn.q_proj")
    assert isinstance(layer, LowRankLinear)
    with pytest.raises(RuntimeError):
        torch.nn.functional.linear(torch.zeros(1, 64), layer.weight)
