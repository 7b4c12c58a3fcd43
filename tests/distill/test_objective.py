"""What is asked of a student beside its output: against plain reimplementations, with masks and micro-batches."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lillama.distill.block import distill_block
from lillama.distill.learner import Learner
from lillama.distill.losses import L1Cosine, Mse, TokenMse, length_error
from lillama.distill.objective import LossScale, Objective, record_outputs, sub_blocks
from lillama.distill.split import Split
from lillama.stream.calls import BlockArgs, BlockInputs
from lillama.system.progress import silent

ROWS = torch.arange(8)
LOSSES = [L1Cosine(), Mse(), TokenMse()]
EVERYTHING = {"look_ahead": 0.7, "sub_blocks": 0.3, "norm": 0.2}


@pytest.fixture
def next_block(toy):
    torch.manual_seed(7)
    return type(toy.teacher)().requires_grad_(False)


@torch.no_grad()
def surrounded(toy, next_block, mask=None, micro_batch=5, **changes):
    """Return data with the next block and the outputs of both linears as targets."""
    data = toy.data(mask=mask, micro_batch=micro_batch, **changes)
    x, y = (store.read(slice(0, 24)).float() for store in (data.activations.teacher, data.activations.target))
    with record_outputs(toy.teacher, ["up", "down"]) as outputs:
        toy.teacher(x)
    dtype = data.activations.target.dtype
    parts = {name: toy.store(f"part-{name}", output.to(dtype)) for name, output in outputs.items()}
    ahead = toy.store("ahead", next_block(y)[0].to(dtype))
    activations = replace(data.activations, calls=BlockInputs([BlockArgs()] * 2), parts=parts, next_target=ahead)
    return replace(data, activations=activations, next_block=next_block)


def gradient(learner, data) -> Tensor:
    learner.optimiser = torch.optim.SGD([{"params": list(learner.student.parameters()), "scale": 1.0}], lr=1.0)
    learner.lr = 1.0
    before = torch.cat([p.detach().flatten() for p in learner.student.parameters()])
    learner.step(data.micro_batches(ROWS), data.tokens(ROWS))
    return before - torch.cat([p.detach().flatten() for p in learner.student.parameters()])


@pytest.fixture
def mask() -> Tensor:
    mask = torch.ones(24, 6, dtype=torch.bool)
    mask[::2, 4:] = False
    return mask


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("wanted", [{}, {"look_ahead": 0.7}, {"sub_blocks": 0.3}, {"norm": 0.2}, EVERYTHING], ids=str)
def test_it_equals_the_formula(toy, next_block, mask, loss, wanted):
    """Loss and gradient are those of the sum written out, each term in its own unit."""
    config = toy.config(stream="student", loss=loss, **wanted)
    data = surrounded(toy, next_block, mask, stream="student")
    parts = data.activations.parts if "sub_blocks" in wanted else {}
    data = replace(
        data,
        activations=replace(data.activations, parts=parts),
        next_block=next_block if "look_ahead" in wanted else None,
    )
    units = data.loss_scale(loss, ROWS)
    learner = Learner(toy.student(), config.optim, 1e-3, 10, Objective(config, units))
    plain = toy.student()
    x, y = data.activations.student.read(ROWS), data.activations.target.read(ROWS)
    up = plain.up(x)
    down = plain.down(torch.tanh(up))
    a, here = x + down, mask[ROWS]

    def term(student, teacher):
        return (loss(student, teacher) / loss.scale(teacher[here]))[here].mean()

    total = term(a, y)
    if "look_ahead" in wanted:
        total = total + 0.7 * term(next_block(a)[0], next_block(y)[0])
    if "sub_blocks" in wanted:
        clean = data.activations.teacher.read(ROWS)
        wanted_up = toy.teacher.up(clean).detach()
        wanted_down = toy.teacher.down(torch.tanh(wanted_up)).detach()
        total = total + 0.15 * term(up, wanted_up) + 0.15 * term(down, wanted_down)
    if "norm" in wanted:
        total = total + 0.2 * (((a.norm(dim=-1) - y.norm(dim=-1)) / y.norm(dim=-1)).pow(2))[here].mean()
    total.backward()
    assert learner.validate(data.micro_batches(ROWS))["student"] == pytest.approx(total.item(), rel=1e-5)
    expected = torch.cat([p.grad.flatten() for p in plain.parameters()])
    torch.testing.assert_close(gradient(learner, data), expected, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in next_block.parameters())


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_padding_and_micro_batches_change_nothing(toy, next_block, mask, loss):
    config, results = toy.config(loss=loss, **EVERYTHING), []

    def measured(data):
        learner = Learner(
            toy.student(), config.optim, 1.0, 10, Objective(config, LossScale(parts={"up": 1.0, "down": 1.0}))
        )
        return data.loss_scale(loss, ROWS), gradient(learner, data)

    for micro_batch in (8, 3, 1):
        data = surrounded(toy, next_block, mask, micro_batch)
        results.append(measured(data))
    around = data.activations
    for store in (around.teacher, around.student, around.target, around.next_target, *around.parts.values()):
        store.write(slice(0, 24), torch.where(mask[..., None], store.read(slice(0, 24)), 1e3))
    results.append(measured(data))
    for units, found in results[1:]:
        assert (units.output, units.ahead) == pytest.approx((results[0][0].output, results[0][0].ahead), rel=1e-5)
        assert units.parts == pytest.approx(results[0][0].parts, rel=1e-5)
        torch.testing.assert_close(found, results[0][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_the_teacher_itself_is_the_minimum_of_all_terms(toy, next_block, loss):
    """A student of full rank on the teacher's stream has nothing left to learn."""
    config = toy.config(stream="teacher", loss=loss, **EVERYTHING)
    data = surrounded(toy, next_block, stream="teacher")
    learner = Learner(toy.student(rank=12), config.optim, 1e-3, 10, Objective(config, data.loss_scale(loss, ROWS)))
    floor = 0.31326 if loss.name == "l1-cosine" else 0.0
    found = learner.validate(data.micro_batches(ROWS))["teacher"]
    assert found == pytest.approx(floor * (1 + 0.7 + 0.3), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_with_every_term_improves_each_of_them(toy, next_block, dtype):
    split, config = Split.of(24, 0.2, seed=0), toy.config(loss=Mse(), lr=1e-2, epochs=8, **EVERYTHING)
    next_block = next_block.to(dtype)
    data = surrounded(toy, next_block.float(), dtype=dtype)
    next_block.to(dtype)
    units = data.loss_scale(Mse(), split.held_out)
    trainer = toy.trainer(config, split)
    learner = Learner(toy.student(), config.optim, config.lr, len(trainer.batches), Objective(config, units))

    def measured(student, data, **weights):
        config = toy.config(loss=Mse(), **weights)
        part = Learner(student, config.optim, 1.0, 1, Objective(config, units))
        return sum(part.validate(data.micro_batches(split.held_out)).values())

    plainly = replace(data, activations=replace(data.activations, parts={}), next_block=None)

    def alone(**weights):
        student = toy.student()
        student.load_state_dict(learner.student.state_dict())
        return measured(student, data, **weights)

    def terms():
        plain = measured(learner.student, plainly)
        return plain, alone(look_ahead=1.0) - plain, alone(sub_blocks=1.0) - plain, alone(norm=1.0) - plain

    before = terms()
    assert distill_block(learner, "b", data, split.held_out, trainer, silent).improved
    assert all(late < early for late, early in zip(terms(), before, strict=True))


def test_nothing_more_wanted_is_the_loss_alone(toy):
    config, data = toy.config(loss=L1Cosine()), toy.data(micro_batch=8)
    (micro,) = data.micro_batches(ROWS)
    output = torch.randn(micro.target.shape, generator=torch.Generator().manual_seed(0))
    losses = Objective(config, LossScale(2.0)).token_losses(micro, "student", output, {})
    assert torch.equal(losses, L1Cosine()(output, micro.target) / 2.0)


def test_each_stream_has_its_own_target(toy):
    other = toy.store("other", torch.zeros(24, 6, 12))
    data = toy.data(micro_batch=8)
    (micro,) = replace(data, activations=replace(data.activations, own_target=other)).micro_batches(ROWS)
    assert torch.equal(micro.target_of("student"), other.read(ROWS))
    assert torch.equal(micro.target_of("teacher"), toy.data().activations.target.read(ROWS))


def test_the_length_is_seen_where_the_cosine_is_blind():
    y = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(length_error(3 * y, y), torch.full((20,), 4.0))
    torch.testing.assert_close(length_error(-y, y), torch.zeros(20))
    assert length_error(torch.zeros(3, 8), torch.zeros(3, 8)).isfinite().all()


def test_tokens_are_counted_on_the_host(toy, mask):
    data = toy.data(mask=mask)
    assert data.tokens(ROWS) == int(mask[ROWS].sum()) == sum(m.tokens for m in data.micro_batches(ROWS))
    assert toy.data().tokens(ROWS) == 48


def test_sub_blocks_are_the_children_that_hold_factors():
    assert sub_blocks(["self_attn.q_proj", "mlp.up_proj", "self_attn.o_proj", "fc1"]) == ("self_attn", "mlp", "fc1")
    assert sub_blocks([]) == ()


def test_recording_ends_with_its_context(toy):
    with record_outputs(toy.teacher, ["up"]) as outputs:
        toy.teacher(torch.ones(1, 2, 12))
    seen = outputs["up"]
    toy.teacher(torch.zeros(1, 2, 12))
    assert outputs["up"] is seen and list(outputs) == ["up"]
