"""Engines: the same numbers as the dynamic model, at any batch size, with and without oneDNN."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from deploy import engines
from deploy.bundle import Bundle, read_bundle
from deploy.engines import EngineOptions, PaddleEngine, create_engine
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
    maps, scores, _ = PaddleEngine(bundle, EngineOptions()).run(images)
    expected_maps, expected, _ = run(detector, images)
    assert maps.shape == (6, 64, 64)
    assert scores.shape == (6,)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(maps, expected_maps, atol=1e-5)
    assert np.ptp(scores) > 1e-3


@pytest.mark.parametrize("onednn", [False, True])
def test_a_batch_is_its_images_one_by_one(made, images, onednn):
    engine = PaddleEngine(made[0], EngineOptions(onednn=onednn))
    alone = [engine.run(images[i : i + 1]) for i in range(5)]
    maps, scores, _ = engine.run(images[:5])
    again, _, _ = engine.run(images[:1])  # a smaller batch after a larger one
    np.testing.assert_allclose(np.concatenate([s for _, s, _ in alone]), scores, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([m for m, _, _ in alone]), maps, atol=1e-5)
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
        create_engine(made[0], EngineOptions(use_gpu=True))


# --- oneDNN


def test_not_asked_for(made, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)  # nothing is started
    engine, note = create_engine(made[0], EngineOptions())
    assert note == ""
    assert not engine.options.onednn


@pytest.mark.slow
def test_onednn_passes_its_check_and_agrees(made, images):
    engine, note = create_engine(made[0], EngineOptions(onednn=True))
    assert note == "oneDNN: on (the self-check passed)"
    assert engine.options.onednn
    np.testing.assert_allclose(engine.run(images)[1], run(made[1], images)[1], atol=1e-5)


def child(code: int, stdout: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, stdout, "")


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (child(1, "noise\noneDNN differs by 0.5 from the plain kernels\n"), "differs by 0.5"),
        (child(-11), "the self-check ended with code -11"),  # a crash
        (child(1), "the self-check ended with code 1"),
        (child(134, "core dumped"), "the self-check ended with code 134"),
    ],
)
def test_a_failing_check_falls_back_with_the_reason(made, images, monkeypatch, result, reason):
    monkeypatch.setattr(subprocess, "run", lambda *args, **keywords: result)
    engine, note = create_engine(made[0], EngineOptions(onednn=True, cpu_threads=2))
    assert note.startswith("oneDNN: off (")
    assert reason in note
    assert "\n" not in note
    assert engine.options == EngineOptions(cpu_threads=2)
    assert np.isfinite(engine.run(images)[1]).all()


def test_a_check_that_hangs_falls_back(made, monkeypatch):
    def hang(*args, **keywords):
        raise subprocess.TimeoutExpired("python", keywords["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    _, note = create_engine(made[0], EngineOptions(onednn=True))
    assert note == "oneDNN: off (the self-check took longer than 300 s)"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["crash", "wrong"])
def test_a_real_child_that_fails(made, tmp_path, monkeypatch, repo, fault):
    """The check of a copy of the code in which oneDNN crashes, or gives another score."""
    for package in ("deploy", "metrics", "utils"):
        shutil.copytree(repo / package, tmp_path / package)
    code = {
        "crash": "\n    if options.onednn:\n        import ctypes; ctypes.string_at(0)\n",
        "wrong": "\n    if options.onednn: _off = PaddleEngine.run; PaddleEngine.run = "
        "lambda self, x: (*(a + 0.01 * self.options.onednn for a in _off(self, x)[:2]), [])\n",
    }[fault]
    source = tmp_path / "deploy/engines.py"
    text = source.read_text()
    start = "    import paddle\n    from paddle import inference\n"
    assert start in text
    source.write_text(text.replace(start, start + code))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(made[0].folder)],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "oneDNN: off (" in done.stdout
    assert ("ended with code -11" if fault == "crash" else "differs by 0.01") in done.stdout
    assert "onednn=False" in done.stdout


RUN = """
import sys
from deploy.bundle import read_bundle
from deploy.engines import EngineOptions, create_engine
engine, note = create_engine(read_bundle(sys.argv[1]), EngineOptions(onednn=True))
print(note, engine.options)
"""


def test_the_check_compares_all_outputs(made, monkeypatch):
    shifts = {False: 0.0, True: 0.0}
    outputs = {
        "map": np.zeros((3, 8, 8), np.float32), "score": np.ones(3, np.float32),
        "evidence": np.zeros((3, 2, 2), np.float32),
    }  # fmt: skip
    key = ["map"]

    class Engine:
        def __init__(self, bundle, options):
            self.options = options

        def run(self, images):
            assert images.shape[1:] == (3, *made[0].input_size)
            assert images.dtype == np.float32
            count = len(images)
            found = {name: value[:count].copy() for name, value in outputs.items()}
            found[key[0]] += shifts[self.options.onednn]
            return found["map"], found["score"], [found["evidence"]]

    monkeypatch.setattr(engines, "PaddleEngine", Engine)
    assert engines.self_check(made[0], 1) == 0
    for name in outputs:
        key[0] = name
        shifts[True] = 0.25
        assert engines.self_check(made[0], 1) == pytest.approx(0.25)
        shifts[True] = float("nan")
        assert engines.self_check(made[0], 1) == float("inf")


@pytest.mark.parametrize(("worst", "code"), [(0.0, 0), (1e-4, 0), (2e-4, 1), (float("inf"), 1)])
def test_exit_code_of_the_check(made, monkeypatch, capsys, worst, code):
    monkeypatch.setattr(engines, "self_check", lambda bundle, threads: worst)
    assert engines.main([str(made[0].folder)]) == code
    assert "differs by" in capsys.readouterr().out


def test_the_folder_may_have_blanks_and_be_relative(made, monkeypatch):
    folder: Path = made[0].folder
    monkeypatch.chdir(folder.parent)
    assert " " in folder.name
    engine, _ = create_engine(read_bundle(folder.name), EngineOptions())
    assert engine.run(photographs(1, 64))[1].shape == (1,)
