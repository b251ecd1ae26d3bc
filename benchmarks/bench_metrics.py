"""Time all metrics of one test set against scikit-learn and a threshold sweep, in one run.

python -m benchmarks.bench_metrics
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from metrics.suite import Metrics, evaluate

LIMITS = (0.3, 0.05)


def draw(images: int, size: int, seed: int = 0) -> tuple[NDArray, NDArray, NDArray]:
    """Return maps (N, S, S) float32, masks (N, S, S) and labels (N,).

    The first three quarters are defective: one to three discs score higher than the background.
    """
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((images, size, size), dtype=np.float32)
    maps = ndimage.gaussian_filter(noise, (0, 2, 2)) * 4 + noise / 4
    defective = images * 3 // 4
    masks = np.zeros(maps.shape, dtype=np.uint8)
    rows, columns = np.mgrid[:size, :size]
    for mask in masks[:defective]:
        for _ in range(rng.integers(1, 4)):
            y, x = rng.integers(0, size, 2)
            radius = rng.uniform(0.01, 0.08) * size + 1
            mask[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = 1
    return maps + np.float32(1.5) * masks, masks, np.arange(images) < defective


def sweep(maps: NDArray, masks: NDArray, thresholds: int) -> dict[float, float]:
    """Return AUPRO from a sweep over equally frequent background scores, a common way to do it."""
    labelled = np.stack([ndimage.label(mask, structure=np.ones((3, 3)))[0] for mask in masks])
    counts = labelled.max(axis=(1, 2))
    labelled += (np.cumsum(counts) - counts)[:, None, None] * (labelled > 0)
    areas = np.bincount(labelled.ravel())[1:]
    background = masks == 0
    normal = maps[background]
    # denser near rate 0, where AUPRO is integrated
    rates = np.linspace(0, 1, thresholds) ** 2
    x, y = [0.0], [0.0]
    for threshold in np.quantile(normal, 1 - rates):
        found = maps >= threshold
        x.append(np.count_nonzero(found & background) / normal.size)
        hits = np.bincount(labelled[found], minlength=areas.size + 1)[1:]
        y.append(float(np.mean(hits / areas)))
    return {limit: _area(np.array(x), np.array(y), limit) for limit in LIMITS}


def _area(x: NDArray, y: NDArray, limit: float) -> float:
    grid = np.append(x[x < limit], limit)
    return float(np.trapezoid(np.interp(grid, x, y), grid)) / limit


def check_equal(ours: Metrics, theirs: dict[str, float], tolerance: float) -> None:
    """Stop with a message unless both sides found the same; `tolerance` is for the sweep."""
    for name, value in theirs.items():
        difference = abs(ours.values[name] - value)
        allowed = tolerance if name.startswith("aupro") else 1e-6
        print(f"{name:12} {ours.values[name]:.6f}  baseline {value:.6f}  off by {difference:.1e}")
        if not difference <= allowed:
            raise SystemExit(f"{name} differs by more than {allowed:g}: the times mean nothing")


def timed(call: Callable[..., Any], *arguments: Any, repeat: int = 1) -> tuple[Any, float]:
    """Return the result and the best wall time in seconds of `repeat` calls."""
    best = np.inf
    for _ in range(repeat):
        start = time.perf_counter()
        result = call(*arguments)
        best = min(best, time.perf_counter() - start)
    return result, best


def main() -> None:
    """Measure, check that the results agree, print times and ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=83)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--thresholds", type=int, default=200, help="of the baseline's sweep")
    parser.add_argument("--repeat", type=int, default=3, help="calls of each; the best counts")
    options = parser.parse_args()
    maps, masks, labels = draw(options.images, options.size)
    scores = maps.max(axis=(1, 2))
    truth, pixels = masks.ravel(), maps.ravel()

    ours, own_time = timed(
        evaluate, scores, labels, maps, masks, 3.0, 1.0, LIMITS, repeat=options.repeat
    )
    auroc, auroc_time = timed(roc_auc_score, truth, pixels, repeat=options.repeat)
    ap, ap_time = timed(average_precision_score, truth, pixels, repeat=options.repeat)
    areas, sweep_time = timed(sweep, maps, masks, options.thresholds, repeat=options.repeat)

    found = {"pixel_auroc": auroc, "pixel_ap": ap}
    found |= {f"aupro_{limit:g}": area for limit, area in areas.items()}
    check_equal(ours, found, tolerance=20 / options.thresholds**2)
    baseline = auroc_time + ap_time + sweep_time
    print(f"\n{options.images} maps of {options.size} x {options.size}, one process")
    print(f"all metrics, this package        {own_time:7.3f} s")
    print(f"AUROC, scikit-learn              {auroc_time:7.3f} s")
    print(f"average precision, scikit-learn  {ap_time:7.3f} s")
    print(f"AUPRO, {options.thresholds:4} thresholds           {sweep_time:7.3f} s")
    print(f"baseline together                {baseline:7.3f} s = {baseline / own_time:.1f} times")


if __name__ == "__main__":
    main()
