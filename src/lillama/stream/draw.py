"""Labels that are drawn from predictions."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

GROUP = 256  # entries of the vocabulary that are summed up first


def draw(chances: Float[Tensor, "tokens vocabulary"], uniform: Float[Tensor, " tokens"]) -> Int[Tensor, "tokens 1"]:
    """Return an entry for each token, as likely as its chances say: that in which their running sum passes a given share.

    The running sums are taken of groups first, then within the group that is met, by matrix products: these give the same bits
    each time on a GPU too, which a cumulated sum does not, and only a part of the vocabulary is looked at twice.
    `torch.multinomial` draws a random number for each entry of the vocabulary, eight times as slow on a CPU for 49,152 of them.

    Args:
        chances: none below 0; they need not sum up to 1.
        uniform: from 0 to 1, excluded.
    """
    tokens, size = chances.shape
    groups = F.pad(chances, (0, -size % GROUP)).view(tokens, -1, GROUP)
    sums = groups.sum(dim=-1)
    ends = sums @ _triangle(sums)
    share = uniform[:, None] * ends[:, -1:]
    group = _first_beyond(ends, share)
    inner = groups.gather(1, group[..., None].expand(-1, -1, GROUP))[:, 0]
    left = share - (ends - sums).gather(1, group)
    return group * GROUP + _first_beyond(inner @ _triangle(inner), left)


def _triangle(rows: Float[Tensor, "_ n"]) -> Float[Tensor, "n n"]:
    """Return the matrix that rows are multiplied with for their running sums."""
    return rows.new_ones(rows.shape[1], rows.shape[1]).triu()


def _first_beyond(ends: Float[Tensor, "tokens n"], share: Float[Tensor, "tokens 1"]) -> Int[Tensor, "tokens 1"]:
    """Return the place of the first running sum above a share; rounding never passes the last entry that has a chance."""
    below = torch.nextafter(ends[:, -1:], torch.zeros_like(share))
    return (ends <= torch.minimum(share, below)).sum(dim=1, keepdim=True)
