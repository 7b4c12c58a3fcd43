"""How fast blocks are taught: against the machine's own matrix products, and against a plain loop that does the same.

    python bench/speed.py            # writes bench/results/speed.{json,md}
    python bench/speed.py 1024       # one hidden size, printed only

Made-up Llamas of two blocks are compressed by the recipe `default` on few tokens. Times are processor time of one thread, so
that other work on the machine counts little; every ratio is taken within one process.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from by_size import by_size
from memory import make_model

DEPTH, SEQ_LEN, KEEP = 2, 256, 0.6
FFN = {256: 704, 1024: 2816, 2048: 5632}
ROWS = {256: 129, 1024: 33, 2048: 17}  # calibration sequences
EPOCHS = 2  # more would only take longer
FULL_TOKENS, FULL_EPOCHS = 131_072, 4  # the default budget, to which times are extrapolated
RECOVERY_STEPS = 480  # at that budget: 8 epochs over 15/16 of the tokens, in batches of 8 x 256
OBJECTIVE = {  # what the plain loop does too
    "schedule": "sequential", "stream": "student", "loss": {"name": "mse"}, "norm": 0.0, "look_ahead": 0.0, "sub_blocks": 0.0,
    "adaptive": 0.0,
}  # fmt: skip
INITIALISING = ("grams", "gradients", "spectra", "trials", "factors")
FIXED = ("spectra", "factors", "files", "bookkeeping")  # whatever the number of tokens
NOTES = f"""
- matmul: fp32, (2048 x hidden) by (hidden x hidden), in the same process. step: forward, loss, backward, clipping and
  optimiser, with the reading of the activations. Counted are matrix products alone: 6 operations for each weight of the
  factors and each token, and 6 x {SEQ_LEN} x hidden a token for causal attention.
- initialisation: Grams, gradients, spectra, trials of ranks and factors, as a share of a block's whole time at {FULL_TOKENS:,}
  tokens, {FULL_EPOCHS} epochs of distillation and 8 of recovery. It is extrapolated: what was measured a token or a step is
  multiplied (gradients are measured on a part of the tokens); spectra, factors, files and bookkeeping count once. What recovery
  needs besides its steps is left out.
- tokens/s: trained tokens over the time of steps, of both streams and of the bookkeeping between. The plain loop runs both
  whole models on every batch and takes the activations from hooks: the deeper the model, the slower. Its losses are the
  same, step by step, to {{difference:.0e}} of their value.

Extrapolated seconds for a block, by stage:
"""


class Stages:
    """Processor time by stage; the time of a stage within a stage counts for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._open = ["rest"]
        self._since = time.process_time()

    def _note(self) -> None:
        now = time.process_time()
        self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same function, timed."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._note()
            self.calls[stage] = self.calls.get(stage, 0) + 1
            self._open.append("gradients" if stage == "grams" and "gradients" in self._open else stage)
            try:
                return function(*args, **kwargs)
            finally:
                self._note()
                self._open.pop()

        return call


@contextmanager
def staged() -> Iterator[Stages]:
    """Time the stages of `compress` by the functions that do them."""
    import lillama.moments.gradients
    import lillama.pipeline.rank_selection
    import lillama.pipeline.schedules
    from lillama.distill.activations import BlockActivations
    from lillama.distill.learner import Learner
    from lillama.moments.inputs import InputMomentHooks
    from lillama.pipeline.context import RunContext
    from lillama.recovery.training import RecoveryTraining
    from lillama.stream.model import StreamedModel

    stages = Stages()
    places = {
        "grams": [(InputMomentHooks, "add")],
        "gradients": [
            (lillama.pipeline.rank_selection, "collect_gradient_moments"),
            (lillama.moments.gradients, "collect_block_moments"),
        ],
        "spectra": [(lillama.pipeline.rank_selection, "_spectra")],
        "trials": [(lillama.pipeline.rank_selection, "advance")],
        "factors": [
            (lillama.pipeline.schedules, "build_student"),
            (lillama.pipeline.rank_selection, "build_student"),
        ],
        "teacher's stream": [(BlockActivations, "compute_target")],
        "student's stream": [(BlockActivations, "advance")],
        "steps": [(Learner, "step")],
        "checks": [(Learner, "validate"), (Learner, "state")],
        "bookkeeping": [(lillama.pipeline.schedules, "distill_block")],
        "recovery": [(RecoveryTraining, "step")],
        "files": [(StreamedModel, "block"), (RunContext, "save"), (RunContext, "finished")],
    }
    with ExitStack() as patches:
        for stage, owners in places.items():
            for owner, name in owners:
                patches.enter_context(patch.object(owner, name, stages.timed(stage, getattr(owner, name))))
        yield stages


@contextmanager
def captured() -> Iterator[list[dict[str, Any]]]:
    """Keep what each block's training started from, and what came of it."""
    import lillama.pipeline.schedules

    taught: list[dict[str, Any]] = []
    train = lillama.pipeline.schedules.distill_block

    def keep(learner: Any, name: str, data: Any, held_out: Any, trainer: Any, report: Any) -> Any:
        start = copy.deepcopy(learner.student)
        log = train(learner, name, data, held_out, trainer, report)
        taught.append(
            {"start": start, "end": learner.student, "learner": learner, "batches": trainer.batches, "log": log}
        )
        return log

    with patch.object(lillama.pipeline.schedules, "distill_block", keep):
        yield taught


def matmul_rate(hidden: int) -> float:
    """Return fp32 operations a second of products as large as a square linear's on one batch."""
    import torch

    a, b = torch.randn(8 * SEQ_LEN, hidden), torch.randn(hidden, hidden)
    a @ b
    count = max(3, round(3e10 / (2 * a.numel() * hidden)))
    start = time.process_time()
    for _ in range(count):
        a @ b
    return 2 * a.numel() * hidden * count / (time.process_time() - start)


def step_flops(student: Any, hidden: int) -> int:
    """Return the operations of a token's step in matrix products: 2 a weight forth and 4 back, and causal attention."""
    weights = sum(parameter.numel() for parameter in student.parameters() if parameter.dim() == 2)
    return 6 * weights + 6 * SEQ_LEN * hidden


def plain_loop(folder: Path, ids: Any, taught: list[dict[str, Any]]) -> dict[str, Any]:
    """Teach the last block as one would at first: two whole models in memory, both run on every batch, hooks between.

    Returns:
        seconds a step, and the loss of every step.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False).eval()
    student = copy.deepcopy(teacher)
    last = taught[-1]
    block, learner = last["start"].requires_grad_(True), last["learner"]
    student.model.layers = nn.ModuleList([*(done["end"].requires_grad_(False) for done in taught[:-1]), block])
    seen: dict[str, Any] = {}
    teacher.model.layers[-1].register_forward_hook(lambda module, args, output: seen.update(teacher=output))
    block.register_forward_hook(lambda module, args, output: seen.update(student=output))
    optim, losses = learner.optim, []
    left = block.parameters()
    groups = [
        {"params": [next(left) for _ in g["params"]], "scale": g["scale"]} for g in learner.optimiser.param_groups
    ]
    optimiser = torch.optim.AdamW(groups, betas=optim.betas, weight_decay=optim.weight_decay)
    start = time.process_time()
    for step, rows in enumerate(last["batches"]):
        for group in optimiser.param_groups:
            group["lr"] = learner.lr * group["scale"] * optim.lr_factor(step, learner.steps)
        optimiser.zero_grad()
        with torch.no_grad():
            teacher(ids[rows])
        student(ids[rows])
        loss = nn.functional.mse_loss(seen["student"], seen["teacher"]) / learner.objective.scale.output
        loss.backward()
        nn.utils.clip_grad_norm_(block.parameters(), optim.clip)
        optimiser.step()
        losses.append(loss.item())
    return {"seconds": (time.process_time() - start) / len(losses), "losses": losses}


def measure(hidden: int) -> dict[str, Any]:
    """Compress a made-up model in this process and take its times apart."""
    import torch

    import lillama
    import lillama.pipeline.api
    from lillama.calibration.pack import CalibrationSet
    from lillama.recipes.options import Machine
    from lillama.recipes.recipe import load_recipe

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, rows = Path(temporary), ROWS[hidden]
        (folder / "model").mkdir()
        make_model(folder / "model", DEPTH, hidden, FFN[hidden], hidden // 64)
        (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * (rows * SEQ_LEN // 40))
        rates = [matmul_rate(hidden)]
        recipe = load_recipe(
            "default", {"scope": "blocks", "distill": OBJECTIVE | {"epochs": EPOCHS}, "recover": {"epochs": 1}}
        )
        with captured() as taught, staged() as stages:
            result = lillama.compress(
                folder / "model", folder / "out", keep=KEEP, recipe=recipe, calibration=[str(folder / "text.txt")],
                tokens=rows * SEQ_LEN, seq_len=SEQ_LEN, machine=Machine("cpu"),
            )  # fmt: skip
        rates.append(matmul_rate(hidden))
        ids = CalibrationSet.load(result.run / "calibration").ids.long()
        plain = plain_loop(folder / "model", ids, taught)
        rates.append(matmul_rate(hidden))
    seconds = {stage: spent for stage, spent in stages.seconds.items() if stage != "rest"}
    return figures(hidden, seconds, stages.calls["recovery"], taught, plain, sorted(rates)[1], rows)


def extrapolated(seconds: dict[str, float], recovery_steps: int, rows: int) -> dict[str, float]:
    """Return the seconds of each stage at the default budget, from those of so many sequences and steps of recovery."""
    from lillama.moments.gradients import PROBED_TOKENS

    tokens = rows * SEQ_LEN
    growth = dict.fromkeys(seconds, FULL_TOKENS / tokens) | dict.fromkeys(FIXED, 1.0)
    growth["gradients"] = PROBED_TOKENS / min(tokens, PROBED_TOKENS)
    growth["steps"] *= FULL_EPOCHS / EPOCHS
    growth["recovery"] = RECOVERY_STEPS / recovery_steps
    return {stage: spent * growth[stage] for stage, spent in seconds.items()}


def figures(
    hidden: int,
    seconds: dict[str, float],
    recovery_steps: int,
    taught: list[Any],
    plain: dict[str, Any],
    rate: float,
    rows: int,
) -> dict[str, Any]:
    """Return what was measured and what follows from it."""
    steps, tokens = sum(block["log"].steps for block in taught), sum(block["log"].tokens for block in taught)
    full = extrapolated(seconds, recovery_steps, rows)
    achieved = step_flops(taught[-1]["end"], hidden) * tokens / seconds["steps"]
    loop = seconds["steps"] + seconds["teacher's stream"] + seconds["student's stream"] + seconds["bookkeeping"]
    curve = [row[2] for row in taught[-1]["log"].curve]
    return {
        "hidden": hidden,
        "steps": steps,
        "seconds": seconds,
        "full_seconds": full,
        "matmul_gflops": rate / 1e9,
        "step_gflops": achieved / 1e9,
        "step_over_matmul": achieved / rate,
        "initialisation_share": sum(full[stage] for stage in INITIALISING) / sum(full.values()),
        "tokens_per_second": tokens / loop,
        "plain_tokens_per_second": tokens / steps / plain["seconds"],
        "largest_difference_of_losses": max(abs(a / b - 1) for a, b in zip(plain["losses"], curve, strict=True)),
    }


def table(found: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    text = (
        "# Speed of teaching\n\n"
        f"Made-up fp32 Llamas of {DEPTH} blocks, {KEEP:.0%} of their parameters kept, batches of 8 x {SEQ_LEN} tokens, one\n"
        "CPU thread; processor time. Written by `python bench/speed.py`.\n\n"
        "| hidden | matmul, GFLOP/s | step, GFLOP/s | step / matmul | initialisation | tokens/s | plain loop | ratio |\n"
        "|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    )
    for row in found:
        own, plain = row["tokens_per_second"], row["plain_tokens_per_second"]
        text += (
            f"| {row['hidden']} | {row['matmul_gflops']:.0f} | {row['step_gflops']:.0f} | {row['step_over_matmul']:.2f} "
            f"| {row['initialisation_share']:.1%} | {own:,.0f} | {plain:,.0f} | {own / plain:.2f} |\n"
        )
    stages = list(dict.fromkeys(stage for row in found for stage in row["full_seconds"]))
    text += NOTES.format(difference=max(row["largest_difference_of_losses"] for row in found))
    text += f"\n| hidden | {' | '.join(stages)} |\n|---:|{'---:|' * len(stages)}\n"
    for row in found:
        spent = [f"{row['full_seconds'].get(stage, 0) / DEPTH:,.1f}" for stage in stages]
        text += f"| {row['hidden']} | {' | '.join(spent)} |\n"
    return text


if __name__ == "__main__":
    by_size(__file__, FFN, measure, table)
