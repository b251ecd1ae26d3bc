"""Devices and versions."""

import subprocess
import sys

import paddle
import pytest

from utils import runtime
from utils.errors import UserError

GPU = paddle.is_compiled_with_cuda()


@pytest.mark.skipif(GPU, reason="a GPU build")
def test_devices_on_a_cpu_build():
    assert runtime.use_device("auto") == "cpu"
    assert runtime.use_device("cpu") == "cpu"
    for name in ("gpu", "gpu:1"):
        with pytest.raises(UserError, match=f"--device {name}: this Paddle build has no GPU"):
            runtime.use_device(name)


@pytest.mark.parametrize("name", ["tpu", "gpux", "", "cpu:0"])
def test_unknown_devices(name):
    with pytest.raises(UserError, match="choose auto, cpu, gpu or gpu:N"):
        runtime.use_device(name)


def test_a_gpu_build_without_gpu(monkeypatch):
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="no GPU found on this machine; use --device cpu"):
        runtime.use_device("gpu")
    assert runtime.use_device("auto") == "cpu"


def test_a_device_number_that_does_not_exist(monkeypatch):
    def refuse(name):
        raise ValueError("gpu:7 is\nnot there")

    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(paddle.device, "set_device", refuse)
    with pytest.raises(UserError, match="--device gpu:7: gpu:7 is not there"):
        runtime.use_device("gpu:7")


def test_versions():
    versions = runtime.versions()
    assert versions["python"].startswith("3.")
    assert versions.get("paddlepaddle") or versions.get("paddlepaddle-gpu")
    assert versions["numpy"]


def test_paddle_is_imported_without_a_word(repo):
    code = "from utils import runtime; runtime.prepare(); import paddle"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
