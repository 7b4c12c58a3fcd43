"""What `assemble` writes: every form, from fp32 and bf16 blocks, read back by transformers and block by block."""

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import MakeModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from lillama.errors import ModelError
from lillama.evaluation.perplexity import perplexity
from lillama.hub.assemble import assemble
from lillama.hub.export import export
from lillama.lowrank.install import install, low_rank_linears
from lillama.lowrank.pivot import LARGEST, Pivoting
from lillama.lowrank.storage import Storage
from lillama.model.describe import describe
from lillama.model.source import load_config
from lillama.model.spec import BlockSpec
from lillama.modeling.linear import LowRankLinear, PivotLinear
from lillama.modeling.soundness import FORMAT_VERSION
from lillama.ranks.plan import RankPlan
from lillama.stream.model import open_streamed

IN_BLOCK = {"self_attn.q_proj": 9, "self_attn.o_proj": 16, "mlp.gate_proj": 11, "mlp.up_proj": 14, "mlp.down_proj": 32}
RANKS = {f"model.layers.{index}.{name}": rank for index in (0, 2) for name, rank in IN_BLOCK.items()}
STORAGES = [Storage(form, bits, 16) for form, bits in product(("plain", "pivot"), (None, 8, 4, 3))]  # pyright: ignore
X = torch.arange(3, 23)[None]
CPU = torch.device("cpu")


def assembled(
    original: Path, folder: Path, storage: Storage, dtype: torch.dtype, ranks: Mapping[str, int] = RANKS
) -> dict[str, Pivoting]:
    """Assemble a folder from random factors and otherwise the original's tensors, in a type of their own."""
    folder.mkdir()
    teacher, spec = open_streamed(original, CPU), describe(load_config(original))

    def compressed(block: BlockSpec) -> Mapping[str, Tensor] | None:
        inside = {
            name.removeprefix(f"{block.name}."): r for name, r in ranks.items() if name.startswith(f"{block.name}.")
        }
        if not inside:
            return teacher.block(block.index, stored=True).state_dict() if storage.bits else None
        student = teacher.block(block.index)
        generator = torch.Generator().manual_seed(block.index)
        install(student, inside)
        for _, layer in low_rank_linears(student):
            assert isinstance(layer, LowRankLinear)
            torch.nn.init.normal_(layer.left.weight, std=0.3, generator=generator)
            torch.nn.init.normal_(layer.right.weight, std=0.3, generator=generator)
        return {name: tensor.to(dtype) for name, tensor in student.state_dict().items()}

    plan = RankPlan(spec, {linear.name: ranks.get(linear.name) for linear in spec.linears}, storage)
    return assemble(
        folder,
        teacher.weights,
        plan,
        compressed,
        lambda block: {},
        lambda block: teacher.template(block.index),
        "cafe",
        10**6,
    )


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def original(request: pytest.FixtureRequest, make_model: MakeModel) -> Path:
    return make_model(request.param, attention_bias=True, mlp_bias=True)


@torch.no_grad()
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_every_form_computes_what_the_plain_one_does(
    storage: Storage, original: Path, tmp_path: Path, text: Path
) -> None:
    how = assembled(original, tmp_path / "form", storage, torch.float32)
    assembled(original, tmp_path / "plain", Storage("plain"), torch.float32)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "form", output_loading_info=True)
    assert not any(report.values())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    exact = storage.bits is None and model.dtype == torch.float32
    share = 1e-5 if exact else {None: 0.05, 8: 0.1, 4: 0.8, 3: 1.5}[storage.bits]
    wanted = plain(X).logits
    assert (model(X).logits.float() - wanted).norm() <= share * wanted.norm()
    assert set(how) == (set(RANKS) if storage.form == "pivot" else set())
    assert all(value.largest <= LARGEST and value.condition >= 1 - 1e-9 for value in how.values())
    scores = [perplexity(path, [text], seq_len=32)[0].nll for path in (tmp_path / "form", tmp_path / "plain")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4 if exact else 1.0)
    export(tmp_path / "form", tmp_path / "dense", "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    wanted = model.float()(X).logits
    rounded = 1e-5 if dense.model.embed_tokens.weight.dtype == load_config(original).dtype else 0.05
    assert (dense(X).logits - wanted).norm() <= rounded * wanted.norm()


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_bytes_and_types_are_those_that_were_promised(storage: Storage, original: Path, tmp_path: Path) -> None:
    assembled(original, tmp_path / "form", storage, torch.float32)
    dense, stored = (load_file(path / "model.safetensors") for path in (original, tmp_path / "form"))
    section = json.loads((tmp_path / "form" / "config.json").read_text())["quantization_config"]
    absorbed = {f"model.layers.{index}.mlp.up_proj" for index in (0, 2)} if storage.form == "pivot" else set()
    assert set(section.get("absorbed", ())) == absorbed
    for name, rank in RANKS.items():
        weight = dense[f"{name}.weight"]
        parts = {part: tensor for part, tensor in stored.items() if part.startswith(f"{name}.") and "bias" not in part}
        spared = 4 * len(weight) if name in absorbed else 0
        promised = storage.nbytes(*weight.shape, rank, weight.itemsize) - spared
        assert sum(tensor.nbytes for tensor in parts.values()) == promised
        floats = {tensor.dtype for tensor in parts.values() if tensor.is_floating_point()}
        assert floats == {weight.dtype}
    spec = describe(load_config(original))
    few = {linear.name for linear in spec.linears if linear.name not in RANKS} if storage.bits else set[str]()
    for linear in (linear for linear in spec.linears if linear.name in few):
        weight = dense[f"{linear.name}.weight"]
        parts = [tensor for part, tensor in stored.items() if part.startswith(f"{linear.name}.") and "bias" not in part]
        assert sum(tensor.nbytes for tensor in parts) == storage.nbytes(*weight.shape, None, weight.itemsize)
        assert section["bits"][linear.name] == storage.bits
    kept = {name for name in dense if name.rpartition(".")[0] not in {*RANKS, *few}}
    assert all(torch.equal(stored[name], dense[name]) for name in kept)
    for name in (f"{layer}.bias" for layer in RANKS):
        moved = any(part in name for part in ("gate_proj", "up_proj")) and absorbed
        assert stored[name].dtype == dense[name].dtype
        assert torch.equal(stored[name].sort()[0], dense[name].sort()[0])
        assert torch.equal(stored[name], dense[name]) is not bool(moved)


def test_blocks_that_were_rounded_before_are_taken_as_they_are(original: Path, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assembled(original, tmp_path / str(dtype), Storage("plain"), dtype)
    files = [load_file(tmp_path / str(dtype) / "model.safetensors") for dtype in (torch.bfloat16, torch.float32)]
    assert all(torch.equal(files[0][name], tensor.bfloat16().to(tensor.dtype)) or name.rpartition(".")[0] not in RANKS
               for name, tensor in files[1].items())  # fmt: skip
    assembled(original, tmp_path / "pivot", Storage("pivot"), torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pivot")(X).logits.isfinite().all()


def test_an_order_that_is_absorbed_is_not_stored_and_not_computed(original: Path, tmp_path: Path) -> None:
    assembled(original, tmp_path / "form", Storage("pivot"), torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "form")
    orders = {name: layer.order for name, layer in low_rank_linears(model) if isinstance(layer, PivotLinear)}
    without = {name.split("layers.0.")[-1] for name, order in orders.items() if order is None and ".0." in name}
    assert without == {"mlp.up_proj", "mlp.down_proj"}  # the second is at full rank
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(X).logits, model(X).logits)


def test_a_folder_of_a_newer_lillama_is_refused_block_by_block_too(original: Path, tmp_path: Path) -> None:
    assembled(original, tmp_path / "form", Storage("pivot"), torch.float32)
    config = json.loads((tmp_path / "form" / "config.json").read_text())
    config["quantization_config"]["format_version"] = FORMAT_VERSION + 1
    (tmp_path / "form" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="newer lillama: upgrade"):
        open_streamed(tmp_path / "form", CPU)


def test_a_model_without_one_plain_linear_in_its_blocks_runs_block_by_block(
    tiny: Path, tmp_path: Path, text: Path
) -> None:
    ranks = {linear.name: 8 for linear in describe(load_config(tiny)).linears}
    assembled(tiny, tmp_path / "form", Storage("pivot", 8), torch.float32, ranks)
    assembled(tiny, tmp_path / "plain", Storage("plain"), torch.float32, ranks)
    scores = [perplexity(path, [text], seq_len=32)[0].nll for path in (tmp_path / "form", tmp_path / "plain")]
    assert scores[0] == pytest.approx(scores[1], abs=0.3)
