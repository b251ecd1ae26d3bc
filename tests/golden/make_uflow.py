"""Write uflow.npz: latents of a small seeded flow, pinned when they agreed with the reference.

Run `python -m tests.golden.make_uflow` from the checkout, only after the parity tests passed.
"""

from pathlib import Path

import numpy as np
import paddle

from metrics.nfa import latent_energies, standard_nulls, tree_score
from metrics.nfa_block import block_score
from models.flows.uflow import UFlow
from models.scoring.fastflow import FastFlowScorer

TARGET = Path(__file__).with_name("uflow.npz")
CHANNELS = [5, 6, 17]
SIZES = [(16, 12), (8, 6), (4, 3)]
INPUT = (32, 24)


def pinned_values() -> dict[str, np.ndarray]:
    """Return latents, log-dets, map, score and log-NFA maps of the small flow."""
    rng = np.random.default_rng(0)
    flow = UFlow(
        CHANNELS, SIZES, steps=3, hidden_ratio=1.0, clamp="tanh", alpha=2.0, norm="layer",
        loss="per_sample", init="torch", rng=rng,
    )  # fmt: skip
    for parameter in flow.parameters():
        noise = 0.1 * rng.standard_normal(parameter.shape)
        parameter.set_value(parameter + paddle.to_tensor(noise, "float32"))
    features = [rng.standard_normal((2, c, *s)) for c, s in zip(CHANNELS, SIZES, strict=True)]
    latents, log_dets = flow([paddle.to_tensor(f, "float32") for f in features])
    scorer = FastFlowScorer(SIZES, INPUT, score="probability", align_corners=False, blur_sigma=0.0)
    anomaly_map, score = scorer(latents, log_dets)
    values = {"map": anomaly_map.numpy(), "score": score.numpy()}
    for level in range(3):
        values[f"z{level}"] = latents[level].numpy()
        values[f"log_det{level}"] = log_dets[level].numpy()
    second = [z.numpy()[1].astype(np.float64) for z in latents]
    second[0][:, 4:9, 3:8] *= 6  # a defect
    nulls = standard_nulls([z.shape[0] for z in second])
    values["tree"] = tree_score(latent_energies(second), nulls, INPUT)
    values["block"] = block_score(second, INPUT, high_precision=True)
    return values


if __name__ == "__main__":
    np.savez_compressed(TARGET, **pinned_values())  # type: ignore[arg-type]
