"""What bench/real.py promises: rows once and apart, refusals in one line, failures written down."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import lillama
from lillama.errors import ModelError

pytest.importorskip("lm_eval")
pytest.importorskip("jiwer")
pytest.importorskip("soundfile")
sys.path.append(str(Path(__file__).parents[2] / "bench"))

import real
from real_models.cases import CASES, Case, Job, Place, Setting
from real_models.rows import ROWS, Order, Row
from tiny.speech import made_processor, random_model

JOB, DONE = Job("minilm", "default", 0.8), {"measured": {"sentences": 3}}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A place without models and assets."""
    monkeypatch.setenv("LILLAMA_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(real, "ASSETS", tmp_path / "assets")
    return Place(tmp_path / "assets", tmp_path / "out", "cpu")


def fetched(name: str, place: Place) -> None:
    folder = place.out.parent / "models" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def test_a_model_that_is_not_there_is_refused_with_the_command_that_fetches_it(place: Place, capsys) -> None:
    assert real.main(["--model", "minilm", "--only", "dense", "1.0", "--out", str(place.out)]) == 2
    refusal = capsys.readouterr().err
    assert refusal == (
        f"error: minilm: no model at {place.out.parent}/models/minilm; python bench/models.py minilm fetches it\n"
    )


def test_texts_that_are_not_there_are_refused_by_name(place: Place, capsys) -> None:
    fetched("minilm", place)
    assert real.main(["--model", "minilm", "--only", "dense", "1.0", "--out", str(place.out)]) == 2
    missing = f"{place.assets}/text/c4_demo.jsonl"
    assert capsys.readouterr().err == f"error: minilm: no {missing}; set LILLAMA_ASSETS to the folder with the texts\n"


def test_a_program_that_is_not_there_is_refused_by_name(place: Place, tmp_path: Path) -> None:
    fetched("tiny", place)
    case = Case("tiny", "speech", 1, 1, (), {"test": ()}, programs=("no-such-program",))
    assert "no-such-program is not installed" in (case.lacking("test", tmp_path) or "")
    case = Case("tiny", "speech", 1, 1, (), {"test": ()}, modules=("no_such_module",))
    assert case.lacking("test", tmp_path) == "tiny: no_such_module is not installed; pip install no_such_module"


def test_the_other_models_are_computed_where_one_is_not_there(place: Place, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Case, "lacking", lambda case, part, assets: "gone" if case.name == "whisper-base" else None)
    ran: list[Job] = []
    monkeypatch.setattr(real, "run_apart", lambda job, setting, place: ran.append(job) or 0)
    assert real.main(["--out", str(place.out)]) == 2
    assert [job.model for job in ran] == 13 * ["smollm2-135m"] + 9 * ["minilm"]
    assert capsys.readouterr().err == "error: gone\n"
    assert (place.out / "real.md").read_text().count("Not computed:") == 3, "the tables say what is missing"


def test_a_row_that_is_there_is_not_computed_again_and_one_that_failed_is(place: Place, monkeypatch) -> None:
    def broken(*_: Any) -> dict[str, Any]:
        raise ModelError("no such weights")

    def never(*_: Any) -> dict[str, Any]:
        raise AssertionError("computed again")

    monkeypatch.setattr(real, "compute", broken)
    assert real.run_one(JOB, Setting(), place) == 1
    file = real.row_file(JOB, Setting(), place)
    assert json.loads(file.read_text()) == {**vars(JOB), "reason": "no such weights"}
    monkeypatch.setattr(real, "compute", lambda *_: vars(JOB) | DONE)
    assert real.run_one(JOB, Setting(), place) == 0
    monkeypatch.setattr(real, "compute", never)
    assert real.run_one(JOB, Setting(), place) == 0 and "reason" not in json.loads(file.read_text())


def test_rows_of_another_setting_time_or_seed_are_other_rows(place: Place) -> None:
    settings = Setting(), Setting("valid"), Setting(limit=2), Setting(tokens=4096)
    some = (
        JOB,
        Job("minilm", "default", 0.8, 1),
        Job("minilm", "default", 0.8, 0, "20m"),
        Job("minilm", "paper-lr", 0.8),
    )
    assert len({real.row_file(job, setting, place) for setting in settings for job in some}) == 16


def test_time_is_for_the_default_alone(place: Place, monkeypatch) -> None:
    monkeypatch.setattr(Case, "lacking", lambda *_: None)
    ran: list[Job] = []
    monkeypatch.setattr(real, "run_apart", lambda job, setting, place: ran.append(job) or 0)
    assert real.main(["--model", "minilm", "--time", "20m", "--out", str(place.out)]) == 0
    assert {(job.row, job.time) for job in ran} == {
        ("dense", None), ("paper-lr", None), ("svd-llm", None), ("aa-svd-25", None), ("default", "20m")
    }  # fmt: skip
    assert real.main(["--time", "soon"]) == 2


def test_a_process_that_dies_leaves_its_status_in_the_place_of_the_row(place: Place, monkeypatch) -> None:
    calls: list[list[str]] = []

    def dies(call: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(call)
        return subprocess.CompletedProcess(call, -9)

    monkeypatch.setattr(real.subprocess, "run", dies)
    assert real.run_apart(JOB, Setting("valid", 2), place) == 1
    assert "status -9" in json.loads(real.row_file(JOB, Setting("valid", 2), place).read_text())["reason"]
    given = real.parse(calls[0][2:])
    assert (given.only, given.part, given.limit, given.seed) == (["default", "0.8"], "valid", 2, 0), "the same row"


@pytest.mark.parametrize("words", [
    ["--only", "default", "0.8"], ["--model", "minilm", "--only", "no-row", "0.8"], ["--limit", "0"],
    ["--model", "minilm", "--only", "dense", "0.8"], ["--model", "minilm", "--only", "default", "x"],
])  # fmt: skip
def test_rows_that_there_are_not_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        real.parse(words)
    assert stopped.value.code == 2


# ---- a whole row


@pytest.fixture
def tiny_case(place: Place, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The tiny model as a case, with a text and two documents of a task."""
    case = Case(tiny.name, "language", 640, 32, ({"path": str(text), "weight": 1.0},), {"test": (str(text),)})
    monkeypatch.setitem(CASES, tiny.name, case)
    monkeypatch.setenv("LILLAMA_MODELS", str(tiny.parent))
    rows = [{"query": f"a {i} so", "gold": i, "choices": ["b", "c"]} for i in range(2)]
    (place.assets / "eval").mkdir(parents=True)
    (place.assets / "eval" / "copa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_a_row_of_a_language_model_from_its_recipe_to_the_table(tiny_case: Place, tiny: Path) -> None:
    setting, job = Setting(limit=2), Job(tiny.name, "svd-llm", 0.8)
    assert real.run_one(job, setting, tiny_case) == 0
    real.write_tables(setting, tiny_case.out)
    (row,) = json.loads((tiny_case.out / "real-test-limit2.json").read_text())["rows"]
    assert row["bytes"] == row["allowed_bytes"] and row["calibrated_on"] == 640
    assert (row["limit"], row["seed"], row["device"]["name"]) == (2, 0, "cpu") and row["seconds"] > 0
    (found,) = row["measured"]["texts"]
    excess = found["against"]["excess_loss"]
    assert found["against"]["windows"] == 2 and excess["low"] <= excess["value"] <= excess["high"]
    assert found["against"]["continuation"]["prompts"] == 2
    assert [(task["task"], task["documents"]) for task in row["measured"]["tasks"]] == [("copa", 2)]
    assert "logiqa" in row["measured"]["absent_tasks"]
    page = (tiny_case.out / "real-test-limit2.md").read_text()
    assert "| SVD-LLM | 80% |" in page and "A rehearsal: at most 2 documents" in page


def test_a_function_that_writes_a_model_folder_is_a_row_in_one_line(tiny_case: Place, tiny: Path, monkeypatch) -> None:
    def copied(order: Order, out: Path) -> Mapping[str, Any]:
        shutil.copytree(order.model, out)
        return {"method": "copied"}

    monkeypatch.setitem(ROWS, "copied", Row("copied", copied))
    row = real.compute(Job(tiny.name, "copied", 0.8), Setting(limit=1), tiny_case)
    assert row["measured"]["texts"][0]["against"]["excess_loss"]["value"] == 0
    assert row["method"] == "copied" and row["bytes"] > row["allowed_bytes"]


@pytest.mark.parametrize("row", ["modegpt", "zero-sum"])
def test_a_published_method_makes_a_model_of_the_size_that_is_asked_for(
    row: str, tiny: Path, text: Path, tmp_path: Path
) -> None:
    make, plain = ROWS[row].make, lillama.plan(tiny, recipe="baselines/svd", keep=0.7, scope="blocks").plan
    assert make is not None and ROWS[row].kinds == ("language",)
    calibration = {"sources": [{"path": str(text)}], "tokens": 640, "seq_len": 32}
    told = make(Order(tiny, 0.7, plain.kept_bytes, calibration), tmp_path / "out")
    assert told["calibrated_on"] == 640
    assert abs(told["params"] - plain.kept_params) <= 0.02 * plain.spec.params
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() >= told["params"]


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng reads")
def test_a_row_of_a_speech_model_hears_what_is_read_to_it(place: Place, monkeypatch) -> None:
    read = "The cat sat on the mat. The dog lay on the old rug. A bird sang in the high tree."
    for name, words in (("calib", read), ("held", "All of us went to the sea. None of them was at home then.")):
        (place.assets / f"{name}.jsonl").parent.mkdir(exist_ok=True)
        (place.assets / f"{name}.jsonl").write_text(json.dumps({"text": words}))
    case = Case("whisper", "speech", 300, 100, ({"path": "calib.jsonl"},), {"valid": ("held.jsonl",)})
    monkeypatch.setitem(CASES, "whisper", case)
    processor = made_processor([read])
    random_model(len(processor.tokenizer), seed=0).save_pretrained(case.folder)
    processor.save_pretrained(case.folder)
    row = real.compute(Job("whisper", "svd-llm", 0.8), Setting("valid", limit=1), place)
    (calibrated,) = (place.out / "speech").glob("calib-*")
    assert len(list(calibrated.glob("*.wav"))) == row["calibrated_on"] == 3 and row["bytes"] <= row["allowed_bytes"]
    assert row["measured"].keys() == {"espeak-ng"} and row["measured"]["espeak-ng"]["utterances"] == 1
    assert "points" in row["measured"]["espeak-ng"]
