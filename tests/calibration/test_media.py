"""Speech and images become what a model's own processor makes of them, the same for the same seed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import CLIPImageProcessor, Wav2Vec2FeatureExtractor, WhisperConfig, WhisperFeatureExtractor

from lillama.calibration import media
from lillama.calibration.media import SECONDS, clips, pack_media, wave
from lillama.calibration.pack import CalibrationSet
from lillama.corpus.sources import SPEECH, Source, fingerprint
from lillama.errors import DataError, ModelError
from lillama.model.kind import kind_of
from lillama.model.spec import Kind
from lillama.stream.batch import batch_of

RATE = 16_000
CONFIG = WhisperConfig(max_source_positions=50, max_target_positions=64, num_mel_bins=16, decoder_start_token_id=0)
WHISPER = Kind("input_features", stacks=2, max_source_positions=50, max_target_positions=64, decoder_start=0)


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    folder, lines = tmp_path / "speech", []
    folder.mkdir()
    for index in range(6):
        samples = 0.1 * np.sin(np.arange(RATE // 2 + 1000 * index) * (0.1 + index / 10))
        soundfile.write(folder / f"{index}.wav", samples, RATE)
        lines.append(json.dumps({"file_name": f"{index}.wav", "text": "word " * (index + 1)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def whisper(tmp_path: Path) -> Path:
    WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(tmp_path / "whisper")
    return tmp_path / "whisper"


def packed(speech: Path, whisper: Path, tokenizer, seed: int = 0, rows: int = 4) -> CalibrationSet:
    return pack_media((Source(str(speech)),), WHISPER, whisper, tokenizer, rows, seed)


def test_features_are_the_processors_and_silence_behind_speech_is_known(speech, whisper, tokenizer) -> None:
    found = packed(speech, whisper, tokenizer)
    assert found.inputs["input_features"].shape == (4, 16, 100)
    heard = found.inputs["encoder_mask"]
    assert heard.shape == (4, 50)
    extractor = WhisperFeatureExtractor.from_pretrained(whisper)
    texts = [
        tokenizer.decode(ids[real], skip_special_tokens=True) for ids, real in zip(found.ids, found.mask, strict=True)
    ]
    for row, text in enumerate(texts):
        index = len(text.split()) - 1
        samples, _ = soundfile.read(speech / f"{index}.wav", dtype="float32")
        wanted = extractor(samples, sampling_rate=RATE, return_tensors="pt")["input_features"][0]
        torch.testing.assert_close(found.inputs["input_features"][row], wanted)
        assert abs(int(heard[row].sum()) - len(samples) / RATE * 50) <= 1
    assert all(ids[real][-1] == tokenizer.eos_token_id for ids, real in zip(found.ids, found.mask, strict=True))


def test_the_seed_decides_and_a_saved_set_is_the_same(speech, whisper, tokenizer, tmp_path: Path) -> None:
    found = packed(speech, whisper, tokenizer)
    assert torch.equal(found.ids, packed(speech, whisper, tokenizer).ids)
    assert not torch.equal(found.ids, packed(speech, whisper, tokenizer, seed=1).ids)
    found.save(tmp_path / "saved")
    again = CalibrationSet.load(tmp_path / "saved")
    assert again.manifest == found.manifest and again.manifest.kind == "speech"
    assert all(torch.equal(tensor, found.inputs[name]) for name, tensor in again.inputs.items())


def test_the_decoder_is_given_the_start_and_asked_for_the_rest(speech, whisper, tokenizer) -> None:
    from transformers import WhisperForConditionalGeneration

    with torch.device("meta"):
        assert kind_of(WhisperForConditionalGeneration(CONFIG)) == WHISPER
    found = packed(speech, whisper, tokenizer)
    batch = batch_of(WHISPER, found.ids, found.mask, found.inputs)
    assert set(batch.inputs) == {"input_features", "decoder_input_ids"}
    assert batch.ids[:, 0].tolist() == [0] * 4 and torch.equal(batch.ids[:, 1:], found.ids)
    assert batch.masks[1][:, 0].all() and torch.equal(batch.masks[1][:, 1:], found.mask)
    assert torch.equal(batch.masks[0], found.inputs["encoder_mask"])


def test_waves_are_joined_and_cut_without_padding(speech, tmp_path: Path) -> None:
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path / "model")
    for index in range(6, 30):
        soundfile.write(speech / f"{index}.wav", np.full(RATE, 0.01), RATE)
    (speech / "metadata.jsonl").unlink()
    found = pack_media((Source(str(speech)),), Kind("input_values"), tmp_path / "model", None, 3, 0)
    assert found.inputs["input_values"].shape == (3, SECONDS * RATE)
    assert found.mask is None and found.ids.shape == (3, 0)


def test_images_go_through_the_processor(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        tmp_path / "m"
    )
    for index in range(5):
        Image.new("RGB", (20, 24), (50 * index, 10, 10)).save(tmp_path / "images" / f"{index}.png")
    found = pack_media((Source(str(tmp_path / "images")),), Kind("pixel_values"), tmp_path / "m", None, 3, 0)
    assert found.inputs["pixel_values"].shape == (3, 3, 16, 16) and found.manifest.kind == "images"


def test_other_rates_are_resampled_and_channels_mixed(tmp_path: Path) -> None:
    time = np.arange(8000) / 8000
    stereo = np.stack([np.sin(2 * np.pi * 100 * time), np.zeros(8000)], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, 8000)
    found = wave(tmp_path / "a.wav", RATE)
    wanted = np.sin(2 * np.pi * 100 * np.arange(RATE) / RATE) / 2
    assert len(found) == RATE and np.abs(found - wanted)[500:-500].max() < 0.01


def test_a_change_of_a_file_is_another_source(speech: Path) -> None:
    before = fingerprint(Source(str(speech)))
    soundfile.write(speech / "0.wav", np.zeros(RATE), RATE)
    assert fingerprint(Source(str(speech))) != before


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        ('{"file": "0.wav"}', r'metadata\.jsonl, line 1: \{"file_name"'),
        ('{"file_name": "none.wav"}', r"line 1: .*none\.wav is not there"),
        ('{"file_name": "metadata.jsonl"}', "or no file of type .wav"),
    ],
)
def test_a_wrong_listing_is_named(speech: Path, listing: str, message: str) -> None:
    (speech / "metadata.jsonl").write_text(listing, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        list(clips(Source(str(speech)), SPEECH))


def test_what_cannot_be_used_is_told(speech: Path, whisper: Path, tokenizer, text: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file of type \.wav"):
        pack_media((Source(str(text.parent)),), WHISPER, whisper, tokenizer, 2, 0)
    (speech / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match=r"what is said is not known; put metadata\.jsonl"):
        packed(speech, whisper, tokenizer)
    (speech / "0.wav").write_bytes(b"RIFF, but not really")
    with pytest.raises(DataError, match=r"0\.wav: no readable sound file"):
        packed(speech, whisper, tokenizer, rows=6)
    with pytest.raises(ModelError, match="no usable processor"):
        pack_media((Source(str(speech)),), WHISPER, tmp_path, tokenizer, 2, 0)
    with pytest.raises(ModelError, match="the model takes bytes"):
        pack_media((Source(str(speech)),), replace(WHISPER, takes="bytes"), whisper, tokenizer, 2, 0)


def test_every_source_gives_its_share_of_windows(speech: Path, tmp_path: Path) -> None:
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path / "model")
    for name, value in (("a", 0.25), ("b", -0.25)):
        (tmp_path / name).mkdir()
        for index in range(12):
            soundfile.write(tmp_path / name / f"{index}.wav", np.full(RATE, value), RATE)
    sources = (Source(str(tmp_path / "a")), Source(str(tmp_path / "b")))
    found = pack_media(sources, Kind("input_values"), tmp_path / "model", None, 4, 0)
    assert found.inputs["input_values"].mean(dim=1).sign().tolist() == [1, 1, -1, -1]
    assert [record.tokens for record in found.manifest.sources] == [2, 2]


def test_waves_with_transcripts_are_refused(speech: Path, whisper: Path, tokenizer) -> None:
    with pytest.raises(ModelError, match="takes waves and writes text"):
        pack_media((Source(str(speech)),), replace(WHISPER, takes="input_values"), whisper, tokenizer, 2, 0)


def test_an_empty_listing_and_odd_separators(speech: Path) -> None:
    (speech / "metadata.jsonl").write_text('{"file_name": "0.wav", "text": "a\u2028b"}\n\n', encoding="utf-8")
    assert [clip.text for clip in clips(Source(str(speech)), SPEECH)] == ["a\u2028b"]
    (speech / "metadata.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="names no file"):
        pack_media((Source(str(speech)),), WHISPER, speech, None, 2, 0)


def test_text_beside_an_image_is_part_of_what_a_source_is(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "figure.png")
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    before = fingerprint(Source(str(tmp_path)))
    (tmp_path / "a.txt").write_text("two", encoding="utf-8")
    assert fingerprint(Source(str(tmp_path))) != before


def test_features_that_were_computed_before_are_taken_as_they_are(speech: Path, whisper: Path, tokenizer) -> None:
    extractor = WhisperFeatureExtractor.from_pretrained(whisper)
    samples, _ = soundfile.read(speech / "2.wav", dtype="float32")
    whole = extractor(samples, sampling_rate=RATE, return_tensors="np")["input_features"][0]
    np.save(speech / "mel.npy", whole[:, :40])
    (speech / "metadata.jsonl").write_text('{"file_name": "mel.npy", "text": "a b"}\n', encoding="utf-8")
    found = packed(speech, whisper, tokenizer, rows=1)
    features = found.inputs["input_features"][0]
    assert torch.equal(features[:, :40], torch.from_numpy(whole[:, :40]))
    assert bool((features[:, 40:] == whole[:, :40].min()).all()) and int(found.inputs["encoder_mask"].sum()) == 20
    np.save(speech / "mel.npy", whole[:5])
    with pytest.raises(DataError, match=r"shape \(5, 100\); 16 mels x at most 100 frames"):
        packed(speech, whisper, tokenizer, rows=1)
    (speech / "mel.npy").write_bytes(b"not an array")
    with pytest.raises(DataError, match="no readable array"):
        packed(speech, whisper, tokenizer, rows=1)


@pytest.mark.parametrize("damage", ["empty", "header of more than the file holds", "objects", "zip"])
def test_arrays_that_are_none(damage: str, speech: Path, whisper: Path, tokenizer) -> None:
    place = speech / "mel.npy"
    np.save(place, np.zeros((16, 40), np.float32))
    content = place.read_bytes()
    if damage == "objects":
        np.save(place, np.array([[{}]]), allow_pickle=True)
    else:
        huge = content.replace(b"(16, 40), }        ", b"(16, 4000000000), }")
        assert huge != content
        place.write_bytes({"empty": b"", "zip": b"PK\x03\x04" + content}.get(damage, huge))
    (speech / "metadata.jsonl").write_text('{"file_name": "mel.npy", "text": "a b"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"mel\.npy: no readable array"):
        packed(speech, whisper, tokenizer, rows=1)


def test_sound_that_would_fill_the_memory(speech: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "LONGEST", 1000)
    with pytest.raises(DataError, match=r"0\.wav: no readable sound file \(8,000 samples of 1 channels"):
        wave(speech / "0.wav", RATE)


@pytest.mark.parametrize("damage", ["bomb", "cut", "no image", "odd header"])
def test_images_that_are_none(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    CLIPImageProcessor(size={"shortest_edge": 16}).save_pretrained(tmp_path / "m")
    place = tmp_path / "images" / "0.png"
    Image.new("RGB", (200, 240), (50, 10, 10)).save(place)
    content = place.read_bytes()
    if damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    else:
        damaged = {"cut": content[:80], "no image": b"x", "odd header": content[:20] + b"\xff" * 10 + content[30:]}
        place.write_bytes(damaged[damage])
    with pytest.raises(DataError, match=r"0\.png: no readable image"):
        pack_media((Source(str(tmp_path / "images")),), Kind("pixel_values"), tmp_path / "m", None, 1, 0)
