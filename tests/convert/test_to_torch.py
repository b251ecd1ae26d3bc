"""Runs as state dicts in anomalib's names: nothing is lost on the way there and back."""

from pathlib import Path

import numpy as np
import pytest

from convert import detector as converter
from convert import to_torch
from tests.convert import foreign_files as foreign
from tests.small_run import tiny_config, untrained_run
from utils.config import load, override
from utils.errors import UserError
from utils.torch_file import read_torch

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("case", ["fastflow", "cflow"])
def test_there_and_back_is_exact(case, tmp_path, capsys):
    run = tmp_path / "exp/bottle"
    file = foreign.checkpoint(case, tmp_path / "in.ckpt")
    assert converter.main([str(file), "--out", str(run)]) == 0
    assert converter.main([str(run), "--to", "torch", "--out", str(tmp_path / "out.pt")]) == 0
    assert "for anomalib's" in capsys.readouterr().out
    arrays, skipped = read_torch(tmp_path / "out.pt")
    drawn = foreign.network(case)
    assert not skipped
    assert arrays.keys() == drawn.keys()
    for name, array in arrays.items():
        assert array.shape == drawn[name].shape
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(array, drawn[name], err_msg=name)


def test_how_to_build_the_network_is_said():
    config = load(REPO / "configs/cflow_resnet18.yaml")
    lines = to_torch.check(config)
    assert "CflowModel(backbone='resnet18', layers=['layer2', 'layer3', 'layer4']" in lines[0]
    assert any("pads with zeros" in line for line in lines)
    deit = to_torch.check(load(REPO / "configs/fastflow_deit_base_distilled_384.yaml"))
    assert "backbone='deit_base_distilled_patch16_384', flow_steps=20" in deit[0]
    assert any("strict=False" in line for line in deit)


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("resnet18", [], "model.coupling is two_sided; anomalib's network has one_sided only"),
        ("fastflow_efficientnet_lite0", [], "backbone efficientnet_lite0 is not one of anomalib's"),
        ("fastflow_resnet18", ["model.clamp=tanh_scaled"], "model.clamp is tanh_scaled"),
        ("fastflow_resnet18", ["model.norm=none"], "model.norm is none; .* has layer only"),
        ("cflow_resnet18", ["model.code_channels=0"], "CFLOW-AD with a position code, only"),
        ("uflow_resnet18", [], "takes FastFlow, and CFLOW-AD with a position code, only"),
    ],
)
def test_networks_that_anomalib_has_not(preset, changes, message):
    config = override(load(REPO / f"configs/{preset}.yaml"), changes)
    with pytest.raises(UserError, match=message):
        to_torch.check(config)


def test_a_refused_run_leaves_no_file(tmp_path):
    untrained_run(tmp_path / "exp/bottle", tiny_config())
    with pytest.raises(UserError, match="efficientnet_lite0"):
        to_torch.export(tmp_path / "exp/bottle", "best", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
