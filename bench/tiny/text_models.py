"""Language models of four kinds, a few million parameters each, trained on one core in minutes."""

import gzip
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tiny.learning import learn

WIDTH, BLOCKS, HEADS, VOCABULARY, CONTEXT = 128, 4, 4, 2048, 256
CHARACTERS = 16_000_000  # of the training text
SEQ_LEN, BATCH = 128, 8

COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
DECODER = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS}
DECODER |= {"max_position_embeddings": CONTEXT, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Kind:
    """A kind of language model.

    Attributes:
        name: of its folder.
        config: class of its configuration.
        model: class of the model.
        shape: values of the configuration.
        steps: of training, each of `BATCH` sequences of `SEQ_LEN` tokens.
        rate: of learning, at its highest.
    """

    name: str
    config: str
    model: str
    shape: dict[str, Any]
    steps: int = 2500
    rate: float = 5e-3

    def random(self, seed: int) -> PreTrainedModel:
        """Return a model of this kind with the weights that training starts from."""
        torch.manual_seed(seed)
        return getattr(transformers, self.model)(getattr(transformers, self.config)(**COMMON | self.shape))


KINDS = {kind.name: kind for kind in (
    Kind("mixtral", "MixtralConfig", "MixtralForCausalLM", DECODER | {
        "intermediate_size": 192, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.01}, steps=3000, rate=2e-3),
    Kind("mamba", "MambaConfig", "MambaForCausalLM", {
        "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "state_size": 4, "time_step_rank": 8,
        "use_mambapy": True}, steps=1200),
    Kind("gpt2", "GPT2Config", "GPT2LMHeadModel", {
        "n_embd": WIDTH, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": CONTEXT,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, steps=5000, rate=1e-3),
    Kind("phi", "PhiConfig", "PhiForCausalLM", DECODER | {"intermediate_size": 4 * WIDTH}),
)}  # fmt: skip


def make(kind: Kind, folder: Path, assets: Path, seed: int = 0) -> None:
    """Train a model; write it to `folder` and its beginning to the folder beside it with `-random` at the end."""
    text = training_text(assets)
    tokenizer = made_tokenizer(text)
    model = kind.random(seed)
    untrained = folder.with_name(f"{folder.name}-random")
    model.save_pretrained(untrained)
    tokenizer.save_pretrained(untrained)
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)
    print(f"{kind.name}: {model.num_parameters():,} parameters, {len(ids):,} tokens", file=sys.stderr)
    train(model, ids, kind, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def made_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Return byte-pair codes learned from a text."""
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(text[:2_000_000].splitlines(), VOCABULARY, special_tokens=["<s>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=core._tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def training_text(assets: Path) -> str:
    """Return the beginning of the English training text."""
    with gzip.open(assets / "text" / "eng.train.txt.gz", "rt", encoding="utf-8") as file:
        return file.read(CHARACTERS)


def train(model: PreTrainedModel, ids: Tensor, kind: Kind, seed: int) -> None:
    """Teach a model, changed in place, to predict the tokens of a text on windows drawn at random."""
    chance = torch.Generator().manual_seed(seed)
    options = (
        {"output_router_logits": True} if hasattr(model.config, "output_router_logits") else {}
    )  # balances experts

    def loss() -> Tensor:
        starts = torch.randint(len(ids) - SEQ_LEN, (BATCH,), generator=chance)
        batch = torch.stack([ids[start : start + SEQ_LEN] for start in starts])
        return model(input_ids=batch, labels=batch, use_cache=False, **options).loss

    learn(model, loss, kind.steps, kind.rate)
