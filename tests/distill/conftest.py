"""One toy block and what is around it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lillama.distill.activations import BlockActivations
from lillama.distill.block import BlockData
from lillama.distill.config import DistillConfig
from lillama.distill.learner import Learner
from lillama.distill.losses import L1Cosine
from lillama.distill.objective import LossScale, MicroBatch, Objective
from lillama.distill.split import Batches, Split
from lillama.distill.trainer import Trainer
from lillama.lowrank.factors import truncated_svd
from lillama.lowrank.install import install
from lillama.stream.activations import ActivationPlacement, ActivationStore
from lillama.stream.calls import BlockArgs, BlockInputs

WIDTH, INNER, LENGTH = 12, 20, 6


class Block(nn.Module):
    """A residual block that returns a tuple, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        return (hidden + self.down(torch.tanh(self.up(hidden))),)


@dataclass(frozen=True)
class Toy:
    """A teacher, and the making of students and data for it."""

    folder: Path
    teacher: Block

    def student(self, rank: int = 3) -> Block:
        student = Block()
        dense = {name: self.teacher.get_submodule(name).weight for name in ("up", "down")}
        install(student, dict.fromkeys(dense, rank))
        with torch.no_grad():
            for name, weight in dense.items():
                factors = truncated_svd(weight, rank)
                student.get_submodule(name).left.weight.copy_(factors.left)
                student.get_submodule(name).right.weight.copy_(factors.right)
            student.up.bias.copy_(self.teacher.up.bias)
        return student

    def store(self, name: str, values: Tensor) -> ActivationStore:
        placement = ActivationPlacement(torch.device("cpu"), self.folder, 0, 1 << 30)
        store = ActivationStore(tuple(values.shape), values.dtype, placement, "host", name)
        store.write(slice(0, len(values)), values)
        return store

    @torch.no_grad()
    def data(
        self,
        rows: int = 24,
        stream: str = "both",
        micro_batch: int = 5,
        mask: Tensor | None = None,
        parted: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> BlockData:
        chance = torch.Generator().manual_seed(1)
        x = torch.randn(rows, LENGTH, WIDTH, generator=chance)
        own = x + 0.1 * torch.randn(x.shape, generator=chance)
        activations = BlockActivations(
            calls=BlockInputs([BlockArgs()]),
            teacher=self.store("teacher", x.to(dtype)),
            target=self.store("target", self.teacher(x)[0].to(dtype)),
            student=self.store("student", own.to(dtype)) if parted else None,
            spare=None,
            masks=(mask,),
            micro_batch=micro_batch,
        )
        return BlockData(activations, 0, stream)

    def config(self, **changes: Any) -> DistillConfig:
        plain = DistillConfig(
            stream="both", loss=L1Cosine(), epochs=3, batch_size=4, lr=1e-3, lr_scale="width", lr_width=None,
            lr_schedule="constant", warmup=0.0, betas=(0.9, 0.999), weight_decay=0.0, clip=None,
            held_out=0.2,
        )  # fmt: skip
        return replace(plain, **changes)

    def learner(self, config: DistillConfig, steps: int = 10, scale: float = 1.0, rank: int = 3) -> Learner:
        return Learner(self.student(rank), config.optim, config.lr, steps, Objective(config, LossScale(scale)))

    def trainer(
        self, config: DistillConfig, split: Split, seed: int = 0, name: str = "state", snapshot_seconds: float = 1e9
    ) -> Trainer:
        batches = Batches(split.train, config.epochs, config.batch_size, seed)
        return Trainer(batches, config.checks, self.folder / name, snapshot_seconds=snapshot_seconds)

    def batch(self, data: BlockData, rows: Tensor) -> list[MicroBatch]:
        return list(data.micro_batches(rows))


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    torch.manual_seed(0)
    return Toy(tmp_path, Block())
