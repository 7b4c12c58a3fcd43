"""What is carried along beside a model's weights: data of the model, no other weights, no code, nothing from outside."""

import json
import os
import socket
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lillama.hub.companions import carry_along, code_files, without_code
from lillama.hub.export import export
from lillama.pipeline.api import compress

BESIDE = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "tokenizer.model": "pieces",
    "sentencepiece.bpe.model": "pieces",
    "source.spm": "pieces",
    "vocab.json": "{}",
    "vocab.txt": "a",
    "vocab.bpe": "a",
    "merges.txt": "a b",
    "own.tiktoken": "YQ== 0",
    "chat_template.jinja": "{{ messages }}",
    "preprocessor_config.json": "{}",
    "generation_config.json": "{}",
    "config_sentence_transformers.json": "{}",
    "sentence_bert_config.json": "{}",
    "LICENSE": "terms",
    "LICENSE-2.0": "terms",
    "LICENSE.md": "terms",
    "Licence.txt": "terms",
    "NOTICE": "thanks",
    "USE_POLICY.md": "be good",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}
APART = [
    "README.md", "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json",
    "pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt", "tf_model.h5", "flax_model.msgpack",
    "model-Q4.gguf", "model.ggml", "model.onnx", "model.onnx_data", "model.tflite", "weights.npz", "weights.npy",
    "__0_0.distcp", "nemo.tar.gz", "model.zip", "model.mlmodel", "rust_model.ot", "optimizer.pt", "scheduler.bin",
    "training_args.bin", "rng_state.pth", "rng_state_0.pkl", "data.pickle", "adapter_model.safetensors",
    "adapter_config.json", "trainer_state.json", "lillama.json", "modeling_own.py", "setup.sh", "plugin.so", "run.exe",
    "notebook.ipynb", "hyperparams.yaml", "license.py", "LICENSE.bin", "train.jsonl", ".gitattributes", ".env.json",
    "original/params.json", "onnx/config.json", "checkpoint-5/tokenizer.json",
]  # fmt: skip


def write(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_what_belongs_goes_along_and_nothing_else(tmp_path: Path, out: Path) -> None:
    carry_along(write(tmp_path / "model", BESIDE | dict.fromkeys(APART, "0")), out)
    assert names(out) == BESIDE.keys()
    assert all((out / name).read_text() == text for name, text in BESIDE.items())


def modules(*paths: object) -> str:
    return json.dumps(
        [{"idx": 0, "name": str(path), "path": path, "type": "sentence_transformers.x"} for path in paths]
    )


def test_the_folders_of_a_sentence_encoder_go_along(tmp_path: Path, out: Path) -> None:
    parts = {
        "modules.json": modules("", "1_Pooling", "2_Dense/", "parts/3_Normalize"),
        "1_Pooling/config.json": "{}",
        "2_Dense/config.json": "{}",
        "2_Dense/model.safetensors": "0",
        "parts/3_Normalize/config.json": "{}",
        "parts/3_Normalize/inner/vocab.txt": "a",
    }
    others = ["2_Dense/run.py", "2_Dense/.hidden.json", "4_Other/config.json", "parts/config.json"]
    carry_along(write(tmp_path / "model", parts | dict.fromkeys(others, "0")), out)
    assert names(out) == parts.keys()


def test_pickles_of_modules_are_left_out_aloud(tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = {"modules.json": modules("2_Dense"), "2_Dense/config.json": "{}", "2_Dense/pytorch_model.bin": "0"}
    carry_along(write(tmp_path / "model", parts), out)
    assert names(out) == {"modules.json", "2_Dense/config.json"}
    assert "2_Dense/pytorch_model.bin is left out: pickles can run code" in caplog.text


@pytest.mark.parametrize(
    "path",
    ["../secret", "/etc", "a/../../secret", "..", "C:\\secret", "a\0b", ".git", "a/.ssh", "\ud83d", "x" * 256],
)
def test_no_module_leads_outside(path: str, tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, {"secret/config.json": "{}", "model/modules.json": modules(path), "model/.git/config.json": "{}"})
    carry_along(tmp_path / "model", out)
    assert names(out) == {"modules.json"} and "not within" not in caplog.text
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "none within the model's" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "5", "null", '[{"path": 5}]', '[{"name": "x"}]', "[" * 99_999, "\ud800"]
)
def test_a_damaged_list_of_modules_is_said_and_ends_nothing(
    text: str, tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "model", {"1_Pooling/config.json": "{}"})
    (tmp_path / "model" / "modules.json").write_text(text, errors="surrogatepass")
    carry_along(tmp_path / "model", out)
    assert names(out) == {"modules.json"} and "does not list folders" in caplog.text


def test_links_in_a_circle_are_left_out(tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What goes along is copied after the last block: nothing in the folder may end the run then."""
    model = write(tmp_path / "model", {"modules.json": modules("1_Pooling", "2_Dense"), "2_Dense/config.json": "{}"})
    (model / "1_Pooling").symlink_to("1_Pooling")
    (model / "2_Dense" / "vocab.txt").symlink_to("vocab.txt")
    (model / "vocab.txt").symlink_to("vocab.txt")
    carry_along(model, out)
    assert names(out) == {"modules.json", "2_Dense/config.json"} and "1_Pooling" in caplog.text


def test_links_are_followed_within_the_folder_and_in_the_cache_of_the_hub(
    tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = write(tmp_path / "models--org--m", {"blobs/1": "one", "blobs/2": "two", "snapshots/rev/plain.txt": "three"})
    snapshot = cache / "snapshots" / "rev"
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "vocab.txt").symlink_to("../../blobs/1")
    (snapshot / "additional_chat_templates" / "t.jinja").symlink_to("../../../blobs/2")
    (snapshot / "same.txt").symlink_to("plain.txt")
    (tmp_path / "link").symlink_to(snapshot)
    carry_along(tmp_path / "link", out)
    assert names(out) == {"vocab.txt", "additional_chat_templates/t.jinja", "plain.txt", "same.txt"}
    assert (out / "vocab.txt").read_text() == "one" and not any(path.is_symlink() for path in out.rglob("*"))
    assert not caplog.records


def test_no_other_link_is_followed_and_one_line_says_so(
    tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, {"secret/config.json": "SECRET", "secret.txt": "SECRET", "blobs/1": "SECRET"})
    model = write(tmp_path / "model", {"modules.json": modules("1_Pooling", "2_Dense"), "1_Pooling/a.json": "{}"})
    (model / "extra.txt").symlink_to(tmp_path / "secret.txt")
    (model / "vocab.txt").symlink_to("../blobs/1")  # as in a cache, which this is not
    (model / "LICENSE").symlink_to("/etc/hostname")
    (model / "gone.txt").symlink_to("nowhere")
    (model / "loop.txt").symlink_to("loop.txt")
    (model / "1_Pooling" / "b.json").symlink_to("../../secret/config.json")
    (model / "2_Dense").symlink_to("../secret")
    (model / "additional_chat_templates").symlink_to("/")
    carry_along(model, out)
    assert names(out) == {"modules.json", "1_Pooling/a.json"}
    (record,) = caplog.records
    left = ["LICENSE", "extra.txt", "vocab.txt", "additional_chat_templates", "1_Pooling/b.json", "2_Dense"]
    assert record.levelname == "WARNING" and all(name in record.getMessage() for name in left)


def test_pipes_sockets_and_devices_are_passed_over(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write(tmp_path / "model", {"vocab.txt": "a"})
    os.mkfifo(model / "merges.txt")
    os.mkfifo(model / "modules.json")
    os.mkfifo(model / "tokenizer_config.json")
    monkeypatch.chdir(model)  # the name of a socket may not be long
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("LICENSE")
    (model / "null.txt").symlink_to("/dev/null")
    carry_along(model, out, code=True)
    assert names(out) == {"vocab.txt"}


CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    pass\n",
    "modeling_own.py": (
        "from transformers import LlamaForCausalLM\n"
        "from .configuration_own import OwnConfig\n"
        "from .deep.layers import LAYER\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    ),
    "deep/layers.py": "from . import helper\nfrom .more import (\n    MORE,\n)\nLAYER = 1\n",
    "deep/helper.py": "import os\n",
    "deep/more.py": "MORE = 1\n",
    "tokenization_own.py": "class OwnTokenizer: pass\n",
    "setup.py": "raise SystemExit\n",
}
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnModel",
    "AutoModel": "org/elsewhere--modeling_far.FarModel",
}
TOKENIZER_MAP = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    settings = {
        "config.json": json.dumps({"model_type": "llama", "auto_map": AUTO_MAP}),
        "tokenizer_config.json": json.dumps({"auto_map": TOKENIZER_MAP, "pad_token": "x"}),
        "preprocessor_config.json": json.dumps({"auto_map": {"AutoProcessor": "gone.Gone"}, "size": 3}),
    }
    return write(tmp_path / "model", CODE | settings)


def test_code_goes_along_when_it_was_asked_for(with_code: Path, out: Path) -> None:
    wanted = CODE.keys() - {"setup.py"}
    assert set(code_files(with_code)) == wanted
    carry_along(with_code, out, code=True)
    assert names(out) == wanted | {"tokenizer_config.json", "preprocessor_config.json"}
    assert json.loads((out / "tokenizer_config.json").read_text())["auto_map"] == TOKENIZER_MAP
    assert json.loads((out / "preprocessor_config.json").read_text()) == {"size": 3}  # names what is not there
    assert without_code({"auto_map": AUTO_MAP}, with_code, code=True) == {"auto_map": AUTO_MAP}


def test_otherwise_no_settings_name_it(with_code: Path, out: Path) -> None:
    carry_along(with_code, out)
    assert names(out) == {"tokenizer_config.json", "preprocessor_config.json"}
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"pad_token": "x"}
    settings = {"auto_map": AUTO_MAP, "custom_pipelines": {"own": {"impl": "pipe.Own"}}, "size": 3}
    assert without_code(settings, with_code) == {"size": 3}


@pytest.mark.parametrize(
    "auto_map", [5, "x", [], {"AutoConfig": 5}, {"AutoConfig": "../x.Y"}, {"AutoConfig": "/etc/x.Y"}]
)
def test_a_map_of_code_that_is_none_names_no_file(auto_map: object, tmp_path: Path) -> None:
    write(tmp_path, {"x.py": "", "model/config.json": json.dumps({"auto_map": auto_map})})
    assert code_files(tmp_path / "model") == ()


def test_code_is_not_taken_from_outside(with_code: Path, tmp_path: Path, out: Path) -> None:
    write(tmp_path, {"secret.py": "SECRET"})
    (with_code / "deep" / "more.py").unlink()
    (with_code / "deep" / "more.py").symlink_to(tmp_path / "secret.py")
    (with_code / "deep" / "helper.py").write_text("from ..secret import x\nfrom ...secret import x\n")
    carry_along(with_code, out, code=True)
    assert "deep/helper.py" in names(out) and "deep/more.py" not in names(out)
    assert not any("SECRET" in path.read_text() for path in out.rglob("*") if path.is_file())


def test_a_native_model_that_names_code_loads_everywhere_with_and_without_trust(
    make_model, quick, tmp_path: Path, code_cache: None
) -> None:
    model = write(make_model(), CODE)
    for name, found in (("config.json", AUTO_MAP), ("tokenizer_config.json", TOKENIZER_MAP)):
        settings = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(settings | {"auto_map": found}))
    recipe = quick(distill={"epochs": 0}, calibration={"tokens": 64})
    result = compress(model, tmp_path / "small", recipe=recipe)
    export(result.path, tmp_path / "dense", "dense")
    for folder in (result.path, tmp_path / "dense"):
        for trust in (False, True):
            loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
            assert type(loaded) is LlamaForCausalLM and type(loaded.config) is LlamaConfig
        assert not list(folder.rglob("*.py")) and "auto_map" not in (folder / "tokenizer_config.json").read_text()
