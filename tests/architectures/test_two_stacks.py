"""What only an encoder-decoder can get wrong: looking ahead at the end of a stack, and resuming between two."""

import json
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from architectures.rows import ROWS
from lillama import compress, load_recipe
from lillama.pipeline import compress as story
from lillama.pipeline import schedules
from lillama.system.progress import Progress

SHORT = {"distill": {"epochs": 1}, "recover": {"epochs": 0}, "ranks": {"name": "uniform", "multiple_of": 1}}


class Stopped(BaseException):
    """Ends a run in the middle."""


@pytest.fixture
def bart(tokenizer, tmp_path: Path) -> Path:
    ROWS["BART"].save(tmp_path / "bart", tokenizer)
    return tmp_path / "bart"


def test_looking_ahead_ends_at_the_end_of_a_stack(bart: Path, text: Path, tmp_path: Path) -> None:
    recipe = load_recipe("default", {**SHORT, "distill": {"epochs": 1, "look_ahead": 0.5}})
    result = compress(
        bart, tmp_path / "out", keep=0.8, scope="blocks", recipe=recipe, calibration=text, tokens=384, seq_len=32
    )
    assert result.held_out.kl < 1


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_only_blocks_that_recovery_does_not_reach_are_taught_by_themselves(
    bart: Path, text: Path, tmp_path: Path, schedule: str
) -> None:
    changes = {"distill": {"epochs": 1, "schedule": schedule}, "recover": {"epochs": 1, "lr": 1e-3}}
    recipe = load_recipe("default", SHORT | changes)
    result = compress(
        bart, tmp_path / "out", keep=0.8, scope="blocks", recipe=recipe, calibration=text, tokens=384, seq_len=32
    )
    logs = [json.loads(log.read_text()) for log in sorted((result.run / "blocks").glob("*.json"))]
    taught = {log["block"] for log in logs if log["steps"]}
    assert taught == {log["block"] for log in logs if ".encoder." in log["block"]}
    assert len(taught) < len(logs) and json.loads((result.run / "recovered" / "log.json").read_text())["steps"]


def test_a_joint_run_goes_on_wherever_it_was_stopped(bart: Path, text: Path, tmp_path: Path, monkeypatch) -> None:
    jointly = partial(schedules.distill_jointly, snapshot_seconds=0)
    monkeypatch.setitem(story.SCHEDULES, "joint", jointly)
    recipe = load_recipe("paper", {"ranks": {"name": "uniform", "multiple_of": 1}, "distill": {"lr": 1e-3}})
    given = {"keep": 0.8, "scope": "blocks", "recipe": recipe, "calibration": text, "tokens": 384, "seq_len": 32}
    whole = compress(bart, tmp_path / "whole", **given)
    for last in range(1, 5):
        taught = 0

        def stop(progress: Progress, last: int = last) -> None:
            nonlocal taught
            taught += progress.task == "taught"
            if taught == last:
                raise Stopped

        out = tmp_path / f"out-{last}"
        with pytest.raises(Stopped):
            compress(bart, out, report=stop, **given)
        compress(bart, out, **given)
        assert load_file(out / "model.safetensors").keys() == load_file(whole.path / "model.safetensors").keys()
        assert (out / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()
