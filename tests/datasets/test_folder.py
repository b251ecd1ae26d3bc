"""Folders become records with the right labels, masks and order; mistakes are named."""

from pathlib import Path

import pytest

from datasets.folder import find_categories, find_category, split_holdout
from datasets.records import DEFECTIVE, NORMAL, UNKNOWN, MaskFolder, Record
from utils.errors import UserError
from utils.names import CATEGORIES, canonical_name, report_order


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    touch(
        tmp_path / "metal_nut",
        "readme.txt",
        *(f"train/good/{i:03}.png" for i in range(3)),
        "train/good/Thumbs.db",
        "test/good/000.png",
        "test/scratch/000.png",
        "test/scratch/001.png",
        "test/bent/000.png",
        "test/.DS_Store",
        "test/.trash/000.png",
        "ground_truth/bent/000_mask.png",
        "ground_truth/scratch/000_mask.png",
    )
    return tmp_path


def test_mvtec_layout(mvtec: Path) -> None:
    category = find_category(mvtec, "metal_nut")
    root = mvtec / "metal_nut"
    assert (category.name, category.root, category.layout) == ("metal_nut", root, "MVTec AD layout")
    assert [record.path.name for record in category.train] == ["000.png", "001.png", "002.png"]
    assert {record.label for record in category.train} == {NORMAL}
    assert category.test == (
        Record(
            root / "test/bent/000.png", 1, "bent", (root / "ground_truth/bent/000_mask.png",)
        ),
        Record(root / "test/good/000.png", 0, "good", ()),
        Record(
            root / "test/scratch/000.png", 1, "scratch",
            (root / "ground_truth/scratch/000_mask.png",),
        ),
        Record(root / "test/scratch/001.png", 1, "scratch", ()),
    )  # fmt: skip
    assert [record.has_truth for record in category.test] == [True, True, True, False]


@pytest.mark.parametrize("alias", ["metal nut", "Metal_nut", "METAL-NUT", " metal  nut "])
def test_category_aliases(mvtec: Path, alias: str) -> None:
    assert find_category(mvtec, alias).name == canonical_name(alias) == "metal_nut"


def test_folder_may_be_spelled_in_another_way(tmp_path: Path) -> None:
    touch(tmp_path / "Metal Nut", "train/good/0.png")
    assert find_category(tmp_path, "metal_nut").name == "Metal Nut"


def test_root_that_is_the_category(mvtec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = find_category(mvtec / "metal_nut", "bottle")
    assert inside.name == "metal_nut"
    assert inside.test == find_category(mvtec, "metal_nut").test
    monkeypatch.chdir(mvtec / "metal_nut")
    assert find_category(Path(), "bottle").name == "metal_nut"


@pytest.mark.parametrize("good", ["good", "ok", "Normal", "OK"])
def test_names_of_the_normal_folder(tmp_path: Path, good: str) -> None:
    touch(tmp_path, f"train/{good}/a.bmp", "train/ko/b.bmp", f"test/{good}/c.TIF", "test/ko/d.webp")
    category = find_category(tmp_path, "01")
    assert [(r.path.name, r.label, r.defect) for r in category.train] == [("a.bmp", 0, "good")]
    assert category.left_out == ("folders in train/ that are not used: ko",)
    assert {(r.path.name, r.label, r.defect) for r in category.test} == {
        ("c.TIF", NORMAL, "good"),
        ("d.webp", DEFECTIVE, "ko"),
    }


def test_train_and_test_with_images_directly_inside(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.png", "test/b.png", "test/crack/c.png")
    category = find_category(tmp_path, "bottle")
    assert [record.label for record in category.train] == [NORMAL]
    assert [(r.label, r.defect) for r in category.test] == [
        (UNKNOWN, "unknown"),
        (DEFECTIVE, "crack"),
    ]
    assert not category.test[0].has_truth


def test_folder_of_good_images_only(tmp_path: Path) -> None:
    touch(tmp_path / "parts", "b.jpg", "a.jpg", "list.csv")
    for root, name in ((tmp_path / "parts", "bottle"), (tmp_path, "parts")):
        category = find_category(root, name)
        assert (category.name, category.layout) == ("parts", "plain folders, images only")
        assert category.test == ()
        assert [record.path.name for record in category.train] == ["a.jpg", "b.jpg"]


def test_test_folder_alone_is_enough_to_evaluate(tmp_path: Path) -> None:
    touch(tmp_path, "test/good/a.png")
    category = find_category(tmp_path, "bottle")
    assert category.train == ()
    assert len(category.test) == 1


def test_order_is_byte_wise(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/good/{n}.png" for n in ("a", "B", "10", "9", "é", "_", "[1]?")))
    names = [record.path.stem for record in find_category(tmp_path, "x").train]
    assert names == ["10", "9", "B", "[1]?", "_", "a", "é"]


def test_same_stem_twice_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "train/good/a.png", "test/cut/007.jpg", "test/cut/007.png")
    with pytest.raises(UserError, match=r"cut: 007\.jpg and 007\.png share a stem") as caught:
        find_category(tmp_path, "x")
    assert "\n" not in str(caught.value)


def test_nothing_recognisable(tmp_path: Path, mvtec: Path) -> None:
    with pytest.raises(UserError, match=r"no category 'botle' \(found: metal_nut\)"):
        find_category(mvtec, "botle")
    (mvtec / "empty").mkdir()
    with pytest.raises(UserError, match="looked for train/good, train/ok, train/normal"):
        find_category(mvtec, "empty")
    with pytest.raises(UserError, match="no such folder"):
        find_category(tmp_path / "nowhere", "bottle")
    touch(mvtec / "odd", "train/defects/a.png")
    with pytest.raises(UserError, match="none of its folders is called good, ok, normal"):
        find_category(mvtec, "odd")


def test_categories_in_the_order_of_the_tables(tmp_path: Path) -> None:
    names = ["zipper", "apple", "bottle", "Metal Nut", "carpet", "wood", "cable"]
    for name in names:
        touch(tmp_path / name, "train/good/a.png")
    others = (".hidden/train/good/a.png", "__MACOSX/bottle/train/good/a.png", "readme.txt")
    touch(tmp_path, "docs/picture.png", "preview.png", *others)
    expected = ["carpet", "wood", "bottle", "cable", "Metal Nut", "zipper", "apple"]
    assert find_categories(tmp_path) == expected
    assert find_categories(tmp_path / "bottle") == ["bottle"]
    with pytest.raises(UserError, match="no categories here"):
        find_categories(tmp_path / "bottle" / "train")
    with pytest.raises(UserError, match=r"no category 'pear' \(found: carpet"):  # no stray picture
        find_category(tmp_path, "pear")


def test_fifteen_categories() -> None:
    assert len(CATEGORIES) == len(set(CATEGORIES)) == 15
    assert CATEGORIES[:6] == ("carpet", "grid", "leather", "tile", "wood", "bottle")
    assert report_order(reversed(CATEGORIES)) == list(CATEGORIES)


def test_masks_are_found_in_this_order(tmp_path: Path) -> None:
    names = ["7_mask.png", "7.png", "7_mask.bmp", "7.bmp", "7/1.png", "7/0.png", "7/x.txt"]
    touch(tmp_path, *names)
    expected = [("7_mask.png",), ("7.png",), ("7_mask.bmp",), ("7.bmp",), ("0.png", "1.png"), ()]
    removed = [*names[:4], "7/0.png"]
    for wanted, gone in zip(expected, removed, strict=False):
        assert tuple(path.name for path in MaskFolder(tmp_path).of("7")) == wanted
        (tmp_path / gone).unlink()


def test_masks_are_matched_by_exact_stem(tmp_path: Path) -> None:
    touch(tmp_path, "10_mask.png", "a.b_mask.PNG", "1_mask_old.png", "[x]?_mask.png", ".2_mask.png")
    masks = MaskFolder(tmp_path)
    assert masks.of("1") == masks.of("2") == masks.of("a") == masks.of("x") == ()
    assert masks.of("a.b") == (tmp_path / "a.b_mask.PNG",)
    assert masks.of("[x]?") == (tmp_path / "[x]?_mask.png",)
    assert MaskFolder(tmp_path / "nowhere").of("1") == ()


def _records(count: int) -> tuple[Record, ...]:
    return tuple(Record(Path(f"{i}.png"), NORMAL, "good") for i in range(count))


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [(100, 0.1, 10), (2, 0.1, 1), (3, 0.99, 2), (209, 0.1, 21)]
)
def test_holdout(count: int, fraction: float, held: int) -> None:
    records = _records(count)
    train, holdout = split_holdout(records, fraction, seed=3)
    assert len(holdout) == held
    for part in (train, holdout):
        assert list(part) == [record for record in records if record in part]  # order kept
    assert sorted((*train, *holdout), key=records.index) == list(records)
    assert split_holdout(records, fraction, seed=3) == (train, holdout)


def test_holdout_depends_on_the_seed() -> None:
    parts = {split_holdout(_records(50), seed=seed)[1] for seed in range(5)}
    assert len(parts) == 5


def test_holdout_errors() -> None:
    with pytest.raises(UserError, match=r"1 training image\(s\): at least 2 .* add normal images"):
        split_holdout(_records(1))
    for fraction in (0, 1, -0.1, 7, float("nan")):
        with pytest.raises(UserError, match="must lie between 0 and 1"):
            split_holdout(_records(9), fraction)


def test_real_mvtec_bottle(shared_data: Path) -> None:
    category = find_category(shared_data / "mvtec", "bottle")
    assert (len(category.train), len(category.test)) == (120, 42)
    counts = {d: sum(r.defect == d for r in category.test) for d in ("good", "broken_small")}
    assert counts == {"good": 10, "broken_small": 11}
    assert all(record.has_truth for record in category.test)
    assert all(len(record.masks) == record.label for record in category.test)


def test_other_real_sets(shared_data: Path) -> None:
    assert find_categories(shared_data) == ["dummy_data", "magnetic_tile"]
    tiles = find_category(shared_data, "magnetic tile")
    assert (len(tiles.train), len(tiles.test)) == (153, 112)
    assert all(record.has_truth for record in tiles.test)
    dummy = find_category(shared_data / "dummy_data", "bottle")
    assert (dummy.name, dummy.layout) == ("dummy_data", "MVTec AD layout")
    assert [record.label for record in dummy.test] == [1] * 8 + [0] * 8
    assert [record.has_truth for record in dummy.test] == [False] * 8 + [True] * 8
