"""The same for every architecture: compress, load elsewhere, generate, save again, export, resume.

The rows are in `rows.py`. Weights are random and runs are short: what is compared is that the parts agree with each other,
not how good the result is.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from architectures.rows import ROWS, Row, write_images, write_speech
from lillama import compress, export, load_recipe, plan
from lillama.hub.portable import make_portable
from lillama.system import memory
from lillama.system.progress import Progress

SHORT = {"distill": {"epochs": 1}, "recover": {"epochs": 1, "lr": 4e-3}, "ranks": {"multiple_of": 1}}
JOINT = {"ranks": {"name": "uniform", "multiple_of": 1}, "distill": {"lr": 1e-3}}

BITS = (8, 3, 5, 4, 6)

Ask = Callable[..., dict[str, Tensor]]


class Stopped(BaseException):
    """Ends a run in the middle."""


@pytest.fixture(scope="session")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ask]]:
    """Return, for lillama imported and for remote code alone, what loads and runs a model in a fresh process."""
    cache = tmp_path_factory.mktemp("modules")
    script = Path(__file__).with_name("loader.py")
    servers = {
        mode: subprocess.Popen(
            [sys.executable, str(script), mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env={"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        for mode in ("import", "remote")
    }  # fmt: skip

    def ask(mode: str, folder: Path, row: Row, again: Path | None = None, write: bool = True) -> dict[str, Tensor]:
        server, inputs, answer = servers[mode], folder.parent / "inputs.st", folder.parent / f"{folder.name}-{mode}.st"
        save_file(row.inputs(), inputs)
        request: dict[str, Any] = {
            "folder": str(folder),
            "auto": row.auto,
            "inputs": str(inputs),
            "answer": str(answer),
            "write": write,
        }
        assert server.stdin is not None and server.stdout is not None
        print(
            json.dumps(request | {"remote": mode == "remote", "again": str(again or "")}), file=server.stdin, flush=True
        )
        if server.stdout.readline() != "ok\n":
            pytest.fail(f"{row.name}, {mode}: {answer.with_suffix('.error').read_text(encoding='utf-8')}")
        return load_file(answer)

    yield {mode: lambda *args, _mode=mode, **kwargs: ask(_mode, *args, **kwargs) for mode in servers}
    for server in servers.values():
        assert server.stdin is not None
        server.communicate()


@pytest.fixture(scope="session")
def calibration(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return what each kind of model is calibrated on."""
    folder = tmp_path_factory.mktemp("calibration")
    speech = write_speech(folder / "speech")
    images = write_images(folder / "images")
    return {"input_ids": text, "input_features": speech, "input_values": speech, "pixel_values": images}


def tensor_names(folder: Path) -> set[str]:
    """Return the names of a checkpoint's tensors."""
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("name", ROWS)
def test_architecture(
    name: str,
    asked: dict[str, Ask],
    calibration: dict[str, Path],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = ROWS[name]
    original = row.save(tmp_path / "model", tokenizer)
    given: dict[str, Any] = {
        "keep": 0.8, "scope": "blocks", "calibration": calibration[row.takes], "tokens": 384, "seq_len": 32,
    }  # fmt: skip
    result = compress(tmp_path / "model", tmp_path / "small", recipe=load_recipe("default", SHORT), **given)
    assert result.stored.params <= result.plan.spec.params - 0.19 * result.plan.spec.block_params
    assert result.plan.spec.params == original.num_parameters()
    assert 0 <= result.held_out.kl + 1e-4 < 1

    # It loads in a fresh process, by lillama or by its own code, and is the same both times, and after it was saved again.
    def check(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))

    loaded = asked["import"](tmp_path / "small", row, again=tmp_path / "again")
    assert loaded["loaded"].isfinite().all()
    check(loaded["again"], loaded["loaded"])
    files = ("model.safetensors", "config.json")
    written = {file: (tmp_path / "small" / file).read_bytes() for file in files}
    make_portable(tmp_path / "small")
    remote = asked["remote"](tmp_path / "small", row)
    check(remote["loaded"], loaded["loaded"])
    assert ("written" in loaded) == original.can_generate()

    # Multiplied out it is a plain model of the original's shapes, which computes the same.
    def check_dense(small: Path, loaded: Tensor) -> None:
        dense = small.with_name(f"{small.name}-dense")
        export(small, dense, "dense")
        assert tensor_names(dense) == tensor_names(tmp_path / "model")
        check(asked["remote"](dense, row, write=False)["loaded"], loaded, 1e-4)

    check_dense(tmp_path / "small", loaded["loaded"])

    # A run that was stopped after its first block goes on to the same bits, in every file of weights and in the
    # configuration, where memory has become so short that all is computed again, and waits on disk.
    def stop(progress: Progress) -> None:
        if progress.task == "taught":
            raise Stopped

    halves = {"run": tmp_path / "halves-run", "recipe": load_recipe("default", SHORT), **given}
    with pytest.raises(Stopped):
        compress(tmp_path / "model", tmp_path / "halves", report=stop, **halves)
    with monkeypatch.context() as short:
        short.setattr(memory, "eighths", lambda free, count: 0)
        compress(tmp_path / "model", tmp_path / "halves", **halves)
    for file in files:
        assert (tmp_path / "halves" / file).read_bytes() == written[file], file

    # The published schedule, all blocks on every batch, runs too; it takes gate and up of an expert apart. Each FFN has half
    # of its neurons, where the architecture's may, and linears are stored in bits of their own, dense ones too.
    recipe = load_recipe("paper", JOINT)
    planned = plan(tmp_path / "model", recipe=recipe, **given).plan
    widths = {ffn.outward: ffn.neurons // 2 for ffn in planned.spec.ffns}
    dense = {name for ffn in planned.spec.ffns for name in ffn.linears}
    ranks = {name: None if name in dense else rank for name, rank in planned.ranks.items()}
    bits = {name: BITS[index % len(BITS)] for index, name in enumerate(ranks)}
    replace(planned, ranks=ranks, widths=widths, bits=bits).save(tmp_path / "plan.json")
    fixed = given | {"rank_plan": tmp_path / "plan.json"}
    del fixed["keep"]
    joint = compress(tmp_path / "model", tmp_path / "joint", recipe=recipe, **fixed)
    assert 0 <= joint.held_out.kl + 1e-4 < 1
    loaded = asked["import"](tmp_path / "joint", row, write=False)["loaded"]
    check_dense(tmp_path / "joint", loaded)
    make_portable(tmp_path / "joint")
    check(asked["remote"](tmp_path / "joint", row, write=False)["loaded"], loaded)
