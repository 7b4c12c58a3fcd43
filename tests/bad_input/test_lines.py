"""What a user can get wrong ends with one clear line, exit status 2, and nothing half-written."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lillama.cli import app as cli
from lillama.cli.app import main
from lillama.errors import ModelError
from lillama.pipeline import compress as story
from lillama.pipeline import job as job_module
from lillama.pipeline.api import compress
from lillama.pipeline.job import build_job
from lillama.recipes.options import Machine
from lillama.system import memory

Q = "model.layers.1.self_attn.q_proj.weight"


def edit_config(model: Path, **changes) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def truncate(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickle_only(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def escape(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q: "../../secret.safetensors"}}))


def drop(*names: str) -> Callable[[Path], None]:
    return lambda model: [(model / name).unlink() for name in names] and None


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "empty folder": (lambda m: (shutil.rmtree(m), m.mkdir()), r"no config\.json"),
    "no weights": (drop("model.safetensors"), "model folder with weights is needed"),
    "pickled weights": (pickle_only, "pickled weights.*convert"),
    "index leads outside": (escape, "outside the folder"),
    "no tokenizer": (drop("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "tensor missing": (lambda m: edit_weights(m, lambda t: t.pop(Q)), f"{re.escape(Q)} is missing"),
    "wrong shape": (
        lambda m: edit_weights(m, lambda t: t.update({Q: t[Q][:-1].clone()})),
        f"{re.escape(Q)} has shape.*31, 32",
    ),
    "wrong type": (
        lambda m: edit_weights(m, lambda t: t.update({Q: t[Q].to(torch.int8)})),
        f"{re.escape(Q)} is stored as I8",
    ),
    "NaN": (lambda m: edit_weights(m, lambda t: t[Q].view(-1)[5].fill_(torch.nan)), f"{re.escape(Q)} holds NaN"),
    "truncated": (truncate, "truncated"),
    "unknown class": (lambda m: edit_config(m, architectures=["LlamaForCausalLN"]), "did you mean 'LlamaForCausalLM'"),
    "unknown type": (lambda m: edit_config(m, model_type="lama"), "lama"),
    "damaged config": (lambda m: (m / "config.json").write_text("{"), r"config\.json"),
    "quantised": (lambda m: edit_config(m, quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
}

OPTIONS: dict[str, tuple[list[str], str]] = {
    "keep zero": (["--keep", "0"], "keep is 0"),
    "keep negative": (["--keep=-0.5"], "keep is -0.5"),
    "keep above one": (["--keep", "1.5"], "keep is 1.5.*1"),
    "keep no number": (["--keep", "half"], "half"),
    "keep nan": (["--keep", "nan"], "keep is nan"),
    "unreachable keep": (["--keep", "0.05"], r"smallest reachable keep is 0\.\d+"),
    "unknown option": (["--kep", "0.5"], "--kep"),
    "unknown recipe": (["--recipe", "papre"], "did you mean 'paper'"),
    "unknown key": (["--recipe", "{unknown}"], "unknown key distill.epoch; did you mean 'epochs'"),
    "wrong type in a recipe": (["--recipe", "{wrong}"], "distill.epochs is 'many'"),
    "no recipe": (["--recipe", "{list}"], "mapping"),
    "recipe is no YAML": (["--recipe", "{broken}"], "YAML"),
    "unknown scope": (["--scope", "all"], "all"),
    "no linear matches": (["--targets", "mlq.*"], "no linear matches"),
    "text too short": (["--calibration", "{short}"], "less than one sequence"),
    "no such text": (["--calibration", "nowhere.txt"], "nowhere.txt"),
    "unknown kind of text": (["--calibration", "{wrong}"], "unknown file type"),
    "no tokens": (["--tokens", "0"], "tokens is 0"),
    "fewer tokens than a sequence": (["--tokens", "10"], "less than one sequence"),
    "no length": (["--seq-len", "0"], "seq_len is 0"),
    "beyond the context": (["--seq-len", "129"], "128 positions"),
    "no micro-batch": (["--micro-batch", "0"], "micro_batch is 0"),
    "negative memory": (["--activation-memory=-4GB"], "-4GB"),
    "no size": (["--shard-size", "big"], "big"),
    "unknown device": (["--device", "tpu9"], "tpu9.*--device"),
    "absent device": (["--device", "cuda:77"], "cuda:77.*--device"),
    "two sizes": (["--keep", "0.5", "--plan", "{wrong}"], "each decides the size"),
    "no plan": (["--plan", "{wrong}"], "give a plan that an earlier run saved"),
    "missing plan": (["--plan", "nowhere.json"], "nowhere.json: "),
    "no evaluation text": (["--text", "nowhere.txt"], "nowhere.txt"),
    "run is a file": (["--run", "{wrong}"], "is a file"),
    "run holds something else": (["--run", "{folder}"], "something else than a run"),
}


@pytest.fixture
def call(quick, tmp_path, capsys, text) -> Callable[..., str]:
    """Return a function that compresses by the command line; it checks the manner of the refusal and returns its line."""
    recipe = tmp_path / "quick.yaml"
    recipe.write_text(quick().as_yaml(), encoding="utf-8")

    def run(model: Path, *options: str, status: int = 2) -> str:
        given = [] if "--recipe" in options else ["--recipe", str(recipe)]
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(["compress", str(model), str(tmp_path / "out"), *given, *options])
        printed = capsys.readouterr()
        assert exit_.value.code == status
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
        assert printed.out == ""
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
        return printed.err

    return run


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models(make_model, call, tmp_path, damage):
    spoil, match = DAMAGES[damage]
    model = make_model()
    spoil(model)
    assert re.search(match, call(model))
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize("mistake", OPTIONS)
def test_mistaken_options(tiny, call, tmp_path, mistake):
    options, match = OPTIONS[mistake]
    folder = tmp_path / "folder"
    folder.mkdir()
    contents = {"unknown": "distill: {epoch: 3}", "wrong": "distill: {epochs: many}", "list": "- 1", "broken": "{: ["}
    files = {name: tmp_path / f"{name}.yaml" for name in contents}
    for name, file in files.items():
        file.write_text(contents[name])
    (tmp_path / "short.txt").write_text("too short")
    (folder / "thesis.tex").write_text("dear")
    places = {name: str(file) for name, file in files.items()} | {
        "short": str(tmp_path / "short.txt"),
        "folder": str(folder),
    }
    assert re.search(match, call(tiny, *(option.format(**places) for option in options)))
    assert not (tmp_path / "out.run").exists()
    assert [file.name for file in folder.iterdir()] == ["thesis.tex"]


def test_out_that_holds_something_else(tiny, quick, tmp_path, capsys):
    for out in (tmp_path / "file", tmp_path / "folder"):
        if out.name == "file":
            out.write_text("mine")
        else:
            out.mkdir()
            (out / "mine").write_text("mine")
        with pytest.raises(SystemExit, match="2"):
            main(["compress", str(tiny), str(out)])
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "not an earlier result" in error
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "mine").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_out_inside_a_file(tiny, text, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        main(["compress", str(tiny), str(tmp_path / "file" / "out"), "--calibration", str(text), "--seq-len", "32"])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_an_already_compressed_model(tiny, quick, call, tmp_path):
    small = compress(tiny, tmp_path / "small", recipe=quick(distill={"epochs": 0})).path
    assert "already compressed by lillama" in call(small)


def test_out_of_disk_is_told_before_work_begins(tiny, call, tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "free_disk", lambda path: 1000)
    assert re.search(r"of disk are needed.*0 MB are free.*--run", call(tiny))
    assert not (tmp_path / "out.run").exists()


def test_room_for_the_result_is_looked_for_on_its_own_disk(tiny, call, monkeypatch):
    monkeypatch.setattr(job_module, "_disk", lambda path: path.name)
    monkeypatch.setattr(job_module, "free_disk", lambda path: 0 if path.name == "out" else 10**12)
    assert re.search("out: .* of disk are needed", call(tiny))


def test_out_of_memory_is_told_before_work_begins(tiny, call, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    assert "lower --micro-batch" in call(tiny)
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(("times", "saved"), [(1.9, True), (2.1, False)])
def test_memory_is_saved_where_there_is_less_than_twice_what_is_needed(
    tiny, quick, tmp_path, monkeypatch, times, saved
):
    called, needed = [], build_job(tiny, quick(), Machine()).needs.memory_bytes
    monkeypatch.setattr(memory, "free_memory", lambda device: round(times * needed))
    monkeypatch.setattr(story, "save_memory", lambda: called.append(True))
    compress(tiny, tmp_path / "out", recipe=quick())
    assert bool(called) == saved


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: no space left.*--run"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left.*--run"),
        (MemoryError(), "out of memory.*--micro-batch"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "out of memory.*--micro-batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    ],
)
def test_shortage_on_the_way_is_explained_and_the_run_goes_on(tiny, quick, call, tmp_path, monkeypatch, error, match):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(story, "assemble", fail)
    assert re.search(match, call(tiny))
    monkeypatch.undo()
    assert (tmp_path / "out.run" / "blocks" / "0002.json").is_file()
    monkeypatch.setitem(story.SCHEDULES, "sequential", None)
    compress(tiny, tmp_path / "out", recipe=quick())


def test_interruption_is_one_line_and_status_one(tiny, call, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(story, "assemble", interrupt)
    assert "interrupted" in call(tiny, status=1)


def test_a_failure_of_the_machine_is_status_one(tiny, call, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error", "/dev/sdx")

    monkeypatch.setattr(story, "assemble", fail)
    assert "/dev/sdx: Input/output error" in call(tiny, status=1)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["evaluate", "{model}", "--text", "nowhere.txt"], "nowhere.txt"),
        (["evaluate", "{model}"], "--text"),
        (["evaluate", "{model}", "--text", "{text}", "--seq-len", "1"], "seq_len is 1"),
        (["evaluate", "{model}x", "--text", "{text}"], "no such folder"),
        (["plan", "{model}x"], "no such folder"),
        (["plan", "{model}", "--keep", "2"], "keep is 2"),
        (["plan", "{model}", "--seq-len", "0"], "seq_len is 0"),
        (["plan", "{model}", "--micro-batch", "0"], "micro_batch is 0"),
        (["export", "{model}", "{out}", "--format", "dense"], "not a model compressed by lillama"),
        (["export", "{model}", "{out}", "--format", "gguf"], "gguf"),
        (["compres", "{model}", "{out}"], "compres"),
        (["compress", "{model}"], "OUT"),
    ],
)
def test_other_commands(tiny, text, tmp_path, capsys, words, match):
    with pytest.raises(SystemExit) as exit_:
        main([word.format(model=tiny, text=text, out=tmp_path / "out") for word in words])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and re.search(match, error), error
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_real_process_says_one_line(tmp_path):
    command = [sys.executable, "-m", "lillama.cli.app", "compress", str(tmp_path / "none"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    own = [line for line in done.stderr.splitlines() if "torch" not in line]  # torchao, where installed, chatters
    assert len(own) == 1 and own[0].startswith("error: ")
    assert not any(tmp_path.iterdir())


def test_a_broken_pipe_is_no_traceback():
    def work():
        raise BrokenPipeError

    assert cli.run(work) == 1


TWO_SIDED = {"init": {"name": "two-sided"}}


@pytest.mark.parametrize(
    ("tensor", "value", "named", "changes"),
    [
        ("model.layers.1.mlp.down_proj.weight", 3e38, r"the output of model\.layers\.1", {}),
        ("model.layers.1.mlp.down_proj.weight", 1e25, r"the output of model\.layers\.1", {}),  # its square overflows
        ("model.layers.1.mlp.down_proj.weight", 3e38, r"the output of model\.layers\.1", TWO_SIDED),
        ("lm_head.weight", 3e38, "what the head predicts", TWO_SIDED),
    ],
)
def test_finite_weights_that_overflow_are_found_before_any_block_is_taught(
    make_model, quick, tmp_path, text, tensor, value, named, changes
):
    model = make_model()
    edit_weights(model, lambda tensors: tensors.update({tensor: torch.full_like(tensors[tensor], value)}))
    with pytest.raises(
        ModelError, match=f"{named} of the original holds NaN, infinite or far too large values.*float32"
    ):
        compress(model, tmp_path / "out", recipe=quick(**changes), calibration=text)
    assert not (tmp_path / "out.run" / "blocks").exists()


@pytest.mark.parametrize("number", [errno.ELOOP, errno.ENAMETOOLONG])
def test_names_that_no_file_can_have_are_the_users_to_mend(number):
    def work():
        raise OSError(number, os.strerror(number), "plan.json")

    assert cli.run(work) == 2
