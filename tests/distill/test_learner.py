"""Steps of one student: masks, micro-batches, master weights, clipping."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lillama.distill.losses import L1Cosine, Mse, TokenMse
from lillama.distill.objective import Objective

ROWS = torch.arange(8)


def weights(learner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learner.student.parameters()])


def tokens(batch) -> int:
    return sum(micro.tokens for micro in batch)


def gradients(learner, batch) -> Tensor:
    """Return the gradient of a batch, by a step of plain gradient descent."""
    before = weights(learner)
    learner.optimiser = torch.optim.SGD([{"params": list(learner.student.parameters()), "scale": 1.0}], lr=1.0)
    learner.lr = 1.0
    learner.step(batch, tokens(batch))
    return before - weights(learner)


@pytest.fixture
def mask() -> Tensor:
    mask = torch.ones(24, 6, dtype=torch.bool)
    mask[::2, 4:] = False
    mask[1, 1:] = False
    return mask


@pytest.mark.parametrize("stream", ["teacher", "student", "both"])
@pytest.mark.parametrize("loss", [L1Cosine(), Mse(), TokenMse()], ids=lambda loss: loss.name)
def test_micro_batches_give_the_full_batch(toy, mask, stream, loss):
    config = toy.config(stream=stream, loss=loss)
    results = []
    for micro_batch in (8, 3, 1):
        learner = toy.learner(config)
        batch = toy.batch(toy.data(stream=stream, micro_batch=micro_batch, mask=mask), ROWS)
        held_out = learner.validate(batch)
        losses = learner.step(batch, tokens(batch))
        assert {s: v.item() for s, v in losses.items()} == pytest.approx(held_out, rel=1e-5)
        results.append((list(losses.values()), gradients(toy.learner(config), batch)))
    for losses, gradient in results[1:]:
        torch.testing.assert_close(losses, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [L1Cosine(), Mse(), TokenMse()], ids=lambda loss: loss.name)
def test_padding_changes_nothing(toy, mask, loss):
    """What stands at padded places has no part in loss, gradient and unit."""
    config = toy.config(loss=loss)
    data = toy.data(mask=mask)
    batch = toy.batch(data, ROWS)
    spoilt = [
        replace(
            micro,
            inputs={s: torch.where(micro.mask[..., None], x, 1e3) for s, x in micro.inputs.items()},
            target=torch.where(micro.mask[..., None], micro.target, -1e3),
        )
        for micro in batch
    ]
    assert toy.learner(config).validate(batch) == toy.learner(config).validate(spoilt)
    torch.testing.assert_close(gradients(toy.learner(config), batch), gradients(toy.learner(config), spoilt))
    units = data.loss_scale(loss, ROWS)
    data.activations.target.write(
        slice(0, 24), torch.where(mask[..., None], data.activations.target.read(slice(0, 24)), -1e3)
    )
    assert data.loss_scale(loss, ROWS).output == pytest.approx(units.output)


def test_the_mean_is_over_real_tokens(toy, mask):
    config = toy.config(stream="teacher", loss=Mse())
    data = toy.data(stream="teacher", mask=mask)
    learner = toy.learner(config, scale=2.0)
    x, y = data.activations.teacher.read(ROWS), data.activations.target.read(ROWS)
    with torch.no_grad():
        errors = (learner.student(x)[0] - y).pow(2).mean(-1)[mask[:8]]
    assert learner.validate(toy.batch(data, ROWS))["teacher"] == pytest.approx(errors.mean().item() / 2, rel=1e-5)


def test_unit_does_not_depend_on_micro_batches(toy, mask):
    units = [toy.data(mask=mask, micro_batch=size).loss_scale(Mse(), ROWS).output for size in (1, 3, 8)]
    assert units == pytest.approx([units[0]] * 3, rel=1e-6)


def test_both_streams_add_up(toy):
    parts = [gradients(toy.learner(toy.config(stream=s)), toy.batch(toy.data(stream=s), ROWS))
             for s in ("teacher", "student", "both")]  # fmt: skip
    torch.testing.assert_close(parts[0] + parts[1], parts[2], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(parts[0], parts[1], rtol=1e-3)


def test_before_the_streams_part_the_teachers_counts_twice(toy):
    config = toy.config(stream="both")
    alone = toy.batch(toy.data(parted=False), ROWS)
    assert set(alone[0].inputs) == {"teacher"}
    once = gradients(toy.learner(toy.config(stream="teacher")), alone)
    torch.testing.assert_close(gradients(toy.learner(config), alone), 2 * once)
    assert toy.learner(config).validate(alone) == toy.learner(toy.config(stream="teacher")).validate(alone)


@pytest.mark.parametrize(
    ("stream", "parted", "fed"),
    [
        ("teacher", True, {"teacher"}),
        ("student", True, {"student"}),
        ("both", True, {"teacher", "student"}),
        ("student", False, {"teacher"}),
    ],
)
def test_streams_feed_what_they_name(toy, stream, parted, fed):
    data = toy.data(stream=stream, parted=parted)
    for micro in toy.batch(data, torch.tensor([3, 17])):
        assert set(micro.inputs) == fed
        for name in fed:
            store = data.activations.teacher if name == "teacher" else data.activations.student
            assert torch.equal(micro.inputs[name], store.read(torch.tensor([3, 17])))


def test_masters_and_moments_are_fp32_when_activations_are_bf16(toy):
    config = toy.config(lr=1e-7)
    learner = toy.learner(config)
    learner.student.to(torch.bfloat16)
    learner = type(learner)(learner.student, config.optim, config.lr, 100, Objective(config))
    batch = toy.batch(toy.data(dtype=torch.bfloat16), ROWS)
    before = weights(learner)
    for _ in range(5):
        learner.step(batch, tokens(batch))
    moved = (weights(learner) - before).abs()
    assert before.dtype == torch.float32
    assert (moved > 0).float().mean() > 0.9  # in bf16 a step of 1e-7 would be rounded away
    assert (before.bfloat16() == weights(learner).bfloat16()).float().mean() > 0.98  # but for those that lay on an edge
    states = learner.optimiser.state.values()
    assert {s[key].dtype for s in states for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}


def test_bf16_activations_are_computed_with_rounded_masters(toy):
    learner = toy.learner(toy.config())
    x = toy.data(dtype=torch.bfloat16).activations.teacher.read(ROWS)
    output = learner.forward(toy.batch(toy.data(), ROWS)[0].call, x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, learner.student.to(torch.bfloat16)(x)[0])


def test_the_schedule_sets_the_rate_of_every_step(toy):
    config = toy.config(lr_schedule="cosine", warmup=0.3)
    learner = toy.learner(config)
    batch = toy.batch(toy.data(), ROWS)
    for step in range(10):
        learner.step(batch, tokens(batch))
        assert learner.optimiser.param_groups[0]["lr"] == config.lr * config.optim.lr_factor(step, 10)


def test_clipping_bounds_the_whole_blocks_gradient(toy):
    batch = toy.batch(toy.data(), ROWS)
    free = gradients(toy.learner(toy.config()), batch)
    clipped = gradients(toy.learner(toy.config(clip=0.01)), batch)
    assert free.norm() > 0.1
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-3, atol=1e-6)
    wide = gradients(toy.learner(toy.config(clip=100.0)), batch)
    torch.testing.assert_close(wide, free)


def test_snapshot_and_resume_go_on_to_the_same_bits(toy):
    config, batch = toy.config(lr_schedule="cosine"), toy.batch(toy.data(), ROWS)
    whole = toy.learner(config)
    for _ in range(3):
        whole.step(batch, tokens(batch))
    saved = {name: tensor.clone() for name, tensor in whole.snapshot().items()}
    again = toy.learner(config, rank=3)
    again.resume(saved, 3)
    for _ in range(4):
        whole.step(batch, tokens(batch))
        again.step(batch, tokens(batch))
    assert torch.equal(weights(whole), weights(again))


def test_relative_rates_move_each_tensor_by_its_own_size(toy):
    """Adam's first step moves every number by the rate, which is a share of the tensor's root mean square."""
    config, batch = toy.config(lr_scale="rms", lr=0.01), toy.batch(toy.data(), ROWS)
    learner = toy.learner(config)
    with torch.no_grad():
        learner.student.up.bias.zero_()
    learner = type(learner)(learner.student, config.optim, config.lr, 10, Objective(config))
    before = learner.state()
    learner.step(batch, tokens(batch))
    sizes = {name: tensor.square().mean().sqrt().item() for name, tensor in before.items()}
    usual = sorted(size for size in sizes.values() if size)[1]
    for name, tensor in learner.state().items():
        expected = 0.01 * (sizes[name] or usual)
        torch.testing.assert_close(
            (tensor - before[name]).abs(), torch.full_like(tensor, expected), rtol=1e-3, atol=1e-7
        )


@pytest.mark.parametrize(("lr_scale", "same"), [("rms", True), ("width", False)])
def test_relative_rates_do_not_see_how_a_product_is_shared_out(toy, lr_scale, same):
    config, batch = toy.config(lr_scale=lr_scale, lr=3e-3, loss=Mse()), toy.batch(toy.data(), ROWS)
    products = []
    for factor in (1.0, 16.0):
        student = toy.student()
        with torch.no_grad():
            student.up.left.weight.mul_(factor)
            student.up.right.weight.div_(factor)
        learner = type(toy.learner(config))(student, config.optim, config.lr, 10, Objective(config))
        for _ in range(5):
            learner.step(batch, tokens(batch))
        products.append(student.up.product().detach())
    assert torch.allclose(*products, rtol=1e-3, atol=1e-5) == same


def test_half_the_rate_is_half_of_every_tensors(toy):
    learner = toy.learner(toy.config(lr_scale="rms"))
    scales = [group["scale"] for group in learner.optimiser.param_groups]
    with torch.no_grad():
        learner.student.up.left.weight.mul_(100)
    again = learner.with_lr(learner.lr / 2)
    assert again.lr == learner.lr / 2 and [group["scale"] for group in again.optimiser.param_groups] == scales
    assert not again.optimiser.state and again.step_count == 0
