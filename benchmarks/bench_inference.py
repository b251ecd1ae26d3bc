"""Time an exported detector on batches of images, by the engine that the side names."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import own_arguments, report, trained_weights

REPO = Path(__file__).resolve().parent.parent
FOLDER = REPO / "results/benchmarks_inference"
ENGINES = {
    "ours": "auto", "Paddle Inference": "paddle", "ONNX Runtime": "onnx", "OpenVINO": "openvino",
}  # fmt: skip
IMAGES = 8
SAME_MAP = ("fastflow_resnet18", "fastflow_efficientnet_lite0")  # as anomalib, weights and all
OPTIONS = {  # what anomalib's network computes
    "fastflow_efficientnet_lite0": (
        "model.score=probability", "model.blur_sigma=0", "model.score_from=sharp",
    ),
    "cflow_resnet18": ("model.padding=zeros", "model.permute=hard"),
}  # fmt: skip


def parts(case: str) -> tuple[Path, int]:
    """Return the folder of a case <preset>, batch <size>, and the size of its batch."""
    preset, _, batch = case.partition(", batch ")
    return FOLDER / preset, int(batch)


def prepare(folder: Path) -> None:
    """Write a detector with seeded weights: its run, its bundle, its images, and for anomalib."""
    import paddle

    from convert.to_torch import state_dict
    from tests.small_run import export, photographs, untrained_run
    from utils.config import load, override
    from utils.torch_file import write_torch

    options = ["train.seed=0", "model.input_size=256", *OPTIONS.get(folder.name, ())]
    config = load(REPO / f"configs/{folder.name}.yaml", options).for_category("bottle")
    config = override(config, options)  # a category may have an input size of its own
    done = folder / "prepared.txt"
    if done.is_file() and done.read_text() == str(config):
        return
    shutil.rmtree(folder, ignore_errors=True)
    detector = untrained_run(folder / "run/bottle", config)
    export(folder / "run", folder / "bundle", REPO / "lite_data", "--onnx", "-cat", "bottle")
    if folder.name in SAME_MAP:
        state = state_dict(detector.backbone, detector.flow, config)
        write_torch(folder / "anomalib.pt", state)
    backbone = detector.backbone
    np.save(folder / "normalisation.npy", [backbone.mean, backbone.std])
    np.save(folder / "weights.npy", trained_weights(detector.flow))
    images = photographs(IMAGES, 256)
    with paddle.no_grad():
        features = detector.features(paddle.to_tensor(images))
    np.savez(folder / "features.npz", *(level.numpy() for level in features))
    np.save(folder / "images.npy", images)
    done.write_text(str(config))


def open_prepared(folder: Path) -> Any:
    """Return the detector that `prepare` wrote, for images of its size."""
    from engine import session

    _, detector, _ = session.open_detector(f"{folder / 'run'}/", "bottle", "last")
    return detector


def main() -> None:
    """Prepare, or measure one side."""
    options = own_arguments(__doc__)
    folder, batch = parts(options.case)
    if options.side == "prepare":
        return prepare(folder)
    from deploy.bundle import read_bundle
    from deploy.choice import create_engine
    from deploy.engines import EngineOptions

    chosen = EngineOptions(engine=ENGINES[options.side], cpu_threads=options.threads)
    engine, _ = create_engine(read_bundle(str(folder / "bundle")), chosen)
    images = np.load(folder / "images.npy")[:batch]
    known = {"trained weights": float(np.load(folder / "weights.npy"))}

    def call() -> dict[str, float]:
        found = engine.run(images)
        scores = {f"score {i}": score for i, score in enumerate(found.scores)}
        return known | scores | {"map": found.maps[0].mean()}

    return report(call, options.repeat)


if __name__ == "__main__":
    main()
