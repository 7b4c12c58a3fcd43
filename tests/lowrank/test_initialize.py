import pytest
import torch

from lillama.lowrank.factors import Gram, truncated_svd, whitened_svd
from lillama.lowrank.initialize import Initialiser, Random, Svd, Whitened

INITIALISERS: tuple[Initialiser, ...] = (Svd(), Whitened(), Random())


@pytest.fixture
def gram(generator: torch.Generator) -> Gram:
    gram = Gram.zeros(24, torch.device("cpu"))
    gram.add(torch.randn(80, 24, generator=generator) * torch.linspace(0.1, 3, 24))
    return gram


@pytest.mark.parametrize("init", INITIALISERS, ids=lambda init: init.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_initialiser_gives_finite_factors_of_the_rank(
    init: Initialiser, dtype: torch.dtype, gram: Gram, generator: torch.Generator
) -> None:
    weight = torch.randn(16, 24, generator=generator).to(dtype)
    factors = init(weight, 5, gram if init.needs_gram else None, generator)
    assert factors.left.shape == (16, 5) and factors.right.shape == (5, 24)
    assert factors.left.isfinite().all() and factors.right.isfinite().all()


def test_svd_and_whitened_are_what_they_say(gram: Gram, generator: torch.Generator) -> None:
    weight = torch.randn(16, 24, generator=generator)
    assert torch.equal(Svd()(weight, 5, None, generator).left, truncated_svd(weight, 5).left)
    assert torch.equal(
        Whitened(damping=1e-3)(weight, 5, gram, generator).left, whitened_svd(weight, gram.sum, 5, 1e-3).left
    )


def test_whitened_refuses_to_work_without_a_gram(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="needs the Gram"):
        Whitened()(torch.ones(3, 4), 2, None, generator)


def test_random_has_the_mean_square_of_the_weight_and_obeys_its_generator() -> None:
    weight = 0.3 * torch.randn(400, 300, generator=torch.Generator().manual_seed(1))
    first, again = (Random()(weight, 50, None, torch.Generator().manual_seed(2)) for _ in range(2))
    product = first.left @ first.right
    assert product.pow(2).mean().item() == pytest.approx(weight.pow(2).mean().item(), rel=0.05)
    assert torch.equal(first.left, again.left) and torch.equal(first.right, again.right)
    other = Random()(weight, 50, None, torch.Generator().manual_seed(3))
    assert not torch.equal(first.left, other.left)
