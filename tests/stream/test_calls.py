from typing import Any

import pytest
import torch
from torch import Tensor

from lillama.errors import ModelError
from lillama.stream.calls import BlockArgs, Rowwise, hidden_of, map_call, split_call, tree_leaves

HIDDEN = torch.ones(2, 3, 4)


def positional(hidden: Tensor, shift: float, *, scale: float = 1.0) -> Tensor:
    return hidden * scale + shift


def named(*, hidden_states: Tensor, shift: float) -> tuple[Tensor, None]:
    return hidden_states + shift, None


@pytest.mark.parametrize(
    ("block", "args", "kwargs"),
    [(positional, (HIDDEN, 2.0), {"scale": 3.0}), (named, (), {"hidden_states": HIDDEN, "shift": 2.0})],
)
def test_a_call_is_replayed_with_another_hidden_state(
    block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    hidden, call = split_call(args, kwargs)
    assert hidden is HIDDEN
    assert torch.equal(call(block, HIDDEN), hidden_of(block(*args, **kwargs)))
    assert torch.equal(call(block, 5 * HIDDEN) - call(block, HIDDEN), (4 * kwargs.get("scale", 1.0)) * HIDDEN)


def test_a_call_without_a_hidden_state_is_refused() -> None:
    with pytest.raises(ModelError, match=r"without a hidden state: arguments \['x'\]"):
        split_call((), {"x": HIDDEN})


def test_leaves_are_found_inside_tuples_lists_and_dicts_and_stay_in_place() -> None:
    call = BlockArgs((1, (2, [3, {"a": 4}])), {"b": 5, "c": None})
    assert tree_leaves([call]) == [1, 2, 3, 4, 5, None]
    doubled = map_call(lambda leaf: leaf and 2 * leaf, call)
    assert doubled == BlockArgs((2, (4, [6, {"a": 8}])), {"b": 10, "c": None})


@pytest.mark.parametrize(("shape", "dim"), [((6, 2), 0), ((3, 6), 1), ((18, 1, 2), 0), ((2, 12, 3), 1)])
def test_rows_are_cut_and_joined_along_the_dimension_that_grows(shape: tuple[int, ...], dim: int) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    mark = Rowwise(0, dim)
    rows = mark.rows(tensor, 6)
    assert len(rows) == 6 and torch.equal(mark.joined(rows), tensor)
    side = shape[dim] // 6
    assert torch.equal(mark.joined(rows[2:4]), tensor.narrow(dim, 2 * side, 2 * side))
