"""Log-probabilities against the plainest way to compute them."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
)

from lillama.errors import ModelError, ProbeError
from lillama.probing.likelihood import Likelihood, Tokens, encode_pairs, likelihoods, score
from lillama.probing.scorer import Scorer, load_scorer, scored_kind
from lillama.system.progress import silent

CPU = torch.device("cpu")
TEXTS = ["a cat", "a dog sleeps", "le chien", "é", "a cat", "the red hen eats", "x"]


@pytest.mark.parametrize("batch_tokens", [None, 1, 20])
def test_a_causal_model_is_asked_token_by_token(tiny, batch_tokens):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    found = likelihoods(load_scorer(tiny, CPU, batch_tokens), TEXTS, silent)
    assert list(found) == list(dict.fromkeys(TEXTS))
    for text, likelihood in found.items():
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            wanted = -F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
        assert likelihood.total == pytest.approx(wanted, rel=1e-5)
        assert len(likelihood.tokens.places) == len(text.encode())


def test_without_bos_the_first_token_is_not_scored(tiny):
    scorer = load_scorer(tiny, CPU)
    with_bos = likelihoods(scorer, ["abc"], silent)["abc"]
    scorer.tokenizer.bos_token = None
    found = likelihoods(scorer, ["abc", "abd"], silent)
    assert found["abc"].tokens == Tokens(with_bos.tokens.ids[1:], (1, 2))
    with pytest.raises(
        ProbeError, match=r"1 texts have no token .*: without a BOS token the first is not scored; .* 'x'"
    ):
        likelihoods(scorer, ["abc", "x"], silent)


@pytest.mark.parametrize("batch_tokens", [None, 1])
def test_a_masked_model_is_asked_one_mask_at_a_time(bert, batch_tokens):
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(bert), AutoTokenizer.from_pretrained(bert)
    found = likelihoods(load_scorer(bert, CPU, batch_tokens), TEXTS, silent)
    for text, likelihood in found.items():
        ids = torch.tensor(tokenizer(text)["input_ids"])
        assert (ids[0], ids[-1]) == (0, 1)  # added, and never scored
        wanted = 0.0
        for place in range(1, len(ids) - 1):
            masked = ids.clone()
            masked[place] = tokenizer.mask_token_id
            with torch.no_grad():
                wanted += model(masked[None]).logits[0, place].log_softmax(-1)[ids[place]].item()
        assert likelihood.total == pytest.approx(wanted, rel=1e-5)
        assert len(likelihood.tokens.places) == len(ids) - 2


def test_scores_divide_by_units():
    found = Likelihood(-12.0, Tokens((0, 1, 2, 3), (1, 2, 3)))
    assert score("sum", "token", "k a t", found) == -12.0
    assert [score("mean", unit, "le chat", found) for unit in ("token", "char", "word", "phoneme")] == [
        -4,
        -12 / 7,
        -6,
        -6,
    ]
    assert score("penalised", "word", "chat", found) == -12.0
    assert score("penalised", "word", "a b c d e f g", found) == pytest.approx(-12.0 / 2**0.8)


def test_texts_longer_than_the_context_are_refused(tiny, bert):
    for model, room in ((tiny, 127), (bert, 38)):
        scorer = load_scorer(model, CPU)
        assert math.isfinite(likelihoods(scorer, ["a" * room], silent)["a" * room].total)
        with pytest.raises(
            ProbeError, match=rf"2 texts are longer than the {scorer.longest} tokens .* 'b+(\.\.\.)?'; leave"
        ):
            likelihoods(scorer, ["a", "b" * (room + 1), "c" * (room + 2)], silent)


def test_infinite_answers_are_refused(make_model):
    folder = make_model()
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match="log-probabilities of 2 texts are not finite, the first is 'ab'"):
        likelihoods(load_scorer(folder, CPU), ["ab", "cd"], silent)


def test_special_tokens_of_a_causal_tokenizer_are_added_once(tiny):
    scorer = load_scorer(tiny, CPU)
    (tokens,) = encode_pairs(scorer, ["ab"])
    assert tokens.ids.count(scorer.tokenizer.bos_token_id) == 1 and tokens.places == (1, 2)


def test_models_without_a_head_are_refused(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    small = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    for number, model in enumerate(
        (BertModel(BertConfig(**small)), LlamaForSequenceClassification(LlamaConfig(**small)))
    ):
        model.save_pretrained(tmp_path / str(number))
        tokenizer.save_pretrained(tmp_path / str(number))
        with pytest.raises(ModelError, match=f"{type(model).__name__} has no language-modelling head"):
            load_scorer(tmp_path / str(number), CPU)
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        scored_kind(T5Config(architectures=["T5ForConditionalGeneration"]))
    configs = BertConfig(), BertConfig(is_decoder=True), LlamaConfig()
    assert [scored_kind(config).predicts for config in configs] == ["masked", "next", "next"]


def test_a_checkpoint_that_lacks_the_head_is_refused(make_model):
    folder = make_model()
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=weights)
    with pytest.raises(ModelError, match=r"tensor lm_head\.weight is missing from the weights"):
        load_scorer(folder, CPU)


def test_what_a_scorer_needs(tiny, bert, make_model, tmp_path):
    with pytest.raises(ProbeError, match="batch_tokens is 0"):
        load_scorer(tiny, CPU, 0)
    assert isinstance(load_scorer(bert, CPU), Scorer)
    AutoModelForMaskedLM.from_pretrained(bert).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="the tokenizer has no mask token"):
        load_scorer(tmp_path, CPU)
    damaged = make_model()
    (damaged / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="damaged or truncated"):
        load_scorer(damaged, CPU)
