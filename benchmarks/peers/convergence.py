"""Time anomalib's training from image files to an image AUROC, with its own settings."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench_convergence import FOLDER, Clock, root
from benchmarks.bench_training import SIZE
from benchmarks.measure import arguments
from benchmarks.peers.networks import build, load_backbone, torch
from benchmarks.peers.training import Photographs, optimiser_of, step_of
from metrics.roc import rank_labelled

BATCH = 32  # anomalib's
NORMALISATION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # of the bundled EfficientNet-Lite0


def main() -> None:
    """Train on <preset>, seed <number>."""
    options = arguments(__doc__)
    preset, _, seed = options.case.partition(", seed ")
    torch.set_num_threads(options.threads)
    network = build(preset, (SIZE, SIZE), int(seed)).train()
    backbone = network.encoder if hasattr(network, "encoder") else network
    weights = torch.load(FOLDER / f"{preset}.pt", weights_only=True)
    load_backbone(backbone.feature_extractor, weights)
    step, optimiser = step_of(preset, network), optimiser_of(preset, network)
    bottle = root() / "bottle"
    train = Photographs(sorted((bottle / "train/good").iterdir()), NORMALISATION)
    tests = sorted(path for path in (bottle / "test").glob("*/*"))
    clock = Clock()
    reached = False
    while not reached:
        for batch in torch.utils.data.DataLoader(train, batch_size=BATCH, shuffle=True):
            step(network, optimiser, batch)
        reached = clock.done(lambda: _auroc(network, tests))
    clock.report()


def _auroc(network: Any, paths: list[Path]) -> float:
    """Evaluate all test images as one batch: anomalib's CFLOW scores depend on the others."""
    network.eval()
    images = torch.utils.data.DataLoader(Photographs(paths, NORMALISATION), batch_size=len(paths))
    with torch.inference_mode():
        scores = network(next(iter(images))).pred_score.numpy()
    network.train()
    defective = np.array([path.parent.name != "good" for path in paths])
    return rank_labelled(scores.astype(np.float64), defective).auroc()


if __name__ == "__main__":
    main()
