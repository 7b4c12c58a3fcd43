"""Plans for the real configurations of the paper: its budgets, and what cannot be had (arXiv 2412.16719)."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, MixtralConfig, PhiConfig, PretrainedConfig

from lillama import plan
from lillama.errors import BudgetError

MIXTRAL = MixtralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, dtype="bfloat16",
)  # fmt: skip
PHI2 = PhiConfig(
    vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32,
    dtype="bfloat16",
)  # fmt: skip


def folder(config: PretrainedConfig, architecture: str, place: Path) -> Path:
    (place / "config.json").write_text(
        json.dumps(config.to_dict() | {"architectures": [architecture]}), encoding="utf-8"
    )
    return place


def test_mixtral_at_80_percent_is_taken_from_the_experts_of_its_first_blocks(tmp_path: Path) -> None:
    """The paper's plan takes 9.34 billion."""
    model = folder(MIXTRAL, "MixtralForCausalLM", tmp_path)
    planned = plan(model, recipe="paper-bottom", keep=0.8, targets="*experts*").plan
    assert planned.spec.params == 46_702_792_704
    removed = planned.spec.params - planned.kept_params
    assert removed == 9_344_909_312 and removed - 0.2 * planned.spec.params < 256 * (14336 + 4096)
    touched = {name.split(".")[2] for name in planned.factorised}
    assert touched == {str(index) for index in range(10)}
    assert all(".experts." in name for name in planned.factorised)
    assert min(planned.factorised.values()) == 1024


def test_phi_2_at_60_percent_is_refused_at_the_published_smallest_rank(tmp_path: Path) -> None:
    model = folder(PHI2, "PhiForCausalLM", tmp_path)
    with pytest.raises(BudgetError, match=r"36\.2 % removed"):
        plan(model, recipe="paper-bottom", keep=0.6)


def test_lucie_7b_is_planned_from_its_configuration(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=65024, hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    planned = plan(folder(config, "LlamaForCausalLM", tmp_path), keep=0.8).plan
    assert planned.spec.params / 1e9 == pytest.approx(6.707, abs=0.001)
    assert 0.795 < planned.keep <= 0.8 and len(planned.factorised) == 7 * 32
