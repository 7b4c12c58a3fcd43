from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lillama.stream.activations import ActivationPlacement


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def placement(tmp_path: Path) -> Callable[[str], ActivationPlacement]:
    """Make a placement on which stores go to `host` or to `disk`."""

    def make(place: str) -> ActivationPlacement:
        host_bytes = {"host": 10**9, "disk": 0}[place]
        return ActivationPlacement(torch.device("cpu"), tmp_path / "scratch", 0, host_bytes)

    return make
