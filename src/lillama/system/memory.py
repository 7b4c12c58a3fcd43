"""How the free memory is shared out among all that may lie in it at the same time.

In eighths of what was free when work began: activations between blocks 2, learners 3, dense blocks 1, moments 1 and, when these
are given back, the graphs of recovery 1, and what learners leave of theirs. One is left for what is at work. What finds no room
lies on disk or is computed again, to the same bits.
"""

from dataclasses import dataclass

import torch

from lillama.system.resources import free_memory

MARGIN = 0.8  # share of the free memory that the weights of a whole model may take
# Of one (tokens x vocabulary) matrix in fp32; constants, for the tokens that are computed at once decide how they round.
LOGIT_BYTES = 256 << 20
LOGIT_BYTES_IN_TRAINING = 64 << 20  # some five of them are in memory together


@dataclass(frozen=True)
class MemoryBudget:
    """The memory that was free when work began, and the share of it that each use may take.

    Free memory is asked for once: later answers would not know what was promised and is not yet taken.

    Attributes:
        device: free bytes of the device that computes.
        host: free bytes of the host; the same where the CPU computes.

    Examples:
        >>> budget = MemoryBudget(device=8_000, host=80_000)
        >>> budget.activations, budget.host_activations, budget.learners(bytes_each=1_000)
        (2000, 20000, 3)
    """

    device: int
    host: int

    @classmethod
    def of(cls, device: torch.device, processes: int = 1) -> "MemoryBudget":
        """Return the budget of a process.

        Args:
            device: that computes.
            processes: that share the host's memory; an accelerator serves one of them alone.
        """
        host = free_memory(torch.device("cpu")) // processes
        return cls(host if device.type in ("cpu", "mps") else free_memory(device), host)

    @property
    def activations(self) -> int:
        """Bytes of activations between blocks that may lie on the device."""
        return eighths(self.device, 2)

    @property
    def host_activations(self) -> int:
        """Bytes of activations between blocks that may lie in the host's memory."""
        return eighths(self.host, 2)

    @property
    def moments(self) -> int:
        """Bytes of second moments that may be kept until the factors are initialised."""
        return eighths(self.device, 1)

    def graphs(self, learners: int) -> int:
        """Return the bytes of autograd's graphs that recovery may keep, where its learners take so many bytes."""
        return eighths(self.device, 1) + max(0, eighths(self.device, 3) - learners)

    def learners(self, bytes_each: int) -> int:
        """Return how many blocks under training may stay in memory."""
        return eighths(self.device, 3) // bytes_each

    def kept_blocks(self, bytes_each: int) -> int:
        """Return how many dense blocks may stay in memory beside those under training."""
        return eighths(self.device, 1) // bytes_each

    def is_ample_for(self, needed: int) -> bool:
        """Tell whether twice as many bytes are free; where they are not, memory is saved at the cost of time."""
        return needed <= min(eighths(self.device, 4), eighths(self.host, 4))

    def holds_model(self, weights: int) -> bool:
        """Tell whether the weights of a whole model, in bytes, leave room to compute with them."""
        return weights <= MARGIN * self.device


def eighths(free: int, count: int) -> int:
    """Return so many eighths of a number of bytes; every share comes from here."""
    return free * count // 8


def tokens_of_logits(vocabulary: int, nbytes: int = LOGIT_BYTES) -> int:
    """Return how many tokens' logits, in fp32, a matrix of some bytes holds; at least one."""
    return max(1, nbytes // (4 * vocabulary))
