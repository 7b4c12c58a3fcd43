"""A small benchmark of our own, and tables as other systems write them."""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from tests.conftest import byte_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

WriteTable = Callable[..., Path]
RULES = """
name: farm
files: [farm.csv]
good: sentence
bad: non sentence
optional: [subtype]
pair: [type, id]
average: [[type, id]]
groups: {type: {}, subtype: {}}
"""
PAIRS = [
    {"id": "1", "type": "number", "sentence": "the cow eats", "non sentence": "the cow eat"},
    {"id": "2", "type": "number", "sentence": "the pigs eat", "non sentence": "the pigs eats"},
    {"id": "3", "type": "order", "sentence": "the red hen", "non sentence": "the hen red"},
]


@pytest.fixture
def write_table(tmp_path: Path) -> WriteTable:
    """Return a function that writes a table."""

    def write(name: str, rows: Sequence[Mapping[str, object]], separator: str = ",") -> Path:
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=separator, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return tmp_path / name

    return write


@pytest.fixture
def farm(tmp_path: Path, write_table: WriteTable) -> Path:
    """A benchmark file with its data beside it."""
    write_table("farm.csv", PAIRS)
    (tmp_path / "farm.yaml").write_text(RULES, encoding="utf-8")
    return tmp_path / "farm.yaml"


def masked_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that fills masks."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = masked_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=24, max_position_embeddings=40, initializer_range=0.3)  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def official(example: str) -> Path:
    """Return the folder of one of BabySLM's official examples; the test is skipped where it is not there."""
    assets = Path(os.environ.get("LILLAMA_ASSETS", Path(__file__).parents[2].parent / "shared" / "assets"))
    folder = assets / "minimal_pairs" / "babyslm" / example
    if not folder.is_dir():
        pytest.skip(f"official example not found at {folder}; set LILLAMA_ASSETS")
    return folder


@pytest.fixture
def babyberta() -> Path:
    """BabySLM's official example for the syntactic task."""
    return official("babyberta_syntactic_dev")


@pytest.fixture
def librivox() -> Path:
    """BabySLM's official example for the lexical task: its table of trials, its overall figure and its breakdowns."""
    return official("librivox_lexical_dev")
