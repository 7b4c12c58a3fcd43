import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from lillama.errors import ModelError
from lillama.model.checkpoint import SINGLE, CheckpointReader
from lillama.model.skeleton import skeleton
from lillama.model.weights import Weights, fill_module

Save = Callable[..., tuple[PreTrainedModel, Path]]
CPU = torch.device("cpu")


def names_of(config: PretrainedConfig, folder: Path) -> dict[str, str]:
    weights = Weights.of(skeleton(config), CheckpointReader(folder))
    return {name: source.keys[0][0] for name, (source, _) in weights.sources.items()}


def rename(folder: Path, change: Callable[[str], str | None]) -> None:
    """Give the stored tensors other names; None leaves a tensor out."""
    tensors = load_file(folder / SINGLE)
    save_file({new: tensor for name, tensor in tensors.items() if (new := change(name))}, folder / SINGLE)


@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_found_under_its_own_name(tied: bool, saved: Save) -> None:
    model, folder = saved(tie_word_embeddings=tied)
    names = names_of(model.config, folder)
    assert names == {name: name for name, _ in model.named_parameters()}
    assert ("lm_head.weight" in names) != tied


def test_a_checkpoint_of_the_base_model_serves(saved: Save) -> None:
    model, folder = saved(tie_word_embeddings=True)
    rename(folder, lambda name: name.removeprefix("model."))
    assert names_of(model.config, folder)["model.layers.0.mlp.up_proj.weight"] == "layers.0.mlp.up_proj.weight"


def test_a_base_model_is_filled_from_a_whole_one(saved: Save) -> None:
    model, folder = saved()
    model.config.architectures = ["LlamaModel"]
    assert names_of(model.config, folder)["layers.0.mlp.up_proj.weight"] == "model.layers.0.mlp.up_proj.weight"


def test_a_tied_parameter_may_be_stored_under_either_name(saved: Save) -> None:
    model, folder = saved(tie_word_embeddings=True)
    rename(folder, lambda name: "lm_head.weight" if "embed_tokens" in name else name)
    assert names_of(model.config, folder)["model.embed_tokens.weight"] == "lm_head.weight"


def test_names_that_transformers_renames_are_found(saved: Save) -> None:
    model, folder = saved(GPTNeoXConfig, num_key_value_heads=None)
    assert "embed_out.weight" in CheckpointReader(folder).names
    names = names_of(model.config, folder)
    assert set(names) == {name for name, _ in model.named_parameters()} and set(names.values()) == set(
        CheckpointReader(folder).names
    )


def test_tensors_that_the_model_has_no_place_for_are_left_alone(saved: Save) -> None:
    model, folder = saved()
    save_file(load_file(folder / SINGLE) | {"extra.position_ids": torch.arange(3)}, folder / SINGLE)
    assert "extra.position_ids" not in names_of(model.config, folder).values()


def test_a_missing_tensor_is_refused(saved: Save) -> None:
    model, folder = saved()
    rename(folder, lambda name: None if name == "model.layers.1.mlp.up_proj.weight" else name)
    with pytest.raises(ModelError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing from the weights"):
        names_of(model.config, folder)


def test_a_head_that_is_not_tied_must_be_there(saved: Save) -> None:
    model, folder = saved(tie_word_embeddings=False)
    rename(folder, lambda name: None if name == "lm_head.weight" else name)
    with pytest.raises(ModelError, match=r"lm_head\.weight is missing"):
        names_of(model.config, folder)


def test_another_shape_is_refused(saved: Save) -> None:
    model, folder = saved()
    model.config.intermediate_size = 64
    with pytest.raises(ModelError, match=r"shape \(48, 32\), the configuration wants \(64, 32\)"):
        names_of(model.config, folder)


def test_an_integer_weight_is_refused(saved: Save) -> None:
    model, folder = saved()
    tensors = load_file(folder / SINGLE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / SINGLE)
    with pytest.raises(ModelError, match=r"model\.norm\.weight is stored as I8"):
        names_of(model.config, folder)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_filled_block_is_the_original_and_the_template_stays_empty(
    shard: str, dtype: torch.dtype, saved: Save
) -> None:
    model, folder = saved(Qwen2Config, shard=shard)
    template, reader = skeleton(model.config), CheckpointReader(folder)
    weights = Weights.of(template, reader)
    block = fill_module(template.get_submodule("model.layers.1"), "model.layers.1", weights, CPU, dtype)
    original = model.get_submodule("model.layers.1").state_dict()
    assert set(block.state_dict()) == set(original) and "self_attn.q_proj.bias" in original
    for name, tensor in block.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, original[name].to(dtype))
    assert not any(parameter.requires_grad for parameter in block.parameters()) and not block.training
    assert all(parameter.is_meta for parameter in template.parameters())


def test_a_filled_model_computes_as_the_original(saved: Save) -> None:
    model, folder = saved(LlamaConfig, tie_word_embeddings=True)
    template, reader = skeleton(model.config), CheckpointReader(folder)
    whole = fill_module(template, "", Weights.of(template, reader), CPU, torch.float32)
    assert isinstance(whole, PreTrainedModel)
    whole.tie_weights()
    ids = torch.arange(3, 13)[None]
    torch.testing.assert_close(whole(ids).logits, model(ids).logits)


def unused(model: PreTrainedModel, folder: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    names_of(model.config, folder)
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_tensors_left_over_are_told_of_in_one_line(saved: Save, caplog: pytest.LogCaptureFixture) -> None:
    model, folder = saved()
    assert unused(model, folder, caplog) == []
    model.config.num_hidden_layers = 1
    (line,) = unused(model, folder, caplog)
    assert "18 stored tensors are not part of the model" in line and "model.layers.1." in line and ", ..." in line


def test_what_the_class_itself_leaves_out_is_not_spoken_of(
    saved: Save, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved()
    extra = {
        "model.layers.9.eh_proj.weight": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    save_file(load_file(folder / SINGLE) | extra, folder / SINGLE)
    (line,) = unused(model, folder, caplog)
    assert "1 stored tensors" in line and "model.layers.9.eh_proj.weight" in line
    monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.9\."])
    assert unused(model, folder, caplog) == []


WRAPPED = {
    "compiled": (lambda name: f"_orig_mod.{name}", "_orig_mod.save_pretrained"),
    "compiled blocks": (lambda name: name.replace("layers.1.", "layers.1._orig_mod."), "_orig_mod.save_pretrained"),
    "data parallel": (lambda name: f"module.{name}", "module.save_pretrained"),
    "both": (lambda name: f"module._orig_mod.{name}", "_orig_mod.save_pretrained"),
    "adapter": (lambda name: name.replace("up_proj.", "up_proj.base_layer."), "merge_and_unload"),
    "adapter around all": (lambda name: f"base_model.model.{name}", "merge_and_unload"),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_model_saved_inside_a_wrapper_is_refused_with_the_way_out(wrapper: str, saved: Save) -> None:
    change, remedy = WRAPPED[wrapper]
    model, folder = saved()
    rename(folder, change)
    with pytest.raises(ModelError, match="saved inside a wrapper") as refusal:
        names_of(model.config, folder)
    assert remedy in str(refusal.value) and "fetch the model again" not in str(refusal.value)
