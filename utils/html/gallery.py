"""The gallery of a report: images sorted by how wrong their verdict is, as small JPEGs inside."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.html.charts import colour_bar
from utils.html.page import Markup, element, joined
from utils.image import read_image, resize
from utils.visualize import PREDICTED, TRUTH, Colour, Picture, fitted, outlined, overlay

QUALITY = 80
_COLOURED = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]


@dataclass(frozen=True)
class Case:
    """One judged image: what is known of it and what was found.

    error: how far the verdict's value lies on the wrong side of the threshold; below 0: right.
    anomaly_map (h, w); predicted, truth (H, W) of one size; truth None: not known.
    """

    path: Path
    defect: str
    label: int
    score: float
    defective: bool | None
    error: float
    anomaly_map: NDArray
    predicted: NDArray[np.bool_]
    truth: NDArray[np.bool_] | None

    @property
    def wrong(self) -> bool:
        """Tell whether there is a verdict and it is wrong."""
        return self.defective is not None and self.defective != bool(self.label)

    @property
    def name(self) -> str:
        """Return the image's name below the folder of the test images."""
        return f"{self.defect}/{self.path.name}"

    @property
    def verdict(self) -> str:
        """Say in words what became of the image."""
        kind = "defective" if self.label else "good"
        if self.defective is None:
            return kind
        if self.wrong:
            return "missed defect" if self.label else "false alarm"
        return f"{kind}, recognised"


@dataclass(frozen=True)
class Gallery:
    """Hold the pictures of wrong and of right verdicts, and how many of each are left out."""

    wrong: list[Markup]
    right: list[Markup]
    wrong_left_out: int
    right_left_out: int


def gallery(
    cases: Sequence[Case], scale: tuple[float, float], prefix: str, side: int, budget: int
) -> Gallery:
    """Draw the most wrong first, then the nearest to the threshold, until `budget` bytes are used.

    scale: ends of the colour map; prefix: of the pictures' ids; side: of a picture, in pixels.
    """
    ordered = sorted(cases, key=lambda case: (not case.wrong, -case.error, case.name))
    wrong: list[Markup] = []
    right: list[Markup] = []
    for place, case in enumerate(ordered):
        shot = _shot(case, scale, f"{prefix}-{place}", side)
        budget -= len(shot)
        if budget < 0:
            break
        (wrong if case.wrong else right).append(shot)
    bad = sum(case.wrong for case in ordered)
    return Gallery(wrong, right, bad - len(wrong), len(ordered) - bad - len(right))


def legend(scale: tuple[float, float], level: float | None, origin: str) -> Markup:
    """Explain the pictures: their order, the outlines, the colour scale and where it is from."""
    marks = [
        element("span", element("span", class_="outline", style=f"border-color: {_css(c)}"), text)
        for c, text in ((PREDICTED, "predicted region"), (TRUTH, "ground truth"))
    ]
    bar = element("span", colour_bar(*scale, level), f" {origin}")
    first = element("span", "image · anomaly map · ground truth; a click enlarges")
    return element("div", first, *marks, bar, class_="legend")


def _shot(case: Case, scale: tuple[float, float], name: str, side: int) -> Markup:
    tiles = [
        element("span", picture, element("span", what, class_="what"))
        for what, picture in _tiles(case, scale, side)
    ]
    link = element("a", *tiles, href=f"#{name}", class_="open", aria_label=f"enlarge {case.name}")
    mark = "✗ " if case.wrong else ""
    caption = element(
        "figcaption",
        element("span", mark + case.verdict, class_="badge"),
        f"score {case.score:.4g}",
        element("br"),
        case.name,
        element("a", "close", href=f"#at-{name}", class_="close"),
    )
    style = "shot wrong" if case.wrong else "shot"
    figure = element("figure", link, caption, class_=style, id=name)
    return element("div", element("span", id=f"at-{name}", class_="anchor"), figure)


def _tiles(case: Case, scale: tuple[float, float], side: int) -> list[tuple[str, Markup]]:
    image = read_image(case.path)
    small = resize(image, fitted(image.shape[:2], min(side, max(image.shape[:2]))))
    heat = outlined(overlay(small, case.anomaly_map, *scale), case.predicted, PREDICTED)
    about = f"{case.name}, {case.verdict}"
    if case.truth is not None and case.truth.any():
        truth = _image(outlined(small, case.truth, TRUTH), f"ground truth of {about}", True)
    else:
        reason = "no mask" if case.label else "good: nothing to mark"
        truth = element("span", reason, class_="empty")
    return [
        ("image", _image(small, f"image {about}")),
        ("anomaly map, predicted region", _image(heat, f"anomaly map of {about}", True)),
        ("ground truth", truth),
    ]


def _image(rgb: Picture, alt: str, outline: bool = False) -> Markup:
    settings = [cv2.IMWRITE_JPEG_QUALITY, QUALITY, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    settings += _COLOURED if outline else []
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(rgb[..., ::-1]), settings)
    source = "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")
    height, width = rgb.shape[:2]
    return element("img", src=source, alt=alt, width=width, height=height, decoding="async")


def _css(colour: Colour) -> str:
    return f"rgb({' '.join(map(str, colour))})"


def grid(shots: Sequence[Markup]) -> Markup:
    """Put pictures beside each other as far as there is room."""
    return element("div", joined(shots), class_="gallery")
