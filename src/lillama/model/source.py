"""From what the user names (a local folder or a hub id) to a folder and a configuration."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lillama.errors import ModelError, printable
from lillama.files.atomic import read_json
from lillama.model.foreign import explain_errors, reason
from lillama.model.other_formats import refuse_other_formats
from lillama.model.remote import announce, needs_code, runs_code

WANTED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.spm",
    "*.bpe",
    "*.codes",
    "*.tiktoken",
    "README.md",
    "LICENSE*",
    "NOTICE*",
]
ADAPTER = "adapter_config.json"
READ_WHOLE = (
    "*config.json",
    "tokenizer*",
    "vocab*",
    "merges*",
    "added_tokens*",
    "special_tokens*",
    "chat_template*",
    "additional_chat_templates/*",
    "*.model",
    "*.spm",
    "*.bpe",
    "*.codes",
    "*.tiktoken",
)
LARGEST = 256 << 20  # bytes of one of them; those of the largest vocabularies take 40 MB
CONFIG_ONLY = ["config.json", ADAPTER]
# What is made in a loop, by the end of its key: far more of it than any public model has would take for ever.
MOST = {
    re.compile(r"(^|_)(layers?|blocks|stages|depths?)$"): 1024,
    re.compile(r"(^|_)(experts|heads|codebooks|labels)$"): 1 << 18,
}
COUNTABLE = 10**100  # numbers beyond are no floating-point ones either
KINDS: Mapping[str, type] = {
    "model_type": str,
    "architectures": list,
    "dtype": str,
    "torch_dtype": str,
    "auto_map": dict,
    "quantization_config": dict,
}
WORDS = {str: "a text", list: "a list of class names", dict: "an object"}
WHOLE = ("vocab_size", "max_position_embeddings", "max_source_positions", "max_target_positions")


def locate(model: str | Path, weights: bool = True) -> Path:
    """Return the local folder of a model, fetching it from the Hugging Face hub when it is no folder.

    Args:
        model: a local folder, or a hub id such as `org/name`.
        weights: whether more than the configuration is needed.

    Raises:
        ModelError: no such folder, and no such model on the hub or no way to reach it; weights of a format that is not read.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        refuse_adapter(path)
        refuse_other_formats(path)
        if not (path / "config.json").is_file():
            raise ModelError(f"{path}: no config.json in this folder; a Hugging Face model folder is needed")
        _refuse_bottomless(path)
        return path
    if path.exists():
        refuse_other_formats(path)
        raise ModelError(f"{path}: this is a file; give the model's folder")
    wanted = [*(WANTED if weights else CONFIG_ONLY), *(["*.py"] if runs_code() else [])]
    try:
        path = Path(snapshot_download(str(model), allow_patterns=wanted))
    except HFValidationError:
        raise ModelError(f"{model}: no such folder, and not a hub id of the form org/name") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(f"{model}: no such folder, and the hub did not give it ({reason(error)})") from None
    refuse_adapter(path)
    return path


def load_config(folder: Path) -> PretrainedConfig:
    """Read a model folder's configuration.

    Raises:
        ModelError: the file is damaged, holds values that no model has, or transformers does not know the model's class.
    """
    path = folder / "config.json"
    raw = read_json(path, ModelError, "a Hugging Face model folder is needed")
    _refuse_other_kinds(path, raw)
    _refuse_endless(path, raw)
    _refuse_code(path, raw)
    announce(folder, raw)
    with explain_errors(f"{path}: transformers cannot use this configuration"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=runs_code())
        text = config.get_text_config()
    _refuse_senseless(path, config, text)
    return config


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """Return the type that a configuration says its weights are stored in; fp32 if it says none."""
    return cast(torch.dtype, config.dtype) or torch.float32  # transformers has turned a name into the type already


def computed_dtype(config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """Return the type that a model computes in on a device: fp32 on the CPU, its stored one elsewhere."""
    return torch.float32 if device.type == "cpu" else stored_dtype(config)


def quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return the configuration's `quantization_config` as a dict, or None."""
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def refuse_adapter(folder: Path) -> None:
    """Refuse an adapter, alone or beside the weights that it changes: transformers would load both, we read weights alone."""
    if (folder / ADAPTER).is_file():
        raise ModelError(
            f"{folder / ADAPTER}: an adapter lies in this folder, and only whole models are read; merge it into its model "
            "(PEFT: `merge_and_unload()`, then `save_pretrained` to another folder), or remove it"
        )


def _refuse_bottomless(folder: Path) -> None:
    """Refuse what transformers would read whole and for ever: pipes, devices, and files that no tokenizer is as large as."""
    for file in (file for names in READ_WHOLE for file in folder.glob(names) if file.exists() and not file.is_dir()):
        if not file.is_file():
            raise ModelError(f"{file}: a pipe, a socket or a device, and no file; put the file itself there")
        if file.stat().st_size > LARGEST:
            raise ModelError(
                f"{file}: {file.stat().st_size:,} bytes, more than any such file has; fetch the model again"
            )


def _refuse_other_kinds(path: Path, raw: Mapping[str, Any]) -> None:
    """Refuse keys on which all else hangs where they are of another JSON type than theirs."""
    for key, kind in KINDS.items():
        if not isinstance(raw.get(key), kind | None):
            raise ModelError(f"{path}: {key} is {printable(raw[key])}; {WORDS[kind]} is needed")


def _refuse_endless(path: Path, raw: Any) -> None:
    """Refuse numbers of parts that no model has, before anything is made of them."""
    for key, value in _numbers(raw):
        most = next((most for end, most in MOST.items() if end.search(key)), None)
        if most is not None and value > most:
            raise ModelError(
                f"{path}: {key} is {printable(value)}, more than any model has ({most:,}); get a sound copy"
            )
        if abs(value) > COUNTABLE:
            raise ModelError(f"{path}: {key} is {printable(value)}, which no part of a model counts; get a sound copy")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Yield every whole number of a configuration with the key that it stands under."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int):
        yield key, value


def _refuse_code(path: Path, raw: Mapping[str, Any]) -> None:
    """Refuse a configuration that leads to code which is not transformers' own, unless such code may run."""
    if runs_code():
        return
    mapped, kind = raw.get("auto_map"), raw.get("model_type")
    own = mapped.get("AutoConfig") if isinstance(mapped, dict) else None
    if own is not None and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise needs_code(path, str(own))
    for key, value in raw.items():
        if key.endswith("_implementation") and "/" in str(value):
            raise ModelError(
                f"{path}: {key} is {printable(value)}, a kernel of the hub, whose code is not run; remove this key, or if you "
                "trust it give --trust-remote-code"
            )


def _refuse_senseless(path: Path, config: PretrainedConfig, text: object) -> None:
    """Refuse values of another kind than they are used as."""
    if not all(isinstance(name, str) for name in config.architectures or ()):
        raise ModelError(f"{path}: architectures is {printable(config.architectures)}; a list of class names is needed")
    if not isinstance(text, PretrainedConfig):
        raise ModelError(
            f"{path}: the configuration of its text part is {printable(text)}; an object of its own is needed"
        )
    for one in (config, text):
        dtype = one.dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ModelError(f"{path}: dtype is {printable(dtype)}; a floating-point type such as bfloat16 is needed")
        for key in WHOLE:
            value = getattr(one, key, None)
            if value is not None and type(value) is not int:
                raise ModelError(f"{path}: {key} is {printable(value)}; a whole number is needed")
