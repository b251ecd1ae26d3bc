"""Extracted features come back as they were written, for the same configuration only."""

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets import extracted, levels
from datasets.records import DEFECTIVE, NORMAL, Record
from utils.errors import UserError

GUARD: dict[str, Any] = {
    "model.backbone": "resnet18", "model.padding": "same", "model.strides": (8, 16),
    "model.input_size": [768, 768], "data.resize": "pil", "backbone sha256": "ab" * 32,
}  # fmt: skip
SHAPES = [(3, 8, 6), (5, 4, 3)]


def records(folder: Path, *kinds: str) -> list[Record]:
    """Make one file per kind, whose content names its place."""
    found = []
    for number, kind in enumerate(kinds):
        path = folder / kind / f"{number} ?é.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{kind} {number}".encode())
        found.append(Record(path, NORMAL if kind == "good" else DEFECTIVE, kind))
    return found


@pytest.fixture
def train(tmp_path: Path) -> list[Record]:
    return records(tmp_path / "images/train", *["good"] * 5)


@pytest.fixture
def test(tmp_path: Path) -> list[Record]:
    return records(tmp_path / "images/test", "scratch", "good", "Bent", "scratch", "good", "a b")


def features(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((count, *shape)).astype(np.float32) for shape in SHAPES]


def batches(arrays: list[np.ndarray], size: int = 2) -> Iterator[list[np.ndarray]]:
    for start in range(0, len(arrays[0]), size):
        yield [level[start : start + size] for level in arrays]


def write(root: Path, train: list[Record], test: list[Record], **changes: Any) -> Path:
    return extracted.write(
        root, changes.get("name", "bottle"), changes.get("guard", GUARD),
        (train, changes.get("batches", batches(features(len(train))))),
        (test, batches(features(len(test), 1))),
    )  # fmt: skip


def test_round_trip(tmp_path: Path, train: list[Record], test: list[Record]) -> None:
    root = tmp_path / "features"
    home = write(root, train, test)
    assert home == root / "bottle"
    assert sorted(path.name for path in home.iterdir()) == [
        "bottle.json", "bottle_image_paths.npy", "bottle_labels.npy",
        "bottle_scale_0_test.npy", "bottle_scale_0_train.npy",
        "bottle_scale_1_test.npy", "bottle_scale_1_train.npy",
    ]  # fmt: skip
    found = extracted.read(root, "bottle", GUARD)
    for part, expected in ((found.train, features(5)), (found.test, features(6, 1))):
        for level, array in zip(part, expected, strict=True):
            assert isinstance(level, np.memmap)
            assert level.dtype == np.float32
            np.testing.assert_array_equal(level, array)
    assert found.labels.tolist() == [3, 0, 1, 3, 0, 2]  # Bent, a b, scratch: byte by byte
    assert found.defects == ["scratch", "good", "Bent", "scratch", "good", "a b"]
    assert found.paths == [str(record.path) for record in test]
    assert extracted.names(root) == ["bottle"]


def test_files_can_be_read_as_official_code_does(
    tmp_path: Path, train: list[Record], test: list[Record]
) -> None:
    home = write(tmp_path, train, test)
    assert np.load(home / "bottle_labels.npy").shape == (6,)
    assert np.load(home / "bottle_image_paths.npy")[2] == str(test[2].path)
    assert np.load(home / "bottle_scale_1_train.npy").shape == (5, *SHAPES[1])


def test_the_json_file_names_everything(
    tmp_path: Path, train: list[Record], test: list[Record]
) -> None:
    about = json.loads((write(tmp_path, train, test) / "bottle.json").read_text())
    assert about["guard"] == {**GUARD, "model.strides": [8, 16]}
    assert about["folders"] == ["good", "Bent", "a b", "scratch"]
    assert (about["train"]["count"], about["test"]["count"], about["levels"]) == (5, 6, 2)
    assert about["train"]["images"] == [str(record.path) for record in train]
    train[1].path.write_bytes(b"another image")
    again = json.loads((write(tmp_path, train, test) / "bottle.json").read_text())
    assert again["train"]["sha256"] != about["train"]["sha256"]
    assert again["test"] == about["test"]


def test_digest(tmp_path: Path, train: list[Record], test: list[Record]) -> None:
    """It follows the training images and the guard, not the place."""

    def digest(root: str, guard: dict[str, Any] = GUARD) -> str:
        write(tmp_path / root, train, test, guard=guard)
        return extracted.read(tmp_path / root, "bottle", guard).digest

    first = digest("a")
    assert digest("b") == first
    assert digest("b", {**GUARD, "data.resize": "cv2"}) != first
    test[0].path.write_bytes(b"another image")
    assert digest("b") == first
    train[0].path.write_bytes(b"another image")
    assert digest("b") != first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.input_size": (512, 512)}, r"model.input_size [768, 768], the config has [512, 51"),
        ({"model.padding": None}, "model.padding same, the config has none"),
        ({"model.scales": 3}, "model.scales none, the config has 3"),
        ({"backbone sha256": "cd" * 32}, "sha256 abababababab, the config has cdcdcdcdcdcd;"),
        ({"data.resize": "cv2", "model.strides": [8]}, "model.strides [8, 16], the config has [8]"),
    ],
)
def test_another_configuration(
    tmp_path: Path, train: list[Record], test: list[Record], change: dict[str, Any], said: str
) -> None:
    home = write(tmp_path, train, test)
    wanted = {key: value for key, value in {**GUARD, **change}.items() if value is not None}
    with pytest.raises(UserError) as caught:
        extracted.read(tmp_path, "bottle", wanted)
    message = str(caught.value)
    assert message.startswith(f"{home / 'bottle.json'}: features were extracted with ")
    assert said in message
    assert message.endswith("extract again (extract_features.py) or change the config")
    assert "\n" not in message


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink])
@pytest.mark.parametrize("key", ["scale_0_train", "scale_1_test", "labels", "image_paths"])
def test_damaged_and_missing_arrays(
    tmp_path: Path, train: list[Record], test: list[Record], damage: Any, key: str
) -> None:
    path = write(tmp_path, train, test) / f"bottle_{key}.npy"
    damage(path)
    what = "missing" if damage is Path.unlink else "damaged"
    with pytest.raises(UserError, match=rf"{path.name}: {what}; extract again \(extract_fea"):
        extracted.read(tmp_path, "bottle", GUARD)
    write(tmp_path, train, test)  # mends it
    assert extracted.read(tmp_path, "bottle", GUARD).labels.shape == (6,)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 1}', '{"version": 9}', '{"version": 1, "guard": []}']
)
def test_damaged_json(tmp_path: Path, train: list[Record], test: list[Record], text: str) -> None:
    (write(tmp_path, train, test) / "bottle.json").write_text(text)
    with pytest.raises(UserError, match=r"bottle\.json: damaged.*; extract again"):
        extracted.read(tmp_path, "bottle", GUARD)


@pytest.mark.parametrize("key", ["files", "levels", "folders"])
def test_json_without_a_part(
    tmp_path: Path, train: list[Record], test: list[Record], key: str
) -> None:
    file = write(tmp_path, train, test) / "bottle.json"
    about = json.loads(file.read_text())
    del about[key]
    file.write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"bottle\.json: damaged; extract again"):
        extracted.read(tmp_path, "bottle", GUARD)


def test_arrays_that_nothing_guards(
    tmp_path: Path, train: list[Record], test: list[Record]
) -> None:
    """Those of the official code; they are refused, but may be replaced."""
    (write(tmp_path, train, test) / "bottle.json").unlink()
    with pytest.raises(UserError, match=r"no bottle\.json, so nothing guards .*; extract again"):
        extracted.read(tmp_path, "bottle", GUARD)
    with pytest.raises(UserError, match="no extracted features here; make some with"):
        extracted.names(tmp_path)
    write(tmp_path, train, test)
    assert extracted.names(tmp_path) == ["bottle"]


def test_a_category_that_is_not_there(
    tmp_path: Path, train: list[Record], test: list[Record]
) -> None:
    write(tmp_path, train, test)
    with pytest.raises(UserError, match=r"no features of 'pill' \(found: bottle\); make them with"):
        extracted.read(tmp_path, "pill", GUARD)
    with pytest.raises(UserError, match=r"none: no features of 'pill' \(found: none\)"):
        extracted.read(tmp_path / "none", "pill", GUARD)


def test_names_and_aliases(tmp_path: Path, train: list[Record], test: list[Record]) -> None:
    for name in ("zebra", "metal_nut", "carpet"):
        write(tmp_path, train, test, name=name)
    (tmp_path / "empty").mkdir()
    assert extracted.names(tmp_path) == ["carpet", "metal_nut", "zebra"]
    assert len(extracted.read(tmp_path, "Metal Nut", GUARD).paths) == 6


@pytest.mark.parametrize("name", ["a/b", "..", "", ".hidden"])
def test_names_that_are_none(
    tmp_path: Path, train: list[Record], test: list[Record], name: str
) -> None:
    root = tmp_path / "features"
    with pytest.raises(UserError, match="is not the name of a folder"):
        write(root, train, test, name=name)
    assert not root.exists()


def test_folders_of_other_things_are_left_alone(
    tmp_path: Path, train: list[Record], test: list[Record]
) -> None:
    """With the folder of the data sets as output, the images themselves would be replaced."""
    shutil.copytree(tmp_path / "images", tmp_path / "data/bottle")
    with pytest.raises(UserError, match="holds test, train, which extracted features would repl"):
        write(tmp_path / "data", train, test)
    assert (tmp_path / "data/bottle/train/good").is_dir()
    (tmp_path / "data/pill").write_text("a file")
    with pytest.raises(UserError, match="holds pill, which"):
        write(tmp_path / "data", train, test, name="pill")


def test_without_test_images(tmp_path: Path, train: list[Record]) -> None:
    write(tmp_path, train, [])
    found = extracted.read(tmp_path, "bottle", GUARD)
    assert [level.shape for level in found.test] == [(0, *shape) for shape in SHAPES]
    assert (found.labels.tolist(), found.paths, found.defects) == ([], [], [])


def test_a_failing_extraction_keeps_what_was_there(
    tmp_path: Path, train: list[Record], test: list[Record]
) -> None:
    def failing() -> Iterator[list[np.ndarray]]:
        yield [level[:2] for level in features(5)]
        raise UserError("image 3 is damaged")

    root = tmp_path / "features"
    with pytest.raises(UserError, match="image 3"):
        write(root, train, test, batches=failing())
    assert list(root.iterdir()) == []
    write(root, train, test)
    with pytest.raises(UserError, match="image 3"):
        write(root, train, test, batches=failing())
    assert [path.name for path in root.iterdir()] == ["bottle"]
    np.testing.assert_array_equal(extracted.read(root, "bottle", GUARD).train[0], features(5)[0])


def test_too_little_space_for_both_parts_is_said_before_extracting(
    tmp_path: Path, train: list[Record], test: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    per_image = 4 * sum(int(np.prod(shape)) for shape in SHAPES)
    free = [10 * per_image]  # one short of 5 + 6
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, free[0]))
    with pytest.raises(UserError, match=r"no space for extracted features \(0\.00 GB\); make room"):
        write(tmp_path / "features", train, test)
    assert list((tmp_path / "features").iterdir()) == []
    free[0] += per_image
    write(tmp_path / "features", train, test)


def test_disk_full_while_writing(
    tmp_path: Path, train: list[Record], test: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(levels, "_start_level", full)
    with pytest.raises(UserError, match="no space for extracted features; make room") as caught:
        write(tmp_path / "features", train, test)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="no space for extracted features; make room"):
        write(tmp_path / "features", train, test)
    assert list((tmp_path / "features").iterdir()) == []
