"""Scalars for TensorBoard and Weights & Biases while a compression goes on."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol

from lillama.errors import OutputError
from lillama.system.progress import Progress, Report

ScalarSink = Literal["tensorboard", "wandb"]


class Scalar(Protocol):
    """Takes one scalar: its name, its value, its step."""

    def __call__(self, name: str, value: float, step: int) -> None:
        """Note it."""
        ...


@contextmanager
def log_live(report: Report, folder: Path, sinks: Sequence[ScalarSink] = ("tensorboard",)) -> Iterator[Report]:
    """Yield a function that passes progress on to `report`, and writes its scalars into `folder`.

    Args:
        report: told about progress as before.
        folder: of the event files; Weights & Biases takes its name for the run's.
        sinks: where scalars go.

    Raises:
        OutputError: the package of a sink is not installed.
    """
    openers = {"tensorboard": _tensorboard, "wandb": _wandb}
    with ExitStack() as stack:
        scalars = [stack.enter_context(openers[sink](folder)) for sink in sinks]

        def both(progress: Progress) -> None:
            report(progress)
            if progress.loss is not None:
                for scalar in scalars:
                    scalar(f"{progress.task}/{progress.detail}".replace(" ", "-"), progress.loss, progress.done)

        yield both


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Scalar]:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise OutputError("--log-dir needs TensorBoard: pip install 'lillama[live]'") from None
    with SummaryWriter(folder) as writer:
        yield lambda name, value, step: writer.add_scalar(name, value, step)


@contextmanager
def _wandb(folder: Path) -> Iterator[Scalar]:
    wandb = _installed_wandb()
    with wandb.init(name=folder.name, dir=folder) as run:
        yield lambda name, value, step: run.log({name: value, f"{name}/step": step})


def _installed_wandb() -> ModuleType:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise OutputError("Weights & Biases is not installed: pip install wandb") from None
    return wandb
