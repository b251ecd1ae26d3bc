"""Draw the figures of the documentation: `python docs/figures/draw.py` writes them beside itself.

Plain Python and nothing drawn by chance: the same files, byte for byte, on every machine.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).resolve().parent
FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
LETTER = 0.58  # width of an average letter, in sizes of the font
SIZE = 13
INK = "#1f2933"
LINE = "#52606d"
# what a box is -> fill, border
KINDS = {
    "data": ("#ffffff", "#9aa5b1"),
    "frozen": ("#e3ebf6", "#4a6fa5"),
    "trained": ("#fdeed6", "#c07f1e"),
    "computed": ("#e4f3e8", "#3f8f5b"),
}
LEARNT = {
    "frozen": "frozen", "trained": "trained (permutations are not)",
    "computed": "computed, nothing learnt",
}  # fmt: skip
Point = tuple[float, float]


class Sheet:
    """Collect boxes, arrows and texts on a white card, which is readable on dark pages too."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size = (width, height)
        self.title = title
        self.shapes: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, text: str, kind: str = "data") -> None:
        """Draw a box with lines of text in its middle; raise ValueError if they do not fit."""
        fill, border = KINDS[kind]
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="5" fill="{fill}" '
            f'stroke="{border}" stroke-width="1.4"/>'
        )
        lines = text.split("\n")
        if max(map(len, lines)) * SIZE * LETTER > w or len(lines) * (SIZE + 3) > h:
            raise ValueError(f"box of {w:g} × {h:g} is too small for {text!r}")
        top = y + h / 2 - (len(lines) - 1) * (SIZE + 3) / 2 + SIZE * 0.35
        for number, line in enumerate(lines):
            self.text(x + w / 2, top + number * (SIZE + 3), line)

    def text(
        self, x: float, y: float, text: str, anchor: str = "middle", size: int = SIZE,
        color: str = INK, bold: bool = False,
    ) -> None:  # fmt: skip
        """Write one line, its base at y."""
        weight = ' font-weight="bold"' if bold else ""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" '
            f'fill="{color}"{weight}>{escape(text)}</text>'
        )

    def arrow(self, *points: Point, dashed: bool = False) -> None:
        """Draw a line through the points, with a head at the last one."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.shapes.append(
            f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="1.4"{dash} '
            f'marker-end="url(#head)"/>'
        )

    def line(self, *points: Point, color: str = LINE, width: float = 1.4) -> None:
        """Draw a line through the points."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.shapes.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"/>'
        )

    def bar(self, x: float, y: float, w: float, h: float, color: str) -> None:
        """Draw a filled rectangle."""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{color}"/>'
        )

    def legend(self, x: float, y: float, **meanings: str) -> None:
        """Draw a small box of every kind with what it means beside it."""
        for kind, meaning in meanings.items():
            fill, border = KINDS[kind]
            self.shapes.append(
                f'<rect x="{x:g}" y="{y:g}" width="16" height="12" rx="3" fill="{fill}" '
                f'stroke="{border}"/>'
            )
            self.text(x + 22, y + 10.5, meaning, "start", 12, LINE)
            x += 46 + len(meaning) * 12 * LETTER

    def svg(self) -> str:
        """Return the file."""
        width, height = self.size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="{FONT}" role="img">\n'
            f"<title>{escape(self.title)}</title>\n"
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="{LINE}"/>'
            "</marker></defs>\n"
            f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="12" fill="#ffffff" '
            'stroke="#cbd2d9"/>\n'
        )
        return head + "\n".join(self.shapes) + "\n</svg>\n"


def main() -> None:
    """Write all figures."""
    for name, sheet in figures().items():
        (HERE / f"{name}.svg").write_text(sheet.svg(), encoding="utf-8", newline="\n")


def figures() -> dict[str, Sheet]:
    """Return the figures by the names of their files."""
    return {
        "fastflow": fastflow(), "cflow": cflow(), "csflow": csflow(), "uflow": uflow(),
        "nfa": nfa(),
    }  # fmt: skip


def _levels(sheet: Sheet, shapes: Sequence[tuple[str, str]], flow: str, level: str) -> None:
    """Draw image, backbone and three independent levels up to their maps."""
    sheet.box(16, 125, 88, 50, "image\n3×256×256")
    sheet.box(130, 40, 108, 220, "backbone\nEfficient-\nNet-Lite0", "frozen")
    sheet.arrow((104, 150), (130, 150))
    for row, (shape, stride) in enumerate(shapes):
        y = 40 + 85 * row
        middle = y + 25
        sheet.box(264, y, 92, 50, f"{shape}\nstride {stride}")
        sheet.box(382, y, 128, 50, flow, "trained")
        sheet.box(536, y, 136, 50, f"z: {shape}\nlog det: 1×{shape.split('×', 1)[1]}")
        sheet.box(698, y, 112, 50, level, "computed")
        for left, right in ((238, 264), (356, 382), (510, 536), (672, 698)):
            sheet.arrow((left, middle), (right, middle))


def fastflow() -> Sheet:
    sheet = Sheet(984, 470, "FastFlow: every level has a flow of its own")
    sheet.text(16, 24, "fastflow_efficientnet_lite0.yaml, one image", "start", bold=True)
    shapes = (("24×64×64", "4"), ("40×32×32", "8"), ("112×16×16", "16"))
    _levels(sheet, shapes, "layer norm,\n8 coupling steps", "½·mean z²\n− log det / C")
    _to_map(sheet, "up-\nsample,\nmean,\nblur")
    sheet.text(16, 302, "one coupling step", "start", bold=True)
    _step(sheet, 318, "conv 3×3, ReLU,\nconv 3×3", None)
    sheet.legend(16, 446, **LEARNT)
    return sheet


def _to_map(sheet: Sheet, text: str) -> None:
    """Draw what joins three maps, the map, and the score."""
    sheet.box(834, 40, 64, 220, text, "computed")
    for row in range(3):
        sheet.arrow((810, 65 + 85 * row), (834, 65 + 85 * row))
    sheet.box(922, 60, 50, 64, "map\n256×\n256")
    sheet.arrow((898, 92), (922, 92))
    sheet.box(922, 190, 50, 50, "score")
    sheet.arrow((947, 124), (947, 190))
    sheet.text(941, 162, "max", "end", 12, LINE)


def _step(sheet: Sheet, y: float, network: str, condition: str | None) -> None:
    """Draw the inside of a one-sided coupling step."""
    top, low = y + 20, y + 84
    sheet.box(16, y + 27, 76, 50, "x\nC")
    sheet.box(122, y, 80, 40, "x₁: half")
    sheet.box(122, y + 64, 80, 40, "x₂: half")
    sheet.line((92, y + 52), (107, y + 52))
    sheet.arrow((107, y + 52), (107, top), (122, top))
    sheet.arrow((107, y + 52), (107, low), (122, low))
    sheet.box(240, y + 26, 126, 40, network, "trained")
    sheet.arrow((202, top + 8), (221, top + 8), (221, y + 46), (240, y + 46))
    sheet.arrow((366, y + 46), (384, y + 46))
    sheet.box(384, y + 26, 132, 40, "s = α·tanh(0.1·a)\nt = 0.1·b", "computed")
    sheet.box(540, y + 64, 112, 40, "x₂·exp(s) + t", "computed")
    sheet.arrow((516, y + 46), (596, y + 46), (596, y + 64))
    sheet.arrow((202, low), (540, low))
    sheet.arrow((202, top - 8), (680, top - 8), (680, y + 40), (700, y + 40))
    sheet.arrow((652, low), (680, low), (680, y + 58), (700, y + 58))
    sheet.box(700, y + 24, 142, 50, "scale g, shift o,\n" + ("rotate" if condition else "permute"),
              "trained")  # fmt: skip
    sheet.arrow((842, y + 49), (880, y + 49))
    sheet.box(880, y + 24, 88, 50, "y\nC")
    sheet.text(596, y + 122, "log det = Σ s + Σ ln g, at every position", "middle", 12, LINE)
    if condition:
        sheet.box(240, y - 28, 126, 26, condition)
        sheet.arrow((303, y - 2), (303, y + 26))


def cflow() -> Sheet:
    sheet = Sheet(984, 500, "CFLOW-AD: a flow of every fibre, given its position")
    sheet.text(16, 24, "cflow_efficientnet_lite0.yaml, one image", "start", bold=True)
    shapes = (("40×32×32", "8"), ("112×16×16", "16"), ("320×8×8", "32"))
    _levels(sheet, shapes, "8 conditional\nsteps", "exp(min(\nℓ − peak, 0))")
    _to_map(sheet, "up-\nsample,\n3 − sum")
    sheet.text(16, 296, "one conditional step, at one position (a fibre)", "start", bold=True)
    _step(sheet, 346, "linear, ReLU,\nlinear", "position, 128")
    sheet.legend(
        16, 476, frozen="frozen", trained="trained (the rotation is not)",
        computed="computed; peak: best ℓ of a level on training images",
    )  # fmt: skip
    return sheet


def csflow() -> Sheet:
    sheet = Sheet(984, 530, "CS-Flow: one flow over three scales together")
    sheet.text(16, 24, "csflow_efficientnet_lite0.yaml, one image", "start", bold=True)
    sheet.box(144, 40, 108, 220, "backbone\nEfficient-\nNet-Lite0\n(same for all)", "frozen")
    sheet.box(400, 40, 128, 220, "2 coupling\nblocks over all\nscales", "trained")
    rows = (("256×256", "192×8×8"), ("128×128", "192×4×4"), ("64×64", "192×2×2"))
    for row, (pixels, shape) in enumerate(rows):
        y = 40 + 85 * row
        sheet.box(16, y, 100, 50, f"image\n3×{pixels}")
        sheet.box(280, y, 92, 50, shape)
        sheet.box(556, y, 112, 50, f"z: {shape}")
        for left, right in ((116, 144), (252, 280), (372, 400), (528, 556)):
            sheet.arrow((left, y + 25), (right, y + 25))
    sheet.box(700, 40, 148, 50, "mean z² over C,\nup-sample", "computed")
    sheet.arrow((668, 65), (700, 65))
    sheet.box(880, 40, 88, 50, "map\n256×256")
    sheet.arrow((848, 65), (880, 65))
    sheet.box(700, 125, 148, 50, "mean of ½·z² over\nall scales", "computed")
    sheet.line((684, 65), (684, 235))
    for row in (1, 2):
        sheet.line((668, 65 + 85 * row), (684, 65 + 85 * row))
    sheet.arrow((684, 150), (700, 150))
    sheet.box(880, 125, 88, 50, "score")
    sheet.arrow((848, 150), (880, 150))
    _cross_scale(sheet)
    sheet.legend(16, 506, **LEARNT)
    return sheet


def _cross_scale(sheet: Sheet) -> None:
    """Draw one network of a coupling block: how its scales see each other."""
    sheet.text(
        16, 302, "one of the two networks of a block: s and t of x₁ from x₂, then of x₂ from x₁",
        "start", bold=True,
    )  # fmt: skip
    for scale in range(3):
        y = 318 + 62 * scale
        sheet.box(16, y, 112, 40, f"half, scale {scale}")
        sheet.box(164, y, 180, 40, "conv, LeakyReLU: 128", "trained")
        sheet.box(604, y, 92, 40, "Σ · γ", "trained")
        sheet.box(740, y, 190, 40, f"s, t of scale {scale}", "computed")
        middle = y + 20
        for left, right in ((128, 164), (696, 740)):
            sheet.arrow((left, middle), (right, middle))
        sheet.arrow((344, middle), (604, middle))
        sheet.text(474, middle - 5, "conv", "middle", 12, LINE)
    for scale in (0, 1):
        y = 338 + 62 * scale
        sheet.arrow((344, y + 6), (440, y + 6), (508, y + 54), (604, y + 54))
        sheet.arrow((344, y + 56), (440, y + 56), (508, y + 8), (604, y + 8))
        sheet.text(436, y + 50, "× 2, conv", "end", 11, LINE)
        sheet.text(352, y + 20, "conv, stride 2", "start", 11, LINE)


def uflow() -> Sheet:
    sheet = Sheet(984, 400, "U-Flow: one flow from the coarsest level to the finest")
    sheet.text(16, 24, "uflow_efficientnet_lite0.yaml, one image", "start", bold=True)
    sheet.box(16, 165, 88, 50, "image\n3×256×256")
    sheet.box(124, 40, 92, 300, "backbone\nEfficient-\nNet-Lite0", "frozen")
    sheet.arrow((104, 190), (124, 190))
    sheet.box(862, 40, 56, 300, "up-\nsample,\nmean,\nblur", "computed")
    features = ("24×64×64", "40×32×32", "112×16×16")
    inside, latents = ("30×64×64", "54×32×32", "112×16×16"), ("30×64×64", "30×32×32", "56×16×16")
    for row, shape in enumerate(features):
        y = 40 + 125 * row
        middle = y + 25
        sheet.box(236, y, 92, 50, f"{shape}\nstride {4 * 2**row}")
        sheet.box(348, y, 62, 50, "layer\nnorm", "trained")
        sheet.box(464, y, 100, 50, f"4 steps\n{inside[row]}", "trained")
        sheet.box(618, y, 100, 50, f"z: {latents[row]}\nlog det")
        sheet.box(738, y, 104, 50, "½·mean z²\n− log det / C", "computed")
        for left, right in (
            (216, 236), (328, 348), (410, 464), (564, 618), (718, 738), (842, 862),
        ):  # fmt: skip
            sheet.arrow((left, middle), (right, middle))
    for row, (up, joined) in enumerate((("24 channels", "6×64×64"), ("56 channels", "14×32×32"))):
        y = 65 + 125 * row  # the middle of the level above
        sheet.arrow((590, y + 125), (590, y + 80), (437, y + 80), (437, y + 4))
        sheet.text(584, y + 75, f"{up} go up", "end", 12, LINE)
        sheet.text(431, y + 75, joined, "end", 12, LINE)
        sheet.text(431, y + 58, "pixel shuffle,", "end", 12, LINE)
    sheet.box(936, 60, 42, 64, "map\n256×\n256")
    sheet.arrow((918, 92), (936, 92))
    sheet.box(936, 190, 42, 50, "score")
    sheet.arrow((957, 124), (957, 190))
    sheet.text(951, 162, "max", "end", 12, LINE)
    sheet.legend(16, 370, **LEARNT)
    return sheet


# Energies of one row of a map of 16 × 16 positions with 40 channels, in units of what is expected.
CHANNELS, SIDE = 40, 16
ROW = (0.9, 1.0, 0.8, 1.1, 1.5, 1.1, 0.9, 1.6, 1.9, 2.1, 2.0, 1.9, 0.9, 1.2, 2.6, 1.0)


def log_probability(ratio: float) -> float:
    """Return the decimal log of Chernoff's bound of P(energy >= ratio · expected)."""
    return -0.5 * CHANNELS / math.log(10) * (ratio - 1 - math.log(ratio)) if ratio > 1 else 0.0


def log_regions(count: int) -> float:
    """Return the decimal log of the number of tests of regions of so many positions."""
    positions = SIDE * SIDE
    shapes = math.log10(positions * 0.316915 / count) + count * math.log10(4.062570)
    return shapes + math.log10(positions)


def best_region(peak: int) -> tuple[int, int, float, float]:
    """Return first and last place, level and log NFA of the region around a peak that is least
    expected, of those that hold no other peak."""
    found = []
    for level in sorted({value for value in ROW if value <= ROW[peak]}):
        first = last = peak
        while first > 0 and ROW[first - 1] >= level:
            first -= 1
        while last < len(ROW) - 1 and ROW[last + 1] >= level:
            last += 1
        if max(ROW[first : last + 1]) == ROW[peak]:
            count = last - first + 1
            found.append((first, last, level, count * log_probability(level) + log_regions(count)))
    return min(found, key=lambda region: region[3])


def nfa() -> Sheet:
    sheet = Sheet(984, 384, "The a-contrario test: which regions are too unlikely to be chance")
    sheet.text(
        16, 26, f"energy Σ z² of one row of positions, {CHANNELS} channels", "start", bold=True
    )
    left, base, step, unit = 66, 300, 34, 88
    for mark in (0, 1, 2):
        sheet.line((left - 6, base - unit * mark), (left, base - unit * mark))
        sheet.text(left - 12, base - unit * mark + 4, f"{mark}·C" if mark else "0", "end", 12, LINE)
    sheet.line((left, base - 2.75 * unit), (left, base), (left + step * len(ROW), base))
    for place, value in enumerate(ROW):
        sheet.bar(left + 5 + place * step, base - value * unit, step - 10, value * unit, "#9fb3c8")
    sheet.line((left, base - unit), (left + step * len(ROW), base - unit), color="#c07f1e")
    peaks = sorted((ROW.index(1.5), ROW.index(2.1), ROW.index(2.6)))
    for name, peak in zip("ABC", peaks, strict=True):
        first, last, level, log_nfa = best_region(peak)
        y = base - level * unit
        x0, x1 = left + first * step + 2, left + (last + 1) * step - 2
        color = "#3f8f5b" if log_nfa < 0 else "#b3261e"
        for place in range(first, last + 1):
            x = left + 5 + place * step
            sheet.bar(
                x, base - ROW[place] * unit, step - 10, (ROW[place] - level) * unit or 2, color
            )
        sheet.line((x0, y), (x1, y), color=color, width=2.4)
        sheet.text((x0 + x1) / 2, base + 20, name, bold=True, color=color)
        _verdict(sheet, 40 + 92 * (ord(name) - ord("A")), name, last - first + 1, level, log_nfa)
    sheet.text(
        left, base + 46, "orange line: what is expected without a defect.", "start", 12, LINE
    )
    sheet.text(
        left, base + 64, "caps: regions at the level at which they are least expected; "
        "logarithms are decimal.", "start", 12, LINE,
    )  # fmt: skip
    return sheet


def _verdict(sheet: Sheet, y: float, name: str, count: int, level: float, log_nfa: float) -> None:
    probability = _signed(count * log_probability(level))
    noun = "position" if count == 1 else "positions"
    verdict = "reported" if log_nfa < 0 else "not reported"
    sheet.box(
        650, y, 318, 76,
        f"{name}: {count} {noun}, energy ≥ {level:g}·C\n"
        f"log P ≤ {probability}, log tests = {log_regions(count):.1f}\n"
        f"log NFA = {_signed(log_nfa)}: {verdict}",
        "computed" if log_nfa < 0 else "data",
    )  # fmt: skip


def _signed(value: float) -> str:
    return f"{value:.1f}".replace("-", "−")


if __name__ == "__main__":
    main()
