import pytest
import torch

from lillama.system import memory
from lillama.system.memory import MemoryBudget, tokens_of_logits

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """A machine with an accelerator of 40 free GB and a host of 100."""
    free = {"cpu": 100, "cuda": 40, "mps": 100}
    monkeypatch.setattr(memory, "free_memory", lambda device: free[device.type] * 10**9)


@pytest.mark.parametrize(("device", "processes", "device_gb", "host_gb"), [
    ("cpu", 1, 100, 100), ("cpu", 4, 25, 25), ("mps", 2, 50, 50), ("cuda:0", 1, 40, 100), ("cuda:0", 4, 40, 25),
])  # fmt: skip
def test_processes_share_the_host_and_not_the_accelerators(machine, device, processes, device_gb, host_gb):
    found = MemoryBudget.of(torch.device(device), processes)
    assert found == MemoryBudget(device_gb * 10**9, host_gb * 10**9)


@pytest.mark.parametrize("free", [0, 7, 10**3, 10**11 + 3])
def test_what_lies_in_memory_together_takes_at_most_seven_eighths(free):
    budget = MemoryBudget(free, 3 * free)
    learners = budget.learners(1)
    assert budget.graphs(learners) == budget.moments  # which follow upon each other
    assert 0 <= budget.graphs(2 * learners) <= budget.graphs(0) <= budget.moments + learners
    assert 8 * (budget.activations + budget.learners(1) + budget.kept_blocks(1) + budget.moments) <= 7 * free


def test_memory_is_ample_at_twice_what_is_needed_on_the_device_and_on_the_host():
    assert MemoryBudget(200, 200).is_ample_for(100)
    assert not MemoryBudget(199, 400).is_ample_for(100) and not MemoryBudget(400, 199).is_ample_for(100)


def test_a_whole_model_leaves_room_to_compute():
    assert MemoryBudget(100, 0).holds_model(80) and not MemoryBudget(100, 0).holds_model(81)


def test_some_logits_are_computed_at_once_however_many_words_there_are():
    assert tokens_of_logits(10**12) == 1
    assert 4 * 1000 * tokens_of_logits(1000) <= memory.LOGIT_BYTES < 4 * 1000 * (tokens_of_logits(1000) + 1)
