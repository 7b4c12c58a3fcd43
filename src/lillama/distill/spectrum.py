"""The largest singular values of a student's factorised linears: a watch over training that runs away."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lillama.modeling.linear import LowRankLinear

VECTORS, ROUNDS = 8, 12


def largest_singular_values(student: nn.Module) -> dict[str, float]:
    """Return name of a factorised linear -> largest singular value of `left @ right`."""
    layers = ((name, module) for name, module in student.named_modules() if isinstance(module, LowRankLinear))
    return {name: largest_singular_value(layer.left.weight, layer.right.weight) for name, layer in layers}


@torch.no_grad()
def largest_singular_value(left: Float[Tensor, "out r"], right: Float[Tensor, "r in"]) -> float:
    """Return the largest singular value of `left @ right` by subspace iteration (arXiv 0909.4061, algorithm 4.4).

    It costs as much as a few hundred tokens, and errs from below: by up to 2 % where hundreds of singular values are
    nearly as large, by next to nothing where they fall.

    Examples:
        >>> round(largest_singular_value(torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2)), 4)
        3.0
    """
    left, right = left.float(), right.float()
    vectors, generator = min(VECTORS, *left.shape, *right.shape), torch.Generator().manual_seed(0)
    basis = torch.randn(right.shape[1], vectors, generator=generator).to(right.device)
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(right.T @ (left.T @ (left @ (right @ basis)))).Q
    return torch.linalg.matrix_norm(left @ (right @ basis), 2).item()
