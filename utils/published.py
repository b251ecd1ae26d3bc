"""Published figures to lay beside results, and whether a run saw the same images."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from utils.names import canonical_name

_FILE = Path(__file__).with_name("published.yaml")


class Source(NamedTuple):
    """Hold what one table says of one method and backbone; figures are fractions."""

    title: str
    flow: str
    backbone: str
    note: str
    values: Mapping[str, Mapping[str, float]]  # by category or "mean", then by metric


class Size(NamedTuple):
    """Hold numbers of images of a category; `train` is None where it is not known."""

    train: int | None
    good: int
    defective: int


def sources(flow: str) -> list[Source]:
    """Return what is published of a method, with any backbone."""
    return [source for source in _sources() if source.flow == flow]


def difference(category: str, size: Size) -> str:
    """Return why a run on so many images is not comparable with figures on MVTec AD, or ""."""
    published = _sizes().get(canonical_name(category))
    if published is None:
        return "not a category of MVTec AD"
    parts = [
        f"{own} of {theirs} {kind}"
        for kind, own, theirs in zip(
            ("training images", "good test images", "defective test images"),
            size, published, strict=True,
        )
        if own not in (theirs, None)
    ]  # fmt: skip
    return ", ".join(parts)


@lru_cache(maxsize=1)
def _content() -> dict[str, Any]:
    return yaml.safe_load(_FILE.read_text(encoding="utf-8"))


def _sizes() -> dict[str, Size]:
    return {name: Size(*counts) for name, counts in _content()["mvtec_ad"].items()}


def _sources() -> list[Source]:
    return [_source(entry) for entry in _content()["sources"]]


def _source(entry: Mapping[str, Any]) -> Source:
    unit = {"fraction": 1, "percent": 100}[entry["unit"]]
    values = {
        category: {k: v / unit for k, v in zip(entry["metrics"], figures, strict=True)}
        for category, figures in entry["values"].items()
    }
    return Source(entry["title"], entry["flow"], entry["backbone"], entry["note"], values)
