"""From what the user names (a local folder or a hub id) to a folder and a configuration."""

from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import AutoConfig, PretrainedConfig

from lillama.errors import ModelError

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "README.md", "LICENSE*", "NOTICE*"]
CONFIG_ONLY = ["config.json"]


def locate(model: str | Path, weights: bool = True) -> Path:
    """Return the local folder of a model, fetching it from the Hugging Face hub when it is no folder.

    Args:
        model: a local folder, or a hub id such as `org/name`.
        weights: whether more than the configuration is needed.

    Raises:
        ModelError: no such folder, and no such model on the hub or no way to reach it.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path}: no config.json in this folder; a Hugging Face model folder is needed")
        return path
    if path.exists():
        raise ModelError(f"{path}: this is a file; give the model's folder")
    try:
        return Path(snapshot_download(str(model), allow_patterns=WANTED if weights else CONFIG_ONLY))
    except HFValidationError:
        raise ModelError(f"{model}: no such folder, and not a hub id of the form org/name") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{model}: no such folder, and the hub did not give it ({reason})") from None


def load_config(folder: Path) -> PretrainedConfig:
    """Read a model folder's configuration.

    Raises:
        ModelError: the file is damaged, or transformers does not know the model's class.
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = next((line for line in str(error).strip().splitlines() if line), type(error).__name__)
        raise ModelError(f"{folder / 'config.json'}: transformers cannot use this configuration: {reason}") from None


def refuse_too_long(seq_len: int, config: PretrainedConfig) -> None:
    """Raise `ModelError` where sequences are longer than the model's context."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)  # not all models bound it
    if longest is not None and seq_len > longest:
        raise ModelError(f"seq_len is {seq_len}, but the model has {longest} positions; lower --seq-len")


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """Return the type that a configuration says its weights are stored in; fp32 if it says none."""
    return cast(torch.dtype, config.dtype) or torch.float32  # transformers has turned a name into the type already


def quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return the configuration's `quantization_config` as a dict, or None."""
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()
