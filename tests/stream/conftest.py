from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lillama.stream.activations import Shelf


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def shelf(tmp_path: Path) -> Callable[[str], Shelf]:
    """Make a shelf on which stores go to `host` or to `disk`."""

    def make(place: str) -> Shelf:
        host_bytes = {"host": 10**9, "disk": 0}[place]
        return Shelf(torch.device("cpu"), tmp_path / "scratch", 0, host_bytes)

    return make
