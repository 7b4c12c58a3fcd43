"""Bits that rot in a run folder: what is damaged is named and made again, and the result is the same to the bit."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lillama.distill import trainer
from lillama.errors import DamagedError
from lillama.files.artefacts import check_seal, load_json, load_tensors, load_whole, save_json, save_tensors, seal_of
from lillama.pipeline import compress as story
from lillama.pipeline import schedules
from lillama.pipeline.api import compress
from lillama.recipes.recipe import Recipe, load_recipe


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x41
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped byte": flip,
    "cut": cut,
    "empty": lambda file: file.write_bytes(b""),
    "another value": lambda file: file.write_text("[]"),
    "no seal": lambda file: file.write_text("{}"),
    "gone": Path.unlink,
}


def bits(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir() if file.name not in ("README.md", "lillama.json")}


@pytest.fixture(scope="module")
def recipe(text) -> Recipe:
    """All that leaves artefacts: spectra, candidates, teaching, recovery."""
    changes = {
        "keep": 0.7,
        "ranks": {"multiple_of": 1},
        "distill": {"epochs": 1},
        "recover": {"epochs": 2, "lr": 1e-3},
        "calibration": {"sources": [{"path": str(text)}], "tokens": 640, "seq_len": 32},
    }
    return load_recipe(Recipe(), changes)


@pytest.fixture(scope="module")
def finished(make_model, recipe, tmp_path_factory) -> tuple[Path, Path]:
    """A model of two blocks and a finished result of it, with its run folder beside it."""
    model, out = make_model(num_hidden_layers=2), tmp_path_factory.mktemp("finished") / "out"
    compress(model, out, recipe=recipe)
    return model, out


@pytest.fixture
def again(finished, recipe, tmp_path, caplog) -> Callable[[], list[str]]:
    """Return a function that goes on with a copy of the run, and returns the warnings that name one of its files."""
    model, out = finished
    shutil.copytree(out.with_name("out.run"), tmp_path / "out.run")

    def go_on() -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert bits(compress(model, tmp_path / "out", recipe=recipe).path) == bits(out)
        return [record.getMessage() for record in caplog.records if str(tmp_path) in record.getMessage()]

    return go_on


def test_the_run_of_these_tests_has_every_artefact(finished):
    run = finished[1].with_name("out.run")
    found = {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()}
    assert found == {"lock", "run.json", *REMADE, *("spec.json", "metrics.json")}
    for name in found - {"lock"}:
        if name.endswith(".json"):
            load_whole(run / name)
        else:
            check_seal(run / name)


REMADE = {
    "blocks/0000.safetensors": ["a flipped byte"],
    "blocks/0001.safetensors": ["gone"],
    "blocks/0000.json": ["a flipped byte", "another value"],
    "blocks/0001.json": ["empty"],
    "recovered/0000.safetensors": ["gone"],
    "recovered/0001.safetensors": ["cut"],
    "recovered/log.json": ["a flipped byte"],
    "spectra.safetensors": ["a flipped byte"],
    "plan.json": ["gone"],
    "allocation.json": ["no seal"],
    "calibration/tokens.safetensors": ["a flipped byte", "gone"],
    "calibration/manifest.json": ["cut"],
    "machine.json": ["a flipped byte"],
}
OF_THE_MACHINE = ("recovered/log.json", "machine.json")  # seconds, free memory


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in REMADE.items() for kind in kinds])
def test_a_damaged_artefact_is_named_and_made_again(again, tmp_path, name, kind):
    file = tmp_path / "out.run" / name
    before = file.read_bytes()
    DAMAGES[kind](file)
    (warning,) = again()
    assert str(file) in warning and warning.endswith(("it is made again", "the tokens are gathered again"))
    assert file.read_bytes() == before or name in OF_THE_MACHINE


@pytest.mark.parametrize("name", ["spec.json", "metrics.json"])
def test_what_is_only_read_by_others_is_written_anew(again, tmp_path, name):
    file = tmp_path / "out.run" / name
    file.write_text("{")
    assert again() == []
    load_whole(file)


def test_what_is_simply_not_there_is_made_without_a_word(again, tmp_path):
    for name in ("blocks/0001.json", "spectra.safetensors", "recovered/log.json"):
        (tmp_path / "out.run" / name).unlink()
    assert again() == []


def test_files_of_one_name_that_change_places_are_found(again, tmp_path):
    first, second = (tmp_path / "out.run" / folder / "0000.safetensors" for folder in ("blocks", "recovered"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    found = again()
    assert len(found) == 2 and all("does not belong to" in warning for warning in found)


def test_all_at_once(again, tmp_path):
    for name in REMADE:
        flip(tmp_path / "out.run" / name)
    assert len(again()) >= len(REMADE) - 4  # a file that goes with another one is not named


def test_nothing_is_kept_that_other_tokens_taught(finished, recipe, tmp_path, caplog):
    """The tokens cannot be made again as they were (here: they were others): all that hangs on them goes."""
    model, out = finished
    run = tmp_path / "out.run"
    shutil.copytree(out.with_name("out.run"), run)
    tensors = load_tensors(run / "calibration" / "tokens.safetensors")
    tensors["ids"] = tensors["ids"].flip(0)
    for file in run.glob("blocks/*.json"):
        value = load_json(file)
        value["calibration"] = "other"
        save_json(file, {k: v for k, v in value.items() if k != "tensors"}, value["tensors"])
    shutil.rmtree(run / "calibration")
    with caplog.at_level(logging.WARNING):
        assert bits(compress(model, tmp_path / "out", recipe=recipe).path) == bits(out)
    assert any("are not those of before" in record.getMessage() for record in caplog.records)
    assert load_json(run / "blocks" / "0000.json")["calibration"] != "other"


def test_no_block_of_another_plan_is_mixed_in(again, tmp_path):
    """The plan had to be decided again, and gives a block other ranks than it was taught with."""
    run = tmp_path / "out.run"
    log = load_json(run / "blocks" / "0001.json")
    log["ranks"] |= {name: rank + 1 for name, rank in list(log["ranks"].items())[:1]}
    seals = log.pop("tensors")
    save_json(run / "blocks" / "0001.json", log, seals)
    flip(run / "allocation.json")
    found = again()
    assert len(found) == 1 and load_json(run / "blocks" / "0001.json")["ranks"] != log["ranks"]


class Killed(BaseException):
    """The end of the process, as far as this one can play it."""


def killed_after(monkeypatch: pytest.MonkeyPatch, snapshots: int) -> None:
    """Let a training end without a chance to clean up, right after some snapshots."""
    save, done = trainer._save, list[object]()

    def counted(*state: Any) -> None:
        save(*state)
        done.append(state)
        if len(done) == snapshots:
            raise Killed

    monkeypatch.setattr(trainer, "_save", counted)


@pytest.mark.parametrize(("name", "kind"), [("state.json", "a flipped byte"), ("0000.safetensors", "gone")])
@pytest.mark.parametrize("stage", ["sequential", "joint", "recovery"])
def test_a_damaged_state_of_a_training_is_not_gone_on_from(
    make_model, quick, tmp_path, monkeypatch, caplog, stage, name, kind
):
    model = make_model(num_hidden_layers=2)
    monkeypatch.setitem(story.SCHEDULES, "sequential", partial(schedules.distill_sequentially, snapshot_seconds=0))
    monkeypatch.setitem(story.SCHEDULES, "joint", partial(schedules.distill_jointly, snapshot_seconds=0))
    monkeypatch.setattr(story, "recover", partial(story.recover, snapshot_seconds=0))
    recipe = quick(distill={"epochs": 0}, recover={"epochs": 1, "lr": 1e-3})
    if stage != "recovery":
        recipe = quick(distill={"schedule": stage, "epochs": 1})
    whole = bits(compress(model, tmp_path / "whole", recipe=recipe).path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 2)
        compress(model, tmp_path / "out", recipe=recipe)
    (file,) = (tmp_path / "out.run" / stage).rglob(name)
    DAMAGES[kind](file)
    with caplog.at_level(logging.WARNING):
        assert bits(compress(model, tmp_path / "out", recipe=recipe).path) == whole
    named = [record.getMessage() for record in caplog.records if str(file) in record.getMessage()]
    assert len(named) == 1 and named[0].endswith("it is made again")


def test_a_seal_covers_names_types_shapes_and_bytes(tmp_path):
    tensors = {"a": torch.arange(6.0), "b": torch.tensor(3), "empty": torch.empty(0, 2), "bits": torch.ones(3).bool(),
               "half": torch.ones(2, dtype=torch.bfloat16), "view": torch.arange(6.0).view(2, 3).T}  # fmt: skip
    others = (
        tensors | {"a": tensors["a"].view(2, 3)},
        {("c" if name == "a" else name): tensor for name, tensor in tensors.items()},
        tensors | {"a": tensors["a"].int()},
        tensors | {"a": -tensors["a"]},
    )
    seals = [seal_of("0", kind) for kind in (tensors, *others)] + [seal_of("1", tensors)]
    assert len(set(seals)) == 6
    assert save_tensors(tmp_path / "0", tensors) == seals[0]
    back = load_tensors(tmp_path / "0")
    assert set(back) == set(tensors)
    assert all(torch.equal(back[n], tensor) and back[n].dtype == tensor.dtype for n, tensor in tensors.items())
    assert check_seal(tmp_path / "0") == seals[0] == seal_of("0", dict(reversed(tensors.items())))


def test_no_artefact_passes_for_another(tmp_path):
    save_json(tmp_path / "a.json", {"a": 1})
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    for suffix, load in (("json", load_json), ("safetensors", load_tensors), ("safetensors", check_seal)):
        shutil.copyfile(tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}")
        with pytest.raises(DamagedError, match="does not match its digest"):
            load(tmp_path / f"b.{suffix}")


def test_a_folder_in_the_place_of_an_artefact_is_named(tmp_path):
    for name, load in (("a.json", load_json), ("a.safetensors", load_tensors)):
        (tmp_path / name).mkdir()
        with pytest.raises(IsADirectoryError, match=name):
            load(tmp_path / name)


@pytest.mark.parametrize(("name", "load"), [("a.json", load_json), ("a.safetensors", load_tensors)])
def test_a_pipe_is_no_artefact(tmp_path, name, load):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DamagedError, match=rf"{re.escape(name)} is missing"):
        load(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"{", b"[" * 10**5, b'{"seal": 1}', b"\xff\xfe"])
def test_a_json_artefact_that_is_none_says_so(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DamagedError, match=r"a\.json is damaged.*the same command makes it again"):
        load_json(tmp_path / "a.json")


def test_numbers_keys_and_names_come_back_as_they_were(tmp_path):
    value = {"a": [1, 0.1, float("inf"), None], "é": {"b": (1, 2)}, "name": "\udcff"}
    save_json(tmp_path / "a.json", value | {"numbered": {10: 1, 9: 2}})
    wanted = json.loads(json.dumps(value)) | {"numbered": {"10": 1, "9": 2}}
    assert load_json(tmp_path / "a.json") == wanted
