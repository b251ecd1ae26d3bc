"""Predictions on disk and on screen: one line per image, results.jsonl, pictures, raw maps.

Used by predict.py and deploy/infer.py, so that both say the same. Needs no Paddle.
"""

import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from metrics.acontrario import AContrario
from metrics.drift import Drift, NormalNll
from metrics.threshold import Threshold, fixed, is_defective
from utils.errors import UserError
from utils.files import atomic_replace, atomic_write_text
from utils.image import Size, read_image, resize, to_input
from utils.visualize import marked, panel, regions, resize_map, safe_name, save_picture

LONGEST_SIDE = 2048  # of pictures, pixels; drawing needs 80 bytes for each of them


class Output(NamedTuple):
    """Hold what is said of B images: maps (B, h, w) and scores (B,).

    evidence: (B, h_i, w_i) per level, for the NFA test; nll: (B,) nats per latent dimension, None
    where it is not known.
    """

    maps: np.ndarray
    scores: np.ndarray
    evidence: Sequence[np.ndarray] = ()
    nll: np.ndarray | None = None

    def of(self, place: int) -> "Found":
        """Return what is said of one of them."""
        nll = None if self.nll is None else float(self.nll[place])
        levels = [level[place] for level in self.evidence]
        return Found(self.maps[place], float(self.scores[place]), levels, nll=nll)


def joined(parts: Sequence[Output]) -> Output:
    """Return the outputs of several batches as those of one."""
    maps, scores = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    evidence = [np.concatenate(level) for level in zip(*(p.evidence for p in parts), strict=True)]
    known = [part.nll for part in parts if part.nll is not None]
    return Output(maps, scores, evidence, np.concatenate(known) if known else None)


Network = Callable[[np.ndarray], Output]  # of images (B, 3, h, w) in [0, 1]


@dataclass(frozen=True)
class Original:
    """One image: its file and its pixels (H, W, 3) uint8."""

    path: Path
    pixels: np.ndarray


@dataclass(frozen=True)
class Photo(Original):
    """One image and what the network sees of it, (3, h, w)."""

    network_input: np.ndarray


class Found(NamedTuple):
    """What a detector says of one image: its map (h, w), score and evidence (h_i, w_i) per level.

    Where tiles were judged, `nfa` takes the place of the evidence if there is a test: -log10 NFA
    (h, w) and the value that decides about the image. `about` goes into the results as it is.
    `nll` is that of the image as a whole, None where it is not known.
    """

    anomaly_map: np.ndarray
    score: float
    evidence: Sequence[np.ndarray] = ()
    nfa: tuple[np.ndarray, float] | None = None
    about: Mapping[str, Any] | None = None
    nll: float | None = None


@dataclass
class PhotoReader:
    """Read images for a network; remember the unreadable ones instead of stopping."""

    size: Size
    method: str
    skipped: list[str] = field(default_factory=list)

    def batches(self, paths: Sequence[Path], batch_size: int) -> Iterator[list[Photo]]:
        """Yield batches of readable images; `UserError` if there is none."""
        batch: list[Photo] = []
        for each in self.originals(paths):
            network_input = to_input(each.pixels, self.size, self.method)
            batch.append(Photo(each.path, each.pixels, network_input))
            if len(batch) == batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def originals(self, paths: Sequence[Path]) -> Iterator[Original]:
        """Yield readable images one by one, not made ready; `UserError` if there is none."""
        for path in paths:
            try:
                pixels = read_image(path)
            except UserError as error:
                if len(paths) == 1:
                    raise
                self.skipped.append(str(error))
                continue
            yield Original(path, pixels)
        if len(self.skipped) == len(paths):
            raise UserError(
                f"none of {len(paths)} images can be read: {'; '.join(self.skipped[:5])}"
            )

    def warning(self) -> str:
        """Return one line about what was skipped; empty if nothing was."""
        if not self.skipped:
            return ""
        return f"warning: skipped {len(self.skipped)} unreadable image(s): " + "; ".join(
            self.skipped[:5]
        )


def whole_images(
    network: Network, reader: PhotoReader, paths: Sequence[Path], batch_size: int
) -> Iterator[tuple[Original, Found]]:
    """Yield images in batches of the network and what it says of each as a whole."""
    for photos in reader.batches(paths, batch_size):
        output = network(np.stack([photo.network_input for photo in photos]))
        for place, photo in enumerate(photos):
            yield photo, output.of(place)


def chosen_threshold(given: float | None, stored: Threshold | None, flag: str) -> Threshold:
    """Return the threshold from the command line, else the stored one; `UserError` if neither."""
    if given is not None:
        return fixed(given)
    if stored is None:
        raise UserError(
            "no threshold stored yet: finish the training (train.py --resume), convert with "
            f"--normals, or give {flag}"
        )
    return stored


def chosen_output(folder: Path, images: Sequence[Path]) -> Path:
    """Return the folder for predictions; `UserError` if images to predict on lie in it."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; --output names a folder")
    if any(image.resolve().parent == folder.resolve() for image in images):
        raise UserError(
            f"{folder}: holds the images themselves, which pictures of the same names would "
            "replace; give another --output"
        )
    return folder


def scale_around(threshold: Threshold) -> tuple[float, float]:
    """Return the ends of a rising colour scale whose middle is the threshold."""
    span = abs(threshold.value) or 1.0
    return threshold.value - span, threshold.value + span


class Judged(NamedTuple):
    """What is said of one image, and its map and defective pixels, (H, W) of the original."""

    result: dict[str, Any]
    anomaly_map: np.ndarray
    defective: np.ndarray


@dataclass(frozen=True)
class Judge:
    """Compare what a detector found with the thresholds: a verdict, regions, their numbers."""

    image_threshold: Threshold
    pixel_threshold: Threshold
    acontrario: AContrario | None = None

    def __call__(self, found: Found, size: Size) -> Judged:
        """Judge one image of `size` = (H, W), into whose geometry the map is brought."""
        score = float(found.score)
        full = _of_size(found.anomaly_map, size)
        cut = self.pixel_threshold.value
        deciding, decisive = full, score  # what the thresholds are compared with
        further, nfa = dict(found.about or {}), found.nfa
        if found.nll is not None:  # JSON knows no infinity, and an NLL may overflow
            further["nll"] = found.nll if math.isfinite(found.nll) else None
        if nfa is None and self.acontrario is not None and found.evidence:
            nfa_map = self.acontrario.score(found.evidence)
            nfa = nfa_map, float(nfa_map.max())
        if nfa is not None:
            further["log_nfa"] = -nfa[1]
            if self.pixel_threshold.policy == "nfa":
                deciding = _of_size(nfa[0], size)
            if self.image_threshold.policy == "nfa":
                decisive = nfa[1]
        defective = is_defective(deciding, cut)
        result = {
            "score": score,
            "threshold": self.image_threshold.value,
            "verdict": verdict(decisive, self.image_threshold),
            "pixel_threshold": cut,
            "map_mean": float(found.anomaly_map.mean(dtype=np.float64)),
            "map_max": float(found.anomaly_map.max()),
            "regions": regions(deciding, defective),
            **further,
        }
        return Judged(result, full, defective)


class PredictionWriter:
    """Collect predictions of one call; `results.jsonl` appears when it is closed."""

    def __init__(
        self,
        output: Path,
        image_threshold: Threshold,
        pixel_threshold: Threshold,
        color_scale: tuple[float, float],
        *,
        acontrario: AContrario | None = None,
        pictures: bool = True,
        maps: bool = False,
        drift: Drift | None = None,
    ) -> None:
        self.output = output
        self.judge = Judge(image_threshold, pixel_threshold, acontrario)
        self.color_scale = color_scale
        self.pictures, self.maps = pictures, maps
        self.drift = drift
        self._lines: list[str] = []
        self._names: set[str] = set()

    def add(
        self,
        photo: Original,
        found: Found,
        *,
        truth: np.ndarray | None = None,
        label: int | None = None,
    ) -> dict[str, Any]:
        """Record one image; its map is brought to the geometry of the photo.

        `truth` (H, W) and `label` (0 normal, 1 defective) where they are known.
        """
        size = photo.pixels.shape[:2]
        judged = self.judge(found, size)
        if self.drift is not None and found.nll is not None:
            self.drift.add(found.nll)
        result: dict[str, Any] = {"path": str(photo.path), "label": label, **judged.result}
        name = self._free_name(photo.path)
        if self.pictures:
            title = f"{photo.path.name}\n{result['verdict']}  {self._reason(result)}"
            nfa_decides = self.judge.pixel_threshold.policy == "nfa"
            level = None if nfa_decides else self.judge.pixel_threshold.value
            shown, values, outlined, known = _for_pictures(
                photo.pixels, judged.anomaly_map, judged.defective, truth
            )
            picture = panel(
                shown, values, outlined, *self.color_scale, title, ground_truth=known, level=level
            )
            save_picture(self.output / f"{name}.png", picture)
            result["picture"] = f"{name}.png"
            whole = marked(shown, values, outlined, *self.color_scale, known)
            save_picture(self.output / "overlays" / f"{name}.png", whole)
            result["overlay"] = f"overlays/{name}.png"
        if self.maps:
            with atomic_replace(self.output / f"{name}.npy") as temporary:
                np.save(temporary, judged.anomaly_map.astype(np.float32, copy=False))
            result["map"] = f"{name}.npy"
        self._lines.append(json.dumps(result, ensure_ascii=False))
        return result

    def _reason(self, result: Mapping[str, Any]) -> str:
        score = f"score {result['score']:.3f}"
        if self.judge.image_threshold.policy == "nfa" and "log_nfa" in result:
            return f"log NFA {result['log_nfa']:.1f}  threshold 0  {score}"
        return f"{score}  threshold {result['threshold']:.3f}"

    def close(self) -> None:
        """Write results.jsonl."""
        text = "".join(line + "\n" for line in self._lines)
        atomic_write_text(self.output / "results.jsonl", text)

    def _free_name(self, path: Path) -> str:
        base = safe_name(path.stem)
        name, number = base, 2
        while name.casefold() in self._names:  # Windows and macOS take a.png for A.png
            name, number = f"{base}_{number}", number + 1
        self._names.add(name.casefold())
        return name


def watch_drift(normal: NormalNll | None, args: Namespace) -> Drift | None:
    """Return what watches the NLL of a call's images; None where that of normals is not known."""
    return None if normal is None else Drift(normal, args.drift_window)


def say_drift(drift: Drift | None) -> None:
    """Print what the images of a call say about the camera; nothing if they are too few."""
    if drift is not None and drift.describe():
        print(drift.describe())
        if drift.alarm:
            print(drift.warning(), file=sys.stderr)


def verdict(score: float, threshold: Threshold) -> str:
    """Return `Anomaly` or `Normal`."""
    return "Anomaly" if is_defective(score, threshold) else "Normal"


def console_line(result: dict[str, Any], alone: bool) -> str:
    """Return FastFlow-Paddle's line, followed by the file where there are several."""
    line = f"{result['verdict']} - score:  {result['score']:.3f}"
    return line if alone else f"{line}  {result['path']}"


def _of_size(anomaly_map: np.ndarray, size: Size) -> np.ndarray:
    """Return a map in the geometry `size`; without a copy where it has it, for it may be large."""
    if anomaly_map.shape == size and anomaly_map.dtype == np.float32:
        return anomaly_map
    return resize_map(anomaly_map, size)


def _for_pictures(
    pixels: np.ndarray, values: np.ndarray, found: np.ndarray, truth: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Return all that is drawn, (H, W), with at most `LONGEST_SIDE` pixels along a side."""
    height, width = pixels.shape[:2]
    scale = LONGEST_SIDE / max(height, width)
    if scale >= 1:
        return pixels, values, found, truth
    size = max(1, round(height * scale)), max(1, round(width * scale))
    smaller = cv2.resize(values, size[::-1], interpolation=cv2.INTER_AREA)
    known = None if truth is None else _any_within(truth, size)
    return resize(pixels, size), smaller, _any_within(found, size), known


def _any_within(mask: np.ndarray, size: Size) -> np.ndarray:
    """Shrink a mask (H, W) so that its smallest region stays visible."""
    for axis, wanted in enumerate(size):
        starts = np.arange(wanted) * mask.shape[axis] // wanted
        mask = np.logical_or.reduceat(mask, starts, axis=axis)
    return mask
