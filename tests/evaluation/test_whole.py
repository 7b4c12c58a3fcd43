"""Settings for writing that transformers cannot read: refused where they count, not read where they do not."""

import json
import shutil

import pytest
import torch
from transformers import GenerationConfig

from lillama.calibration.generate import generate
from lillama.calibration.tokenizer import load_tokenizer
from lillama.errors import ModelError
from lillama.evaluation.whole import load_whole
from lillama.probing.scorer import load_scorer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "value",
    [[], None, 5, "x", {"temperature": "hot"}, {"eos_token_id": {}}, {"pad_token_id": 10**9}, {"max_length": 0},
     {"watermarking_config": 5}],
)  # fmt: skip
def test_what_is_not_needed_is_not_read(tiny, tmp_path, value):
    folder = shutil.copytree(tiny, tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    (folder / "generation_config.json").unlink()
    ids = generate(folder, tokenizer, 64, 16, seed=0)
    (folder / "generation_config.json").write_text(json.dumps(value))
    assert torch.equal(generate(folder, tokenizer, 64, 16, seed=0), ids)
    load_scorer(folder, CPU)
    load_whole(folder, CPU, GenerationConfig())


@pytest.mark.parametrize("content", ["[]", "null", "5", '{"watermarking_config": 5}', "{", "\udcff"])
def test_what_is_needed_is_refused_by_name(tiny, tmp_path, content):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "generation_config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ModelError, match=r"generation_config\.json: transformers cannot use it .*mend it") as caught:
        load_whole(folder, CPU)
    assert "\n" not in str(caught.value)
