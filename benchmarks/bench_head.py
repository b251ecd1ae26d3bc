"""Time a step of FastFlow's head: forward, backward and Adam on features that are there."""

import os

import numpy as np

from benchmarks.bench_inference import open_prepared, parts, prepare
from benchmarks.measure import own_arguments, report

RATE, DECAY = 1e-3, 1e-5


def main() -> None:
    """Prepare, or measure one side."""
    options = own_arguments(__doc__)
    folder, batch = parts(options.case)
    if options.side == "prepare":
        return prepare(folder)
    import paddle

    from engine.trainer import Adam
    from models.flows import onednn, ops
    from utils.schema import TrainSection

    if options.side != "ours":  # channels first, by Paddle's own convolution
        os.environ[onednn.SWITCH] = "0"
        ops.channels_last = lambda: False
    detector = open_prepared(folder)
    with np.load(folder / "features.npz") as file:
        features = [paddle.to_tensor(file[name][:batch]) for name in file]
    detector.train()
    weights = [p for p in detector.parameters() if not p.stop_gradient]
    if options.side == "ours":
        adam = Adam(weights, TrainSection(lr=RATE, weight_decay=DECAY))
    else:
        adam = paddle.optimizer.Adam(RATE, parameters=weights, weight_decay=DECAY)

    def call() -> dict[str, float]:
        loss, nats = detector.objective(features)
        loss.backward()
        adam.step()
        adam.clear_grad(set_to_zero=False)
        return {"nats per dimension": nats.item()}

    return report(call, options.repeat)


if __name__ == "__main__":
    main()
