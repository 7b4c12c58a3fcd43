from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, OPTConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from lillama.lowrank.install import install
from lillama.lowrank.permute import absorb
from lillama.lowrank.pivot import in_order, pivot_rows
from lillama.lowrank.student import load_student


class Mlp(nn.Module):
    """As in GPT-2: `scale` stands for a parameter that belongs to the channels between the two linears."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.c_fc, self.act, self.c_proj = nn.Linear(12, 30), nn.GELU(), nn.Linear(30, 12)
        self.scale = nn.Parameter(torch.rand(30)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.c_fc(x))
        return self.c_proj(y if self.scale is None else y * self.scale)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = [part(x).unflatten(-1, (3, 4)).transpose(1, 2) for part in (self.q, self.k, self.v)]
        return self.o(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def llama() -> nn.Module:
    config = LlamaConfig(hidden_size=16, intermediate_size=28, num_attention_heads=4, mlp_bias=True)
    config._attn_implementation = "sdpa"
    return LlamaDecoderLayer(config, 0).mlp


def opt() -> nn.Module:
    config = OPTConfig(hidden_size=16, ffn_dim=28, num_attention_heads=4, dropout=0.0)
    config._attn_implementation = "sdpa"
    return OPTDecoderLayer(config)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, int], set[str]]] = {
    "gpt-2": (lambda: Mlp(False), {"c_fc": 5, "c_proj": 4}, {"c_fc"}),
    "the reader is dense": (lambda: Mlp(False), {"c_fc": 5}, {"c_fc"}),
    "llama": (llama, {"gate_proj": 5, "up_proj": 6, "down_proj": 4}, {"up_proj"}),
    "a dense sibling": (llama, {"gate_proj": 5}, {"gate_proj"}),
    "opt": (opt, {"fc1": 5, "fc2": 6, "self_attn.v_proj": 3, "self_attn.out_proj": 3}, {"fc1"}),
    "attention": (Attention, {"q": 3, "k": 4, "v": 5, "o": 6}, set()),
    "a parameter of the channels": (lambda: Mlp(True), {"c_fc": 5, "c_proj": 4}, set()),
    "full rank has no order": (lambda: Mlp(False), {"c_fc": 30}, {"c_fc"}),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_an_order_is_absorbed_where_the_outputs_stay_and_nowhere_else(case: str) -> None:
    make, ranks, wanted = CASES[case]
    torch.manual_seed(0)
    template = make().eval()
    student = make().eval()
    install(student, ranks)
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = dict(student.state_dict())
    before = {name: tensor.clone() for name, tensor in state.items()}
    rows = {name: pivot_rows(state[f"{name}.left.weight"])[0] for name in ranks}
    absorb(template, ranks, state, rows)
    assert {name for name, order in rows.items() if in_order(order)} == wanted
    assert all(torch.equal(state[name], before[name]) for name in state) is (not wanted or case.startswith("full"))
    x = torch.randn(2, 6, next(m for m in student.modules() if isinstance(m, nn.Linear)).in_features)
    after = load_student(template, ranks, state, torch.device("cpu"), torch.float32)
    outputs = [module(x)[0] if case == "opt" else module(x) for module in (student, after)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for name, order in rows.items():  # what the rows mean has moved along with them
        left = state[f"{name}.left.weight"]
        assert torch.linalg.matrix_rank(left[order[: ranks[name]]].double()) == ranks[name]
