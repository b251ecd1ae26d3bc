"""Downloads: continued where they stopped, whole or not at all, and one line for every failure."""

import errno
import json
import shutil
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest

from tests.web import Site, serve
from utils import download
from utils.download import Denied, Missing, NoRoom, fetch, require_room
from utils.errors import UserError
from utils.partial import alone

BODY = np.random.default_rng(0).bytes(400_000)
OTHER = BODY[::-1]
HALF = 200_000


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "PAUSES", (0, 0))
    with serve() as site:
        site.files["a.bin"] = BODY
        yield site


def is_body(path: Path) -> None:
    if path.read_bytes() != BODY:
        raise UserError("the file received is another one")


def anything(path: Path) -> None:
    assert path.stat().st_size


def get(site: Site, folder: Path, check: Any = is_body, name: str = "a.bin", **more: Any) -> Path:
    fetch(f"{site.address}/{name}", folder / "a.bin", 10**6, check, **more)
    return folder / "a.bin"


def fail(site: Site, folder: Path, **more: Any) -> str:
    """Return the line that a failing download ends with."""
    with pytest.raises(UserError) as caught:
        get(site, folder, **more)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{site.address}/{more.get('name', 'a.bin')}: ")
    return message


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


PARTS = ["a.bin.part", "a.bin.part.json"]


def test_a_file_arrives_and_nothing_else_stays(site: Site, tmp_path: Path) -> None:
    path = get(site, tmp_path / "new")
    assert path.read_bytes() == BODY
    assert names(path.parent) == ["a.bin"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("versions", ["etag", "date"])
def test_a_dropped_connection_is_continued(site: Site, tmp_path: Path, versions: str) -> None:
    site.versions, site.drops = versions, [HALF]
    get(site, tmp_path)
    assert site.asked == ["a.bin", f"a.bin from {HALF}"]
    assert site.sent == len(BODY)


@pytest.mark.parametrize("versions", ["none", "weak"])
def test_without_a_version_it_begins_anew(site: Site, tmp_path: Path, versions: str) -> None:
    """What came of another version would otherwise be joined to this one."""
    site.versions, site.drops = versions, [HALF]
    get(site, tmp_path, anything)
    assert site.asked == ["a.bin", "a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_a_known_hash_stands_for_a_version(site: Site, tmp_path: Path) -> None:
    site.versions, site.drops = "none", [HALF]
    get(site, tmp_path, verified=True)
    assert site.asked == ["a.bin", f"a.bin from {HALF}"]


def test_the_next_call_continues(site: Site, tmp_path: Path) -> None:
    site.drops = [50_000] * 3
    assert "connection lost after 150000 of 400000 bytes" in fail(site, tmp_path)
    assert names(tmp_path) == PARTS
    get(site, tmp_path)
    assert site.asked[-1] == "a.bin from 150000"
    assert site.sent == len(BODY)
    assert names(tmp_path) == ["a.bin"]


def test_progress_earns_more_tries(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.drops = [50_000] * 20
    monkeypatch.setattr(download, "PROGRESS", 50_000)
    get(site, tmp_path)
    assert len(site.asked) == 8


def test_a_server_that_always_drops_is_left(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PROGRESS", 1000)
    site.drops, site.ranges = [HALF] * 99, False
    assert f"connection lost after {HALF} of 400000 bytes" in fail(site, tmp_path)
    assert len(site.asked) == 3


def test_pauses_grow(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(download, "PAUSES", (1.0, 3.0, 10.0))
    monkeypatch.setattr(time, "sleep", slept.append)
    site.statuses = [503] * 4
    assert "HTTP Error 503" in fail(site, tmp_path)
    assert [seconds for seconds in slept if seconds] == [1.0, 3.0, 10.0]
    assert "HTTP Error 503: Service Unavailable; next try in 3 s" in capsys.readouterr().err


def test_a_server_that_ignores_ranges(site: Site, tmp_path: Path) -> None:
    site.drops, site.ranges = [HALF], False
    get(site, tmp_path)
    assert site.sent == len(BODY) + HALF


@pytest.mark.parametrize("versions", ["etag", "date"])
def test_a_file_that_changes_in_between(site: Site, tmp_path: Path, versions: str) -> None:
    site.versions, site.drops = versions, [HALF, 0, 0]
    fail(site, tmp_path)
    site.files["a.bin"], site.drops = OTHER[:-1000] + b"\x01", []
    path = get(site, tmp_path, anything)
    assert path.read_bytes() == site.files["a.bin"]


def test_a_file_that_becomes_shorter(site: Site, tmp_path: Path) -> None:
    site.versions, site.drops = "none", [HALF, 0, 0]
    fail(site, tmp_path, verified=True)
    site.files["a.bin"] = OTHER[:1000]
    assert get(site, tmp_path, anything, verified=True).read_bytes() == OTHER[:1000]
    assert site.asked[-2:] == [f"a.bin from {HALF}", "a.bin"]


def test_a_file_of_another_size_is_not_joined(site: Site, tmp_path: Path) -> None:
    """The server ignores If-Range, or got none: the size alone tells that the file changed."""
    site.versions, site.drops = "none", [HALF, 0, 0]
    fail(site, tmp_path, verified=True)
    site.files["a.bin"] = OTHER + b"more"
    path = get(site, tmp_path, anything, verified=True)
    assert path.read_bytes() == OTHER + b"more"


def test_a_server_that_sends_another_part(site: Site, tmp_path: Path) -> None:
    site.drops, site.wrong_range = [HALF], True
    get(site, tmp_path)
    assert site.asked == ["a.bin", f"a.bin from {HALF}", "a.bin"]


def test_another_address_does_not_continue(site: Site, tmp_path: Path) -> None:
    site.drops = [HALF, 0, 0]
    fail(site, tmp_path)
    site.files["b.bin"] = OTHER
    assert get(site, tmp_path, anything, name="b.bin").read_bytes() == OTHER


def test_an_address_without_the_file_leaves_what_came_from_another(
    site: Site, tmp_path: Path
) -> None:
    site.drops = [HALF, 0, 0]
    fail(site, tmp_path)
    assert "HTTP Error 404" in fail(site, tmp_path, name="gone")
    get(site, tmp_path)
    assert site.asked[-1] == f"a.bin from {HALF}"


@pytest.mark.parametrize(
    "note", ["", "[]", "{}", '{"url": 1}', '{"url": "URL", "version": 3, "size": "x"}']
)
def test_a_damaged_note(site: Site, tmp_path: Path, note: str) -> None:
    (tmp_path / "a.bin.part").write_bytes(OTHER)
    url = f"{site.address}/a.bin"
    (tmp_path / "a.bin.part.json").write_text(note.replace("URL", url))
    get(site, tmp_path)
    assert site.asked == ["a.bin"]
    assert names(tmp_path) == ["a.bin"]


def test_killed_after_the_last_byte(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(BODY)
    note = {"url": f"{site.address}/a.bin", "version": '"x"', "size": len(BODY)}
    (tmp_path / "a.bin.part.json").write_text(json.dumps(note))
    get(site, tmp_path)
    assert site.asked == []


def test_a_wrong_file_is_removed(site: Site, tmp_path: Path) -> None:
    site.files["a.bin"] = OTHER
    assert fail(site, tmp_path).endswith("a.bin: the file received is another one")
    assert names(tmp_path) == []
    (tmp_path / "a.bin").write_bytes(b"mine")
    fail(site, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == b"mine"
    assert names(tmp_path) == ["a.bin"]


def test_a_mixture_is_removed_and_begun_anew_by_the_next_call(site: Site, tmp_path: Path) -> None:
    site.versions, site.drops = "none", [HALF, 0, 0]
    fail(site, tmp_path, verified=True)
    site.files["a.bin"] = OTHER
    assert "another one" in fail(site, tmp_path, verified=True)
    assert names(tmp_path) == []
    site.files["a.bin"] = BODY
    get(site, tmp_path, verified=True)


def test_web_pages(site: Site, tmp_path: Path) -> None:
    site.drops = [HALF, 0, 0]
    fail(site, tmp_path)
    site.content_type = "text/html; charset=utf-8"
    with pytest.raises(Denied, match="sent a web page in place of the file"):
        get(site, tmp_path)
    assert names(tmp_path) == PARTS  # a hotel's network; at home it goes on
    site.content_type = "application/octet-stream"
    site.files["b.bin"] = b"\n<!DOCTYPE html>"
    with pytest.raises(Denied, match="sent a web page"):
        get(site, tmp_path, name="b.bin")
    get(site, tmp_path)
    assert site.asked[-1] == f"a.bin from {HALF}"


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, Missing), (410, Missing), (403, Denied), (401, Denied), (429, Denied)],
)
def test_refusals_are_not_tried_again(
    site: Site, tmp_path: Path, status: int, kind: type[UserError]
) -> None:
    site.statuses = [status]
    with pytest.raises(kind, match=f"HTTP Error {status}"):
        get(site, tmp_path)
    assert len(site.asked) == 1
    assert names(tmp_path) == []


def test_a_length_that_is_too_long(site: Site, tmp_path: Path) -> None:
    site.extra_length = 10
    assert "connection lost after" in fail(site, tmp_path)
    assert len(site.asked) == 3


def test_a_length_that_is_too_short(site: Site, tmp_path: Path) -> None:
    site.extra_length = -10
    assert fail(site, tmp_path).endswith("the file received is another one")


def test_a_slow_server(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow is fine, silence is not."""
    monkeypatch.setattr(download, "TIMEOUT", 0.4)
    site.seconds = 0.01
    get(site, tmp_path / "slow")
    site.seconds = 1.0
    assert "connection lost after 0 of 400000 bytes" in fail(site, tmp_path / "silent")


def test_redirects(site: Site, tmp_path: Path) -> None:
    with serve() as other:
        other.files["b.bin"] = BODY
        other.drops = [HALF]
        site.redirects = {
            "there": f"{other.address}/b.bin",
            "file": "file:///etc/passwd",
            "ftp": "ftp://127.0.0.1/a.bin",
            "loop": f"{site.address}/loop",
        }
        get(site, tmp_path, name="there")
        assert other.asked == ["b.bin", f"b.bin from {HALF}"]
    for name in ("file", "ftp", "loop"):
        fail(site, tmp_path / name, name=name)
        assert names(tmp_path / name) == []


@pytest.mark.parametrize(
    ("before", "after", "followed"),
    [
        ("http://a/x", "https://b/y", True),
        ("https://a/x", "https://b/y", True),
        ("http://a/x", "http://b/y", True),
        ("https://a/x", "http://a/x", False),
        ("https://a/x", "file:///x", False),
        ("https://a/x", "data:,x", False),
    ],
)
def test_no_redirect_to_less_protection(before: str, after: str, followed: bool) -> None:
    request = urllib.request.Request(before)
    arguments: Any = (request, None, 302, "Found", {}, after)
    if followed:
        new = download._Redirects().redirect_request(*arguments)
        assert new is not None
        assert new.full_url == after
    else:
        with pytest.raises(UserError, match="which is not followed"):
            download._Redirects().redirect_request(*arguments)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "x/y"])
def test_other_addresses(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="unknown url type"):
        fetch(url, tmp_path / "a.bin", 10**6, anything)
    assert names(tmp_path) == []


def test_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without a certificate that anybody trusts: one line, and no second try."""
    asked = []

    def refuse(*_: object) -> None:
        asked.append(1)
        raise URLError(ssl.SSLCertVerificationError(1, "certificate verify failed\n"))

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
    with pytest.raises(UserError, match=r"cannot be fetched \(.*certificate verify failed") as e:
        fetch("https://example.com/a.bin", tmp_path / "a.bin", 10**6, anything)
    assert "\n" not in str(e.value)
    assert asked == [1]


def test_the_network_goes_in_the_middle(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any byte a closed network ends it at once; after some it is waited for."""
    site.drops = [HALF]
    opened, tries = urllib.request.OpenerDirector.open, []

    def vanish(*args: Any) -> Any:
        tries.append(1)
        if len(tries) in (2, 5):
            raise URLError(OSError(errno.ENETUNREACH, "Network is unreachable"))
        return opened(*args)

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", vanish)
    get(site, tmp_path)
    assert len(tries) == 3
    tries.append(1)
    with pytest.raises(UserError, match=r"cannot be fetched \(\[Errno \d+\] Network is unreach"):
        get(site, tmp_path)
    assert len(tries) == 5


def test_too_large(site: Site, tmp_path: Path) -> None:
    for says_length in (True, False):
        site.says_length = says_length
        with pytest.raises(UserError, match=r"\d+ bytes are more than the 1000 that"):
            fetch(f"{site.address}/a.bin", tmp_path / "a.bin", 1000, anything)
        assert names(tmp_path) == []


def test_a_full_disk(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    get(site, tmp_path, unpacked=1.4)
    with pytest.raises(NoRoom, match=r"0\.00 GB are needed there and 0\.00 GB are free; make room"):
        get(site, tmp_path, unpacked=1.6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * 10**9))
    with pytest.raises(NoRoom, match=r"x: 3\.50 GB are needed there and 2\.00 GB are free"):
        require_room(Path("x"), 3.5e9)


def test_a_disk_that_fills_up(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(download, "_write", full)
        with pytest.raises(NoRoom, match=r"part: disk full; make room for 0\.00 GB and try again"):
            get(site, tmp_path)
    get(site, tmp_path)


def test_two_processes_do_not_mix(site: Site, tmp_path: Path) -> None:
    """The second one waits, and takes what the first one has fetched."""
    site.seconds = 0.005
    threads = [threading.Thread(target=get, args=(site, tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert site.asked == ["a.bin"]
    assert names(tmp_path) == ["a.bin"]


def test_a_lock_on_a_file_that_was_renamed_does_not_count(tmp_path: Path) -> None:
    path, order = tmp_path / "a.part", []

    def second() -> None:
        with alone(path) as waited:
            order.append(("second", waited, path.exists()))

    with alone(path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        path.rename(tmp_path / "a")
        order.append(("first", False, False))
    thread.join()
    assert order == [("first", False, False), ("second", True, True)]


def test_without_locks(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, and on file systems that have none."""
    from utils import partial

    monkeypatch.setattr(partial, "fcntl", None)
    get(site, tmp_path / "windows")
    assert names(tmp_path / "windows") == ["a.bin"]
    monkeypatch.undo()
    if partial.fcntl is None:
        return

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(partial.fcntl, "flock", refuse)
    get(site, tmp_path / "remote")
    assert names(tmp_path / "remote") == ["a.bin"]
