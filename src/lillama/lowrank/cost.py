"""What it costs to decompose the linears of a block, from shapes alone."""

from lillama.model.spec import BlockSpec, LinearSpec

ELEMENTWISE = 1000  # operations of products that take as long as the scales and the steps at one number
MATRICES = 4  # in fp64, of a linear's smaller side: one to decompose, its eigenvectors, working space for two


def factor_flops(linear: LinearSpec) -> int:
    """Return about how many fp32 operations take as long as the fp64 decompositions and products of a linear."""
    least, most = sorted((linear.in_features, linear.out_features))
    return least**2 * (44 * least + 8 * most)


def rounding_flops(linear: LinearSpec, widths: int) -> float:
    """Return about how many fp32 operations take as long as rounding a linear in so many widths, with feedback."""
    columns = linear.in_features
    return 8.0 * columns**3 + widths * linear.out_features * columns * (2.0 * columns + ELEMENTWISE)


def decomposition_bytes(block: BlockSpec) -> int:
    """Return the bytes that the decomposition of a block's largest linear takes."""
    return 8 * MATRICES * max(min(linear.in_features, linear.out_features) for linear in block.linears) ** 2


def elimination_flops(neurons: int) -> float:
    """Return about how many fp32 operations take as long as finding the order in which neurons are left out, in fp64."""
    return 16.0 * neurons**3


def elimination_bytes(neurons: int) -> int:
    """Return the bytes of what is held on the way: the Gram, its factor and inverse, what is left of it, twice."""
    return 5 * 8 * neurons**2
