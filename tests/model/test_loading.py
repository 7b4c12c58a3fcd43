"""A whole model: its type in memory, what is missing, and settings for writing, read only where they count."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from lillama.calibration.generate import generate
from lillama.errors import ModelError
from lillama.model.load import load
from lillama.model.source import computed_dtype, load_config
from lillama.model.tokenizer import load_tokenizer
from lillama.probing.scorer import load_scorer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "value",
    [[], None, 5, "x", {"temperature": "hot"}, {"eos_token_id": {}}, {"pad_token_id": 10**9}, {"max_length": 0},
     {"watermarking_config": 5}],
)  # fmt: skip
def test_what_is_not_needed_is_not_read(tiny, tmp_path, value):
    folder = shutil.copytree(tiny, tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    (folder / "generation_config.json").unlink()
    ids = generate(folder, tokenizer, 64, 16, seed=0)
    (folder / "generation_config.json").write_text(json.dumps(value))
    assert torch.equal(generate(folder, tokenizer, 64, 16, seed=0), ids)
    load_scorer(folder, CPU)
    load(folder, CPU, generation=GenerationConfig())


@pytest.mark.parametrize("content", ["[]", "null", "5", '{"watermarking_config": 5}', "{", "\udcff"])
def test_what_is_needed_is_refused_by_name(tiny, tmp_path, content):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "generation_config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ModelError, match=r"generation_config\.json: transformers cannot use it .*mend it") as caught:
        load(folder, CPU)
    assert "\n" not in str(caught.value)


def test_weights_are_fp32_on_the_cpu_unless_their_stored_type_is_asked_for(make_model, tmp_path):
    folder = make_model(dtype=torch.bfloat16)
    assert computed_dtype(load_config(folder), CPU) == load(folder, CPU).dtype == torch.float32
    assert computed_dtype(load_config(folder), torch.device("cuda")) == torch.bfloat16
    assert load(folder, CPU, dtype="auto").dtype == load(folder, CPU, offload=tmp_path).dtype == torch.bfloat16


def test_a_tensor_that_is_missing_is_named(make_model):
    folder = make_model()
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight is missing from the weights"):
        load(folder, CPU)
