"""Time reading, decoding and resizing of image files, or what the network does with them."""

import numpy as np

from benchmarks.bench_inference import open_prepared, parts, prepare
from benchmarks.bench_training import photographs
from benchmarks.measure import own_arguments, report


def main() -> None:
    """Prepare, or measure one side on <preset>, batch <images>."""
    options = own_arguments(__doc__)
    folder, count = parts(options.case)
    if options.side == "prepare":
        return prepare(folder)
    from datasets.records import NORMAL, Record
    from datasets.transforms import load_pixels

    records = [Record(path, NORMAL, "good") for path in photographs(count)]

    def loaded() -> dict[str, float]:
        pixels = load_pixels(records, (256, 256), "pil", options.threads)
        return {"images": len(pixels)}

    if options.side == "ours":
        return report(loaded, options.repeat)
    import paddle

    detector = open_prepared(folder)
    images = np.load(folder / "images.npy")
    extract = detector.extractor(1000)

    def network() -> dict[str, float]:
        for _ in range(0, count, len(images)):
            with paddle.no_grad():
                extract(paddle.to_tensor(images))
        return {"images": count}

    return report(network, options.repeat)


if __name__ == "__main__":
    main()
