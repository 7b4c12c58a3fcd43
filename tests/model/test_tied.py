import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lillama.model.checkpoint import SINGLE, CheckpointReader
from lillama.model.skeleton import skeleton
from lillama.model.tied import untie
from lillama.model.weights import Weights, fill_module

Save = Callable[..., tuple[PreTrainedModel, Path]]
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})


def opened(model: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, Weights]:
    reader, empty = CheckpointReader(folder), skeleton(model.config)
    untie(empty, reader)
    return empty, Weights.of(empty, reader)


def whole(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    empty, weights = opened(model, folder)
    return fill_module(empty, "", weights, torch.device("cpu"), torch.float32)  # pyright: ignore


def test_a_head_of_its_own_is_kept_and_counted(saved: Save, caplog: pytest.LogCaptureFixture) -> None:
    model, folder = saved(LlamaConfig, tie_word_embeddings=True)
    change(folder, lambda t: t.update({HEAD: t[EMBEDDINGS] * 0.5}))
    empty, weights = opened(model, folder)
    assert {HEAD, EMBEDDINGS} <= set(weights.sources)
    assert sum(p.numel() for p in empty.parameters()) == sum(p.numel() for p in model.parameters()) + 96 * 32
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and HEAD in record.getMessage() and EMBEDDINGS in record.getMessage()
    ids = torch.arange(3, 13)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(whole(model, folder)(ids).logits, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_equal_head_stays_tied(dtype: torch.dtype, saved: Save, caplog: pytest.LogCaptureFixture) -> None:
    model, folder = saved(LlamaConfig, tie_word_embeddings=True)
    change(folder, lambda t: t.update({HEAD: t[EMBEDDINGS].to(dtype, copy=True)}))
    read = whole(model, folder)
    assert read.get_output_embeddings().weight is read.get_input_embeddings().weight
    assert HEAD not in opened(model, folder)[1].sources and not caplog.records  # nor is it spoken of as left over


def test_one_number_decides(saved: Save) -> None:
    model, folder = saved(LlamaConfig, tie_word_embeddings=True)
    other = load_file(folder / SINGLE)[EMBEDDINGS].clone()
    other.view(-1)[-1] += 1e-3
    change(folder, lambda t: t.update({HEAD: other}))
    assert torch.equal(whole(model, folder).get_output_embeddings().weight, other)


TIES = {
    "encoder apart": ("encoder.embed_tokens.weight",),
    "decoder and head apart": ("decoder.embed_tokens.weight", "lm_head.weight"),
    "shared name missing": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "-shared.weight"),
    "only the head is stored": ("lm_head.weight", "-shared.weight"),
}


@pytest.mark.parametrize("case", TIES)
def test_every_tie_ends_as_in_transformers(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    for name in TIES[case]:
        if name.startswith("-"):
            change(tmp_path, lambda t, name=name: t.pop(name[1:]))
        else:
            change(tmp_path, lambda t, name=name: t.update({name: torch.randn(40, 16)}))
    ours, theirs = whole(model, tmp_path), AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    names = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    for name in names:
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name)), name
    for one in names:
        for other in names:
            same = ours.get_parameter(one) is ours.get_parameter(other)
            assert same == (theirs.get_parameter(one) is theirs.get_parameter(other)), (one, other)
