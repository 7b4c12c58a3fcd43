"""The run folder: whose it is, what is in it, what a kill leaves of it."""

import json

import pytest
import torch

from lillama.distill.log import DistillLog
from lillama.errors import DataError, OutputError, TrainingError
from lillama.files.artefacts import save_json
from lillama.runs.run_dir import RunDir, open_run

IDENTITY = {"recipe": {"keep": 0.8, "distill": {"lr": 1e-3}}, "model": {"files": "ab" * 32}, "plan": "cd" * 32}
LOG = DistillLog("b", 4, 100, 1e-3, 2.0, 1.0, True, 4, False, ((1, 2.0, None),), ((0, 2.0, None), (4, 1.0, None)))


def begun(path):
    """Begin a run and leave it as a finished calibration does."""
    with open_run(path, IDENTITY) as run:
        run.calibration.mkdir()
    return run


def test_a_run_is_begun_and_found_again(tmp_path):
    with open_run(tmp_path / "deep" / "run", IDENTITY) as run:
        run.save_block(3, {"w": torch.arange(4.0)}, LOG)
        run.scratch.mkdir()
    with open_run(run.path, json.loads(json.dumps(IDENTITY))) as again:
        assert again.has_block(3) and not again.has_block(2)
        assert torch.equal(again.load_block(3)["w"], torch.arange(4.0))
        assert again.block_log(3)["curve"] == [[1, 2.0, None]] and again.block_log(3)["version"] == 1
        assert not again.scratch.exists()


def test_what_memory_decided_at_first_is_followed(tmp_path):
    with open_run(tmp_path / "run", IDENTITY) as run:
        assert run.decision("recovery compiled", True) and not run.decision("stack 0 compiled", False)
    with open_run(tmp_path / "run", IDENTITY) as run:
        assert run.decision("recovery compiled", False) and not run.decision("stack 0 compiled", True)
    with open_run(tmp_path / "run", IDENTITY, restart=True) as run:
        assert not run.decision("recovery compiled", False)


def test_a_block_without_its_log_is_not_finished(tmp_path):
    with open_run(tmp_path, IDENTITY) as run:
        run.save_block(0, {"w": torch.zeros(1)}, LOG)
        (tmp_path / "blocks" / "0000.json").unlink()
        assert not run.has_block(0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": {"keep": 0.6, "distill": {"lr": 1e-3}}}, r"recipe\.keep = 0\.8, now it is 0\.6"),
        ({"recipe": {"keep": 0.8, "distill": {"lr": 1e-4}}}, r"recipe\.distill\.lr = 0\.001, now it is 0\.0001"),
        ({"model": {"files": "ef" * 32}}, r"model\.files = abababababab\.\.\., now it is efefefefefef\.\.\."),
        ({"recipe": {"keep": 0.6, "distill": {"lr": 1e-3}}, "plan": "ef" * 32}, r"recipe\.keep"),
        ({"plan": "ef" * 32}, "plan = cdcdcdcdcdcd"),
        ({"data": {"a.txt": "12" * 32}}, r"data\.a\.txt = None"),
    ],
)
def test_another_identity_is_refused_by_name(tmp_path, change, named):
    begun(tmp_path)
    with pytest.raises(OutputError, match=named + ".*--restart.*--run"), open_run(tmp_path, IDENTITY | change):
        pass
    with open_run(tmp_path, IDENTITY):
        pass


def test_restart_forgets(tmp_path):
    with open_run(tmp_path, IDENTITY) as run:
        run.save_block(0, {"w": torch.zeros(1)}, LOG)
        run.save_metrics({"a": 1})
    with open_run(tmp_path, {"recipe": 2}, restart=True) as run:
        assert not run.has_block(0)
        assert {path.name for path in tmp_path.iterdir()} == {"run.json", "lock"}


def test_a_damaged_marker_is_refused(tmp_path):
    begun(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(OutputError, match=r"damaged.*--restart"), open_run(tmp_path, IDENTITY):
        pass
    with open_run(tmp_path, IDENTITY, restart=True):
        pass


def test_files_and_foreign_folders_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"), open_run(tmp_path / "file", IDENTITY):
        pass
    for name in ("thesis.tex", "plan.json", "lock.tmp"):
        folder = tmp_path / f"folder-{name}"
        folder.mkdir()
        (folder / name).touch()
        with pytest.raises(OutputError, match="something else"), open_run(folder, IDENTITY, restart=True):
            pass
        assert [path.name for path in folder.iterdir()] == [name]


def test_one_process_at_a_time(tmp_path):
    with open_run(tmp_path, IDENTITY):
        with pytest.raises(OutputError, match="another process"), open_run(tmp_path, IDENTITY, restart=True):
            pass
        assert (tmp_path / "run.json").is_file()
    with open_run(tmp_path, IDENTITY):
        pass


def test_what_a_kill_left_is_swept(tmp_path):
    run = begun(tmp_path)
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / ".0001.safetensors.99.tmp").touch()
    for name in (".calibration.lillama/new/tokens", ".calibration.lillama/old/tokens", ".joint.lillama/old/0000.json",
                 "recovery/.0.004.lillama/old/0000.json"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
        (tmp_path / name).parents[1].joinpath("lock").touch()
    with open_run(tmp_path, IDENTITY):
        assert (run.joint_state(0) / "0000.json").is_file() and (
            tmp_path / "recovery" / "0.004" / "0000.json"
        ).is_file()
        assert run.calibration.is_dir() and not list(run.calibration.iterdir())
        assert not list(tmp_path.rglob(".*"))


def test_a_refusal_before_the_tokens_leaves_nothing(tmp_path):
    with pytest.raises(DataError), open_run(tmp_path / "run", IDENTITY):
        raise DataError("no text")
    assert not (tmp_path / "run").exists()


def test_a_failure_after_the_tokens_leaves_the_run(tmp_path):
    with pytest.raises(TrainingError), open_run(tmp_path / "run", IDENTITY) as run:
        run.calibration.mkdir()
        raise TrainingError("not finite")
    assert run.calibration.exists() and (run.path / "run.json").is_file()
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "other", IDENTITY):
        raise KeyboardInterrupt
    assert (tmp_path / "other" / "run.json").is_file()


def test_states_of_distillation_go_when_they_are_not_needed(tmp_path):
    run = RunDir(tmp_path)
    run.remove_states()
    for folder in (run.block_state(3), run.joint_state(0), run.joint_state(1)):
        folder.mkdir(parents=True)
    run.remove_states()
    assert not any(tmp_path.glob("sequential")) and not any(tmp_path.glob("joint*"))


def test_a_folder_of_another_version_is_refused_by_one_line(tmp_path):
    run = begun(tmp_path / "run")
    marker = run.path / "run.json"
    save_json(marker, {"version": 1, "identity": IDENTITY})
    with pytest.raises(OutputError, match=r"run\.json: version is 1, this lillama writes and reads 2; .*--restart"):
        begun(run.path)
    assert run.calibration.is_dir()  # nothing is lost
    with open_run(run.path, IDENTITY, restart=True) as again:
        assert not again.calibration.exists()
