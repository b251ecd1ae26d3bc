"""The comparison of engines: what it compares, when they pass, and children that crash or hang."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy import parity
from deploy.bundle import Bundle, read_bundle
from deploy.engines import EngineOptions
from deploy.parity import Sample, check, difference, measure, self_check
from engine.evaluator import run
from tests.small_run import copy_bottle, export, photographs, tiny_config, untrained_run
from utils.errors import UserError
from utils.predictions import Output

PASSING = {"ms": 5.0, "max_score_difference": 1e-4, "max_map_difference": 1e-3}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("a parity")
    detector = untrained_run(folder / "exp/bottle", tiny_config())
    data = copy_bottle(folder / "data", train=2, good=1, defective=1)
    made = read_bundle(export(folder / "exp", folder / "bundle", data))
    images = photographs(8, 64)
    output = run(detector, images)
    Sample(images, output).save(folder / "sample.npz")
    return made


@pytest.fixture(scope="module")
def sample(bundle) -> Path:
    return bundle.folder.parent / "sample.npz"


def outputs(count: int) -> Output:
    """Return outputs that differ from image to image."""
    rng = np.random.default_rng(0)
    maps = rng.random((count, 4, 4)).astype(np.float32)
    levels = [maps[:, :2, :2] * 100, maps[:, :1, :1]]
    return Output(maps, 5 * maps.max((1, 2)), levels, maps.mean((1, 2)))


class Fake:
    """Give the outputs of `outputs`, with something added to one of them."""

    def __init__(self, where: str = "", by: float = 0.0, image: int = 0) -> None:
        self.where, self.by, self.image = where, by, image
        self.batches: list[int] = []

    def run(self, images: np.ndarray) -> Output:
        self.batches.append(len(images))
        index = images[:, 0, 0, 0].astype(int)
        every = outputs(8)
        assert every.nll is not None
        maps, scores, nll = every.maps[index], every.scores[index], every.nll[index]
        level, other = (each[index] for each in every.evidence)
        parts = {"map": maps, "score": scores, "evidence": other, "nll": nll}
        if self.where:
            parts[self.where][index == self.image] += self.by
        return Output(maps, scores, [level, other], nll)


def measured(fake: Fake, count: int = 8) -> dict[str, float]:
    images = np.arange(count, dtype=np.float32).reshape(-1, 1, 1, 1)
    every = outputs(8)
    assert every.nll is not None
    levels = [level[:count] for level in every.evidence]
    expected = Output(every.maps[:count], every.scores[:count], levels, every.nll[:count])
    return measure(fake, Sample(images, expected))  # type: ignore[arg-type]


def test_batch_sizes_and_time():
    fake = Fake()
    found = measured(fake)
    assert found["max_score_difference"] == found["max_map_difference"] == 0
    assert found["ms"] >= 0
    assert fake.batches[:4] == [1, 1, 1, 5]
    assert set(fake.batches[4:]) == {1}
    assert len(fake.batches) == 4 + parity.TIMED_RUNS


def test_few_images_are_enough():
    fake = Fake()
    assert measured(fake, 1)["max_map_difference"] == 0
    assert fake.batches[:4] == [1, 1, 1, 5]


@pytest.mark.parametrize("image", [0, 2, 7])
@pytest.mark.parametrize(
    ("where", "key"),
    [("score", "score"), ("nll", "score"), ("map", "map"), ("evidence", "map")],
)
def test_every_output_of_every_image_counts(where, key, image):
    found = measured(Fake(where, 0.5, image))
    other = {"score": "map", "map": "score"}[key]
    assert found[f"max_{key}_difference"] > 0.01
    assert found[f"max_{other}_difference"] == 0
    for wrong in (np.nan, np.inf):
        assert measured(Fake(where, wrong, image))[f"max_{key}_difference"] == np.inf


def test_differences_are_relative_to_large_values_only():
    expected = np.array([0.001, 1.0, -2000.0])
    np.testing.assert_allclose(difference(expected + 0.1, expected), [0.1, 0.1, 5e-5])
    with pytest.raises(UserError, match=r"the shape \(3, 1\) instead of \(3,\)"):
        difference(expected[:, None], expected)


def test_a_sample_on_disk(tmp_path):
    images = photographs(2, 16)
    Sample(images, outputs(2)).save(tmp_path / "s.npz")
    read = Sample.load(tmp_path / "s.npz")
    np.testing.assert_array_equal(read.images, images)
    np.testing.assert_array_equal(read.expected.scores, outputs(2).scores)
    np.testing.assert_array_equal(read.expected.nll, outputs(2).nll)
    assert [level.shape for level in read.expected.evidence] == [(2, 2, 2), (2, 1, 1)]


# --- in a child process


def child(code: int, stdout: str = "", stderr: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, stdout, stderr)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (child(0, "noise\n" + json.dumps(PASSING)), {"passed": True, **PASSING}),
        (child(-11), {"passed": False, "reason": "it ended with code -11"}),  # a crash
        (child(134, "core dumped"), {"passed": False, "reason": "it ended with code 134"}),
        (child(2, "", "log\nnot here\n"), {"passed": False, "reason": "not here"}),
    ],
)  # fmt: skip
def test_what_a_child_says(bundle, sample, monkeypatch, result, expected):
    commands = []

    def start(command: list[str], **keywords) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return result

    monkeypatch.setattr(subprocess, "run", start)
    entry = check("paddle_onednn", bundle.folder, sample, 2)
    assert entry == expected | {"threads": 2}
    assert "--onednn" in commands[0]
    assert commands[0][commands[0].index("--cpu_threads") + 1] == "2"


@pytest.mark.parametrize("key", ["max_score_difference", "max_map_difference"])
@pytest.mark.parametrize("value", [1.1, float("inf"), float("nan")])
def test_beyond_the_tolerance(bundle, sample, monkeypatch, key, value):
    found = {**PASSING, key: PASSING[key] * value}
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: child(0, json.dumps(found)))
    entry = check("onnx", bundle.folder, sample, 1)
    assert not entry["passed"]
    assert entry["reason"].startswith("score differs by ")
    assert "not used: more than it may" in parity.summary(entry)
    assert "differs" in self_check(bundle, EngineOptions(onednn=True))


def test_reduced_precision_may_differ_more(bundle, monkeypatch):
    found = json.dumps({**PASSING, "max_score_difference": 0.01})
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: child(0, found))
    assert self_check(bundle, EngineOptions(onednn=True, precision="bf16")) == ""
    assert self_check(bundle, EngineOptions(onednn=True)) != ""


def test_a_child_that_hangs(bundle, sample, monkeypatch):
    def hang(*args, **keywords):
        raise subprocess.TimeoutExpired("python", keywords["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    entry = check("onnx", bundle.folder, sample, 1)
    assert entry["reason"] == "it took longer than 900 s"
    assert parity.summary(entry) == "not usable: it took longer than 900 s"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paddle", "paddle_onednn"])
def test_paddle_passes(bundle, sample, name):
    entry = check(name, bundle.folder, sample, 1)
    assert entry["passed"], entry
    assert entry["ms"] > 0
    assert entry["max_map_difference"] > 0  # two computations are never the same to the last digit


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["crash", "wrong"])
def test_a_real_child_that_fails(bundle, tmp_path, repo, fault):
    """The self-check of a copy of the code in which oneDNN crashes, or gives another score."""
    for package in ("deploy", "metrics", "utils"):
        shutil.copytree(repo / package, tmp_path / package)
    code = {
        "crash": "\n        if options.onednn:\n            import ctypes; ctypes.string_at(0)\n",
        "wrong": "\n        if options.onednn: _off = type(self)._outputs; type(self)._outputs = "
        "lambda self, x: [a + 0.01 * self.options.onednn for a in _off(self, x)]\n",
    }[fault]
    source = tmp_path / "deploy/engines.py"
    text = source.read_text()
    start = "        from paddle import inference\n"
    assert text.count(start) == 1
    source.write_text(text.replace(start, start + code))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(bundle.folder)],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "oneDNN: off (" in done.stdout
    assert ("ended with code -11" if fault == "crash" else "score differs by 0.01") in done.stdout
    assert "onednn=False" in done.stdout


RUN = """
import sys
from deploy.bundle import read_bundle
from deploy.choice import create_engine
from deploy.engines import EngineOptions
engine, note = create_engine(read_bundle(sys.argv[1]), EngineOptions(onednn=True))
print(note, engine.options)
"""


def test_the_child_itself(bundle, sample, monkeypatch, capsys):
    monkeypatch.setattr(parity, "measure", lambda engine, given: {"images": len(given.images)})
    assert parity.main([str(bundle.folder), "--engine", "paddle", "--sample", str(sample)]) == 0
    assert json.loads(capsys.readouterr().out) == {"images": 8}
    noise = parity.noise_sample(bundle, 1)
    assert noise.images.shape == (8, 3, 64, 64)
    assert noise.expected[0].shape == (8, 64, 64)
    assert np.ptp(noise.expected[1]) > 0
    assert parity.main([str(bundle.folder / "none"), "--engine", "paddle"]) == 2
    assert "no inference.yml here" in capsys.readouterr().err


def test_a_damaged_bundle_is_a_reason(bundle, sample, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / "b")
    (tmp_path / "b/inference.pdiparams").write_bytes(b"")
    entry = check("paddle", tmp_path / "b", sample, 1)
    assert "not the file that inference.yml describes" in entry["reason"]
    assert "describes" in self_check(replace(bundle, folder=tmp_path / "b"), EngineOptions())
