"""Which linears of a block are decomposed at once: on an accelerator many small matrices may take hardly longer than one."""

from collections.abc import Mapping

import torch

STACK_BYTES = 1 << 29  # of weights and Grams in fp64 that are decomposed at once on an accelerator


def stacks(shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> list[list[str]]:
    """Group linears of one shape, as many as there is room for; on a CPU each stands alone.

    Args:
        shapes: name -> out, in.
        device: that decomposes.

    Examples:
        >>> stacks({"q": (64, 64), "k": (32, 64), "o": (64, 64)}, torch.device("cuda"))
        [['q', 'o'], ['k']]
        >>> stacks({"q": (64, 64), "o": (64, 64)}, torch.device("cpu"))
        [['q'], ['o']]
    """
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, shape in shapes.items():
        alike.setdefault(shape, []).append(name)
    found: list[list[str]] = []
    for shape, names in alike.items():
        most = 1 if device.type == "cpu" else max(1, STACK_BYTES // (8 * sum(shape) ** 2))
        found += [names[start : start + most] for start in range(0, len(names), most)]
    return found
