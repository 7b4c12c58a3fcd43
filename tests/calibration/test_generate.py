from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, MambaConfig

from lillama.calibration import generate as module
from lillama.calibration.generate import generate
from lillama.errors import ModelError
from lillama.system import memory
from lillama.system.progress import Progress


def test_shape_and_vocabulary(model_path, tokenizer):
    ids = generate(model_path, tokenizer, 100, 16, seed=0)
    assert ids.shape == (6, 16) and ids.dtype == torch.int64
    assert int(ids.min()) >= 0 and int(ids.max()) < len(tokenizer)
    assert not ids.is_inference() and not ids.requires_grad


def test_same_seed_same_text_other_seed_other_text(model_path, tokenizer):
    first, again, other = (generate(model_path, tokenizer, 64, 16, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_global_random_state_is_neither_used_nor_changed(model_path, tokenizer):
    torch.manual_seed(5)
    first = generate(model_path, tokenizer, 64, 16, seed=1)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(first, generate(model_path, tokenizer, 64, 16, seed=1))


def test_the_batch_size_does_not_choose_the_text(model_path, tokenizer, monkeypatch):
    whole = generate(model_path, tokenizer, 7 * 16, 16, seed=0)
    monkeypatch.setattr(module, "BATCH", 3)
    assert torch.equal(whole, generate(model_path, tokenizer, 7 * 16, 16, seed=0))


def test_a_cold_model_writes_its_most_probable_text(model_path, tokenizer):
    ids = generate(model_path, tokenizer, 60, 20, seed=0, temperature=1e-4)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model_path).eval()(ids, use_cache=False).logits
    assert torch.equal(logits[:, :-1, : len(tokenizer)].argmax(dim=-1), ids[:, 1:])


def test_tokens_follow_the_models_probabilities(model_path, tokenizer):
    """The second token's frequencies agree with the model's distribution, given the first, within five deviations."""
    starter = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    with_bos(starter)
    ids = generate(model_path, starter, 8000, 2, seed=0, temperature=0.3)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model_path).eval()(ids[:1, :1]).logits[0, 0, : len(tokenizer)]
    wanted = (logits / 0.3).softmax(dim=-1)
    found = torch.bincount(ids[:, 1], minlength=len(tokenizer)) / len(ids)
    assert ((found - wanted).abs() <= 5 * (wanted / len(ids)).sqrt() + 1e-6).all()


def with_bos(tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])


def test_starts_with_what_the_tokenizer_starts_with_else_at_random(model_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    random = generate(model_path, tokenizer, 40 * 4, 4, seed=0)[:, 0]
    assert len(set(random.tolist())) > 20
    with_bos(tokenizer)
    assert (generate(model_path, tokenizer, 40 * 4, 4, seed=0)[:, 0] == 0).all()


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=258, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1),
        MambaConfig(vocab_size=258, hidden_size=16, num_hidden_layers=2, state_size=4),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures_write_as_they_read(tmp_path, tokenizer, config):
    """What the cache makes the model write is what it finds most probable without a cache."""
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ids = generate(tmp_path, tokenizer, 36, 12, seed=0, temperature=1e-4)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids, use_cache=False).logits
    assert torch.equal(logits[:, :-1, : len(tokenizer)].argmax(dim=-1), ids[:, 1:])


def test_weights_that_do_not_fit_are_spread_and_write_the_same(model_path, tokenizer, monkeypatch):
    whole = generate(model_path, tokenizer, 64, 16, seed=0)
    monkeypatch.setattr(memory, "free_memory", lambda device: 100)
    assert torch.equal(whole, generate(model_path, tokenizer, 64, 16, seed=0))


def test_progress_counts_tokens(model_path, tokenizer):
    told: list[Progress] = []
    generate(model_path, tokenizer, 64, 16, seed=0, report=told.append)
    done = [progress.done for progress in told]
    assert done == sorted(done) and done[-1] == told[-1].total == told[-1].tokens == 64


def refuses(error: type[Exception], call, *words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_errors_are_one_line(tmp_path, model_path, tokenizer):
    refuses(ModelError, lambda: generate(model_path, tokenizer, 130, 65, seed=0), "seq_len is 65", "64 positions")
    refuses(ModelError, lambda: generate(tmp_path / "none", tokenizer, 64, 16, seed=0), "none", "config.json")
    LlamaConfig(vocab_size=258, hidden_size=64).save_pretrained(tmp_path / "hollow")
    refuses(ModelError, lambda: generate(tmp_path / "hollow", tokenizer, 64, 16, seed=0), "hollow", "safetensors")


def test_a_model_that_is_not_finite_is_refused(tmp_path, model_path, tokenizer):
    for file in model_path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refuses(ModelError, lambda: generate(tmp_path, tokenizer, 64, 16, seed=0), "not finite")


@pytest.mark.assets
def test_a_real_model_writes_sensible_text(assets):
    folder = assets / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = generate(folder, tokenizer, 32 * 128, 128, seed=0)
    words = Counter(" ".join(tokenizer.batch_decode(ids)).lower().split())
    assert {"the", "and", "was", "to"} <= {word for word, _ in words.most_common(12)}
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids, labels=ids).loss
    assert 1.0 < float(loss) < 1.6  # nats a token; the stories it was trained on: about 1.3
