"""A portable model loads with the package, with trust_remote_code, with both; with neither it fails aloud."""

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tests.hub.conftest import Saved, X, compress
from transformers import AutoConfig, AutoModelForCausalLM

from lillama.errors import ModelError
from lillama.hub.export import export
from lillama.hub.portable import make_portable, portable_code
from lillama.hub.usage import auto_class

BLOCKED = """
import sys
sys.modules["lillama"] = None
"""

CHECK = """
import json, pathlib, sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM
folder, logits, scratch = map(pathlib.Path, sys.argv[1:4])
X, expected = torch.arange(3, 23)[None], torch.load(logits)

@torch.no_grad()
def check(**options):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert type(model) is LlamaForCausalLM and not any(report.values())
    torch.testing.assert_close(model(X).logits, expected)
    hidden = model.model(X).last_hidden_state
    torch.testing.assert_close(AutoModel.from_pretrained(folder, **options)(X).last_hidden_state, hidden)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    torch.testing.assert_close(classifier.model(X).last_hidden_state, hidden)
    again = scratch / f"remote-{bool(options)}"
    model.save_pretrained(again)
    assert (again / "modeling_lillama.py").exists() is bool(options)
    assert ("auto_map" in json.loads((again / "config.json").read_text())) is bool(options)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(again, **options)(X).logits, expected)
    model.half().float().dequantize()
"""

NEITHER = """
try:
    AutoModelForCausalLM.from_pretrained(folder)
except RuntimeError as error:
    assert "ignore_mismatched_sizes" in str(error), error
else:
    raise AssertionError("random weights passed for a model")
"""

TRUST = "check(trust_remote_code=True)\n"


@pytest.fixture
def portable(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    saved: Saved = request.getfixturevalue(getattr(request, "param", "saved"))
    shutil.copytree(saved.folder, tmp_path / "portable")
    make_portable(tmp_path / "portable")
    torch.save(saved.logits, tmp_path / "logits.pt")
    return tmp_path / "portable"


@pytest.mark.parametrize(
    ("portable", "code"),
    [
        pytest.param("saved", BLOCKED + CHECK + NEITHER + TRUST, id="neither, then trust"),
        pytest.param("int4", BLOCKED + CHECK + NEITHER + TRUST, id="neither, then trust, 4 bits"),
        pytest.param("pivot", "import lillama" + CHECK + "check()\n" + TRUST, id="import, then both, pivots"),
    ],
    indirect=["portable"],
)
def test_matrix(
    code: str, portable: Path, fresh: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))  # copies of remote code land there
    fresh(code, portable, tmp_path / "logits.pt", tmp_path / "again")


def test_the_code_imports_torch_and_transformers_alone(portable: Path) -> None:
    text = (portable / "modeling_lillama.py").read_text()
    imported = set[str]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported == {"collections", "copy", "inspect", "numbers", "typing", "torch", "transformers"}
    assert text == portable_code("LlamaConfig")


def test_twice_is_once(portable: Path) -> None:
    before = {file.name: file.read_bytes() for file in portable.iterdir()}
    make_portable(portable)
    assert {file.name: file.read_bytes() for file in portable.iterdir()} == before


def test_dense_or_unknown_models_are_refused(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        make_portable(tmp_path)
    config = json.loads((saved.folder / "config.json").read_text())
    for changes, message in [
        ({"model_type": "ours"}, "model_type ours is not one of transformers' own"),
        ({"quantization_config": None}, "no quantization_config"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is gptq"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=message):
            make_portable(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


ARCHITECTURES = [
    # GPT-NeoX: transformers renames its head's weight when it loads and saves
    ("GPTNeoXForCausalLM", {}, ["gpt_neox.layers.0.mlp.dense_h_to_4h", "gpt_neox.layers.1.attention.dense"]),
    ("MambaForCausalLM", {}, ["backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.out_proj"]),
    ("MixtralForCausalLM", {"num_local_experts": 2}, ["model.layers.0.self_attn.v_proj"]),
    (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0},
        ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.1.EncDecAttention.v"],
    ),
]
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(("name", "changes", "linears"), ARCHITECTURES, ids=[name for name, _, _ in ARCHITECTURES])
@torch.no_grad()
def test_every_architecture_loads_all_its_weights_in_all_forms(
    name: str, changes: dict[str, int], linears: list[str], tmp_path: Path, code_cache: None
) -> None:
    architecture = getattr(transformers, name)
    torch.manual_seed(0)
    model = architecture(architecture.config_class(**SMALL | changes)).eval()
    compress(model, dict.fromkeys(linears, 4))
    inputs = {"input_ids": X} | ({"decoder_input_ids": X} if model.config.is_encoder_decoder else {})
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "native")
    portable = tmp_path / f"portable-{name}"  # transformers caches code under the folder's own name
    export(tmp_path / "native", portable, "portable")
    export(tmp_path / "native", tmp_path / "dense", "dense")
    remote = getattr(transformers, auto_class(name))
    for form, loader, options in [
        (tmp_path / "native", architecture, {}),
        (tmp_path / "dense", architecture, {}),
        (portable, remote, {"trust_remote_code": True}),
    ]:
        loaded, report = loader.from_pretrained(form, output_loading_info=True, **options)
        assert not any(report.values()), (form, report)
        tolerance = 2e-5 if form.name == "dense" else 1e-5
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=tolerance)
        assert type(loaded) is architecture
    assert type(loaded.config).__module__.startswith("transformers_modules")  # the last one: from the folder's file
    loaded.save_pretrained(tmp_path / f"again-{name}")
    torch.testing.assert_close(
        remote.from_pretrained(tmp_path / f"again-{name}", trust_remote_code=True)(**inputs).logits, expected
    )


def test_native_class_forgets_the_code(portable: Path, saved: Saved) -> None:
    assert AutoConfig.from_pretrained(portable).auto_map["AutoConfig"] == "modeling_lillama.LlamaConfig"
    model = AutoModelForCausalLM.from_pretrained(portable)
    assert not hasattr(model.config, "auto_map")
