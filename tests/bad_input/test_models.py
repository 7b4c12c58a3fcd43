"""Every command that takes a MODEL refuses the same folders in the same words, and runs nothing that lies in them."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lillama.cli.app import main
from lillama.pipeline.api import compress
from lillama.pipeline.job import plan

Q = "model.layers.1.self_attn.q_proj.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def edit(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def pickled(model: Path) -> None:
    (model / SINGLE).unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Payload(model / "MARK")}))


def outside(model: Path) -> None:
    (model / SINGLE).rename(model.parent / "secret.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": {Q: "../secret.safetensors"}}))


def coded(model: Path) -> None:
    (model / "odd.py").write_text(f"from pathlib import Path\nPath({str(model / 'MARK')!r}).touch()\n")
    edit(model, model_type="odd", architectures=["Odd"], auto_map={"AutoConfig": "odd.C"})


def adapter(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"a": torch.zeros(1)}, model / "adapter_model.safetensors")


def adapter_alone(model: Path) -> None:
    for file in model.iterdir():
        file.unlink()
    adapter(model)


def compiled(model: Path) -> None:
    tensors = load_file(model / SINGLE)
    save_file({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, model / SINGLE, {"format": "pt"})


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled weights": (pickled, r"pytorch_model\.bin: pickled weights are never loaded.*convert"),
    "an index that leads outside": (outside, r"index\.json: tensor .* points outside the folder"),
    "code of its own": (coded, r"config\.json: this model needs code of its own .*--trust-remote-code"),
    "an adapter beside the weights": (adapter, r"adapter_config\.json: an adapter .*merge_and_unload"),
    "an adapter alone": (adapter_alone, r"adapter_config\.json: an adapter .*merge_and_unload"),
    "deep JSON": (lambda m: (m / "config.json").write_text("[" * 100_000), r"config\.json: nested too deeply"),
    "another type": (lambda m: edit(m, hidden_size="32"), r"config\.json: .*hidden_size"),
    "endless layers": (lambda m: edit(m, num_hidden_layers=10**9), "num_hidden_layers is 1000000000, more than any"),
    "endless words": (lambda m: edit(m, vocab_size=10**15), "larger than any model"),
    "compiled": (compiled, "saved inside a wrapper .*_orig_mod.save_pretrained"),
}
COMMANDS = {
    "plan": ["plan", "{model}"],
    "compress": ["compress", "{model}", "{out}", "--calibration", "{text}", "--seq-len", "32"],
    "evaluate": ["evaluate", "{model}", "--text", "{text}", "--seq-len", "32", "--windows", "1"],
    "against": ["evaluate", "{sound}", "--against", "{model}", "--text", "{text}", "--seq-len", "32", "--windows", "1"],
    "probe": ["probe", "{model}", "--benchmark", "lexical-en"],
    "bench": ["bench", "{model}", "--batch", "1", "--prompt", "4", "--new", "2", "--repeats", "1"],
}
ELSEWHERE = {
    ("pickled weights", "plan"): "shapes are known from the configuration alone",
    ("compiled", "bench"): "another process finds it out",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_all_commands_refuse_alike(
    folder: str, command: str, tiny: Path, make_model: Callable[..., Path], text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if (folder, command) in ELSEWHERE:
        pytest.skip(ELSEWHERE[folder, command])
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    spoil, match = FOLDERS[folder]
    model = make_model()
    spoil(model)
    places = {"model": model, "out": tmp_path / "out", "text": text, "sound": tiny}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([part.format(**places) for part in COMMANDS[command]])
    printed = capsys.readouterr().err
    assert exit_.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1, printed
    assert re.search(match, printed), printed
    assert not (model / "MARK").exists() and not list(tmp_path.iterdir())


def test_bytes_hold_for_the_file_that_is_written_whatever_the_configuration_says(
    make_model: Callable[..., Path], quick: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model()
    edit(model, dtype="bfloat16")
    most = int(0.8 * (model / SINGLE).stat().st_size)
    planned = plan(model, nbytes=most, recipe=quick())
    result = compress(model, tmp_path / "out", nbytes=most, recipe=quick(distill={"epochs": 0}))
    written = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / SINGLE).values())
    assert 0.9 * most < written <= most and result.stored.bytes == written
    assert abs(planned.plan.kept_bytes - written) < 0.02 * most
    assert planned.as_json()["bytes"]["dense"] == sum(t.nbytes for t in load_file(model / SINGLE).values())


def test_a_head_that_is_not_tied_outlives_compression(
    make_model: Callable[..., Path], quick: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model(tie_word_embeddings=True)
    tensors = load_file(model / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
    save_file(tensors, model / SINGLE, {"format": "pt"})
    compress(model, tmp_path / "out", recipe=quick(distill={"epochs": 0}))
    written = load_file(tmp_path / "out" / SINGLE)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(written[name], tensors[name])


def test_weights_under_a_name_of_their_own_come_out_under_the_usual_one(
    make_model: Callable[..., Path], quick: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model()
    shutil.copy(model / SINGLE, model / "consolidated.safetensors")
    save_file({name: t + 1 for name, t in load_file(model / SINGLE).items()}, model / SINGLE, {"format": "pt"})
    edit(model, transformers_weights="consolidated.safetensors")
    compress(model, tmp_path / "out", recipe=quick(distill={"epochs": 0}))
    name = "model.embed_tokens.weight"
    assert torch.equal(load_file(tmp_path / "out" / SINGLE)[name], load_file(model / "consolidated.safetensors")[name])
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())
