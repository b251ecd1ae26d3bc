"""Pages in a real browser: sizes from phone to desktop, light and dark, sorting, enlarging."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.deploy.browser import Browser, browser, find_browser
from tests.utils.html_cases import chapter, names, pictures
from utils.html.comparison import comparison_page
from utils.html.evaluation import evaluation_page

SIZES = {"phone": (390, 844), "desktop": (1440, 900), "narrow": (360, 640), "wide": (1600, 1000)}
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def tab(tmp_path_factory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on this machine; the pages are checked as HTML only")
    with browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Write a report of four categories, with long names, wide tables and n/a."""
    folder = tmp_path_factory.mktemp("report")
    paths = pictures(folder, [*names(3, 6), f"crack/{'long_name_' * 12}.png"])
    scores = np.random.default_rng(2).random(len(paths)).round(3).tolist()
    longest = "a_category_with_quite_a_long_name_of_its_own"
    chapters = [
        chapter(paths, scores, category="bottle", of=4),
        chapter(paths, scores, category="wood", masked=False, of=4),
        chapter(paths, scores, category=longest, cuts=None, of=4),
        chapter(paths[:3], scores[:3], category="tile", of=4),
    ]
    file = folder / "report.html"
    file.write_text(evaluation_page(chapters, "today"), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        ("phone", "light"), ("phone", "dark"), ("desktop", "light"), ("desktop", "dark"),
        ("narrow", "light"), ("wide", "light"),
    ],
)  # fmt: skip
def test_every_size_and_scheme(tab, report, tmp_path, size, scheme):
    """All parts unfolded: nothing is wider than the window, and the text stands out."""
    tab.look(*SIZES[size], scheme)
    tab.open(report.as_uri())
    assert tab.run(OVERFLOW) <= 0
    tab.run("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert tab.run(OVERFLOW) <= 0
    shot = np.asarray(Image.open(tab.screenshot(tmp_path / f"{size}.png")).convert("L"))
    assert 0 <= SIZES[size][0] - shot.shape[1] <= 20  # a scroll bar
    darkest, paper, lightest = np.quantile(shot, (0.0005, 0.5, 0.9995))
    if scheme == "light":
        assert paper > 230 > darkest + 120
    else:
        assert paper < 60 < lightest - 120
    smallest = tab.run(
        "Math.min(...[...document.querySelectorAll('main *')].filter((e) => e.children.length === 0"
        " && e.textContent.trim()).map((e) => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 12
    assert tab.requests == [report.as_uri()] * len(tab.requests)
    assert tab.problems == []


def test_pictures_are_enlarged_by_link_and_closed_by_escape(tab, report):
    tab.look(*SIZES["desktop"], "light")
    tab.open(report.as_uri())
    tab.run("document.getElementById('bottle').open = true")
    width = "document.querySelector('#bottle-0 img').getBoundingClientRect().width"
    before = tab.run(width)
    tab.run("document.querySelector('#bottle-0 a.open').click()")
    tab.wait("location.hash === '#bottle-0'")
    assert tab.run(width) > 2 * before
    assert tab.run("document.querySelector('#bottle-0 img').naturalWidth") > 0
    tab.press("ArrowRight", 39)
    tab.wait("location.hash === '#bottle-1'")
    tab.press("Escape", 27)
    tab.wait("location.hash === '#at-bottle-1'")
    assert tab.run(width) == before


def test_tables_are_sorted_by_a_click_and_means_stay_below(tab, tmp_path):
    rows = [
        {
            "category": name, "settings": {"preset": "p", "seed": 0}, "reasons": {},
            "metrics": {"image_auroc": value},
        }
        for name, value in (("b", 0.5), ("c", None), ("a", 0.25), ("d", 0.75))
    ]  # fmt: skip
    file = tmp_path / "compare.html"
    file.write_text(comparison_page(rows), encoding="utf-8")
    tab.open(file.as_uri())
    body = "[...document.querySelectorAll('tbody tr')].map((r) => r.cells[0].textContent).join('')"
    click = "document.querySelectorAll('thead th button')[{}].click()"
    assert tab.run(body) == "bcad"
    for column, orders in ((1, ("abdc", "dbac")), (0, ("abcd", "dcba"))):
        for order in orders:  # n/a is last either way
            tab.run(click.format(column))
            assert tab.run(body) == order
    assert tab.run("document.querySelector('th[aria-sort]').ariaSort") == "descending"
    assert tab.run("document.querySelector('tfoot th').textContent") == "mean"
    assert tab.problems == []
