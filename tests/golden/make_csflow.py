"""Write csflow.npz: latents of a small seeded flow, pinned when they agreed with the reference.

Run `python -m tests.golden.make_csflow` from the checkout, only after the parity tests passed.
"""

from pathlib import Path

import numpy as np
import paddle

from models.flows.csflow import CSFlow
from models.scoring.csflow import CSFlowScorer

TARGET = Path(__file__).with_name("csflow.npz")
SIZES = [(8, 12), (4, 6), (2, 3)]


def pinned_values() -> dict[str, np.ndarray]:
    """Return latents, log-dets, maps and scores of the small flow."""
    rng = np.random.default_rng(0)
    flow = CSFlow([7] * 3, SIZES, blocks=2, hidden=6, alpha=3.0, permutation="official", rng=rng)
    for parameter in flow.parameters():
        noise = 0.1 * rng.standard_normal(parameter.shape)
        parameter.set_value(parameter + paddle.to_tensor(noise, "float32"))
    features = [rng.standard_normal((2, 7, *size)) for size in SIZES]
    latents, log_dets = flow([paddle.to_tensor(f, "float32") for f in features])
    values: dict[str, np.ndarray] = {}
    for map_from, score in (("largest", "std"), ("all", "mean")):
        scorer = CSFlowScorer(SIZES, (32, 48), score=score, map_from=map_from)
        anomaly_map, scores = scorer(latents, log_dets)
        values |= {f"map_{map_from}": anomaly_map.numpy(), f"score_{score}": scores.numpy()}
    for level in range(3):
        values[f"z{level}"] = latents[level].numpy()
        values[f"log_det{level}"] = log_dets[level].numpy()
    return values


if __name__ == "__main__":
    np.savez_compressed(TARGET, **pinned_values())  # type: ignore[arg-type]
