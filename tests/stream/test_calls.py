from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from lillama.errors import ModelError
from lillama.stream.calls import BlockArgs, Rowwise, hidden_of, map_call, split_call, tree_leaves

HIDDEN = torch.ones(2, 3, 4)


class Size(NamedTuple):
    height: int
    width: int


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


def test_an_output_of_a_model_is_a_tree_and_stays_what_it_is() -> None:
    output = BaseModelOutput(last_hidden_state=HIDDEN, hidden_states=(HIDDEN, 2 * HIDDEN))  # pyright: ignore
    call = BlockArgs((Size(1, 2), output), {"known": OrderedDict(a=3)})
    assert [leaf if isinstance(leaf, int) else leaf.sum().item() for leaf in tree_leaves([call])] == [
        1,
        2,
        24,
        24,
        48,
        3,
    ]
    doubled = map_call(lambda leaf: 2 * leaf, call)
    assert doubled.args[0] == Size(2, 4) and doubled.kwargs == {"known": OrderedDict(a=6)}
    assert isinstance(doubled.args[1], BaseModelOutput)
    assert torch.equal(doubled.args[1].hidden_states[1], 4 * HIDDEN)


@pytest.mark.parametrize(("shape", "dim"), [((6, 2), 0), ((3, 6), 1), ((18, 1, 2), 0), ((2, 12, 3), 1)])
def test_rows_are_cut_and_joined_along_the_dimension_that_grows(shape: tuple[int, ...], dim: int) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    mark = Rowwise(0, dim)
    rows = mark.rows(tensor, 6)
    assert len(rows) == 6 and torch.equal(mark.joined(rows), tensor)
    side = shape[dim] // 6
    assert torch.equal(mark.joined(rows[2:4]), tensor.narrow(dim, 2 * side, 2 * side))
