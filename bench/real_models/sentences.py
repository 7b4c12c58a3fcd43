"""A sentence encoder beside its original: do embeddings, and which sentences are nearest, stay the same?"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

from lillama.evaluation.intervals import mean_interval
from lillama.evaluation.windows import spread
from lillama.model.load import load
from lillama.model.tokenizer import load_tokenizer
from lillama.system.resources import pick_device
from real_models.cases import Case, Place, Setting
from real_models.language import calibration as calibration  # the same texts

PLAIN, WORDS = re.compile(r"[A-Z][A-Za-z', -]+[.!?]"), range(6, 21)  # no figures, no signs: what is read aloud one way
AT_ONCE, LONGEST = 64, 256  # sentences; tokens


def sentences(file: Path) -> list[str]:
    """Return the distinct plain sentences of 6 to 20 words in a file of JSON lines, in order."""
    rows = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    parts = [part for row in rows for part in re.split(r"(?<=[.!?])\s+", row)]
    return list(dict.fromkeys(part for part in parts if PLAIN.fullmatch(part) and len(part.split()) in WORDS))


def some(found: list[str], most: int | None) -> list[str]:
    """Return at most so many sentences, spread evenly."""
    return [found[index] for index in spread(len(found), most).tolist()]


def measure(case: Case, setting: Setting, place: Place, model: Path, dense: Path | None) -> dict[str, Any]:
    """Compare the embeddings of sentences; arguments as in `language.measure`."""
    (file,) = case.measured[setting.part]
    found = some(sentences(place.assets / file), setting.limit)
    if dense is None:
        return {"sentences": len(found)}
    device = pick_device(place.device)
    return {"sentences": len(found)} | compare(*(embed(folder, found, device) for folder in (model, dense)))


@torch.no_grad()
def embed(folder: Path, texts: list[str], device: torch.device) -> Tensor:
    """Return the unit vectors of sentences: the last outputs, averaged over the tokens."""
    tokenizer, model = load_tokenizer(folder), load(folder, device, AutoModel)
    found = []
    for start in range(0, len(texts), AT_ONCE):
        batch = tokenizer(
            texts[start : start + AT_ONCE], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        ).to(device)
        mask = batch["attention_mask"][..., None]
        outputs = model(**batch).last_hidden_state
        found.append(F.normalize((outputs * mask).sum(1) / mask.sum(1)).double().cpu())
    return torch.cat(found)


def compare(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Return the mean cosine to the original's vectors, and the share of sentences whose nearest other one stays the same."""
    values = {"cosine": (ours * theirs).sum(1), "nearest": (_nearest(ours) == _nearest(theirs)).double()}
    return {name: mean_interval(value.numpy(), np.random.default_rng(0)).as_json() for name, value in values.items()}


def _nearest(vectors: Tensor) -> Tensor:
    return (vectors @ vectors.T).fill_diagonal_(-torch.inf).argmax(1)
