"""What the measures of bench/real.py rest on: tasks over local files, sentences, embeddings, word errors."""

import json
import shutil
import sys
import wave
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lillama.evaluation.harness import METRICS

pytest.importorskip("lm_eval")
pytest.importorskip("jiwer")
pytest.importorskip("soundfile")
sys.path.append(str(Path(__file__).parents[2] / "bench"))

from real_models import language, sentences, speech, tasks
from real_models.cases import CASES
from tiny.score import RATE
from tiny.speech import made_processor, random_model

# ---- what is calibrated on and measured


def test_no_file_is_both_calibrated_on_and_measured() -> None:
    for case in CASES.values():
        read = {source["path"] for source in case.sources}
        assert not read & {file for files in case.measured.values() for file in files}


@pytest.mark.assets
def test_no_sentence_is_both_calibrated_on_and_measured(assets: Path) -> None:
    case = CASES["whisper-base"]
    spoken = {one for source in case.sources for one in sentences.sentences(assets / source["path"])}
    valid, test = (set(sentences.sentences(assets / case.measured[part][-1])) for part in ("valid", "test"))
    assert len(spoken) >= case.tokens // case.seq_len and len(test) >= speech.HELD_OUT
    assert not spoken & (valid | test)


def test_instructions_are_calibrated_on_with_their_answers(tmp_path: Path) -> None:
    instances = [{"input": "", "output": "Yes."}, {"input": "Rain?", "output": "No."}]
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"instruction": "Is it dry?", "instances": instances}) + "\n")
    found = language.write_answered(tmp_path / "tasks.jsonl", tmp_path / "out" / "tasks.jsonl")
    assert [json.loads(line) for line in found.read_text().splitlines()] == [{"text": "Is it dry?\nYes.\nRain?\nNo."}]


# ---- tasks


def test_every_task_of_the_paper_can_be_asked() -> None:
    assert METRICS.keys() <= tasks.TASKS.keys()


GOLD = {  # task -> end of the prompt of its first document, and the right answer
    "lambada_openai": ("I don't care about", " signs"),
    "arc_challenge": ("increase in rotation?\nAnswer:", "Planetary days will become shorter."),
    "arc_easy": ("most food webs?\nAnswer:", "Sunlight is the source of energy for nearly all ecosystems."),
    "piqa": (
        "it's new occupants?\nAnswer:",
        "a few inches of bedding made of ripped paper strips, you will also need to",
    ),
    "openbookqa": ("the best way to save money is to", "quit eating lunch out"),
    "social_iqa": ("need to do before this?\nA:", "Find somewhere to go"),
    "truthfulqa_mc2": ("one square mile in area?\nA:", "Nauru is the smallest country in the world"),
    "boolq": ("take more energy make that produces?\nAnswer:", "no"),
    "hellaswag": ("swing your body. A few women", "are in the gym practicing to do this pole vault"),
    "copa": ("turned on the faucet, therefore", "water flowed from the spout."),
}


@pytest.mark.assets
@pytest.mark.parametrize("name", GOLD)
def test_a_task_asks_as_the_harness_does(name: str, assets: Path, tmp_path: Path) -> None:
    file = tasks.TASKS[name].file
    (tmp_path / file).write_text("".join((assets / "eval" / file).read_text().splitlines(keepends=True)[:2]))
    (task,) = tasks.load_tasks([name], tmp_path, tmp_path)
    assert task.metric == METRICS.get(name)
    (leaf,) = task.loaded["tasks"].values()
    document = next(iter(leaf.eval_docs))
    target, prompt, gold = leaf.doc_to_target(document), *GOLD[name]
    assert len(leaf.eval_docs) == 2 and leaf.doc_to_text(document).endswith(prompt)
    assert gold in (leaf.doc_to_choice(document)[target] if isinstance(target, int) else target)


@pytest.mark.assets
def test_winogrande_asks_for_the_rest_after_either_name(assets: Path, tmp_path: Path) -> None:
    file = "winogrande.jsonl"
    (tmp_path / file).write_text((assets / "eval" / file).read_text().splitlines(keepends=True)[0])
    (task,) = tasks.load_tasks(["winogrande"], tmp_path, tmp_path)
    (leaf,) = task.loaded["tasks"].values()
    (document,) = leaf.eval_docs
    assert (
        leaf.doc_to_choice(document)[leaf.doc_to_text(document)]
        == "Sarah was a much better surgeon than Maria so Maria"
    )
    assert leaf.doc_to_target(document) == "always got the easier cases."


def test_only_tasks_whose_documents_lie_there_are_asked(tmp_path: Path) -> None:
    assert tasks.present(tmp_path) == [] == tasks.load_tasks([], tmp_path, tmp_path)
    (tmp_path / "piqa.jsonl").touch()
    assert tasks.present(tmp_path) == ["piqa"]


# ---- sentences


def test_sentences_are_plain_distinct_and_of_medium_length(tmp_path: Path) -> None:
    kept = "The cat sat on the mat."
    rows = [f"{kept} It is 3 o'clock by the old clock. Short one. {kept}", "A (very) odd sentence with signs in it."]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert sentences.sentences(tmp_path / "rows.jsonl") == [kept]


def test_what_is_the_same_is_near_and_what_turns_is_not() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).double())
    same = sentences.compare(vectors, vectors)
    assert same["cosine"]["value"] == pytest.approx(1) and same["nearest"]["value"] == 1
    turned = sentences.compare(-vectors, vectors)
    assert turned["cosine"]["value"] == pytest.approx(-1) and turned["nearest"]["value"] == 1, "turned together"
    other = sentences.compare(vectors.flip(0), vectors)
    assert other["nearest"]["value"] < 1


def test_an_embedding_does_not_depend_on_the_sentences_beside_it(tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="</s>").save_pretrained(tmp_path)
    texts = ["One.", "Another one that is longer."]
    together = sentences.embed(tmp_path, texts, torch.device("cpu"))
    alone = torch.cat([sentences.embed(tmp_path, [text], torch.device("cpu")) for text in texts])
    assert torch.allclose(together, alone, atol=1e-6) and torch.allclose(together.norm(dim=1), torch.ones(2).double())


# ---- speech


def test_words_are_compared_without_case_and_signs() -> None:
    assert speech.plain_words("Don\u2019t, ill-disposed  \u201cMEN\u201d!") == "don't ill disposed men"


def test_word_errors_are_shared_among_all_words() -> None:
    found = speech.summary(
        ["one two three", "four"], {"model": torch.tensor([1.0, 1.0]), "dense": torch.tensor([1.0, 0.0])}
    )
    assert (found["word_error_rate"]["value"], found["dense"], found["words"]) == (0.5, 0.25, 4)
    assert found["points"]["value"] == 25 and found["points"]["low"] == 0
    assert "points" not in speech.summary(["one"], {"model": torch.tensor([1.0])})


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng reads")
def test_sentences_are_read_once_in_several_voices(tmp_path: Path) -> None:
    row = {"text": "The cat sat on the mat. The dog lay on the old rug. A bird sang in the high tree."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    folder = speech.speak(tmp_path / "rows.jsonl", 2, tmp_path / "speech")
    clips = speech.clips(folder / "metadata.jsonl", "file_name", folder)
    assert [text for _, text in clips] == ["The cat sat on the mat.", "The dog lay on the old rug."]
    with wave.open(str(clips[0][0])) as file:
        assert file.getframerate() == RATE and file.getnframes() > RATE
    before = clips[0][0].stat().st_mtime_ns
    assert speech.speak(tmp_path / "rows.jsonl", 2, tmp_path / "speech") == folder
    assert clips[0][0].stat().st_mtime_ns == before


def test_a_whisper_writes_down_every_utterance(tmp_path: Path) -> None:
    texts = ["one two", "two one two", "one"]
    processor = made_processor(texts)
    random_model(len(processor.tokenizer), seed=0).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    clips = []
    for index, text in enumerate(texts):
        with wave.open(str(tmp_path / f"{index}.wav"), "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(RATE)
            out.writeframes(bytes(2 * RATE * (index + 1) // 2))
        clips.append((tmp_path / f"{index}.wav", text))
    found = speech.count_errors(tmp_path, {"all": clips, "none": []}, torch.device("cpu"))
    assert found["all"].shape == (3,) and found["none"].shape == (0,) and (found["all"] >= 0).all()
