"""Records become network inputs and masks, in order, in any number of threads."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.records import DEFECTIVE, NORMAL, UNKNOWN, Record
from datasets.transforms import load_mask, load_masks, load_pixels
from utils.errors import UserError
from utils.image import read_image, to_pixels


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    rng = np.random.default_rng(1)
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path in paths:
        height, width = rng.integers(8, 20, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return [Record(path, NORMAL, "good") for path in paths]


@pytest.mark.parametrize("method", ["pil", "cv2"])
def test_batch_agrees_with_the_one_resize(records: list[Record], method: str) -> None:
    expected = np.stack([to_pixels(read_image(r.path), (6, 9), method) for r in records])
    for workers in (1, 4):
        found = load_pixels(records, (6, 9), method, workers)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)


def test_error_in_a_thread_reaches_the_caller(records: list[Record], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.png"):
        load_pixels([*records, Record(tmp_path / "bad.png", NORMAL, "good")], (4, 4), workers=3)


def _defective(folder: Path, image_size: tuple[int, int], *masks: np.ndarray) -> Record:
    Image.fromarray(np.zeros((*image_size, 3), np.uint8)).save(folder / "defect.png")
    files = []
    for i, mask in enumerate(masks):
        files.append(folder / f"mask{i}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(files[-1])
    return Record(folder / "defect.png", DEFECTIVE, "cut", tuple(files))


def test_masks_are_united(tmp_path: Path) -> None:
    first, second = np.zeros((2, 8, 12), bool)
    first[1:3, 2:5], second[2:6, 4:9] = True, True
    record = _defective(tmp_path, (8, 12), first, second)
    np.testing.assert_array_equal(load_mask(record), first | second)
    halved = load_mask(record, (4, 6))
    np.testing.assert_array_equal(halved, (first | second)[1::2, 1::2])  # nearest pixel centre


def test_mask_of_another_size_is_resized_and_counted(tmp_path: Path, records: list[Record]) -> None:
    mask = np.zeros((4, 6), bool)
    mask[1, 2] = True
    record = _defective(tmp_path, (8, 12), mask)
    masks, differing = load_masks([record, records[0]], workers=2)
    assert differing == 1
    np.testing.assert_array_equal(masks[0], mask.repeat(2, 0).repeat(2, 1))
    assert masks[1].shape == read_image(records[0].path).shape[:2]
    same, differing = load_masks([_defective(tmp_path, (4, 6), mask)], (2, 2))
    assert differing == 0
    assert same[0].shape == (2, 2)


def test_mask_of_a_normal_image_is_empty(records: list[Record]) -> None:
    assert load_mask(records[0], (5, 7)).shape == (5, 7)
    assert not load_mask(records[0]).any()


@pytest.mark.parametrize("label", [DEFECTIVE, UNKNOWN])
def test_unknown_truth_is_not_an_empty_mask(records: list[Record], label: int) -> None:
    record = Record(records[0].path, label, "cut")
    with pytest.raises(UserError, match=r"0\.png: no mask; expected ground_truth/cut/0_mask\.png"):
        load_mask(record, (5, 7))
