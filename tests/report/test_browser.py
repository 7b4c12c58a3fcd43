"""The page in a real browser: all is drawn, tables sort, nothing is fetched, nothing overflows, everything has a name.

Screenshots go to the folder that LILLAMA_ARTEFACTS names, where continuous integration keeps them.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lillama.report.card_plot import kept_plot
from lillama.report.page import report, write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip
SIZES = {"light": ("light", 1200), "dark": ("dark", 1200), "phone": ("light", 390)}

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory) -> Path:
    """The folder for screenshots."""
    folder = Path(os.environ.get("LILLAMA_ARTEFACTS") or tmp_path_factory.mktemp("artefacts"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def file(out, tmp_path) -> Path:
    return write(report([out]), tmp_path / "page.html")[0]


@pytest.fixture
def comparison(out, unfinished, tmp_path) -> Path:
    """A page about six results, of which one has a long name."""
    results = [out]
    for index, name in enumerate(("b", "c", "d", "e", "a-rather-long-name-of-a-folder-0.25")):
        other = shutil.copytree(out, tmp_path / name)
        told = json.loads((other / "lillama.json").read_text())
        told |= {"run": "", "keep": 0.7 - 0.1 * index, "held_out": {"kl": 0.05 * 2**index, "rise": 0.04 * 2**index}}
        (other / "lillama.json").write_text(json.dumps(told))
        results.append(other)
    return write(report(results), tmp_path / "comparison.html")[0]


@pytest.fixture(params=SIZES)
def view(chromium, file, artefacts, request) -> Iterator[Any]:
    """The open page, with what it asked for and complained about."""
    scheme, width = SIZES[request.param]
    page = chromium.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    page.asked, page.complaints = [], []
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(file.as_uri())
    page.screenshot(path=artefacts / f"report-{request.param}.png", full_page=True)
    yield page
    page.close()


def test_the_page_is_whole_and_alone(view, file):
    assert view.asked == [file.as_uri()] and view.complaints == []
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert view.evaluate(
        "[...document.querySelectorAll('svg')].every(plot => plot.getBoundingClientRect().height > 20)"
    )
    assert view.evaluate("document.querySelectorAll('svg').length") == 14
    assert view.evaluate("document.querySelectorAll('.passage').length") == 2


def test_everything_has_an_accessible_name(view):
    names = view.evaluate("[...document.querySelectorAll('svg')].map(plot => plot.getAttribute('aria-label'))")
    assert all(names) and len(set(names)) == len(names)
    for role in ("button", "link", "region", "img"):
        for found in view.get_by_role(role).all():
            assert found.get_attribute("aria-label") or found.inner_text()


def test_tables_sort_by_keyboard_both_ways(view):
    view.locator("#m1-ranks summary").click()
    head = view.locator("#m1-ranks th button", has_text="share")
    read = "[...document.querySelectorAll('#m1-ranks tbody tr')].map(row => Number(row.cells[3].dataset.value))"
    head.focus()
    view.keyboard.press("Enter")
    rising = view.evaluate(read)
    view.keyboard.press("Enter")
    assert rising == sorted(rising) and len(set(rising)) > 1 and view.evaluate(read) == sorted(rising, reverse=True)
    assert head.locator("xpath=..").get_attribute("aria-sort") == "descending"


def test_light_and_dark_differ(chromium, file):
    colours = set()
    for scheme in ("light", "dark"):
        page = chromium.new_page(color_scheme=scheme)
        page.goto(file.as_uri())
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    assert len(colours) == 2


def test_on_paper_nothing_is_dark_or_cut(chromium, comparison, artefacts):
    """A4 with margins of 12 mm is 703 pixels wide."""
    page = chromium.new_page(color_scheme="dark", viewport={"width": 703, "height": 1000})
    page.goto(comparison.as_uri())
    page.pdf(
        path=artefacts / "comparison.pdf", format="A4", margin=dict.fromkeys(("top", "right", "bottom", "left"), "12mm")
    )
    page.emulate_media(media="print")
    page.screenshot(path=artefacts / "comparison-print.png", full_page=True)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    wide = "[...document.querySelectorAll('body *')].filter(one => one.getBoundingClientRect().right > innerWidth + 1)"
    assert page.evaluate(f"{wide}.map(one => one.outerHTML.slice(0, 80))") == []
    assert page.evaluate("[...document.querySelectorAll('nav, summary')].every(one => !one.getClientRects().length)")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_six_results_fit_on_a_phone(chromium, comparison, artefacts, scheme):
    page = chromium.new_page(color_scheme=scheme, viewport={"width": 390, "height": 844})
    page.goto(comparison.as_uri())
    page.screenshot(path=artefacts / f"comparison-phone-{scheme}.png", clip={"x": 0, "y": 0, "width": 390, "height": 1600},
                    full_page=True)  # fmt: skip
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#all-compared circle").count() == 6
    page.close()


def test_samples_are_side_by_side_where_there_is_room(chromium, file):
    tops = {}
    for width in (1200, 390):
        page = chromium.new_page(viewport={"width": width, "height": 900})
        page.goto(file.as_uri())
        tops[width] = [side.bounding_box()["y"] for side in page.locator(".passage").first.locator(".side").all()]
        page.close()
    assert tops[1200][0] == tops[1200][1] and tops[390][0] < tops[390][1]


def test_an_open_page_follows_the_run_and_comes_to_rest(chromium, unfinished, finish, tmp_path):
    place = tmp_path / "live.html"
    write(report([unfinished]), place, refresh=1)
    page = chromium.new_page()
    page.goto(place.as_uri())
    assert page.locator(".state").inner_text().startswith("Still going on")
    finish()
    write(report([unfinished]), place)
    page.locator("table.facts").wait_for(timeout=120_000)
    assert page.locator("meta[http-equiv=refresh]").count() == page.locator(".state").count() == 0
    page.close()


def test_the_plot_of_the_card_is_an_image(chromium, unfinished, artefacts, tmp_path):
    (tmp_path / "kept.svg").write_text(kept_plot(unfinished))
    (tmp_path / "card.html").write_text('<img src="kept.svg" alt="">')
    page = chromium.new_page(viewport={"width": 600, "height": 300})
    page.goto((tmp_path / "card.html").as_uri())
    page.screenshot(path=artefacts / "card.png")
    assert page.evaluate("document.images[0].naturalWidth") > 200
    page.close()
