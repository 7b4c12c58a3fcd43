import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lillama.errors import ModelError
from lillama.model.checkpoint import CheckpointReader
from lillama.model.remote import remote_code, runs_code
from lillama.model.skeleton import skeleton
from lillama.model.source import load_config
from lillama.stream.model import open_streamed

Save = Callable[..., tuple[PreTrainedModel, Path]]
MARK = "from pathlib import Path\n(Path(__file__).parent / 'ran').touch()\nPath({mark!r}).touch()\n"
CONFIGURATION = "from transformers import LlamaConfig\nclass OddConfig(LlamaConfig):\n    model_type = 'odd'\n"
MODELING = (
    "from transformers import LlamaForCausalLM\nfrom .configuration_odd import OddConfig\n"
    "class OddForCausalLM(LlamaForCausalLM):\n    config_class = OddConfig\n"
)


@pytest.fixture
def odd(saved: Save, tmp_path: Path, code_cache: None) -> Path:
    """A model of a kind of its own, whose code leaves a mark when it runs."""
    _, folder = saved()
    mark = MARK.format(mark=str(tmp_path / "ran"))
    (folder / "configuration_odd.py").write_text(mark + CONFIGURATION)
    (folder / "modeling_odd.py").write_text(mark + MODELING)
    names = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    edit(folder, model_type="odd", architectures=["OddForCausalLM"], auto_map=names)
    return folder


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def ran(folder: Path) -> bool:
    return (folder.parent / "ran").exists()


def test_code_of_a_model_does_not_run_by_itself(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(
        ModelError, match=r"needs code of its own .auto_map names configuration_odd.*--trust-remote-code"
    ):
        load_config(odd)
    edit(odd, model_type="llama")
    config = load_config(odd)
    with pytest.raises(ModelError, match=r"needs code of its own .auto_map names modeling_odd.*--trust-remote-code"):
        skeleton(config)
    edit(odd, architectures=["LlamaForCausalLM"])
    assert type(skeleton(load_config(odd))).__name__ == "LlamaForCausalLM"
    assert not ran(odd)


def test_it_runs_where_it_was_asked_for_and_that_is_said_once(odd: Path, caplog: pytest.LogCaptureFixture) -> None:
    with remote_code(True):
        for _ in range(2):
            streamed = open_streamed(odd, torch.device("cpu"))
    assert type(streamed.skeleton).__name__ == "OddForCausalLM" and ran(odd)
    assert len(list(streamed.weights.sources)) > 3
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "code of this model runs" in record.getMessage() and "modeling_odd.OddForCausalLM" in record.getMessage()


def test_code_that_may_run_is_part_of_what_a_run_is(odd: Path) -> None:
    def prints() -> str:
        return CheckpointReader(odd).fingerprint()

    before = prints()
    with remote_code(True):
        trusted = prints()
    (odd / "modeling_odd.py").write_text(MODELING)
    assert prints() == before
    with remote_code(True):
        assert len({before, trusted, prints()}) == 3


@pytest.mark.parametrize("code", ["raise ValueError('no')", "import no_such_module_anywhere", "class (", "x = 1"])
def test_code_that_fails_is_one_line(code: str, odd: Path) -> None:
    (odd / "modeling_odd.py").write_text(code)
    with remote_code(True):
        config = load_config(odd)
        with pytest.raises(ModelError, match=r"the code of OddForCausalLM .* cannot be used") as refusal:
            skeleton(config)
    assert str(refusal.value).isprintable()


def test_trust_ends_with_its_context_and_is_not_taken_away_inside() -> None:
    assert not runs_code()
    with remote_code(True):
        with remote_code(False):
            assert runs_code()
        assert runs_code()
    with remote_code(False):
        assert not runs_code()
    with pytest.raises(KeyError), remote_code(True):
        raise KeyError
    assert not runs_code()


def test_a_kernel_of_the_hub_is_code_too(saved: Save) -> None:
    _, folder = saved()
    edit(folder, attn_implementation="somebody/fast-attention")
    with pytest.raises(ModelError, match="attn_implementation is somebody/fast-attention, a kernel of the hub"):
        load_config(folder)
