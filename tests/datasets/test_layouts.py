"""Every layout on a small tree of its own, also in the folders it is shipped or mounted in."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.check import check_category
from datasets.folder import find_categories, find_category, is_category
from datasets.layouts import LAYOUTS, chosen_by_name
from datasets.records import DEFECTIVE, NORMAL, UNKNOWN, Category, Record
from datasets.transforms import load_mask
from datasets.truth import KnownTruth
from tests.datasets.test_folder import touch
from utils.errors import UserError
from utils.schema import DataSection

STRAY = (".DS_Store", "Thumbs.db", "readme.txt", "._x.png", "__MACOSX/good/a.png")


def save(path: Path, values: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((6, 8), np.uint8) if values is None else values).save(path)


def drawn(value: int = 255) -> np.ndarray:
    """Return a mask (6, 8) with two defective pixels of this value."""
    mask = np.zeros((6, 8), np.uint8)
    mask[2, 3:5] = value
    return mask


def shown(records: tuple[Record, ...], root: Path) -> list[tuple]:
    """Return what a test compares: path, label, defect, masks."""
    return [
        (
            str(r.path.relative_to(root)), r.label, r.defect,
            *(str(mask.relative_to(root)) for mask in r.masks),
        )
        for r in records
    ]  # fmt: skip


def refusal(root: Path, category: str, layout: str = "auto") -> str:
    with pytest.raises(UserError) as caught:
        find_category(root, category, layout)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- one tree per layout


def mvtec(root: Path) -> Path:
    return touch(
        root / "metal_nut",
        "train/good/0.png", "train/good/1.png", "test/good/0.png", "test/bent/0.png",
        "ground_truth/bent/0_mask.png", *STRAY, *(f"train/good/{name}" for name in STRAY),
    )  # fmt: skip


def mvtec2(root: Path) -> Path:
    return touch(
        root / "can",
        "train/good/000_regular.png", "train/good/001_regular.png",
        "validation/good/000_regular.png", "test_public/good/000_regular.png",
        "test_public/bad/000_overexposed.png", "test_public/bad/001_regular.png",
        "test_public/ground_truth/bad/000_overexposed_mask.png",
        "test_public/ground_truth/bad/001_regular_mask.png", "test_private/000.png",
        "test_private_mixed/000.png", "test_private_mixed/001.png", *STRAY,
    )  # fmt: skip


ROWS = (
    "object,split,label,image,mask",
    "pcb1,train,normal,pcb1/Data/Images/Normal/002.JPG,",
    'pcb1,train,normal,"pcb1/Data/Images/Normal/0 a, b.JPG",',
    "pcb1,test,normal,pcb1/Data/Images/Normal/1 [x]?.JPG,",
    "candle,train,normal,candle/Data/Images/Normal/0.JPG,",
    "pcb1,test,anomaly,pcb1/Data/Images/Anomaly/é.JPG,pcb1/Data/Masks/Anomaly/é.png",
    "pcb1,test,anomaly,pcb1/Data/Images/Anomaly/1.JPG,",
)
VISA_FILES = (
    "Data/Images/Normal/002.JPG", "Data/Images/Normal/0 a, b.JPG", "Data/Images/Normal/1 [x]?.JPG",
    "Data/Images/Normal/not in the list.JPG", "Data/Images/Anomaly/é.JPG",
    "Data/Images/Anomaly/1.JPG", "Data/Masks/Anomaly/é.png",
)  # fmt: skip


def visa(root: Path, rows: tuple[str, ...] = ROWS, end: str = "\r\n", bom: str = "\ufeff") -> Path:
    (root / "split_csv").mkdir(parents=True)
    text = bom + "".join(row + end for row in rows)
    (root / "split_csv/1cls.csv").write_bytes(text.encode())
    return touch(root / "pcb1", *VISA_FILES, *STRAY)


def btad(root: Path) -> Path:
    return touch(
        root / "01",
        "train/ok/0.bmp", "train/ok/1.png", "test/ok/0.png", "test/ko/0.bmp", "test/ko/1.bmp",
        "ground_truth/ko/0.png", "ground_truth/ko/1.bmp", *STRAY,
    )  # fmt: skip


def mtd(root: Path) -> Path:
    folder = root / "Magnetic-tile-defect-datasets.-master"
    names = [f"MT_Free/Imgs/exp{i}_num_{1000 + i}" for i in range(20)]
    names += ["MT_Crack/Imgs/exp1_num_1", "MT_Uneven/Imgs/exp1_num_2"]
    touch(folder, *(f"{name}{suffix}" for name in names for suffix in (".jpg", ".png")))
    return touch(folder, "MT_Crack/Imgs/exp9_num_3.jpg", "dataset.jpg", "MT_Free/a.txt", *STRAY)


def kolektor(root: Path, defects: tuple[str, ...] = ("kos03/Part1",)) -> Path:
    folder = root / "KolektorSDD"
    for item in range(1, 13):
        for part in range(3):
            name = f"kos{item:02}/Part{part}"
            save(folder / f"{name}.jpg")
            save(folder / f"{name}_label.bmp", drawn(1 if name in defects else 0))
    return touch(folder, *STRAY)


def plain(root: Path) -> Path:
    names = [f"good/{i}.png" for i in range(10)]
    return touch(
        root / "cap", *names, "scratch/0.png", "Dent/0.png", "ground_truth/Dent/0.png", *STRAY
    )


TREES = {
    "mvtec": mvtec, "mvtec2": mvtec2, "visa": visa, "btad": btad, "mpdd": mvtec, "mtd": mtd,
    "kolektor": kolektor, "folder": plain,
}  # fmt: skip


# --- what is read from them


def test_mvtec_ad(tmp_path: Path) -> None:
    root = mvtec(tmp_path)
    category = find_category(tmp_path, "metal_nut")
    assert len(category.train) == 2
    assert shown(category.test, root) == [
        ("test/bent/0.png", DEFECTIVE, "bent", "ground_truth/bent/0_mask.png"),
        ("test/good/0.png", NORMAL, "good"),
    ]
    assert category.describe() == (
        f"MVTec AD layout in {root}: 2 train, 2 test (1 defective), masks for 1"
    )


def test_mvtec_ad_2(tmp_path: Path) -> None:
    root = mvtec2(tmp_path)
    category = find_category(tmp_path, "can")
    masks = "test_public/ground_truth/bad"
    assert [r.path.name for r in category.train] == ["000_regular.png", "001_regular.png"]
    assert shown(category.holdout, root) == [("validation/good/000_regular.png", NORMAL, "good")]
    assert shown(category.test, root) == [
        ("test_public/bad/000_overexposed.png", DEFECTIVE, "bad",
         f"{masks}/000_overexposed_mask.png"),
        ("test_public/bad/001_regular.png", DEFECTIVE, "bad", f"{masks}/001_regular_mask.png"),
        ("test_public/good/000_regular.png", NORMAL, "good"),
        ("test_private/000.png", UNKNOWN, "unknown"),
        ("test_private_mixed/000.png", UNKNOWN, "unknown"),
        ("test_private_mixed/001.png", UNKNOWN, "unknown"),
    ]  # fmt: skip
    assert category.describe() == (
        f"MVTec AD 2 layout in {root}: 2 train, 1 validation, 3 test (2 defective), masks for 2, "
        "3 unlabelled"
    )


@pytest.mark.parametrize(("end", "bom"), [("\r\n", "\ufeff"), ("\n", ""), ("\r\n\r\n", "")])
def test_visa(tmp_path: Path, end: str, bom: str) -> None:
    root = visa(tmp_path, end=end, bom=bom)
    category = find_category(tmp_path, "pcb1")
    assert shown(category.train, root) == [
        ("Data/Images/Normal/0 a, b.JPG", NORMAL, "good"),
        ("Data/Images/Normal/002.JPG", NORMAL, "good"),
    ]
    assert shown(category.test, root) == [
        ("Data/Images/Anomaly/1.JPG", DEFECTIVE, "anomaly"),
        ("Data/Images/Anomaly/é.JPG", DEFECTIVE, "anomaly", "Data/Masks/Anomaly/é.png"),
        ("Data/Images/Normal/1 [x]?.JPG", NORMAL, "good"),
    ]
    assert category.describe() == (
        f"VisA layout in {root}: 2 train, 3 test (2 defective), masks for 1"
    )


def test_masks_of_visa_hold_class_numbers(tmp_path: Path) -> None:
    root = visa(tmp_path)
    for name in VISA_FILES:
        save_as_png(root / name, drawn(2) if "Masks" in name else None)
    (record,) = (record for record in find_category(tmp_path, "pcb1").test if record.masks)
    assert load_mask(record).sum() == 2
    report = check_category(find_category(tmp_path, "pcb1"))
    assert report.ok
    assert any("values besides 0 and 255: 2 (2 px)" in text for text in report.warnings)


def save_as_png(path: Path, values: np.ndarray | None = None) -> None:
    """Write a real picture under whatever suffix: what counts is the content."""
    with path.open("wb") as file:
        Image.fromarray(np.zeros((6, 8), np.uint8) if values is None else values).save(file, "PNG")


def test_a_folder_of_visa_in_another_spelling(tmp_path: Path) -> None:
    visa(tmp_path).rename(tmp_path / "PCB1")
    category = find_category(tmp_path, "pcb1")
    assert category.name == "PCB1"
    assert {record.path.parts[-5] for record in category.train} == {"PCB1"}


def test_a_category_of_visa_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = visa(tmp_path)
    monkeypatch.chdir(root)
    for place in (root, Path()):
        assert is_category(place)
        assert len(find_category(place, "anything").train) == 2


def test_visa_without_its_split(tmp_path: Path) -> None:
    visa(tmp_path)
    (tmp_path / "split_csv/1cls.csv").unlink()
    said = refusal(tmp_path, "pcb1")
    assert said.startswith(f"{tmp_path / 'split_csv/1cls.csv'}: missing; ")
    assert "beside the folders of the categories" in said


def test_files_that_the_split_of_visa_names_but_are_not_there(tmp_path: Path) -> None:
    root = visa(tmp_path)
    for name in (VISA_FILES[0], VISA_FILES[-1]):
        (root / name).unlink()
    said = refusal(tmp_path, "pcb1")
    assert f"1cls.csv: names 2 file(s) that are not there: {root / VISA_FILES[0]}, " in said
    assert str(root / VISA_FILES[-1]) in said


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["object;split;label;image;mask"], "columns are object;split;label;image;mask; expected"),
        ([], "columns are missing"),
        (ROWS[:1], r"no rows of 'pcb1'; the folder must be called like the object"),
        ([ROWS[0], "pcb1,train,anomaly,pcb1/a.JPG,"], "pcb1/a.JPG is 'train anomaly'; expected"),
        ([ROWS[0], "pcb1,test"], " is 'test '; expected one of train normal, test normal"),
        ([ROWS[0], "pcb1,train,normal,../../x.JPG,"], r"names '../../x.JPG'; expected <object>/"),
        ([ROWS[0], "pcb1,train,normal,/etc/x.JPG,"], r"names '/etc/x.JPG'; expected <object>/"),
    ],
)
def test_damaged_splits_of_visa(tmp_path: Path, rows: list[str], words: str) -> None:
    visa(tmp_path, tuple(rows))
    assert words in refusal(tmp_path, "pcb1")


def test_a_split_of_visa_that_is_no_text(tmp_path: Path) -> None:
    visa(tmp_path)
    (tmp_path / "split_csv/1cls.csv").write_bytes(b"object,split\xff\xfe\x00")
    assert "1cls.csv: not a CSV file in UTF-8 (" in refusal(tmp_path, "pcb1")


def test_btad(tmp_path: Path) -> None:
    root = btad(tmp_path / "BTech_Dataset_transformed")
    category = find_category(tmp_path, "01")
    assert [record.path.name for record in category.train] == ["0.bmp", "1.png"]
    assert shown(category.test, root) == [
        ("test/ko/0.bmp", DEFECTIVE, "ko", "ground_truth/ko/0.png"),
        ("test/ko/1.bmp", DEFECTIVE, "ko", "ground_truth/ko/1.bmp"),
        ("test/ok/0.png", NORMAL, "good"),
    ]
    assert category.layout == "BTAD layout"


def test_mpdd_is_like_mvtec_ad(tmp_path: Path) -> None:
    mvtec(tmp_path)
    named = find_category(tmp_path, "metal_nut", "mpdd")
    assert named.layout == "MPDD layout"
    assert named.test == find_category(tmp_path, "metal_nut").test


def test_magnetic_tiles(tmp_path: Path) -> None:
    root = mtd(tmp_path)
    category = find_category(root, "tile")
    assert category.name == "Magnetic-tile-defect-datasets.-master"
    assert {record.path.suffix for record in category.train} == {".jpg"}
    normal = [record for record in category.test if record.label == NORMAL]
    digests = {r.path.stem: hashlib.sha256(r.path.stem.encode()).hexdigest() for r in normal}
    assert {stem for stem, digest in digests.items() if digest < "3333"} == set(digests)
    assert len(category.train) == 20 - len(normal)
    assert len(normal) == 4
    assert shown(category.test[len(normal) :], root) == [
        ("MT_Crack/Imgs/exp1_num_1.jpg", DEFECTIVE, "crack", "MT_Crack/Imgs/exp1_num_1.png"),
        ("MT_Crack/Imgs/exp9_num_3.jpg", DEFECTIVE, "crack"),
        ("MT_Uneven/Imgs/exp1_num_2.jpg", DEFECTIVE, "uneven", "MT_Uneven/Imgs/exp1_num_2.png"),
    ]
    assert category.layout == "MTD layout, split by file name"


def test_photographs_of_one_stem_among_the_tiles(tmp_path: Path) -> None:
    touch(mtd(tmp_path), "MT_Crack/Imgs/exp1_num_1.jpeg")
    said = refusal(tmp_path, "Magnetic-tile-defect-datasets.-master")
    assert "exp1_num_1.jpeg and exp1_num_1.jpg share a stem" in said


def items(records: tuple[Record, ...]) -> set[str]:
    return {record.path.parent.name for record in records}


def test_kolektor(tmp_path: Path) -> None:
    root = kolektor(tmp_path)
    category = find_category(root, "x")
    assert category.layout == "KolektorSDD layout, split by item"
    assert {record.label for record in category.train} == {NORMAL}
    assert not items(category.train) & items(category.test)
    assert len(items(category.train) | items(category.test)) == 12
    testing = chosen_by_name([f"kos{i:02}" for i in range(1, 13)], 1 / 3)
    assert items(category.test) == testing


def test_defective_parts_of_kolektor(tmp_path: Path) -> None:
    """In the test items they are tested on; those of training items are left out, and told."""
    every = tuple(f"kos{item:02}/Part2" for item in range(1, 13))
    root = kolektor(tmp_path, every)
    category = find_category(root, "x")
    count = len(items(category.test))
    defective = [record for record in category.test if record.label == DEFECTIVE]
    assert {record.path.stem for record in defective} == {"Part2"}
    assert [record.masks for record in defective] == [
        (record.path.with_name("Part2_label.bmp"),) for record in defective
    ]
    assert len(defective) == count
    assert len(category.test) == 3 * count
    assert len(category.train) == 2 * (12 - count)
    assert category.left_out == (
        f"{12 - count} defective image(s) of items that others are trained on, which look alike",
    )
    assert category.left_out[0] in check_category(category).warnings


def test_a_part_of_kolektor_without_label(tmp_path: Path) -> None:
    root = kolektor(tmp_path)
    (root / "kos04/Part1_label.bmp").unlink()
    assert f"{root / 'kos04'}: no label of Part1.jpg; expected <name>_label.bmp" in refusal(
        root, "x"
    )


def test_plain_folders(tmp_path: Path) -> None:
    root = plain(tmp_path)
    category = find_category(tmp_path, "cap")
    normal = [record for record in category.test if record.label == NORMAL]
    assert len(normal) == len(chosen_by_name(map(str, range(10)), 0.2)) > 0
    assert len(category.train) == 10 - len(normal)
    assert shown(category.test[len(normal) :], root) == [
        ("Dent/0.png", DEFECTIVE, "Dent", "ground_truth/Dent/0.png"),
        ("scratch/0.png", DEFECTIVE, "scratch"),
    ]
    assert category.layout == "plain folders, split by file name"


def test_without_defects_nothing_is_set_aside(tmp_path: Path) -> None:
    touch(tmp_path / "cap", *(f"OK/{i}.png" for i in range(10)))
    category = find_category(tmp_path, "cap")
    assert (len(category.train), category.test) == (10, ())
    assert category.describe().endswith("/cap: 10 train, no test images")


# --- what is for testing where nobody says so


def test_the_choice_by_name() -> None:
    names = [f"exp{i}_num_{i * 37}" for i in range(2000)]
    chosen = chosen_by_name(names, 0.2)
    assert 340 < len(chosen) < 460
    assert chosen_by_name(reversed(names), 0.2) == chosen
    assert chosen_by_name(names[:1500], 0.2) == chosen & set(names[:1500])  # as data grows
    assert chosen_by_name(["MT_Free_1", "MT_Free_7"], 0.2) != set()


def test_the_choice_by_name_is_for_ever() -> None:
    """These are recorded: a run of today must find its test images tomorrow."""
    assert chosen_by_name(map(str, range(20)), 0.2) == {"8", "9"}


@pytest.mark.parametrize(("count", "chosen"), [(0, 0), (1, 0), (2, 1), (3, 1)])
def test_the_choice_among_few_names(count: int, chosen: int) -> None:
    for start in range(50):
        names = [f"{start}/{i}" for i in range(count)]
        assert chosen <= len(chosen_by_name(names, 0.2)) <= max(0, count - 1)


# --- names of layouts


def test_the_configuration_knows_every_layout() -> None:
    choices = DataSection.__annotations__["layout"].__args__
    assert set(choices) == {"auto", *LAYOUTS}


@pytest.mark.parametrize("layout", TREES)
def test_a_layout_by_name_is_the_one_recognised(tmp_path: Path, layout: str) -> None:
    root = TREES[layout](tmp_path)
    found = find_category(tmp_path, root.name)
    named = find_category(tmp_path, root.name, layout)
    assert (named.train, named.test, named.holdout) == (found.train, found.test, found.holdout)
    assert layout in ("mpdd", *(n for n in LAYOUTS if found.layout.startswith(LAYOUTS[n].title)))


@pytest.mark.parametrize("layout", TREES)
def test_all_categories_of_a_layout(tmp_path: Path, layout: str) -> None:
    root = TREES[layout](tmp_path)
    assert find_categories(tmp_path, layout) == find_categories(tmp_path) == [root.name]
    assert find_categories(root) == [root.name]


@pytest.mark.parametrize(
    ("layout", "expected", "there"),
    [
        ("btad", "train/ok, test/ok, test/ko and ground_truth/ko", "train/good"),
        ("visa", "Data/Images/Normal, Data/Images/Anomaly", "test/bent"),
        ("mvtec2", "validation/good and test_public/good", "ground_truth/bent"),
        ("mtd", "MT_Free/Imgs", "test/good"),
        ("kolektor", "kos01/Part0.jpg", "test/good"),
    ],
)
def test_a_layout_that_does_not_fit(tmp_path: Path, layout: str, expected: str, there: str) -> None:
    root = mvtec(tmp_path)
    said = refusal(tmp_path, "metal_nut", layout)
    assert said.startswith(f"{root}: data.layout is {layout}, so expected ")
    assert expected in said.partition("; found ")[0]
    assert there in said.partition("; found ")[2]
    assert said.endswith("data.layout=auto reads it as MVTec AD layout")


def test_a_layout_that_does_not_fit_a_folder_of_images(tmp_path: Path) -> None:
    touch(tmp_path / "cap", "a.png")
    said = refusal(tmp_path, "cap", "mvtec")
    assert said.endswith("; found no folders")


def test_folders_of_images_are_categories_if_the_layout_says_so(tmp_path: Path) -> None:
    touch(tmp_path, "nut/a.png", "cap/a.png", "cap/b.png", "notes/a.txt")
    with pytest.raises(UserError, match="folder: also for folders of nothing but images"):
        find_categories(tmp_path)
    assert find_categories(tmp_path, "folder") == ["cap", "nut"]
    assert len(find_category(tmp_path, "cap", "folder").train) == 2


# --- where data sets are found


@pytest.mark.parametrize("layout", TREES)
@pytest.mark.parametrize(
    "place",
    ["", "mvtec_anomaly_detection", "data116034", "data116034/MVTec-AD", "data1/data"],
)
def test_data_sets_in_wrappers_and_as_ai_studio_mounts_them(
    tmp_path: Path, layout: str, place: str
) -> None:
    root = TREES[layout](tmp_path / place)
    category = find_category(tmp_path, root.name)
    assert (category.name, category.root) == (root.name, root)
    assert find_categories(tmp_path) == [root.name]
    assert find_category(tmp_path, root.name.upper()).root == root
    assert not is_category(tmp_path)


def test_several_mounted_data_sets(tmp_path: Path) -> None:
    mvtec(tmp_path / "data116034/mvtec_anomaly_detection")
    btad(tmp_path / "data200")
    visa(tmp_path / "data300/VisA")
    touch(tmp_path, "bottle/train/good/0.png", "data400/train/good/0.png")
    assert find_categories(tmp_path) == ["bottle", "metal_nut", "01", "data400", "pcb1"]
    assert len(find_category(tmp_path, "pcb1").train) == 2
    assert find_category(tmp_path, "data400").name == "data400"
    assert "(found: bottle, metal_nut, 01, data400, pcb1)" in refusal(tmp_path, "wood")


def test_a_category_in_two_places(tmp_path: Path) -> None:
    one, two = mvtec(tmp_path / "data1"), mvtec(tmp_path / "data2/MVTec-AD")
    said = refusal(tmp_path, "Metal Nut")
    assert said == (
        f"{tmp_path}: 'Metal Nut' is in 2 places: {one}, {two}; give the folder above one of them "
        "as --data"
    )
    assert find_category(tmp_path / "data2", "metal_nut").root == two


def test_an_empty_folder_and_a_link_are_no_second_place(tmp_path: Path) -> None:
    root = mvtec(tmp_path / "data1")
    (tmp_path / "metal_nut").mkdir()
    assert find_category(tmp_path, "metal_nut").root == root
    (tmp_path / "metal_nut").rmdir()
    (tmp_path / "metal_nut").symlink_to(root)
    assert len(find_category(tmp_path, "metal_nut").train) == 2


def test_a_category_unpacked_into_a_folder_of_its_name(tmp_path: Path) -> None:
    for name in ("bottle", "cable"):
        touch(tmp_path / name / name, "train/good/0.png", "test/good/0.png")
    assert find_categories(tmp_path) == ["bottle", "cable"]
    assert find_category(tmp_path, "bottle").root == tmp_path / "bottle/bottle"
    touch(tmp_path / "own/photographs", "train/good/0.png")
    assert find_category(tmp_path, "own").name == "own"


@pytest.mark.parametrize("name", ["a.tar.xz", "a.zip", "a b.tar", "A.TAR.GZ", "a.tgz"])
def test_archives_are_named(tmp_path: Path, name: str) -> None:
    touch(tmp_path, f"data116034/{name}", "data116034/.hidden.zip")
    archive = tmp_path / "data116034" / name
    said = refusal(tmp_path, "bottle")
    assert said.startswith(
        f"{archive}: is an archive; unpack it with python -m datasets.download mvtec --archive "
    )
    assert f"'{archive}'" in said or " " not in name
    assert said.endswith(f" --to {tmp_path}")
    assert "download visa" in refusal(tmp_path, "candle", "visa")
    with pytest.raises(UserError, match="is an archive"):
        find_categories(tmp_path)
    mvtec(tmp_path / "data1")
    assert "no category 'bottle' (found: metal_nut)" in refusal(tmp_path, "bottle")


def test_names_of_any_bytes(tmp_path: Path) -> None:
    odd = os.fsdecode("тест [1]? *".encode())
    touch(tmp_path / odd, f"train/good/{odd}.png", f"test/{odd}/{odd}.png")
    touch(tmp_path / odd, f"ground_truth/{odd}/{odd}_mask.png")
    category = find_category(tmp_path, odd)
    assert find_categories(tmp_path) == [odd]
    assert category.test[0].masks == (tmp_path / odd / f"ground_truth/{odd}/{odd}_mask.png",)


# --- the check and the truth


def test_the_check_counts_every_part(tmp_path: Path) -> None:
    root = mvtec2(tmp_path)
    for i, file in enumerate(sorted(root.rglob("*.png"))):
        if not file.name.startswith("."):
            save(file, drawn() if "mask" in file.name else np.full((6, 8), i, np.uint8))
    report = check_category(find_category(tmp_path, "can"))
    assert report.counts == {
        "train": {"good": 2}, "validation": {"good": 1},
        "test": {"bad": 2, "good": 1, "unknown": 3},
    }  # fmt: skip
    assert report.ok
    assert report.render().splitlines()[:3] == [
        f"can: MVTec AD 2 layout in {root}",
        "  train: 2 images (good 2)",
        "  validation: 1 images (good 1)",
    ]
    (root / "validation/good/000_regular.png").write_bytes(b"broken")
    assert not check_category(find_category(tmp_path, "can")).ok


def known(category: Category) -> dict[str, tuple[int, ...]]:
    truth = KnownTruth()
    found = {}
    for record in (*category.train, *category.holdout, *category.test):
        label, mask = truth.of(record.path)
        name = str(record.path.relative_to(category.root))
        found[name] = (() if label is None else (label,)) + (() if mask is None else (mask.sum(),))
    return found


@pytest.mark.parametrize("layout", TREES)
def test_truth_of_single_images(tmp_path: Path, layout: str) -> None:
    root = TREES[layout](tmp_path)
    for file in root.rglob("*"):
        if file.suffix.lower() in (".png", ".jpg", ".bmp") and "label" not in file.name:
            save_as_png(file, drawn())
    category = find_category(tmp_path, root.name)
    records = (*category.train, *category.holdout, *category.test)
    expected = {
        str(r.path.relative_to(root)): (
            () if r.label == UNKNOWN else (r.label, 2) if r.masks else (r.label,)
        )
        for r in records
    }
    assert known(category) == expected
    assert len(expected) == len(records)


def test_no_truth_of_photographs_that_lie_anywhere(tmp_path: Path) -> None:
    """Two folders, one called good, are not yet a data set."""
    touch(tmp_path, "good/a.png", "new/a.png", "loose.png")
    touch(tmp_path / "broken", "test/cut/1.png", "test/cut/1.jpg", "test/good/a.png")
    truth = KnownTruth()
    for name in ("good/a.png", "new/a.png", "loose.png", "broken/test/cut/1.png"):
        assert truth.of(tmp_path / name) == (None, None)
