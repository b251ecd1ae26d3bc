"""Count false alarms of the a-contrario test on simulated images without defects.

python -m benchmarks.nfa_false_alarms
"""

import argparse

import numpy as np
from scipy.ndimage import label

from benchmarks.bench_nfa import LAYOUTS, Shapes
from metrics.nfa import TESTS, standard_nulls, tree_score

VARIANCES = (0.9, 1.0, 1.1)


def false_alarms(
    shapes: Shapes, variance: float, images: int, *, tail: str = "upper", tests: str = "total",
    seed: int = 0,
) -> tuple[float, float, float]:  # fmt: skip
    """Simulate images without defects: Gaussian latents, by their energies' χ² law.

    Return the mean number of detected areas, the share of images with any, the highest score. Areas
    are connected positions of the finest scale, to which the others are resized.
    """
    rng = np.random.default_rng(seed)
    nulls = standard_nulls([shape[0] for shape in shapes])
    areas, alarmed, highest = 0, 0, -np.inf
    for _ in range(images):
        energies = [variance * rng.chisquare(channels, size) for channels, *size in shapes]
        score = tree_score(energies, nulls, energies[0].shape, tail=tail, tests=tests)
        areas += int(label(score > 0)[1])
        alarmed += bool((score > 0).any())
        highest = max(highest, float(score.max()))
    return areas / images, alarmed / images, highest


def main() -> None:
    """Simulate every layout and setting, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="simulated per setting")
    options = parser.parse_args()
    print(f"{options.images} images of Gaussian latents: detected areas per image (bound: 1)")
    settings = [("upper", tests, v) for tests in TESTS for v in VARIANCES]
    for name, shapes in LAYOUTS.items():
        for tail, tests, variance in [*settings, ("both", "total", 0.9)]:
            mean, share, highest = false_alarms(
                shapes, variance, options.images, tail=tail, tests=tests
            )
            print(
                f"{name:12} tail {tail:5} tests {tests:7} variance {variance:.1f}: "
                f"{mean:.3f} areas, {share:.1%} of images, highest -log10 NFA {highest:.1f}"
            )


if __name__ == "__main__":
    main()
