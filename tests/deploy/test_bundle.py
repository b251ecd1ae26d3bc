"""Bundles: what is written is read back, and what does not belong together is refused."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from deploy.bundle import GRAPHS, ONNX, PARAMETERS, SIDECAR, file_sha256, read_bundle
from metrics.threshold import Threshold
from utils.errors import UserError

IMAGE = Threshold(0.75, "percentile:99", 0.01, 0.2, 4)
PIXEL = Threshold(0.5, "fixed:0.5")


def write(folder: Path, graph: str = GRAPHS[0], **changes) -> Path:
    """Write a bundle whose graph and parameters are only bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / graph).write_bytes(b"graph")
    (folder / PARAMETERS).write_bytes(b"parameters")
    about = {
        "format": 1,
        "model": {"preset": "p"},
        "input": {"size": [64, 96], "resize": "pil"},
        "thresholds": {"image": IMAGE.to_dict(), "pixel": PIXEL.to_dict()},
        "color_scale": [0.25, 1],
        "files": {name: file_sha256(folder / name) for name in (graph, PARAMETERS)},
        **changes,
    }
    (folder / SIDECAR).write_text(yaml.safe_dump(about), encoding="utf-8")
    return folder


def with_onnx(folder: Path, **changes) -> Path:
    """Write a bundle that lists an ONNX graph too."""
    write(folder)
    (folder / ONNX).write_bytes(b"onnx")
    files = {name: file_sha256(folder / name) for name in (GRAPHS[0], PARAMETERS, ONNX)}
    return write(folder, files=files, **changes)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_bundle(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("graph", GRAPHS)
def test_reading(tmp_path, graph):
    bundle = read_bundle(str(write(tmp_path / "b", graph)))
    assert bundle.graph == tmp_path / "b" / graph
    assert bundle.parameters == tmp_path / "b" / PARAMETERS
    assert bundle.input_size == (64, 96)
    assert bundle.resize == "pil"
    assert bundle.image_threshold == IMAGE
    assert bundle.pixel_threshold == PIXEL
    assert bundle.color_scale == (0.25, 1.0)
    assert isinstance(bundle.color_scale[1], float)
    assert bundle.about["model"] == {"preset": "p"}


def test_an_onnx_graph_is_optional(tmp_path):
    assert read_bundle(write(tmp_path / "without")).onnx is None
    assert read_bundle(with_onnx(tmp_path / "with")).onnx == tmp_path / "with" / ONNX


def test_an_onnx_graph_that_is_not_listed_is_not_taken(tmp_path):
    """One that an older export left behind, say."""
    (write(tmp_path) / ONNX).write_bytes(b"of another model")
    assert read_bundle(tmp_path).onnx is None


@pytest.mark.parametrize("content", [None, b"onnX"])
def test_a_listed_onnx_graph_is_checked(tmp_path, content):
    file = with_onnx(tmp_path) / ONNX
    file.unlink()
    if content:
        file.write_bytes(content)
    assert str(file) in refusal(tmp_path)


def test_engines(tmp_path):
    engines = {
        "paddle": {"passed": True, "ms": 3, "max_score_difference": 0.0},
        "onnx": {"passed": False, "reason": "it ended with code -11"},
    }
    assert read_bundle(write(tmp_path / "a", engines=engines)).engines == engines
    assert read_bundle(write(tmp_path / "older")).engines == {}


def test_paddle_3_comes_before_paddle_2(tmp_path):
    write(tmp_path)
    (tmp_path / GRAPHS[1]).write_bytes(b"old one")
    assert read_bundle(tmp_path).graph == tmp_path / GRAPHS[0]


@pytest.mark.parametrize("missing", [SIDECAR, GRAPHS[0], PARAMETERS])
def test_missing_files(tmp_path, missing):
    write(tmp_path)
    (tmp_path / missing).unlink()
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert missing in message


def test_no_folder_at_all(tmp_path):
    assert "no inference.yml here; make the bundle with deploy/export_model.py" in refusal(
        tmp_path / "none"
    )


@pytest.mark.parametrize("name", [GRAPHS[0], PARAMETERS])
def test_changed_files(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).write_bytes(b"grapH")
    assert f"{tmp_path / name}: not the file that inference.yml describes" in refusal(tmp_path)


def test_files_of_two_bundles(tmp_path):
    """What an interrupted copy leaves: parameters of one model, the rest of another."""
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    (two / PARAMETERS).write_bytes(b"other parameters")
    write_again = yaml.safe_load((two / SIDECAR).read_text())
    write_again["files"][PARAMETERS] = file_sha256(two / PARAMETERS)
    (two / SIDECAR).write_text(yaml.safe_dump(write_again))
    read_bundle(two)
    shutil.copy(two / PARAMETERS, one)
    assert PARAMETERS in refusal(one)


def test_a_file_that_is_not_listed(tmp_path):
    write(tmp_path, files={PARAMETERS: "0" * 64})
    assert "not the file that inference.yml describes" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "not a YAML file"),
        ("\xff\xfe\xfa", "not a YAML file"),
        ("", "bundle format None; this version reads 1"),
        ("- 1", "bundle format None"),
        ("format: 2", "bundle format 2; this version reads 1"),
        ("format: 1", "'files' is missing"),
    ],
)
def test_damaged_descriptions(tmp_path, text, words):
    write(tmp_path)
    (tmp_path / SIDECAR).write_bytes(text.encode("latin-1"))
    message = refusal(tmp_path)
    assert words in message
    assert SIDECAR in message


@pytest.mark.parametrize(
    "changes",
    [
        {"input": {"resize": "pil"}},
        {"input": {"size": [64], "resize": "pil"}},
        {"input": {"size": "big", "resize": "pil"}},
        {"input": None},
        {"thresholds": {"image": IMAGE.to_dict()}},
        {"thresholds": {"image": {"value": "x", "policy": "f1"}, "pixel": PIXEL.to_dict()}},
        {"thresholds": 3},
        {"color_scale": [1]},
        {"color_scale": 1},
        {"files": ["inference.json"]},
        {"engines": ["paddle"]},
        {"engines": {"paddle": 1}},
        {"engines": {"paddle": {"passed": "yes", "ms": 3}}},
        {"engines": {"paddle": {"passed": True}}},
        {"engines": {"paddle": {"passed": True, "ms": None}}},
        {"engines": {"paddle": {"passed": True, "ms": 0}}},
    ],
    ids=str,
)
def test_incomplete_descriptions(tmp_path, changes):
    write(tmp_path, **changes)
    message = refusal(tmp_path)
    assert str(tmp_path / SIDECAR) in message
    assert message.endswith("export again")


def test_file_digest(tmp_path):
    import hashlib

    data = b"x" * 3_000_000
    (tmp_path / "f").write_bytes(data)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(data).hexdigest()
    with pytest.raises(UserError, match="cannot be read"):
        file_sha256(tmp_path / "none")


def test_what_is_written_is_plain_yaml(tmp_path):
    """No Python tags: other programs read it, and reading executes nothing."""
    text = (write(tmp_path) / SIDECAR).read_text()
    assert "!!" not in text
    assert json.loads(json.dumps(yaml.safe_load(text)))["format"] == 1
