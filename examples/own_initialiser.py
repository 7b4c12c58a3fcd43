"""Start the factors your own way: `python examples/own_initialiser.py [MODEL OUT TEXT]`.

An initialiser is a frozen dataclass that gives the factors of a weight at a rank. This one takes the rows' scales off first.
"""

import sys
from dataclasses import dataclass, replace

import lillama
from lillama.lowrank.factors import Factors, truncated_svd


@dataclass(frozen=True)
class RowScaled:
    """Truncated SVD of the weight with rows of unit length."""

    name: str = "row-scaled"
    needs_gram = needs_gradient = stacks = False  # of what it wants to see, and whether weights come stacked

    def __call__(self, weight, rank, moments, generator) -> Factors:
        """Return the factors, left @ right: (out, rank) and (rank, in)."""
        scale = weight.norm(dim=1, keepdim=True).clamp_min(1e-6)
        factors = truncated_svd(weight / scale, rank)
        return Factors(scale * factors.left, factors.right)


model, out, text = sys.argv[1:] or ("demo/model", "out/row-scaled", "demo/text.txt")
recipe = replace(lillama.load_recipe("default"), init=RowScaled())
print(lillama.compress(model, out, keep=0.8, recipe=recipe, calibration=text, tokens=2048, seq_len=128).held_out)
