"""Fetch public data sets, or unpack their archives: `python -m datasets.download mvtec`."""

import os
import re
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from datasets.layouts import recognise
from datasets.records import subfolders
from datasets.sources import DATA_SETS, DataSet, Source, choose, read_overrides
from utils import cli
from utils.archive import BadArchive, Parts, unpack
from utils.download import NoRoom, fetch, file_hash, require_room
from utils.errors import UserError
from utils.names import canonical_name, report_order
from utils.partial import alone

URLS_VARIABLE = "FLOWAD_DATA_URLS"
LARGEST = 60 * 10**9  # bytes of an archive
GROWTH = 1.2  # by unpacking; images hardly shrink
_ALIASES = {"mvtec_ad": "mvtec", "mvtec_ad_2": "mvtec2"}
_STRAYS = re.compile(r"__MACOSX|\._.*|\.DS_Store")  # of macOS
_NOTICES = re.compile(r"(licen[cs]e|readme).*", re.IGNORECASE)


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.prog = "python -m datasets.download"
    parser.add_argument(
        "data_set", type=lambda name: _ALIASES.get(name, name), choices=list(DATA_SETS)
    )
    parser.add_argument(
        "-cat", "--category", nargs="+", help="all, or some; mvtec has an archive of each"
    )
    parser.add_argument(
        "--to", type=Path, help="gets the folders of categories, if not data or data/<data_set>"
    )
    parser.add_argument(
        "--urls", type=Path, default=os.environ.get(URLS_VARIABLE) or None,
        help=f"YAML file of other addresses, if not in {URLS_VARIABLE}",
    )  # fmt: skip
    parser.add_argument("--archive", nargs="+", type=Path, help="unpack these, fetch nothing")
    cli.add_flag(parser, "--keep", "keep the archives fetched")
    cli.add_flag(parser, "--overwrite", "replace categories that are there")
    args = parser.parse_args(argv)
    args.category = None if "all" in (args.category or ()) else args.category
    args.to = args.to or Path("data", *([args.data_set] if args.data_set != "mvtec" else []))
    return args


def main(argv: Sequence[str] | None) -> int:
    """Fetch or unpack the wanted categories; those that are there stay as they are."""
    args = parse(argv)
    data_set = (read_overrides(args.urls) if args.urls else DATA_SETS)[args.data_set]
    names = args.category or ["all"]
    wanted = choose(names, data_set.categories, "--category", data_set.title)
    if not args.archive and not data_set.whole:
        raise UserError(
            f"{data_set.title} has no address known here: get it from its authors by hand, then "
            f"run {_command(args)} --archive FILE"
        )
    lock = args.to / f".{args.data_set}.lock"
    with alone(lock):
        try:
            fill(args, data_set, wanted)
        finally:
            lock.unlink(missing_ok=True)
    return 0


def fill(args: Namespace, data_set: DataSet, wanted: Sequence[str]) -> None:
    """Bring the wanted categories that are not there yet, and say what came of it."""
    pending = [name for name in wanted if args.overwrite or not (args.to / name).exists()]
    _tell_left([args.to / name for name in wanted if name not in pending])
    if wanted and not pending:
        return
    print(f"{data_set.title}: {data_set.licence}")
    if args.archive:
        installed = [n for path in args.archive for n in install(path, args, data_set, pending)]
    else:
        installed = download(args, data_set, pending)
    missing = [name for name in pending if name not in installed]
    if missing and args.category:
        raise UserError(f"{', '.join(missing)}: not in what was unpacked; see --category")
    print(f"{args.to}: {', '.join(report_order(installed)) or 'nothing'} unpacked")


def download(args: Namespace, data_set: DataSet, pending: Sequence[str]) -> list[str]:
    """Fetch and unpack the archives of the pending categories; return their names."""
    parts = [data_set.parts[name] for name in pending if name in data_set.parts]
    single = bool(args.category) and len(parts) == len(pending)
    sources = parts if single else [data_set.whole] if data_set.whole else []
    growth = GROWTH if single else GROWTH * len(pending) / len(data_set.categories)
    installed = []
    for number, source in enumerate(sources):
        archive = args.to / source.file
        if fresh := not _is_whole(archive, source):
            try:
                _fetch(source, archive, growth)
            except NoRoom:
                raise
            except UserError as error:
                remedy = _by_hand(args, sources[number:], single)
                raise UserError(f"{error}; {remedy}") from None
        try:
            installed += install(archive, args, data_set, pending)
        except BadArchive as error:
            if not fresh or source.sha256:
                raise
            archive.unlink()
            raise BadArchive(f"{error}; removed") from None
        if fresh and not args.keep:
            archive.unlink()
    return installed


def _fetch(source: Source, archive: Path, growth: float) -> None:
    """Fetch an archive from the first address that has it; raise UserError that names all."""
    failures = []
    for url in source.urls:
        try:
            fetch(
                url, archive, LARGEST, lambda path: _check(path, source),
                verified=source.sha256 is not None, unpacked=growth,
            )  # fmt: skip
        except NoRoom:
            raise
        except UserError as error:
            failures.append(str(error))
            continue
        if source.sha256 is None:
            sha256 = file_hash(archive)
            print(f"{url}: unverified, as no sha256 is published; its sha256 is {sha256}")
        return
    raise UserError("; ".join(failures))


def _is_whole(archive: Path, source: Source) -> bool:
    """Tell whether an archive is there already, and the right one as far as is known."""
    if not archive.is_file():
        return False
    try:
        _check(archive, source)
    except UserError as error:
        print(f"{archive}: {error}; fetching it again")
        return False
    print(f"{archive}: there already, and not fetched again")
    return True


def _check(path: Path, source: Source) -> None:
    if source.sha256 and (found := file_hash(path)) != source.sha256:
        raise UserError(f"wrong content, with sha256 {found} in place of {source.sha256}")


def _command(args: Namespace) -> str:
    return f"python -m datasets.download {args.data_set} --to {quote(str(args.to))}"


def _by_hand(args: Namespace, sources: Sequence[Source], single: bool) -> str:
    """Return what to do if no address answers."""
    urls = " and ".join(source.urls[0] for source in sources)
    files = " ".join(quote(str(args.to / source.file)) for source in sources)
    whole = f"; the whole set has other addresses: {_command(args)}" if single else ""
    return (
        f"run it again to go on; or without network: get {urls} by hand, put it into {args.to} "
        f"and run {_command(args)} --archive {files}{whole}"
    )


def install(archive: Path, args: Namespace, data_set: DataSet, pending: Sequence[str]) -> list[str]:
    """Unpack the pending categories of an archive, each whole or not at all; return their names.

    So are categories that the data set does not list, if none are named. Raise UserError if there
    is no category at all.
    """
    unwanted = {name for name in data_set.categories if name not in pending}
    seen: set[str] = set()
    with _unpacked(archive, args, _filter(unwanted, seen)) as folder:
        found = _categories(folder, archive.name.partition(".")[0] or args.data_set)
        if not found and not seen:
            inside = ", ".join(sub.name for sub in subfolders(folder)[:5])
            raise UserError(
                f"{archive}: no category in it (looked for <category>/train and other layouts); "
                f"found {inside or 'no folders'}"
            )
        old = folder.with_name("old")
        old.mkdir()
        top = next(iter(found.values())).parent if found else folder
        only = pending[0] if args.category and len(pending) == len(found) == 1 else ""
        named = {_name(name, only, data_set): sub for name, sub in found.items()}
        listed = data_set.categories if not args.category else named  # others come only unasked
        taken = {n: sub for n, sub in named.items() if n in pending or n not in listed}
        for name in data_set.beside:  # first: a category is of no use without
            if taken and (top / name).is_dir():
                _put(top / name, args.to / name, old, args)
        done = [name for name, sub in taken.items() if _put(sub, args.to / name, old, args)]
        for file in sorted(top.iterdir()):
            if _NOTICES.fullmatch(file.name) and not (args.to / file.name).exists():
                file.rename(args.to / file.name)
    return done


def _name(found: str, only: str, data_set: DataSet) -> str:
    """Return the name of a category in the data set's spelling."""
    known = canonical_name(found) in data_set.categories
    return canonical_name(found) if known else only or found


def _put(source: Path, target: Path, old: Path, args: Namespace) -> bool:
    """Move a folder to its place, what is replaced to `old`; return whether it was moved."""
    if target.exists():
        if not args.overwrite:
            _tell_left([target])
            return False
        target.rename(old / target.name)
    source.rename(target)
    return True


@contextmanager
def _unpacked(archive: Path, args: Namespace, keep: Callable[[Parts], bool]) -> Iterator[Path]:
    """Yield a folder on the target's disk with the content of an archive, then remove it."""
    for stale in args.to.glob(f".{args.data_set}-*.part"):  # of a killed process
        shutil.rmtree(stale)
    if not args.category and archive.is_file():
        require_room(args.to, GROWTH * archive.stat().st_size)
    with tempfile.TemporaryDirectory(
        dir=args.to, prefix=f".{args.data_set}-", suffix=".part"
    ) as temporary:
        folder = Path(temporary, "content")
        folder.mkdir()
        unpack(archive, folder, keep)
        if hasattr(os, "sync"):  # a category that is there is whole, whatever happens next
            os.sync()
        yield folder


def _filter(unwanted: set[str], seen: set[str]) -> Callable[[Parts], bool]:
    """Return what leaves out strays and unwanted categories, of which `seen` gets the names."""

    def keep(parts: Parts) -> bool:
        names = unwanted.intersection(canonical_name(part) for part in parts[:2])
        seen.update(names)
        return not names and not any(_STRAYS.fullmatch(part) for part in parts)

    return keep


def _categories(folder: Path, name: str) -> dict[str, Path]:
    """Return the folders of categories, whatever wraps them; `name` is that of `folder`."""
    while not recognise(folder):
        inside = subfolders(folder)
        found = {sub.name: sub for sub in inside if recognise(sub)}
        if found or len(inside) != 1:
            return found
        folder, name = inside[0], inside[0].name
    return {name: folder}


def _tell_left(folders: Sequence[Path]) -> None:
    if folders:
        shown = ", ".join(map(str, folders))
        print(f"{shown}: there already and left alone; --overwrite replaces")


if __name__ == "__main__":
    cli.run(main)
