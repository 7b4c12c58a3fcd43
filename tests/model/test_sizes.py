import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig, PreTrainedModel

from lillama.lowrank.storage import Storage
from lillama.model.checkpoint import SINGLE
from lillama.model.describe import describe, describe_model
from lillama.model.sizes import read_sizes
from lillama.model.spec import ModelSpec
from lillama.ranks.allocators import Uniform
from lillama.ranks.budget import Budget
from lillama.ranks.plan import RankPlan
from lillama.stream.model import open_streamed

Save = Callable[..., tuple[PreTrainedModel, Path]]


def described(folder: Path) -> ModelSpec:
    teacher = open_streamed(folder, torch.device("cpu"))
    return read_sizes(describe_model(teacher.skeleton), teacher.weights, teacher.template)


def say(folder: Path, dtype: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))


def retype(folder: Path, part: str, dtype: torch.dtype) -> None:
    tensors = load_file(folder / SINGLE)
    save_file(
        {name: t.to(dtype) if part in name else t for name, t in tensors.items()}, folder / SINGLE, {"format": "pt"}
    )


def on_disk(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(folder / SINGLE).values())


@pytest.mark.parametrize("said", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_the_files_decide_whatever_the_configuration_says(said: str, stored: torch.dtype, saved: Save) -> None:
    _, folder = saved(dtype=stored)
    say(folder, said)
    spec = described(folder)
    assert (spec.dtype, spec.bytes_per_param) == (str(stored).removeprefix("torch."), stored.itemsize)
    assert spec.nbytes == on_disk(folder) == spec.params * stored.itemsize
    assert all(linear.itemsize is None for linear in spec.linears)


@pytest.mark.parametrize("kind", [None, MixtralConfig])
def test_each_linear_counts_in_its_own_type(kind: type[PretrainedConfig] | None, saved: Save) -> None:
    _, folder = saved(*([] if kind is None else [kind]))
    retype(folder, "self_attn.q_proj", torch.float16)
    retype(folder, "mlp" if kind is None else "experts", torch.bfloat16)
    spec = described(folder)
    assert spec.nbytes == on_disk(folder)
    types = {linear.name.rpartition(".")[2]: spec.itemsize(linear) for linear in spec.linears if "attn" in linear.name}
    assert types == {"q_proj": 2, "k_proj": 4, "v_proj": 4, "o_proj": 4}
    assert {spec.itemsize(linear) for linear in spec.linears if "attn" not in linear.name} == {2}
    dense = RankPlan(spec, {linear.name: None for linear in spec.linears}, Storage("plain"))
    assert dense.kept_bytes == spec.nbytes
    ranks = {linear.name: 4 for linear in spec.linears}
    plan = RankPlan(spec, ranks, Storage("plain"))
    saved_bytes = sum((one.params - one.params_at(4)) * spec.itemsize(one) for one in spec.linears)
    assert plan.kept_bytes == spec.nbytes - saved_bytes
    budget = Budget.of(spec, 1.0, "model", Storage("plain"), plan.kept_bytes)
    assert budget.spare(plan) == 0


def test_a_model_without_weights_takes_what_its_configuration_says(made_up_spec: ModelSpec) -> None:
    assert made_up_spec.nbytes == 2 * made_up_spec.params
    plan = Uniform(multiple_of=1)(made_up_spec, 0.7)
    assert plan.kept_bytes == 2 * plan.kept_params


@pytest.fixture
def made_up_spec(config: Callable[..., PretrainedConfig]) -> ModelSpec:
    return describe(config(LlamaConfig, dtype="bfloat16"))
