"""A model agrees with itself; with others as much as the full models say."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lillama.errors import DataError, ModelError
from lillama.evaluation.agreement import Protocol, agreement
from lillama.evaluation.perplexity import perplexity
from lillama.system import memory

SHORT = Protocol(seq_len=32, windows=20, prompts=8)


@pytest.fixture(scope="module")
def other(make_model):
    return make_model(seed=1)


@pytest.fixture(scope="module")
def apart(other, tiny, text):
    (found,) = agreement(other, tiny, text, SHORT, device="cpu")
    return found


def test_a_model_agrees_with_itself(tiny, text):
    (found,) = agreement(tiny, tiny, text, SHORT, device="cpu")
    for interval, value in ((found.kl, 0), (found.top1, 1), (found.excess_loss, 0), (found.excess_bits, 0)):
        assert (interval.value, interval.low, interval.high) == (value, value, value)
    assert found.calibration.model == found.calibration.dense > 0 == found.calibration.difference.value
    assert found.continuation.leading.value == found.continuation.equal.value == 1
    assert found.continuation.repetition.difference.low == found.continuation.repetition.difference.high == 0


def test_values_are_those_of_the_full_models(apart, other, tiny, text):
    ids = torch.tensor(AutoTokenizer.from_pretrained(tiny)(text.read_text())["input_ids"])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)[torch.arange(20) * (len(ids) // 32) // 20]
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(folder)(windows).logits[:, :-1].double().log_softmax(-1)
            for folder in (other, tiny)
        )
    assert apart.model.tokens == 20 * 31 and apart.windows == 20
    assert apart.kl.value == pytest.approx((theirs.exp() * (theirs - ours)).sum(-1).mean().item(), rel=1e-5)
    assert apart.top1.value == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).double().mean().item())
    losses = [-log_p.gather(2, windows[:, 1:, None]).mean().item() for log_p in (ours, theirs)]
    assert [apart.model.nll, apart.dense.nll] == pytest.approx(losses, rel=1e-6)
    assert apart.excess_loss.value == pytest.approx(math.log(apart.model.perplexity / apart.dense.perplexity), rel=1e-6)
    assert apart.excess_bits.value == pytest.approx(apart.model.bits_per_byte - apart.dense.bits_per_byte, rel=1e-6)


def test_scores_are_those_of_perplexity(apart, other, text):
    assert [apart.model] == perplexity(other, text, seq_len=32, windows=20, device="cpu")


def test_the_other_way_round_differences_change_their_sign(apart, other, tiny, text):
    (back,) = agreement(tiny, other, text, SHORT, device="cpu")
    assert back.top1 == apart.top1
    assert (back.excess_loss.value, back.excess_loss.low) == pytest.approx(
        (-apart.excess_loss.value, -apart.excess_loss.high)
    )
    assert back.continuation.equal == apart.continuation.equal
    assert back.calibration.difference.value == pytest.approx(-apart.calibration.difference.value)


def test_intervals_depend_on_the_seed_alone(apart, other, tiny, text):
    (again,) = agreement(other, tiny, text, SHORT, device="cpu", activation_memory=0)
    assert again == apart
    (another,) = agreement(other, tiny, text, replace(SHORT, seed=1, prompts=0), device="cpu")
    assert another.kl.value == apart.kl.value and another.kl.low != apart.kl.low and another.continuation is None


def test_models_that_do_not_fit_whole_are_compared_without_continuations(other, tiny, text, monkeypatch, caplog):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    (found,) = agreement(other, tiny, text, SHORT, device="cpu")
    assert found.continuation is None and found.kl.value > 0
    (line,) = caplog.messages
    assert line.startswith("no continuations: ") and "choose another --device" in line


def test_models_of_other_tokens_are_refused(make_model, tiny, text):
    with pytest.raises(ModelError, match=r"knows 300 tokens, .* 258; give --against"):
        agreement(_larger(make_model()), tiny, text, SHORT, device="cpu")
    folder = make_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    core = tokenizer.backend_tokenizer.to_str().replace('"a":', '"?":').replace('"b":', '"a":').replace('"?":', '"b":')
    (folder / "tokenizer.json").write_text(core)
    with pytest.raises(ModelError, match="cut words into different tokens"):
        agreement(folder, tiny, text, SHORT, device="cpu")


def _larger(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(300, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prompts": -1}, "prompts is -1"),
        ({"new_tokens": 3}, "new_tokens 3"),
        ({"new_tokens": 128}, "new_tokens is 128, but the model has 128 positions"),
        ({"windows": 0}, "windows is 0"),
    ],
)
def test_senseless_protocols_are_refused(tiny, text, changes, match):
    with pytest.raises(DataError, match=match):
        agreement(tiny, tiny, text, replace(SHORT, **changes), device="cpu")


def test_prompts_are_shortened_to_leave_room(tiny, text):
    protocol = replace(SHORT, seq_len=128, new_tokens=120)
    (found,) = agreement(tiny, tiny, text, protocol, device="cpu")
    assert found.continuation.prompts == 8


def test_code_of_a_model_may_run(tiny, text, tmp_path, code_cache):
    """Both models are asked with the code that lies in their folders, only where that is allowed."""
    folder = shutil.copytree(tiny, tmp_path / "odd")
    code = "from transformers import LlamaConfig\nclass Odd(LlamaConfig):\n    model_type = 'odd'\n"
    (folder / "odd.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    changes = {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd"}}
    (folder / "config.json").write_text(json.dumps(config | changes))
    few = replace(SHORT, windows=2, prompts=0)
    with pytest.raises(ModelError, match="--trust-remote-code"):
        agreement(folder, tiny, text, few, device="cpu")
    (found,) = agreement(folder, tiny, text, few, device="cpu", trust_remote_code=True)
    assert found.kl.value == 0
