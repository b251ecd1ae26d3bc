"""The choice of an engine: the one asked for, or the fastest that passed and runs here."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy import choice
from deploy.bundle import Bundle, read_bundle
from deploy.choice import create_engine
from deploy.engines import EngineOptions, PaddleEngine
from engine.evaluator import run
from models.detector import Detector
from tests.small_run import copy_bottle, export, photographs, tiny_config, untrained_run
from utils.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Bundle, Detector]:
    folder = tmp_path_factory.mktemp("choice")
    detector = untrained_run(folder / "exp/bottle", tiny_config())
    data = copy_bottle(folder / "data", train=2, good=1, defective=1)
    return read_bundle(export(folder / "exp", folder / "bundle", data)), detector


class Started:
    """Stand in for an engine that runs."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self.options = options


@pytest.fixture
def fakes(made, monkeypatch):
    """Let engines start at once, but those that are named in the returned set."""
    broken: set[str] = set()

    def start(bundle: Bundle, options: EngineOptions) -> Started:
        if options.engine in broken:
            raise UserError(f"--engine {options.engine}: not installed; pip install it")
        return Started(bundle, options)

    monkeypatch.setattr(choice, "open_engine", start)
    monkeypatch.setattr(choice, "self_check", lambda bundle, options: "")
    return broken


def measured(bundle: Bundle, **ms: float | None) -> Bundle:
    """Give a bundle engines that passed in the given times, or failed if that is None."""
    wrong = {"passed": False, "ms": 1.0, "max_score_difference": 1.0, "reason": "score differs"}
    engines = {k: {"passed": True, "ms": v} if v else wrong for k, v in ms.items()}
    return replace(bundle, engines=engines)


AUTO = EngineOptions(engine="auto", cpu_threads=2)


def chosen(bundle: Bundle, options: EngineOptions = AUTO) -> tuple[str, bool, str]:
    engine, note = create_engine(bundle, options)
    assert "\n" not in note
    assert engine.options.cpu_threads == options.cpu_threads
    return engine.options.engine, engine.options.onednn, note


def test_the_fastest(made, fakes):
    bundle = measured(made[0], paddle=30, paddle_onednn=20, onnx=10, openvino=12.5)
    assert chosen(bundle) == ("onnx", False, "engine: onnx (fastest at export, 10 ms)")
    faster = measured(made[0], paddle=30, paddle_onednn=20, onnx=10, openvino=9)
    assert chosen(faster)[0] == "openvino"
    assert chosen(measured(made[0], paddle=30, paddle_onednn=20))[:2] == ("paddle", True)


def test_what_failed_at_export_is_out_of_the_question(made, fakes):
    bundle = measured(made[0], paddle=30, paddle_onednn=None, onnx=None)
    assert chosen(bundle)[:2] == ("paddle", False)


def test_what_is_not_installed_here_is_named(made, fakes):
    fakes.add("onnx")
    bundle = measured(made[0], paddle=30, paddle_onednn=20, onnx=10)
    name, onednn, note = chosen(bundle)
    assert (name, onednn) == ("paddle", True)
    assert note == "engine: paddle_onednn (not onnx: --engine onnx: not installed; pip install it)"


def test_onednn_that_fails_here_is_not_taken(made, fakes, monkeypatch):
    monkeypatch.setattr(choice, "self_check", lambda *args: "it ended with code -11")
    bundle = measured(made[0], paddle=30, paddle_onednn=20)
    name, onednn, note = chosen(bundle)
    assert (name, onednn) == ("paddle", False)
    assert "not paddle_onednn: it ended with code -11" in note


def test_nothing_runs(made, fakes):
    fakes |= {"onnx", "paddle"}
    with pytest.raises(UserError, match=r"--engine auto: none runs here \(not onnx: .*not paddle:"):
        create_engine(measured(made[0], paddle=30, onnx=10), AUTO)


def test_on_a_gpu_onednn_is_no_choice(made, fakes):
    bundle = measured(made[0], paddle=30, paddle_onednn=20)
    assert chosen(bundle, replace(AUTO, use_gpu=True))[:2] == ("paddle", False)


def test_bundles_without_measurements_run_with_paddle(made):
    """Those of older versions, and unknown engines of newer ones."""
    for engines in ({}, {"tvm": {"passed": True, "ms": 1}}):
        engine, note = create_engine(replace(made[0], engines=engines), AUTO)
        assert isinstance(engine, PaddleEngine)
        assert note == "engine: paddle (the bundle has no measured engines)"


def test_an_engine_that_failed_is_refused_by_name(made, fakes):
    bundle = measured(made[0], paddle=None, onnx=None)
    with pytest.raises(
        UserError, match=r"--engine onnx: not for .* its score differs; use another"
    ):
        create_engine(bundle, EngineOptions(engine="onnx"))
    assert chosen(bundle, EngineOptions())[2] == ""  # the bundle was written all the same


def test_an_engine_that_was_not_there_at_export_may_be_here(made, fakes):
    entry = {"passed": False, "reason": "openvino is not installed"}
    bundle = replace(made[0], engines={"openvino": entry})
    assert chosen(bundle, EngineOptions(engine="openvino"))[0] == "openvino"


# --- oneDNN, asked for


def test_not_asked_for(made, monkeypatch):
    monkeypatch.setattr(choice, "self_check", None)  # nothing is started
    engine, note = create_engine(made[0], EngineOptions())
    assert note == ""
    assert not engine.options.onednn


@pytest.mark.slow
def test_onednn_passes_its_check_and_agrees(made):
    images = photographs(6, 64)
    engine, note = create_engine(made[0], EngineOptions(onednn=True))
    assert note == "oneDNN: on (the self-check passed)"
    assert engine.options.onednn
    np.testing.assert_allclose(engine.run(images)[1], run(made[1], images)[1], atol=1e-5)


def test_a_failing_check_falls_back_with_the_reason(made, monkeypatch):
    monkeypatch.setattr(choice, "self_check", lambda *args: "it ended with code -11")
    engine, note = create_engine(made[0], EngineOptions(onednn=True, cpu_threads=2))
    assert note == "oneDNN: off (self-check: it ended with code -11)"
    assert engine.options == EngineOptions(cpu_threads=2)
    assert np.isfinite(engine.run(photographs(2, 64))[1]).all()


@pytest.mark.slow
def test_auto_for_real(made, tmp_path: Path, monkeypatch):
    """What the export measured leads to an engine that runs; without OpenVINO to another one."""
    name = min(
        (name for name, entry in made[0].engines.items() if entry["passed"]),
        key=lambda name: made[0].engines[name]["ms"],
    )
    monkeypatch.setitem(sys.modules, "openvino", None)
    engine, note = create_engine(made[0], EngineOptions(engine="auto"))
    assert note.startswith(f"engine: {name} (fastest at export, ")
    assert engine.run(photographs(2, 64))[1].shape == (2,)
