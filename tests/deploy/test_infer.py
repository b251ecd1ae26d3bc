"""Inference with a bundle: the scores of every other way to the same image; its options."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

import eval as evaluation
import predict
from deploy import infer
from deploy.bundle import read_bundle
from deploy.engines import EngineOptions, PaddleEngine
from tests.small_run import (
    REPO,
    export,
    script,
    tiny_config,
    untrained_run,
)
from utils.errors import UserError
from utils.image import read_image, to_input

# The modules that a bundle needs beside deploy/ (DESIGN, layer L0, and the two that wrap it).
L0 = (
    "config", "schema", "constraints", "image", "files", "errors", "visualize", "predictions",
    "cli", "names", "runtime",
)  # fmt: skip


def results(folder: Path) -> list[dict]:
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def inferred(bundle: Path, images: Path | str, out: Path, *more: str) -> list[dict]:
    args = ["--save_inference_dir", str(bundle), "--image_path", str(images), "--output", str(out)]
    assert infer.main([*args, *more]) == 0
    return results(out)


def scores(found: list[dict]) -> dict[str, float]:
    return {each["path"]: each["score"] for each in found}


def four_ways(exp: Path, bundle: Path, data: Path, out: Path) -> list[dict[str, float]]:
    """Score all test images by predict.py, eval.py, the engine itself and deploy/infer.py."""
    test = data / "bottle/test"
    common = ["--exp_dir", str(exp)]
    predict.main([*common, "--image_path", str(test), "--output", str(out / "predict")])
    evaluation.main([*common, "--data", str(data)])
    row = json.loads((exp / "bottle/results.json").read_text(encoding="utf-8"))["rows"][0]
    read = read_bundle(bundle)
    engine = PaddleEngine(read, EngineOptions())
    direct = {}
    for path in sorted(test.rglob("*.png")):
        image = to_input(read_image(path), read.input_size, read.resize)
        direct[str(path)] = float(engine.run(image[None])[1][0])
    return [
        scores(results(out / "predict")),
        scores(row["images"]),
        direct,
        scores(inferred(bundle, test, out / "infer", "--batch_size", "4")),
    ]


def assert_agree(ways: list[dict[str, float]], count: int) -> None:
    for way in ways:
        assert len(way) == count
        assert way.keys() == ways[0].keys()
        for path, score in way.items():
            assert score == pytest.approx(ways[0][path], abs=1e-5), path
    assert len(set(ways[0].values())) > count / 2


def test_all_ways_to_a_score_agree(exp, bundle, data, tmp_path):
    assert_agree(four_ways(exp, bundle, data, tmp_path), 9)


@pytest.mark.slow
def test_all_ways_to_a_score_agree_on_photographs(shared_data, tmp_path):
    """The full preset at 256×256 on MVTec AD's bottle."""
    root = shared_data / "mvtec"
    if not (root / "bottle/test").is_dir():
        pytest.skip("no mvtec/bottle in the shared data")
    few = tmp_path / "data/bottle"
    for folder in ("test/good", "test/broken_small", "ground_truth/broken_small"):
        (few / folder).mkdir(parents=True)
        for file in sorted((root / "bottle" / folder).iterdir())[:3]:
            shutil.copy(file, few / folder)
    from utils.config import load

    config = load(REPO / "configs/fastflow_efficientnet_lite0.yaml")
    untrained_run(tmp_path / "exp/bottle", config)
    data = few.parent
    bundle = export(tmp_path / "exp", tmp_path / "bundle", data)
    assert_agree(four_ways(tmp_path / "exp", bundle, data, tmp_path), 6)


def test_verdicts_and_regions_agree(exp, bundle, data, tmp_path):
    test = data / "bottle/test"
    predict.main(
        ["--exp_dir", str(exp), "--image_path", str(test), "--output", str(tmp_path / "p")]
    )
    pairs = zip(results(tmp_path / "p"), inferred(bundle, test, tmp_path / "i"), strict=True)
    for ours, theirs in pairs:
        assert list(ours) == list(theirs)
        assert ours["verdict"] == theirs["verdict"]
        assert ours["threshold"] == theirs["threshold"]
        assert ours["pixel_threshold"] == theirs["pixel_threshold"]
        assert len(ours["regions"]) == len(theirs["regions"])
        assert ours["map_mean"] == pytest.approx(theirs["map_mean"], abs=1e-5)


def test_the_documented_single_image(bundle, tmp_path, capsys):
    """`Normal - score:  0.614`: nothing but the verdict for one image."""
    inferred(bundle, REPO / "images/bottle_bad.png", tmp_path / "out")
    out = capsys.readouterr().out
    assert len(re.findall(r"^(?:Normal|Anomaly) - score:  -?\d+\.\d{3}$", out, re.M)) == 1
    assert f"results in {tmp_path / 'out'}" in out
    assert (tmp_path / "out/bottle_bad.png").is_file()


def test_batch_sizes(bundle, data, tmp_path):
    test = data / "bottle/test"
    one = scores(inferred(bundle, test, tmp_path / "1"))
    five = scores(inferred(bundle, test, tmp_path / "5", "--batch_size", "5"))
    assert one == pytest.approx(five, rel=1e-5)
    bounded = ["--batch_size", "50", "--max_batch_size", "2"]
    assert scores(inferred(bundle, test, tmp_path / "2", *bounded)) == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_onednn(bundle, data, tmp_path, capsys):
    test = data / "bottle/test"
    plain = scores(inferred(bundle, test, tmp_path / "plain"))
    fast = scores(
        inferred(bundle, test, tmp_path / "fast", "--enable_mkldnn", "--cpu_threads", "2")
    )
    assert "oneDNN: on (the self-check passed)" in capsys.readouterr().out
    assert fast == pytest.approx(plain, abs=1e-5)


@pytest.mark.slow
def test_the_fastest_engine(bundle, data, tmp_path, capsys):
    test = data / "bottle/test"
    plain = scores(inferred(bundle, test, tmp_path / "plain"))
    found = inferred(bundle, test, tmp_path / "auto", "--engine", "auto", "--benchmark")
    out = capsys.readouterr().out
    assert re.search(r"^engine: paddle(_onednn)? \(fastest at export, [\d.]+ ms\)$", out, re.M)
    assert re.search(r"^engine: paddle \(paddlepaddle(-gpu)? \d", out, re.M)
    assert scores(found) == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "tvm"], "--engine tvm: choose one of paddle, onnx, openvino, auto"),
        (["--precision", "fp16"], "--precision fp16: Paddle on a CPU computes in fp32"),
        (["--use_tensorrt"], "--use_tensorrt: TensorRT is for NVIDIA GPUs"),
    ],
)
def test_what_does_not_run(bundle, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        inferred(bundle, data_image(), tmp_path / "o", *options)
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="a GPU build")
def test_gpu_on_a_cpu_build_is_one_line(bundle):
    done = script("deploy/infer.py", "--save_inference_dir", str(bundle), "--use_gpu", "True")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--use_gpu: this Paddle build has no GPU support" in done.stderr
    assert done.stdout == ""


def test_thresholds_of_the_command_line(bundle, data, tmp_path):
    test = data / "bottle/test"
    everything = inferred(bundle, test, tmp_path / "a", "--image_threshold=-1e9")
    assert {each["verdict"] for each in everything} == {"Anomaly"}
    assert {each["threshold"] for each in everything} == {-1e9}
    nothing = inferred(
        bundle, test, tmp_path / "b", "--image_threshold", "1e9", "--pixel_threshold", "1e9"
    )
    assert {each["verdict"] for each in nothing} == {"Normal"}
    assert not any(each["regions"] for each in nothing)
    with pytest.raises(UserError, match="must be a number"):
        inferred(bundle, test, tmp_path / "c", "--image_threshold", "nan")


def test_maps(bundle, data, tmp_path):
    first = inferred(bundle, data / "bottle/test/good", tmp_path / "o", "--save_maps")[0]
    saved = np.load(tmp_path / "o" / first["map"])
    assert saved.shape == read_image(Path(first["path"])).shape[:2]
    assert saved.max() <= first["map_max"] + 1e-6


def test_the_benchmark(bundle, data, tmp_path, capsys):
    inferred(
        bundle, data / "bottle/test", tmp_path / "o", "--benchmark", "True", "--warmup", "1",
        "--batch_size", "2", "--cpu_threads", "2",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "data_num: 7" in out  # 9 images, less a batch of 2
    assert re.search(r"^inference_time\(ms\): mean: \d+\.\d\d, p50: ", out, re.M)
    for line in ("batch_size: 2", "input_shape: 3,64,64", "cpu_math_library_num_threads: 2",
                 "runtime_device: cpu", "enable_mkldnn: False", "precision: fp32"):  # fmt: skip
        assert line in out.splitlines()
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["results.jsonl"]


def test_unreadable_images(bundle, data, tmp_path, capsys):
    folder = tmp_path / "in"
    shutil.copytree(data / "bottle/test/good", folder)
    (folder / "000.png").write_bytes(b"broken")
    assert len(inferred(bundle, folder, tmp_path / "o", "--batch_size", "2")) == 2
    assert "warning: skipped 1 unreadable image(s)" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"000\.png: cannot read this image"):
        inferred(bundle, folder / "000.png", tmp_path / "o")


def test_images_are_not_overwritten(bundle, tmp_path):
    shutil.copy(REPO / "images/bottle_bad.png", tmp_path)
    before = (tmp_path / "bottle_bad.png").read_bytes()
    with pytest.raises(UserError, match="holds the images themselves"):
        inferred(bundle, tmp_path / "bottle_bad.png", tmp_path)
    assert (tmp_path / "bottle_bad.png").read_bytes() == before


def test_a_changed_bundle_is_refused(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "b")
    with (tmp_path / "b/inference.pdiparams").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"not the file that inference\.yml describes"):
        inferred(tmp_path / "b", data_image(), tmp_path / "o")


def test_bundle_and_deploy_are_enough_elsewhere(bundle, data, tmp_path):
    """Only deploy/, metrics/ and a part of utils/; importing training code would fail."""
    away = tmp_path / "a factory"
    ignore = shutil.ignore_patterns("__pycache__", "export_model.py")
    shutil.copytree(REPO / "deploy", away / "deploy", ignore=ignore)
    shutil.copytree(REPO / "metrics", away / "metrics", ignore=ignore)
    shutil.copytree(bundle, away / "bundle")
    (away / "utils").mkdir()
    for name in ("__init__", *L0):
        shutil.copy(REPO / f"utils/{name}.py", away / "utils")
    for name in ("models", "datasets", "engine", "convert"):
        (away / name).mkdir()
        (away / name / "__init__.py").write_text("raise ImportError('not in a factory')\n")
    done = subprocess.run(
        [sys.executable, "deploy/infer.py", "--save_inference_dir", "bundle", "--image_path",
         str(data / "bottle/test"), "--batch_size", "3", "--save_maps"],
        cwd=away, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    here = scores(inferred(bundle, data / "bottle/test", tmp_path / "here"))
    assert scores(results(away / "output")) == pytest.approx(here, rel=1e-6)


def test_a_paddle_2_graph_is_asked_for_by_its_name(bundle, tmp_path, monkeypatch):
    """Only the choice of the file: this Paddle writes no such graphs."""
    import yaml
    from paddle import inference

    other = tmp_path / "b"
    shutil.copytree(bundle, other)
    (other / "inference.json").rename(other / "inference.pdmodel")
    about = yaml.safe_load((other / "inference.yml").read_text(encoding="utf-8"))
    about["files"]["inference.pdmodel"] = about["files"].pop("inference.json")
    (other / "inference.yml").write_text(yaml.safe_dump(about))
    asked: list[tuple[str, ...]] = []

    def config(*files: str):
        asked.append(files)
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "Config", config)
    with pytest.raises(KeyboardInterrupt):
        inferred(other, data_image(), tmp_path / "o")
    assert asked == [(str(other / "inference.pdmodel"), str(other / "inference.pdiparams"))]


def data_image() -> Path:
    return REPO / "images/bottle_good.png"


@pytest.mark.slow
def test_an_input_that_is_not_square(tmp_path, data):
    """Height and width are not mixed up on the way from the description to the picture."""
    untrained_run(tmp_path / "exp/bottle", tiny_config("model.input_size=[64, 96]"))
    bundle = export(tmp_path / "exp", tmp_path / "b", data)
    found = inferred(bundle, data / "bottle/test/good", tmp_path / "i")
    predict.main(
        ["--exp_dir", str(tmp_path / "exp"), "--image_path", str(data / "bottle/test/good"),
         "--output", str(tmp_path / "p")]
    )  # fmt: skip
    assert scores(found) == pytest.approx(scores(results(tmp_path / "p")), abs=1e-5)
