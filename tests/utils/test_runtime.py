"""Devices and versions."""

import os
import subprocess
import sys
from types import SimpleNamespace

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


@pytest.mark.parametrize("chosen", ["", "0"])
def test_a_gpu_searches_its_convolutions_unless_told_not_to(monkeypatch, chosen):
    flags: dict[str, bool] = {}
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(paddle.device, "set_device", lambda name: None)
    monkeypatch.setattr(paddle, "set_flags", flags.update)
    monkeypatch.delenv(runtime.AUTOTUNE, raising=False)
    if chosen:
        monkeypatch.setenv(runtime.AUTOTUNE, chosen)
    runtime.use_device("gpu")
    assert flags == ({} if chosen else {runtime.AUTOTUNE: True})


def test_versions():
    versions = runtime.versions()
    assert versions["python"].startswith("3.")
    assert versions.get("paddlepaddle") or versions.get("paddlepaddle-gpu")
    assert versions["numpy"]


def started(repo, code: str, **environment: str) -> str:
    """Return what a fresh process prints that selects the CPU first; it must not complain."""
    start = "from utils import runtime; runtime.prepare(); runtime.use_device('cpu'); "
    variables = {k: v for k, v in os.environ.items() if k != runtime.THREADS} | environment
    done = subprocess.run(
        [sys.executable, "-c", start + code], cwd=repo, env=variables, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.strip()


BUSY = """
import time, paddle
a = paddle.randn([3000, 512])
b = paddle.randn([512, 512])
wall, busy = time.perf_counter(), time.process_time()
for _ in range(30):
    paddle.matmul(a, b)
wall, busy = time.perf_counter() - wall, time.process_time() - busy
print(runtime.threads(), busy / wall)
"""


def test_all_cores_compute_unless_the_environment_says_otherwise(repo):
    cores = min(runtime._cores(), runtime.MOST_THREADS)
    free, one = started(repo, BUSY).split(), started(repo, BUSY, OMP_NUM_THREADS="1").split()
    assert (int(free[0]), int(one[0])) == (cores, 1)
    assert float(one[1]) < 1.1
    many = "runtime._cores = lambda: 64; runtime.use_device('cpu'); print(runtime.threads())"
    assert started(repo, many) == str(runtime.MOST_THREADS)


FAULTS = """
import paddle, resource
x = paddle.ones([4, 1024, 1024])
taken = []
for _ in range(41):
    y = x * 2  # 16 MB, and those of the rounds before are free
    taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print((taken[-1] - taken[20]) / 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux only")
def test_memory_of_freed_tensors_is_used_again(repo):
    assert float(started(repo, FAULTS)) < 40  # 4,096 pages of 4 KB if it came from the system


@pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux only")
def test_memory_is_left_alone_where_the_environment_has_a_setting(monkeypatch):
    called = []
    library = SimpleNamespace(mallopt=lambda *option: called.append(option))
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: library)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    runtime._keep_memory()
    assert not called
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    runtime._keep_memory()
    assert called


def test_a_number_of_threads_that_is_none(monkeypatch):
    for text in ("", "many", "0", "2,1"):
        monkeypatch.setenv(runtime.THREADS, text)
        assert runtime.threads() == 1


def test_paddle_is_imported_without_a_word(repo):
    code = "from utils import runtime; runtime.prepare(); import paddle"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
