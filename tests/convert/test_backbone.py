"""The converter of backbone weights: what it writes, says, and refuses."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import backbone as command
from convert.backbone import ALIASES, main, resolve
from models.backbones import BACKBONES
from models.backbones.weights import load_weights, read_weights
from tests.golden import seeded_weights as seeded
from tests.models.test_backbones_foreign import TOLERANCE, Reference
from tests.models.test_backbones_vit import TinyPair, foreign, perturb
from utils.errors import UserError
from utils.torch_file import write_torch


def foreign_file(path: Path, case: str) -> Reference:
    reference = Reference(case)
    write_torch(path, seeded.draw_all(reference.shapes))
    return reference


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> Path:
    """Write a file of ResNet-18 as torchvision does."""
    path = tmp_path_factory.mktemp("foreign") / "resnet18-f37072fd.pth"
    foreign_file(path, "resnet18.torchvision")
    return path


def test_a_file_through_the_command_line(resnet: Path, repo: Path, tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "resnet18.safetensors"
    command_line = [sys.executable, "-m", "convert", "backbone", str(resnet), "--arch", "resnet18"]
    done = subprocess.run(
        [*command_line, "--out", str(out)], cwd=repo, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert done.stdout.splitlines() == [
        f"read {resnet}: torch, 102 arrays, 11,699,112 values",
        "not used: fc.weight, fc.bias",
        f"wrote {out}: resnet18, 100 arrays, 11,186,112 values, sha256 {digest}",
        "resnet18 normalises images with mean 0.485 0.456 0.406, std 0.229 0.224 0.225: "
        "use weights trained so",
        f"next: -o model.backbone=resnet18 -o model.weights={out}",
    ]
    hashes = []
    for source in (resnet, out):
        backbone = BACKBONES["resnet18"]([2, 4, 32])
        load_weights(backbone, source)
        hashes.append(backbone.weight_hash)
    assert hashes[0] == hashes[1]
    assert set(load_file(out)) == set(backbone.state_dict())

    again = subprocess.run(
        [*command_line, "--out", str(out)], cwd=repo, capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    assert again.stderr == f"error: --out {out}: exists; --overwrite replaces it\n"
    assert hashlib.sha256(out.read_bytes()).hexdigest() == digest


def test_both_forms_hold_the_same(resnet: Path, tmp_path: Path) -> None:
    arrays = []
    for suffix in (".safetensors", ".pdparams"):
        out = tmp_path / f"a{suffix}"
        out.write_text("old")
        main([str(resnet), "--arch", "resnet18.a1_in1k", "--out", str(out), "--overwrite"])
        arrays.append(read_weights(out))
    assert arrays[0].keys() == arrays[1].keys()
    for key, array in arrays[0].items():
        np.testing.assert_array_equal(array, arrays[1][key])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdparams", "a.safetensors"]


def test_epsilon_of_timms_own_b5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The names are those of the network from TensorFlow too, so the user must tell."""
    out = tmp_path / "b5.safetensors"
    reference = foreign_file(tmp_path / "b5.pth", "efficientnet_b5.timm-symmetric")
    for arch, is_timms in (("timm/efficientnet_b5.sw_in12k", True), ("tf_efficientnet_b5", False)):
        main([str(tmp_path / "b5.pth"), "--arch", arch, "--out", str(out), "--overwrite"])
        assert ("from epsilon 1e-05 to 0.001" in capsys.readouterr().out) == is_timms
        backbone = reference.build()
        load_weights(backbone, out)
        assert (max(reference.errors(backbone)) < TOLERANCE) == is_timms


def test_names_of_networks() -> None:
    assert all(resolve(name) == (name, False) for name in BACKBONES)
    for alias, name in ALIASES.items():
        assert resolve(alias) == resolve(f"timm/{alias}.some_tag") == (name, False)
    assert resolve("wide_resnet50_2.racm_in1k") == ("wide_resnet50_2", False)
    assert resolve("efficientnet-b5") == ("efficientnet_b5", False)
    assert resolve("efficientnet_b5.sw_in12k_ft_in1k") == ("efficientnet_b5", True)
    for arch, problem in (
        ("resnet34", r"--arch resnet34: choose one of .*resnet18"),
        ("tf_mobilenetv3_large_100", "choose one of"),
        ("efficientnet_lite0.ra_in1k", "tf_efficientnet_lite0$"),
        ("timm/efficientnet_lite0", "pads and normalises differently"),
    ):
        with pytest.raises(UserError, match=problem):
            resolve(arch)


def test_wrong_network(resnet: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    with pytest.raises(UserError) as caught:
        main([str(resnet), "--arch", "mobilenet_v2", "--out", str(out)])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{resnet}: does not fit backbone mobilenet_v2: missing ")
    assert str(caught.value).endswith("; it does fit with --arch resnet18")

    deeper = read_weights(resnet)  # like ResNet-34
    for leaf in ("conv1.weight", "bn1.weight", "conv2.weight", "bn2.weight"):
        deeper[f"layer1.2.{leaf}"] = deeper[f"layer1.1.{leaf}"]
    write_torch(tmp_path / "deeper.pth", deeper)
    with pytest.raises(UserError) as caught:
        main([str(tmp_path / "deeper.pth"), "--arch", "resnet18", "--out", str(out)])
    assert str(caught.value) == (
        f"{tmp_path / 'deeper.pth'}: does not fit backbone resnet18: unknown "
        "layer1.2.conv1.weight, layer1.2.bn1.weight, layer1.2.conv2.weight and 1 more"
    )
    assert not out.exists()


def test_the_output_must_have_a_known_form(resnet: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.pth: must end in \.safetensors or \.pdparams"):
        main([str(resnet), "--arch", "resnet18", "--out", str(tmp_path / "a.pth")])
    with pytest.raises(UserError, match=r"2 input files; resnet18 takes 1$"):
        main([str(resnet)] * 2 + ["--arch", "resnet18", "--out", str(tmp_path / "a.pdparams")])


def test_a_file_that_does_not_read_back_is_not_kept(
    resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(path: Path) -> dict[str, np.ndarray]:
        arrays = dict(read_weights(path))
        return {**arrays, "conv1.weight": arrays["conv1.weight"] * 2}

    monkeypatch.setattr(command, "read_weights", damaged)
    with pytest.raises(UserError, match="does not read back as it was written"):
        main([str(resnet), "--arch", "resnet18", "--out", str(tmp_path / "a.safetensors")])
    assert list(tmp_path.iterdir()) == []


def test_two_files_become_the_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "mcait", TinyPair)
    pair = TinyPair([16, 32])
    perturb(pair)
    files = []
    for part in pair.parts().values():
        state = {key: tensor.numpy() for key, tensor in part.state_dict().items()}
        files.append(str(tmp_path / f"{part.name}.pth"))
        arrays = foreign(state, transposed=True, prefix="module.")
        write_torch(Path(files[-1]), arrays, {"epoch": 299})
    out = tmp_path / "mcait.safetensors"
    main([*files, "--arch", "mcait", "--out", str(out)])
    loaded = TinyPair([16, 32])
    load_weights(loaded, out)
    for key, tensor in pair.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[key].numpy(), tensor.numpy())
    for inputs, problem in (
        (files[::-1], "does not fit backbone cait_m48_448: "),
        (files[:1], r"join a file of each with python -m convert backbone FILE FILE --arch mcait"),
        (files * 2, "4 input files; mcait takes 1 or 2"),
    ):
        with pytest.raises(UserError, match=problem):
            main([*inputs, "--arch", "mcait", "--out", str(out), "--overwrite"])
