"""Write cflow.npz: latents of a small seeded flow, pinned when they agreed with the reference.

Run `python -m tests.golden.make_cflow` from the checkout, only after the parity tests passed.
"""

from pathlib import Path

import numpy as np
import paddle

from models.flows.cflow import CFlow
from models.scoring.cflow import CFlowScorer

TARGET = Path(__file__).with_name("cflow.npz")
SIZES = [(8, 6), (4, 3)]


def pinned_values() -> dict[str, np.ndarray]:
    """Return latents, log-dets, loss, fibre losses, map and score of the small flow."""
    rng = np.random.default_rng(0)
    flow = CFlow(
        [5, 6], SIZES, steps=3, code_channels=8, permute="soft", clamp="tanh", alpha=1.9, rng=rng
    )
    for parameter in flow.parameters():
        noise = 0.1 * rng.standard_normal(parameter.shape)
        parameter.set_value(parameter + paddle.to_tensor(noise, "float32"))
    shapes = [(2, c, *s) for c, s in zip((5, 6), SIZES, strict=True)]
    features = [paddle.to_tensor(rng.standard_normal(shape), "float32") for shape in shapes]
    latents, log_dets = flow(features)
    scorer = CFlowScorer(SIZES, (32, 24), quantile=0.99, blur_sigma=1.0)
    scorer.fit([(latents, log_dets)])
    anomaly_map, score = scorer(latents, log_dets)
    fiber_losses = [loss.item() for _, loss in flow.fiber_losses(features, 16, "merge", rng)]
    values = {"map": anomaly_map.numpy(), "score": score.numpy()}
    values["loss"] = flow.loss(latents, log_dets).numpy()
    values["fiber_losses"] = np.array(fiber_losses)
    for level in range(2):
        values[f"z{level}"] = latents[level].numpy()
        values[f"log_det{level}"] = log_dets[level].numpy()
    return values


if __name__ == "__main__":
    np.savez_compressed(TARGET, **pinned_values())  # type: ignore[arg-type]
