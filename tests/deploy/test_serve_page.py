"""The page in a real browser, which reaches nothing but the service. Screenshots are kept."""

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.deploy.browser import Browser, browser, find_browser
from tests.deploy.serving import Running, picture, serving
from tests.small_run import REPO
from utils.image import read_image

pytest.importorskip("fastapi", reason="pip install -r requirements-service.txt")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium: apt-get install chromium"),
]

BAD, GOOD = (REPO / f"images/bottle_{kind}.png" for kind in ("bad", "good"))
TOKEN = "correct-horse-battery"
DONE = "document.getElementById('status').textContent.includes(': ')"


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> Path:
    """Return the folder for screenshots: that of FLOWAD_SCREENSHOTS, or a temporary one."""
    folder = Path(os.environ.get("FLOWAD_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def page(service: Running, tmp_path) -> Iterator[Browser]:
    """Open the page in a browser of its own."""
    program = find_browser()
    assert program
    with browser(program, tmp_path / "profile") as opened:
        opened.look(1200, 900, "light")
        opened.open(f"http://127.0.0.1:{service.port}/")
        opened.wait("models.length === 2")
        yield opened
        own = f"http://127.0.0.1:{service.port}/"
        assert [address for address in opened.requests if not address.startswith(own)] == []


def text(page: Browser, name: str) -> str:
    return page.run(f"document.getElementById('{name}').innerText")


def judge(page: Browser, *files: Path) -> None:
    page.run("document.getElementById('status').textContent = ''")
    before = page.run("recent.length")
    page.choose("#files", *files)
    page.wait(f"recent.length === {before + len(files)} && {DONE}")
    page.wait("['heat', 'picture'].every(id => document.getElementById(id).complete)")


def box(page: Browser, name: str) -> list[float]:
    return page.run(
        f"(r => [r.x, r.y, r.width, r.height])(document.getElementById('{name}')"
        ".getBoundingClientRect())"
    )


def test_a_result_is_shown(page, service, shots):
    expected = service.predict(BAD, query="?model=fast").json["results"][0]
    judge(page, BAD)
    assert expected["verdict"] in text(page, "verdict")
    facts = text(page, "facts")
    assert facts.startswith("Score")
    shown = page.run("Number(document.querySelector('#facts dd').textContent)")
    assert shown == pytest.approx(expected["score"], rel=1e-3)
    assert f"{expected['width']} × {expected['height']}" in facts
    assert page.run("document.querySelectorAll('#boxes rect').length") == len(expected["regions"])
    above = page.run("parseFloat(document.getElementById('dot').style.left) > 50")
    assert above == (expected["score"] > expected["threshold"])
    for width, height, scheme in (
        (1200, 900, "light"), (1200, 900, "dark"), (390, 844, "light"), (390, 844, "dark"),
    ):  # fmt: skip
        page.look(width, height, scheme)
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        assert box(page, "heat") == box(page, "picture") == box(page, "boxes")
        x, y, w, h = box(page, "picture")
        assert w / h == pytest.approx(expected["width"] / expected["height"], rel=0.02)
        assert x >= 0
        assert x + w <= width
        shot = read_image(page.screenshot(shots / f"{scheme}_{width}.png"))
        assert (shot[5, 5].mean() > 128) == (scheme == "light")
        inside = shot[int(y) : int(y + h), int(x) : int(x + w)]
        assert inside.std() > 10
    assert page.problems == []


def test_the_slider_fades_the_heat_map(page, shots):
    judge(page, BAD)
    seen = {}
    page.run("document.getElementById('outlines').click()")
    x, y, w, h = (int(v) for v in box(page, "picture"))
    for percent in (0, 100):
        page.run(
            f"(s => {{ s.value = {percent}; s.dispatchEvent(new Event('input')); }})"
            "(document.getElementById('opacity'))"
        )
        assert text(page, "percent") == f"{percent} %"
        shot = read_image(page.screenshot(shots / f"slider_{percent}.png"))
        seen[percent] = shot[y : y + h, x : x + w]
    photo = cv2.resize(read_image(BAD), (w, h), interpolation=cv2.INTER_LINEAR)
    differences = {p: np.abs(s.astype(int) - photo).mean() for p, s in seen.items()}
    assert differences[0] < 5
    assert differences[100] > 20


def test_recent_results_by_keyboard(page):
    judge(page, BAD, GOOD)
    assert text(page, "name") == GOOD.name
    page.run("document.querySelectorAll('#recent button')[1].focus()")
    page.press("Enter", 13)
    page.wait(f"document.getElementById('name').textContent === '{BAD.name}'")
    assert page.run("document.activeElement.getAttribute('aria-current')") == "true"
    page.run("document.activeElement.blur(); document.body.focus()")
    reached = []
    for _ in range(8):
        page.press("Tab", 9)
        reached.append(page.run("document.activeElement.id"))
    assert {"model", "files", "opacity", "outlines"} <= set(reached)


def test_the_model_can_be_chosen_and_the_nfa_decides(page, service):
    expected = service.predict(BAD, query="?model=uflow").json["results"][0]
    page.run("document.getElementById('model').value = 'uflow'")
    judge(page, BAD)
    assert "log NFA" in text(page, "facts")
    assert expected["verdict"] in text(page, "verdict")


def test_errors_are_said_in_words(page, tmp_path):
    (tmp_path / "letter.png").write_bytes(b"no picture")
    page.choose("#files", tmp_path / "letter.png")
    page.wait("!document.getElementById('error').hidden")
    assert text(page, "error").startswith("letter.png: cannot read this image")
    assert text(page, "error").count("letter.png") == 1
    judge(page, GOOD)
    assert page.run("document.getElementById('error').hidden")


def test_a_file_can_be_dropped_and_a_format_be_unknown_to_browsers(page, tmp_path):
    data = list(picture(suffix=".tiff"))
    page.run(
        "(() => { const all = new DataTransfer();"
        f"all.items.add(new File([new Uint8Array({data})], 'scan.tiff'));"
        "document.body.dispatchEvent(new DragEvent('drop', {bubbles: true, cancelable: true,"
        "dataTransfer: all})); })()"
    )
    page.wait("recent.length === 1 && !document.getElementById('unseen').hidden")
    assert text(page, "name") == "scan.tiff"
    assert box(page, "heat")[2] > 100


def test_the_documentation_is_shown(page, service, shots):
    page.open(f"http://127.0.0.1:{service.port}/docs")
    page.wait("document.querySelectorAll('section').length === 4")
    shown = page.run("document.body.innerText")
    assert f"curl -F images=@photo.png http://127.0.0.1:{service.port}/predict" in shown
    assert "POST /predict" in shown
    page.screenshot(shots / "docs.png")
    assert page.problems == []


def test_a_token_is_asked_for_and_a_dead_service_is_noticed(two_bundles, tmp_path):
    program = find_browser()
    assert program
    with (
        serving(tmp_path, str(two_bundles[0]), FLOWAD_TOKEN=TOKEN) as service,
        browser(program, tmp_path / "profile") as page,
    ):
        page.open(f"http://127.0.0.1:{service.port}/")
        page.wait("!document.getElementById('login').hidden")
        assert "token" in text(page, "error")
        page.run(
            f"document.getElementById('token').value = '{TOKEN}';"
            "document.getElementById('login').requestSubmit()"
        )
        page.wait("models.length === 1 && document.getElementById('login').hidden")
        judge(page, GOOD)
        service.process.kill()
        service.process.wait()
        page.choose("#files", BAD)
        page.wait("!document.getElementById('error').hidden")
        assert "does not answer" in text(page, "error")
