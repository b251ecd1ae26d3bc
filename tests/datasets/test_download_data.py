"""Data sets: fetched over bad connections, unpacked whatever wraps them, refused if hostile."""

import contextlib
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from datasets import download as command
from datasets.folder import find_categories, find_category
from datasets.sources import DATA_SETS, Source
from tests.web import Site, serve
from utils import archive as archive_module
from utils import download
from utils.errors import UserError
from utils.names import CATEGORIES

REPO = Path(__file__).resolve().parents[2]
Files = Mapping[str, bytes]


def picture(seed: int, size: int = 8) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def mvtec(*names: str, top: str = "", good: str = "good", size: int = 8) -> dict[str, bytes]:
    """Return the files of categories with two training images, and one good and one bad."""
    files = {f"{top}readme.txt": b"read me", f"{top}license.txt": b"a licence"}
    for number, name in enumerate(names):
        files |= {
            f"{top}{name}/train/{good}/000.png": picture(number, size),
            f"{top}{name}/train/{good}/001.png": picture(number + 100, size),
            f"{top}{name}/test/{good}/000.png": picture(number + 200, size),
            f"{top}{name}/test/ko/000.png": picture(number + 300, size),
            f"{top}{name}/ground_truth/ko/000_mask.png": picture(number + 400, size),
        }
    return files


def packed(files: Files, suffix: str) -> bytes:
    data = io.BytesIO()
    if suffix == "zip":
        with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=data, mode=f"w:{suffix.rpartition('.')[2]}") as tar:  # type: ignore[call-overload]
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def write(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed(files, path.name.partition(".")[2]))
    return path


def run(*arguments: object) -> int:
    return command.main([str(argument) for argument in arguments])


def fail(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("FLOWAD_DATA_URLS", raising=False)
    monkeypatch.setattr(download, "PAUSES", (0, 0))


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as site:
        yield site


@pytest.fixture
def to(tmp_path: Path) -> Path:
    return tmp_path / "data"


def addresses(site: Site, folder: Path, **entries: Any) -> Path:
    """Write a file of addresses at `site`; an entry is a file's name or what YAML holds."""
    plain = {
        name: {"url": f"{site.address}/{entry}"} if isinstance(entry, str) else entry
        for name, entry in entries.items()
    }
    path = folder / "urls.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


@pytest.mark.parametrize("form", ["m.tar.xz", "m.zip", "m.tar.gz", "m.tar"])
@pytest.mark.parametrize("top", ["", "mvtec_anomaly_detection/", "a/b/", "./"])
def test_whatever_wraps_the_categories(
    tmp_path: Path, to: Path, form: str, top: str, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = write(tmp_path / form, mvtec("bottle", "metal_nut", top=top))
    assert run("mvtec", "--archive", archive, "--to", to) == 0
    assert names(to) == ["bottle", "license.txt", "metal_nut", "readme.txt"]
    assert find_categories(to) == ["bottle", "metal_nut"]
    category = find_category(to, "bottle")
    assert (len(category.train), len(category.test)) == (2, 2)
    assert category.test[1].masks == (to / "bottle/ground_truth/ko/000_mask.png",)
    assert category.train[0].path.read_bytes() == picture(0)
    assert archive.exists()
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "MVTec AD: licence CC BY-NC-SA 4.0: no commercial use; "
        "https://www.mvtec.com/company/research/datasets/mvtec-ad",
        f"{to}: bottle, metal_nut unpacked",
    ]


def test_the_folder_finder_names_a_command_that_works(tmp_path: Path, to: Path) -> None:
    """What --data says of a folder that holds only an archive, as AI Studio attaches it."""
    write(to / "data12345/mvtec.zip", mvtec("bottle", top="mvtec/"))
    with pytest.raises(UserError) as caught:
        find_category(to, "bottle")
    _, _, advice = str(caught.value).partition("python -m datasets.download ")
    assert run(*advice.replace("'", "").split()) == 0
    assert find_category(to, "bottle").train


def test_an_archive_of_one_category_without_its_folder(tmp_path: Path, to: Path) -> None:
    inside = {name.removeprefix("x/"): data for name, data in mvtec("x").items()}
    run("mvtec", "--archive", write(tmp_path / "bottle.tar.xz", inside), "--to", to)
    run("mvtec", "--archive", write(tmp_path / "n.zip", inside), "--to", to, "-cat", "Metal Nut")
    run("mvtec", "--archive", write(tmp_path / "o.zip", mvtec("v2")), "--to", to, "-cat", "pill")
    run("mvtec", "--archive", write(tmp_path / "own.zip", mvtec("Tile", "ours")), "--to", to)
    assert find_categories(to) == ["tile", "bottle", "metal_nut", "pill", "ours"]


def test_strays_of_macos_and_hidden_files(tmp_path: Path, to: Path) -> None:
    strays = {"__MACOSX/top/._x.png": b"", "top/.DS_Store": b"", "top/bottle/test/ko/._0.png": b""}
    archive = write(tmp_path / "m.zip", {**mvtec("bottle", top="top/"), **strays})
    run("mvtec", "--archive", archive, "--to", to)
    assert find_categories(to) == ["bottle"]
    assert not [path for path in to.rglob("*") if path.name.startswith(".")]


def test_other_data_sets(tmp_path: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    btad = write(tmp_path / "btad.zip", mvtec("01", "03", top="BTech_Dataset_transformed/",
                                              good="ok"))  # fmt: skip
    run("btad", "--archive", btad)
    assert find_categories(to / "btad") == ["01", "03"]
    assert len(find_category(to / "btad", "01").test) == 2
    rows = ["object,split,label,image,mask"]
    files: dict[str, bytes] = {}
    for kind, split, label in (("Normal", "train", "normal"), ("Anomaly", "test", "anomaly")):
        for number in range(2):
            image = f"candle/Data/Images/{kind}/{number}.JPG"
            mask = f"candle/Data/Masks/Anomaly/{number}.png" if label == "anomaly" else ""
            rows.append(f"candle,{split},{label},{image},{mask}")
            files |= {name: picture(1) for name in (image, mask) if name}
    files["split_csv/1cls.csv"] = "\n".join(rows).encode()
    files["LICENSE-DATASET"] = b"x"
    run("visa", "--archive", write(tmp_path / "visa.tar", files))
    assert names(to / "visa") == ["LICENSE-DATASET", "candle", "split_csv"]
    assert len(find_category(to / "visa", "candle").test) == 2
    second = {
        f"can/{part}/000.png": picture(2)
        for part in ("train/good", "validation/good", "test_public/good", "test_public/bad")
    }
    archive = write(
        tmp_path / "mvtec_ad_2.tar.gz", {f"mvtec_ad_2/{k}": v for k, v in second.items()}
    )
    run("mvtec_ad_2", "--archive", archive)
    assert len(find_category(to / "mvtec2", "can").holdout) == 1
    run("mpdd", "--archive", write(tmp_path / "mpdd.zip", mvtec("tubes", top="MPDD/")))
    assert find_categories(to / "mpdd") == ["tubes"]
    tiles = {f"tiles-master/MT_{kind}/Imgs/0.jpg": picture(3) for kind in ("Free", "Crack")}
    run("mtd", "--archive", write(tmp_path / "mtd.zip", tiles))
    assert find_categories(to / "mtd") == ["tiles-master"]


@pytest.mark.parametrize("data_set", ["mpdd", "mtd", "kolektor"])
def test_data_sets_without_an_address(to: Path, data_set: str) -> None:
    message = fail(data_set, "--to", to)
    assert (
        f"by hand, then run python -m datasets.download {data_set} --to {to} --archive" in message
    )
    assert not to.exists()


def test_what_is_there_is_left_alone(
    tmp_path: Path, to: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = to / "bottle/train/good/own.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    archive = write(tmp_path / "m.zip", mvtec("bottle", "cable"))
    run("mvtec", "--archive", archive, "--to", to)
    assert (names(to / "bottle/train/good"), names(to / "cable")) == (
        ["own.png"], ["ground_truth", "test", "train"],
    )  # fmt: skip
    left = f"{to / 'bottle'}: there already and left alone; --overwrite replaces"
    assert left in capsys.readouterr().out
    run("mvtec", "--archive", archive, "--to", to, "--category", "bottle")
    assert capsys.readouterr().out.splitlines() == [left]
    run("mvtec", "--archive", archive, "--to", to, "--overwrite", "-cat", "bottle")
    assert names(to / "bottle/train/good") == ["000.png", "001.png"]
    assert names(to) == ["bottle", "cable", "license.txt", "readme.txt"]


def test_foreign_folders_and_files_stay(tmp_path: Path, to: Path) -> None:
    """Backups, own categories and own notes: not even --overwrite touches them."""
    for name in ("bottle.old", "mine"):
        (to / name / "train").mkdir(parents=True)
    (to / "readme.txt").write_text("my notes")
    archive = write(tmp_path / "m.zip", mvtec("bottle", "mine"))
    for flags in ([], ["--overwrite", "-cat", "bottle"]):
        run("mvtec", "--archive", archive, "--to", to, *flags)
        assert names(to) == ["bottle", "bottle.old", "license.txt", "mine", "readme.txt"]
        assert names(to / "mine") == ["train"]
        assert (to / "readme.txt").read_text() == "my notes"


def test_some_categories_of_an_archive(tmp_path: Path, to: Path) -> None:
    archive = write(tmp_path / "m.tar.gz", mvtec("bottle", "cable", "pill", top="mvtec/"))
    run("mvtec", "--archive", archive, "--to", to, "--category", "Pill", "cable")
    assert find_categories(to) == ["cable", "pill"]
    assert "zipper: not in what was unpacked" in fail(
        "mvtec", "--archive", archive, "--to", to, "--category", "bottle", "zipper"
    )
    assert find_categories(to) == ["bottle", "cable", "pill"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["mvtec", "-cat", "botle"],
            "--category botle: no category of MVTec AD; did you mean bott",
        ),
        (["visa", "-cat", "bottle"], "one of candle, "),
        (["mtd", "-cat", "x", "--archive", "y"], "is one category; leave --category out"),
    ],
)
def test_unknown_categories(to: Path, arguments: list[str], said: str) -> None:
    assert said in fail(*arguments, "--to", to)
    assert not to.exists()


HOSTILE: dict[str, dict[str, bytes]] = {
    "outside": {"../outside": b"x"},
    "absolute": {"/absolute": b"x"},
    "backslash": {"bottle\\..\\..\\x": b"x"},
    "collision": {"Bottle/train/good/000.png": b"x"},
}


@pytest.mark.parametrize("kind", [*HOSTILE, "link", "nothing", "no archive", "bomb"])
@pytest.mark.parametrize("form", ["m.tar.gz", "m.zip"])
def test_hostile_archives(
    tmp_path: Path, to: Path, form: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, and not one file of the archive, not even of its good part."""
    monkeypatch.setattr(archive_module, "_ALWAYS", 1 << 20)
    archive = write(tmp_path / "in" / form, {**mvtec("bottle"), **HOSTILE.get(kind, {})})
    if kind == "link" and form == "m.zip":
        with zipfile.ZipFile(archive, "a") as opened:
            info = zipfile.ZipInfo("link")
            info.external_attr = 0o120777 << 16
            opened.writestr(info, "/etc")
    elif kind == "link":
        with tarfile.open(archive, "w") as tar:
            member = tarfile.TarInfo("link")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc"
            tar.addfile(member)
    elif kind == "nothing":
        write(archive, {"folder/deeper/x.txt": b"", "other/y.txt": b""})
    elif kind == "no archive":
        archive.write_bytes(b"<html>")
    elif kind == "bomb":
        write(archive, {**mvtec("bottle"), "zeros": bytes(5 << 20)})
    assert fail("mvtec", "--archive", archive, "--to", to).startswith(f"{archive}: ")
    assert names(to) == []
    assert names(tmp_path) == ["data", "in"]


def test_a_category_on_its_own(
    site: Site, tmp_path: Path, to: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = packed(mvtec("bottle"), "tar.xz")
    site.files["b.tar.xz"] = data
    site.drops = [len(data) // 2]
    urls = addresses(site, tmp_path, bottle="b.tar.xz")
    assert run("mvtec", "--category", "bottle", "--to", to, "--urls", urls) == 0
    assert site.asked == ["b.tar.xz", f"b.tar.xz from {len(data) // 2}"]
    assert names(to) == ["bottle", "license.txt", "readme.txt"]
    digest = hashlib.sha256(data).hexdigest()
    assert f"b.tar.xz: unverified, as no sha256 is published; its sha256 is {digest}" in (
        capsys.readouterr().out
    )


def test_addresses_by_environment_and_the_archive_kept(
    site: Site, tmp_path: Path, to: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    site.files["c.zip"] = packed(mvtec("cable"), "zip")
    monkeypatch.setenv("FLOWAD_DATA_URLS", str(addresses(site, tmp_path, cable="c.zip")))
    run("mvtec", "--category", "cable", "--to", to, "--keep")
    assert "c.zip" in names(to)
    shutil.rmtree(to / "cable")
    run("mvtec", "--category", "cable", "--to", to)
    assert find_categories(to) == ["cable"]
    assert len(site.asked) == 1
    assert "c.zip: there already, and not fetched again" in capsys.readouterr().out


def test_the_whole_set(site: Site, tmp_path: Path, to: Path) -> None:
    """A hash that is known lets it go on although the server knows no versions."""
    data = packed(mvtec(*CATEGORIES, top="mvtec_anomaly_detection/"), "tar.xz")
    site.files["m.tar.xz"], site.versions, site.drops = data, "none", [1000, 0, 0]
    entry = {"url": f"{site.address}/m.tar.xz", "sha256": hashlib.sha256(data).hexdigest().upper()}
    urls = addresses(site, tmp_path, mvtec=entry)
    message = fail("mvtec", "--to", to, "--urls", urls)
    assert f"connection lost after 1000 of {len(data)} bytes" in message
    run("mvtec", "--to", to, "--urls", urls)
    assert site.asked[-1] == "m.tar.xz from 1000"
    assert find_categories(to) == list(CATEGORIES)
    site.files.clear()
    assert run("mvtec", "--to", to, "--urls", urls) == 0  # nothing to do


def test_the_second_address(site: Site, tmp_path: Path, to: Path) -> None:
    data = packed(mvtec("bottle"), "tar.xz")
    site.files |= {"good.tar.xz": data, "changed.tar.xz": data[:-1]}
    entry = {
        "url": [f"{site.address}/{name}.tar.xz" for name in ("gone", "changed", "good")],
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    assert run("mvtec", "--to", to, "--urls", addresses(site, tmp_path, mvtec=entry)) == 0
    assert site.asked == ["gone.tar.xz", "changed.tar.xz", "good.tar.xz"]
    assert find_categories(to) == ["bottle"]


def test_a_wrong_hash(site: Site, tmp_path: Path, to: Path) -> None:
    """The published hash holds for other addresses too, unless the file of addresses has one."""
    site.files["m.tar.xz"] = packed(mvtec("bottle"), "tar.xz")
    urls = addresses(site, tmp_path, mvtec="m.tar.xz")
    assert f"in place of {DATA_SETS['mvtec'].whole.sha256}" in fail(  # type: ignore[union-attr]
        "mvtec", "--to", to, "--urls", urls
    )
    assert names(to) == []
    entry = {"url": f"{site.address}/m.tar.xz", "sha256": None}
    run("mvtec", "--to", to, "--urls", addresses(site, tmp_path, mvtec=entry))
    assert find_categories(to) == ["bottle"]


def test_a_wrong_archive_in_place_is_fetched_again(
    site: Site, tmp_path: Path, to: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = site.files["m.tar.xz"] = packed(mvtec("bottle"), "tar.xz")
    entry = {"url": f"{site.address}/m.tar.xz", "sha256": hashlib.sha256(data).hexdigest()}
    to.mkdir()
    (to / "m.tar.xz").write_bytes(data[:1000])
    run("mvtec", "--to", to, "--urls", addresses(site, tmp_path, mvtec=entry))
    assert find_categories(to) == ["bottle"]
    assert "m.tar.xz: wrong content, with sha256" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [b"<html>quota</html>", b"no archive" * 50, None])
def test_a_fetched_file_that_is_bad(
    site: Site, tmp_path: Path, to: Path, bad: bytes | None
) -> None:
    """It does not stay, or it would be taken for the archive the next time."""
    hostile = packed({**mvtec("bottle"), "../x": b""}, "tar.gz")
    site.files["b.tar.gz"] = bad or hostile
    urls = addresses(site, tmp_path, bottle="b.tar.gz")
    message = fail("mvtec", "--category", "bottle", "--to", to, "--urls", urls)
    assert "web page" in message or message.endswith("; removed")
    assert names(to) == []
    site.files["b.tar.gz"] = packed(mvtec("bottle"), "tar.gz")
    run("mvtec", "--category", "bottle", "--to", to, "--urls", urls)
    assert find_categories(to) == ["bottle"]


@pytest.mark.parametrize("status", [403, 404, 503])
def test_a_server_that_refuses(site: Site, tmp_path: Path, to: Path, status: int) -> None:
    site.statuses = [status] * 9
    urls = addresses(site, tmp_path, bottle="b.tar.xz", cable="c.tar.xz")
    message = fail("mvtec", "--category", "bottle", "cable", "--to", to, "--urls", urls)
    assert f"HTTP Error {status}" in message


def test_a_closed_network(tmp_path: Path, to: Path) -> None:
    """One line that says which files to get, where to put them and what to run then."""
    urls = tmp_path / "urls.yaml"
    urls.write_text("{bottle: 'http://127.0.0.1:9/b.tar.xz', cable: 'http://127.0.0.1:9/c.zip'}")
    message = fail("mvtec", "--category", "bottle", "cable", "--to", to, "--urls", urls)
    assert message.startswith("http://127.0.0.1:9/b.tar.xz: cannot be fetched (")
    assert message.endswith(
        "run it again to go on; or without network: get http://127.0.0.1:9/b.tar.xz and "
        f"http://127.0.0.1:9/c.zip by hand, put it into {to} and run "
        f"python -m datasets.download mvtec --to {to} --archive {to}/b.tar.xz {to}/c.zip; "
        f"the whole set has other addresses: python -m datasets.download mvtec --to {to}"
    )
    for name, category in (("b.tar.xz", "bottle"), ("c.zip", "cable")):
        write(to / name, mvtec(category))
    run("mvtec", "--to", to, "--archive", to / "b.tar.xz", to / "c.zip")
    assert find_categories(to) == ["bottle", "cable"]


def test_no_room(tmp_path: Path, to: Path, monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
    site.files["b.zip"] = packed(mvtec("bottle"), "zip")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    urls = addresses(site, tmp_path, bottle="b.zip")
    message = fail("mvtec", "--category", "bottle", "--to", to, "--urls", urls)
    assert message.endswith("GB are free; make room or choose another folder")
    archive = write(tmp_path / "m.zip", mvtec("bottle"))
    assert "make room" in fail("mvtec", "--archive", archive, "--to", to)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "not a readable YAML file"),
        ("- x", "must hold lines like 'mvtec: {url: https://…, sha256: …}'"),
        ("botle: http://a/b.zip", "no data set or category 'botle'; did you mean 'bottle'?"),
        ("zzz: http://a/b.zip", "known: mvtec, visa"),
        ("mvtec: 3", "'mvtec' is 3; it takes url and sha256"),
        ("mvtec: {url: http://a/b, md5: x}", "it takes url and sha256"),
        ("mvtec: {url: 'file:///b.zip'}", "it must be http(s)://…/<archive>"),
        ("mvtec: http://a/", "it must be http(s)://…/<archive>"),
        ("mvtec: 'http://[a/b'", "it must be http(s)://…/<archive>"),
        ("mvtec: []", "it must be http(s)://…/<archive>"),
        ("mvtec: {sha256: xyz}", "mvtec.sha256 is 'xyz'; it has 64 hexadecimal digits"),
        ("mpdd: {sha256: null}", "it must be http(s)://…/<archive>"),
    ],
)
def test_files_of_addresses(tmp_path: Path, to: Path, text: str, said: str) -> None:
    urls = tmp_path / "urls.yaml"
    urls.write_text(text)
    message = fail("mvtec", "--to", to, "--urls", urls)
    assert message.startswith(f"{urls}: ")
    assert said in message
    assert "gone.yaml" in fail("mvtec", "--to", to, "--urls", tmp_path / "gone.yaml")


def test_the_published_table() -> None:
    """Every address leads to an archive over an encrypted connection, and none is there twice."""
    assert set(DATA_SETS["mvtec"].parts) == set(CATEGORIES)
    sources: list[Source] = [
        source
        for data_set in DATA_SETS.values()
        for source in (data_set.whole, *data_set.parts.values())
        if source
    ]
    urls = [url for source in sources for url in source.urls]
    assert len(urls) == len(set(urls)) == 20
    assert all(url.startswith("https://") for url in urls)
    for source in sources:
        assert source.file.endswith((".tar.xz", ".tar", ".zip", ".tar.gz"))
    for category, source in DATA_SETS["mvtec"].parts.items():
        assert source.file == f"{category}.tar.xz"
    wholes = [data_set.whole for data_set in DATA_SETS.values() if data_set.whole]
    assert all(len(source.sha256 or "") == 64 for source in wholes)


def start(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "datasets.download", *map(str, arguments)], cwd=REPO, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "no_proxy": "*"},
    )  # fmt: skip


@contextlib.contextmanager
def killed_when(process: "subprocess.Popen[str]", happened: Any) -> Iterator[None]:
    deadline = time.monotonic() + 60
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    yield


@pytest.mark.slow
def test_killed_and_started_again(site: Site, tmp_path: Path, to: Path) -> None:
    """The second process fetches what the first one had not yet, and not more than that."""
    data = packed(mvtec("bottle", size=300), "tar.xz")
    site.files["b.tar.xz"], site.seconds = data, 0.05
    urls = addresses(site, tmp_path, bottle="b.tar.xz")
    arguments = ("mvtec", "--category", "bottle", "--to", to, "--urls", urls)
    with killed_when(start(*arguments), lambda: site.sent > len(data) // 2):
        assert "b.tar.xz.part" in names(to)
        assert "bottle" not in names(to)
    time.sleep(0.3)  # the server notices
    site.sent, site.seconds = 0, 0.0
    process = start(*arguments)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert 0 < site.sent < 0.6 * len(data)
    assert site.asked[-1].startswith("b.tar.xz from ")
    assert len(find_category(to, "bottle").test) == 2
    assert names(to) == ["bottle", "license.txt", "readme.txt"]


@pytest.mark.slow
def test_killed_while_unpacking(tmp_path: Path, to: Path) -> None:
    """No category appears by half, and what was left of it goes with the next call."""
    files = mvtec("bottle", "cable", size=300)
    files |= {f"bottle/train/good/{number}.png": os.urandom(2000) for number in range(3000)}
    archive = write(tmp_path / "m.tar.gz", files)
    arguments = ("mvtec", "--archive", archive, "--to", to)

    def unpacking() -> bool:
        return any(to.glob(".mvtec-*.part/content/bottle/train/good/1*.png"))

    with killed_when(start(*arguments), unpacking):
        assert [name for name in names(to) if not name.startswith(".mvtec")] == []
    assert run(*arguments) == 0
    assert len(find_category(to, "bottle").train) == 3002
    assert names(to) == ["bottle", "cable", "license.txt", "readme.txt"]


@pytest.mark.slow
def test_two_at_once(tmp_path: Path, to: Path, site: Site) -> None:
    site.files["b.tar.xz"], site.seconds = packed(mvtec("bottle", size=100), "tar.xz"), 0.1
    urls = addresses(site, tmp_path, bottle="b.tar.xz")
    arguments = ("mvtec", "--category", "bottle", "--to", to, "--urls", urls)
    both = [start(*arguments), start(*arguments)]
    for process in both:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
    assert site.asked == ["b.tar.xz"]
    assert names(to) == ["bottle", "license.txt", "readme.txt"]


@pytest.mark.slow
def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    process = start("mvtec", "--archive", tmp_path / "gone.zip", "--to", tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"error: {tmp_path / 'gone.zip'}: No such file or directory" in output
    assert "Traceback" not in output
