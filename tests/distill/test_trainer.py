"""When a training is checked, whatever is trained."""

from pathlib import Path

import pytest
import torch

from lillama.distill.config import DistillConfig
from lillama.distill.split import Batches
from lillama.distill.trainer import Trainer


def check_steps(checks: int, steps: int) -> set[int]:
    return Trainer(Batches(torch.arange(steps), 1, 1, 0), checks, Path("nowhere")).check_steps()


def test_checks_follow_epochs_and_end_at_the_last_step():
    assert check_steps(DistillConfig(epochs=8).checks, 80) == set(range(10, 81, 10))
    assert check_steps(DistillConfig(epochs=1).checks, 10) == {3, 5, 8, 10}
    assert check_steps(DistillConfig(epochs=1).checks, 1) == {1}


@pytest.mark.parametrize("steps", [1, 3, 8, 61])
def test_the_last_step_is_checked(steps):
    checks = check_steps(8, steps)
    assert max(checks) == steps and min(checks) >= 1 and len(checks) == min(steps, 8)
