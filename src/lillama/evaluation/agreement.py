"""A model beside another one, usually its dense original, on the same text."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Int
from torch import Tensor

from lillama.corpus.texts import read_text
from lillama.errors import DataError, ModelError, ResourceError
from lillama.evaluation.agreement_summary import Agreement, Measured, summary
from lillama.evaluation.continuation import GRAM, PROMPT, Continued, continuations, continue_prompts, cut_prompts
from lillama.evaluation.continuation_samples import Sample, samples
from lillama.evaluation.tally import log_probs, pair_tallies
from lillama.evaluation.windows import Texts, Windows, cut_windows, default_length, name_texts
from lillama.model.kind import refuse_too_long
from lillama.model.load import refuse_too_large
from lillama.model.remote import remote_code
from lillama.model.source import locate
from lillama.model.tokenizer import embeddings_of, load_tokenizer
from lillama.stream.activations import ActivationPlacement
from lillama.stream.model import StreamedModel, open_streamed
from lillama.system.progress import Report, silent
from lillama.system.resources import explain_shortage, pick_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Protocol:
    """How two models are compared.

    Attributes:
        seq_len: tokens of a window; None: the longest context of both, at most 2048.
        stride: from window to window; None: `seq_len`.
        windows: at most so many of each text; None: all.
        prompts: at most so many of each text; 0: none is continued.
        new_tokens: written after each prompt.
        seed: of the draws of the bootstrap.
    """

    seq_len: int | None = None
    stride: int | None = None
    windows: int | None = None
    prompts: int = 32
    new_tokens: int = 32
    seed: int = 0


def agreement(
    model: str | Path,
    dense: str | Path,
    texts: Texts,
    protocol: Protocol | None = None,
    *,
    device: str | None = None,
    activation_memory: int | None = None,
    report: Report = silent,
    trust_remote_code: bool = False,
) -> list[Agreement]:
    """Compare a model with its dense original on text files; blocks are in memory one at a time, but for continuations.

    Args:
        model: folder or hub id, dense or compressed by lillama.
        dense: the original, with the same tokenizer.
        texts: text files, UTF-8.
        protocol: windows, prompts and seed.
        device: that computes; by default an accelerator if there is one.
        activation_memory: bytes that activations may take in memory before they go to disk; by default a quarter of what
            is free.
        report: told about progress.
        trust_remote_code: whether code that lies in a model's folder (`auto_map`) may run, as in transformers.

    Raises:
        LillamaError: a model or a text cannot be used, or the two do not belong together.

    Examples:
        >>> few = Protocol(seq_len=64, windows=4, prompts=0)
        >>> (same,) = agreement("demo/model", "demo/model", "demo/text.txt", few, device="cpu")
        >>> same.kl.value, same.top1.value, same.excess_loss.value
        (0.0, 1.0, 0.0)
    """
    protocol = protocol or Protocol()
    with remote_code(trust_remote_code):
        measured = measure(model, dense, texts, protocol, device, activation_memory, report)
    return [summary(name, [one], protocol.seed) for name, one in measured.items()]


def measure(
    model: str | Path,
    dense: str | Path,
    texts: Texts,
    protocol: Protocol,
    device: str | None,
    activation_memory: int | None,
    report: Report,
) -> dict[str, Measured]:
    """Run both models over all texts; arguments as in `agreement`."""
    with explain_shortage(), TemporaryDirectory(prefix="lillama-") as scratch:
        chosen = pick_device(device)
        folders = {"model": locate(model), "dense": locate(dense)}
        contents = {name: read_text(file) for name, file in name_texts(texts).items()}
        opened = {role: open_streamed(folder, chosen) for role, folder in folders.items()}
        prompt = _prompt_length(opened["dense"], protocol)
        windows = _windows(folders, opened, contents, protocol)
        whole = ActivationPlacement.on(chosen, Path(scratch), activation_memory)
        half = replace(whole, device_bytes=whole.device_bytes // 2, host_bytes=whole.host_bytes // 2)
        placements = {role: replace(half, folder=half.folder / role) for role in folders}
        vocabulary = opened["dense"].skeleton.config.get_text_config().vocab_size
        with (
            log_probs(opened["dense"], windows, placements["dense"], report) as dense_log_p,
            log_probs(opened["model"], windows, placements["model"], report) as model_log_p,
        ):
            pairs = {n: pair_tallies(model_log_p, dense_log_p, text, vocabulary) for n, text in windows.items()}
        cuts = {name: cut_prompts(text, protocol.prompts, prompt) for name, text in windows.items()}
        written = _write_continuations(folders, cuts, protocol, chosen, report) if protocol.prompts else {}
        return {name: Measured(pair, *written.get(name, (None, ()))) for name, pair in pairs.items()}


def _windows(
    folders: Mapping[str, Path],
    opened: Mapping[str, StreamedModel],
    contents: Mapping[str, str],
    protocol: Protocol,
) -> dict[str, Windows]:
    """Cut the texts into windows that both models take; refuse models that cut them into other tokens."""
    length = protocol.seq_len or min(map(default_length, opened.values()))
    found: dict[str, dict[str, Windows]] = {}
    for role, folder in folders.items():
        refuse_too_long(length, opened[role].kind)
        tokenizer, known = load_tokenizer(folder), embeddings_of(opened[role].skeleton)
        found[role] = {
            name: cut_windows(name, text, tokenizer, length, protocol.stride, protocol.windows, known)
            for name, text in contents.items()
        }
    sizes = {role: one.skeleton.config.get_text_config().vocab_size for role, one in opened.items()}
    if sizes["model"] != sizes["dense"]:
        raise ModelError(
            f"{folders['model']} knows {sizes['model']} tokens, {folders['dense']} {sizes['dense']}; give --against the "
            "model that this one was made from"
        )
    for name in contents:
        if not torch.equal(found["model"][name].ids, found["dense"][name].ids):
            raise ModelError(
                f"{folders['model']} and {folders['dense']} cut {name} into different tokens; give --against the model "
                "that this one was made from"
            )
    return found["dense"]


def _prompt_length(dense: StreamedModel, protocol: Protocol) -> int:
    """Return the tokens of a prompt that leave room for what is written after it."""
    if protocol.prompts < 0 or protocol.new_tokens < GRAM:
        raise DataError(
            f"prompts is {protocol.prompts} and new_tokens {protocol.new_tokens}; at least 0 and {GRAM} make sense"
        )
    positions = dense.kind.max_positions
    room = PROMPT if positions is None else min(PROMPT, positions - protocol.new_tokens)
    if protocol.prompts and room < 1:
        raise DataError(
            f"new_tokens is {protocol.new_tokens}, but the model has {positions} positions; give --prompts 0"
        )
    return room


def _write_continuations(
    folders: Mapping[str, Path],
    prompts: Mapping[str, Int[Tensor, "prompts length"]],
    protocol: Protocol,
    device: torch.device,
    report: Report,
) -> dict[str, tuple[Continued, tuple[Sample, ...]]]:
    """Compare continuations and keep a few, unless a model does not fit in memory as a whole, which is said."""
    try:
        for folder in folders.values():
            refuse_too_large(folder, device)
    except ResourceError as error:
        logger.warning("no continuations: %s", error)
        return {}
    written = continuations(folders, prompts, protocol.new_tokens, device, report)
    tokenizer = load_tokenizer(folders["dense"])
    pairs = {name: (written["model"][name], written["dense"][name]) for name in prompts}
    return {name: (continue_prompts(*pair), samples(tokenizer, prompts[name], *pair)) for name, pair in pairs.items()}
