"""Samples tell what was asked and what both write, and nothing twice."""

import pytest
import torch
from tests.conftest import byte_tokenizer

from lillama.evaluation.continuation_samples import Sample, samples

TOKENIZER = byte_tokenizer()


def ids(*texts: str) -> torch.Tensor:
    return torch.tensor([TOKENIZER(text)["input_ids"] for text in texts])


@pytest.mark.parametrize(
    ("model", "dense", "expected"),
    [
        (" sat up", " sat on", Sample("the cat", " sat ", "on", "up")),
        (" sat on", " sat on", Sample("the cat", " sat on", "", "")),
        ("s", " ", Sample("the cat", "", " ", "s")),
        ("é", "è", Sample("the cat", "", "è", "é")),  # they part in the middle of a letter
    ],
)
def test_texts_part_where_the_tokens_do(model, dense, expected):
    assert samples(TOKENIZER, ids("the cat"), ids(model), ids(dense)) == (expected,)


def test_a_letter_cut_by_the_prompt_belongs_to_what_follows():
    whole = ids("été")
    (found,) = samples(TOKENIZER, whole[:, :4], whole[:, 4:], whole[:, 4:])
    assert found == Sample("ét", "é", "", "")


def test_a_few_are_kept_from_all_over_the_text():
    prompts = ids(*(f"{index:02}" for index in range(10)))
    found = samples(TOKENIZER, prompts, prompts, prompts.flip(1))
    assert [sample.prompt for sample in found] == ["00", "02", "05", "07"]
    assert len(samples(TOKENIZER, prompts[:3], prompts[:3], prompts[:3])) == 3
