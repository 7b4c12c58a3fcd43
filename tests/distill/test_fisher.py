"""The pass forth and back, block by block, gives what plain autograd through the whole model gives."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lillama.distill.fisher import measured
from lillama.progress import silent
from lillama.stream.store import Shelf
from lillama.stream.streamed import open_streamed

CPU = torch.device("cpu")
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")


def by_autograd(folder, ids, mask, generator):
    """Return the moments of every linear by hooks on transformers' own model, with the same sampled labels."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(name):
        def keep(module, args, output):
            output.requires_grad_()
            output.retain_grad()
            kept[name] = args[0].detach(), output

        return keep

    names = [f"model.layers.{index}.{linear}" for index in range(3) for linear in LINEARS]
    for name in names:
        model.get_submodule(name).register_forward_hook(hook(name))
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    logits = model(ids, attention_mask=real.long()).logits[real]
    probabilities = logits.detach().softmax(-1)
    labels = torch.cat([torch.multinomial(part, 1, generator=generator) for part in probabilities.split(ids.shape[1])])
    torch.nn.functional.cross_entropy(logits, labels[:, 0], reduction="sum").backward()
    found = {}
    for name in names:
        x, output = kept[name]
        x, g = x[real].double(), output.grad[real].double()
        found[name] = x.T @ x, g.T @ g
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("disk", [False, True])
def test_moments_are_those_of_autograd(tiny, tmp_path, padded, disk):
    torch.manual_seed(0)
    ids, mask = torch.randint(3, 200, (5, 12)), None
    if padded:
        mask = torch.arange(12)[None] < torch.tensor([12, 7, 12, 3, 9])[:, None]
    model, found = open_streamed(tiny, CPU), {}

    def visit(index, block, moments):
        found.update({f"model.layers.{index}.{name}": value for name, value in moments.items()})

    rows = torch.tensor([3, 1, 0, 4])
    shelf = Shelf(CPU, tmp_path, 0, 0 if disk else 1 << 30)
    fisher = measured(model, ids, mask, rows, shelf, 4, torch.Generator().manual_seed(1), lambda index: LINEARS, visit,
                      silent)  # fmt: skip
    wanted = by_autograd(tiny, ids[rows], None if mask is None else mask[rows], torch.Generator().manual_seed(1))
    assert set(found) == set(wanted)
    for name, (inputs, gradients) in wanted.items():
        torch.testing.assert_close(found[name].inputs.sum, inputs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].gradients.sum, gradients, rtol=1e-3, atol=1e-6)
        assert found[name].inputs.count == (48 if mask is None else int(mask[rows].sum()))
    fisher.remove()
    assert not list(tmp_path.glob("fisher-?.activations"))
