"""The head, a few tokens at a time, gives what the whole model gives."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
)

from lillama.stream.activations import ActivationPlacement, StoreFactory
from lillama.stream.batch import Batch
from lillama.stream.capture import begin
from lillama.stream.head import NO_LABEL, Head, next_tokens
from lillama.stream.model import open_streamed

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
GATED = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "Llama": lambda: LlamaConfig(**GATED),
    "Llama, tied": lambda: LlamaConfig(**GATED, tie_word_embeddings=True),
    "Gemma2, its logits capped": lambda: Gemma2Config(
        **GATED, head_dim=8, sliding_window=4, final_logit_softcapping=2.0
    ),
    "OPT, its outputs projected": lambda: OPTConfig(
        **SHAPE, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=16
    ),
    "GPT-NeoX": lambda: GPTNeoXConfig(**SHAPE, intermediate_size=48),
    "Bloom": lambda: BloomConfig(**SHAPE),
}
MASK = torch.ones(4, 10, dtype=torch.bool)
MASK[1, :4] = False
MASK[3, 7:] = False


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "padded"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_equals_the_whole_model(kind: str, mask: Tensor | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval().requires_grad_(False)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(3, 97, (4, 10))
    own, teacher = torch.randn(4, 10, 32, requires_grad=True), torch.randn(4, 10, 32)
    divergence, entropy = whole(model, ids, mask, own, teacher)
    (0.7 * divergence + 0.3 * entropy).backward()

    streamed = open_streamed(tmp_path / "model", CPU)
    batch, new = (
        Batch.of_tokens(ids, mask),
        StoreFactory(ActivationPlacement(CPU, tmp_path, 0, 1 << 30), torch.float32, "hidden"),
    )
    calls, _ = begin(streamed, batch, new, 4)
    head = Head(streamed, streamed.outside(head=True), calls, logit_bytes=4 * 97 * 3)
    for part in (head, replace(head, logit_bytes=1 << 20)):
        found = part.compare(batch, own.detach(), teacher, (0.7, 0.3))
        torch.testing.assert_close(found.sums, torch.stack([divergence, entropy]).detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.gradient, own.grad, rtol=1e-4, atol=1e-5)
    assert head.compare(batch, own.detach(), teacher, None).gradient is None
    assert head.compare(batch, teacher, teacher, None).sums[0].abs() < 1e-4


def whole(model, ids: Tensor, mask: Tensor | None, own: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return divergence and cross-entropy, summed, from transformers' own forward passes."""
    stack = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)

    def logits(hidden: Tensor) -> Tensor:
        hook = stack[-1].register_forward_hook(
            lambda _, __, out: (hidden, *out[1:]) if isinstance(out, tuple) else hidden
        )
        with hook:
            return model(ids, attention_mask=None if mask is None else mask.long(), use_cache=False).logits

    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    found, wanted = logits(own).log_softmax(-1), logits(teacher).log_softmax(-1)
    divergence = (wanted.exp() * (wanted - found)).sum(-1)[real].sum()
    followed = real[:, :-1] & real[:, 1:]
    return divergence, F.nll_loss(found[:, :-1][followed], ids[:, 1:][followed], reduction="sum")


def test_at_most_so_many_logits_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["Llama"]())
    model.save_pretrained(tmp_path / "model")
    streamed = open_streamed(tmp_path / "model", CPU)
    ids, sizes = torch.randint(3, 97, (4, 10)), []
    batch, new = (
        Batch.of_tokens(ids),
        StoreFactory(ActivationPlacement(CPU, tmp_path, 0, 1 << 30), torch.float32, "hidden"),
    )
    head = Head(streamed, streamed.outside(head=True), begin(streamed, batch, new, 4)[0], logit_bytes=4 * 97 * 3)
    softmax = F.log_softmax
    monkeypatch.setattr(F, "log_softmax", lambda x, **kwargs: sizes.append(x.numel()) or softmax(x, **kwargs))
    head.compare(batch, torch.randn(4, 10, 32), torch.randn(4, 10, 32), (1.0, 0.0))
    assert max(sizes) <= 97 * 3 and sum(sizes) == 2 * 97 * 40


def test_a_token_is_predicted_only_where_there_is_a_next_one() -> None:
    ids, mask = torch.arange(1, 11).view(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    assert next_tokens(ids, None).tolist() == [[2, 3, 4, 5, NO_LABEL], [7, 8, 9, 10, NO_LABEL]]
    real = next_tokens(ids, mask)[mask]
    assert real.tolist() == [4, 5, NO_LABEL, 7, 8, NO_LABEL]
