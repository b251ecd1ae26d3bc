"""How time and memory grow: the exponent of every series, and their picture."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.stages import GROWTH


class Series(NamedTuple):
    """Hold what was measured while one size grew."""

    what: str
    size: str
    values: list[float]
    seconds: list[float]
    megabytes: list[float]

    def exponent(self) -> float:
        """Return the slope of the last half of the points in the log plot: 1 is a proportion."""
        last = len(self.values) // 2 - 1
        x, y = np.log(self.values[last:]), np.log(self.seconds[last:])
        return float(np.polyfit(x, y, 1)[0])


def series_of(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    """Return the series of the stored rows of stage `growth`, without those of one point."""
    measured = {row["case"]: row["sides"]["ours"] for row in rows}
    found = []
    for name, sizes in GROWTH.items():
        there = [size for size in sizes if f"{name} {size}" in measured]
        points = [measured[f"{name} {size}"] for size in there]
        what, _, size = name.partition(", ")
        seconds = [point["seconds"] for point in points]
        growth = [point["growth_mb"] or 0.0 for point in points]
        if len(there) > 1:
            found.append(Series(what, size, [float(s) for s in there], seconds, growth))
    return found


def table(series: Sequence[Series]) -> list[str]:
    """Return lines of Markdown."""
    lines = [
        "| what | grows with | from, to | seconds | MB | exponent |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {s.what} | {s.size} | {s.values[0]:g}, {s.values[-1]:g} | "
        f"{s.seconds[0]:.3g}, {s.seconds[-1]:.3g} | {s.megabytes[0]:.0f}, {s.megabytes[-1]:.0f} | "
        f"{s.exponent():.2f} |"
        for s in series
    ]
    return lines


def picture(series: Sequence[Series]) -> str:
    """Return an SVG: time and memory over each size, both on logarithmic axes."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    sizes = list(dict.fromkeys(s.size for s in series))
    with mpl.rc_context({"svg.hashsalt": "growth", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(
            2, len(sizes), figsize=(2.4 * len(sizes), 5), layout="constrained", squeeze=False
        )
        for column, size in enumerate(sizes):
            for each in (s for s in series if s.size == size):
                for row, values in enumerate((each.seconds, each.megabytes)):
                    axes[row][column].loglog(each.values, values, marker="o", label=each.what)
            axes[1][column].set_xlabel(size)
            axes[0][column].legend(fontsize=7)
        axes[0][0].set_ylabel("seconds")
        axes[1][0].set_ylabel("MB")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()
