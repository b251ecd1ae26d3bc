"""Charts as SVG inside the page: curves, and scores of good and defective images with cuts."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.html.page import Markup, element, joined
from utils.visualize import heat_map

WIDTH, HEIGHT = 330, 250
LEFT, RIGHT, TOP, BOTTOM = 42, 322, 10, 208  # of the area inside the axes
BINS = 40
WIDEST = 2.0  # of the axis of a histogram, in spans of all but the highest twentieth of the scores


class Line(NamedTuple):
    """Hold one curve: what it is called below the chart, and its points, both (P,)."""

    label: str
    x: NDArray
    y: NDArray


class Cut(NamedTuple):
    """Hold a threshold on the scores; `own` is the one of the run, others know the labels."""

    label: str
    value: float
    own: bool


def curves(title: str, lines: Sequence[Line], across: str, up: str, end: float = 1.0) -> Markup:
    """Draw up to two curves over 0 … `end`; both axes start at 0, the upright one ends at 1."""
    drawn = [
        element("path", d=_path(line.x / end, line.y), class_=style)
        for line, style in zip(lines, ("one", "two"), strict=False)
    ]
    ticks = [(0.0, "0"), (0.5, f"{end / 2:g}"), (1.0, f"{end:g}")]
    legend = [
        element("li", element("span", class_=f"swatch {style}"), line.label)
        for line, style in zip(lines, ("one", "two"), strict=False)
    ]
    name = f"{title}: {'; '.join(line.label for line in lines)}"
    return _figure(title, name, [*_axes(ticks, across, up), *drawn], legend)


def histogram(title: str, good: NDArray, bad: NDArray, cuts: Sequence[Cut]) -> Markup:
    """Draw scores of good images upwards and of defective ones downwards, cuts across both."""
    low, high, open_end = _span(np.concatenate([good, bad]), [cut.value for cut in cuts])
    edges = np.linspace(low, high, BINS + 1)
    counts = [np.histogram(np.minimum(s, high), edges)[0] for s in (good, bad)]
    most = max(1, *(int(c.max()) for c in counts))
    parts = [*_bars(counts[0], most, "good", -1), *_bars(counts[1], most, "bad", 1)]
    middle = (TOP + BOTTOM) / 2
    parts.append(element("path", d=f"M{LEFT} {middle}H{RIGHT}", class_="grid"))
    for share, text in ((0.0, f"{low:.3g}"), (1.0, f"{'≥ ' * open_end}{high:.3g}")):
        anchor = "start" if share == 0 else "end"
        parts.append(_text(_x(share), BOTTOM + 17, text, anchor))
    parts.append(_text(LEFT - 6, TOP + 10, str(most), "end"))
    parts.append(_text(LEFT - 6, BOTTOM, str(most), "end"))
    parts.append(_text(_x(0.5), HEIGHT - 6, "score", "middle"))
    legend = [
        element("li", element("span", class_="swatch good"), f"good images ({good.size}), upwards"),
        element("li", element("span", class_="swatch bad"), f"defective ({bad.size}), downwards"),
    ]
    for place, cut in enumerate(cuts):
        key = "ABCDEFGH"[place]
        parts += _cut((cut.value - low) / (high - low), key, place, cut.own)
        legend.append(element("li", element("strong", key), f" {cut.label}"))
    name = f"{title}: {good.size} good and {bad.size} defective images"
    return _figure(title, name, parts, legend)


def missing(title: str, reason: str) -> Markup:
    """Say why there is no chart."""
    return element(
        "figure", element("figcaption", title), element("p", f"n/a: {reason}", class_="soft"),
        class_="chart",
    )  # fmt: skip


def with_note(chart: Markup, note: str) -> Markup:
    """Add a line below a chart."""
    line = element("p", note, class_="soft")
    return Markup(chart.removesuffix("</figure>") + line + "</figure>")


def colour_bar(low: float, high: float, level: float | None) -> Markup:
    """Show the fixed scale of the maps, with a mark at the pixel threshold where it is on it."""
    stops = heat_map(np.linspace(0, 1, 17)[None], 0, 1)[0]
    gradient = ", ".join(f"rgb({r} {g} {b})" for r, g, b in stops.tolist())
    mark: str = ""
    if level is not None and low <= level <= high:
        mark = element("i", style=f"left: {(level - low) / (high - low):.1%}")
    bar = element("span", mark, style=f"background: linear-gradient(to right, {gradient})")
    return element("span", f"{low:.3g}", bar, f"{high:.3g}", class_="scale")


def _figure(title: str, name: str, drawing: Sequence[Markup], legend: Sequence[Markup]) -> Markup:
    drawn = element(
        "svg", element("title", name), *drawing,
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=name,
    )  # fmt: skip
    return element(
        "figure", element("figcaption", title), drawn, element("ul", *legend), class_="chart"
    )


def _axes(ticks: Sequence[tuple[float, str]], across: str, up: str) -> list[Markup]:
    parts = [element("path", d=f"M{_x(s)} {TOP}V{BOTTOM}", class_="grid") for s, _ in ticks]
    for share in (0.0, 0.5, 1.0):
        parts.append(element("path", d=f"M{LEFT} {_y(share)}H{RIGHT}", class_="grid"))
        parts.append(_text(LEFT - 6, _y(share) + 4, f"{share:g}", "end"))
    for place, (share, text) in enumerate(ticks):
        anchor = ("start", "middle", "end")[place]
        parts.append(_text(_x(share), BOTTOM + 17, text, anchor))
    parts.append(_text(_x(0.5), HEIGHT - 6, across, "middle"))
    middle = (TOP + BOTTOM) / 2
    turned = element(
        "text", up, x=12, y=middle, text_anchor="middle", transform=f"rotate(-90 12 {middle})"
    )
    return [*parts, turned]


def _bars(counts: NDArray, most: int, style: str, direction: int) -> list[Markup]:
    middle, half = (TOP + BOTTOM) / 2, (BOTTOM - TOP) / 2
    width = (RIGHT - LEFT) / counts.size
    bars = []
    for place, count in enumerate(counts.tolist()):
        height = max(count / most * (half - 2), 1.5) if count else 0
        top = middle if direction > 0 else middle - height
        if count:
            x, y = f"{LEFT + place * width + 0.4:.1f}", f"{top:.1f}"
            size = {"width": f"{width - 0.8:.1f}", "height": f"{height:.1f}"}
            bars.append(element("rect", x=x, y=y, class_=style, **size))
    return bars


def _cut(share: float, key: str, place: int, own: bool) -> list[Markup]:
    x = _x(min(max(share, 0.0), 1.0))
    line = element("path", d=f"M{x} {TOP}V{BOTTOM}", class_="cut" if own else "oracle")
    side, anchor = (x - 4, "end") if share > 0.9 else (x + 4, "start")
    return [line, element(
        "text", key, x=f"{side:.1f}", y=TOP + 10 + 13 * place, text_anchor=anchor, class_="key"
    )]  # fmt: skip


def _span(scores: NDArray, cuts: Sequence[float]) -> tuple[float, float, bool]:
    """Return the ends of the axis, and whether scores lie beyond the upper one."""
    values = np.concatenate([scores, cuts])
    low, top = float(values.min()), float(values.max())
    usual = float(np.quantile(scores, 0.95))
    high = max(low + WIDEST * (usual - low), *cuts, -math.inf)
    if high >= top or high <= low:
        return low, top if top > low else low + 1.0, False
    return low, high, True


def _path(x: NDArray, y: NDArray) -> str:
    points = [f"{_x(a)} {_y(b)}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    return "M" + "L".join(points)


def _x(share: float) -> float:
    return round(LEFT + share * (RIGHT - LEFT), 1)


def _y(share: float) -> float:
    return round(BOTTOM - share * (BOTTOM - TOP), 1)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return element("text", text, x=x, y=y, text_anchor=anchor)


def side_by_side(parts: Sequence[Markup]) -> Markup:
    """Put charts beside each other as far as there is room."""
    return element("div", joined(parts), class_="charts")
