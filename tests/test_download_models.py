"""U-Flow's released models: what is fetched, kept and refused, against a server of our own."""

import contextlib
import http.server
import io
import re
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import download_models
from tests.small_run import script
from utils import download
from utils.errors import UserError
from utils.names import CATEGORIES

PAGE = b"\xef\xbb\xbf\n <!DOCTYPE html><html><body>Access denied</body></html>"


def model(text: str) -> bytes:
    """Return what PyTorch would store: a zip archive."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), text * 100)  # no date
    return data.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serve under the first part of the path, which says what goes wrong."""

    asked: list[str] = []  # noqa: RUF012 - emptied by the fixture

    def do_GET(self) -> None:
        self.asked.append(self.path)
        kind, _, file = self.path[1:].partition("/")
        body, status, length, typed = model(file), 200, True, "application/octet-stream"
        if kind == "page":
            body = PAGE
        elif kind == "typed":
            body, typed = b"quota exceeded", "text/html; charset=utf-8"
        elif kind == "text":
            body = b"model of " + file.encode()
        elif kind == "legacy":
            body = b"\x80\x02}q\x00."
        elif kind == "half":  # the connection closes, and nothing said how much was to come
            body, length = body[: len(body) // 2], False
        elif kind == "reset":
            self.connection.close()
            return
        elif kind == "partly" and "pill" in file:
            status = 404
        elif kind.isdigit():
            status = int(kind)
        self.send_response(status)
        self.send_header("Content-Type", typed)
        if length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # of the connection that "reset" closed
            super().handle()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("FLOWAD_MODELS_URL", raising=False)
    monkeypatch.setattr(download, "PAUSES", (0, 0))
    Handler.asked.clear()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def fetch(folder: Path, base: str | None, *more: str) -> int:
    address = ["--base-url", base] if base else []
    return download_models.main(["--models_dir", str(folder), *address, *more])


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_all_models(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch(tmp_path / "models", f"{server}/good/") == 0  # with or without the slash
    expected = sorted(f"{kind}/{c}.ckpt" for kind in ("auc", "pro", "miou") for c in CATEGORIES)
    assert files(tmp_path / "models") == expected
    for file in expected:
        assert (tmp_path / "models" / file).read_bytes() == model(file)
    out = capsys.readouterr().out
    assert "covered by the AGPL-3.0 licence" in out
    assert f"45 models fetched, 0 were there already, in {tmp_path / 'models'}" in out


def test_some_categories_by_any_spelling(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWAD_MODELS_URL", f"{server}/good")
    assert fetch(tmp_path, None, "-cat", "metal nut", "Metal-Nut", "carpet") == 0
    assert files(tmp_path) == sorted(
        f"{kind}/{c}.ckpt" for kind in ("auc", "pro", "miou") for c in ("carpet", "metal_nut")
    )
    assert len(Handler.asked) == 6


def test_an_unknown_category(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"-cat carpt: no category .* did you mean carpet\?"):
        fetch(tmp_path, "http://x", "-cat", "carpt")
    with pytest.raises(UserError, match=r"-cat 123: .*one of carpet, grid, .*, zipper\?"):
        fetch(tmp_path, "http://x", "-cat", "123")


@pytest.mark.parametrize(
    ("flags", "again"),
    [
        ([], False),
        (["-overwrite"], True),
        (["-overwrite", "true"], True),
        (["--force-overwrite", "yes"], True),
        (["-overwrite", "1"], True),
        (["-overwrite", "false"], False),
        (["-overwrite", "no"], False),
        (["--force-overwrite=0"], False),
    ],
)
def test_overwriting(
    server: str,
    tmp_path: Path,
    flags: list[str],
    again: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = tmp_path / "auc/pill.ckpt"
    own.parent.mkdir()
    own.write_bytes(b"my own")
    assert fetch(tmp_path, f"{server}/good", "-cat", "pill", *flags) == 0
    assert own.read_bytes() == (model("auc/pill.ckpt") if again else b"my own")
    assert len(Handler.asked) == (3 if again else 2)
    said = "3 models fetched, 0 were" if again else "2 models fetched, 1 were"
    assert said in capsys.readouterr().out


def test_a_flag_that_is_neither_true_nor_false(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        fetch(tmp_path, "http://x", "-overwrite", "maybe")
    assert caught.value.code == 2
    assert "'maybe' is not one of true, false" in capsys.readouterr().err


def test_without_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLOWAD_MODELS_URL", raising=False)
    with pytest.raises(UserError) as caught:
        fetch(tmp_path / "models", None)
    message = str(caught.value)
    assert "linked from U-Flow's README" in message
    assert f"{tmp_path / 'models'}, keeping the sub-folders auc, pro, miou" in message
    assert "--base-url" in message
    assert "\n" not in message
    assert not (tmp_path / "models").exists()


def test_with_everything_there_no_address_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FLOWAD_MODELS_URL", raising=False)
    for kind in download_models.KINDS:
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "pill.ckpt").touch()
    assert fetch(tmp_path, None, "-cat", "pill") == 0
    assert "0 models fetched, 3 were there already" in capsys.readouterr().out


@pytest.mark.parametrize("address", ["models.example.com", "ftp://x/y", "file:///etc", "http://"])
def test_addresses_of_other_kinds(tmp_path: Path, address: str) -> None:
    with pytest.raises(UserError, match=r"must begin with http:// or https://"):
        fetch(tmp_path, address)


DRIVE = r"auc/pill\.ckpt: .*; after too many downloads wait about 24 hours, or fetch the folder by"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("page", DRIVE),
        ("typed", DRIVE),
        ("403", DRIVE),
        ("429", DRIVE),
        ("text", "what was received is no PyTorch checkpoint"),
        ("half", "what was received is no PyTorch checkpoint, or only a part of one"),
        ("cut", r"connection lost after \d+ of \d+ bytes"),
        ("reset", r"auc/pill\.ckpt: cannot be fetched \("),
        ("500", "HTTP Error 500"),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_failures(server: str, tmp_path: Path, kind: str, said: str, there: bool) -> None:
    """One line, at the first of them; nothing half appears, and what was there stays.

    A server that may be better in a moment is asked again.
    """
    target = tmp_path / "auc/pill.ckpt"
    target.parent.mkdir()
    if there:
        target.write_bytes(b"mine")
    with pytest.raises(UserError, match=said) as caught:
        fetch(tmp_path, f"{server}/{kind}", "-cat", "pill", "-overwrite")
    assert "\n" not in str(caught.value)
    assert f"{server}/{kind}/auc/pill.ckpt" in str(caught.value)
    assert len(Handler.asked) == (3 if kind in ("cut", "reset", "500") else 1)
    assert files(tmp_path) == (["auc/pill.ckpt"] if there else [])
    if there:
        assert target.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9", "http://[::1", "http://a b/", "http://é/"]
)
def test_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UserError, match=r"auc/pill\.ckpt: cannot be fetched \(.+\)$") as caught:
        fetch(tmp_path, address, "-cat", "pill")
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == []


def test_models_that_the_server_lacks(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are fetched all the same."""
    with pytest.raises(UserError, match=r"has no auc/pill\.ckpt, pro/pill\.ckpt, miou/pill\.ckpt;"):
        fetch(tmp_path, f"{server}/partly", "-cat", "pill", "carpet")
    assert files(tmp_path) == ["auc/carpet.ckpt", "miou/carpet.ckpt", "pro/carpet.ckpt"]
    assert "3 models fetched" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"pro/pill\.ckpt and 3 more; fetch by hand"):
        fetch(tmp_path, f"{server}/404", "-cat", "pill", "tile")


def test_checkpoints_from_before_zip(server: str, tmp_path: Path) -> None:
    assert fetch(tmp_path, f"{server}/legacy", "-cat", "pill") == 0


@pytest.mark.parametrize("kind", ["good", "legacy"])
def test_size_limit(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(download_models, "LARGEST", 5)
    with pytest.raises(UserError, match=r"\d+ bytes are more than the 5 that"):
        fetch(tmp_path, f"{server}/{kind}", "-cat", "pill")
    assert files(tmp_path) == []


def test_size_limit_where_the_server_does_not_say(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_models, "LARGEST", 5)
    with pytest.raises(UserError, match="bytes are more than the 5 that such a file may have"):
        fetch(tmp_path, f"{server}/half", "-cat", "pill")
    assert files(tmp_path) == []


def test_the_other_name_of_miou(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(tmp_path, f"{server}/good", "-cat", "pill")
    assert "iou:" not in capsys.readouterr().out
    (tmp_path / "iou").mkdir()
    fetch(tmp_path, f"{server}/good", "-cat", "pill")
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "iou:" in text]
    assert re.match(rf"{tmp_path / 'iou'}: U-Flow's other name of miou; rename it", line)


@pytest.mark.slow
def test_the_script(tmp_path: Path) -> None:
    done = script("download_models.py", "--models_dir", str(tmp_path), FLOWAD_MODELS_URL="")
    assert done.returncode == 2
    assert done.stderr.startswith("error: the released models lie on a cloud drive")
    assert len(done.stderr.splitlines()) == 1
