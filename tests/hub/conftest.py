"""Tiny compressed models: random factors stand for trained ones."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lillama.hub.quantizer import LowRankConfig, declare
from lillama.lowrank.install import install, low_rank_linears

RANKS = {
    "model.layers.0.mlp.down_proj": 12,
    "model.layers.0.self_attn.k_proj": 3,
    "model.layers.1.self_attn.q_proj": 8,
    "model.layers.1.mlp.up_proj": 16,
}
X = torch.arange(3, 23)[None]

torch.set_num_threads(1)


@dataclass(frozen=True)
class Saved:
    """A compressed model on disk, and what it computed before it was saved."""

    folder: Path
    logits: torch.Tensor
    hidden: torch.Tensor


def compress(model: PreTrainedModel, ranks: dict[str, int], **extra: Any) -> None:
    install(model, ranks)
    for _, layer in low_rank_linears(model):
        torch.nn.init.normal_(layer.left.weight, std=0.3)
        torch.nn.init.normal_(layer.right.weight, std=0.3)
    declare(model, LowRankConfig(ranks=ranks, **extra))


def tiny(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    shape = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    config = LlamaConfig(**shape | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # `.to` would round the rotary tables too
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    compress(model, RANKS, lillama_version="0.1.0", recipe_hash="cafe")
    return model


@torch.no_grad()
def save(model: LlamaForCausalLM, folder: Path) -> Saved:
    saved = Saved(folder, model(X).logits, model.model(X).last_hidden_state)
    model.save_pretrained(folder)
    return saved


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A compressed model in fp32 without biases; tests only read it."""
    return save(tiny(), tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="session")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A compressed model in bf16 with biases and tied embeddings; tests only read it."""
    model = tiny(torch.bfloat16, mlp_bias=True, attention_bias=True, tie_word_embeddings=True)
    return save(model, tmp_path_factory.mktemp("biased") / "model")


@pytest.fixture(scope="session")
def fresh() -> Callable[..., None]:
    """Run code in a new interpreter; it fails the test when the code does."""

    def run(code: str, *arguments: object) -> None:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return run
