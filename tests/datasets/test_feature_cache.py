"""A feature cache gives back what was put in, or it does not open."""

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from datasets import levels
from datasets.feature_cache import FeatureCache, cache_key, file_digest
from utils.errors import UserError

KEY = "ab" * 32
SHAPES = [(3, 8, 6), (5, 4, 3), (7, 1, 1)]


@pytest.fixture
def features() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((11, *shape)).astype(np.float32) for shape in SHAPES]


def batches(features: list[np.ndarray], size: int = 4) -> Iterator[list[np.ndarray]]:
    for start in range(0, len(features[0]), size):
        yield [level[start : start + size] for level in features]


def test_round_trip(tmp_path: Path, features: list[np.ndarray]) -> None:
    assert FeatureCache.open(tmp_path, KEY) is None
    built = FeatureCache.build(tmp_path, KEY, 11, batches(features))
    opened = FeatureCache.open(tmp_path, KEY)
    assert opened is not None
    indices = np.array([10, 0, 3, 3])
    for cache in (built, opened):
        assert len(cache) == 11
        assert cache.shapes == SHAPES
        for level, expected in zip(cache[indices], features, strict=True):
            assert type(level) is np.ndarray
            assert level.dtype == np.float32
            np.testing.assert_array_equal(level, expected[indices])


def test_indexing_copies(tmp_path: Path, features: list[np.ndarray]) -> None:
    cache = FeatureCache.build(tmp_path, KEY, 11, batches(features))
    cache[np.array([2])][0][:] = 9
    np.testing.assert_array_equal(cache[np.array([2])][0], features[0][[2]])
    assert isinstance(cache.levels[0], np.memmap)


def test_other_layouts_in_memory_are_stored_the_same(
    tmp_path: Path, features: list[np.ndarray]
) -> None:
    def strided() -> Iterator[list[np.ndarray]]:
        for batch in batches(features, 3):
            yield [np.asfortranarray(level.astype(np.float64)) for level in batch]

    cache = FeatureCache.build(tmp_path, KEY, 11, strided())
    np.testing.assert_array_equal(cache[np.arange(11)][0], features[0])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink])
@pytest.mark.parametrize("name", ["level0.npy", "level2.npy", "meta.json"])
def test_damage_is_noticed_and_rebuilding_mends_it(
    tmp_path: Path, features: list[np.ndarray], damage: object, name: str
) -> None:
    FeatureCache.build(tmp_path, KEY, 11, batches(features))
    (home,) = tmp_path.iterdir()
    damage(home / name)  # type: ignore[operator]
    assert FeatureCache.open(tmp_path, KEY) is None
    rebuilt = FeatureCache.build(tmp_path, KEY, 11, batches(features))
    np.testing.assert_array_equal(rebuilt[np.array([5])][2], features[2][[5]])
    assert list(tmp_path.iterdir()) == [home]


@pytest.mark.parametrize("position", [0.0, 0.31, 1.0])
def test_zeroed_pages_of_a_large_level_are_noticed(tmp_path: Path, position: float) -> None:
    level = np.random.default_rng(2).standard_normal((8, 4, 128, 128)).astype(np.float32)
    FeatureCache.build(tmp_path, KEY, 8, iter([[level]]))
    path = next(tmp_path.rglob("level0.npy"))
    data = bytearray(path.read_bytes())
    hole = len(data) // 32
    start = int(position * (len(data) - hole))
    data[start : start + hole] = bytes(hole)
    path.write_bytes(bytes(data))
    assert FeatureCache.open(tmp_path, KEY) is None


@pytest.mark.parametrize(
    "change", [{"version": 99}, {"key": "cd" * 32}, {"levels": None}, {"levels": [{}]}]
)
def test_stale_or_foreign_meta(
    tmp_path: Path, features: list[np.ndarray], change: dict[str, object]
) -> None:
    FeatureCache.build(tmp_path, KEY, 11, batches(features))
    path = next(tmp_path.rglob("meta.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert FeatureCache.open(tmp_path, KEY) is None


def test_keys_have_folders_of_their_own(tmp_path: Path, features: list[np.ndarray]) -> None:
    FeatureCache.build(tmp_path, KEY, 11, batches(features))
    other = "12" * 32
    assert FeatureCache.open(tmp_path, other) is None
    FeatureCache.build(tmp_path, other, 11, batches([-level for level in features]))
    first, second = FeatureCache.open(tmp_path, KEY), FeatureCache.open(tmp_path, other)
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(first[np.array([1])][0], -second[np.array([1])][0])
    shutil.rmtree(next(tmp_path.glob("12*")))  # how a user gets rid of one
    assert FeatureCache.open(tmp_path, KEY) is not None


def test_failing_extraction_leaves_nothing(tmp_path: Path, features: list[np.ndarray]) -> None:
    def failing() -> Iterator[list[np.ndarray]]:
        yield [level[:4] for level in features]
        raise UserError("image 5 is damaged")

    with pytest.raises(UserError, match="image 5"):
        FeatureCache.build(tmp_path, KEY, 11, failing())
    assert list(tmp_path.iterdir()) == []


def test_wrong_number_or_shape_of_features(tmp_path: Path, features: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="features of 11 images were given, 12"):
        FeatureCache.build(tmp_path, KEY, 12, batches(features))
    with pytest.raises(ValueError, match="features of 0 images"):
        FeatureCache.build(tmp_path, KEY, 0, iter([]))
    with pytest.raises(ValueError, match="changed their shape after 11 images"):
        FeatureCache.build(tmp_path, KEY, 12, iter([features, [f[:1, :1] for f in features]]))
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_before_extracting(
    tmp_path: Path, features: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(UserError, match=r"no space for the feature cache \(0\.00 GB\); delete"):
        FeatureCache.build(tmp_path, KEY, 11, batches(features))


def test_disk_full_while_writing(
    tmp_path: Path, features: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, _: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    monkeypatch.setattr(levels, "_start_level", lambda *_: Full())
    with pytest.raises(UserError, match="no space for the feature cache") as caught:
        FeatureCache.build(tmp_path, KEY, 11, batches(features))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def _key(paths: list[Path], **changes: object) -> str:
    arguments = {
        "size": (256, 256), "method": "pil", "backbone": "resnet18",
        "taps": [1, 2, 3], "weight_hash": "w",
    }  # fmt: skip
    return cache_key(paths, **(arguments | changes))  # type: ignore[arg-type]


def test_key_depends_on_everything_that_features_depend_on(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 10)
    key = _key(paths)
    others = [
        _key(paths, size=(256, 128)),
        _key(paths, method="cv2"),
        _key(paths, backbone="wide_resnet50_2"),
        _key(paths, taps=[1, 2]),
        _key(paths, weight_hash="v"),
        _key(paths[::-1]),
        _key(paths[:2]),
    ]
    paths[1].write_bytes(b"\x01" * 9 + b"\x02")
    others.append(_key(paths))
    paths[1].write_bytes(b"\x01" * 10)
    assert len({key, *others}) == 9
    moved = [path.rename(tmp_path / f"renamed{path.name}") for path in paths]
    assert _key(moved) == key
    assert len(key) == 64


def test_digest(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_digest(tmp_path / "abc").startswith("ba7816bf8f01cfea")  # FIPS 180-4, example 1
    with pytest.raises(UserError, match="none: cannot read this file: No such file"):
        file_digest(tmp_path / "none")
