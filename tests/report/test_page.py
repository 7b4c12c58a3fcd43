"""A report tells what the artefacts hold, names what they lack, and never fails on a damaged one."""

import json
import os
import shutil
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from lillama.cli.app import main
from lillama.pipeline.api import compress
from lillama.report.artefacts import Extra
from lillama.report.card_plot import PLOT
from lillama.report.page import report, write
from lillama.report.watch import default_place, watch_runs

KEYS = ["sizes", "ranks", "spectra", "losses", "carried", "recovery", "evaluation", "samples", "probing",
        "speed"]  # fmt: skip


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def status(*words: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    return int(exit_.value.code or 0)


def test_a_whole_result_has_every_figure_and_no_doubt(out):
    (chapter,) = report([out]).chapters
    assert [figure.key for figure in chapter.figures] == KEYS
    assert chapter.doubts == () and chapter.missing == ()
    assert chapter.headline == "toy, 80.0% of its parameters."
    assert [row[0] for row in chapter.facts][:3] == ["parameters", "weights", "perplexity, novel"]


def test_result_and_run_folder_tell_the_same(out, unfinished):
    one, two = report([out]).as_json(), report([unfinished]).as_json()
    assert {**one["models"][0], "name": ""} == {**two["models"][0], "name": ""}


def test_sizes_add_up_to_what_the_plan_stores(out):
    figures = report([out]).as_json()["models"][0]["figures"]
    rows = {row[0]: row[1:] for row in figures["sizes"]["rows"]}
    assert rows["block 0"][:2] == [32 * 32 + 48 * 32, 8 * 64 + 48 * 32]
    assert rows["attn.q_proj"][:2] == [3 * 32 * 32, 3 * 8 * 64]


def test_experts_are_one_kind_and_stacks_share_no_place(out, unfinished):
    names = {"encoder.0": ["experts.0.up", "experts.1.up", "q"], "decoder.0": ["q"]}
    blocks = [
        {"name": block, "index": index, "linears": [{"name": f"{block}.{name}"} for name in parts]}
        for index, (block, parts) in enumerate(names.items())
    ]
    ranks = {"experts.0.up": 4, "experts.1.up": 2, "q": None}
    linears = [
        {"name": f"{block}.{name}", "out": 16, "in": 16, "rank": ranks[name]}
        for block in names
        for name in names[block]
    ]
    change(unfinished / "spec.json", blocks=blocks)
    change(unfinished / "plan.json", linears=linears)
    for index, block in enumerate(names):
        change(unfinished / "blocks" / f"{index:04}.json", block=block)
    (chapter,) = report([unfinished]).chapters
    sizes, ranked, carried = (
        next(figure for figure in chapter.figures if figure.key == key) for key in ("sizes", "ranks", "carried")
    )
    assert [row[:3] for row in sizes.rows][2:] == [("experts.*.up", 512, 6 * 32), ("q", 512, 512)]
    assert "experts.*.up, block 0: 18.8%" in ranked.plots[0] and "q, block 1: 100.0%" in ranked.plots[0]
    assert len(ranked.rows) == 4
    assert {f"block {index}," in carried.plots[0] for index in range(2)} == {True}


def test_an_evaluation_stands_beside_that_of_the_original(out):
    rows = report([out]).as_json()["models"][0]["figures"]["evaluation"]["rows"]
    assert rows[0] == ["novel", "perplexity", 9.0, 10.0, "+0.1000 [+0.0000, +0.2000]"]
    assert rows[1:3] == [
        ["novel", "KL, nats", None, None, "0.1000 [0.0000, 0.2000]"],
        ["novel", "same top token", None, None, "10.0% [0.0%, 20.0%]"],
    ]
    assert rows[-1] == ["quiz", "acc", 0.4, 0.5, "+0.1000 [+0.0000, +0.2000]"]


def test_samples_stand_side_by_side_and_are_marked_where_they_part(out):
    page = report([out])
    html = page.as_html()
    assert html.count('<div class="passage">') == 2 and html.count("<mark") == 2
    assert '<p> sat on<mark class="dense"> the mat.</mark></p>' in html
    assert '<p> sat on<mark class="kept"> a &lt;mat&gt;.</mark></p>' in html
    assert html.count("both, the same to the end") == 1
    rows = page.as_json()["models"][0]["figures"]["samples"]["rows"]
    assert rows[0] == ["novel", "The cat", " sat on", " the mat.", " a <mat>."]
    assert "| novel | A dog | ran. It |  |  |" in page.as_markdown()


def test_a_real_compression_lacks_nothing(tiny, quick, text, tmp_path):
    compress(tiny, tmp_path / "out", recipe=quick(distill={"epochs": 1}), texts=[text])
    (chapter,) = report([tmp_path / "out"]).chapters
    assert chapter.missing == () and {"sizes", "ranks", "losses", "carried"} <= {one.key for one in chapter.figures}
    assert "perplexity, words" in [row[0] for row in chapter.facts]
    assert f"]({PLOT})" in (tmp_path / "out" / "README.md").read_text() and (tmp_path / "out" / PLOT).is_file()


def test_three_files_appear_with_one_version(out, tmp_path):
    html, markdown, value = write(report([out]), tmp_path / "page.html")
    assert json.loads(value.read_text())["version"] == 1
    assert "| parameters | 10,000 | 8,000 | -20.0% |" in markdown.read_text()
    assert html.read_text().count('<svg role="img" aria-label="') == 2 + 1 + 2 + 3 + 1 + 1 + 1 + 3


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("calibration/manifest.json", {"tokens": 4000, "wanted": 4000}, "Short calibration: 4,000"),
        ("calibration/manifest.json", {"wanted": 200_000}, "ran out"),
        ("blocks/0001.json", {"improved": False}, "1 of 3 blocks did not improve on their initialisation: layers.1"),
        ("blocks/0001.json", {"retried": True}, "diverged and was tried again"),
        ("blocks/0001.json", {"singular": {"mlp.up_proj": [1.0, 2.0]}}, "of layers.1.mlp.up_proj 2.0-fold"),
        ("recovered/log.json", {"improved": False}, "Recovery brought nothing"),
        ("allocation.json", {"chosen": 0.0}, "Uniform ranks were taken"),
        ("metrics.json", {"held_out": {"kl": 0.0, "rise": -0.5}}, None),
    ],
)
def test_reasons_for_doubt_are_told(out, unfinished, file, changes, words):
    change(unfinished / file, **changes)
    doubts = report([unfinished]).chapters[0].doubts
    assert [words in line for line in doubts] == [True] if words else not doubts


def test_text_unlike_the_calibration_is_told(out, unfinished):
    texts = json.loads((unfinished / "metrics.json").read_text())["texts"]
    texts[0]["after"]["perplexity"] = 15.0
    change(unfinished / "metrics.json", texts=texts)
    assert any("the calibration text is unlike it" in line for line in report([unfinished]).chapters[0].doubts)


def test_a_large_loss_is_told_first(out, unfinished):
    texts = json.loads((unfinished / "metrics.json").read_text())["texts"]
    texts[0]["before"]["perplexity"], texts[0]["after"]["perplexity"] = 10.0, 15.0
    change(unfinished / "metrics.json", texts=texts, held_out={"kl": 0.4, "rise": 0.4})
    (doubt,) = report([unfinished]).chapters[0].doubts
    assert "perplexity is 50% higher than the original's; keep more" in doubt


def test_few_pairs_are_told(out, unfinished):
    probe = json.loads((unfinished / "probe.json").read_text())
    probe["results"][0]["breakdowns"]["phenomenon"][0]["items"] = 12
    change(unfinished / "probe.json", **probe)
    assert "toy-pairs: fewer than 100 items in agreement" in report([out]).chapters[0].doubts[0]


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"linears": 3}', '{"linears": [{"name": "x"}]}'])
@pytest.mark.parametrize("name", ["plan.json", "spec.json", "blocks/0001.json", "recovered/log.json", "metrics.json"])
def test_what_is_damaged_is_named_and_the_rest_is_shown(out, unfinished, name, damage, tmp_path):
    (unfinished / name).write_text(damage)
    page = report([unfinished])
    chapter = page.chapters[0]
    assert chapter.missing
    assert len(chapter.figures) >= 3
    write(page, tmp_path / "page.html")


def test_damaged_spectra_are_named(out, unfinished):
    (unfinished / "spectra.safetensors").write_bytes(b"no tensors")
    (chapter,) = report([out]).chapters
    assert chapter.missing == ("small.run/spectra.safetensors: damaged",)
    assert [figure.key for figure in chapter.figures] == [key for key in KEYS if key != "spectra"]


def test_a_result_without_its_run_still_has_its_main_table(out, unfinished):
    shutil.rmtree(unfinished)
    (chapter,) = report([out]).chapters
    assert chapter.facts and not chapter.figures
    assert "the run folder is gone" in chapter.missing[0]


def test_names_from_artefacts_are_never_markup(out, unfinished):
    change(unfinished / "blocks/0001.json", block="<script>alert(1)</script>")
    assert "<script>alert" not in report([out]).as_html()


def test_several_results_are_compared(out, unfinished, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(out, other)
    page = report([out, other])
    assert page.compared is not None and [row[:2] for row in page.compared.rows] == [(1, "small"), (2, "other")]


def test_files_of_other_commands_are_taken_from_where_they_lie(out, unfinished, tmp_path):
    probe = (unfinished / "probe.json").rename(tmp_path / "elsewhere.json")
    keys = {figure.key for figure in report([out], Extra(probes=(probe,))).chapters[0].figures}
    assert "probing" in keys


def test_foreign_folders_are_refused_in_one_line(tmp_path, capsys):
    assert status("report", tmp_path) == 2
    assert status("report", tmp_path / "nothing") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "neither a result" in lines[0] and "no such folder" in lines[1]


def test_the_command_says_where_the_page_is(out, unfinished, capsys):
    assert status("report", out) == 0 and status("report", unfinished) == 0
    places = capsys.readouterr().out.split()
    assert places == [str(out.with_name("small-report.html")), str(unfinished / "report.html")]
    assert all(Path(place).is_file() for place in places)


def test_watching_ends_with_the_run(unfinished, finish):
    place, seen = default_place(unfinished), []

    def sleep(seconds: float) -> None:
        seen.append(f'http-equiv="refresh" content="{seconds:g}"' in place.read_text())
        if len(seen) == 2:
            finish()

    watch_runs([unfinished], place, Extra(), 3.0, sleep)
    assert seen == [True, True] and 'http-equiv="refresh"' not in place.read_text()


TAKEOVER = "x\n\n# Owned\n\n[free](https://evil.example) <script>alert(1)</script> ``` | \x1b[2J \ud800 {{ 7 * 7 }}"


def renamed(file: Path, *old: str) -> None:
    text = file.read_text(encoding="utf-8")
    for word in old:
        assert json.dumps(word) in text
        text = text.replace(json.dumps(word), json.dumps(TAKEOVER))
    file.write_text(text, encoding="utf-8")


def test_no_name_of_others_takes_the_page_over(out: Path, tmp_path: Path) -> None:
    run = out.with_name("small.run")
    before = report([out]).as_markdown()
    renamed(run / "evaluation.json", "novel", "quiz", "acc", "The cat", " the mat.")
    renamed(run / "probe.json", "toy-pairs", "agreement")
    renamed(run / "metrics.json", "novel")
    renamed(out / "lillama.json", "novel", "0.1.0")
    renamed(run / "spec.json", "Toy")
    renamed(run / "bench.json", "cpu")
    (run / "run.json").write_text((run / "run.json").read_text().replace('"adaptive"', json.dumps(TAKEOVER)))
    (out / "README.md").write_text("# [toy](https://evil.example) <b>, 80%\n", encoding="utf-8")
    page = report([out])
    parser = MarkdownIt("commonmark").enable("table")
    tokens, expected = parser.parse(page.as_markdown()), parser.parse(before)
    headings = [[token.tag for token in found if token.type == "heading_open"] for found in (tokens, expected)]
    assert headings[0] == headings[1]
    assert {child.type for token in tokens for child in token.children or ()} <= {"text", "text_special", "softbreak"}
    assert not [token for token in tokens if token.type in ("html_block", "code_block")]
    assert "<script>alert" not in page.as_html()
    written = write(page, tmp_path / "page.html")
    assert all(file.read_text(encoding="utf-8") for file in written)


def test_the_page_tells_nothing_of_where_things_lie_here(out: Path) -> None:
    run = out.with_name("small.run")
    found = json.loads((run / "run.json").read_text())
    found["identity"]["recipe"]["calibration"] = {"sources": [{"path": "/home/someone/notes.txt"}]}
    (run / "run.json").write_text(json.dumps(found))
    page = report([out])
    for text in (page.as_markdown(), page.as_html(), json.dumps(page.as_json())):
        assert "someone" not in text and str(out.parent) not in text
    assert "notes.txt" in page.as_markdown()


def test_a_model_card_that_is_no_file_is_not_waited_for(out: Path) -> None:
    (out / "README.md").unlink()
    os.mkfifo(out / "README.md")
    assert report([out]).chapters[0].headline


@pytest.mark.parametrize("option", ["--evaluation", "--bench", "--probe"])
def test_a_file_that_is_named_but_not_there_is_refused(out, tmp_path, capsys, option):
    assert status("report", out, option, tmp_path / "nothing.json") == 2
    command = option.removeprefix("--").replace("evaluation", "evaluate")
    assert (
        f"nothing.json: there is no such file; give what `lillama {command} --json` printed" in capsys.readouterr().err
    )
