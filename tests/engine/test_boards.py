"""Curves: what is drawn during a training, by whom, how often; and files that can be read back."""

import io
import json
import shutil
import struct
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datasets.records import Record
from engine import checkpoint
from engine.curves import BOARDS, EDGES, Board, Curves
from engine.watch import MOST, examples
from tests.small_run import copy_bottle, train_tiny
from utils.errors import UserError
from utils.image import read_image

MODULES = {"--use_vdl": ("visualdl", "LogWriter"), "--use_tb": ("tensorboardX", "SummaryWriter")}


class Drawn:
    """Plays both writers: notes what it is given."""

    made: list["Drawn"] = []  # noqa: RUF012

    def __init__(self, logdir: str) -> None:
        self.logdir, self.closed = Path(logdir), False
        self.numbers: dict[str, list[tuple[int, float]]] = {}
        self.pictures: dict[str, list[tuple[int, np.ndarray]]] = {}
        self.distributions: dict[str, list[tuple[int, np.ndarray]]] = {}
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.numbers.setdefault(name, []).append((step, value))

    def add_image(self, name: str, picture: np.ndarray, step: int, dataformats: str) -> None:
        assert dataformats == "HWC"
        self.pictures.setdefault(name, []).append((step, picture))

    def add_histogram(self, name: str, values: np.ndarray, step: int, **edges: Any) -> None:
        (bins,) = edges.values()
        assert list(edges) == ["buckets" if self.logdir.name == "vdl" else "bins"]
        np.testing.assert_array_equal(bins, EDGES)
        self.distributions.setdefault(name, []).append((step, values))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def drawn(monkeypatch) -> list[Drawn]:
    """Put stand-ins in the place of both packages; return the writers that are made."""
    monkeypatch.setattr(Drawn, "made", [])
    for package, writer in MODULES.values():
        module = types.ModuleType(package)
        setattr(module, writer, Drawn)
        monkeypatch.setitem(sys.modules, package, module)
    return Drawn.made


def events(run: Path, kind: str) -> list[dict]:
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.folder)
def test_what_is_missing_is_named_before_anything_is_replaced(
    exp: Path, data: Path, board: Board, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, MODULES[board.flag][0], None)
    head = exp / "bottle/last" / checkpoint.HEAD
    before = head.read_bytes()
    with pytest.raises(UserError, match=rf"{board.flag}: .* pip install -r {board.requirements}$"):
        train_tiny(data, exp, board.flag, "--overwrite")
    assert head.read_bytes() == before


def test_both_boards_get_all_there_is(data: Path, exp: Path, tmp_path: Path, drawn) -> None:
    run = train_tiny(
        data, tmp_path / "exp", "--use_vdl", "--use_tb", "--epochs", "5", "--show_epochs", "2"
    )
    assert [writer.logdir for writer in drawn] == [run / "vdl", run / "tb"]
    for writer in drawn:
        assert writer.closed
        for kind in ("step", "epoch", "latents", "test"):
            logged = events(run, kind)
            assert len(logged) == (3 if kind in ("latents", "test") else 5)
            for key in logged[0].keys() - {"event", "step"}:
                values = [(event["step"], event[key]) for event in logged]
                assert writer.numbers[f"{kind}/{key}"] == values
    numbers = drawn[0].numbers
    expected = {
        "step/loss", "epoch/train_nll", "epoch/holdout_nll", "epoch/lr", "test/image_auroc",
        "test/pixel_auroc", "test/aupro_0.3", "latents/level_1_mean", "latents/level_3_std",
    }  # fmt: skip
    assert expected <= set(numbers)
    assert [step for step, _ in numbers["test/image_auroc"]] == [2, 4, 5]


def test_examples_are_pictures_of_every_kind(data: Path, tmp_path: Path, drawn) -> None:
    train_tiny(data, tmp_path / "exp", "--use_tb", "--show_epochs", "1")
    (writer,) = drawn
    kinds = Counter(name.split("/")[1].rpartition("_")[0] for name in writer.pictures)
    assert kinds == {"good": 2, "broken_large": 2, "broken_small": 2, "contamination": 2}
    for shown in writer.pictures.values():
        assert [step for step, _ in shown] == [1, 2]
        before, after = (picture for _, picture in shown)
        assert before.dtype == np.uint8
        assert before.shape[2] == 3
        assert before.shape[1] > 2 * 256
        assert (before != after).any()  # the maps of another epoch
    kind, _, name = next(iter(writer.pictures)).split("/")[1].rpartition("_")
    photograph = read_image(data / f"bottle/test/{kind}/{name}.png")
    top_left = writer.pictures[f"examples/{kind}_{name}"][0][1][:300, :260]
    assert abs(np.median(top_left[60:240, 20:240]) - np.median(photograph)) < 30


def test_latents_are_those_of_held_out_images(data: Path, tmp_path: Path, drawn) -> None:
    run = train_tiny(data, tmp_path / "exp", "--use_tb")
    (writer,) = drawn
    (event,) = events(run, "latents")
    assert sorted(writer.distributions) == [f"latents/level_{i}" for i in (1, 2, 3)]
    for level in (1, 2, 3):
        ((step, values),) = writer.distributions[f"latents/level_{level}"]
        assert step == event["step"] == 2
        assert np.abs(values).max() <= EDGES[-1]
        if np.abs(values).max() < EDGES[-1]:  # nothing was cut off
            assert event[f"level_{level}_mean"] == pytest.approx(values.mean(), abs=1e-6)
            assert event[f"level_{level}_std"] == pytest.approx(values.std(), rel=1e-5)


def test_looking_on_changes_nothing(data: Path, exp: Path, tmp_path: Path, drawn) -> None:
    run = train_tiny(data, tmp_path / "exp", "--use_vdl", "--show_epochs", "1")
    for name in (checkpoint.HEAD, checkpoint.OPTIMIZER):
        kept = exp / "bottle/last" / name
        assert (run / "last" / name).read_bytes() == kept.read_bytes()
    assert events(exp / "bottle", "test") == events(exp / "bottle", "latents") == []


def test_without_test_images_held_out_maps_are_shown(tmp_path: Path, drawn) -> None:
    data = copy_bottle(tmp_path / "data")
    for folder in ("test", "ground_truth"):
        shutil.rmtree(data / "bottle" / folder)
    run = train_tiny(data, tmp_path / "exp", "--use_tb")
    (writer,) = drawn
    assert sorted(writer.pictures) == ["held_out/1", "held_out/2"]
    assert writer.pictures["held_out/1"][0][1].shape == (64, 64, 3)
    assert events(run, "test") == []


def test_a_run_that_starts_anew_leaves_no_old_curves(data: Path, tmp_path: Path, drawn) -> None:
    run = train_tiny(data, tmp_path / "exp")
    for folder in ("vdl", "tb", "own"):
        (run / folder).mkdir()
    train_tiny(data, tmp_path / "exp", "--overwrite")
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"own", "best", "last"}


def test_kinds_take_turns() -> None:
    kinds = ["good"] * 10 + ["crack"] * 2 + ["hole"]
    chosen = examples([Record(Path(f"{i}.png"), 0, kind) for i, kind in enumerate(kinds)])
    assert chosen == [0, 1, 2, 3, 4, 10, 11, 12]
    assert len(chosen) == MOST


def test_no_board_is_no_file(tmp_path: Path) -> None:
    curves = Curves(tmp_path)
    curves.number("a", 1.0, 1)
    curves.picture("b", np.zeros((2, 2, 3), np.uint8), 1)
    curves.distribution("c", np.zeros(3, np.float32), 1)
    curves.close()
    assert list(tmp_path.iterdir()) == []


# --- the real packages


PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
VALUES = np.concatenate([np.full(70, -0.01), np.full(25, 0.01), np.full(5, 99.0)])


def _written(folder: Path, board: Board) -> Path:
    curves = Curves(folder, [board])
    for step in (1, 2, 3):
        curves.number("epoch/loss", step / 4, step)
    curves.picture("examples/a", PICTURE, 3)
    curves.distribution("latents/level_1", VALUES, 3)
    curves.close()
    (file,) = (folder / board.folder).iterdir()
    return file


def _check_bins(edges: np.ndarray, counts: np.ndarray) -> None:
    """Compare bins, of which boards may leave out empty ones, by the places of their counts."""
    assert counts.sum() == 100
    for below, expected in ((-0.02, 0), (0.0, 70), (0.2, 95), (5.5, 95)):
        assert counts[edges <= below + 1e-9].sum() == expected


def _decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def _records(file: Path) -> Iterator[bytes]:
    """Yield the records of a file of events: length, its checksum, content, its checksum."""
    data, place = file.read_bytes(), 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        yield data[place + 12 : place + 12 + length]
        place += 16 + length


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="requirements-tensorboard.txt is not installed")
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[Any]] = {}
    for record in _records(_written(tmp_path, BOARDS[1])):
        event = Event.FromString(record)
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value))
    assert [(step, v.simple_value) for step, v in found["epoch/loss"]] == [
        (1, 0.25), (2, 0.5), (3, 0.75),
    ]  # fmt: skip
    ((step, value),) = found["examples/a"]
    assert step == 3
    np.testing.assert_array_equal(_decoded(value.image.encoded_image_string), PICTURE)
    ((_, value),) = found["latents/level_1"]
    _check_bins(np.array(value.histo.bucket_limit), np.array(value.histo.bucket))


def test_visualdl_reads_what_is_written(tmp_path: Path) -> None:
    visualdl = pytest.importorskip("visualdl", reason="requirements-visualdl.txt is not installed")
    reader = visualdl.LogReader(file_path=str(_written(tmp_path, BOARDS[0])))
    points = reader.get_data("scalar", "epoch/loss")
    assert [(point.id, point.value) for point in points] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    (shown,) = reader.get_data("image", "examples/a")
    np.testing.assert_array_equal(_decoded(shown.image.encoded_image_string), PICTURE)
    (counted,) = reader.get_data("histogram", "latents/level_1")
    edges = np.array(counted.histogram.bin_edges)
    _check_bins(edges[1:], np.array(counted.histogram.hist))
