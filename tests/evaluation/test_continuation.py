"""Prompts and greedy continuations."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lillama.errors import ModelError, ResourceError
from lillama.evaluation.continuation import continuations, continue_prompts, cut_prompts, repetition
from lillama.evaluation.windows import Windows
from lillama.model.load import load, refuse_too_large
from lillama.system import memory
from lillama.system.progress import silent

CPU = torch.device("cpu")


@pytest.mark.parametrize("stride", [None, 64, 20, 5])
def test_prompts_do_not_overlap(stride):
    ids = torch.arange(1000).unfold(0, 100, stride or 100)
    prompts = cut_prompts(Windows("a", ids, 1.0, stride), 1000)
    assert prompts.shape[1] == 32 and len(prompts) >= 7
    assert len(prompts.unique()) == prompts.numel()
    assert (prompts.diff(dim=1) == 1).all()  # each is one piece of the text
    assert len(cut_prompts(Windows("a", ids, 1.0, stride), 3)) == 3


def test_a_short_text_is_one_prompt():
    assert cut_prompts(Windows("a", torch.arange(9)[None], 1.0), 32).tolist() == [list(range(9))]


def test_continuations_are_the_likeliest_tokens_and_do_not_end(make_model):
    folder = make_model(eos_token_id=[7, 100])
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompts = torch.randint(258, (5, 6), generator=torch.Generator().manual_seed(0))
    ids = prompts
    with torch.no_grad():
        for _ in range(20):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    model.generation_config.eos_token_id = ids[0, 8].item()  # a model that would stop soon
    model.save_pretrained(folder)
    written = continuations({"model": folder}, {"a": prompts}, 20, CPU, silent)
    assert written["model"]["a"].equal(ids[:, 6:])


def test_equality_ends_at_the_first_difference():
    dense = torch.arange(10).expand(3, 10)
    model = dense.clone()
    model[1, 4], model[2, 0] = 99, 99
    found = continue_prompts(model, dense)
    assert found.leading.tolist() == [1.0, 0.4, 0.0] and found.equal.tolist() == [1.0, 0.0, 0.0]


def test_repetition_counts_what_stood_before():
    cycle = torch.tensor([0, 1] * 16)
    assert repetition(torch.stack([torch.arange(32), cycle])).tolist() == [0.0, pytest.approx(27 / 29)]


def test_models_that_do_not_fit_or_do_not_load_are_refused(tiny, make_model, monkeypatch):
    broken = make_model()
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="model folder with weights is needed"):
        load(broken, CPU)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    with pytest.raises(ResourceError, match=r"take \d+ kB on cpu, where 1 kB are free"):
        refuse_too_large(tiny, CPU)
