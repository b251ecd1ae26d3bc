"""Time all metrics of one test set, or scikit-learn and a sweep of thresholds for AUPRO."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from benchmarks.measure import own_arguments, report
from metrics.suite import evaluate

LIMITS = (0.3, 0.05)
THRESHOLDS = 200  # of the sweep; AUPRO by it is off by less than 20 / THRESHOLDS²


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


def ours(maps: NDArray, masks: NDArray, labels: NDArray) -> dict[str, float]:
    """Compute every metric of this package."""
    return evaluate(maps.max(axis=(1, 2)), labels, maps, masks, 3.0, 1.0, LIMITS).values


def theirs(maps: NDArray, masks: NDArray) -> dict[str, float]:
    """Compute AUROC and average precision with scikit-learn, AUPRO with a sweep."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth, pixels = masks.ravel(), maps.ravel()
    areas = sweep(maps, masks, THRESHOLDS)
    return {
        "pixel_auroc": float(roc_auc_score(truth, pixels)),
        "pixel_ap": float(average_precision_score(truth, pixels)),
        **{f"aupro_{limit:g}": area for limit, area in areas.items()},
    }


def main() -> None:
    """Measure one side on <images>x<size>."""
    options = own_arguments(__doc__)
    images, size = map(int, options.case.split("x"))
    maps, masks, labels = draw(images, size)
    if options.side == "ours":
        report(lambda: ours(maps, masks, labels), options.repeat)
    else:
        report(lambda: theirs(maps, masks), options.repeat)


if __name__ == "__main__":
    main()
