from collections.abc import Callable

import pytest

from lillama.model.spec import BlockSpec, LinearSpec, ModelSpec


@pytest.fixture
def made_up() -> Callable[..., ModelSpec]:
    """Make a spec of equal blocks: `made_up(blocks, {"up": (out, in), ...}, others in a block, outside blocks)`."""

    def make(count: int, linears: dict[str, tuple[int, int]], others: int = 0, outside: int = 0) -> ModelSpec:
        blocks = tuple(
            BlockSpec(
                f"layers.{i}",
                i,
                others + sum(out * width for out, width in linears.values()),
                tuple(LinearSpec(f"layers.{i}.{name}", *shape) for name, shape in linears.items()),
            )
            for i in range(count)
        )
        return ModelSpec("MadeUp", 64, "bfloat16", 2, outside + sum(block.params for block in blocks), blocks)

    return make
