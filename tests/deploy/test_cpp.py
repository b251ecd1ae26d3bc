"""The C++ program: built here, it prints the scores of deploy/infer.py."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from deploy import infer, parity
from tests.deploy.test_infer import results
from tests.small_run import REPO, copy_bottle, export, tiny_config, untrained_run

openvino = pytest.importorskip("openvino", reason="requirements-openvino.txt is not installed")
pytest.importorskip("paddle2onnx", reason="requirements-onnx.txt is not installed")
HEADERS = ("/usr/include/stb/stb_image.h", "/usr/include/yaml-cpp/yaml.h")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("cmake") or not shutil.which("g++")
        or not all(Path(header).is_file() for header in HEADERS),
        reason="no cmake, g++, libstb-dev or libyaml-cpp-dev",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cpp")
    cmake = Path(openvino.__file__).parent / "cmake"
    for command in (
        ["cmake", "-S", str(REPO / "deploy/cpp"), "-B", str(folder), f"-DOpenVINO_DIR={cmake}"],
        ["cmake", "--build", str(folder)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "warning" not in done.stderr
    return folder / "flowad_infer"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    untrained_run(folder / "exp/bottle", tiny_config("model.input_size=[64, 96]"))
    data = copy_bottle(folder / "data", train=3, good=2, defective=1)
    with pytest.MonkeyPatch.context() as patch:
        only = {name: parity.CANDIDATES[name] for name in ("paddle",)}
        patch.setattr(parity, "CANDIDATES", only)  # the others are not tried, to save time
        return export(folder / "exp", folder / "b", data, "--onnx")


def run(program: Path, *args: object) -> subprocess.CompletedProcess[str]:
    words = [str(program), *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def pictures(folder: Path) -> Path:
    """Write images of several sizes and pixel formats: smaller and larger than the input."""
    folder.mkdir()
    photo = Image.open(REPO / "images/bottle_bad.png").convert("RGB")
    photo.save(folder / "a.png")
    photo.resize((33, 21)).save(folder / "b.png")
    photo.resize((96, 301)).save(folder / "c d.png")
    photo.convert("L").save(folder / "e.png")
    photo.convert("RGBA").rotate(10).save(folder / "f.png")
    return folder


def test_the_scores_of_infer(program, bundle, tmp_path):
    folder = pictures(tmp_path / "i")
    args = ["--save_inference_dir", str(bundle), "--engine", "openvino"]
    assert infer.main([*args, "--image_path", str(folder), "--output", str(tmp_path / "o")]) == 0
    expected = {Path(r["path"]).name: r for r in results(tmp_path / "o")}
    files = sorted(folder.iterdir())
    done = run(program, bundle, *files, "--cpu_threads", 2)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^(Normal|Anomaly) - score:  (\S+)  (.+)$", done.stdout, re.M)
    assert [Path(path) for _, _, path in lines] == files
    for verdict, score, path in lines:
        own = expected[Path(path).name]
        assert float(score) == pytest.approx(own["score"], abs=2e-6)
        assert verdict == own["verdict"]
    assert np.ptp([r["score"] for r in expected.values()]) > 1e-3


def test_mistakes(program, bundle, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    for args, message in (
        ((bundle,), "usage: flowad_infer BUNDLE IMAGE"),
        ((tmp_path, "a.png"), "no inference.yml here"),
        ((bundle, tmp_path / "broken.png"), "broken.png: cannot be read"),
        ((bundle, tmp_path / "deep.png"), "deep.png: 16 bits per channel"),
        ((bundle, "a.png", "--cpu_threads", "0"), "--cpu_threads 0: must be a whole number"),
    ):
        done = run(program, *args)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "unknown format"),
        ({"thresholds": None}, "export again"),
        ({"quantization": {"images": 1}}, "quantized for ONNX Runtime"),
        ({"input": {"size": [64, 96], "resize": "cv2"}}, "resize 'cv2'; this program knows pil"),
    ],
)
def test_bundles_that_it_cannot_run(program, bundle, tmp_path, change, message):
    shutil.copytree(bundle, tmp_path / "b")
    about = yaml.safe_load((bundle / "inference.yml").read_text(encoding="utf-8"))
    (tmp_path / "b/inference.yml").write_text(yaml.safe_dump(about | change), encoding="utf-8")
    done = run(program, tmp_path / "b", REPO / "images/bottle_good.png")
    assert done.returncode == 2
    assert message in done.stderr
