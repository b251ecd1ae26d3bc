"""Names of categories: one spelling for comparisons, and the order of MVTec AD's tables."""

from collections.abc import Iterable

# Order and groups of MVTec AD's published tables.
TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
OBJECTS = (
    "bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "screw", "toothbrush",
    "transistor", "zipper",
)  # fmt: skip
CATEGORIES = TEXTURES + OBJECTS


def canonical_name(name: str) -> str:
    """Return a category name in the data set's spelling: "Metal Nut" -> "metal_nut"."""
    return "_".join(name.replace("-", " ").replace("_", " ").lower().split())


def report_order(names: Iterable[str]) -> list[str]:
    """Sort category names: those of MVTec AD first, in the order of its tables, others by name."""
    rank = {name: i for i, name in enumerate(CATEGORIES)}
    return sorted(names, key=lambda name: (rank.get(canonical_name(name), len(rank)), name))
