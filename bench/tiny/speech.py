"""Speech that espeak-ng speaks from the text, and a small Whisper that learns to write it down."""

import io
import json
import random
import re
import subprocess
import sys
import wave
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.signal import resample_poly
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn.functional import ctc_loss
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from tiny.learning import learn
from tiny.score import RATE, heard
from tiny.text_models import training_text

SECONDS, MELS = 2, 40
WORDS, LENGTHS = 60, (3, 4)  # how many of the most frequent words of three letters or more; words of an utterance
PARTS = {"dev": 400, "calib": 512, "train": 3600}  # utterances; no phrase of `dev` is heard in another part
VOICES = ("en-us", "en-gb", "en-us+f2", "en-gb+f4", "en-us+m3", "en-gb+m7")
SPEEDS, PITCHES = (140, 190), (35, 65)  # words a minute; espeak-ng's scale from 0 to 99
START, END, UNKNOWN = "<|startoftranscript|>", "<|endoftext|>", "<unk>"
STEPS, BATCH, PEAK, ALIGNING = 2400, 16, 2e-3, 0.5


@dataclass(frozen=True)
class Utterance:
    """Some words and how they are spoken; `file` is the name of the sound file."""

    file: str
    text: str
    voice: str
    speed: int
    pitch: int


def phrases(text: str) -> list[str]:
    """Return the distinct runs of frequent words in a text, in the order of their first occurrence."""
    parts = [part.split() for part in re.split(r"[^a-z\s'\u2019]+", text.lower())]
    frequent = {word for word, _ in Counter(w for part in parts for w in part if len(w) > 2).most_common(WORDS)}
    found: dict[str, None] = {}
    for part in parts:
        for length in LENGTHS:
            for start in range(len(part) - length + 1):
                if frequent.issuperset(words := part[start : start + length]):
                    found[" ".join(words)] = None
    return list(found)


def planned(text: str, seed: int) -> Iterator[tuple[str, list[Utterance]]]:
    """Yield each part's name and utterances; voices, speeds and pitches are drawn anew for each."""
    chance = random.Random(seed)
    left = phrases(text)
    chance.shuffle(left)
    held_out = left[: PARTS["dev"]]
    left = [phrase for phrase in left[PARTS["dev"] :] if not any(p in phrase or phrase in p for p in held_out)]
    for part, count in PARTS.items():
        chosen = held_out if part == "dev" else left[:count]
        yield part, [drawn(f"{index:04}.wav", phrase, chance) for index, phrase in enumerate(chosen)]


def drawn(file: str, text: str, chance: random.Random) -> Utterance:
    """Return some words with a voice, a speed and a pitch that are drawn."""
    return Utterance(file, text, chance.choice(VOICES), chance.randint(*SPEEDS), chance.randint(*PITCHES))


def spoken(utterance: Utterance) -> np.ndarray:
    """Return what espeak-ng says, as 16-bit samples at 16 kHz."""
    options = ["-v", utterance.voice, "-s", str(utterance.speed), "-p", str(utterance.pitch), "--stdout"]
    sound = subprocess.run(["espeak-ng", *options, utterance.text], check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(sound)) as file:
        rate = file.getframerate()
    samples = np.frombuffer(sound[44:], dtype=np.int16)  # written to a pipe, its header does not know the length
    return np.clip(resample_poly(samples.astype(np.float64), RATE, rate), -32768, 32767).astype(np.int16)


def speak(folder: Path, assets: Path, seed: int = 0) -> None:
    """Write each part as a folder of sound files with a `metadata.jsonl` (AudioFolder of the datasets library)."""
    for part, utterances in planned(training_text(assets), seed):
        (folder / part).mkdir(parents=True, exist_ok=True)
        rows = []
        for utterance in utterances:
            samples = spoken(utterance)
            if len(samples) <= SECONDS * RATE:
                with wave.open(str(folder / part / utterance.file), "wb") as out:
                    out.setnchannels(1)
                    out.setsampwidth(2)
                    out.setframerate(RATE)
                    out.writeframes(samples.tobytes())
                rows.append({"file_name": utterance.file, "text": utterance.text})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / part / "metadata.jsonl").write_text(lines, encoding="utf-8")
        print(f"speech, {part}: {len(rows)} utterances", file=sys.stderr)


def made_processor(texts: Sequence[str]) -> WhisperProcessor:
    """Return a processor with one token for each word."""
    words = sorted({word for text in texts for word in text.split()})
    core = Tokenizer(WordLevel({word: i for i, word in enumerate([END, START, UNKNOWN, *words])}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, 1), (END, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=START, eos_token=END, pad_token=END, unk_token=UNKNOWN
    )
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=MELS, chunk_length=SECONDS), tokenizer)


def random_model(vocabulary: int, seed: int) -> WhisperForConditionalGeneration:
    """Return the small Whisper with the weights that training starts from."""
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=vocabulary, num_mel_bins=MELS, d_model=128, encoder_layers=4, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=512, decoder_ffn_dim=512,
        max_source_positions=50 * SECONDS, max_target_positions=16, decoder_start_token_id=1, bos_token_id=1,
        eos_token_id=0, pad_token_id=0, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def make(folder: Path, speech: Path, seed: int = 0) -> None:
    """Train a Whisper; write it to `folder` and its beginning to the folder beside it with `-random` at the end."""
    rows = (speech / "train" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    processor = made_processor([json.loads(row)["text"] for row in rows])
    model = random_model(len(processor.tokenizer), seed)
    untrained = folder.with_name(f"{folder.name}-random")
    model.save_pretrained(untrained)
    processor.save_pretrained(untrained)
    features, texts = heard(speech / "train", processor)
    print(f"whisper: {model.num_parameters():,} parameters, {len(texts):,} utterances", file=sys.stderr)
    train(model, features, processor.tokenizer(texts, padding=True, return_tensors="pt"), seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def train(model: WhisperForConditionalGeneration, features: Tensor, tokens: Mapping[str, Tensor], seed: int) -> None:
    """Teach a model to write down what it hears.

    A linear layer beside the decoder learns to read the words from the encoder's outputs (CTC) and is thrown away:
    attention finds its alignment many times sooner with it.
    """
    chance = torch.Generator().manual_seed(seed)
    ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()
    words = mask.sum(1) - 2  # without start and end
    reader = nn.Linear(model.config.d_model, model.config.vocab_size)

    def loss() -> Tensor:
        rows = torch.randint(len(ids), (BATCH,), generator=chance)
        labels = ids[rows, 1:].where(mask[rows, 1:], -100)
        out = model(input_features=features[rows], decoder_input_ids=ids[rows, :-1], labels=labels, use_cache=False)
        read = reader(out.encoder_last_hidden_state).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((BATCH,), len(read))
        return out.loss + ALIGNING * ctc_loss(read, ids[rows, 1:], lengths, words[rows], blank=1, zero_infinity=True)

    learn(nn.ModuleList([model, reader]), loss, STEPS, PEAK)
