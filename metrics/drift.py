"""Whether what a detector sees still looks like its normal images: an alarm for camera and light.

The likelihood of an image falls when anything about it changes. A defect changes few images, a
dirty lens or a new lamp changes all of them: the median over a window tells them apart.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from utils.errors import UserError

WINDOW = 50  # images
FEWEST = 10  # images before anything is said
FALSE_ALARM = 1e-4  # probability, if the images are like the normal ones
_MEDIAN = math.pi / 2  # variance of a median against that of a mean, for normal values


@dataclass(frozen=True)
class NormalNll:
    """Mean and standard deviation of the NLL (nats per dimension) of `count` normal images."""

    mean: float
    std: float
    count: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std)) or self.std <= 0:
            raise UserError("drift: mean and std must be finite, std above 0; calibrate again")
        if self.count < 2:
            raise UserError("drift: it needs at least 2 normal images; calibrate again")

    @classmethod
    def fit(cls, nll: ArrayLike) -> "NormalNll | None":
        """Return what values (N,) say; None where they are too few, all alike, or not finite."""
        values = np.asarray(nll, np.float64)
        if len(values) < 2 or not np.isfinite(values).all() or np.ptp(values) == 0:
            return None
        return cls(float(values.mean()), float(values.std(ddof=1)), len(values))

    def to_dict(self) -> dict[str, float]:
        """Return plain values for JSON or YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "NormalNll":
        """Read what `to_dict` wrote."""
        return cls(float(data["mean"]), float(data["std"]), int(data["count"]))

    @property
    def limit(self) -> float:
        """Return the |z| beyond which there is an alarm: Student's, since few normals are known."""
        return float(stats.t.ppf(1 - FALSE_ALARM / 2, self.count - 1))


class Drift:
    """Watch the NLL of images in the order in which they come.

    Attributes:
        images: how many were seen in all.
    """

    def __init__(self, normal: NormalNll, window: int = WINDOW) -> None:
        if window < FEWEST:
            raise UserError(f"--drift_window {window}: must be at least {FEWEST} images")
        self.normal = normal
        self.images = 0
        self._seen: deque[float] = deque(maxlen=window)

    def add(self, nll: float) -> None:
        """Take the next image; a value that is not finite counts as infinitely unlikely."""
        self.images += 1
        self._seen.append(nll if math.isfinite(nll) else math.inf)

    @property
    def mean(self) -> float:
        """Return the mean NLL of the window; nan where nothing was seen."""
        return sum(self._seen) / len(self._seen) if self._seen else math.nan

    @property
    def z(self) -> float:
        """Return how far the window's median is from the normals' mean, in standard errors.

        Nan before `FEWEST` images.
        """
        count = len(self._seen)
        if count < FEWEST:
            return math.nan
        error = self.normal.std * math.sqrt(1 / self.normal.count + _MEDIAN / count)
        return (float(np.median(self._seen)) - self.normal.mean) / error

    @property
    def alarm(self) -> bool:
        """Tell whether the window differs from the normal images, either way."""
        return abs(self.z) > self.normal.limit

    def describe(self) -> str:
        """Return one line for people; empty before there is anything to say."""
        if math.isnan(self.z):
            return ""
        normal = self.normal
        return (
            f"drift: z = {self.z:+.1f} over the last {len(self._seen)} images (alarm beyond "
            f"{normal.limit:.1f}); NLL {self.mean:.4f}, of {normal.count} normal images "
            f"{normal.mean:.4f} ± {normal.std:.4f}"
        )

    def warning(self) -> str:
        """Return one line if there is an alarm, else nothing."""
        if not self.alarm:
            return ""
        return (
            "warning: most of these images differ from the normal ones of the training: has the "
            "camera, the light or the product changed? If it is to stay so, train again"
        )
