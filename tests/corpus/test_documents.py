import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from lillama.corpus import documents as module
from lillama.corpus import sources
from lillama.corpus.documents import Document, documents
from lillama.corpus.sources import Source, fingerprint
from lillama.corpus.texts import read_text
from lillama.errors import DataError

TEXTS = ["Once.", "Twice, naïve.", "Thrice."]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]


def records(folder: Path, rows: list[dict], kind: str) -> Path:
    path = folder / f"data{kind}"
    lines = "\n".join(json.dumps(row) for row in rows)
    match kind:
        case ".jsonl":
            path.write_text(lines + "\n\n")
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case ".json":
            path.write_text("\n" + json.dumps(rows, indent=1))
        case ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case "saved":
            Dataset.from_list(rows).save_to_disk(path)
        case "saved splits":
            DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:1])).save_to_disk(path)
        case "folder":
            path.mkdir()
            (path / "train-0.jsonl").write_text(lines)
            (path / "test-0.jsonl").write_text('{"text": "not for training"}')
            (path / "README.md").write_text("not a text")
    return path


KINDS = (".jsonl", ".jsonl.gz", ".json", ".parquet", "saved", "saved splits", "folder")


def texts(source: Source, tokenizer) -> list[str]:
    return [document.text for document in documents(source, tokenizer)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", [None, "text"])
def test_every_format_yields_the_same_documents(tmp_path, tokenizer, kind, field):
    path = records(tmp_path, [{"id": i, "text": text} for i, text in enumerate(TEXTS)], kind)
    assert texts(Source(str(path), field=field), tokenizer) == TEXTS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "turns"), [("messages", CHAT), ("conversations", SHAREGPT), ("conversation", CHAT)])
def test_chat_goes_through_the_template(tmp_path, chat_tokenizer, kind, name, turns):
    path = records(tmp_path, [{name: turns}], kind)
    assert texts(Source(str(path)), chat_tokenizer) == ["<user>Hi<assistant>Ho"]


def test_named_field_wins(tmp_path, tokenizer):
    path = records(tmp_path, [{"text": "a", "answer": "b"}], ".jsonl")
    assert texts(Source(str(path), field="answer"), tokenizer) == ["b"]


def test_null_and_empty_texts_are_left_out(tmp_path, tokenizer):
    path = records(tmp_path, [{"text": None}, {"text": ""}, {"text": "x"}], ".jsonl")
    assert texts(Source(str(path)), tokenizer) == ["x"]


def test_splits_and_configs(tmp_path, tokenizer):
    saved = records(tmp_path, [{"text": "a"}, {"text": "b"}], "saved splits")
    assert texts(Source(str(saved), split="test"), tokenizer) == ["a"]
    folder = tmp_path / "many" / "fr"
    folder.mkdir(parents=True)
    (folder / "dev.txt").write_text("un")
    (folder / "book.txt").write_text("deux")
    assert texts(Source(str(folder.parent), config="fr"), tokenizer) == ["deux"]
    assert texts(Source(str(folder.parent), config="fr", split="dev"), tokenizer) == ["un"]


@pytest.mark.parametrize("suffix", [".txt", ".md", ".txt.gz"])
def test_plain_text_is_one_document_in_pieces_cut_at_blank_lines(tmp_path, tokenizer, monkeypatch, suffix):
    monkeypatch.setattr(module, "PIECE", 20)
    text = "".join(f"Paragraph {i}\ngoes on.\n\n" for i in range(9)) + "x" * 500
    path = tmp_path / f"book{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    pieces = list(documents(Source(str(path)), tokenizer))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.text.endswith("\n\n") for piece in pieces[:9])
    assert max(len(piece.text) for piece in pieces) <= 8 * 20 + 20
    assert read_text(path) == text


def test_files_are_streamed(tmp_path, tokenizer):
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "first"}\nnot JSON\n')
    assert next(iter(documents(Source(str(path)), tokenizer))) == Document("first")


@pytest.mark.parametrize("kind", [*KINDS, ".txt"])
def test_fingerprint_changes_with_one_byte(tmp_path, kind):
    prints = []
    for text in ("same", "same", "sane"):
        folder = tmp_path / str(len(prints))
        folder.mkdir()
        path = records(folder, [{"text": text}], kind)
        if kind == ".txt":
            path.write_text(text)
        prints.append(fingerprint(Source(str(path))))
    assert prints[1] != prints[2]
    if not kind.startswith("saved"):  # arrow files carry a fingerprint of their making
        assert prints[0] == prints[1]


def fails(call, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', ["a.jsonl, line 2", "JSON"]),
        ("a.jsonl", b'["x"]', ["line 1", "list", "object"]),
        ("a.json", b'["x"]', ["record 1", "str", "object"]),
        ("a.json", b'[{"text": "x"}', ["a.json", "JSON"]),
        ("a.jsonl", b'{"txt": "x", "id": 1}', ["txt, id", "did you mean 'txt'"]),
        ("a.jsonl", b'{"body": "x"}', ["body", "`field`"]),
        ("a.jsonl", b'{"text": 3}', ["'text' is int"]),
        ("a.jsonl", b'{"messages": [{"speaker": "x"}]}', ["speaker", "role"]),
        ("a.txt", b"", ["a.txt", "no text"]),
        ("a.txt", b" \n\n", ["no text"]),
        ("a.jsonl", b"", ["no text"]),
        ("a.jsonl", b'{"text": null}', ["no text"]),
        ("a.txt", b"caf\xe9 noir", ["UTF-8", "0xe9"]),
        ("a.jsonl", b'{"text": "caf\xe9"}', ["UTF-8", "0xe9"]),
        ("a.txt.gz", b"not packed", ["a.txt.gz", "gzip"]),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], ["a.txt.gz", "cannot be read"]),
        ("a.parquet", b"nothing", ["a.parquet", "Parquet"]),
        ("a.docx", b"x", ["'.docx'", ".jsonl"]),
        ("a.json.gz", b"x", ["'.gz'"]),
        ("noname", b"x", ["no suffix"]),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path, chat_tokenizer, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    fails(lambda: list(documents(Source(str(path)), chat_tokenizer)), *words)


def test_bad_sources_are_told_in_one_line(tmp_path, tokenizer, monkeypatch):
    def read(**fields) -> None:
        list(documents(Source(**fields), tokenizer))

    good = records(tmp_path, [{"text": "x"}], ".jsonl")
    fails(lambda: read(path=str(tmp_path / "none.txt")), "none.txt", "no such file")
    fails(lambda: read(path="none.txt"), "none.txt", "no such file")
    fails(lambda: read(path=str(good), field="test"), "no field 'test'", "did you mean 'text'")
    for weight in (0.0, -1.0, float("nan")):
        fails(lambda weight=weight: read(path=str(good), weight=weight), "weight", "above 0")
    chat = records(tmp_path, [{"messages": CHAT}], ".json")
    fails(lambda: read(path=str(chat)), "record 1", "chat template", "plain text")
    table = records(tmp_path, [{"texte": "x"}], ".parquet")
    fails(lambda: read(path=str(table)), "texte", "did you mean")
    saved = records(tmp_path, [{"text": "x"}], "saved splits")
    fails(lambda: read(path=str(saved), split="tset"), "train, test", "did you mean 'test'")
    (saved / "train" / "state.json").unlink()
    fails(lambda: read(path=str(saved)), str(saved), "cannot be loaded")
    folder = records(tmp_path, [{"text": "x"}], "folder")
    fails(lambda: read(path=str(folder), split="validation"), "split 'validation'")
    (tmp_path / "empty").mkdir()
    fails(lambda: read(path=str(tmp_path / "empty")), "empty", "0 data files")


def test_a_template_that_refuses_is_told(tmp_path, chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = records(tmp_path, [{"messages": CHAT}], ".jsonl")
    fails(lambda: list(documents(Source(str(path)), chat_tokenizer)), "line 1", "roles must alternate")


def test_unreachable_hub_is_told_in_one_line(tokenizer, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Name or service not known\nsecond line")

    sources._revision.cache_clear()
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    fails(lambda: list(documents(Source("owner/data"), tokenizer)), "owner/data", "hub", "Name or service not known")
    monkeypatch.setattr(sources, "_revision", lambda name: "0" * 40)
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    fails(lambda: list(documents(Source("owner/data"), tokenizer)), "owner/data", "'train'", "folder")


def test_hub_rows_are_documents(tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "_revision", lambda name: "0" * 40)
    calls = []

    def load(*args, **options):
        calls.append((args, options))
        return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr("datasets.load_dataset", load)
    source = Source("owner/data", config="fr", split="test")
    assert texts(source, tokenizer) == ["a", "b"]
    assert calls == [(("owner/data", "fr"), {"split": "test", "streaming": True, "revision": "0" * 40})]
    assert fingerprint(source) == "0" * 40


def test_read_text_takes_plain_text_only(tmp_path):
    fails(lambda: read_text(tmp_path / "none.txt"), "no such file")
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    fails(lambda: read_text(path), "'.jsonl'", ".txt")
    path = tmp_path / "a.txt"
    path.write_text("\n")
    fails(lambda: read_text(path), "no text")


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".json"])
def test_a_line_without_end_is_refused(tmp_path, tokenizer, monkeypatch, kind):
    monkeypatch.setattr(sources, "LINE", 1000)
    path = tmp_path / f"a{kind}"
    rows = (json.dumps({"text": "fine"}) + "\n" + json.dumps({"text": "x" * 2000})).encode()
    path.write_bytes(gzip.compress(rows) if kind.endswith(".gz") else rows)
    with pytest.raises(DataError, match=r"line 2: longer than .* characters; cut it, or leave it out"):
        texts(Source(str(path)), tokenizer)


def test_a_bomb_fills_no_memory(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * (sources.LINE + 1000), compresslevel=1))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"line 1: longer than 64 Mi characters"):
            texts(Source(str(path)), tokenizer)
        assert tracemalloc.get_traced_memory()[1] < 6 * sources.LINE
    finally:
        tracemalloc.stop()


def test_what_is_read_whole_is_bounded(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "WHOLE", 1000)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 2000}]))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x" * 2000))
    with pytest.raises(DataError, match=r"a\.json: longer than .*; write one object on each line"):
        texts(Source(str(tmp_path / "a.json")), tokenizer)
    with pytest.raises(DataError, match=r"a\.txt\.gz: longer than .*; give a part of it"):
        read_text(tmp_path / "a.txt.gz")


@pytest.mark.parametrize(
    "name", ["../other/data-00000-of-00001.arrow", "/etc/passwd", "..", ".", "", "x.txt", 5, None, "a/b.arrow"]
)
def test_a_saved_dataset_names_its_own_files_alone(tmp_path, tokenizer, name):
    other = tmp_path / "other"
    Dataset.from_list([{"text": "SECRET"}]).save_to_disk(other)
    for kind, state in (("saved", "state.json"), ("saved splits", "train/state.json")):
        path = records(tmp_path, [{"text": "x"}], kind)
        value = json.loads((path / state).read_text())
        (path / state).write_text(json.dumps(value | {"_data_files": [{"filename": name}]}))
        fails(lambda path=path: texts(Source(str(path)), tokenizer), "state.json: names", "save the dataset anew")


@pytest.mark.parametrize("name", ["../other", "/etc", "..", "", 5, "a/b"])
def test_saved_splits_are_folders_of_their_own(tmp_path, tokenizer, name):
    Dataset.from_list([{"text": "SECRET"}]).save_to_disk(tmp_path / "other")
    path = records(tmp_path, [{"text": "x"}], "saved splits")
    (path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", name]}))
    fails(
        lambda: texts(Source(str(path), split=str(name)), tokenizer),
        "dataset_dict.json: names",
        "save the dataset anew",
    )


def test_a_parquet_column_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    rows = [{"text": f"{number} " + "a" * 200_000, "id": number} for number in range(40)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", compression="zstd")
    source = Source(str(tmp_path / "a.parquet"))
    assert len(list(documents(source, None))) == 40  # of some megabytes, whatever their ratio
    monkeypatch.setattr("lillama.corpus.sources.SMALL", 1 << 20)
    with pytest.raises(DataError, match=r"column text unpacks .* which no text does"):
        list(documents(source, None))
