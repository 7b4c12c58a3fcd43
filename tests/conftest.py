"""Tiny trained-looking models and text for all tests that need a model folder."""

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxtyping import install_import_hook


def _modules_with_shapes() -> list[str]:
    """Names of the package's modules that annotate shapes: only there are calls checked, for to check them all takes a quarter
    of the suite's time.
    """
    source = Path(__file__).resolve().parent.parent / "src"
    found = [path for path in source.rglob("*.py") if "from jaxtyping import" in path.read_text()]
    return [".".join(path.relative_to(source).with_suffix("").parts) for path in found]


install_import_hook(_modules_with_shapes(), "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

from lillama.cli.process import quieten  # before what it is to keep quiet

quieten()

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lillama.recipes.recipe import Recipe, load_recipe

ANYWHERE: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile(
    "any machine", derandomize=True, **ANYWHERE
)  # main is green today, or red for a change of ours
settings.register_profile("search", **ANYWHERE)  # other examples each time: pytest --hypothesis-profile=search
settings.load_profile("any machine")

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large, so that every block does something to its inputs
    "bos_token_id": 0,
    "eos_token_id": 1,
}

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
PACKAGE = "transformers_modules"  # as which transformers imports the code of models

MakeModel = Callable[..., Path]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<s>", "</s>", *letters])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def save_model(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """Write a Llama of random weights and its tokenizer."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own for the code of models, and none of it imported: transformers would find that of an earlier test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not (Path(place) / PACKAGE).is_dir()])
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """Leave it to the system when it writes: tests kill processes, but do not cut the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Return a function that writes a model folder of its own, which a test may damage."""
    return lambda *args, **changes: save_model(tmp_path_factory.mktemp("models") / "tiny", *args, **changes)


@pytest.fixture(scope="session")
def tiny(make_model: MakeModel) -> Path:
    """A model folder that tests only read."""
    return make_model()


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model folder that tests only read; its embeddings are more than its tokens, as in many real models."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 6,  # as in many real models, the embedding is longer than the vocabulary
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def assets() -> Path:
    folder = Path(os.environ.get("LILLAMA_ASSETS", Path(__file__).parents[1].parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"real models and texts not found at {folder}; set LILLAMA_ASSETS")
    return folder


@pytest.fixture(scope="session")
def yardstick() -> Callable[[str], Path]:
    """Return a function that gives the folder of a yardstick model, and skips the test where it has not been fetched."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))
    from models import cached, default_cache

    def find(name: str) -> Path:
        folder = cached(name, default_cache())
        if folder is None:
            pytest.skip(f"python bench/models.py {name} fetches the model that this test needs")
        return folder

    return find


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 6000 bytes that tests only read."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(1, 6))) for _ in range(40)]
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(chance.choices(words, k=2000))[:6000], encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def quick(text: Path) -> Callable[..., Recipe]:
    """Return a function that makes recipes of a second or less; nested changes replace values."""

    def make(**changes: Any) -> Recipe:
        base = load_recipe(
            Recipe(),
            {
                "keep": 0.7,
                "ranks": {"name": "uniform", "multiple_of": 1},
                "storage": {"form": "plain"},
                "init": {"name": "whitened"},
                "recover": {"epochs": 0},
                "distill": {
                    "schedule": "sequential", "stream": "both", "loss": {"name": "mse"}, "epochs": 2, "batch_size": 8,
                    "blocks": "all",
                    "lr": 2e-3, "lr_scale": "width", "lr_width": None, "lr_schedule": "cosine", "warmup": 0.05,
                    "betas": [0.9, 0.999], "weight_decay": 0.0, "clip": 1.0, "held_out": 0.1,
                },
                "calibration": {"sources": [{"path": str(text)}], "tokens": 1280, "seq_len": 32},
            },
        )  # fmt: skip
        return load_recipe(base, changes)

    return make
