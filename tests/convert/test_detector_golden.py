"""Flows read from state dicts of the reference implementations, against their stored outputs."""

import re
from dataclasses import asdict

import numpy as np
import paddle
import pytest

from convert import cflow, csflow, fastflow, uflow, verify
from convert.common import Flow
from models import FLOWS
from utils.errors import UserError
from utils.schema import MODEL_SECTIONS

CASES = {
    "fastflow_r18_reduced": fastflow, "fastflow_effl0_width_hidden016": fastflow,
    "fastflow_odd_nonsquare_hidden106_grads": fastflow, "cflow_official_cond128_8blocks": cflow,
    "cflow_official_3layers_cond16": cflow, "csflow_ch304_hidden8_nogamma_1block": csflow,
    "csflow_reduced_16ch": csflow, "uflow_resnet_layout_reduced": uflow,
    "uflow_resnet_layout_tiny_grads": uflow,
}  # fmt: skip
COMPARED = r"z\d|logdet\d?|jac\d|anomaly_map|score"
TOLERANCE = 2e-5  # of the largest value; 1.3e-5 was seen


def built(flow: Flow, features: list[np.ndarray], input_size: tuple[int, int]):
    """Build flow and scorer of ours, filled from a file."""
    kind = MODEL_SECTIONS[flow.model["flow"]]
    model = asdict(kind(**flow.model, input_size=input_size))
    sizes = [feature.shape[2:] for feature in features]
    assert flow.channels == [feature.shape[1] for feature in features]
    network, scorer = FLOWS[model["flow"]](model, flow.channels, sizes, np.random.default_rng(0))
    missing, unexpected = network.set_state_dict(flow.head)
    assert not missing
    assert not unexpected
    network.eval()
    return network, scorer


@pytest.mark.parametrize("name", CASES)
def test_a_converted_flow_gives_the_stored_outputs(golden, name):
    case = golden(name)
    family = CASES[name]
    arrays = {key[3:]: array for key, array in case.items() if key.startswith("sd/")}
    given = {"use_gamma": False} if "nogamma" in name else {}
    flow = family.read(arrays, given)
    features = [case[key] for key in sorted(case) if re.fullmatch(r"feat\d", key)]
    finest = features[0].shape[2:]
    size = case["anomaly_map"].shape[2:] if "anomaly_map" in case else (finest[0] * 8,) * 2
    network, scorer = built(flow, features, size)
    inputs = [paddle.to_tensor(feature) for feature in features]
    unit = 1.0 if family is fastflow else 0.0
    scored = None if family is cflow else scorer
    found = verify.outputs(network, scored, inputs, unit)
    checks = verify.differences(found, case, TOLERANCE)
    assert {check.name for check in checks} == {k for k in case if re.fullmatch(COMPARED, k)}
    assert [check for check in checks if not check.ok] == []


def test_references_that_cannot_be_compared(tmp_path):
    (tmp_path / "x.npz").write_text("no", encoding="utf-8")
    with pytest.raises(UserError, match=r"no \.npz file with a reference"):
        verify.read_reference(tmp_path / "x.npz")
    found = {"score": np.zeros(2), "z0": np.zeros((1, 3, 2, 2))}
    with pytest.raises(UserError, match=r"has no output; known are score, z0"):
        verify.differences(found, {"map": np.zeros(2)}, 1e-4)
    with pytest.raises(UserError, match=r"'score' has shape \[3\], ours \[2\]"):
        verify.differences(found, {"score": np.zeros(3)}, 1e-4)
    with pytest.raises(UserError, match="no input"):
        verify.compare(paddle.nn.Layer(), {"score": np.zeros(3)}, unit=0.0, tolerance=1e-4)


def test_differences_are_relative_to_the_largest_value():
    checks = verify.differences(
        {"score": np.array([10.0, 0.001])}, {"score": np.array([10.0, 0.0])}, 1e-4
    )
    assert (checks[0].absolute, checks[0].relative) == (0.001, 0.0001)
    assert checks[0].ok
    assert not verify.differences({"z0": np.ones(2)}, {"z0": np.array([1.0, np.nan])}, 1e-4)[0].ok
    assert "FAILED" in verify.table([verify.Check("z0", 1.0, 1.0, ok=False)], 1e-4)
