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

from lillama.lowrank.encode import encode_factors
from lillama.lowrank.install import install, low_rank_linears
from lillama.lowrank.pivot import pivot_rows
from lillama.lowrank.storage import Storage
from lillama.modeling.linear import LowRankLinear, build_factorised
from lillama.modeling.quantizer import LowRankConfig, declare

RANKS = {
    "model.layers.0.mlp.down_proj": 12,
    "model.layers.0.self_attn.k_proj": 3,
    "model.layers.1.self_attn.q_proj": 8,
    "model.layers.1.mlp.up_proj": 16,
}
FULL = {"model.layers.1.self_attn.v_proj": 32}  # as many as it has outputs
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


@torch.no_grad()
def convert(model: PreTrainedModel, storage: Storage) -> None:
    """Bring a compressed model in the plain form into another one, in place."""
    for name, layer in list(low_rank_linears(model)):
        assert isinstance(layer, LowRankLinear)
        rows = pivot_rows(layer.left.weight)[0] if storage.form == "pivot" else None
        dtype = layer.weight.dtype
        state = encode_factors(layer.left.weight, layer.right.weight, storage, rows, dtype)
        dense = torch.nn.Linear(layer.in_features, layer.out_features, False, dtype=dtype)
        dense.bias = layer.bias  # pyright: ignore[reportAttributeAccessIssue]
        converted = build_factorised(dense, layer.rank, dict(storage.as_json()), "order" in state).eval()
        converted.load_state_dict(
            state | {"weight": layer.weight} | ({"bias": layer.bias} if layer.bias is not None else {})
        )
        model.set_submodule(name, converted)
    declare(model, LowRankConfig(model.config.quantization_config.ranks, storage=dict(storage.as_json())))


def tiny(dtype: torch.dtype = torch.float32, ranks: dict[str, int] = RANKS, **changes: Any) -> LlamaForCausalLM:
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
    compress(model, ranks, lillama_version="0.1.0", recipe_hash="cafe")
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
def pivot(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The same in the pivot form, one linear at full rank; tests only read it."""
    model = tiny(ranks=RANKS | FULL)
    convert(model, Storage("pivot"))
    return save(model, tmp_path_factory.mktemp("pivot") / "model")


@pytest.fixture(scope="session")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A model with biases in the plain form at 8 bits, the rest in fp32; tests only read it."""
    model = tiny(mlp_bias=True, attention_bias=True)
    convert(model, Storage("plain", 8))
    return save(model, tmp_path_factory.mktemp("int8") / "model")


@pytest.fixture(scope="session")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A model with biases in the pivot form at 4 bits, the rest in bf16; tests only read it."""
    model = tiny(torch.bfloat16, RANKS | FULL, mlp_bias=True, attention_bias=True, tie_word_embeddings=True)
    convert(model, Storage("pivot", 4))
    return save(model, tmp_path_factory.mktemp("int4") / "model")


@pytest.fixture(params=["saved", "biased", "pivot", "int8", "int4"])
def each(request: pytest.FixtureRequest) -> Saved:
    """A compressed model in each of the forms."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def fresh() -> Callable[..., None]:
    """Run code in a new interpreter; it fails the test when the code does."""

    def run(code: str, *arguments: object) -> None:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return run
