"""The check names every kind of trouble with its files, and is silent about sound data."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.check import CheckReport, check_category
from datasets.folder import find_category


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sound category: 3 training images, 2 normal and 2 defective test images with masks."""
    rng = np.random.default_rng(5)
    for name in ("train/good/0", "train/good/1", "train/good/2", "test/good/0", "test/good/1",
                 "test/cut/0", "test/cut/1"):  # fmt: skip
        save(tmp_path / f"{name}.png", rng.integers(0, 256, (10, 12, 3), dtype=np.uint8))
    mask = np.zeros((10, 12), np.uint8)
    mask[2:4, 5:8] = 255
    for i in range(2):
        save(tmp_path / f"ground_truth/cut/{i}_mask.png", mask)
    return tmp_path


def check(root: Path, input_size: tuple[int, int] | None = None) -> CheckReport:
    return check_category(find_category(root, "x"), input_size)


def test_sound_data(root: Path) -> None:
    report = check(root, (256, 256))
    assert report.ok
    assert (report.errors, report.warnings) == ([], [])
    assert report.counts == {"train": {"good": 3}, "test": {"cut": 2, "good": 2}}
    assert report.sizes == {(10, 12): 7}
    assert report.modes == {"RGB": 7}
    assert report.render().splitlines()[1:] == [
        "  train: 3 images (good 3)",
        "  test: 4 images (cut 2, good 2)",
        "  1 size(s), width x height: 12x10 (7)",
        "  pixel format: RGB (7)",
        "ok",
    ]


@pytest.mark.parametrize(
    "name", ["train/good/1.png", "test/good/1.png", "ground_truth/cut/1_mask.png"]
)
def test_unreadable_files_are_errors(root: Path, name: str) -> None:
    (root / name).write_bytes(b"damaged")
    report = check(root)
    assert not report.ok
    (error,) = report.errors
    assert error.startswith(f"{root / name}: cannot read this image")
    assert report.render().splitlines()[-2:] == [f"error: {error}", "not ok"]


def test_unreadable_defective_image_is_reported_once(root: Path) -> None:
    (root / "test/cut/0.png").write_bytes(b"damaged")
    assert len(check(root).errors) == 1


def test_too_few_training_images(root: Path) -> None:
    for i in (0, 1):
        (root / f"train/good/{i}.png").unlink()
    report = check(root)
    assert not report.ok
    assert "1 training image(s): at least 2 normal images are needed" in report.errors[0]


def _only_warning(root: Path, input_size: tuple[int, int] | None = None) -> str:
    report = check(root, input_size)
    assert report.ok
    assert f"warning: {report.warnings[0]}" in report.render().splitlines()
    (warning,) = report.warnings
    return warning


def test_missing_masks(root: Path) -> None:
    (root / "ground_truth/cut/1_mask.png").unlink()
    expected = f"1 defective image(s) without mask: {root / 'test/cut/1.png'}"
    assert _only_warning(root) == expected
    (root / "ground_truth/cut/0_mask.png").unlink()
    assert _only_warning(root) == "no masks: only image metrics can be computed"


def test_empty_mask(root: Path) -> None:
    save(root / "ground_truth/cut/0_mask.png", np.zeros((10, 12), np.uint8))
    assert "1 defective image(s) with an empty mask" in _only_warning(root)


def test_mask_of_another_size(root: Path) -> None:
    save(root / "ground_truth/cut/0_mask.png", np.full((5, 6), 255, np.uint8))
    assert "1 image(s) whose mask has another size" in _only_warning(root)


def test_mask_that_is_not_black_and_white(root: Path) -> None:
    mask = np.full((10, 12), 2, np.uint8)
    mask[:4, :5] = 1
    mask[9, 9] = 0
    save(root / "ground_truth/cut/0_mask.png", mask)
    warning = _only_warning(root)
    assert warning.startswith("1 mask(s) with values besides 0 and 255: 2 (99 px), 1 (20 px);")


def test_training_images_in_the_test_set(root: Path) -> None:
    (root / "test/good/1.png").write_bytes((root / "train/good/2.png").read_bytes())
    warning = _only_warning(root)
    assert "1 test image(s) are also training images" in warning
    assert str(root / "test/good/1.png") in warning


def test_folders_in_train_that_are_not_used(root: Path) -> None:
    save(root / "train/cut/0.png", np.zeros((10, 12, 3), np.uint8))
    assert _only_warning(root) == "folders in train/ that are not used: cut"


def test_test_set_of_one_kind_or_none(root: Path) -> None:
    for name in ("test/good/0.png", "test/good/1.png"):
        (root / name).unlink()
    assert "no normal test images" in _only_warning(root)
    for name in ("test/cut/0.png", "test/cut/1.png"):
        (root / name).unlink()
    assert _only_warning(root) == "no test images: nothing can be evaluated"


def test_distorted_shapes(root: Path) -> None:
    save(root / "train/good/1.png", np.zeros((10, 30, 3), np.uint8))
    assert "1 image(s) change their width-to-height ratio by up to 3.0 times" in _only_warning(
        root, (64, 64)
    )
    assert check(root).warnings == []


def test_long_lists_are_cut(root: Path) -> None:
    for i in range(2, 9):
        (root / f"test/cut/{i}.png").write_bytes(b"")
        save(root / f"test/cut/{i}.png", np.full((10, 12, 3), i, np.uint8))
    warning = _only_warning(root)
    assert warning.startswith("7 defective image(s) without mask")
    assert warning.endswith(" and 2 more")


def test_grey_and_rgba(root: Path) -> None:
    save(root / "train/good/0.png", np.zeros((10, 12), np.uint8))
    save(root / "train/good/1.png", np.zeros((8, 12, 4), np.uint8))
    report = check(root)
    assert report.modes == {"RGB": 5, "L": 1, "RGBA": 1}
    assert report.sizes == {(10, 12): 6, (8, 12): 1}
    assert report.ok


def test_real_data(shared_data: Path) -> None:
    bottle = check_category(find_category(shared_data / "mvtec", "bottle"), (256, 256))
    assert bottle.ok
    assert bottle.warnings == []
    assert bottle.sizes == {(900, 900): 162}
    dummy = check_category(find_category(shared_data, "dummy_data"))
    assert dummy.ok
    assert dummy.warnings == ["no masks: only image metrics can be computed"]
    assert dummy.modes == {"RGBA": 20}
