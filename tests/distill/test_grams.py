import torch
from torch import nn

from lillama.distill.grams import collect_grams
from lillama.stream.calls import BlockCall


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
    runs = [(BlockCall(), x[:4], mask[:4]), (BlockCall(), torch.where(mask[4:, :, None], x[4:], 1e6), mask[4:])]
    grams = collect_grams(block, ["q", "k", "o"], runs)
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
    whole = collect_grams(block, ["o"], [(BlockCall(), x, None)])
    parts = collect_grams(block, ["o"], [(BlockCall(), part, None) for part in x.split(2)])
    torch.testing.assert_close(whole["o"].sum, parts["o"].sum, rtol=1e-5, atol=1e-6)
    assert whole["o"].count == parts["o"].count == 30
