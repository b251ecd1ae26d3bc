"""Fetch the models that U-Flow's authors released for MVTec AD: PyTorch checkpoints, stored only.

They go to models/auc, models/pro and models/miou, one per category, named after what each was
selected by.
"""

import os
import re
import zipfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets.sources import choose
from utils import cli
from utils.download import Denied, Missing, fetch
from utils.errors import UserError
from utils.names import CATEGORIES

KINDS = ("auc", "pro", "miou")
BASE_URL_VARIABLE = "FLOWAD_MODELS_URL"
LARGEST = 4 * 10**9  # bytes; both frozen CaiT networks alone take 1.6 GB
NOTICE = (
    "These models belong to U-Flow and are covered by the AGPL-3.0 licence, unlike this project; "
    "read it before passing them on or letting others use them over a network."
)


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "-cat", "--categories", nargs="+", default=["all"], help="categories or all"
    )
    parser.add_argument(
        "-overwrite", "--force-overwrite", nargs="?", const=True, default=False, type=cli.flag,
        help="fetch again what is there",
    )  # fmt: skip
    parser.add_argument("--base-url", help=f"of a mirror, if not in {BASE_URL_VARIABLE}")
    parser.add_argument("--models_dir", default="models", help="gets the folders auc, pro, miou")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None) -> int:
    """Fetch the models of the wanted categories; the ones that are there stay as they are."""
    args = parse(argv)
    folder = Path(args.models_dir)
    names = choose(args.categories, CATEGORIES, "-cat", "MVTec AD")
    files = [f"{kind}/{name}.ckpt" for kind in KINDS for name in names]
    if (folder / "iou").is_dir():
        print(f"{folder / 'iou'}: U-Flow's other name of miou; rename it to keep its models")
    targets = {file: folder / file for file in files}
    if not args.force_overwrite:
        targets = {file: path for file, path in targets.items() if not path.exists()}
    missing = fetch_all(base_url(args.base_url, folder), targets) if targets else []
    fetched = len(targets) - len(missing)
    print(f"{fetched} models fetched, {len(files) - len(targets)} were there already, in {folder}")
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"the server has no {', '.join(missing[:3])}{more}; fetch by hand into {folder}"
        )
    return 0


def base_url(given: str | None, folder: Path) -> str:
    """Return the address that the names of files are appended to."""
    address = given or os.environ.get(BASE_URL_VARIABLE, "")
    if not address:
        raise UserError(
            "the released models lie on a cloud drive, linked from U-Flow's README: download them "
            f"by hand into {folder}, keeping the sub-folders {', '.join(KINDS)}; or give the "
            "address of a mirror with --base-url"
        )
    if not re.match(r"https?://[^/]", address):
        raise UserError(f"--base-url {address}: must begin with http:// or https://")
    return address.rstrip("/")


def fetch_all(base: str, targets: Mapping[str, Path]) -> list[str]:
    """Fetch every file; return those that the server does not have."""
    print(NOTICE)
    missing = []
    for file, path in targets.items():
        try:
            fetch(f"{base}/{file}", path, LARGEST, check_model)
        except Missing:
            missing.append(file)
        except Denied as error:
            raise UserError(
                f"{error}; after too many downloads wait about 24 hours, or fetch the folder by "
                f"hand into {path.parents[1]}, keeping sub-folders"
            ) from None
    return missing


def check_model(path: Path) -> None:
    """Raise UserError unless a file looks like a whole PyTorch checkpoint; nothing is loaded."""
    with path.open("rb") as file:
        legacy = file.read(2) == b"\x80\x02"  # a pickle, as PyTorch wrote before 1.6
    if not legacy and not zipfile.is_zipfile(path):
        raise UserError("what was received is no PyTorch checkpoint, or only a part of one")


if __name__ == "__main__":
    cli.run(main)
