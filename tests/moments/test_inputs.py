import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lillama.errors import ModelError
from lillama.modeling.experts import Experts
from lillama.moments.inputs import collect_input_moments
from lillama.stream.calls import BlockArgs


class Split(nn.Module):
    """Two linears that share their input, and one with its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden):
        return self.o(self.q(hidden) * self.k(hidden))


def test_grams_sum_the_real_tokens_of_all_batches():
    torch.manual_seed(0)
    block, x = Split(), torch.randn(6, 5, 4)
    mask = torch.rand(6, 5) > 0.3
    runs = [(BlockArgs(), x[:4], mask[:4]), (BlockArgs(), torch.where(mask[4:, :, None], x[4:], 1e6), mask[4:])]
    grams = collect_input_moments(block, ["q", "k", "o"], runs)
    real = x[mask].double()
    torch.testing.assert_close(grams["q"].sum, real.T @ real, rtol=1e-5, atol=1e-5)
    assert grams["q"].count == int(mask.sum())
    assert grams["k"] is grams["q"]
    inner = (block.q(x) * block.k(x))[mask].double()
    torch.testing.assert_close(grams["o"].sum, inner.T @ inner, rtol=1e-5, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_without_a_mask_every_token_counts():
    torch.manual_seed(0)
    block, x = Split(), torch.randn(6, 5, 4)
    whole = collect_input_moments(block, ["o"], [(BlockArgs(), x, None)])
    parts = collect_input_moments(block, ["o"], [(BlockArgs(), part, None) for part in x.split(2)])
    torch.testing.assert_close(whole["o"].sum, parts["o"].sum, rtol=1e-5, atol=1e-6)
    assert whole["o"].count == parts["o"].count == 30


@pytest.mark.parametrize("value", [1e30, float("nan")])
def test_values_whose_squares_are_no_numbers_are_refused_by_name(value):
    x = torch.randn(6, 5, 4)
    x[3, 2, 1] = value
    with pytest.raises(ModelError, match=r"q: what enters it .* too large on the calibration text"):
        collect_input_moments(Split(), ["q"], [(BlockArgs(), x, None)])


def routed_block() -> tuple[nn.Module, Experts]:
    """Return a block of four experts, whose router sends a token to the expert that its first number names, and to 3."""
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=4, intermediate_size=6, num_local_experts=4, num_experts_per_tok=2)
    with torch.no_grad():
        fused = MixtralExperts(config)
        for parameter in fused.parameters():
            nn.init.normal_(parameter)
    experts = Experts(fused)

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, hidden):
            flat = hidden.flatten(0, 1)
            first = flat[:, 0].long()
            chosen = torch.stack([first, torch.full_like(first, 3)], dim=1)
            return self.experts(flat, chosen, torch.full_like(chosen, 0.5, dtype=flat.dtype)).view_as(hidden)

    return Routed(), experts


def test_an_expert_is_measured_on_the_real_tokens_sent_to_it_and_drawn_to_its_layers_mean():
    block, _ = routed_block()
    x = torch.randn(5, 7, 4)
    x[..., 0] = torch.randint(0, 2, (5, 7))  # nothing comes to expert 2
    mask = torch.rand(5, 7) > 0.3
    names = [f"experts.{index}.{leaf}" for index in range(4) for leaf in ("gate_up", "down")]
    found = collect_input_moments(block, names, [(BlockArgs(), x[:3], mask[:3]), (BlockArgs(), x[3:], mask[3:])])
    real = x[mask].double()
    sent = {0: real[real[:, 0] == 0], 1: real[real[:, 0] == 1], 2: real[:0], 3: real}
    layer = sum(rows.T @ rows for rows in sent.values()) / sum(len(rows) for rows in sent.values())
    for index, rows in sent.items():
        gram = found[f"experts.{index}.gate_up"]
        torch.testing.assert_close(gram.sum, rows.T @ rows + 4 * layer, rtol=1e-5, atol=1e-5)
        assert gram.count == len(rows) + 4
    assert found["experts.2.down"].sum.shape == (6, 6) and found["experts.2.down"].count == 6


def test_a_linear_that_is_never_called_is_named():
    block = Split()
    block.unused = nn.Linear(4, 4)
    with pytest.raises(ModelError, match=r"unused is not called as a module .* --ignore '\*unused'"):
        collect_input_moments(block, ["q", "unused"], [(BlockArgs(), torch.randn(2, 3, 4), None)])
