"""Parts of a Llama's block made smaller two matrices at a time, as MoDeGPT does (arXiv 2408.09632): functions on tensors.

Weights are those of `nn.Linear`, out x in, the transposes of the paper's. All is computed in fp64 from second moments, which
may be sums or means.

Type I, the FFN: `k` neurons are kept by ridge leverage scores, and down is refitted by least squares (Nystroem).
Type II, queries and keys: pairs of a head's dimensions, as rotary embeddings turn them, are kept by CR decomposition.
Type III, values and outputs: the best product of two smaller matrices, by SVD.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lillama.lowrank.eigen import eigh

RIDGES = (1e-4, 1e-2, 1.0)  # of the leverage scores, as shares of the mean eigenvalue
DAMPING = 1e-6  # of the least squares, a share likewise
LEAST = 1e-12  # of an eigenvalue of the values, as a share of the largest


@dataclass(frozen=True)
class Neurons:
    """What is known of the neurons of an FFN: second moments of their activations, and the orders in which they may be kept.

    Attributes:
        gram: without negative eigenvalues.
        orders: the neurons by their ridge leverage scores, the highest first, for each ridge.
    """

    gram: Float[Tensor, "n n"]
    orders: tuple[Int[Tensor, " n"], ...]

    @classmethod
    def of(cls, gram: Float[Tensor, "n n"]) -> "Neurons":
        """Order neurons by the leverage scores `diag(G (G + r I)^-1)` of the second moments `G` of their activations."""
        values, q = eigh(gram)
        values = values.clamp(min=0)
        unit = values.mean().item() or 1.0
        scores = [q.square() @ (values / (values + ridge * unit)) for ridge in RIDGES]
        return cls((q * values) @ q.T, tuple(one.argsort(descending=True) for one in scores))


@dataclass(frozen=True)
class SmallerFfn:
    """The neurons of an FFN that are kept.

    Attributes:
        kept: their indices.
        down: the weight behind them.
        error: squared error of the outputs, summed over the tokens that the second moments are of.
    """

    kept: Int[Tensor, " k"]
    down: Float[Tensor, "out k"]
    error: float


def reduce_ffn(neurons: Neurons, down: Float[Tensor, "out n"], width: int) -> SmallerFfn:
    """Keep the `width` neurons of the order that leaves the least error, and refit the weight behind them."""
    return min((refit(neurons.gram, down, order[:width]) for order in neurons.orders), key=lambda found: found.error)


def refit(gram: Float[Tensor, "n n"], down: Float[Tensor, "out n"], kept: Int[Tensor, " k"]) -> SmallerFfn:
    """Give the neurons `S` that are kept the work of the others `R`.

    The least squares solution `(G_SS)^-1 (G_SS W_S + G_SR W_R)` (transposed: the paper's `(S^T C S)^-1 S^T C W_D`) is
    written as `W_S + (G_SS)^-1 G_SR W_R`, which leaves `W` as it is where nothing is removed, however small eigenvalues are.
    """
    kept = kept.sort().values
    gone = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    gone[kept] = False
    weight = down.to(gram)
    own, lost = gram[kept][:, kept], weight[:, gone].T
    if not gone.any():
        return SmallerFfn(kept, weight, 0.0)
    cross = gram[kept][:, gone] @ lost
    floor = DAMPING * gram.diagonal().mean().item() or 1.0
    taken = torch.cholesky_solve(cross, torch.linalg.cholesky(own + floor * torch.eye(len(own)).to(own)))
    error = (lost * (gram[gone][:, gone] @ lost)).sum() - 2 * (taken * cross).sum() + (taken * (own @ taken)).sum()
    return SmallerFfn(kept, weight[:, kept] + taken.T, max(error.item(), 0.0))


def score_pairs(
    queries: Float[Tensor, "heads dims"], keys: Float[Tensor, "groups dims"]
) -> Float[Tensor, "groups pairs"]:
    """Return what each pair of dimensions adds to the scores of attention, at most.

    The paper ranks a dimension by `||C_Q^(1/2)[:, i]|| ||C_K^(1/2)[:, i]||`, the root of the product of its second moments in
    queries and keys; over the heads that share keys squares are summed up. Rotary embeddings turn dimensions i and
    i + dims / 2 into each other, so that both are kept or none: their moments are summed up, which no rotation changes.

    Args:
        queries: second moment of each dimension.
        keys: likewise; each group belongs to as many heads, one after the other.
    """
    half = keys.shape[1] // 2
    q, k = (moments[:, :half] + moments[:, half:] for moments in (queries, keys))
    return (q.view(len(k), -1, half).sum(dim=1) * k).sqrt()


@dataclass(frozen=True)
class SmallerValues:
    """Values and outputs of heads that share their values.

    Attributes:
        value: weight of the values.
        outputs: weight behind the values, for each head.
    """

    value: Float[Tensor, "rank in"]
    outputs: Float[Tensor, "heads out rank"]


def reduce_values(
    inputs: Float[Tensor, "in in"],
    value: Float[Tensor, "dims in"],
    outputs: Float[Tensor, "heads out dims"],
    rank: int,
) -> SmallerValues:
    """Return the smaller weights that minimise the sum over heads of `||O V X - O' V' X||^2`, `V'` being the same for all.

    The paper's two decompositions, `C^(1/2) W_V = U S V^T` and `S V^T W_O = U' S' V'^T`, with the outputs of all heads that
    share `W_V` side by side in the place of `W_O`; only matrices of a head's size are decomposed.
    """
    value, outputs = value.to(inputs), outputs.to(inputs)
    values, q = eigh(value @ inputs @ value.T)
    root = values.clamp(min=LEAST * (values[-1].item() or 1.0)).sqrt()[:, None]
    both = (root * q.T) @ torch.einsum("hod,hoe->de", outputs, outputs) @ (q * root.T)
    turn = eigh(both)[1][:, -rank:].flip(-1)
    return SmallerValues((q / root.T @ turn).T @ value, outputs @ ((q * root.T) @ turn))
