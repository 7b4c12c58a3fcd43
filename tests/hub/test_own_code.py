"""A model of an architecture of its own, whose code lies in its folder: compressed, measured, loaded and exported with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lillama.errors import ModelError
from lillama.evaluation.perplexity import perplexity
from lillama.hub.export import export
from lillama.modeling.linear import low_rank_linears
from lillama.pipeline.api import compress

CONFIGURATION = "from transformers import LlamaConfig\n\n\nclass OddConfig(LlamaConfig):\n    model_type = 'odd'\n"
MODELING = """from transformers import LlamaForCausalLM

from .configuration_odd import OddConfig


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output
"""


@pytest.fixture
def odd(make_model: Callable[..., Path], code_cache: None) -> Path:
    model = make_model()
    (model / "configuration_odd.py").write_text(CONFIGURATION)
    (model / "modeling_odd.py").write_text(MODELING)
    config = json.loads((model / "config.json").read_text())
    names = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    config |= {"model_type": "odd", "architectures": ["OddForCausalLM"], "auto_map": names}
    (model / "config.json").write_text(json.dumps(config))
    return model


def test_it_is_compressed_measured_and_exported_with_its_code(
    odd: Path, quick: Callable[..., Any], text: Path, tmp_path: Path
) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    recipe = quick(distill={"epochs": 0})
    with pytest.raises(ModelError, match="--trust-remote-code"):
        compress(odd, out, recipe=recipe)
    assert not out.exists()
    compress(odd, out, recipe=recipe, trust_remote_code=True)
    assert {"configuration_odd.py", "modeling_odd.py"} <= {file.name for file in out.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(model).__name__ == "OddForCausalLM" and list(low_rank_linears(model))
    ids = torch.arange(3, 35)[None]
    logits, plain = model(ids).logits, type(model).__mro__[1].forward(model, ids).logits
    torch.testing.assert_close(logits, plain * 0.5)
    with pytest.raises(ModelError, match="--trust-remote-code"):
        perplexity(out, [text], seq_len=32, windows=1, device="cpu")
    (score,) = perplexity(out, [text], seq_len=32, windows=1, device="cpu", trust_remote_code=True)
    assert score.perplexity > 1
    export(out, dense, "dense", trust_remote_code=True)
    again = AutoModelForCausalLM.from_pretrained(dense, trust_remote_code=True)
    torch.testing.assert_close(again(ids).logits, logits, rtol=1e-3, atol=1e-3)
