"""The Python of docs/using.md runs as printed, from top to bottom, beside a folder `compressed`."""

import re
import shutil
from pathlib import Path

import pytest
from tests.hub.conftest import Saved
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAGE = Path(__file__).parents[2] / "docs" / "using.md"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # Trainer's, without a GPU
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own business
def test_snippets_run(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code_cache: None) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved.folder, tmp_path / "compressed")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "Once": 3, "upon": 4, "a": 5, "time": 6}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path / "compressed")
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(snippets) > 5
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(snippet, names)
    assert {"adapter", "compressed-and-tuned", "portable", "dense"} <= {path.name for path in tmp_path.iterdir()}
