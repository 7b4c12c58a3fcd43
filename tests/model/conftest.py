from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def config() -> Callable[..., PretrainedConfig]:
    """Make a tiny configuration as a config.json would give it: `config(LlamaConfig, tie_word_embeddings=True)`."""

    def make(kind: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
        made = kind(**SHAPE | changes)
        made.architectures = [AutoModelForCausalLM._model_mapping[kind].__name__]
        return made

    return make


@pytest.fixture
def saved(config: Callable[..., PretrainedConfig], tmp_path: Path) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """Save a tiny random model: `saved(LlamaConfig, shard="20KB", tie_word_embeddings=True)`."""

    def make(
        kind: type[PretrainedConfig] = LlamaConfig,
        *,
        shard: str = "5GB",
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> tuple[PreTrainedModel, Path]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(kind, **changes), dtype=dtype or torch.float32).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        folder = tmp_path / "saved"
        model.save_pretrained(folder, max_shard_size=shard)
        return model, folder

    return make
