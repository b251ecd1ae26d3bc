"""The page of main.gradio.py: what it judges and says, and the page itself where Gradio is here."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.deploy.browser import browser, find_browser
from tests.small_run import REPO, script
from utils.errors import UserError

SCRIPT = "main.gradio.py"
EXAMPLES = ("images/bottle_good.png", "images/bottle_bad.png")
HAS_GRADIO = importlib.util.find_spec("gradio") is not None


@pytest.fixture(scope="module")
def app() -> ModuleType:
    """Return the script as a module; it needs no Gradio until its page is built."""
    spec = importlib.util.spec_from_file_location("main_gradio", REPO / SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def inspector(app: ModuleType):
    return app.Inspector(REPO / "pretrained/bottle")


def test_the_model_that_comes_with_it_is_right_about_the_examples(app, inspector) -> None:
    for name, verdict in zip(EXAMPLES, ("Normal", "Anomaly"), strict=True):
        shown, result = inspector(REPO / name)
        assert result["verdict"] == verdict
        assert max(shown.picture.shape[:2]) <= app.SIDE
        words = inspector.verdict(result)
        assert verdict in words
        assert f"{result['score']:.4g}" in words


def test_the_slider_draws_the_same_result_again(inspector) -> None:
    shown, _ = inspector(REPO / EXAMPLES[1])
    bare, half, full = (inspector.drawn(shown, percent) for percent in (0, 50, 100))
    corner = np.s_[:40, :40]
    assert shown.defective.any()
    assert not shown.defective[corner].any()
    np.testing.assert_array_equal(bare[corner], shown.picture[corner])
    mean = (bare[corner].astype(int) + full[corner]) / 2
    assert np.abs(half[corner] - mean).max() <= 1
    assert inspector.drawn(None, 50) is None


def test_large_pictures_are_shown_smaller_and_huge_ones_refused(
    app, inspector, tmp_path, monkeypatch
) -> None:
    wide = tmp_path / "wide.png"
    with Image.open(REPO / EXAMPLES[0]) as image:
        image.convert("RGB").resize((2400, 1200)).save(wide)
    shown, _ = inspector(wide)
    assert shown.picture.shape == (app.SIDE // 2, app.SIDE, 3)
    assert inspector.drawn(shown, 50).shape == shown.picture.shape
    monkeypatch.setattr(app, "MOST_PIXELS", 1_000_000)
    with pytest.raises(UserError, match=r"wide\.png"):
        inspector(wide)
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"no\.png"):
        inspector(tmp_path / "no.png")


def test_which_bundle_is_taken(app, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(app, "ROOT", tmp_path)
    monkeypatch.delenv(app.BUNDLE, raising=False)
    with pytest.raises(UserError, match=rf"export_model\.py, or name its folder in {app.BUNDLE}$"):
        app.bundle_folder()
    for place in reversed(app.PLACES):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / app.SIDECAR).touch()
        assert app.bundle_folder() == tmp_path / place
    monkeypatch.setenv(app.BUNDLE, str(tmp_path / "own"))
    with pytest.raises(UserError, match="own"):
        app.bundle_folder()


def test_options_that_a_version_does_not_know_are_left_out(app) -> None:
    def launch(*, theme: str = "") -> None:
        pass

    assert app.accepted(launch, {"theme": "a", "css": "b"}) == {"theme": "a"}


@pytest.mark.skipif(HAS_GRADIO, reason="Gradio is installed")
def test_gradio_is_named_where_it_is_missing() -> None:
    done = script(SCRIPT)
    assert done.returncode == 2
    assert done.stderr == (
        "error: gradio is not installed; pip install -r requirements-gradio.txt\n"
    )


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """Start the page in another working folder; return its address."""
    pytest.importorskip("gradio", reason="requirements-gradio.txt is not installed")
    folder, port = tmp_path_factory.mktemp("gradio"), free_port()
    environment = {
        **os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_TEMP_DIR": str(folder / "cache"), "GRADIO_ANALYTICS_ENABLED": "False",
    }  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(REPO / SCRIPT)], cwd=folder, env=environment,
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        _wait_for(f"http://127.0.0.1:{port}/", process, folder / "log")
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(20)


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def _wait_for(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(log.read_text())


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="needs Chromium")
def test_the_page_judges_a_picture(address: str, tmp_path: Path) -> None:
    program = find_browser()
    assert program
    with browser(program, tmp_path / "profile") as page:
        page.look(1200, 900, "light")
        page.open(address)
        page.wait("document.querySelector('input[type=file]')")
        for name, words in zip(EXAMPLES, ("良品 Normal", "有缺陷 Anomaly"), strict=True):
            if page.run("Boolean(document.querySelector('button[aria-label=\"Clear\"],"
                        "button[title=\"Clear\"]'))"):  # fmt: skip
                page.run("document.querySelector('button[aria-label=\"Clear\"],"
                         "button[title=\"Clear\"]').click()")  # fmt: skip
            page.wait("document.querySelector('input[type=file]')")
            page.choose("input[type=file]", Path(shutil.copy(REPO / name, tmp_path)))
            page.wait(f"document.body.innerText.includes('{words}')")
        foreign = [url for url in page.requests if not url.startswith(address)]
        assert [url for url in foreign if not re.match(r"https://cdnjs\.", url)] == []
