"""How the small models learn: AdamW, a linear rise of the rate, then half a cosine."""

import math
import sys
from collections.abc import Callable
from statistics import fmean

from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

WARMUP, LAST, REPORTED = 0.03, 0.02, 100


def learn(model: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float) -> None:
    """Descend a loss.

    Args:
        model: changed in place.
        loss: of a batch of its own choice.
        steps: of the optimiser.
        rate: at its highest.
    """
    optimiser = AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = LambdaLR(optimiser, lambda step: pace(step, steps))
    losses: list[float] = []
    for step in range(1, steps + 1):
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(value.item())
        if step % REPORTED == 0:
            print(f"step {step}/{steps}: {fmean(losses[-REPORTED:]):.3f}", file=sys.stderr, flush=True)


def pace(step: int, steps: int) -> float:
    """Return the share of the highest rate at a step."""
    return min(1.0, (step + 1) / (WARMUP * steps)) * (LAST + (1 - LAST) * (1 + math.cos(math.pi * step / steps)) / 2)
