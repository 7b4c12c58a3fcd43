"""What models write after prompts cut from texts: greedily, so that the likeliest text of both can be compared."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig

from lillama.errors import DataError
from lillama.evaluation.windows import Windows, spread
from lillama.model.load import load, refuse_too_large
from lillama.system.progress import Progress, Report

PROMPT = 32  # tokens of a prompt
BATCH = 32
GRAM = 4


@dataclass(frozen=True)
class Continued:
    """How two models go on after the same prompts; one entry for each prompt.

    Attributes:
        leading: share of the continuation up to the first token where the two part.
        equal: 1 where they never part.
        model: share of repeated 4-grams in the model's continuation.
        dense: the same in the dense model's.
    """

    leading: Float[Tensor, " prompts"]
    equal: Float[Tensor, " prompts"]
    model: Float[Tensor, " prompts"]
    dense: Float[Tensor, " prompts"]


def cut_prompts(windows: Windows, most: int, length: int = PROMPT) -> Int[Tensor, "prompts length"]:
    """Return at most `most` prompts of `length` tokens, spread evenly over a text, none overlapping.

    A text shorter than that is one prompt.
    """
    size = windows.ids.shape[1]
    stride, prompt = windows.stride or size, min(length, size)
    apart = -(-prompt // stride)  # windows from one that begins a prompt to the next
    whole = max(prompt, stride) // prompt * prompt
    prompts = windows.ids[::apart, :whole].reshape(-1, prompt)
    return prompts[spread(len(prompts), most)]


def continuations(
    folders: Mapping[str, Path],
    prompts: Mapping[str, Int[Tensor, "prompts length"]],
    new: int,
    device: torch.device,
    report: Report,
) -> dict[str, dict[str, Int[Tensor, "prompts new"]]]:
    """Let models write `new` tokens after each prompt, greedily, ends of text ignored; one whole model is in memory at a time.

    Args:
        folders: name -> model folder.
        prompts: text -> its prompts.
        new: tokens to write.
        device: that computes.
        report: told about every batch.

    Returns:
        for each model, text -> continuations.

    Raises:
        LillamaError: a model cannot be loaded, or does not fit in memory.
    """
    batches = {text: ids.split(BATCH) for text, ids in prompts.items()}
    total, done = len(folders) * sum(map(len, batches.values())), 0
    written: dict[str, dict[str, Tensor]] = {}
    for name, folder in folders.items():
        how = GenerationConfig(
            do_sample=False, max_new_tokens=new, pad_token_id=0
        )  # nothing ends, so nothing is padded
        refuse_too_large(folder, device)
        model = load(folder, device, generation=how)
        written[name] = {}
        for text, parts in batches.items():
            outputs = []
            for ids in parts:
                report(Progress("continuations", done, total, text))
                ids = ids.to(device)
                output = model.generate(ids, attention_mask=torch.ones_like(ids))  # pyright: ignore[reportCallIssue]
                outputs.append(output[:, ids.shape[1] :].cpu())
                done += 1
            written[name][text] = torch.cat(outputs)
        del model
    report(Progress("continuations", total, total))
    return written


def continue_prompts(model: Int[Tensor, "prompts new"], dense: Int[Tensor, "prompts new"]) -> Continued:
    """Compare two models' continuations of the same prompts."""
    leading = (model == dense).long().cumprod(dim=1).double().mean(dim=1)
    return Continued(leading, (leading == 1).double(), repetition(model), repetition(dense))


def repetition(ids: Int[Tensor, "texts length"]) -> Float[Tensor, " texts"]:
    """Return the share of each text's 4-grams that stood in it before.

    Raises:
        DataError: the texts are shorter than four tokens.

    Examples:
        >>> repetition(torch.tensor([[1, 2, 3, 4, 5, 6, 7], [1, 1, 1, 1, 1, 1, 1]])).tolist()
        [0.0, 0.75]
    """
    if ids.shape[1] < GRAM:
        raise DataError(f"new_tokens is {ids.shape[1]}; at least {GRAM} are needed to tell repetition")
    grams = ids.unfold(1, GRAM, 1)
    distinct = [len({tuple(gram) for gram in text}) for text in grams.tolist()]
    return 1 - torch.tensor(distinct, dtype=torch.float64) / grams.shape[1]
