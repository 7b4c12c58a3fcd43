"""Tiny models of many architectures: the rows that the tests, and the table in docs/architectures.md, run.

Every row is a configuration; its weights are random. Sizes are such that a block takes milliseconds, and differ from each
other, so that a transposed weight cannot pass for its original.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import torch
import transformers
from PIL import Image
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["dense", "experts", "state space", "encoder-decoder", "encoder", "several modalities"]

IDS = {"vocab_size": 258, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
TEXT = IDS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GATED = TEXT | {"intermediate_size": 56, "num_key_value_heads": 2}
ROUTED = GATED | {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
LATENT = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 12, "kv_lora_rank": 12,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
SSD = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
BERT = TEXT | {"intermediate_size": 56}
SPEECH = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56, "conv_dim": (16, 16),
    "conv_kernel": (10, 8), "conv_stride": (8, 8), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "vocab_size": 258,
}  # fmt: skip
IMAGE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        name: as its authors call it.
        kind: what it is.
        model: name of transformers' class.
        config: name of its configuration's class.
        values: of the configuration.
        note: what a user should know; appears in the table.
    """

    name: str
    kind: Kind
    model: str
    config: str
    values: Mapping[str, Any]
    note: str = ""

    def configuration(self) -> PretrainedConfig:
        """Return its configuration."""
        config = getattr(transformers, self.config)(**self.values)
        config.architectures = [self.model]
        return config

    def made(self) -> PreTrainedModel:
        """Return a model of random weights, large enough that every block does something to its inputs."""
        torch.manual_seed(0)
        model = getattr(transformers, self.model)(self.configuration())
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.15)
        return model.eval()

    @property
    def takes(self) -> str:
        """Name of the model's main input."""
        return getattr(transformers, self.model).main_input_name

    @property
    def auto(self) -> str:
        """Name of the Auto class that loads it."""
        return AUTO.get(self.model) or ("AutoModel" if self.kind == "encoder" else "AutoModelForCausalLM")

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Write the model, and its tokenizer or processor."""
        model = self.made()
        model.save_pretrained(folder)
        if self.takes == "input_ids" or self.kind == "encoder-decoder":
            tokenizer.save_pretrained(folder)
        if self.takes in PROCESSORS:
            PROCESSORS[self.takes]().save_pretrained(folder)
        return model

    def inputs(self, count: int = 2) -> dict[str, torch.Tensor]:
        """Return something that the model can be run on."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 250, (count, 12), generator=generator)
        shapes = {"input_features": (16, 100), "input_values": (8000,), "pixel_values": (3, 16, 16)}
        first = torch.randn(count, *shapes[self.takes], generator=generator) if self.takes in shapes else ids
        return {self.takes: first} | ({"decoder_input_ids": ids.clone()} if self.kind == "encoder-decoder" else {})


AUTO = {
    "WhisperForConditionalGeneration": "AutoModelForSpeechSeq2Seq",
    "T5ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "BartForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "BertForMaskedLM": "AutoModelForMaskedLM",
    "ModernBertForMaskedLM": "AutoModelForMaskedLM",
    "LlavaForConditionalGeneration": "AutoModelForImageTextToText",
    "Gemma3ForConditionalGeneration": "AutoModelForImageTextToText",
}
PROCESSORS: dict[str, Callable[[], Any]] = {
    "input_features": lambda: transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1),
    "input_values": lambda: transformers.Wav2Vec2FeatureExtractor(),
    "pixel_values": lambda: transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ),
}


def write_speech(folder: Path, count: int = 24, rate: int = 16_000) -> Path:
    """Write tones of half a second to a second, with made-up transcripts, as an audio folder."""
    folder.mkdir()
    chance, lines = np.random.default_rng(0), []
    for index in range(count):
        time = np.arange(int(rate * chance.uniform(0.5, 1.0))) / rate
        tone = sum(np.sin(2 * np.pi * pitch * time) for pitch in chance.uniform(100, 3000, 3)) / 4
        soundfile.write(folder / f"{index}.wav", tone + 0.01 * chance.standard_normal(len(time)), rate)
        text = "".join(chance.choice(list("abcdefghij "), chance.integers(5, 20)))
        lines.append(json.dumps({"file_name": f"{index}.wav", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_images(folder: Path, count: int = 24) -> Path:
    """Write small images of random patches."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    for index in range(count):
        patches = chance.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(patches.repeat(5, 0).repeat(5, 1)).save(folder / f"{index}.png")
    return folder


Facts = tuple[str, str, str, Mapping[str, Any], str]


def causal(name: str, stem: str, values: Mapping[str, Any], note: str = "", model: str | None = None) -> Facts:
    """Return the facts of a causal language model whose classes are named as usual."""
    return name, model or f"{stem}ForCausalLM", f"{stem}Config", values, note


HEADS = {"head_dim": 8}
DENSE: list[Facts] = [
    causal("Llama 2, 3, Lucie-7B", "Llama", GATED),
    causal("Mistral", "Mistral", GATED),
    causal("Qwen 2, 2.5", "Qwen2", GATED),
    causal("Qwen 3", "Qwen3", GATED | HEADS),
    causal("Gemma 2", "Gemma2", GATED | HEADS),
    causal("Gemma 3", "Gemma3Text", GATED | HEADS, model="Gemma3ForCausalLM"),
    causal("Phi-1.5, 2", "Phi", GATED),
    causal("Phi-3, 4", "Phi3", GATED),
    ("GPT-2", "GPT2LMHeadModel", "GPT2Config", IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, ""),
    causal("GPT-NeoX, Pythia", "GPTNeoX", BERT),
    causal(
        "GPT-Neo",
        "GPTNeo",
        IDS
        | {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 56,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
    ),
    causal("GPT-J", "GPTJ", IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    causal("OPT", "OPT", TEXT | {"ffn_dim": 56, "word_embed_proj_dim": 32}),
    causal("BLOOM", "Bloom", IDS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    causal("Falcon", "Falcon", TEXT | {"ffn_hidden_size": 56}),
    causal("StarCoder 2", "Starcoder2", GATED),
    causal("StableLM", "StableLm", GATED),
    causal("OLMo 2", "Olmo2", GATED),
    causal("OLMo 3", "Olmo3", GATED),
    causal("Granite", "Granite", GATED),
    causal("Cohere 2", "Cohere2", GATED | HEADS),
    causal("SmolLM 3", "SmolLM3", GATED),
    causal("MPT", "Mpt", IDS | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
]
EXPERTS: list[Facts] = [
    causal("Mixtral", "Mixtral", ROUTED),
    causal("Qwen 2 MoE", "Qwen2Moe", ROUTED),
    causal("Qwen 3 MoE", "Qwen3Moe", ROUTED | HEADS),
    causal("OLMoE", "Olmoe", ROUTED),
    causal("DeepSeek-V3", "DeepseekV3", ROUTED | LATENT),
    causal("Granite MoE", "GraniteMoe", ROUTED),
    causal("GPT-OSS", "GptOss", ROUTED | HEADS),
    causal("Llama 4", "Llama4Text", ROUTED | HEADS | {"intermediate_size_mlp": 40}, model="Llama4ForCausalLM"),
]
STATE_SPACE: list[Facts] = [
    causal("Mamba", "Mamba", IDS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    causal(
        "Mamba 2",
        "Mamba2",
        IDS
        | {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "expand": 2,
            "chunk_size": 16,
        },
    ),
    causal("Falcon Mamba", "FalconMamba", IDS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    causal("Bamba", "Bamba", GATED | SSD | {"attn_layer_indices": [1]}),
    causal("Falcon-H1", "FalconH1", GATED | HEADS | SSD | {"mamba_d_ssm": 64}),
    causal(
        "Jamba",
        "Jamba",
        ROUTED | {"use_mamba_kernels": False, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
        "experts too",
    ),
    causal(
        "Qwen 3 Next",
        "Qwen3Next",
        ROUTED
        | HEADS
        | {
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "experts too",
    ),
    causal(
        "RecurrentGemma", "RecurrentGemma", GATED | HEADS | {"lru_width": 32, "block_types": ["recurrent", "attention"]}
    ),
    causal(
        "RWKV",
        "Rwkv",
        IDS
        | {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "attention_hidden_size": 32,
            "intermediate_size": 56,
            "context_length": 64,
        },
    ),
]
ENCODER_DECODER: list[Facts] = [
    (
        "Whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        IDS | {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
               "decoder_attention_heads": 4, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56, "max_source_positions": 50,
               "max_target_positions": 64, "num_mel_bins": 16, "decoder_start_token_id": 0, "suppress_tokens": None,
               "begin_suppress_tokens": None},
        "calibrated on speech",
    ),
    ("T5", "T5ForConditionalGeneration", "T5Config",
     IDS | {"d_model": 32, "d_ff": 56, "num_layers": 2, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0}, ""),
    ("BART", "BartForConditionalGeneration", "BartConfig",
     IDS | {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56, "max_position_embeddings": 64,
            "decoder_start_token_id": 1}, ""),
]  # fmt: skip
ENCODERS: list[Facts] = [
    ("BERT", "BertForMaskedLM", "BertConfig", BERT, ""),
    ("MiniLM and other sentence encoders", "BertModel", "BertConfig", BERT, "no head: taught to keep its last outputs"),
    ("ModernBERT", "ModernBertForMaskedLM", "ModernBertConfig", BERT | {"local_attention": 8, "cls_token_id": 0,
                                                                          "sep_token_id": 1}, ""),
    ("wav2vec 2.0", "Wav2Vec2Model", "Wav2Vec2Config", SPEECH, "calibrated on speech"),
    ("HuBERT", "HubertModel", "HubertConfig", SPEECH, "calibrated on speech"),
    ("ViT", "ViTModel", "ViTConfig", IMAGE, "calibrated on images"),
    ("CLIP's image tower", "CLIPVisionModel", "CLIPVisionConfig", IMAGE, "calibrated on images"),
]  # fmt: skip
SEVERAL: list[Facts] = [
    (
        "LLaVA",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"text_config": {"model_type": "llama"} | GATED, "vision_config": {"model_type": "clip_vision_model"} | IMAGE,
         "image_token_index": 257},
        "its language tower",
    ),
    (
        "Gemma 3, with images",
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": GATED | HEADS, "vision_config": {"model_type": "siglip_vision_model"} | IMAGE,
         "mm_tokens_per_image": 4, "image_token_index": 257, "boi_token_index": 255, "eoi_token_index": 256},
        "its language tower",
    ),
]  # fmt: skip
KINDS: dict[Kind, list[Facts]] = {
    "dense": DENSE, "experts": EXPERTS, "state space": STATE_SPACE, "encoder-decoder": ENCODER_DECODER, "encoder": ENCODERS,
    "several modalities": SEVERAL,
}  # fmt: skip
ROWS = {
    name: Row(name, kind, model, config, values, note)
    for kind, facts in KINDS.items()
    for name, model, config, values, note in facts
}
