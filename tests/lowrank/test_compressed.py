"""A student is its teacher but for the linears that are factorised."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lillama.lowrank.gram import Gram, Moments
from lillama.lowrank.initialisers import Svd, Whitened
from lillama.lowrank.install import low_rank_linears
from lillama.lowrank.student import build_student, load_student

FULL = {"up": 12, "part.down": 12}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 20)
        self.part = nn.ModuleDict({"down": nn.Linear(20, 12), "gate": nn.Linear(12, 12, bias=False)})
        self.register_buffer("scale", torch.full((12,), 0.7))
        self.register_buffer("turn", torch.full((12,), 1.3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.part["down"](torch.relu(self.up(self.norm(x)))) * self.turn
        return x + self.scale * self.part["gate"](y)


@pytest.fixture
def teacher() -> Block:
    torch.manual_seed(0)
    block = Block().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


@pytest.fixture
def template(teacher: Block) -> nn.Module:
    """The same block with its parameters on the meta device, as `skeleton` leaves it."""
    template = copy.deepcopy(teacher)
    for module in template.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
    return template


def student(template: nn.Module, teacher: nn.Module, ranks: dict[str, int]) -> nn.Module:
    return build_student(template, teacher, ranks, Svd(), {}, torch.Generator())


def test_full_rank_reproduces_the_teacher(template: nn.Module, teacher: Block) -> None:
    x = torch.randn(3, 5, 12)
    copied = student(template, teacher, FULL)
    assert [name for name, _ in low_rank_linears(copied)] == ["up", "part.down"]
    torch.testing.assert_close(copied(x), teacher(x), rtol=1e-4, atol=1e-5)


def test_biases_and_all_else_are_copied_bit_by_bit_into_memory_of_their_own(
    template: nn.Module, teacher: Block
) -> None:
    copied = student(template, teacher, {"up": 3})
    state, wanted = copied.state_dict(), teacher.state_dict()
    assert set(state) == set(wanted) | {"up.left.weight", "up.right.weight"}
    assert state["up.weight"].shape == (0,) and state["up.left.weight"].shape == (20, 3)
    for name in set(wanted) - {"up.weight"}:
        assert torch.equal(state[name], wanted[name]) and state[name].data_ptr() != wanted[name].data_ptr()
    assert torch.equal(copied.get_buffer("turn"), teacher.turn)
    assert all(parameter.is_meta for parameter in template.parameters())


def test_a_student_is_fp32_whatever_the_teacher(template: nn.Module, teacher: Block) -> None:
    low = student(template, teacher.bfloat16(), {"up": 3})
    assert {parameter.dtype for parameter in low.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in low.parameters())
    assert torch.equal(low.get_parameter("up.bias"), teacher.up.bias.float())


def test_each_linear_gets_its_own_gram(template: nn.Module, teacher: Block) -> None:
    seen = torch.tensor([1.0] * 2 + [0.0] * 10, dtype=torch.float64)
    gram = Gram.zeros(12, torch.device("cpu"))
    gram.add(torch.diag(seen))
    moments = {"up": Moments(gram)}
    copied = build_student(template, teacher, {"up": 2}, Whitened(), moments, torch.Generator())
    product = copied.get_parameter("up.left.weight") @ copied.get_parameter("up.right.weight")
    torch.testing.assert_close(product[:, :2], teacher.up.weight[:, :2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_comes_back_from_its_state(template: nn.Module, teacher: Block, dtype: torch.dtype) -> None:
    ranks = {"up": 3, "part.gate": 4}
    copied = student(template, teacher, ranks)
    back = load_student(template, ranks, copied.state_dict(), torch.device("cpu"), dtype)
    assert set(back.state_dict()) == set(copied.state_dict())
    parameters = {name for name, _ in back.named_parameters()}
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, copied.state_dict()[name].to(dtype if name in parameters else None))
    if dtype == torch.float32:
        x = torch.randn(2, 12)
        torch.testing.assert_close(back(x), copied(x))


def test_a_state_with_a_hole_is_not_restored(template: nn.Module, teacher: Block) -> None:
    state = student(template, teacher, {"up": 3}).state_dict()
    del state["up.left.weight"]
    with pytest.raises(RuntimeError, match=r"up\.left\.weight"):
        load_student(template, {"up": 3}, state, torch.device("cpu"), torch.float32)
