"""Weights of few bits over a whole run: sizes, what is saved by feedback, resuming, replaying, and what a folder holds."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import MakeModel
from transformers import AutoModelForCausalLM

from lillama import compress, export, load_recipe, plan, preview
from lillama.errors import BudgetError, RecipeError
from lillama.pipeline import compress as story
from lillama.pipeline import rounding
from lillama.recipes.options import Overrides
from lillama.recipes.recipe import pick_recipe
from lillama.report.page import report, write
from lillama.runs.run_dir import RunDir
from lillama.system.progress import Progress


class Stopped(BaseException):
    """Ends a run in the middle."""


@pytest.fixture(scope="module")
def original(make_model: MakeModel) -> Path:
    return make_model(torch.float32, attention_bias=True)


def share_of_linears(original: Path, share: float) -> int:
    """Return the bytes of a model whose linears take a share of theirs."""
    spec = plan(original, keep=1.0).plan.spec
    linears = sum(linear.params * spec.itemsize(linear) for linear in spec.linears)
    return spec.nbytes - linears + int(share * linears)


def test_bytes_alone_ask_for_bits(original: Path, text: Path, tmp_path: Path) -> None:
    most = share_of_linears(original, 0.16)
    given = {"nbytes": most, "calibration": text, "tokens": 1280, "seq_len": 32}
    result = compress(original, tmp_path / "out", texts=[text], **given)
    assert result.recipe.ranks.name == "mixed-bits" and result.recipe.keep == 1.0
    assert 0.98 * most < result.stored.bytes == result.plan.kept_bytes <= most
    assert len(set(result.plan.bits.values())) > 1 and not result.plan.factorised
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["ranks"] == {} and section["bits"] == result.plan.bits and section["format_version"] == 4
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    card = (tmp_path / "out" / "README.md").read_text()
    few = ", ".join(map(str, sorted(set(result.plan.bits.values()))))
    assert f"the numbers of its linear layers are stored in {few} bits." in card and "of its bytes\n" in card
    page = write(report([tmp_path / "out"]), tmp_path / "report.html")[0].with_suffix(".md").read_text()
    assert "of its bytes." in page and "## Bits" in page
    assert "## Rank plan" not in page and "Singular spectra" not in page
    ids = torch.arange(3, 23)[None]
    export(tmp_path / "out", tmp_path / "dense", "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(dense(ids).logits, model(ids).logits, rtol=0, atol=1e-4)
    assert (
        load_file(tmp_path / "dense" / "model.safetensors").keys() == load_file(original / "model.safetensors").keys()
    )
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, model(ids).logits)
    # A plan that is replayed, without anything measured, gives the same model.
    del given["nbytes"]
    compress(original, tmp_path / "replayed", recipe="bits", rank_plan=result.run / "plan.json", **given)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "replayed")]
    assert files[0] == files[1]


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(original: Path, text: Path, tmp_path: Path) -> None:
    given = {"nbytes": share_of_linears(original, 0.2), "calibration": text, "tokens": 640, "seq_len": 32}
    whole = compress(original, tmp_path / "whole", **given)

    def stop(progress: Progress) -> None:
        if progress.task == "rounding" and progress.done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        compress(original, tmp_path / "out", report=stop, **given)
    run = RunDir(tmp_path / "out.run")
    assert [run.has_rounded(index) for index in range(3)] == [True, True, False]
    (run.path / "rounded" / "0001.safetensors").write_bytes(b"damaged")
    compress(original, tmp_path / "out", **given)
    files = [(folder / "model.safetensors").read_bytes() for folder in (whole.path, tmp_path / "out")]
    assert files[0] == files[1]


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_feedback_over_the_whole_model_loses_less_than_rounding_to_the_nearest(
    bits: int, original: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"keep": 1.0, "bits": bits, "calibration": text, "tokens": 2560, "seq_len": 32}
    found = compress(original, tmp_path / "feedback", **given)
    monkeypatch.setattr(story, "round_blocks", lambda ctx: None)
    nearest = compress(original, tmp_path / "nearest", **given)
    assert found.stored.bytes == nearest.stored.bytes < 0.7 * found.plan.spec.nbytes
    assert found.held_out.kl < nearest.held_out.kl


def test_ranks_and_bits_go_together(original: Path, text: Path, tmp_path: Path, quick) -> None:
    given = {"recipe": quick(), "keep": 0.8, "scope": "blocks", "calibration": text, "tokens": 640, "seq_len": 32}
    results = {bits: compress(original, tmp_path / str(bits), bits=bits, **given) for bits in (None, 8, 3)}
    assert {bits: result.stored.bytes == result.plan.kept_bytes for bits, result in results.items()} == dict.fromkeys(
        results, True
    )
    sizes = [results[bits].stored.bytes for bits in (None, 8, 3)]
    assert sizes == sorted(sizes, reverse=True) and results[8].held_out.kl < results[3].held_out.kl + 1e-6
    tensors = load_file(results[3].path / "model.safetensors")
    spec = results[3].plan.spec
    assert not any(tensors[f"{linear.name}.weight"].numel() for linear in spec.linears)
    loaded = AutoModelForCausalLM.from_pretrained(results[3].path)
    assert loaded(torch.arange(3, 23)[None]).logits.isfinite().all()


def test_what_cannot_be_is_refused_before_anything_is_written(original: Path, text: Path, tmp_path: Path) -> None:
    given = {"calibration": text, "tokens": 640, "seq_len": 32}
    with pytest.raises(BudgetError, match=r"with 2 bits in every linear the model takes [0-9,]+; allow more"):
        compress(original, tmp_path / "out", nbytes=share_of_linears(original, 0.05), **given)
    with pytest.raises(RecipeError, match=r"give one \(--bytes\)"):
        compress(original, tmp_path / "out", recipe="bits", keep=0.8, **given)
    with pytest.raises(RecipeError, match=r"storage\.bits is 7"):
        compress(original, tmp_path / "out", bits=7, **given)
    assert not list(tmp_path.iterdir())


def test_a_plan_tells_the_size_and_a_preview_the_loss(original: Path, text: Path) -> None:
    most = share_of_linears(original, 0.2)
    planned = plan(original, nbytes=most)
    assert planned.plan.kept_bytes <= most and set(planned.plan.bits.values()) == {5}
    looked = preview(original, nbytes=most, calibration=text, tokens=640, seq_len=32)
    assert 0.98 * most < looked.plan.kept_bytes <= most and looked.rise > 0
    assert [rise for _, rise in looked.curve] == sorted(rise for _, rise in looked.curve)


def test_which_recipe_is_meant() -> None:
    named = [pick_recipe(None, Overrides.of(**given)) for given in ({}, {"nbytes": 10}, {"nbytes": 10, "bits": 4})]
    assert named == ["default", "bits", "default"] and pick_recipe("paper", Overrides.of(nbytes=10)) == "paper"


def test_bits_of_the_recipes_are_those_of_the_storage() -> None:
    assert load_recipe("bits").ranks.widths == rounding.BITS
