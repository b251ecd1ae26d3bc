"""The synthetic bottle set: reproducible, exact masks, small, and not trivially solved."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from datasets import synthetic_bottle
from datasets.synthetic_bottle import COUNTS, main, picture_files, render, write_samples, write_set
from datasets.synthetic_defects import DEFECTS
from utils.errors import UserError

SEED = 0


@pytest.fixture(scope="session")
def lite(repo: Path) -> Path:
    return repo / "lite_data" / "bottle"


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))


def _assert_committed(root: Path, files: dict[str, bytes]) -> None:
    for path, data in files.items():
        committed = (root / path).read_bytes()
        np.testing.assert_array_equal(_pixels(committed), _pixels(data), err_msg=path)
        assert committed == data, f"{path}: same pixels, packed differently"


def _everything() -> list[tuple[str, int]]:
    return [(folder, number) for folder, count in COUNTS.items() for number in range(count)]


@pytest.mark.parametrize(("folder", "number"), [(folder, n - 1) for folder, n in COUNTS.items()])
def test_committed_picture_is_what_the_code_makes(lite: Path, folder: str, number: int) -> None:
    _assert_committed(lite, picture_files(folder, number, SEED))


@pytest.mark.slow
def test_whole_committed_set_is_what_the_code_makes(lite: Path) -> None:
    for folder, number in _everything():
        _assert_committed(lite, picture_files(folder, number, SEED))


def test_layout_is_that_of_mvtec(lite: Path) -> None:
    expected = {f"{folder}/{number:03d}.png" for folder, number in _everything()}
    expected |= {f"ground_truth/{d}/{number:03d}_mask.png" for d in DEFECTS for number in range(8)}
    found = {path.relative_to(lite).as_posix() for path in lite.rglob("*") if path.is_file()}
    assert found == expected
    assert sum(path.stat().st_size for path in lite.rglob("*.png")) < 6_000_000


def test_files_have_the_right_kind_of_pixels(lite: Path) -> None:
    for path in lite.rglob("*.png"):
        picture = _pixels(path.read_bytes())
        if "ground_truth" in path.parts:
            assert picture.shape == (320, 320)
            assert set(np.unique(picture)) == {0, 255}, path
        else:
            assert picture.shape == (320, 320, 3), path


@pytest.mark.parametrize("defect", list(DEFECTS))
@pytest.mark.parametrize("number", [0, 1])
def test_mask_is_where_the_picture_changed(defect: str, number: int) -> None:
    clean, nothing = render((77, number))
    damaged, mask = render((77, number), defect)
    changed = (clean != damaged).any(axis=2)
    assert not nothing.any()
    assert 30 < (mask > 0).sum() < 8000
    # The lens spreads a change over the nearest pixels, stray light over some 20 at low strength.
    nearby = cv2.dilate(mask, np.ones((7, 7), np.uint8)) > 0
    strong = np.abs(clean.astype(int) - damaged).max(axis=2) >= 6
    assert not (strong & ~nearby).any()
    assert changed[mask > 0].mean() > 0.8


def test_one_seed_one_picture_and_another_seed_another() -> None:
    np.testing.assert_array_equal(render((3, 0))[0], render((3, 0))[0])
    assert (render((3, 0))[0] != render((3, 1))[0]).mean() > 0.2


def test_pictures_do_not_depend_on_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = {folder: min(count, 1) for folder, count in COUNTS.items()}
    monkeypatch.setattr(synthetic_bottle, "COUNTS", few)
    write_set(tmp_path / "set", SEED)
    found = {p.relative_to(tmp_path / "set").as_posix() for p in tmp_path.rglob("*.png")}
    assert len(found) == 8
    monkeypatch.undo()
    expected = picture_files("test/contamination", 0, SEED)
    for path, data in expected.items():
        assert (tmp_path / "set" / path).read_bytes() == data


def test_samples_are_what_the_code_makes(repo: Path, tmp_path: Path) -> None:
    write_samples(tmp_path, SEED)
    _assert_committed(repo / "images", {p.name: p.read_bytes() for p in tmp_path.iterdir()})
    assert len(list(tmp_path.iterdir())) == 2


def test_existing_folder_is_kept_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="--overwrite"):
        write_set(tmp_path, SEED)
    assert main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["--out", str(tmp_path / "new"), "--seed", "-1"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_distance_to_the_mean_picture_does_not_solve_it(lite: Path) -> None:
    """Large breakage is plain to see; the small defects need more than a per-pixel statistic."""
    train = np.stack([_pixels(p.read_bytes()) for p in sorted((lite / "train/good").iterdir())])
    mean, deviation = train.mean(axis=0), train.std(axis=0) + 1.0

    def score(path: Path) -> float:
        distance = (np.abs(_pixels(path.read_bytes()) - mean) / deviation).max(axis=2)
        return float(cv2.GaussianBlur(distance, (0, 0), 2.0).max())

    scores = {d.name: [score(p) for p in sorted(d.iterdir())] for d in (lite / "test").iterdir()}

    def auroc(*defects: str) -> float:
        bad = [value for defect in defects for value in scores[defect]]
        return roc_auc_score([0] * len(scores["good"]) + [1] * len(bad), scores["good"] + bad)

    assert auroc(*DEFECTS) < 0.9
    assert auroc("broken_large") > 0.9
