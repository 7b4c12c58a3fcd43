"""Recovery over tiny models: against plain training of the whole model, with little memory, after a kill."""

import itertools
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from lillama.calibration.sample import sample_calibration
from lillama.distill.split import Batches
from lillama.lowrank.install import install
from lillama.pipeline import recovery
from lillama.pipeline.context import RunContext
from lillama.pipeline.job import build_job
from lillama.pipeline.recovery import recover
from lillama.pipeline.schedules import distill_sequentially
from lillama.ranks.plan import RankPlan
from lillama.recipes.options import Machine
from lillama.recovery.config import RecoveryConfig
from lillama.recovery.training import RecoveryTraining
from lillama.runs.run_dir import RunDir
from lillama.stream.model import open_streamed
from lillama.system.memory import MemoryBudget
from lillama.system.progress import silent

CONFIG = RecoveryConfig(epochs=2, batch_size=8, lr=1e-3, lr_scale="width", lr_width=None, checks=4)
STEPS = 8
TOO_HIGH = 0.05  # some halvings below, it is not


@pytest.fixture
def taught(tiny, quick, tmp_path) -> Callable[..., RunContext]:
    """Return a function that makes a context whose blocks are taught, in a folder of its own."""
    counter = itertools.count()

    def make(model: Path = tiny, only: int | None = None, mask: bool = False, micro_batch: int = 5) -> RunContext:
        recipe = quick(distill={"epochs": 0}, calibration={"tokens": 960})
        folder = tmp_path / f"run-{next(counter)}"
        (folder / "scratch").mkdir(parents=True)
        job = build_job(model, recipe, Machine(device="cpu", micro_batch=micro_batch))
        if only is not None:
            ranks = {name: rank if f".{only}." in name else None for name, rank in job.plan.ranks.items()}
            job = replace(job, plan=RankPlan(job.plan.spec, ranks))
        tokens = sample_calibration(recipe.calibration, model, job.tokenizer, recipe.seed, job.device, silent)
        if mask:
            real = torch.ones_like(tokens.ids, dtype=torch.bool)
            real[1::3, 20:] = False
            real[2::5, :7] = False
            tokens = replace(tokens, mask=real)
        ctx = RunContext(job, tokens, RunDir(folder), silent)
        distill_sequentially(ctx)
        return ctx

    return make


def states(ctx: RunContext) -> dict[str, torch.Tensor]:
    found = ((block.index, ctx.run_dir.load_recovered(block.index)) for block in ctx.blocks)
    return {f"{index}.{name}": tensor for index, state in found if state for name, tensor in state.items()}


def log(ctx: RunContext) -> dict:
    found = ctx.run_dir.recovery_log()
    assert found is not None
    return {key: value for key, value in found.items() if key != "seconds"}


def assert_same_bits(first: RunContext, second: RunContext) -> None:
    assert log(first) == log(second)
    one, other = states(first), states(second)
    assert one and set(one) == set(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_compressed_model_comes_nearer_to_the_original(taught):
    ctx = taught()
    recover(ctx, CONFIG)
    first = log(ctx)
    assert first["improved"] and first["final"]["kl"] < 0.9 * first["initial"]["kl"]
    assert first["best_step"] == first["steps"] == STEPS and first["stopped"] == ""
    assert not ctx.run_dir.recovery_state.exists()
    for block in ctx.blocks:  # what was written is what was measured
        name = f"{block.index:04}.safetensors"
        shutil.copy(ctx.run_dir.path / "recovered" / name, ctx.run_dir.path / "blocks" / name)
    before = states(ctx)
    recover(ctx, CONFIG)
    assert log(ctx) == first  # finished: nothing is done
    (ctx.run_dir.path / "recovered" / "log.json").unlink()
    recover(ctx, replace(CONFIG, lr=1e-12))
    assert log(ctx)["initial"] == pytest.approx(first["final"], rel=1e-6)
    assert set(before) == set(states(ctx)) or not log(ctx)["improved"]


def whole_model(ctx: RunContext) -> torch.nn.Module:
    """Return transformers' own model with the factors that distillation left."""
    model = AutoModelForCausalLM.from_pretrained(ctx.teacher.reader.folder, dtype=torch.float32).eval()
    install(model, ctx.job.plan.factorised)
    for block in ctx.blocks:
        if ctx.ranks(block):
            model.get_submodule(block.name).load_state_dict(
                {name: tensor.float() for name, tensor in ctx.run_dir.load_block(block.index).items()}
            )
    return model


@pytest.mark.parametrize(("only", "mask", "lm"), [(None, False, 0.0), (None, True, 0.3), (1, True, 0.0)])
def test_equals_plain_training_of_the_whole_model(taught, only, mask, lm):
    """Five steps with AdamW on transformers' own model, each block clipped for itself."""
    ctx = taught(only=only, mask=mask)
    config = replace(CONFIG, epochs=1, lr=1e-3, lm=lm, checks=1, clip=0.05)
    recover(ctx, config)
    model = whole_model(ctx)
    batches = Batches(ctx.rows.train, 1, config.batch_size, ctx.job.recipe.seed)
    teacher = AutoModelForCausalLM.from_pretrained(ctx.teacher.reader.folder, dtype=torch.float32).eval()
    trained = [model.get_submodule(block.name) for block in ctx.blocks if ctx.ranks(block)]
    model.requires_grad_(False)
    groups = [list(block.requires_grad_(True).parameters()) for block in trained]
    optimiser = torch.optim.AdamW([p for group in groups for p in group], lr=1e-3, weight_decay=0.0)
    ids, real = ctx.tokens.ids, ctx.tokens.mask
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    for step, rows in enumerate(batches):
        optimiser.param_groups[0]["lr"] = 1e-3 * config.optim.lr_factor(step, STEPS // 2)
        given = {"input_ids": ids[rows], "attention_mask": real[rows].long() if mask else None}
        found = model(**given).logits.log_softmax(-1)
        wanted = teacher(**given).logits.detach().log_softmax(-1)
        loss = (1 - lm) * (wanted.exp() * (wanted - found)).sum(-1)[real[rows]].mean()
        followed = real[rows][:, :-1] & real[rows][:, 1:]
        chances = found[:, :-1].gather(-1, ids[rows][:, 1:, None])[..., 0]
        (loss - lm * chances[followed].mean()).backward()
        for group in groups:
            assert torch.nn.utils.clip_grad_norm_(group, 0.05) > 0.05  # or the test would not see it
        optimiser.step()
        optimiser.zero_grad()
    written = states(ctx)
    assert {name.partition(".")[0] for name in written} == ({"0", "1", "2"} if only is None else {str(only)})
    for block, module in zip((b for b in ctx.blocks if ctx.ranks(b)), trained, strict=True):
        for name, parameter in module.named_parameters():
            close = written[f"{block.index}.{name}"].isclose(parameter.detach(), atol=3e-5, rtol=1e-3)
            assert close.float().mean() > 0.98, name  # Adam turns the rounding of a gradient near 0 into a whole step


def test_padding_does_not_matter(taught):
    first, second = taught(mask=True), taught(mask=True)
    second = replace(second, tokens=replace(second.tokens, ids=second.tokens.ids.masked_fill(~second.tokens.mask, 7)))
    assert not torch.equal(first.tokens.ids, second.tokens.ids)
    assert torch.equal(
        first.run_dir.load_block(2)["mlp.up_proj.left.weight"], second.run_dir.load_block(2)["mlp.up_proj.left.weight"]
    )
    for ctx in (first, second):
        recover(ctx, replace(CONFIG, lm=0.5))
    assert_same_bits(first, second)


MEASURED = replace(CONFIG, lr=None)


@pytest.mark.parametrize("config", [CONFIG, MEASURED], ids=["rate given", "rate measured"])
def test_little_memory_changes_nothing(taught, monkeypatch, config):
    plenty, little = taught(), taught()
    recover(plenty, config)
    little = replace(little, job=replace(little.job, memory=MemoryBudget(0, 0)))
    kept = []
    monkeypatch.setattr(recovery, "KeptGraphs", lambda: kept.append(1))
    recover(little, config)
    assert not kept and list((little.run_dir.scratch / "recovery").rglob("learner-*"))
    assert_same_bits(plenty, little)


class Killed(BaseException):
    """The end of the process, as far as this one can play it."""


def test_a_measured_rate_brings_what_a_good_one_brings(taught):
    measured, given = taught(), taught()
    recover(measured, MEASURED)
    recover(given, CONFIG)
    assert log(measured)["improved"] and log(measured)["lr"] != log(given)["lr"]
    assert log(measured)["final"]["kl"] < 1.1 * log(given)["final"]["kl"]


@pytest.mark.parametrize("config", [CONFIG, MEASURED], ids=["rate given", "rate measured"])
@pytest.mark.parametrize("stop", [0, 1, 6])
def test_a_killed_recovery_goes_on_to_the_same_bits(taught, monkeypatch, stop, config):
    whole, stopped = taught(), taught()
    recover(whole, config)
    step, taken = RecoveryTraining.step, []

    def counted(self, *args):
        taken.append(1)
        if len(taken) == stop + 1:
            raise Killed
        return step(self, *args)

    monkeypatch.setattr(RecoveryTraining, "step", counted)
    with pytest.raises(Killed):
        recover(stopped, config, snapshot_seconds=-1)
    assert stopped.run_dir.recovery_state.is_dir() == (stop > 0) and not stopped.run_dir.is_recovered
    recover(stopped, config, snapshot_seconds=-1)
    assert len(taken) == STEPS + 1
    assert_same_bits(whole, stopped)


def test_a_hopeless_rate_keeps_the_start(taught, caplog):
    ctx = taught()
    with caplog.at_level(logging.WARNING):
        recover(ctx, replace(CONFIG, lr=30.0, clip=None))
    assert not log(ctx)["improved"] and log(ctx)["final"] == log(ctx)["initial"]
    assert log(ctx)["halved"] == [2, 4, 6, 8] and not states(ctx)
    assert "not with the rate halved 4 times either; the blocks stay as they were" in caplog.text
    json.dumps(log(ctx), allow_nan=False)


def test_where_the_loss_rises_all_blocks_go_back_and_on_at_half_the_rate(taught, monkeypatch):
    ctx, stopped, rates = taught(), taught(), []
    config = replace(CONFIG, epochs=4, checks=8, lr=TOO_HIGH, clip=None)
    measure = RecoveryTraining.measure

    def watched(self, histories):
        rates.append({self.pool[index].lr for index in range(3)})
        return measure(self, histories)

    monkeypatch.setattr(RecoveryTraining, "measure", watched)
    recover(ctx, config)
    found = log(ctx)
    assert found["halved"] and found["improved"] and found["best_step"] > found["halved"][0]
    assert rates[-1] == {TOO_HIGH / 2 ** len([step for step in found["halved"] if step < found["held_out"][-1][0]])}
    monkeypatch.undo()
    step, taken = RecoveryTraining.step, []

    def killed(self, *args):
        taken.append(1)
        if len(taken) == found["halved"][0] + 2:  # one step after the blocks went back
            raise Killed
        return step(self, *args)

    monkeypatch.setattr(RecoveryTraining, "step", killed)
    with pytest.raises(Killed):
        recover(stopped, config, snapshot_seconds=-1)
    recover(stopped, config, snapshot_seconds=-1)
    assert_same_bits(ctx, stopped)


@pytest.fixture
def poisoned(monkeypatch) -> Iterator[Callable[[int], None]]:
    """Return a function that spoils a weight after a step."""

    def poison(after: int) -> None:
        step = RecoveryTraining.step

        def spoilt(self, batch, histories):
            loss = step(self, batch, histories)
            if len(histories["all blocks"].losses) == after:
                with torch.no_grad():
                    next(self.pool[1].student.parameters()).fill_(math.nan)
            return loss

        monkeypatch.setattr(RecoveryTraining, "step", spoilt)

    return poison


@pytest.mark.parametrize(("after", "halved"), [(1, 2), (5, 6)])
def test_a_loss_that_is_not_finite_is_gone_back_from(taught, poisoned, after, halved):
    ctx = taught()
    poisoned(after)
    recover(ctx, CONFIG)
    assert log(ctx)["halved"][0] == halved and log(ctx)["best_step"] > halved
    assert all(math.isfinite(value) for row in log(ctx)["held_out"] for value in row)
    assert all(tensor.isfinite().all() for tensor in states(ctx).values())
    json.dumps(log(ctx), allow_nan=False)


def test_switched_off_or_nothing_to_train(taught):
    ctx = taught()
    recover(ctx, replace(CONFIG, epochs=0))
    assert ctx.run_dir.recovery_log() is None and ctx.run_dir.load_recovered(0) is None
    nothing = replace(ctx.job, plan=RankPlan(ctx.job.plan.spec, dict.fromkeys(ctx.job.plan.ranks)))
    recover(replace(ctx, job=nothing), CONFIG)
    assert not (ctx.run_dir.path / "recovered").exists()


def test_computes_in_half_precision_with_full_masters(taught, make_model):
    ctx = taught(make_model(torch.bfloat16))
    teacher = open_streamed(ctx.teacher.reader.folder, torch.device("cpu"), torch.bfloat16)
    recover(replace(ctx, job=replace(ctx.job, teacher=teacher)), CONFIG)
    assert log(ctx)["final"]["kl"] < 0.9 * log(ctx)["initial"]["kl"]
    weight = states(ctx)["1.mlp.up_proj.left.weight"]
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())


def test_only_the_routers_of_experts_learn_where_that_is_asked_for(taught, make_model, tmp_path):
    folder = make_model()
    config = MixtralConfig(
        **json.loads((folder / "config.json").read_text())
        | {"architectures": None, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)
    ctx, routers = taught(folder), replace(CONFIG, trains="routers", lr=1e-2)
    recover(ctx, routers)
    assert log(ctx)["improved"] and log(ctx)["final"]["kl"] < log(ctx)["initial"]["kl"]
    taught_before = {f"{b.index}.{n}": t for b in ctx.blocks for n, t in ctx.run_dir.load_block(b.index).items()}
    changed = {name for name, tensor in states(ctx).items() if not torch.equal(tensor, taught_before[name])}
    assert changed == {f"{block.index}.mlp.gate.weight" for block in ctx.blocks}


def test_without_experts_there_is_no_router_to_teach(taught):
    ctx = taught()
    recover(ctx, replace(CONFIG, trains="routers"))
    assert ctx.run_dir.recovery_log() is None


def test_blocks_without_a_router_are_the_compressed_ones_while_routers_learn(taught, make_model, tmp_path):
    config = Qwen2MoeConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        shared_expert_intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
        bos_token_id=0,
        eos_token_id=1,
    )
    folder = make_model()
    torch.manual_seed(0)
    Qwen2MoeForCausalLM(config).save_pretrained(folder)
    ctx = taught(folder)
    recover(ctx, replace(CONFIG, trains="routers"))
    again = taught(folder)
    recover(again, CONFIG)
    assert log(ctx)["initial"]["kl"] == pytest.approx(log(again)["initial"]["kl"], rel=1e-3)
