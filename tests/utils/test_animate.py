"""Moving pictures: frames, times, sizes, colours, and whole files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from utils.animate import MOST_FRAMES, spread, write_gif
from utils.errors import UserError
from utils.visualize import PAPER, PREDICTED, TRUTH


def pictures(folder: Path, *sizes: tuple[int, int]) -> list[Path]:
    """Write one picture of noise per (W, H), a rectangle of its number's grey in the middle."""
    rng = np.random.default_rng(0)
    found = []
    for number, (width, height) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        pixels[height // 4 : height // 2, width // 4 : -width // 4] = 5 * number
        path = folder / f"{number:03}.png"
        Image.fromarray(pixels).save(path)
        found.append(path)
    return found


def frames(path: Path) -> list[np.ndarray]:
    with Image.open(path) as image:
        assert image.format == "GIF"
        return [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]


def test_frames_times_and_sizes(tmp_path: Path) -> None:
    files = pictures(tmp_path, (90, 40), (60, 40), (60, 20))
    target = tmp_path / "out/bottle.gif"
    assert write_gif(target, files) == 3
    assert [path.name for path in target.parent.iterdir()] == ["bottle.gif"]
    with Image.open(target) as image:
        assert (image.size, sum(1 for _ in ImageSequence.Iterator(image)), image.info["loop"]) == (
            (90, 40),
            3,
            0,
        )
        for number in range(3):
            image.seek(number)
            assert image.info["duration"] == 1000
    for frame, file in zip(frames(target), files, strict=True):
        pixels = np.array(Image.open(file))
        height, width = pixels.shape[:2]
        inside = frame[:height, :width].astype(int)
        assert np.abs(inside - pixels).mean() < 20  # 256 of all the colours of noise
        around = np.ones(frame.shape[:2], bool)
        around[:height, :width] = False
        assert np.abs(frame[around].astype(int) - PAPER).max(initial=0) <= 12


def test_outlines_keep_their_colours(tmp_path: Path) -> None:
    """A few pixels of a colour of their own survive among thousands of others."""
    x, y = np.meshgrid(np.arange(256), np.arange(256))
    pixels = np.stack([x, 255 - x, (x + y) // 2], axis=2).astype(np.uint8)
    pixels[100, 50:80], pixels[120:150, 60] = PREDICTED, TRUTH
    Image.fromarray(pixels).save(tmp_path / "a.png")
    write_gif(tmp_path / "a.gif", [tmp_path / "a.png"])
    (frame,) = frames(tmp_path / "a.gif")
    assert np.abs(frame[100, 50:80].astype(int) - PREDICTED).max() <= 12
    assert np.abs(frame[120:150, 60].astype(int) - TRUTH).max() <= 12


def test_a_limited_number_of_frames(tmp_path: Path) -> None:
    files = pictures(tmp_path, *[(12, 12)] * 50)
    assert write_gif(tmp_path / "x.gif", files) == MOST_FRAMES == 40
    shown = frames(tmp_path / "x.gif")
    assert len(shown) == 40
    greys = [int(frame[4, 5, 0]) // 5 for frame in shown]
    assert greys == sorted(greys)
    assert (greys[0], greys[-1]) == (0, 49)


def test_spread() -> None:
    assert spread(range(3), 3) == [0, 1, 2]
    assert spread(range(9), 3) == [0, 4, 8]
    assert spread("abc", 5) == ["a", "b", "c"]
    for count in (41, 42, 79, 81, 1000):
        chosen = spread(range(count), 40)
        steps = np.diff(chosen)
        assert (len(chosen), chosen[0], chosen[-1]) == (40, 0, count - 1)
        assert steps.min() >= 1
        assert steps.max() - steps.min() <= 1


def test_a_damaged_picture_leaves_the_old_file(tmp_path: Path) -> None:
    files = pictures(tmp_path, (20, 20), (20, 20), (20, 20))
    target = tmp_path / "out/a.gif"
    write_gif(target, files[:1])
    before = target.read_bytes()
    data = files[2].read_bytes()
    files[2].write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"002\.png: cannot read this image"):
        write_gif(target, files)
    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["a.gif"]
