"""Time what deploy/infer.py does with one image file, or the network's part of it alone."""

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.bench_inference import FOLDER, REPO, prepare
from benchmarks.measure import own_arguments, report

PHOTO = REPO / "lite_data/bottle/test/broken_large"


def main() -> None:
    """Prepare, or measure one side on <preset>, <format>."""
    options = own_arguments(__doc__)
    preset, _, suffix = options.case.partition(", ")
    folder = FOLDER / preset
    photo = folder / f"photo.{suffix.lower()}"
    if options.side == "prepare":
        prepare(folder)
        with Image.open(sorted(PHOTO.iterdir())[0]) as image:
            image.convert("RGB").resize((900, 900), Image.Resampling.BICUBIC).save(photo)
        return None
    from deploy.bundle import read_bundle
    from deploy.choice import create_engine
    from deploy.engines import EngineOptions
    from utils.predictions import PhotoReader, PredictionWriter

    bundle = read_bundle(str(folder / "bundle"))
    engine, _ = create_engine(bundle, EngineOptions(engine="auto", cpu_threads=options.threads))
    reader = PhotoReader(bundle.input_size, bundle.resize)
    cuts = bundle.image_threshold, bundle.pixel_threshold
    assert cuts[0] is not None
    assert cuts[1] is not None
    writer = PredictionWriter(
        folder / "verdicts", *cuts, bundle.color_scale, pictures=False
    )  # fmt: skip
    (given,) = next(reader.batches([Path(photo)], 1))

    def whole() -> dict[str, float]:
        (read,) = next(reader.batches([Path(photo)], 1))
        found = engine.run(read.network_input[None])
        return {"score": writer.add(read, found.of(0))["score"]}

    def network() -> dict[str, float]:
        return {"score": float(np.float32(engine.run(given.network_input[None]).scores[0]))}

    return report(whole if options.side == "ours" else network, options.repeat)


if __name__ == "__main__":
    main()
