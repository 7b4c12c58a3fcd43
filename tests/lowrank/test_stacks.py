"""What is computed of several weights at once is what is computed of each alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lillama.lowrank import student as compressed
from lillama.lowrank.batching import STACK_BYTES, stacks
from lillama.lowrank.factors import Factors, spectrum, truncated_svd, two_sided_svd, whitened_svd
from lillama.lowrank.gram import TILE, Gram, Moments
from lillama.lowrank.initialisers import Random, Scaled, Svd, TwoSided, Whitened

SHAPES = [(7, 12), (12, 7), (9, 9), (TILE + 3, 20)]


def moments_of(out: int, width: int, seed: int, widest: int | None = None) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    pair = [Gram.zeros(n, torch.device("cpu"), w) for n, w in ((width, None), (out, widest))]
    for gram in pair[: 2 - seed % 2]:  # now and then the gradients are all 0
        gram.add(torch.randn(50 + seed, gram.width, generator=generator) * torch.linspace(0.1, 2, gram.width))
    return Moments(*pair)


def weights_of(out: int, width: int) -> list[Tensor]:
    return [torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


WAYS: dict[str, Callable[[Tensor, Moments], Factors]] = {
    "svd": lambda w, m: truncated_svd(w, 4),
    "whitened": lambda w, m: whitened_svd(w, m.inputs, 4, 1e-3),
    "two-sided": lambda w, m: two_sided_svd(w, m.inputs, m.gradients, 4, 1e-3, 0.1),
    "sums": lambda w, m: two_sided_svd(w, m.inputs.sum, m.gradients.sum, 4, 1e-3, 0.1),
}


@pytest.mark.parametrize("widest", [None, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_factors(way: str, shape: tuple[int, int], widest: int | None) -> None:
    weights, moments = weights_of(*shape), [moments_of(*shape, seed, widest) for seed in range(3)]
    together = WAYS[way](torch.stack(weights), Moments.stack(moments))
    for weight, found, left, right in zip(weights, moments, together.left, together.right, strict=True):
        alone = WAYS[way](weight, found)
        torch.testing.assert_close(left @ right, alone.left @ alone.right)


@pytest.mark.parametrize("widest", [None, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_spectra(shape: tuple[int, int], widest: int | None) -> None:
    weights, moments = weights_of(*shape), [moments_of(*shape, seed, widest) for seed in range(3)]
    both = Moments.stack(moments)
    together = spectrum(torch.stack(weights), both.inputs, both.gradients)
    for weight, found, values in zip(weights, moments, together, strict=True):
        torch.testing.assert_close(values, spectrum(weight, found.inputs, found.gradients), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("init", [Svd(), Whitened(), TwoSided(), Scaled(), Random()], ids=lambda init: init.name)
def test_a_block_whose_weights_are_stacked_gets_the_same_factors(init, monkeypatch) -> None:
    shapes = {"0": (9, 12), "1": (9, 12), "2": (12, 9), "3": (9, 12)}
    teacher = nn.ModuleDict({name: nn.Linear(width, out, bias=False) for name, (out, width) in shapes.items()})
    with torch.device("meta"):
        template = nn.ModuleDict({name: nn.Linear(width, out, bias=False) for name, (out, width) in shapes.items()})
    moments = {name: moments_of(*shape, 2 * int(name)) for name, shape in shapes.items()}
    ranks, seen = {"0": 2, "1": 4, "2": 3, "3": 1}, []

    def student() -> nn.Module:
        return compressed.build_student(template, teacher, ranks, init, moments, torch.Generator().manual_seed(0))

    def grouped(shapes, device):
        seen.append(stacks(shapes, torch.device("cuda")))
        return seen[-1]

    alone = student()
    monkeypatch.setattr(compressed, "stacks", grouped)
    together = student()
    assert seen == ([[["0", "1", "3"], ["2"]]] if init.stacks else [])
    for name in shapes:
        factors = [student.get_submodule(name) for student in (alone, together)]
        assert factors[1].left.weight.shape == (shapes[name][0], ranks[name])
        torch.testing.assert_close(*(f.left.weight @ f.right.weight for f in factors), rtol=1e-4, atol=1e-5)
    assert all(parameter.is_contiguous() for parameter in together.parameters())


def test_a_stack_with_a_gram_missing_has_none() -> None:
    moments = [moments_of(4, 6, seed=2), Moments(moments_of(4, 6, seed=4).inputs, None)]
    both = Moments.stack(moments)
    assert both.inputs is not None and both.gradients is None


def test_a_stack_takes_no_more_room_than_it_may() -> None:
    side = 2048
    groups = stacks({str(n): (side, side) for n in range(9)}, torch.device("cuda"))
    assert [len(group) for group in groups] == [4, 4, 1]
    assert 4 * 8 * (2 * side) ** 2 <= STACK_BYTES
    assert stacks({"big": (10**5, 10**5)}, torch.device("cuda")) == [["big"]]
