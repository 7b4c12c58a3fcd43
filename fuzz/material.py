"""Sound input, made once: tiny models, compressed in every form, with all the files that lillama reads."""

import json
import logging
import random
import shutil
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from lillama import compress, load_recipe, plan
from lillama.ranks.plan import RankPlan

LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
UNTAUGHT = {"distill": {"epochs": 0}, "recover": {"epochs": 0}, "ranks": {"name": "uniform", "multiple_of": 1},
            "storage": {"form": "plain"}}  # fmt: skip
TAUGHT = {"distill": {"epochs": 1}, "recover": {"epochs": 1}, "ranks": {"multiple_of": 1}, "storage": {"form": "plain"}}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"form": "plain"}, "pivot": {"form": "pivot"}, "int8": {"form": "pivot", "bits": 8},
    "int4": {"form": "plain", "bits": 4}, "int3": {"form": "plain", "bits": 3},
}  # fmt: skip
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
README = "---\nlicense: apache-2.0\nlanguage: [en, fr]\ntags:\n- a\nbase_model: org/name\n---\n\n# A model\n"
OTHERS = {  # model type -> the class that its configuration names
    "gpt2": "GPT2LMHeadModel", "whisper": "WhisperForConditionalGeneration", "mixtral": "MixtralForCausalLM",
    "mamba": "MambaForCausalLM", "bert": "BertForMaskedLM", "t5": "T5ForConditionalGeneration", "gpt_oss": "GptOssForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM", "clip_vision_model": "CLIPVisionModel", "opt": "OPTForCausalLM",
}  # fmt: skip
SMALL = {  # sizes under every name that configurations have for them
    "hidden_size": 16, "n_embd": 16, "d_model": 16, "word_embed_proj_dim": 16, "intermediate_size": 24, "d_ff": 24,
    "ffn_dim": 24,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "d_kv": 4, "max_position_embeddings": 64,
    "n_positions": 64, "max_source_positions": 32, "max_target_positions": 32, "vocab_size": 64, "num_mel_bins": 8,
    "num_local_experts": 4, "state_size": 4, "time_step_rank": 4, "image_size": 16, "patch_size": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def make(folder: Path) -> None:
    """Write one folder of sound input for each kind of target."""
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    base = folder / "llama"
    base.mkdir(parents=True)
    (base / "text.txt").write_text(_text(1500), encoding="utf-8")
    (base / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows()), encoding="utf-8")
    _llama(base / "model")
    untaught = load_recipe("default", UNTAUGHT)
    (base / "recipe.yaml").write_text(untaught.as_yaml(), encoding="utf-8")
    _narrower(plan(base / "model", recipe=untaught).plan).save(base / "plan.json")
    shutil.copytree(base, folder / "sharded")
    LlamaForCausalLM.from_pretrained(base / "model").save_pretrained(folder / "sharded" / "model", max_shard_size=8000)
    (folder / "sharded" / "model" / "model.safetensors").unlink()
    for name, form in {**FORMS, "narrow": {"form": "plain"}}.items():
        _compressed(base, folder / name, UNTAUGHT | {"storage": form}, "plan.json" if name == "narrow" else None)
        shutil.rmtree(folder / name / "model")
        (folder / name / "out").rename(folder / name / "model")
    _compressed(base, folder / "finished", TAUGHT)
    for name, architecture in OTHERS.items():
        _configuration(name, architecture).save_pretrained(folder / name / "model")


def _narrower(planned: RankPlan) -> RankPlan:
    """Return a plan whose first FFN has half of its neurons, and few bits."""
    ffn = planned.spec.ffns[0]
    ranks, widths = {**planned.ranks, **dict.fromkeys(ffn.linears)}, {ffn.outward: ffn.neurons // 2}
    return replace(planned, ranks=ranks, widths=widths, bits={ffn.outward: 5, **dict.fromkeys(ffn.inward, 4)})


def _llama(folder: Path) -> None:
    tokenizer = _tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **LLAMA)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(README, encoding="utf-8")


def _compressed(base: Path, folder: Path, recipe: dict[str, Any], rank_plan: str | None = None) -> None:
    """Copy the folder of a model and compress it there into `out`, with the run folder `out.run`."""
    shutil.copytree(base, folder)
    chosen = load_recipe("default", recipe)
    (folder / "recipe.yaml").write_text(chosen.as_yaml(), encoding="utf-8")
    with chdir(folder):  # the run remembers its text by the name that the command gives
        compress("model", "out", recipe=chosen, rank_plan=rank_plan, calibration="text.txt", tokens=128, seq_len=16)


def _configuration(name: str, architecture: str) -> PretrainedConfig:
    kind: Any = type(transformers.AutoConfig.for_model(name))
    known = vars(kind()) | kind.attribute_map
    return kind(**{key: value for key, value in SMALL.items() if key in known}, architectures=[architecture])


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def _text(length: int) -> str:
    chance = random.Random(0)
    return "".join(chance.choices("abcdefgh  \n", k=length))


def _rows() -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": _text(200)}, {"role": "assistant", "content": _text(200)}]
    return [{"messages": turns}, {"messages": turns[:1]}]
