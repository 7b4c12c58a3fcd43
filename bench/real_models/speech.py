"""A speech model beside its original: how many words of recordings, and of what espeak-ng reads, are written down wrongly?"""

import json
import re
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, WhisperForConditionalGeneration

from lillama.calibration.media import wave as read_sound
from lillama.evaluation.intervals import bootstrap
from lillama.files.atomic import atomic_folder
from lillama.model.load import load
from lillama.model.tokenizer import load_tokenizer
from lillama.system.resources import pick_device
from real_models.cases import Case, Place, Setting
from real_models.sentences import sentences, some
from tiny.score import RATE, errors
from tiny.speech import VOICES, Utterance, spoken

HELD_OUT, AT_ONCE, LONGEST = 48, 8, 128  # sentences that are read for measuring; utterances; tokens of a transcript
SPEED, PITCH = 160, 50  # words a minute; espeak-ng's scale from 0 to 99

Clips = list[tuple[Path, str]]  # sound file, and what is said in it


def calibration(case: Case, place: Place, tokens: int) -> list[dict[str, Any]]:
    """Return a folder of sentences read aloud: as many as there are sequences of the case in so many tokens."""
    (source,) = case.sources
    return [{"path": str(speak(place.assets / source["path"], max(1, tokens // case.seq_len), place.out / "speech"))}]


def speak(file: Path, count: int, folder: Path) -> Path:
    """Let espeak-ng read sentences of a file in six voices, in turn; sound that is there already is not made again.

    Args:
        file: of JSON lines.
        count: of sentences, spread evenly over the file.
        folder: that holds a folder for each such set.
    """
    place = folder / f"{file.stem}-{count}"
    if place.is_dir():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_folder(place) as made:
        rows = []
        for index, text in enumerate(some(sentences(file), count)):
            utterance = Utterance(f"{index:04}.wav", text, VOICES[index % len(VOICES)], SPEED, PITCH)
            with wave.open(str(made / utterance.file), "wb") as out:
                out.setnchannels(1)
                out.setsampwidth(2)
                out.setframerate(RATE)
                out.writeframes(spoken(utterance).tobytes())
            rows.append({"file_name": utterance.file, "text": text})
        (made / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return place


def clips(listing: Path, key: str, folder: Path) -> Clips:
    """Return the sound files that JSON lines name by a key, below a folder."""
    rows = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
    return [(folder / row[key], row["text"]) for row in rows]


def measure(case: Case, setting: Setting, place: Place, model: Path, dense: Path | None) -> dict[str, Any]:
    """Compare what two models write down; arguments as in `language.measure`."""
    *recorded, text = case.measured[setting.part]
    read = speak(place.assets / text, HELD_OUT, place.out / "speech")
    heard = {"espeak-ng": clips(read / "metadata.jsonl", "file_name", read)}
    if recorded:
        heard["recordings"] = clips(place.assets / recorded[0], "file", place.assets)
    limited = {name: those[: setting.limit] for name, those in heard.items()}
    device, folders = pick_device(place.device), {"model": model} | ({} if dense is None else {"dense": dense})
    wrong = {role: count_errors(folder, limited, device) for role, folder in folders.items()}
    return {name: summary([text for _, text in those], {role: wrong[role][name] for role in wrong})
            for name, those in limited.items()}  # fmt: skip


def summary(texts: list[str], wrong: dict[str, Tensor]) -> dict[str, Any]:
    """Return word error rates; intervals are drawn over the utterances.

    Args:
        texts: what is said.
        wrong: `model`, and `dense` where there is one -> words of each utterance that are written wrongly.
    """
    words = torch.tensor([len(plain_words(text).split()) for text in texts], dtype=torch.float64)
    sums = bootstrap(wrong | {"words": words}, np.random.default_rng(0))
    rate = sums.interval(lambda s: s["model"] / s["words"]).as_json()
    found: dict[str, Any] = {"utterances": len(texts), "words": int(words.sum()), "word_error_rate": rate}
    if "dense" in wrong:
        points = sums.interval(lambda s: 100 * (s["model"] - s["dense"]) / s["words"])
        found |= {"dense": (wrong["dense"].sum() / words.sum()).item(), "points": points.as_json()}
    return found


@torch.no_grad()
def count_errors(folder: Path, sets: dict[str, Clips], device: torch.device) -> dict[str, Tensor]:
    """Return how many words of each utterance a model writes down wrongly, greedily and without regard to case and signs."""
    extractor, tokenizer = AutoFeatureExtractor.from_pretrained(folder), load_tokenizer(folder)
    model: Any = load(folder, device, WhisperForConditionalGeneration)
    most = min(LONGEST, model.config.max_target_positions // 2)  # the prompt of languages and tasks stands before them
    found = {}
    for name, those in sets.items():
        written: list[str] = []
        for start in range(0, len(those), AT_ONCE):
            sounds = [read_sound(file, RATE) for file, _ in those[start : start + AT_ONCE]]
            features = extractor(sounds, sampling_rate=RATE, return_tensors="pt").input_features
            ids = model.generate(input_features=features.to(device, model.dtype), do_sample=False, max_new_tokens=most)
            written += tokenizer.batch_decode(ids, skip_special_tokens=True)
        found[name] = errors([plain_words(text) for text in written], [plain_words(text) for _, text in those])
    return found


def plain_words(text: str) -> str:
    """Return a text in lower case without signs.

    >>> plain_words("He was not an ill-disposed young man.")
    'he was not an ill disposed young man'
    """
    return " ".join(re.sub(r"[^a-z0-9' ]+", " ", text.lower().replace("\u2019", "'")).split())
