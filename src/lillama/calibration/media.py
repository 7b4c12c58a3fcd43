"""Calibration on speech and images: files through the model's own processor, to whatever its forward takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoImageProcessor, PreTrainedTokenizerBase

from lillama.calibration.pack import SURPLUS, CalibrationSet, Manifest, SourceRecord, ids_hash, share
from lillama.corpus.sources import (
    FEATURES,
    IMAGES,
    SPEECH,
    Source,
    fingerprint,
    json_lines,
    media_files,
)
from lillama.errors import DataError, ModelError, first_line
from lillama.model.foreign import explain_errors
from lillama.model.remote import runs_code
from lillama.model.spec import Kind
from lillama.model.tokenizer import encode_text, tokenizer_hash
from lillama.system.progress import Progress, Report, silent

Takes = Literal["input_features", "input_values", "pixel_values"]

TEXTS = ("text", "transcription", "sentence", "transcript")  # names of the field that holds what is said
SECONDS = 4  # of a window, for encoders that take the wave itself
LONGEST = 1 << 29  # samples of a sound file, which take 2 GiB; FLAC packs silence into nothing
BATCH = 16  # images that are processed at once


@dataclass(frozen=True)
class Clip:
    """A file, with what is said in it if that is known."""

    path: Path
    text: str | None = None


def pack_media(
    sources: tuple[Source, ...],
    kind: Kind,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: int,
    seed: int,
    report: Report = silent,
    embeddings: int | None = None,
) -> CalibrationSet:
    """Choose files by the seed and process them, each source giving its share of the rows.

    Args:
        sources: folders of files, or JSON lines that name them; `metadata.jsonl` in a folder says what is said in each.
        kind: of the model.
        folder: of the model, with its processor's configuration.
        tokenizer: of the model, if it writes text.
        rows: utterances (for encoders of the wave: windows of four seconds) or images.
        seed: of the choice.
        report: told about files.
        embeddings: tokens that the model has embeddings for; None knows no bound.

    Raises:
        DataError: a source holds no file of the kind, or what is said is not known and the model needs it.
        ModelError: the model's processor cannot be used.
    """
    takes = cast(Takes, kind.takes)
    if takes not in READERS:
        raise ModelError(f"the model takes {takes}; calibration knows input_ids, {', '.join(READERS)}")
    if takes == "input_values" and kind.stacks > 1:
        raise ModelError("the model takes waves and writes text; what belongs to a window of a wave is not known")
    suffixes, generator = KINDS[takes], torch.Generator().manual_seed(seed)
    chosen: list[Clip] = []
    parts: list[dict[str, Tensor]] = []
    records: list[SourceRecord] = []
    for done, (source, wanted) in enumerate(zip(sources, share(sources, rows), strict=True)):
        report(Progress("calibration", done, len(sources), source.path))
        found = list(islice(clips(source, suffixes), SURPLUS * wanted * (SECONDS if takes == "input_values" else 1)))
        if not found:
            raise DataError(f"{source.path}: names no file; give another source")
        order = torch.randperm(len(found), generator=generator).tolist()
        taken = [found[index] for index in order[: None if takes == "input_values" else wanted]]
        parts.append(READERS[takes](taken, folder, kind, wanted))
        chosen += taken
        made = len(next(iter(parts[-1].values())))
        records.append(
            SourceRecord(
                source.path,
                source.field,
                source.config,
                source.split,
                source.weight,
                fingerprint(source),
                len(found),
                made,
            )
        )
    inputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    count = len(next(iter(inputs.values())))
    ids, mask = torch.zeros(count, 0, dtype=torch.long), None
    if kind.stacks > 1:
        ids, mask = _transcripts(chosen, kind, tokenizer, embeddings)
    report(Progress("calibration", len(sources), len(sources)))
    manifest = Manifest(
        kind="images" if takes == "pixel_values" else "speech",
        sources=tuple(records),
        tokenizer="" if tokenizer is None else tokenizer_hash(tokenizer),
        seq_len=ids.shape[1],
        wanted=rows,
        tokens=count if mask is None else int(mask.sum()),
        seed=seed,
        temperature=None,
        sha256=ids_hash(ids),
    )
    return CalibrationSet(ids, mask, manifest, inputs)


def clips(source: Source, kinds: Sequence[str]) -> Iterator[Clip]:
    """Yield the files of a source, in order, with what is said in them."""
    path = Path(source.path)
    folder, listing = (path, path / "metadata.jsonl") if path.is_dir() else (path.parent, path)
    if not listing.is_file() or listing.suffix != ".jsonl":
        yield from (Clip(file) for file in media_files(path, kinds))
        return
    for where, row in json_lines(listing, source):
        if not isinstance(row.get("file_name"), str):
            raise DataError(f'{where}: {{"file_name": ..., "text": ...}} is wanted; write it so')
        file = folder / row["file_name"]
        if not file.is_file() or file.suffix.lower() not in kinds:
            raise DataError(f"{where}: {file} is not there, or no file of type {', '.join(kinds)}")
        name = next((name for name in ([source.field] if source.field else TEXTS) if name in row), None)
        text = None if name is None else row[name]
        if not isinstance(text, str | None):
            raise DataError(f"{where}: field {name!r} is {type(text).__name__}; it must be text")
        yield Clip(file, text)


def wave(path: Path, rate: int) -> NDArray[np.float32]:
    """Return a sound file as one channel at a sampling rate, in samples a second."""
    try:
        import soundfile
    except ImportError:
        raise DataError(f"{path}: sound is read by soundfile; install it: pip install 'lillama[audio]'") from None
    from scipy.signal import resample_poly

    try:
        known = soundfile.info(path)
        if known.frames * known.channels > LONGEST:
            raise ValueError(f"{known.frames:,} samples of {known.channels} channels, and it is read as a whole")
        samples, found = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        raise DataError(f"{path}: no readable sound file ({first_line(error)}); write it anew") from None
    mono = samples.mean(axis=1)
    return mono if found == rate else resample_poly(mono, rate, found).astype(np.float32)


def _features(chosen: list[Clip], folder: Path, kind: Kind, rows: int) -> dict[str, Tensor]:
    """Return log-mel features, and which positions of the encoder hear speech and not the padding behind it."""
    extractor = _processor(AutoFeatureExtractor, folder)
    pairs = [
        _compute(clip.path, extractor) if clip.path.suffix == FEATURES else _heard(clip.path, extractor)
        for clip in chosen
    ]
    inputs = {"input_features": torch.stack([features for features, _ in pairs])}
    if kind.max_source_positions is not None:
        frames = torch.stack([mask for _, mask in pairs])
        step = max(1, frames.shape[1] // kind.max_source_positions)  # frames of a position: two in Whisper
        inputs["encoder_mask"] = frames[:, ::step].contiguous()
    return inputs


def _heard(path: Path, extractor: Any) -> tuple[Float[Tensor, "mels frames"], Bool[Tensor, " frames"]]:
    """Return the features of a sound file, and which frames are of it."""
    rate = extractor.sampling_rate
    made = extractor(wave(path, rate), sampling_rate=rate, return_tensors="pt", return_attention_mask=True)
    return made["input_features"][0], made["attention_mask"][0].bool()


def _compute(path: Path, extractor: Any) -> tuple[Float[Tensor, "mels frames"], Bool[Tensor, " frames"]]:
    """Return features that were computed before, filled up with their smallest value, which silence has."""
    try:
        stored = np.lib.format.open_memmap(path, "r")  # of a shape that the file has room for
        mels, frames = extractor.feature_size, extractor.nb_max_frames
        if stored.ndim != 2 or len(stored) != mels or not 0 < stored.shape[1] <= frames:
            raise DataError(f"{path}: has the shape {stored.shape}; {mels} mels x at most {frames} frames are wanted")
        found = torch.from_numpy(np.array(stored)).float()
    except (ValueError, OSError, TypeError, EOFError, OverflowError) as error:
        raise DataError(f"{path}: no readable array ({first_line(error)}); write it with numpy.save") from None
    features = found.new_full((mels, frames), float(found.min()))
    features[:, : found.shape[1]] = found
    return features, torch.arange(frames) < found.shape[1]


def _values(chosen: list[Clip], folder: Path, kind: Kind, rows: int) -> dict[str, Tensor]:
    """Return windows of sound; utterances are joined, so that nothing is padded."""
    extractor = _processor(AutoFeatureExtractor, folder)
    length = SECONDS * extractor.sampling_rate
    waves: list[NDArray[np.float32]] = []
    for clip in chosen:
        if sum(map(len, waves)) >= rows * length:
            break
        waves.append(wave(clip.path, extractor.sampling_rate))
    sound = np.concatenate(waves)
    windows = [sound[start : start + length] for start in range(0, len(sound) - length + 1, length)][:rows]
    if not windows:
        raise DataError(f"{chosen[0].path.parent}: less than {SECONDS} s of speech; give more")
    made = extractor(windows, sampling_rate=extractor.sampling_rate, return_tensors="pt", return_attention_mask=False)
    return {"input_values": made["input_values"]}


def _pixels(chosen: list[Clip], folder: Path, kind: Kind, rows: int) -> dict[str, Tensor]:
    """Return images as the model's processor prepares them."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataError("images are read by pillow; install it: pip install 'lillama[vision]'") from None
    processor, parts = _processor(AutoImageProcessor, folder), list[Tensor]()
    for start in range(0, len(chosen), BATCH):
        images = []
        for clip in chosen[start : start + BATCH]:
            try:
                with Image.open(clip.path) as image:
                    images.append(image.convert("RGB"))
            except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
                raise DataError(f"{clip.path}: no readable image ({first_line(error)})") from None
        parts.append(processor(images=images, return_tensors="pt")["pixel_values"])
    return {"pixel_values": torch.cat(parts)}


READERS = {"input_features": _features, "input_values": _values, "pixel_values": _pixels}
KINDS = {"input_features": (*SPEECH, FEATURES), "input_values": SPEECH, "pixel_values": IMAGES}


def _processor(kind: Any, folder: Path) -> Any:
    with explain_errors(f"{folder}: no usable processor", "put preprocessor_config.json there"):
        return kind.from_pretrained(folder, trust_remote_code=runs_code())


def _transcripts(
    chosen: list[Clip], kind: Kind, tokenizer: PreTrainedTokenizerBase | None, embeddings: int | None
) -> tuple[Int[Tensor, "rows length"], Bool[Tensor, "rows length"]]:
    """Return what is said as tokens that end with the end-of-text token, padded behind, and which are real."""
    if tokenizer is None:
        raise ModelError("the model writes text but has no tokenizer; put tokenizer.json and its config beside it")
    silent_one = next((clip for clip in chosen if clip.text is None), None)
    if silent_one is not None:
        raise DataError(
            f'{silent_one.path}: what is said is not known; put metadata.jsonl with {{"file_name": ..., "text": ...}} there'
        )
    end = tokenizer.eos_token_id
    rows: list[list[int]] = []
    for clip in chosen:
        (ids,) = encode_text(tokenizer, [clip.text or ""], embeddings, str(clip.path))["input_ids"]
        ids = ids[1:] if ids[:1] == [kind.decoder_start] else ids
        rows.append(ids if end is None or ids[-1:] == [end] else [*ids, cast(int, end)])
    longest = max(map(len, rows))
    if kind.max_target_positions is not None:
        longest = min(longest, kind.max_target_positions - 1)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row[:longest])
        mask[index, : len(row)] = True
    return ids, mask
