"""Write fastflow.npz: latents of a small seeded flow, pinned when they agreed with the reference.

Run `python -m tests.golden.make_fastflow` from the checkout, only after the parity tests passed.
"""

from pathlib import Path

import numpy as np
import paddle

from models.flows.fastflow import FastFlow
from models.scoring.fastflow import FastFlowScorer

TARGET = Path(__file__).with_name("fastflow.npz")
SIZES = [(8, 6), (4, 3)]


def pinned_values() -> dict[str, np.ndarray]:
    """Return features, latents, log-dets, map and score of the small flow."""
    rng = np.random.default_rng(0)
    flow = FastFlow(
        [5, 6], SIZES, steps=3, hidden_ratio=1.0, conv3x3_only=False, coupling="two_sided",
        clamp="tanh", alpha=2.0, norm="layer", norm_momentum=0.9, global_scale="softplus",
        loss_norm="none", init="torch", rng=rng,
    )  # fmt: skip
    for parameter in flow.parameters():
        noise = 0.1 * rng.standard_normal(parameter.shape)
        parameter.set_value(parameter + paddle.to_tensor(noise, "float32"))
    features = [rng.standard_normal((2, c, *s)) for c, s in zip((5, 6), SIZES, strict=True)]
    latents, log_dets = flow([paddle.to_tensor(f, "float32") for f in features])
    scorer = FastFlowScorer(SIZES, (32, 24), score="nll", align_corners=False, blur_sigma=2.0)
    anomaly_map, score = scorer(latents, log_dets)
    values = {"map": anomaly_map.numpy(), "score": score.numpy()}
    for level in range(2):
        values[f"z{level}"] = latents[level].numpy()
        values[f"log_det{level}"] = log_dets[level].numpy()
    return values


if __name__ == "__main__":
    np.savez_compressed(TARGET, **pinned_values())  # type: ignore[arg-type]
