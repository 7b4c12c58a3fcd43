"""Neurons that are left out: the account of errors, the refit, the order."""

import pytest
import torch
from torch import Tensor

from lillama.lowrank.gram import Gram
from lillama.lowrank.neurons import LEAST, eliminate, refit, step_of

TINY = 1e-12  # damping that does not count


def gram_of(x: Tensor) -> Gram:
    gram = Gram.zeros(x.shape[1], torch.device("cpu"))
    gram.add(x.double())
    return gram


def made(neurons: int = 48, out: int = 20, tokens: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight, activations that depend on each other, gradients."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(neurons, neurons, generator=generator).double() / neurons**0.5
    h = torch.randn(tokens, neurons, generator=generator).double() @ mixing * torch.linspace(0.1, 1, neurons).double()
    weight = torch.randn(out, neurons, generator=generator).double()
    gradients = torch.randn(tokens, out, generator=generator).double() * torch.linspace(0.2, 2, out).double()
    return weight, h, gradients


def weighted_error(change: Tensor, h: Tensor, gradients: Tensor) -> Tensor:
    return ((gradients @ change) @ h.T).square().sum()


def test_the_error_of_each_step_is_that_of_the_refitted_weight() -> None:
    weight, h, gradients = made()
    found = eliminate(weight, gram_of(h), gram_of(gradients), TINY)
    for steps in range(1, len(found.errors)):
        gone = found.order[: steps * found.step]
        kept = torch.tensor([index for index in range(48) if index not in gone.tolist()])
        small = torch.zeros_like(weight)
        small[:, kept] = refit(weight, gram_of(h), kept, TINY)
        torch.testing.assert_close(found.errors[steps], weighted_error(weight - small, h, gradients), rtol=1e-6, atol=0)


def test_the_refit_is_the_least_squares_solution() -> None:
    weight, h, _ = made()
    kept = torch.arange(5, 40)
    wanted = torch.linalg.lstsq(h[:, kept], h @ weight.T).solution.T
    torch.testing.assert_close(refit(weight, gram_of(h), kept, TINY), wanted, rtol=1e-6, atol=1e-8)
    everything = torch.arange(48)
    torch.testing.assert_close(refit(weight, gram_of(h), everything), weight)


def test_neurons_that_nobody_misses_go_first() -> None:
    weight, h, gradients = made()
    h[:, 7] = 0  # never active
    h[:, 11] = 2 * h[:, 30]  # the double of another one
    weight[:, 20] = 0  # of no effect
    order = eliminate(weight, gram_of(h), gram_of(gradients)).order[:8].tolist()
    assert {7, 20} <= set(order) and (11 in order) != (30 in order)
    found = eliminate(weight, gram_of(h), gram_of(gradients))
    assert found.errors[0] == 0 and (found.errors.diff() >= 0).all()
    assert (
        len(found.order) == len(set(found.order.tolist())) == found.step * (len(found.errors) - 1) <= (1 - LEAST) * 48
    )


def test_what_the_outputs_do_not_need_does_not_count() -> None:
    """Of two halves of the outputs, each fed by neurons of its own, one is of no weight."""
    _, h, gradients = made(neurons=32, out=8)
    weight = torch.zeros(8, 32).double()
    weight[:4, :16], weight[4:, 16:] = torch.eye(16).double()[:4] * 5, torch.eye(16).double()[:4]
    gradients[:, :4] = 0
    order = eliminate(weight, gram_of(h), gram_of(gradients)).order
    assert not {16, 17, 18, 19} & set(order[:16].tolist())


def test_a_gram_of_which_the_diagonal_is_known_will_do() -> None:
    weight, h, gradients = made()
    diagonal = Gram.zeros(20, torch.device("cpu"), widest=8)
    diagonal.add(gradients)
    assert diagonal.diagonal
    whole = gram_of(gradients)
    whole = Gram([t * 0 for t in whole.tiles], whole.absolute, whole.count)
    for start, tile in enumerate(whole.tiles):
        tile.diagonal().add_(diagonal.tiles[0][start * 256 : start * 256 + len(tile)])
    one, other = (eliminate(weight, gram_of(h), gram) for gram in (diagonal, whole))
    torch.testing.assert_close(one.errors, other.errors, rtol=1e-8, atol=1e-9)


def test_nothing_is_known_of_activations_that_are_always_zero() -> None:
    weight, h, gradients = made()
    found = eliminate(weight, gram_of(h * 0), gram_of(gradients))
    torch.testing.assert_close(found.errors, torch.zeros_like(found.errors) + found.errors)
    assert torch.isfinite(found.errors).all()


@pytest.mark.parametrize(("neurons", "step"), [(8, 8), (56, 8), (512, 8), (1536, 16), (11008, 128), (14336, 128)])
def test_steps_are_powers_of_two(neurons: int, step: int) -> None:
    assert step_of(neurons) == step
