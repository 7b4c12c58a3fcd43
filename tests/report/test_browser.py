"""The page in a real browser: all is drawn, tables sort, nothing is fetched, nothing overflows, everything has a name."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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


@pytest.fixture
def file(out, tmp_path) -> Path:
    return write(report([out]), tmp_path / "page.html")[0]


@pytest.fixture(params=SIZES)
def view(chromium, file, request) -> Iterator[Any]:
    """The open page, with what it asked for and complained about."""
    scheme, width = SIZES[request.param]
    page = chromium.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    page.asked, page.complaints = [], []
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(file.as_uri())
    if folder := os.environ.get("LILLAMA_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"report-{request.param}.png", full_page=True)
    yield page
    page.close()


def test_the_page_is_whole_and_alone(view, file):
    assert view.asked == [file.as_uri()] and view.complaints == []
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert view.evaluate(
        "[...document.querySelectorAll('svg')].every(plot => plot.getBoundingClientRect().height > 20)"
    )
    assert view.evaluate("document.querySelectorAll('svg').length") == 14


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


def test_light_and_dark_differ_and_print_is_light(chromium, file):
    colours = {}
    for scheme in ("light", "dark"):
        page = chromium.new_page(color_scheme=scheme)
        page.goto(file.as_uri())
        colours[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.emulate_media(media="print", color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        page.close()
    assert colours["light"] != colours["dark"]
