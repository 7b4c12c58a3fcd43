import json
import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import LlamaConfig

from lillama.errors import LINE, ModelError
from lillama.model import source
from lillama.model.source import load_config, locate, quantization, stored_dtype


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert locate(tmp_path) == tmp_path == locate(str(tmp_path), weights=False)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json in this folder"):
        locate(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "vocab.txt", "tokenizer.model"])
def test_what_would_be_read_for_ever_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError, match=rf"{re.escape(name)}: a pipe, a socket or a device"):
        locate(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 1 << 40)
    with pytest.raises(ModelError, match=rf"{re.escape(name)}: 1,099,511,627,776 bytes, more than any such file has"):
        locate(tmp_path)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="this is a file; give the model's folder"):
        locate(tmp_path / "model.safetensors")


def test_a_gguf_file_is_refused_with_the_way_to_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.Q4_1.gguf"
    file.write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    for path in (file, tmp_path):
        with pytest.raises(
            ModelError, match=r"model\.Q4_1\.gguf: a GGUF file, .*gguf_file='model\.Q4_1\.gguf'.*save_p"
        ) as e:
            locate(path)
        assert "\n" not in str(e.value) and len(str(e.value)) < LINE
    file.rename(tmp_path / "sha256-1234")
    with pytest.raises(ModelError, match="sha256-1234: a GGUF file"):
        locate(tmp_path / "sha256-1234")


@pytest.mark.parametrize("config", [None, '{"lang_ids": [50259], "suppress_ids": [1]}'])
def test_a_ctranslate2_model_is_refused_with_the_way_out(config: str | None, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.bin").write_bytes(b"\6\0\0\0\x0c\0WhisperSpec\0\3\0\0\0" + bytes(100))
    for path, weights in ((tmp_path, True), (tmp_path, False), (tmp_path / "model.bin", True)):
        with pytest.raises(
            ModelError, match=r"model\.bin: a CTranslate2 model \(WhisperSpec\), .*original Hugging Face"
        ) as e:
            locate(path, weights)
        assert "\n" not in str(e.value)


def test_other_formats_beside_safetensors_do_no_harm(tmp_path: Path) -> None:
    for name, content in (
        ("config.json", b"{}"),
        ("model.safetensors", b""),
        ("model.gguf", b"GGUF"),
        ("model.bin", b""),
    ):
        (tmp_path / name).write_bytes(content)
    assert locate(tmp_path) == tmp_path


def test_what_only_looks_like_another_format_is_not_called_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.bin").write_bytes(b"\x80\2}q\0.")
    (tmp_path / "folder.gguf").mkdir()
    os.mkfifo(tmp_path / "pipe.gguf")
    assert locate(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["no/such/folder", "a b", "/absent"])
def test_what_is_neither_folder_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder, and not a hub id"):
        locate(name)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> str:
        raise huggingface_hub.errors.OfflineModeIsEnabled("Cannot reach the hub.\nOffline mode is enabled.")

    monkeypatch.setattr(source, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"org/name: no such folder, and the hub did not give it \(Cannot reach") as e:
        locate("org/name")
    assert "\n" not in str(e.value)


def test_only_the_configuration_is_fetched_for_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(source, "snapshot_download", lambda _, allow_patterns: asked.append(allow_patterns) or "/tmp")
    locate("org/name", weights=False)
    locate("org/name")
    assert asked[0] == ["config.json", "adapter_config.json"] and "*.safetensors" in asked[1]
    assert not any("bin" in pattern or ".pt" in pattern for pattern in asked[1])


UNUSABLE = "transformers cannot use this configuration"
LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "a JSON list"),
        ("{}", UNUSABLE),
        ('{"model_type": "no_such_type"}', UNUSABLE),
        ({"model_type": None}, UNUSABLE),
        ({"model_type": ["llama"]}, "model_type is .*; a text is needed"),
        ({"auto_map": "a.B"}, "auto_map is a.B; an object"),
        ({"quantization_config": [1]}, "quantization_config is .1.; an object"),
        ({"dtype": "foo"}, UNUSABLE),
        ({"dtype": "int8"}, "dtype is torch.int8; a floating-point type"),
        ({"dtype": {}}, "dtype is {}; a text"),
        ({"dtype": float("nan")}, "dtype is nan; a text"),
        ({"torch_dtype": 7}, "torch_dtype is 7"),
        ({"text_config": 3}, "text part is 3"),
        ({"text_config": {"a": 1}}, "text part is"),
        ({"architectures": 5}, "architectures"),
        ({"architectures": [5]}, "architectures"),
        ({"architectures": {"a": 1}}, "architectures"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 63}, UNUSABLE),
        ({"num_attention_heads": 0}, UNUSABLE),
        ({"layer_types": ["a"]}, UNUSABLE),
        ({"vocab_size": 3.5}, "vocab_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than any model has"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers is 10*, more than any model has"),
        ({"text_config": {"encoder_layers": 10**9}}, "encoder_layers is"),
        ({"num_labels": 10**9}, "num_labels is"),
        ({"depths": [2, 10**9]}, "depths is"),
        ({"num_experts_per_tok": 10**400}, "num_experts_per_tok is 10*"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused_in_one_line(content: Any, what: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(LLAMA | content))
    with pytest.raises(ModelError, match=what) as refusal:
        load_config(tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path / 'config.json'}: ") and str(refusal.value).isprintable()


def test_the_stored_type_and_the_quantisation_are_read(tmp_path: Path) -> None:
    quantized = {"quant_method": "lillama", "ranks": {"a": 1}}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "dtype": "bfloat16", "quantization_config": quantized})
    )
    config = load_config(tmp_path)
    assert stored_dtype(config) == torch.bfloat16 and quantization(config) == quantized
    assert stored_dtype(LlamaConfig()) == torch.float32 and quantization(LlamaConfig()) is None


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_refused_with_the_way_out(alone: bool, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    if not alone:
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter_config\.json: an adapter lies .*merge_and_unload"):
        locate(tmp_path)


def test_an_adapter_of_the_hub_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(source, "snapshot_download", lambda _, allow_patterns: str(tmp_path))
    for weights in (True, False):
        with pytest.raises(ModelError, match="an adapter lies"):
            locate("org/name", weights)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "merges.txt", "spiece.model", "source.spm", "target.spm", "bpe.codes", "dict.bpe", "qwen.tiktoken",
     "sentencepiece.bpe.model", "chat_template.jinja"],
)  # fmt: skip
def test_every_file_of_a_tokenizer_is_fetched(name: str) -> None:
    assert any(fnmatch(name, pattern) for pattern in source.WANTED)
