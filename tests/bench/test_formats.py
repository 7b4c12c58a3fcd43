"""CTranslate2's files, and the Whisper that comes out of them."""

import struct
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

from lillama.errors import ModelError

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from formats import ctranslate2, whisper


def name(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def content(tensors: dict[str, Tensor], aliases: dict[str, str] | None = None, version: int = 6) -> bytes:
    """Return a `model.bin` as CTranslate2's converters write it."""
    parts = [struct.pack("<I", version), name("WhisperSpec"), struct.pack("<II", 3, len(tensors))]
    for key, tensor in tensors.items():
        values = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        number = [torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16].index(
            tensor.dtype
        )
        shape = struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape)
        parts += [name(key), shape, struct.pack("<BI", number, len(values)), values]
    aliases = aliases or {}
    parts.append(struct.pack("<I", len(aliases)))
    return b"".join(parts + [name(one) + name(other) for one, other in aliases.items()])


def test_what_ctranslate2_stores_is_read(tmp_path: Path) -> None:
    stored = {
        "a": torch.randn(2, 3).half(), "b/c": torch.tensor(8, dtype=torch.int16), "d": torch.randn(4).bfloat16(),
        "e": torch.arange(3, dtype=torch.int8),
    }  # fmt: skip
    (tmp_path / "model.bin").write_bytes(content(stored, {"f": "a"}))
    found = ctranslate2.read_contents(tmp_path / "model.bin")
    assert found.kind == "WhisperSpec" and found.tensors.keys() == {*stored, "f"}
    for key, tensor in {**stored, "f": stored["a"]}.items():
        assert found.tensors[key].dtype == tensor.dtype and torch.equal(found.tensors[key], tensor)


def test_every_damage_of_such_a_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    whole = content({"a": torch.ones(3)}, {"b": "a"})
    damaged = [whole[:size] for size in range(len(whole))]
    damaged += [whole + b"\0", content({"a": torch.ones(3)}, {"b": "c"}), content({}, version=7), b"GGUF" + whole]
    for one in damaged:
        file.write_bytes(one)
        with pytest.raises(ModelError, match=r"model\.bin: .*get a sound copy") as refusal:
            ctranslate2.read_contents(file)
        assert "\n" not in str(refusal.value)


PROJECTIONS, NORM = {"weight": "weight", "bias": "bias"}, {"weight": "gamma", "bias": "beta"}
BLOCK = {  # what CTranslate2 calls it -> what it stacks
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",), "self_attention/layer_norm": ("self_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",), "attention/layer_norm": ("encoder_attn_layer_norm",),
    "ffn/linear_0": ("fc1",), "ffn/linear_1": ("fc2",), "ffn/layer_norm": ("final_layer_norm",),
}  # fmt: skip


def fuse(model: WhisperForConditionalGeneration, key_bias: float = 0.0) -> dict[str, Tensor]:
    """Return a Whisper's weights as CTranslate2 names and stacks them; keys have a bias there."""
    found = {"decoder/embeddings/weight": model.model.decoder.embed_tokens.weight.detach()}
    for side, part in (("encoder", model.model.encoder), ("decoder", model.model.decoder)):
        found[f"{side}/num_heads"] = torch.tensor(model.config.encoder_attention_heads, dtype=torch.int16)
        found[f"{side}/position_encodings/encodings"] = part.embed_positions.weight.detach()
        for name, tensor in part.state_dict().items():
            if name.startswith(("conv", "layer_norm")):
                module, kind = name.split(".")
                found[f"{side}/{module}/{(NORM if 'norm' in module else PROJECTIONS)[kind]}"] = tensor
        for index, block in enumerate(part.layers):
            state = block.state_dict() | {
                f"{name}.bias": torch.full((model.config.d_model,), key_bias)
                for name, _ in block.named_modules()
                if name.endswith("k_proj")
            }
            for target, names in BLOCK.items():
                for kind, end in (NORM if "norm" in target else PROJECTIONS).items():
                    if f"{names[0]}.{kind}" in state:
                        stacked = torch.cat([state[f"{name}.{kind}"] for name in names])
                        found[f"{side}/layer_{index}/{target}/{end}"] = stacked
    return found


@pytest.fixture(scope="module")
def tiny_whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=30, d_model=8, num_mel_bins=4, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=16, max_source_positions=10,
        max_target_positions=6, pad_token_id=1, bos_token_id=1, eos_token_id=1, decoder_start_token_id=2,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def test_a_whisper_comes_back_from_ctranslate2(tiny_whisper: WhisperForConditionalGeneration, tmp_path: Path) -> None:
    state = tiny_whisper.state_dict()
    written = content(fuse(tiny_whisper), {"decoder/projection/weight": "decoder/embeddings/weight"})
    (tmp_path / "model.bin").write_bytes(written)
    tensors = ctranslate2.read_contents(tmp_path / "model.bin").tensors
    found = dict(whisper.rename_weights(tensors))
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)

    class Ids:
        def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
            return [{whisper.END: 1, whisper.START: 2}[token] for token in tokens]

    assert whisper.read_config(tensors, Ids()).to_diff_dict() == tiny_whisper.config.to_diff_dict()


def test_what_a_whisper_has_no_place_for_is_refused(tiny_whisper: WhisperForConditionalGeneration) -> None:
    with pytest.raises(ModelError, match="encoder/layer_0/self_attention/linear_0/bias: keys have a bias"):
        dict(whisper.rename_weights(fuse(tiny_whisper, key_bias=1.0)))
    with pytest.raises(ModelError, match="encoder/layer_0/attention_x/weight: no weight of a Whisper"):
        dict(whisper.rename_weights({"encoder/layer_0/attention_x/weight": torch.ones(1)}))
