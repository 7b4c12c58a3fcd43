"""The model's tokenizer: loaded in one place and asked for ids in one place, for it is the work of others and may fail."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lillama.errors import DataError, LillamaError, ModelError
from lillama.files.atomic import digest
from lillama.model.foreign import reason
from lillama.model.remote import runs_code

CODE = "contains custom code"  # what transformers says of tokenizers that it would have to run
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")


@contextmanager
def explain_failures(explain: Callable[[str], LillamaError]) -> Iterator[None]:
    """Turn whatever the code of a tokenizer or of a chat template raises into one line.

    Tokenizers raise bare `Exception`s and, where their Rust code panics, what is none; templates raise what they like. Lack
    of memory and interruptions go through.

    Args:
        explain: makes the error from its reason.
    """
    try:
        yield
    except (LillamaError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise explain(reason(error)) from error


def load_tokenizer(model_path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model, and try it; code that comes with it runs where `remote_code` lets it alone.

    Raises:
        ModelError: there is none, or its files are not what transformers reads.
    """

    def explain(why: str) -> ModelError:
        remedy = "put tokenizer.json and its config there as they were published"
        if CODE in why and not runs_code():
            remedy = "read that code, and if you trust it give --trust-remote-code"
        return ModelError(f"{model_path}: no usable tokenizer ({why}); {remedy}")

    with explain_failures(explain):
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=runs_code())
        tokenizer(["a"], truncation=False, padding=False, verbose=False)  # not as its file has it, from now on
        wrong = next((name for name in SPECIAL if not isinstance(getattr(tokenizer, name), int | None)), None)
        if wrong is not None:
            raise explain(f"{wrong} is {getattr(tokenizer, wrong)!r}; it must be a number")
        if not isinstance(tokenizer.model_max_length, int | float):
            raise explain(f"model_max_length is {tokenizer.model_max_length!r}; it must be a number")
    return tokenizer


def encode_text(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], embeddings: int | None, where: str, **options: Any
) -> dict[str, list[list[int]]]:
    """Tokenise texts: all of each, whatever truncation and padding the tokenizer's file asks for.

    Args:
        tokenizer: of the model.
        texts: to be cut into tokens.
        embeddings: of the model, from `embeddings_of`; None where they are not known.
        where: the texts come from, for errors.
        options: of the tokenizer's call.

    Returns:
        `input_ids`, a list for each text, and what else the options ask for.

    Raises:
        DataError: a text is none, or the tokenizer fails on it.
        ModelError: a token has no embedding.
    """
    for text in texts:
        refuse_halves(text, where)

    def explain(why: str) -> DataError:
        return DataError(f"{where}: the tokenizer fails on this text ({why}); give other text or mend tokenizer.json")

    with explain_failures(explain):
        found: Any = tokenizer(list(texts), truncation=False, padding=False, verbose=False, **options)
    for ids in found["input_ids"]:
        refuse_unknown(tokenizer, ids, embeddings, where)
    return dict(found)


def refuse_halves(text: str, where: str, kind: type[LillamaError] = DataError) -> None:
    """Raise an error of a kind where a text holds half of a surrogate pair, as scraped JSON does: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise kind(
            f"{where}: character {error.start + 1} is {half}, half of a surrogate pair and no letter; take it out, or leave "
            "the record out"
        ) from None


def refuse_unknown(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], embeddings: int | None, where: str) -> None:
    """Raise `ModelError` where a token's id lies beyond a model's embeddings; None knows no bound."""
    largest = max(ids, default=0)
    if embeddings is not None and largest >= embeddings:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ModelError(
            f"{where}: token {token!r} has the id {largest}, but the model has {embeddings} embeddings; take the tokenizer "
            "that the model was trained with, or resize its embeddings (resize_token_embeddings) and save it anew"
        )


def embeddings_of(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model has embeddings for; None if it takes no tokens."""
    try:
        layer = model.get_input_embeddings()
    except NotImplementedError:
        layer = None
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings
    return getattr(model.config.get_text_config(), "vocab_size", None)


@contextmanager
def refuse_unknown_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, where: str) -> Iterator[None]:
    """Refuse tokens without an embedding while others call the model."""

    def check(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].numel():
            refuse_unknown(tokenizer, [int(inputs[0].max())], embeddings_of(model), where)

    handle = model.get_input_embeddings().register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 of all that decides a tokenizer's ids; truncation and padding, which a call switches, do not."""
    if not tokenizer.is_fast:
        return digest([type(tokenizer).__name__, tokenizer.get_vocab()])
    backend: Tokenizer = cast(Any, tokenizer).backend_tokenizer
    if backend.truncation or backend.padding:
        backend = Tokenizer.from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    return hashlib.sha256(backend.to_str().encode()).hexdigest()
