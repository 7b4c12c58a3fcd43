"""Self-calibration: the model writes the text that it is calibrated on, sampled token by token from itself.

No data is needed and the text has the model's own distribution over languages and styles (LLM-QAT, arXiv 2305.17888).
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import StaticCache

from lillama.errors import ModelError
from lillama.model.kind import kind_of, refuse_too_long
from lillama.model.load import fits, load
from lillama.model.tokenizer import embeddings_of, encode_text, refuse_unknown
from lillama.system.progress import Progress, Report, silent

BATCH = 128  # sequences written side by side, if their key-value cache stays below CACHE bytes
CACHE = 4 << 30


def generate(
    model_path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    seq_len: int,
    seed: int,
    device: torch.device | str = "cpu",
    temperature: float = 1.0,
    report: Report = silent,
) -> Int[Tensor, "sequences length"]:
    """Let a causal language model write `tokens // seq_len` sequences, on the CPU in fp32, elsewhere in its own type.

    An end-of-text token does not stop a sequence: the model goes on after it, as in packed text. All random numbers
    come from the seed, so the same seed, machine and number of threads give the same sequences.

    Args:
        model_path: model folder (safetensors).
        tokenizer: bounds the vocabulary and knows the first token.
        tokens: token budget.
        seq_len: tokens of a sequence, the first one included.
        seed: of all random numbers.
        device: where the model runs; weights that do not fit are spread over devices, memory and disk.
        temperature: divides the logits.
        report: told after each step.
    """
    with TemporaryDirectory(prefix="lillama-offload-") as folder:
        place, chosen = Path(model_path), torch.device(device)
        offload = None if fits(place, chosen) else Path(folder)
        model = load(place, chosen, offload=offload, generation=GenerationConfig())  # how to sample is the recipe's
        refuse_too_long(seq_len, kind_of(model))
        return _write(model, tokenizer, tokens // seq_len, seq_len, seed, temperature, report)


@torch.no_grad()
def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    seq_len: int,
    seed: int,
    temperature: float,
    report: Report,
) -> Int[Tensor, "sequences length"]:
    """Sample the sequences batch by batch; which draw serves which token does not depend on the batch size."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = min(len(tokenizer), embeddings_of(model) or len(tokenizer))
    first = _first_tokens(tokenizer, sequences, vocabulary, generator)
    draws = torch.rand(sequences, seq_len - 1, generator=generator)
    size, total = _batch_size(model, seq_len), sequences * seq_len
    batches, done = [], 0
    for rows in torch.arange(sequences).split(size):
        columns = [first[rows]]
        done += len(rows)
        for column in _continue(model, first[rows], draws[rows], vocabulary, temperature):
            columns.append(column)
            done += len(rows)
            report(Progress("calibration", done, total, "the model writes", done))
        batches.append(torch.stack(columns, dim=1).cpu())
    return torch.cat(batches)


def _continue(
    model: PreTrainedModel,
    token: Int[Tensor, " batch"],
    draws: Float[Tensor, "batch steps"],
    vocabulary: int,
    temperature: float,
) -> Iterator[Int[Tensor, " batch"]]:
    """Yield the next token of each sequence, step by step, by inversion of the cumulated probabilities at the draws.

    The key-value cache has its full size from the start: growing it costs more than attending over empty places.
    """
    keyword = "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"
    cache: Any = StaticCache(config=model.config, max_cache_len=draws.shape[1] + 1)
    token, draws = token.to(model.device), draws.to(model.device)
    for draw in draws.T:
        output = model(token[:, None], use_cache=True, **{keyword: cache})
        cache = output[keyword]
        logits = output.logits[:, -1, :vocabulary].float() / temperature
        cumulated = logits.softmax(dim=-1).cumsum(dim=-1)
        if not cumulated[:, -1].isfinite().all():
            raise ModelError(f"{model.name_or_path}: its logits are not finite; give calibration sources instead")
        token = torch.searchsorted(cumulated, draw[:, None] * cumulated[:, -1:], right=True)[:, 0]
        token = token.clamp(max=logits.shape[1] - 1)  # rounding can put a draw on the upper end
        yield token


def _first_tokens(
    tokenizer: PreTrainedTokenizerBase, sequences: int, vocabulary: int, generator: torch.Generator
) -> Int[Tensor, " sequences"]:
    """Return each sequence's first token: beginning-of-text if the tokenizer writes it by itself, else a random token.

    A model whose tokenizer does not write that token has hardly seen it; random starts reach more of its languages.
    """
    bos = cast(int | None, tokenizer.bos_token_id)
    if bos is not None and encode_text(tokenizer, [""], None, "self-calibration")["input_ids"] == [[bos]]:
        refuse_unknown(tokenizer, [bos], vocabulary, "self-calibration begins each sequence with it")
        return torch.full((sequences,), bos)
    return torch.randint(vocabulary, (sequences,), generator=generator)


def _batch_size(model: PreTrainedModel, seq_len: int) -> int:
    """Return how many sequences are written side by side so that keys and values (2 x layers x hidden) fit `CACHE`."""
    text = model.config.get_text_config()
    per_sequence = 2 * text.num_hidden_layers * text.hidden_size * seq_len * model.dtype.itemsize
    return max(1, min(BATCH, CACHE // per_sequence))
