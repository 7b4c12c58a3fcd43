"""Which sequences are trained on, in which order, and which are not."""

import pytest
import torch

from lillama.distill.split import Batches, Split

SPLIT = Split.of(24, 0.2, seed=0)


@pytest.mark.parametrize(("total", "share", "held"), [(2, 0.01, 1), (10, 0.2, 2), (3, 0.9, 2), (1, 0.5, 1)])
def test_split_holds_out_at_least_one_and_not_all(total, share, held):
    split = Split.of(total, share, seed=3)
    assert len(split.held_out) == held
    if total > 1:
        assert sorted([*split.train.tolist(), *split.held_out.tolist()]) == list(range(total))
    assert Split.of(100, 0.2, 1).held_out.tolist() != Split.of(100, 0.2, 2).held_out.tolist()


def test_held_out_sequences_are_never_trained_on():
    batches = Batches(SPLIT.train, epochs=3, size=5, seed=4)
    seen = list(batches)
    assert len(seen) == len(batches)
    for epoch in range(3):
        rows = torch.cat(seen[epoch * 4 : epoch * 4 + 4]).tolist()
        assert sorted(rows) == SPLIT.train.tolist()
    assert not set(torch.cat(seen).tolist()) & set(SPLIT.held_out.tolist())
    assert not torch.equal(torch.cat(seen[:4]), torch.cat(seen[4:8]))


def test_a_part_is_split_as_the_whole_is() -> None:
    part = SPLIT.part(10)
    assert len(part) == 10 and part.tolist() == sorted(part.tolist())
    inner = SPLIT.within(part)
    assert len(inner.held_out) == 2 and len(SPLIT.held_out) == 5  # of 10, and of 24
    assert set(part[inner.held_out].tolist()) <= set(SPLIT.held_out.tolist())
    assert set(part[inner.train].tolist()) <= set(SPLIT.train.tolist()) and len(inner.train) == 8
    assert SPLIT.part(24).tolist() == list(range(24))
    assert [len(split) for split in vars(SPLIT.within(SPLIT.part(1))).values()] == [1, 1]
    alone = Split.of(1, 0.5, 0)
    assert alone.part(1).tolist() == alone.within(alone.part(1)).train.tolist() == [0]
