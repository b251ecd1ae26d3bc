"""VisA as it is published: folders of images and a CSV file that says what is for testing."""

import csv
from pathlib import Path, PurePosixPath

from datasets.records import DEFECTIVE, NORMAL, Category, Record, some
from utils.errors import UserError
from utils.image import byte_order
from utils.names import canonical_name

_COLUMNS = ("object", "split", "label", "image", "mask")
_KINDS = {  # (split, label) -> what it means; there is nothing else in the file
    ("train", "normal"): NORMAL, ("test", "normal"): NORMAL, ("test", "anomaly"): DEFECTIVE,
}  # fmt: skip
Row = dict[str, str]


def has_visa_folders(folder: Path) -> bool:
    """Tell whether a category's folder is one of VisA's."""
    return (folder / "Data" / "Images").is_dir()


def read_visa(folder: Path, title: str) -> Category:
    """Read a category of VisA, divided by the rows of `split_csv/1cls.csv` beside its folder.

    Raise UserError if that file is missing or damaged, or for files it names that are not there.
    """
    name = folder.resolve().name
    file = folder.absolute().parent / "split_csv" / "1cls.csv"
    rows = [row for row in _rows(file) if canonical_name(row["object"]) == canonical_name(name)]
    if not rows:
        raise UserError(f"{file}: no rows of '{name}'; the folder must be called like the object")
    parts: dict[str, list[Record]] = {"train": [], "test": []}
    for row in rows:
        parts[row["split"]].append(_record(folder, row, file))
    for records in parts.values():
        records.sort(key=lambda record: byte_order(record.path))
    named = [path for part in parts.values() for r in part for path in (r.path, *r.masks)]
    missing = [path for path in named if not path.is_file()]
    if missing:
        raise UserError(
            f"{file}: names {len(missing)} file(s) that are not there: {some(missing)}; "
            "unpack the archive again"
        )
    return Category(name, folder, title, tuple(parts["train"]), tuple(parts["test"]))


def _rows(file: Path) -> list[Row]:
    if not file.is_file():
        raise UserError(
            f"{file}: missing; VisA's archive has it: it says which images are for testing, so "
            "put it there, beside the folders of the categories"
        )
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, skipinitialspace=True)
            columns = [(column or "").strip() for column in reader.fieldnames or ()]
            if not set(_COLUMNS) <= set(columns):
                raise UserError(
                    f"{file}: columns are {', '.join(columns) or 'missing'}; "
                    f"expected {', '.join(_COLUMNS)}"
                )
            reader.fieldnames = columns
            return [{key: (row[key] or "").strip() for key in _COLUMNS} for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a CSV file in UTF-8 ({error}); unpack it again") from None


def _record(folder: Path, row: Row, file: Path) -> Record:
    label = _KINDS.get((row["split"], row["label"]))
    if label is None:
        known = ", ".join(" ".join(kind) for kind in _KINDS)
        raise UserError(
            f"{file}: {row['image']} is '{row['split']} {row['label']}'; expected one of {known}"
        )
    image = _place(folder, row["image"], file)
    if label == NORMAL:
        return Record(image, NORMAL, "good")
    masks = (_place(folder, row["mask"], file),) if row["mask"] else ()
    return Record(image, DEFECTIVE, row["label"], masks)


def _place(folder: Path, text: str, file: Path) -> Path:
    """Return the file that a row names, `<object>/Data/…`, in the category's own folder."""
    path = PurePosixPath(text.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or len(path.parts) < 2:
        raise UserError(f"{file}: names '{text}'; expected <object>/Data/Images/… in every row")
    return folder.joinpath(*path.parts[1:])
