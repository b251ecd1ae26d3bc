"""Detectors of anomalib, converted: their outputs, the run that comes out, what goes wrong.

The reference outputs are anomalib's: see tests/golden/make_detectors.py. The content of a file is
drawn from its names, so none is stored.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import eval as evaluation
import predict
from convert import detector as converter
from engine import checkpoint, session
from tests.convert import foreign_files as foreign
from tests.small_run import REPO, copy_bottle, export
from utils.config import load
from utils.errors import UserError

TOLERANCE = "1e-5"  # of the largest value; 2.2e-6 was seen


def convert(path: Path, run: Path, *more: str) -> int:
    return converter.main([str(path), "--out", str(run), *more])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {case: foreign.checkpoint(case, folder / f"{case}.ckpt") for case in foreign.CASES}


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("references")
    for case in foreign.CASES:
        np.savez(folder / f"{case}.npz", **foreign.reference(case))  # type: ignore[arg-type]
    return {case: folder / f"{case}.npz" for case in foreign.CASES}


@pytest.fixture(scope="module")
def runs(files, references, tmp_path_factory) -> dict[str, Path]:
    """Convert every file, verified, and move what comes out."""
    before, after = (tmp_path_factory.mktemp(name) for name in ("before", "after"))
    for case, path in files.items():
        run = before / case / "bottle"
        verify = ("--verify", str(references[case]), "--tolerance", TOLERANCE)
        assert convert(path, run, *verify) == 0
    for case in files:
        shutil.move(before / case, after / case)
    return {case: after / case / "bottle" for case in files}


@pytest.mark.parametrize("case", foreign.CASES)
def test_a_run_gives_the_outputs_of_the_source(runs, case):
    """Also from its new place, where it finds its own backbone."""
    found, detector, calibration = session.open_detector(f"{runs[case].parent}/", "bottle", "best")
    reference = foreign.reference(case)
    unit = None if case == "cflow" else float(case == "fastflow")
    checks = converter.compare(detector, reference, unit=unit, tolerance=float(TOLERANCE))
    assert {check.name for check in checks} == set(reference) - {"image"}
    assert all(check.ok for check in checks)
    assert calibration is None
    assert found.config.model.input_size == reference["image"].shape[2:]


def test_what_the_files_tell_is_in_the_configuration(runs):
    found: dict[str, Any] = {
        case: checkpoint.open_run(run, "last").config for case, run in runs.items()
    }
    fast, fibers = found["fastflow"].model, found["cflow"].model
    assert (fast.steps, fast.conv3x3_only, fast.norm, fast.permute) == (3, False, "layer", "hard")
    assert (fast.backbone, fast.strides) == ("resnet18", (4, 8, 16))
    assert (fibers.steps, fibers.code_channels, fibers.alpha) == (2, 16, 1.7)
    assert (fibers.strides, fibers.padding, fibers.permute) == ((8, 16, 32), None, "hard")
    cross = found["csflow"].model
    assert (cross.blocks, cross.hidden, cross.last_kernel, cross.use_gamma) == (2, 4, 5, True)
    assert (cross.padding, cross.permutation, cross.map_from) == ("symmetric", "anomalib", "all")
    assert found["csflow"].train.betas == (0.5, 0.9)
    assert (found["uflow"].model.loss, found["uflow"].nfa.method) == ("batch_sum", "none")


def test_meta_data_say_where_a_run_came_from(runs, files):
    meta = json.loads((runs["uflow"] / "best/meta.json").read_text(encoding="utf-8"))
    assert meta["preset"] == "converted:anomalib"
    assert meta["converted"]["sha256"] == converter.file_hash(files["uflow"])
    assert meta["converted"]["source"] == "anomalib's U-Flow"
    assert any("NFA tree is of no use" in note for note in meta["converted"]["notes"])
    assert meta["progress"]["epoch"] == 7
    assert meta["backbone"]["source"] == checkpoint.BACKBONE


def test_backbone_weights_have_our_names(runs):
    arrays = load_file(runs["fastflow"] / checkpoint.BACKBONE)
    drawn = foreign.network("fastflow")
    np.testing.assert_array_equal(
        arrays["layer2.0.bn1._variance"], drawn["feature_extractor.layer2.0.bn1.running_var"]
    )
    assert not [name for name in arrays if "running" in name or "num_batches" in name]


def test_a_false_reference_fails_and_leaves_nothing(files, tmp_path, capsys):
    reference = dict(foreign.reference("fastflow"))
    reference["z2"] = reference["z2"] + np.float32(1e-3) * np.abs(reference["z2"]).max()
    np.savez(tmp_path / "ref.npz", **reference)  # type: ignore[arg-type]
    run = tmp_path / "exp/bottle"
    assert convert(files["fastflow"], run, "--verify", str(tmp_path / "ref.npz")) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "FAILED, more than 0.0001" in lines["z2"]
    assert lines["z1"].endswith("ok")
    assert not run.exists()
    assert not list(run.parent.iterdir())


def test_normal_images_give_thresholds_and_peaks(files, tmp_path, capsys):
    data = copy_bottle(tmp_path / "data", train=4, good=2, defective=1)
    exp = tmp_path / "exp"
    assert convert(files["cflow"], exp / "bottle", "--normals", str(data)) == 0
    assert "the false-alarm rate is optimistic" in capsys.readouterr().out
    found, detector, calibration = session.open_detector(f"{exp}/", "bottle", "best")
    assert calibration is not None
    assert calibration.image.normals == 4
    assert found.config.data.root == str(data)
    untouched = session.build_detector(vars(found.config.model)).scorer.peaks.numpy()
    assert (detector.scorer.peaks.numpy() != untouched).all()
    assert evaluation.main(["--exp_dir", str(exp)]) == 0
    rows = json.loads((exp / "bottle/results.json").read_text(encoding="utf-8"))["rows"]
    assert rows[0]["settings"]["checkpoint"] == "cflow.ckpt"
    assert rows[0]["metrics"]["image_auroc"] is not None
    photo = next((data / "bottle/test/good").iterdir())
    assert predict.main(["--exp_dir", str(exp), "--image_path", str(photo)]) == 0
    assert (export(exp, tmp_path / "bundle", data) / "inference.yml").is_file()


def test_without_normal_images_there_are_no_thresholds(runs, tmp_path, capsys):
    exp = f"{runs['uflow'].parent}/"
    photo = str(REPO / "images/bottle_good.png")
    with pytest.raises(UserError, match=r"convert with --normals, or give --image_threshold"):
        predict.main(["--exp_dir", exp, "--image_path", photo])
    given = ["--image_threshold", "0.5", "--pixel_threshold", "0.5", "--output", str(tmp_path)]
    assert predict.main(["--exp_dir", exp, "--image_path", photo, *given]) == 0
    with pytest.raises(UserError, match="or convert with --normals"):
        export(runs["uflow"].parent, tmp_path / "bundle", tmp_path)


def test_thresholds_of_the_source_are_told_in_our_unit(files, tmp_path, capsys):
    run = tmp_path / "exp/bottle"
    assert convert(files["fastflow"], run) == 0
    out = capsys.readouterr().out
    assert "thresholds, in our unit: --image_threshold 0.75; they have the largest F1" in out
    assert "--pixel_threshold" not in out  # it is nan in the file
    assert "source: anomalib's FastFlow: FastFlow, 3 level(s) of 3 one-sided steps" in out


def test_a_run_is_replaced_only_if_wanted(runs, files, tmp_path):
    run = tmp_path / "exp/bottle"
    shutil.copytree(runs["uflow"], run)
    (run / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="holds a run; --overwrite replaces it"):
        convert(files["fastflow"], run)
    assert convert(files["fastflow"], run, "--overwrite") == 0
    assert checkpoint.open_run(run, "best").config.model.flow == "fastflow"
    assert (run / "notes.txt").exists()
    checkpoint.remove_run(run)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]


def test_a_converted_run_cannot_be_trained_on(runs):
    config = load(REPO / "configs/uflow_resnet18.yaml")
    with pytest.raises(UserError, match="converted from a file without an optimizer"):
        checkpoint.goes_on(runs["uflow"], config, resume=True, overwrite=False)


def test_another_input_size_than_that_of_the_norms(files, tmp_path):
    with pytest.raises(UserError, match=r"norms\.0\.weight' is missing or has another shape"):
        convert(files["fastflow"], tmp_path / "exp/bottle", "--input-size", "128")
    with pytest.raises(UserError, match="--input-size big: give N or HEIGHTxWIDTH"):
        convert(files["fastflow"], tmp_path / "exp/bottle", "--input-size", "big")


def test_official_names_and_a_backbone_from_elsewhere(runs, references, tmp_path, capsys):
    """The weights of anomalib's CS-Flow under the official names, which come without a backbone."""
    arrays = foreign.renamed(
        {k: a for k, a in foreign.network("csflow").items() if k.startswith("graph.")},
        (r"^graph\.graph\.", ""), (r"\.cross_convolution(\d)\.", r".s\1."),
        (r"module_list\.3\.", "module_list.6."), (r"module_list\.1\.", "module_list.4."),
    )  # fmt: skip
    foreign.write_torch(tmp_path / "official.pt", arrays)
    more = [
        "--backbone-weights", str(runs["csflow"] / checkpoint.BACKBONE), "--input-size", "128",
        "--verify", str(references["csflow"]), "--tolerance", TOLERANCE,
        "-o", "model.padding=symmetric", "-o", "model.map_from=all",
        "-o", "model.permutation=anomalib",
    ]  # fmt: skip
    run = tmp_path / "exp/bottle"
    assert convert(tmp_path / "official.pt", run, *more) == 0
    out = capsys.readouterr().out
    assert "source: official CS-Flow" in out
    assert "efficientnet_b5 whose weights are not in the file, input 128×128" in out
    assert not (run / checkpoint.BACKBONE).exists()
    own_permutations = [*more[:-2], "--overwrite"]
    assert convert(tmp_path / "official.pt", run, *own_permutations) == 1
