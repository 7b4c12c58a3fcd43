"""`import lillama` alone makes transformers load compressed models, in every order of imports; and stays light."""

from collections.abc import Callable
from pathlib import Path

import torch
from tests.hub.conftest import Saved

LIGHT = """
import sys
import lillama
heavy = {"torch", "transformers", "numpy", "jaxtyping", "yaml"} & set(sys.modules)
assert not heavy, heavy
from lillama.hub.register import FINDER, register
register()
assert sys.meta_path.count(FINDER) == 1
"""

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model) is LlamaForCausalLM
assert type(model.model.layers[0].mlp.down_proj).__module__ == "lillama.modeling.linear"
with torch.no_grad():
    torch.testing.assert_close(model(torch.arange(3, 23)[None]).logits, torch.load(sys.argv[2]))
"""

AFTER = """
import transformers.quantizers.auto as table
assert "lillama" not in table.AUTO_QUANTIZER_MAPPING
import lillama, lillama.hub.register
assert "lillama" in table.AUTO_QUANTIZER_MAPPING and "lillama" in table.AUTO_QUANTIZATION_CONFIG_MAPPING
first = table.AUTO_QUANTIZER_MAPPING["lillama"]
lillama.hub.register.register()
assert table.AUTO_QUANTIZER_MAPPING["lillama"] is first
"""

DIRECT = """
import lillama.modeling.quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING["lillama"] is lillama.modeling.quantizer.LowRankQuantizer
"""


def test_import_before_transformers(saved: Saved, fresh: Callable[..., None], tmp_path: Path) -> None:
    torch.save(saved.logits, tmp_path / "logits.pt")
    fresh(LIGHT + LOAD, saved.folder, tmp_path / "logits.pt")


def test_import_after_transformers(saved: Saved, fresh: Callable[..., None], tmp_path: Path) -> None:
    torch.save(saved.logits, tmp_path / "logits.pt")
    fresh(AFTER + LOAD, saved.folder, tmp_path / "logits.pt")


def test_import_of_the_quantizer_itself(fresh: Callable[..., None]) -> None:
    fresh(DIRECT)
