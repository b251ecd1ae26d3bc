"""Engines: the numbers of the dynamic model, at any batch size; what they are asked, and refuse."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from deploy import engines
from deploy.bundle import Bundle, read_bundle
from deploy.engines import (
    EngineOptions,
    PaddleEngine,
    onnx_providers,
    open_engine,
    openvino_device,
    openvino_settings,
)
from engine.evaluator import run
from models.detector import Detector
from tests.small_run import copy_bottle, export, photographs, tiny_config, untrained_run
from utils.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Bundle, Detector]:
    folder = tmp_path_factory.mktemp("engines")
    detector = untrained_run(folder / "exp/bottle", tiny_config())
    data = copy_bottle(folder / "data", train=2, good=1, defective=1)
    return read_bundle(export(folder / "exp", folder / "the bundle", data)), detector


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return photographs(6, 64)


def test_the_numbers_of_the_dynamic_model(made, images):
    bundle, detector = made
    maps, scores, *_ = PaddleEngine(bundle, EngineOptions()).run(images)
    expected_maps, expected, *_ = run(detector, images)
    assert maps.shape == (6, 64, 64)
    assert scores.shape == (6,)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(maps, expected_maps, atol=1e-5)
    assert np.ptp(scores) > 1e-3


@pytest.mark.parametrize("onednn", [False, True])
def test_a_batch_is_its_images_one_by_one(made, images, onednn):
    engine = PaddleEngine(made[0], EngineOptions(onednn=onednn))
    alone = [engine.run(images[i : i + 1]) for i in range(5)]
    maps, scores, *_ = engine.run(images[:5])
    again, *_ = engine.run(images[:1])  # a smaller batch after a larger one
    np.testing.assert_allclose(np.concatenate([each.scores for each in alone]), scores, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([each.maps for each in alone]), maps, atol=1e-5)
    np.testing.assert_allclose(again, alone[0][0], atol=1e-6)


def test_threads_change_nothing_but_rounding(made, images):
    one, two = (PaddleEngine(made[0], EngineOptions(cpu_threads=n)).run(images) for n in (1, 2))
    np.testing.assert_allclose(one[1], two[1], rtol=1e-5)


def test_inputs_of_any_layout_and_type(made, images):
    engine = PaddleEngine(made[0], EngineOptions())
    expected = engine.run(images)[1]
    for other in (images.astype(np.float64), np.asfortranarray(images)):
        np.testing.assert_array_equal(engine.run(other)[1], expected)


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="a GPU build")
def test_gpu_on_a_cpu_build(made):
    with pytest.raises(UserError, match="--use_gpu: this Paddle build has no GPU support"):
        open_engine(made[0], EngineOptions(use_gpu=True))


def test_the_folder_may_have_blanks_and_be_relative(made, monkeypatch):
    folder: Path = made[0].folder
    monkeypatch.chdir(folder.parent)
    assert " " in folder.name
    engine = open_engine(read_bundle(folder.name), EngineOptions())
    assert engine.run(photographs(1, 64))[1].shape == (1,)


# --- the options, as the engines' own interfaces get them


class Recorder:
    """Stand in for a paddle.inference.Config."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple] = {}

    def __getattr__(self, name: str):
        return lambda *args: self.calls.update({name: args})


PRECISION_TYPES = SimpleNamespace(Float32="f", Half="h", Bfloat16="b")


def configured(**options) -> dict[str, tuple]:
    config = Recorder()
    engines._configure(config, PRECISION_TYPES, EngineOptions(**options))
    return config.calls


def test_paddle_on_a_cpu():
    calls = configured(cpu_threads=3)
    assert calls["set_cpu_math_library_num_threads"] == (3,)
    assert {"disable_gpu", "disable_mkldnn", "enable_new_executor", "enable_memory_optim"} <= {
        *calls
    }
    assert "enable_mkldnn" not in calls
    fast = configured(onednn=True)
    assert "enable_mkldnn" in fast
    assert "disable_mkldnn" not in fast
    assert "enable_mkldnn_bfloat16" not in fast
    assert "enable_mkldnn_bfloat16" in configured(onednn=True, precision="bf16")


@pytest.mark.parametrize(
    "options", [{"precision": "bf16"}, {"precision": "fp16"}, {"precision": "fp16", "onednn": True}]
)
def test_paddle_on_a_cpu_has_few_precisions(options):
    with pytest.raises(UserError, match=r"--precision (bf|fp)16: Paddle on a CPU computes in fp32"):
        configured(**options)


@pytest.mark.parametrize(("precision", "kind"), [("fp32", "f"), ("fp16", "h"), ("bf16", "b")])
def test_paddle_on_a_gpu(precision, kind):
    calls = configured(use_gpu=True, gpu_id=2, precision=precision, onednn=True)
    assert calls["enable_use_gpu"] == (engines.GPU_MEMORY, 2, kind)
    assert "disable_mkldnn" in calls
    assert "disable_gpu" not in calls
    assert configured(use_gpu=True, precision=precision, tensorrt=True)["enable_use_gpu"][2] == "f"


def test_paddle_through_tensorrt(made, tmp_path, monkeypatch):
    """The conversion as Paddle 3 documents it, with its module replaced."""
    asked: dict[str, Any] = {}

    def convert(model: str, config: SimpleNamespace) -> None:
        asked.update(model=model, config=config)

    tensorrt = SimpleNamespace(
        Input=lambda **shapes: SimpleNamespace(**shapes),
        TensorRTConfig=lambda inputs: SimpleNamespace(inputs=inputs),
        PrecisionMode=SimpleNamespace(FP32=32, FP16=16, BF16=7), convert=convert,
    )  # fmt: skip
    monkeypatch.setattr(paddle, "tensorrt", tensorrt, raising=False)
    options = EngineOptions(use_gpu=True, tensorrt=True, precision="bf16", max_batch_size=4)
    graph, parameters = engines._through_tensorrt(made[0], options, tmp_path)
    assert asked["model"] == str(made[0].folder / "inference")
    assert asked["config"].precision_mode == 7
    shapes = asked["config"].inputs[0]
    assert shapes.name == "image"
    assert (shapes.min_input_shape, shapes.max_input_shape) == ((1, 3, 64, 64), (4, 3, 64, 64))
    assert [str(graph), str(parameters)] == [
        asked["config"].save_model_dir + suffix for suffix in (".json", ".pdiparams")
    ]


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="a GPU build")
def test_paddle_without_tensorrt(made, tmp_path):
    with pytest.raises(UserError, match="--use_tensorrt: this Paddle has no TensorRT"):
        engines._through_tensorrt(made[0], EngineOptions(use_gpu=True, tensorrt=True), tmp_path)


def test_tensorrt_needs_a_gpu(made):
    for name in ("paddle", "onnx", "openvino"):
        monkey = replace(EngineOptions(), engine=name, tensorrt=True)
        with pytest.raises(UserError, match=r"TensorRT is for NVIDIA GPUs|is not installed"):
            open_engine(made[0], monkey)


def test_a_gpu_build_without_a_gpu(made, monkeypatch):
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="--use_gpu: no GPU found on this machine"):
        open_engine(made[0], EngineOptions(use_gpu=True))


CPU, CUDA, TENSORRT = (f"{n}ExecutionProvider" for n in ("CPU", "CUDA", "Tensorrt"))


def test_providers_of_onnx_runtime():
    every = [TENSORRT, CUDA, CPU]
    assert onnx_providers(EngineOptions(), every) == [(CPU, {})]
    cuda = (CUDA, {"device_id": 1, "use_tf32": 0})
    gpu = EngineOptions(use_gpu=True, gpu_id=1)
    assert onnx_providers(gpu, every) == [cuda, (CPU, {})]
    plain = replace(gpu, tensorrt=True)
    assert onnx_providers(plain, every) == [(TENSORRT, {"device_id": 1}), cuda, (CPU, {})]
    settings = onnx_providers(replace(plain, precision="bf16"), every)[0][1]
    assert settings == {"device_id": 1, "trt_bf16_enable": True}


@pytest.mark.parametrize(
    ("options", "available", "words"),
    [
        ({"precision": "fp16"}, [CPU], "--precision fp16: ONNX Runtime computes in fp32"),
        ({"use_gpu": True}, [CPU], "this ONNX Runtime has no CUDAExecutionProvider"),
        ({"use_gpu": True, "tensorrt": True}, [CUDA, CPU], "has no TensorrtExecutionProvider"),
    ],
)
def test_providers_that_are_not_there(options, available, words):
    with pytest.raises(UserError, match=words):
        onnx_providers(EngineOptions(**options), available)


def test_devices_of_openvino():
    assert openvino_device(EngineOptions(), ["CPU"]) == "CPU"
    assert openvino_device(EngineOptions(use_gpu=True), ["CPU", "GPU"]) == "GPU.0"
    assert openvino_device(EngineOptions(use_gpu=True, gpu_id=1), ["GPU.0", "GPU.1"]) == "GPU.1"
    for gpu_id in (0, 1):
        with pytest.raises(UserError, match=rf"sees no GPU\.{gpu_id}, only CPU"):
            openvino_device(EngineOptions(use_gpu=True, gpu_id=gpu_id), ["CPU"])
    with pytest.raises(UserError, match="--use_tensorrt: OpenVINO has none"):
        openvino_device(EngineOptions(use_gpu=True, tensorrt=True), ["GPU"])


def test_settings_of_openvino():
    settings = openvino_settings(EngineOptions(cpu_threads=3), ["FP32", "BF16"])
    assert settings["INFERENCE_PRECISION_HINT"] == "f32"
    assert settings["INFERENCE_NUM_THREADS"] == 3
    fast = openvino_settings(EngineOptions(precision="bf16", use_gpu=True), ["FP32", "BF16"])
    assert fast["INFERENCE_PRECISION_HINT"] == "bf16"
    assert "INFERENCE_NUM_THREADS" not in fast
    with pytest.raises(UserError, match="--precision bf16: OpenVINO does not compute in it"):
        openvino_settings(EngineOptions(precision="bf16"), ["FP32"])


@pytest.mark.parametrize(
    ("name", "module"),
    [("paddle", "paddle"), ("onnx", "onnxruntime"), ("openvino", "openvino")],
)
def test_a_package_that_is_missing(made, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    words = f"--engine {name}: {module} is not installed; pip install"
    with pytest.raises(UserError, match=words):
        open_engine(made[0], EngineOptions(engine=name))


def test_an_unknown_engine(made):
    with pytest.raises(UserError, match="--engine tvm: choose one of paddle, onnx, openvino, auto"):
        open_engine(made[0], EngineOptions(engine="tvm"))


@pytest.mark.parametrize(("name", "module"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_bundle_without_onnx(made, name, module):
    pytest.importorskip(module)
    with pytest.raises(UserError, match="no ONNX graph in this bundle; export again with --onnx"):
        open_engine(made[0], EngineOptions(engine=name))


@pytest.mark.parametrize(("name", "module"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_graph_that_an_engine_cannot_read(made, tmp_path, name, module):
    pytest.importorskip(module)
    (tmp_path / "model.onnx").write_bytes(b"from the future")
    bundle = replace(made[0], onnx=tmp_path / "model.onnx")
    with pytest.raises(UserError, match=r"model\.onnx: (ONNX Runtime|OpenVINO) cannot run it \("):
        open_engine(bundle, EngineOptions(engine=name))
