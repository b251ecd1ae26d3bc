"""Time the frozen backbone on a batch of images, as training uses it or by plain eager Paddle."""

import numpy as np

from benchmarks.bench_inference import open_prepared, parts, prepare
from benchmarks.measure import own_arguments, report


def main() -> None:
    """Prepare, or measure one side."""
    options = own_arguments(__doc__)
    folder, batch = parts(options.case)
    if options.side == "prepare":
        return prepare(folder)
    import paddle

    detector = open_prepared(folder)
    images = paddle.to_tensor(np.load(folder / "images.npy")[:batch])
    many = 1000  # images that are to come
    extract = detector.extractor(many) if options.side == "ours" else detector.features

    def call() -> dict[str, float]:
        with paddle.no_grad():
            levels = extract(images)
        return {f"level {i}": float(level.abs().mean()) for i, level in enumerate(levels)}

    return report(call, options.repeat)


if __name__ == "__main__":
    main()
