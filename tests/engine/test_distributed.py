"""Several processes: parts of a batch add up to it, and a run of two is the run of one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn
from safetensors.numpy import load_file

from engine import session
from engine.batches import Source
from engine.distributed import SharedBatchNorm, Team, share_norms
from engine.inputs import rotation
from models.detector import Detector
from tests.small_run import REPO, arguments, shake, tiny_config, train_tiny

CASES = {  # name -> preset, settings
    "fastflow": ("fastflow_efficientnet_lite0", ()),
    "cflow": ("cflow_efficientnet_lite0", ()),
    "cflow_fibers": ("cflow_efficientnet_lite0", ("train.fiber_batch=3",)),
    "cflow_merged": (
        "cflow_efficientnet_lite0", ("train.fiber_batch=5", "train.fiber_remainder=merge"),
    ),
    "csflow": ("csflow_efficientnet_lite0", ("model.input_size=128",)),
    "uflow": ("uflow_efficientnet_lite0", ("nfa.method=none",)),
    "uflow_batch_sum": (
        "uflow_efficientnet_lite0", ("nfa.method=none", "model.loss=batch_sum"),
    ),
}  # fmt: skip


def small_config(name: str):
    preset, settings = CASES[name]
    size = {
        "fastflow": ("model.steps=2",), "uflow": ("model.steps=2",), "cflow": ("model.steps=2",),
        "csflow": ("model.blocks=1", "model.hidden=8"),
    }[preset.partition("_")[0]]  # fmt: skip
    return tiny_config_of(preset, "model.input_size=64", *size, *settings)


def tiny_config_of(preset: str, *settings: str):
    from utils.config import load

    return load(REPO / f"configs/{preset}.yaml", settings)


# --- parts of a batch


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_parts_cover_a_batch_once(size, count):
    batch = np.arange(count) + 40
    parts = [Team(rank, size).part(batch) for rank in range(size)]
    assert sum(part.share for part in parts) == pytest.approx(1)
    working = [part for part in parts if part.share > 0]
    np.testing.assert_array_equal(np.concatenate([part.rows for part in working]), batch)
    for part in working:
        assert batch[part.first] == part.rows[0]
        assert part.share == len(part.rows) / count
    for part in parts:
        assert part.total == count
        assert len(part.rows) >= 1
    assert max(len(part.rows) for part in working) - min(len(p.rows) for p in working) <= 1


def steps_of(detector: Detector, config, features: list[np.ndarray], team: Team, seed: int = 3):
    """Return the losses of a step, and its summed gradients by parameter."""
    objectives = session.training_objectives(detector, config)
    part = team.part(np.arange(len(features[0])))
    tensors = [paddle.to_tensor(level[part.rows]) for level in features]
    if objectives is None:
        pairs = [detector.objective(tensors, part.share)]
    else:
        pairs = list(objectives(tensors, np.random.default_rng(seed), part))
    for loss, _ in pairs:
        loss.backward()
    gradients = {
        name: parameter.grad.numpy().astype(np.float64)
        for name, parameter in detector.named_parameters()
        if parameter.grad is not None
    }
    detector.clear_gradients(set_to_zero=False)
    return np.array([[loss.item(), value.item()] for loss, value in pairs]), gradients


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [2, 3])
def test_losses_and_gradients_of_the_parts_add_up(name, size):
    """Two images in three processes: one of them has nothing to do."""
    config = small_config(name)
    detector, _ = session.new_detector(config, allow_random=False)
    shake(detector)
    detector.train()
    rng = np.random.default_rng(1)
    images = paddle.to_tensor(rng.random((2, 3, *config.model.input_size), np.float32))
    with paddle.no_grad():
        features = [level.numpy() for level in detector.features(images)]
    whole, gradients = steps_of(detector, config, features, Team())
    parts = [steps_of(detector, config, features, Team(rank, size)) for rank in range(size)]
    assert gradients
    np.testing.assert_allclose(sum(losses for losses, _ in parts), whole, rtol=2e-5)
    for key, gradient in gradients.items():
        total = sum(part[key] for _, part in parts)
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(total, gradient, rtol=1e-3, atol=2e-4 * scale, err_msg=key)


def test_images_are_turned_by_the_same_angles_in_parts():
    images = np.random.default_rng(0).random((5, 3, 32, 32)).astype(np.float32)
    source = Source(5, lambda rows: [images[rows]], list, rotation(30.0))
    (whole,) = [f[0].numpy() for f in source.pyramids([np.arange(5)], [7])]
    parts = [Team(rank, 2).part(np.arange(5)) for rank in range(2)]
    turned = [next(source.pyramids([p.rows], [7], [p.first]))[0].numpy() for p in parts]
    np.testing.assert_array_equal(np.concatenate(turned), whole)
    assert np.abs(whole - images).max() > 0.1
    assert np.abs(next(source.pyramids([np.arange(5)], [8]))[0].numpy() - whole).max() > 0.1


# --- batch norms


class Halves(Team):
    """A team of two whose other half is known beforehand."""

    def __init__(self, other: list[np.ndarray]) -> None:
        super().__init__(0, 2)
        self.other = iter(other)

    def add(self, tensor):
        return tensor + paddle.to_tensor(next(self.other)).reshape(tensor.shape)


def test_a_batch_norm_of_parts_is_that_of_the_whole():
    x = np.random.default_rng(0).normal(1, 2, (5, 4, 6, 6)).astype(np.float32)
    own, other = x[:3], x[3:]
    plain = nn.BatchNorm2D(4, momentum=0.7, epsilon=1e-5)
    plain.weight.set_value(np.array([1, 2, 3, 4], np.float32))
    network = nn.Sequential(nn.Conv2D(1, 1, 1), nn.BatchNorm2D(4, momentum=0.7, epsilon=1e-5))
    network[1].set_state_dict(plain.state_dict())
    mean = x.mean((0, 2, 3), keepdims=True)
    team = Halves(
        [
            np.array([2.0 * 36]),
            other.sum((0, 2, 3)),
            np.square(other - mean).sum((0, 2, 3)),
        ]
    )
    share_norms(network, team)
    assert isinstance(network[1], SharedBatchNorm)
    network.train()
    plain.train()
    expected = plain(paddle.to_tensor(x)).numpy()[:3]
    np.testing.assert_allclose(network[1](paddle.to_tensor(own)).numpy(), expected, atol=1e-5)
    for name in ("_mean", "_variance"):
        np.testing.assert_allclose(
            getattr(network[1], name).numpy(), getattr(plain, name).numpy(), rtol=1e-5
        )
    assert list(network[1].state_dict()) == list(plain.state_dict())
    network.eval()
    plain.eval()
    np.testing.assert_allclose(
        network[1](paddle.to_tensor(own)).numpy(), plain(paddle.to_tensor(own)).numpy(), atol=1e-6
    )


def test_frozen_batch_norms_are_left_alone():
    detector, _ = session.new_detector(tiny_config(), allow_random=False)
    before = [type(layer) for layer in detector.sublayers()]
    share_norms(detector, Team(0, 2))
    assert [type(layer) for layer in detector.sublayers()] == before


# --- real processes


def launch(folder: Path, *args: str) -> "subprocess.Popen[str]":
    """Start train.py as two processes on this machine."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGS_", "PADDLE_"))}
    command = [
        sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--backend",
        "gloo", "--log_dir", str(folder), str(REPO / "train.py"), *args,
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=REPO, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finished(process: "subprocess.Popen[str]") -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Compare losses, and weights as a whole: Adam's first steps depend on the signs of noise."""
    for own, other in zip(events(ours), events(theirs), strict=True):
        assert (own["event"], own["step"]) == (other["event"], other["step"])
        for key in {"loss", "train_nll", "holdout_nll", "lr"} & set(own):
            assert own[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5)
    one, two = (load_file(run / "last/head.safetensors") for run in (ours, theirs))
    assert list(one) == list(two)
    flat = [
        np.concatenate([part[name].ravel().astype(float) for name in one]) for part in (one, two)
    ]
    assert np.linalg.norm(flat[1] - flat[0]) < 1e-3 * np.linalg.norm(flat[0])


@pytest.mark.slow
def test_two_processes_train_like_one_and_go_on(data, tmp_path):
    """FastFlow-Paddle's batch norm, a last batch of one image, and a resumed third epoch."""
    settings = (
        "model.norm=batch",
        "train.batch_size=5",
        "train.log_every=1",
        "train.schedule=constant",
    )
    more = [text for setting in settings for text in ("-o", setting)]
    one = train_tiny(data, tmp_path / "one", *more)
    code, output = finished(launch(tmp_path / "log", *arguments(data, tmp_path / "two", *more)))
    assert code == 0, output
    two = tmp_path / "two/bottle"
    assert_same_run(one, two)
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    told = [(tmp_path / f"log/workerlog.{rank}").read_text() for rank in (0, 1)]
    assert "process 1 of 2" in told[0]
    assert "image threshold" in told[0]
    assert "image threshold" not in told[1]
    longer = ("--resume", "--epochs", "3")
    train_tiny(data, tmp_path / "one", *more, *longer)
    again = launch(tmp_path / "log", *arguments(data, tmp_path / "two", *more, *longer))
    code, output = finished(again)
    assert code == 0, output
    assert_same_run(one, two)
    assert events(two)[-1]["step"] == 3


@pytest.mark.slow
def test_a_process_that_dies_ends_the_training(data, tmp_path):
    """The launcher stops the other one; what was written is whole, and the run can go on."""
    exp = tmp_path / "exp"
    long = ("-o", "train.schedule=constant", "--epochs", "2000")
    process = launch(tmp_path / "log", *arguments(data, exp, *long))
    try:
        deadline = time.monotonic() + 120
        while not (exp / "bottle/last/meta.json").is_file():
            assert time.monotonic() < deadline, "no checkpoint after two minutes"
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        follower = [pid for pid in children(process.pid) if rank_of(pid) == "1"]
        os.kill(follower[0], signal.SIGKILL)
        code, _ = finished(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert code != 0
    done = json.loads((exp / "bottle/last/meta.json").read_text())["progress"]["epoch"]
    train_tiny(data, exp, *long, "--resume", "--epochs", str(done + 1))
    assert events(exp / "bottle")[-1]["step"] == done + 1


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(text) for text in (task / "children").read_text().split()]
    return found + [grandchild for child in found for grandchild in children(child)]


def rank_of(pid: int) -> str:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(e.partition("=")[::2] for e in entries).get("PADDLE_TRAINER_ID", "")


@pytest.mark.slow
def test_fibre_batches_of_two_processes(data, tmp_path):
    """CFLOW-AD with turned images: every fibre batch is made of both processes' fibres."""
    settings = (
        "model.input_size=64", "model.steps=2", "data.holdout=0.25", "data.workers=0",
        "train.batch_size=4", "train.log_every=1", "train.fiber_batch=8", "data.rotation=5",
        "train.lr=0.001",
    )  # fmt: skip
    common = [
        "-cfg", str(REPO / "configs/cflow_efficientnet_lite0.yaml"), "--data", str(data),
        "--device", "cpu", "--epochs", "1", *(t for s in settings for t in ("-o", s)),
    ]  # fmt: skip
    import train

    assert train.main([*common, "--exp_dir", str(tmp_path / "one")]) == 0
    process = launch(tmp_path / "log", *common, "--exp_dir", str(tmp_path / "two"))
    code, output = finished(process)
    assert code == 0, output
    assert_same_run(tmp_path / "one/bottle", tmp_path / "two/bottle")


def test_a_run_of_several_processes_needs_a_name(data, monkeypatch):
    import train
    from engine import distributed
    from utils.errors import UserError

    monkeypatch.setattr(distributed, "join", lambda device: Team(0, 2))
    with pytest.raises(UserError, match="--exp_dir: several processes need it"):
        train.main(["--data", str(data), "-cfg", str(REPO / "configs/fastflow_resnet18.yaml")])
