"""Wrong values in foreign artefacts: no page fails, what they do not concern is shown, and what is missing is named."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from lillama.evaluation.evaluate import EvaluationJson
from lillama.probing.result import ProbesJson
from lillama.ranks.plan import PlanJson
from lillama.report.page import report
from lillama.report.reader import keep_valid

FED = {  # what is drawn from an artefact, and from it alone or with others
    "run.json": set(),
    "spec.json": {"sizes", "ranks", "spectra"},
    "plan.json": {"sizes", "ranks", "spectra"},
    "calibration/manifest.json": set(),
    "blocks/0001.json": {"losses", "carried"},
    "recovered/log.json": {"recovery"},
    "allocation.json": set(),
    "evaluation.json": {"evaluation", "samples"},
    "probe.json": {"probing"},
    "bench.json": {"speed"},
    "metrics.json": set(),
}
ODD = (3, -1, 0.5, 10**400, 1e308, float("nan"), float("inf"), True, None, "", "7", "<b>x", [], [1], {}, {"a": 1})
QUICK = settings(max_examples=40, deadline=None, derandomize=True,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip


def places(value, before=()):
    """Yield the place of every value within a JSON value."""
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, part in steps:
        yield (*before, step)
        yield from places(part, (*before, step))


def changed(content: str, place, new) -> str:
    """Return a JSON text with one value replaced."""
    tree = json.loads(content)
    part = tree
    for step in place[:-1]:
        part = part[step]
    part[place[-1]] = new
    return json.dumps(tree)


@pytest.fixture
def sound(out, unfinished):
    """The figures of a sound run, as JSON values."""
    (chapter,) = report([unfinished]).chapters
    return chapter.as_json()["figures"]


def check(run: Path, name: str, sound: dict, named: bool) -> None:
    """Read a run with one odd artefact: the figures that it does not feed are there, and what is gone is named."""
    page = report([run])
    html = page.as_html()
    (chapter,) = page.chapters
    figures = chapter.as_json()["figures"]
    assert {key: found for key, found in figures.items() if key not in FED[name]} == {
        key: found for key, found in sound.items() if key not in FED[name]
    }
    assert not named or figures.keys() == sound.keys() or chapter.missing
    assert "<b>x" not in html and "nan" not in html.partition("<main>")[2].partition("<script>")[0].split()
    json.dumps(page.as_json(), allow_nan=False)
    assert page.as_markdown()


@QUICK
@given(data=some.data())
def test_one_odd_value_costs_only_what_it_feeds(data, unfinished, sound):
    name = data.draw(some.sampled_from(sorted(FED)))
    file = unfinished / name
    content = file.read_text()
    place = data.draw(some.sampled_from(list(places(json.loads(content)))))
    try:
        new = data.draw(some.sampled_from(ODD))
        file.write_text(changed(content, place, new))
        check(unfinished, name, sound, named=new not in ([], {}))  # an empty list is no damage
    finally:
        file.write_text(content)


@QUICK
@given(data=some.data())
def test_any_json_at_all_is_survived(data, unfinished, sound):
    name = data.draw(some.sampled_from(sorted(FED)))
    keys = some.sampled_from([*json.loads((unfinished / name).read_text()), "x"])
    leaves = some.one_of(some.none(), some.booleans(), some.integers(), some.floats(), some.text(max_size=3))
    tree = some.recursive(leaves, lambda part: some.lists(part, max_size=3) | some.dictionaries(keys, part, max_size=3),
                          max_leaves=8)  # fmt: skip
    content = (unfinished / name).read_text()
    try:
        (unfinished / name).write_text(json.dumps(data.draw(tree)))
        check(unfinished, name, sound, named=False)
    finally:
        (unfinished / name).write_text(content)


@pytest.mark.parametrize(
    ("file", "place", "value", "words"),
    [
        ("probe.json", ("results",), 3, "small.run/probe.json: results is 3, it should be a valid list"),
        ("run.json", ("identity",), [], "small.run/run.json: identity is [], it should be a valid dictionary"),
        ("blocks/0001.json", ("steps",), "many", "blocks/0001.json: steps is 'many', it should be a valid integer"),
        ("evaluation.json", ("texts", 0, "against", "kl", "value"), None, "texts.0.against.kl.value is None"),
        ("plan.json", ("linears", 2, "rank"), 0, "plan.json: linears.2.rank is 0, it should be greater than 0"),
    ],
)
def test_what_is_wrong_is_named(out, unfinished, file, place, value, words):
    (unfinished / file).write_text(changed((unfinished / file).read_text(), place, value))
    (line,) = report([unfinished]).chapters[0].missing
    assert words in line


def test_numbers_in_words_are_numbers(out, unfinished, sound):
    file = unfinished / "blocks" / "0001.json"
    file.write_text(changed(file.read_text(), ("initial",), "1.1"))
    (chapter,) = report([unfinished]).chapters
    assert chapter.as_json()["figures"] == sound and chapter.missing == ()


def test_only_what_is_wrong_and_what_cannot_be_without_it_is_taken_out():
    against = {"kl": {"value": "x"}, "top1": {"value": 1.0}}
    texts = [{"name": "novel", "perplexity": 9.0, "against": against}, {"name": "other"}, {"name": [], "perplexity": 1}]
    found, faults = keep_valid(EvaluationJson, {"texts": texts, "tasks": 3})
    assert found == {"texts": [{"name": "novel", "perplexity": 9.0, "against": {"top1": {"value": 1.0}}}]}
    assert len(faults) >= 4
    rows = [{"name": "a", "out": 4, "in": 4, "rank": rank} for rank in (1, "two", None, -3, 2)]
    found, _ = keep_valid(PlanJson, {"linears": rows})
    assert [row["rank"] for row in found["linears"]] == [1, None, 2]
    assert keep_valid(ProbesJson, {"results": 3})[0] == {} and keep_valid(ProbesJson, {"results": []}) == (
        {"results": []},
        [],
    )


def test_deep_nesting_is_damage(out, unfinished):
    (unfinished / "plan.json").write_text("[" * 100_000)
    (chapter,) = report([unfinished]).chapters
    assert chapter.missing[0] == "small.run/plan.json: damaged"


def test_a_result_that_moved_without_its_run_is_told(out, unfinished, tmp_path):
    shutil.rmtree(unfinished)
    moved = out.rename(tmp_path / "moved")
    (moved / "lillama.json").write_text(changed((moved / "lillama.json").read_text(), ("run",), 3))
    (chapter,) = report([moved]).chapters
    assert chapter.facts and chapter.missing[0].startswith("moved/lillama.json: run is 3")
