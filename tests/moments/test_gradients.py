"""The forward and backward pass, block by block, gives what plain autograd through the whole model gives."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, T5Config, T5ForConditionalGeneration
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4ForCausalLM

from lillama.moments.gradients import BackwardRun, collect_block_moments, collect_gradient_moments
from lillama.stream.activations import ActivationPlacement
from lillama.stream.batch import Batch
from lillama.stream.calls import BlockArgs
from lillama.stream.draw import draw
from lillama.stream.model import open_streamed
from lillama.system.progress import silent

CPU = torch.device("cpu")
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")


def by_autograd(folder, ids, mask, generator):
    """Return the moments of every linear by hooks on transformers' own model, with the same sampled labels."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(name):
        def keep(module, args, output):
            output.requires_grad_()
            output.retain_grad()
            kept[name] = args[0].detach(), output

        return keep

    names = [f"model.layers.{index}.{linear}" for index in range(3) for linear in LINEARS]
    for name in names:
        model.get_submodule(name).register_forward_hook(hook(name))
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    logits = model(ids, attention_mask=real.long()).logits[real]
    probabilities = logits.detach().softmax(-1)
    labels = torch.cat(
        [draw(part, torch.rand(len(part), generator=generator)) for part in probabilities.split(ids.shape[1])]
    )
    torch.nn.functional.cross_entropy(logits, labels[:, 0], reduction="sum").backward()
    found = {}
    for name in names:
        x, output = kept[name]
        x, g = x[real].double(), output.grad[real].double()
        found[name] = x.T @ x, g.T @ g
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("disk", [False, True])
def test_moments_are_those_of_autograd(tiny, tmp_path, padded, disk):
    torch.manual_seed(0)
    ids, mask = torch.randint(3, 200, (5, 12)), None
    if padded:
        mask = torch.arange(12)[None] < torch.tensor([12, 7, 12, 3, 9])[:, None]
    model, found = open_streamed(tiny, CPU), {}

    def visit(index, block, moments):
        found.update({f"model.layers.{index}.{name}": value for name, value in moments.items()})

    rows = torch.tensor([3, 1, 0, 4])
    placement = ActivationPlacement(CPU, tmp_path, 0, 0 if disk else 1 << 30)
    fisher = collect_gradient_moments(
        model, Batch.of_tokens(ids, mask), rows, placement, 4, torch.Generator().manual_seed(1), lambda index: LINEARS, visit,
        silent,
    )  # fmt: skip
    wanted = by_autograd(tiny, ids[rows], None if mask is None else mask[rows], torch.Generator().manual_seed(1))
    assert set(found) == set(wanted)
    for name, (inputs, gradients) in wanted.items():
        torch.testing.assert_close(found[name].inputs.sum, inputs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].gradients.sum, gradients, rtol=1e-3, atol=1e-6)
        assert found[name].inputs.count == (48 if mask is None else int(mask[rows].sum()))
    fisher.remove()
    assert not list(tmp_path.glob("fisher-?.activations"))


@pytest.mark.parametrize("disk", [False, True])
def test_moments_computed_again_are_the_same_bits(tiny, tmp_path, disk):
    """In whatever order blocks are asked for, though their sequences are some of many, in another order."""
    torch.manual_seed(0)
    ids, first = torch.randint(3, 200, (7, 12)), {}
    batch, placement = Batch.of_tokens(ids, None), ActivationPlacement(CPU, tmp_path, 0, 0 if disk else 1 << 30)
    model, rows = open_streamed(tiny, CPU), torch.tensor([3, 1, 6, 0, 4])
    fisher = collect_gradient_moments(
        model, batch, rows, placement, 2, torch.Generator().manual_seed(1), lambda index: LINEARS,
        lambda index, block, moments: first.update({index: moments}), silent,
    )  # fmt: skip
    for index in (1, 2, 0, 2):
        again = fisher.moments(index, model.block(index), LINEARS[1:])
        assert set(again) == set(LINEARS[1:])
        for name, found in again.items():
            for one, other in zip((found.inputs, found.gradients), (first[index][name].inputs, first[index][name].gradients),
                                  strict=True):  # fmt: skip
                assert all(torch.equal(*tiles) for tiles in zip(one.tiles, other.tiles, strict=True))
    fisher.remove()
    assert not list(tmp_path.glob("probes-*"))


def test_of_two_calls_the_last_one_counts_and_what_nothing_hangs_on_has_no_gradient():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.idle = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, hidden):
            self.idle(hidden)
            return 3 * self.twice(self.twice(hidden))

    torch.manual_seed(0)
    block, hidden, gradient = Odd().requires_grad_(False), torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    runs = [BackwardRun(BlockArgs(), hidden[i : i + 1], (None,), gradient[i : i + 1]) for i in range(2)]
    found = collect_block_moments(block, ["twice", "idle"], runs, tokens=10)
    flat, entered = 3 * gradient.flatten(0, 1).double(), block.twice(hidden).flatten(0, 1).double()
    torch.testing.assert_close(found["twice"].gradients.sum, flat.T @ flat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["twice"].inputs.sum, entered.T @ entered, rtol=1e-5, atol=1e-5)
    assert not found["idle"].gradients.sum.any() and found["idle"].gradients.count == 10 and found["idle"].share == 1


def test_gradients_cross_from_the_decoder_to_the_encoder(tmp_path):
    """At the encoder's linears they are those of autograd through the whole model, cross-attention and all."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=60, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, decoder_start_token_id=0)
    whole = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    for parameter in whole.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    whole.save_pretrained(tmp_path / "model")
    inputs = {"input_ids": torch.randint(2, 60, (5, 9)), "decoder_input_ids": torch.randint(2, 60, (5, 6))}
    batch, found = Batch(inputs, inputs["decoder_input_ids"]), {}
    model, names = open_streamed(tmp_path / "model", CPU), ["layer.0.SelfAttention.v"]

    def visit(index, block, moments):
        found.update({f"{model.names[index]}.{name}": value for name, value in moments.items()})

    placement = ActivationPlacement(CPU, tmp_path, 0, 1 << 30)
    collect_gradient_moments(
        model,
        batch,
        torch.arange(5),
        placement,
        2,
        torch.Generator().manual_seed(1),
        lambda index: names,
        visit,
        silent,
    ).remove()

    kept = {}
    for name in found:
        whole.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: kept.update({name: output.requires_grad_()}) or output.retain_grad()
        )
    logits = whole(**inputs).logits
    generator, labels = torch.Generator().manual_seed(1), []
    for part in logits.detach().split(2):  # in the micro-batches, and a few tokens at a time, as the labels were drawn
        for tokens in part.flatten(0, 1).split(6):
            labels.append(draw(tokens.softmax(-1), torch.rand(len(tokens), generator=generator))[:, 0])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat(labels), reduction="sum").backward()
    assert len(found) == 4
    for name, value in found.items():
        gradient = kept[name].grad.flatten(0, 1).double()
        torch.testing.assert_close(value.gradients.sum, gradient.T @ gradient, rtol=1e-3, atol=1e-6)
        assert value.share == (9 / 6 if "encoder" in name else 1.0)


@pytest.mark.parametrize("padded", ["encoder and decoder", "decoder"])
def test_padding_of_either_stack_is_told_apart_where_both_are_equally_long(tmp_path, padded):
    config = T5Config(vocab_size=60, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    ids = torch.randint(2, 60, (2, 4, 7), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids[0], "decoder_input_ids": ids[1]}
    read, written = (torch.arange(7) < torch.tensor(sizes)[:, None] for sizes in ([5, 7, 2, 7], [7, 3, 6, 7]))
    masks = {0: read, 1: written} if padded.startswith("encoder") else {1: written}
    batch = Batch(given | ({"attention_mask": read.long()} if 0 in masks else {}), ids[1], masks)
    model, found = open_streamed(tmp_path / "model", CPU), {}
    names = ["layer.1.EncDecAttention.q", "layer.1.EncDecAttention.k", "layer.0.SelfAttention.k"]

    def visit(index, block, moments):
        found.update({f"{model.names[index]}.{name}": value for name, value in moments.items()})

    collect_gradient_moments(
        model, batch, torch.arange(4), ActivationPlacement(CPU, tmp_path, 0, 1 << 30), 3, torch.Generator().manual_seed(1),
        lambda index: names if index else names[2:], visit, silent,
    ).remove()  # fmt: skip
    counts = {name.removesuffix("SelfAttention.k"): moments.inputs.count for name, moments in found.items()}
    heard, own = int(read.sum()) if 0 in masks else 28, int(written.sum())
    assert counts == {
        "encoder.block.0.layer.0.": heard,
        "decoder.block.0.layer.0.": own,
        "decoder.block.0.layer.1.EncDecAttention.q": own,
        "decoder.block.0.layer.1.EncDecAttention.k": heard,
    }


def test_an_expert_counts_by_the_tokens_that_come_to_it(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    model, found = open_streamed(tmp_path / "model", CPU), {}
    batch, placement = Batch.of_tokens(torch.randint(2, 60, (4, 10))), ActivationPlacement(CPU, tmp_path, 0, 1 << 30)
    names = ["self_attn.q_proj", *(f"mlp.experts.{index}.down" for index in range(4))]
    collect_gradient_moments(
        model, batch, torch.arange(4), placement, 4, torch.Generator(), lambda index: names, lambda i, b, m: found.update(m),
        silent,
    ).remove()  # fmt: skip
    assert found["self_attn.q_proj"].share == 1
    shares = [found[name].share for name in names[1:]]
    assert sum(shares) == pytest.approx(2) and all(0 <= share <= 1 for share in shares)


def test_experts_that_are_given_all_tokens_count_those_that_were_meant_for_them(tmp_path):
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, intermediate_size_mlp=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1,
        max_position_embeddings=64,
    )  # fmt: skip
    Llama4ForCausalLM(config).save_pretrained(tmp_path / "model")
    model, found = open_streamed(tmp_path / "model", CPU), {}
    names = [f"feed_forward.experts.{index}.{leaf}" for index in range(4) for leaf in ("gate_up", "down")]
    batch, placement = Batch.of_tokens(torch.randint(2, 60, (4, 10))), ActivationPlacement(CPU, tmp_path, 0, 1 << 30)
    collect_gradient_moments(
        model, batch, torch.arange(4), placement, 4,
        torch.Generator(), lambda index: names, lambda i, b, m: found.update(m), silent,
    ).remove()  # fmt: skip
    for leaf in ("gate_up", "down"):
        moments = [found[f"feed_forward.experts.{index}.{leaf}"] for index in range(4)]
        assert sum(one.share for one in moments) == pytest.approx(1)
        assert [one.inputs.count - len(one.inputs.sum) for one in moments] == [round(40 * one.share) for one in moments]
