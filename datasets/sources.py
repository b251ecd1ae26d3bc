"""Where public data sets lie, what they hold, and what is known of their licences."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from utils.errors import UserError
from utils.names import CATEGORIES, canonical_name

DRIVE = "https://www.mydrive.ch/shares"  # where MVTec's are
OLD_SHARE = f"{DRIVE}/38536/3830184030e49fe74747669442f0f282/download"


@dataclass(frozen=True)
class Source:
    """One archive: addresses, in the order to try them, and its sha256 if that is published."""

    urls: tuple[str, ...]
    sha256: str | None = None

    @property
    def file(self) -> str:
        """Return what to call the archive."""
        return Path(urlsplit(self.urls[0]).path).name


@dataclass(frozen=True)
class DataSet:
    """One data set: `whole` in one archive, and `parts`, archives of single categories."""

    title: str
    categories: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()  # folders that all categories share
    whole: Source | None = None  # None: its authors hand it out otherwise
    parts: Mapping[str, Source] = field(default_factory=dict)
    licence: str = "its licence is with its authors; read it before use"


def _part(category: str, number: str, share: str = OLD_SHARE) -> Source:
    return Source((f"{share}/{number}/{category}.tar.xz",))


_MVTEC = DataSet(
    "MVTec AD",
    CATEGORIES,
    whole=Source(
        (
            f"{DRIVE}/150996/b52ecdcbf521176e9db9c731f2304b27/download/420938113-1629960298/"
            "mvtec_anomaly_detection.tar.xz",
            f"{OLD_SHARE}/420938113-1629952094/mvtec_anomaly_detection.tar.xz",
        ),
        "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
    ),
    parts={
        "carpet": _part("carpet", "420937484-1629951672"),
        "grid": _part("grid", "420937487-1629951814"),
        "leather": _part("leather", "420937607-1629951964"),
        "tile": _part("tile", "420938133-1629953189"),
        "wood": _part("wood", "420938383-1629953354"),
        "bottle": _part("bottle", "420937370-1629951468"),
        "cable": _part("cable", "420937413-1629951498"),
        "capsule": _part("capsule", "420937454-1629951595"),
        "hazelnut": _part("hazelnut", "420937545-1629951845"),
        "metal_nut": _part("metal_nut", "420937637-1629952063"),
        "pill": _part(
            "pill",
            "420938129-1629953099",
            f"{DRIVE}/43421/11a215a5749fcfb75e331ddd5f8e43ee/download",
        ),
        "screw": _part("screw", "420938130-1629953152"),
        "toothbrush": _part("toothbrush", "420938134-1629953256"),
        "transistor": _part("transistor", "420938166-1629953277"),
        "zipper": _part("zipper", "420938385-1629953449"),
    },
    licence="licence CC BY-NC-SA 4.0: no commercial use; "
    "https://www.mvtec.com/company/research/datasets/mvtec-ad",
)
# By the names of `data.layout`.
DATA_SETS = {
    "mvtec": _MVTEC,
    "visa": DataSet(
        "VisA",
        (
            "candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2",
            "pcb1", "pcb2", "pcb3", "pcb4", "pipe_fryum",
        ),
        ("split_csv",),
        Source(
            ("https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar",),
            "2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362",
        ),
    ),
    "btad": DataSet(
        "BTAD",
        ("01", "02", "03"),
        whole=Source(
            ("https://avires.dimi.uniud.it/papers/btad/btad.zip",),
            "461c9387e515bfed41ecaae07c50cf6b10def647b36c9e31d239ab2736b10d2a",
        ),
    ),
    "mvtec2": DataSet(
        "MVTec AD 2",
        (
            "can", "fabric", "fruit_jelly", "rice", "sheet_metal", "vial", "wallplugs", "walnuts",
        ),
        whole=Source(
            (
                f"{DRIVE}/150997/701c90d3aea6588f404936e32a674602/download/466712769-1743429042/"
                "mvtec_ad_2.tar.gz",
            ),
            "c0ded99ef32bfc8e352d52beb44515e5b292b8598cb963aadfa91ca0763505e4",
        ),
    ),
    "mpdd": DataSet(
        "MPDD",
        ("bracket_black", "bracket_brown", "bracket_white", "connector", "metal_plate", "tubes"),
    ),
    "mtd": DataSet("the magnetic tile defects"),
    "kolektor": DataSet("KolektorSDD"),
}  # fmt: skip


def choose(names: Sequence[str], known: Sequence[str], flag: str, title: str) -> list[str]:
    """Return categories of a data set in its spelling; "all" means all of them."""
    if "all" in names:
        return list(known)
    found = dict.fromkeys(canonical_name(name) for name in names)
    for name in found:
        if name not in known:
            if not known:
                raise UserError(f"{flag} {name}: {title} is one category; leave {flag} out")
            near = difflib.get_close_matches(name, known, 1) or [f"one of {', '.join(known)}"]
            raise UserError(f"{flag} {name}: no category of {title}; did you mean {near[0]}?")
    return list(found)


def read_overrides(path: Path) -> dict[str, DataSet]:
    """Return all data sets, with addresses and hashes from a YAML file in place of ours.

    It maps names of data sets, or of categories of MVTec AD, to `{url: …, sha256: …}`; `url` may
    be a list. Without `sha256` the published one holds; `null` means that it is not known.
    """
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable YAML file ({reason})") from None
    if not isinstance(plain, dict):
        raise UserError(f"{path}: must hold lines like 'mvtec: {{url: https://…, sha256: …}}'")
    sets = dict(DATA_SETS)
    for name, entry in plain.items():
        if name in sets:
            source = _source(path, name, entry, sets[name].whole)
            sets[name] = replace(sets[name], whole=source)
        elif name in CATEGORIES:
            parts = sets["mvtec"].parts
            source = _source(path, name, entry, parts[name])
            sets["mvtec"] = replace(sets["mvtec"], parts={**parts, name: source})
        else:
            near = difflib.get_close_matches(str(name), [*sets, *CATEGORIES], 1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sets)}"
            raise UserError(f"{path}: no data set or category '{name}'; {hint}")
    return sets


def _source(path: Path, name: str, entry: Any, published: Source | None) -> Source:
    entry = {"url": entry} if isinstance(entry, str | list) else entry
    if not isinstance(entry, dict) or not set(entry) <= {"url", "sha256"}:
        raise UserError(f"{path}: '{name}' is {entry!r}; it takes url and sha256")
    known = published or Source(())
    urls = entry.get("url", list(known.urls))
    urls = [urls] if isinstance(urls, str) else urls
    sha256 = entry.get("sha256", known.sha256)
    if not isinstance(urls, list) or not urls or not all(_is_address(url) for url in urls):
        raise UserError(f"{path}: {name}.url is {urls!r}; it must be http(s)://…/<archive>")
    if sha256 is not None and not _is_hash(sha256):
        raise UserError(f"{path}: {name}.sha256 is {sha256!r}; it has 64 hexadecimal digits")
    return Source(tuple(urls), sha256.lower() if sha256 else None)


def _is_address(url: Any) -> bool:
    try:
        parts = urlsplit(url) if isinstance(url, str) else urlsplit("")
    except ValueError:
        return False
    name = parts.path.rpartition("/")[2]
    return parts.scheme in ("http", "https") and bool(parts.netloc) and name not in ("", ".", "..")


def _is_hash(text: Any) -> bool:
    return (
        isinstance(text, str) and len(text) == 64 and set(text.lower()) <= set("0123456789abcdef")
    )
