import pytest
import torch
from torch import Tensor

from lillama.lowrank.factors import truncated_svd, two_sided_svd, whitened_svd
from lillama.lowrank.gram import Gram, Moments
from lillama.lowrank.initialisers import Initialiser, Random, Scaled, Svd, TwoSided, Whitened

INITIALISERS: tuple[Initialiser, ...] = (Svd(), Scaled(), Whitened(), TwoSided(), Random())


def gram_of(x: Tensor) -> Gram:
    gram = Gram.zeros(x.shape[1], x.device)
    gram.add(x)
    return gram


@pytest.fixture
def moments(generator: torch.Generator) -> Moments:
    inputs = torch.randn(80, 24, generator=generator) * torch.linspace(0.1, 3, 24)
    gradients = torch.randn(80, 16, generator=generator) * torch.linspace(2, 0.1, 16)
    return Moments(gram_of(inputs), gram_of(gradients))


@pytest.mark.parametrize("init", INITIALISERS, ids=lambda init: init.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_initialiser_needs_what_it_says_and_gives_finite_factors_of_the_rank(
    init: Initialiser, dtype: torch.dtype, moments: Moments, generator: torch.Generator
) -> None:
    weight = torch.randn(16, 24, generator=generator).to(dtype)
    needed = Moments(moments.inputs if init.needs_gram else None, moments.gradients if init.needs_gradient else None)
    factors = init(weight, 5, needed, generator)
    assert factors.left.shape == (16, 5) and factors.right.shape == (5, 24)
    assert factors.left.isfinite().all() and factors.right.isfinite().all()
    if needed != Moments():
        with pytest.raises(ValueError, match=f"{init.name} needs the Gram matrix"):
            init(weight, 5, Moments(), generator)


def test_svd_and_whitened_are_what_they_say(moments: Moments, generator: torch.Generator) -> None:
    weight = torch.randn(16, 24, generator=generator)
    assert torch.equal(Svd()(weight, 5, Moments(), generator).left, truncated_svd(weight, 5).left)
    assert moments.inputs is not None
    wanted = whitened_svd(weight, moments.inputs.sum, 5, 1e-3)
    assert torch.equal(Whitened(damping=1e-3)(weight, 5, moments, generator).left, wanted.left)


def test_two_sided_goes_from_both_grams_to_whitened(moments: Moments, generator: torch.Generator) -> None:
    weight = torch.randn(16, 24, generator=generator)
    assert moments.inputs is not None and moments.gradients is not None
    products = {}
    for identity in (0.0, 0.5, 1.0):
        factors = TwoSided(identity=identity)(weight, 5, moments, generator)
        products[identity] = factors.left @ factors.right
    both = two_sided_svd(weight, moments.inputs.sum, moments.gradients.sum, 5)
    whitened = whitened_svd(weight, moments.inputs.sum, 5)
    torch.testing.assert_close(products[0.0], both.left @ both.right)
    torch.testing.assert_close(products[1.0], whitened.left @ whitened.right)
    distance = (products[0.0] - products[1.0]).norm()
    assert (products[0.5] - products[1.0]).norm() < 0.9 * distance and distance > 0.1


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_two_sided_mixes_the_identity_into_the_gradients_gram(
    shape: tuple[int, int], generator: torch.Generator
) -> None:
    weight = torch.randn(shape, generator=generator)
    inputs, gradients = (
        gram_of(torch.randn(80, n, generator=generator) * torch.linspace(2, 0.1, n)) for n in shape[::-1]
    )
    mixed = 0.7 * gradients.sum + 0.3 * gradients.mean_eigenvalue * torch.eye(shape[0], dtype=torch.float64)
    wanted = two_sided_svd(weight, inputs.sum, mixed, 5)
    found = TwoSided(identity=0.3)(weight, 5, Moments(inputs, gradients), generator)
    torch.testing.assert_close(found.left @ found.right, wanted.left @ wanted.right, rtol=1e-4, atol=1e-5)


def test_scaled_is_plain_svd_of_the_weight_times_the_mean_magnitudes(generator: torch.Generator) -> None:
    weight, x = torch.randn(16, 24, generator=generator), torch.randn(80, 24, generator=generator)
    x *= torch.logspace(0, 3, 24)
    factors = Scaled(alpha=0.5)(weight, 5, Moments(gram_of(x)), generator)
    scales = x.double().abs().mean(dim=0).sqrt()
    plain = truncated_svd(weight.double() * scales, 5)
    torch.testing.assert_close(factors.left @ factors.right * scales, plain.left @ plain.right, rtol=1e-4, atol=1e-4)
    unscaled = Scaled(alpha=0.0)(weight, 5, Moments(gram_of(x)), generator)
    torch.testing.assert_close(unscaled.left @ unscaled.right, (lambda f: f.left @ f.right)(truncated_svd(weight, 5)))


def test_scaled_survives_an_input_that_is_always_zero(generator: torch.Generator) -> None:
    x = torch.randn(80, 24, generator=generator)
    x[:, 3] = 0
    factors = Scaled()(torch.randn(16, 24, generator=generator), 5, Moments(gram_of(x)), generator)
    assert factors.left.isfinite().all() and factors.right.isfinite().all()


def test_random_has_the_mean_square_of_the_weight_and_obeys_its_generator() -> None:
    weight = 0.3 * torch.randn(400, 300, generator=torch.Generator().manual_seed(1))
    first, again = (Random()(weight, 50, Moments(), torch.Generator().manual_seed(2)) for _ in range(2))
    product = first.left @ first.right
    assert product.pow(2).mean().item() == pytest.approx(weight.pow(2).mean().item(), rel=0.05)
    assert torch.equal(first.left, again.left) and torch.equal(first.right, again.right)
    other = Random()(weight, 50, Moments(), torch.Generator().manual_seed(3))
    assert not torch.equal(first.left, other.left)
