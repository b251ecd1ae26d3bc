"""Training: it learns, it can be repeated, interrupted and resumed, and it says what is wrong."""

import contextlib
import json
import math
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from engine import checkpoint, session
from engine.batches import Source
from engine.inputs import labelled_set
from engine.log import RunLog
from engine.trainer import Adam, Judge, Trainer, learning_rate
from models.detector import Detector
from tests.small_run import (
    arguments,
    copy_bottle,
    photographs,
    script,
    start,
    tiny_config,
    train_tiny,
)
from utils.errors import UserError
from utils.schema import TrainSection

META = {
    "category": "bottle", "preset": "p", "data": {"digest": "d"},
    "backbone": {"sha256": "b", "source": "s", "origin": "bundled"},
}  # fmt: skip


@dataclass
class Parts:
    """Features of a few photographs, and what a trainer is made of."""

    features: list[np.ndarray]
    folder: Path

    def source(
        self, rows: slice = slice(None), spoil: Callable[[int], float] | None = None
    ) -> Source:
        """Return features of some images; reading number n multiplies them by spoil(n)."""
        levels = [level[rows] for level in self.features]
        calls = 0

        def read(indices: np.ndarray) -> list[np.ndarray]:
            nonlocal calls
            calls += 1
            factor = np.float32(spoil(calls) if spoil else 1.0)
            return [level[indices] * factor for level in levels]

        return Source(len(levels[0]), read, list)

    def trainer(self, *settings: str, name: str = "run") -> Trainer:
        config = tiny_config("train.epochs=4", "train.lr=0.002", "train.log_every=1", *settings)
        detector, _ = session.new_detector(config, allow_random=False)
        folder = self.folder / name
        return Trainer(detector, config, folder, RunLog(folder), label="bottle", meta=META)

    def fit(self, trainer: Trainer, judge: Judge | None = None, **sources: Source) -> Trainer:
        parts = {"train": self.source(slice(0, 8)), "holdout": self.source(slice(8, 12)), **sources}
        trainer.fit(parts["train"], parts["holdout"], judge)
        return trainer


@pytest.fixture(scope="module")
def features() -> list[np.ndarray]:
    detector, _ = session.new_detector(tiny_config(), allow_random=False)
    with paddle.no_grad():
        return [f.numpy() for f in detector.features(paddle.to_tensor(photographs(12, 64)))]


@pytest.fixture
def parts(features, tmp_path) -> Parts:
    return Parts(features, tmp_path)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """The folder of a finished run of two epochs that tests only read."""
    return train_tiny(data, tmp_path_factory.mktemp("runs") / "exp")


def events(run: Path, kind: str) -> list[dict]:
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def weights(run: Path, which: str = "last") -> dict[str, bytes]:
    """Return the bytes of all tensors of a checkpoint, the optimizer's too."""
    names = [checkpoint.HEAD] + [checkpoint.OPTIMIZER] * (which == "last")
    return {name: (run / which / name).read_bytes() for name in names}


def meta(run: Path, which: str = "last") -> dict:
    return json.loads((run / which / checkpoint.META).read_text(encoding="utf-8"))


def trained(detector: Detector) -> dict[str, np.ndarray]:
    return {n: p.numpy().copy() for n, p in detector.named_parameters() if not p.stop_gradient}


# --- learning


def test_the_loss_goes_down_for_seen_and_unseen_images(parts):
    trainer = parts.fit(parts.trainer("train.epochs=8"))
    epochs = events(trainer.folder, "epoch")
    assert [event["step"] for event in epochs] == list(range(1, 9))
    for key in ("train_nll", "holdout_nll"):
        values = [event[key] for event in epochs]
        assert values[-1] < values[0] - 0.1
        assert np.polyfit(range(8), values, 1)[0] < 0


def test_the_loss_is_in_nats_per_dimension(parts):
    """½‖z‖² − log|det J| over the number of values, from the detector's own output."""
    trainer = parts.trainer("train.epochs=1", "train.batch_size=8")
    with paddle.no_grad():
        maps = [paddle.to_tensor(level[:8]) for level in parts.features]
        latents, log_dets = trainer.detector.flow(maps)
    pairs = zip(latents, log_dets, strict=True)
    total = sum(
        (0.5 * z.numpy().astype(float) ** 2).sum() - d.numpy().astype(float).sum() for z, d in pairs
    )
    expected = total / sum(z.numpy().size for z in latents)
    parts.fit(trainer)
    (step,) = events(trainer.folder, "step")
    assert step["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_backbone_stays_as_it_is(tmp_path):
    """Also its batch norms' statistics, although training runs the images through it."""
    config = tiny_config("train.epochs=1")
    detector, _ = session.new_detector(config, allow_random=False)
    before = {k: v.numpy().copy() for k, v in detector.backbone.state_dict().items()}
    images = photographs(6, 64)
    source = Source(6, lambda i: [images[i]], lambda arrays: detector.features(arrays[0]))
    head = trained(detector)
    log = RunLog(tmp_path / "run")
    Trainer(detector, config, tmp_path / "run", log, label="x", meta=META).fit(source, source)
    assert any("_mean" in name for name in before)
    for name, value in detector.backbone.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name])
    assert any((value != head[name]).any() for name, value in trained(detector).items())


def test_batch_norm_of_the_head_does_learn(parts):
    trainer = parts.trainer("model.norm=batch", "train.epochs=1")
    before = {k: v.numpy().copy() for k, v in trainer.detector.head_state().items()}
    parts.fit(trainer)
    state = trainer.detector.head_state()
    statistics = [name for name in before if name.endswith(("_mean", "_variance"))]
    assert len(statistics) == 6
    assert all((state[name].numpy() != before[name]).any() for name in statistics)


# --- repetition


def test_one_seed_gives_one_result_to_the_bit(run, data, tmp_path):
    again = train_tiny(data, tmp_path / "again")
    for which in ("last", "best"):
        assert weights(again, which) == weights(run, which)
        assert meta(again, which)["calibration"] == meta(run, which)["calibration"]


def test_another_seed_gives_another_result(run, data, tmp_path):
    other = train_tiny(data, tmp_path / "other", "-o", "train.seed=1")
    assert weights(other) != weights(run)


@pytest.mark.slow
def test_another_process_gives_the_same_bits(run, data, tmp_path):
    done = script("train.py", *arguments(data, tmp_path / "other"))
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "other/bottle") == weights(run)


def test_the_feature_cache_changes_nothing(run, data, tmp_path):
    plain = train_tiny(data, tmp_path / "plain", "-o", "data.cache=false")
    assert not (tmp_path / "cache").exists()
    assert (run.parents[1] / "cache").is_dir()
    for which in ("last", "best"):
        cached, direct = (load_file(r / which / checkpoint.HEAD) for r in (run, plain))
        for name, value in cached.items():
            np.testing.assert_allclose(direct[name], value, rtol=1e-4, atol=1e-5)


def test_a_damaged_cache_is_rebuilt(run, data, tmp_path):
    first = train_tiny(data, tmp_path / "first")
    (level,) = (tmp_path / "cache").glob("*/level0.npy")
    good = level.read_bytes()
    level.write_bytes(good[:-5000] + bytes(5000))
    second = train_tiny(data, tmp_path / "second")
    assert level.read_bytes() == good
    level.write_bytes(good[: len(good) // 2])
    third = train_tiny(data, tmp_path / "third")
    assert weights(first) == weights(second) == weights(third) == weights(run)


# --- resuming


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_going_on_equals_never_having_stopped(parts, schedule):
    schedule = f"train.schedule={schedule}"
    whole = parts.fit(parts.trainer(schedule, name="whole"))
    first = parts.trainer(schedule, name="halves")
    with pytest.raises(KeyboardInterrupt):  # in the middle of epoch 3
        parts.fit(first, train=parts.source(slice(0, 8), stopping(6)))
    second = parts.trainer(schedule, name="halves")
    assert second.resume()
    assert second.progress.epoch == 2
    parts.fit(second)
    for which in ("last", "best"):
        assert weights(second.folder, which) == weights(whole.folder, which)
    assert meta(second.folder)["progress"] == meta(whole.folder)["progress"]


def stopping(at: int) -> Callable[[int], float]:
    def factor(reading: int) -> float:
        if reading == at:
            raise KeyboardInterrupt
        return 1.0

    return factor


def test_a_new_run_has_nothing_to_resume(parts):
    assert not parts.trainer().resume()


def test_a_finished_run_resumes_into_nothing(run, data, tmp_path):
    exp = tmp_path / "exp"
    first = train_tiny(data, exp)
    before = weights(first)
    train_tiny(data, exp, "--resume")
    assert weights(first) == before
    assert meta(first)["calibration"] == meta(run)["calibration"]


def test_a_finished_run_can_be_prolonged(data, tmp_path):
    constant = ("-o", "train.schedule=constant")
    long = train_tiny(data, tmp_path / "long", "--epochs", "3", *constant)
    grown = train_tiny(data, tmp_path / "grown", *constant)
    train_tiny(data, tmp_path / "grown", "--resume", "--epochs", "3", *constant)
    assert weights(grown) == weights(long)
    assert meta(grown, "best")["calibration"] == meta(long, "best")["calibration"]
    assert meta(grown)["config"] == {**meta(long)["config"], "data": meta(grown)["config"]["data"]}


@pytest.mark.parametrize(
    ("more", "key"),
    [
        (["-o", "train.lr=0.5"], "train.lr"),
        (["-o", "model.steps=1"], "model.steps"),
        (["--epochs", "3"], "train.epochs"),  # the length of a cosine shapes every epoch
    ],
)
def test_resuming_with_another_configuration_is_refused(data, tmp_path, more, key):
    cosine = ("--epochs", "1", "-o", "train.schedule=cosine")
    run = train_tiny(data, tmp_path / "exp", *cosine)
    before = weights(run)
    with pytest.raises(UserError, match=f"the run has {re.escape(key)} = "):
        train_tiny(data, run.parent, "--resume", *cosine, *more)
    assert weights(run) == before


def test_resuming_with_other_images_is_refused(tmp_path):
    data = copy_bottle(tmp_path / "data")
    run = train_tiny(data, tmp_path / "exp")
    before = weights(run)
    good = data / "bottle/train/good"
    (good / "000.png").write_bytes((good / "001.png").read_bytes())
    with pytest.raises(UserError, match="training images changed since"):
        train_tiny(data, tmp_path / "exp", "--resume")
    assert weights(run) == before


def test_new_thresholds_can_be_asked_for_on_resuming(data, tmp_path):
    run = train_tiny(data, tmp_path / "exp")
    train_tiny(data, tmp_path / "exp", "--resume", "-o", "eval.image_threshold=fixed:0.25")
    stored = meta(run, "best")["calibration"]["image"]
    assert (stored["value"], stored["policy"]) == (0.25, "fixed:0.25")
    assert meta(run, "best")["config"]["eval"]["image_threshold"] == "fixed:0.25"


def test_a_run_is_not_replaced_unasked(run, data):
    before = weights(run)
    with pytest.raises(UserError, match="--resume goes on with it, --overwrite replaces it"):
        train_tiny(data, run.parent)
    assert weights(run) == before


def test_overwriting_starts_anew(data, tmp_path):
    run = train_tiny(data, tmp_path / "exp", "-o", "train.seed=1")
    (run / "notes.txt").write_text("keep")
    train_tiny(data, tmp_path / "exp", "--overwrite")
    assert meta(run)["config"]["train"]["seed"] == 0
    assert len(events(run, "epoch")) == 2  # the old log is gone as well
    assert (run / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize(
    "more",
    [
        ["-o", "model.strides=[4, 5]", "-o", "model.input_size=80"],  # no such stride
        ["-o", "train.amp=true"],
        ["--select-on", "test", "--data", "good only"],
        ["-o", "model.weights=nowhere.npz"],
    ],
)
def test_what_cannot_start_replaces_nothing(tmp_path, more):
    data = copy_bottle(tmp_path / "data", train=4, defective=0)
    run = train_tiny(data, tmp_path / "exp", "--epochs", "1")
    before = weights(run)
    more = [str(data) if text == "good only" else text for text in more]
    with pytest.raises(UserError):
        train_tiny(data, tmp_path / "exp", "--overwrite", *more)
    assert weights(run) == before


# --- being killed


def newest(run: Path) -> int:
    with contextlib.suppress(FileNotFoundError):  # folders are being exchanged
        return max((p.stat().st_mtime_ns for p in run.glob("*/meta.json")), default=0)
    return 0


def newer(run: Path, then: int) -> bool:
    return newest(run) > then


def wait_for(condition: Callable[[], Any], process: Any, seconds: float = 120) -> bool:
    """Poll; False if the process ends first."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.0002)
    raise TimeoutError


def writing(run: Path) -> bool:
    """Tell whether a checkpoint is being written or its folders are being exchanged."""
    return any(run.glob(".*.part")) or any(run.glob("*.old"))


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_equals_never_killed(data, tmp_path):
    length = ("--epochs", "14", "-o", "train.lr=0.002")
    whole = train_tiny(data, tmp_path / "whole", *length)
    exp = tmp_path / "killed"
    run, command = exp / "bottle", arguments(data, exp, *length, "--resume")
    rng = np.random.default_rng(0)
    killed = in_writing = 0
    for attempt in range(9):
        process = start("train.py", *command)
        try:
            then = newest(run)
            alive = wait_for(partial(newer, run, then), process)
            if alive and attempt % 3 == 2:
                time.sleep(rng.uniform(0, 0.25))
            elif alive:
                alive = wait_for(lambda: writing(run), process)
            process.send_signal(signal.SIGKILL)
            assert process.wait() in (-signal.SIGKILL, 0)
        finally:
            process.kill()
        killed += alive
        in_writing += writing(run)
    assert killed >= 5, "the run was over too early to be killed"
    assert in_writing >= 2, "no kill hit the writing of a checkpoint"
    done = script("train.py", *command)
    assert done.returncode == 0, done.stderr
    for which in ("last", "best"):
        assert weights(run, which) == weights(whole, which)
        assert meta(run, which)["progress"] == meta(whole, which)["progress"]
        assert meta(run, which)["calibration"] == meta(whole, which)["calibration"]
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert events(run, "epoch")[-1]["step"] == 14


@pytest.mark.slow
def test_killed_before_the_first_checkpoint(data, run, tmp_path):
    exp = tmp_path / "exp"
    process = start("train.py", *arguments(data, exp))
    assert wait_for(lambda: (exp / "bottle/train.log").exists(), process)
    process.kill()
    process.wait()
    done = script("train.py", *arguments(data, exp, "--resume"))
    assert done.returncode == 0, done.stderr
    assert weights(exp / "bottle") == weights(run)


# --- numbers that stop being finite


def test_nan_names_layer_step_and_last_loss_and_keeps_the_checkpoint(parts):
    trainer = parts.trainer()
    spoilt = parts.source(slice(0, 8), lambda n: math.nan if n == 6 else 1.0)  # epoch 3, batch 2
    with pytest.raises(UserError) as caught:
        parts.fit(trainer, train=spoilt)
    message = str(caught.value)
    last = events(trainer.folder, "step")[-1]["loss"]
    assert "\n" not in message
    assert "loss is nan at epoch 3, step 6" in message
    assert f"(last finite loss: {last:.4f})" in message
    assert "first seen in output of flow.norms.0;" in message
    assert "lower train.lr or set train.clip_norm" in message
    assert message.endswith("checkpoint: epoch 2 is kept")
    assert meta(trainer.folder)["progress"]["epoch"] == 2
    assert all(
        np.isfinite(v).all() for v in load_file(trainer.folder / "last/head.safetensors").values()
    )


def test_a_parameter_that_is_not_finite_is_named(parts):
    trainer = parts.trainer()
    parameters = dict(trainer.detector.named_parameters())
    name = next(n for n in parameters if n.endswith("affine.offset"))
    parameters[name].set_value(paddle.full_like(parameters[name], math.inf))
    with pytest.raises(UserError, match=rf"first seen in parameter {re.escape(name)};") as caught:
        parts.fit(trainer)
    assert "(last finite loss: none)" in str(caught.value)
    assert "checkpoint: none yet" in str(caught.value)


def test_weights_that_break_in_the_last_step_of_an_epoch_are_not_saved(parts):
    """The loss is of before the step, so only the held-out images tell."""
    trainer = parts.trainer("train.batch_size=8", "train.lr=1e30")
    with pytest.raises(UserError, match="held-out images is not finite after epoch 1, step 1"):
        parts.fit(trainer)
    assert not (trainer.folder / "last").exists()
    good = parts.trainer("train.batch_size=8", "train.epochs=1", name="good")
    parts.fit(good)
    before = weights(good.folder)
    resumed = parts.trainer("train.batch_size=8", name="good")
    assert resumed.resume()
    resumed.settings = replace(resumed.settings, lr=1e30)
    with pytest.raises(UserError, match="checkpoint: epoch 1 is kept"):
        parts.fit(resumed)
    assert weights(good.folder) == before


def test_divergence_is_one_line_and_exit_code_2(data, tmp_path):
    done = script("train.py", *arguments(data, tmp_path / "exp", "-o", "train.lr=1e30"))
    assert done.returncode == 2
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert re.search(r"(loss is (nan|-?inf) at|not finite after) epoch 1, step \d", line)
    assert re.search(r"first seen in (parameter|output of) flow\.", line)
    assert "Traceback" not in done.stderr


# --- what `best` follows


def test_best_follows_the_held_out_images(parts):
    """The held-out images are made unlikely from epoch 3 on, whatever training does."""
    holdout = parts.source(slice(8, 12), lambda n: 1.0 if n <= 2 else 10.0 * n)
    trainer = parts.fit(parts.trainer("model.norm=none"), holdout=holdout)
    values = [event["holdout_nll"] for event in events(trainer.folder, "epoch")]
    assert int(np.argmin(values)) == 1
    for which in ("best", "last"):
        assert meta(trainer.folder, which)["progress"]["best_epoch"] == 2
        assert meta(trainer.folder, which)["progress"]["best"] == {"best": [-values[1]]}
    assert meta(trainer.folder, "best")["progress"]["epoch"] == 2
    assert meta(trainer.folder, "last")["progress"]["epoch"] == 4
    assert weights(trainer.folder, "best") != {
        checkpoint.HEAD: weights(trainer.folder)[checkpoint.HEAD]
    }


def chosen(values: Sequence[Sequence[float] | None]) -> Judge:
    def judge(epoch: int, train: Source, holdout: Source) -> dict[str, Sequence[float]]:
        value = values[epoch - 1]
        return {} if value is None else {"best": value}

    return judge


ON_TEST = "train.select_on=test"


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([[1], [3], [2], [1]], 2),
        ([[1], [3], [3], [1]], 3),  # of equals the later one has seen more
        ([None, [1], None, None], 2),
        ([[0.9, 0.5], [0.9, 0.6], [0.8, 0.9], [0.9, 0.1]], 2),  # first value, then the second
        ([[1], [2], [3], [4]], 4),
    ],
)
def test_best_follows_what_is_selected_on(parts, values, best):
    trainer = parts.fit(parts.trainer(ON_TEST), chosen(values))
    assert trainer.progress.best_epoch == best
    assert meta(trainer.folder, "best")["progress"]["epoch"] == best
    assert meta(trainer.folder)["progress"]["epoch"] == 4


def test_patience(parts):
    worse = chosen([[-n] for n in range(1, 11)])
    trainer = parts.fit(parts.trainer("train.epochs=10", "train.patience=2", ON_TEST), worse)
    assert trainer.progress.epoch == 3
    assert trainer.progress.best_epoch == 1
    assert "no better epoch for 2 epochs" in (trainer.folder / "train.log").read_text()
    again = parts.trainer("train.epochs=10", "train.patience=2", ON_TEST)
    assert again.resume()
    parts.fit(again, worse)
    assert again.progress.epoch == 3  # resuming does not wait again
    better = chosen([[n] for n in range(1, 11)])
    patient = parts.fit(
        parts.trainer("train.epochs=5", "train.patience=1", ON_TEST, name="p"), better
    )
    assert patient.progress.epoch == 5


def test_selecting_on_the_test_set(data, tmp_path):
    run = train_tiny(data, tmp_path / "exp", "--select-on", "test")
    progress = meta(run, "best")["progress"]
    found, detector, _ = session.open_detector(str(tmp_path / "exp"), "bottle", "best")
    from datasets.folder import find_category

    test = labelled_set(find_category(data, "bottle").test, found.config, detector)
    values = session.evaluate_test(detector, test, found.config, None).metrics.values
    image, pixel = round(values["image_auroc"], 3), round(values["pixel_auroc"], 3)
    assert progress["best"]["best"] == pytest.approx([0.5 * image + 0.5 * pixel, pixel])


def test_epochs_between_tests(data, tmp_path):
    run = train_tiny(
        data, tmp_path / "exp", "--select-on", "test", "--test_epochs", "2", "--epochs", "3"
    )
    assert meta(run, "best")["progress"]["epoch"] in (2, 3)  # the last one is always tested


# --- logs


def test_log_lines_have_the_fields_that_tipc_reads(run):
    text = (run / "train.log").read_text(encoding="utf-8")
    number = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
    pattern = (
        rf"\[bottle\] epoch: (\d+)/2, iter: (\d+)/(\d+), lr: {number}, loss: {number}, "
        rf"avg_reader_cost: {number} sec, avg_batch_cost: {number} sec, avg_samples: {number}, "
        rf"ips: {number} images/sec"
    )
    assert re.findall(pattern, text) == [("1", "2", "2"), ("2", "2", "2")]
    assert "6 images to train on, 2 held out, 9 to test" in text


def test_every_line_of_the_json_log_is_an_event(run):
    steps, epochs = events(run, "step"), events(run, "epoch")
    assert [event["step"] for event in steps] == [2, 4]
    assert [event["epoch"] for event in steps] == [1, 2]
    for event in steps:
        assert event["avg_samples"] == 3  # 4 and 2 images
        assert event["ips"] > 0
        assert 0 <= event["avg_reader_cost"] <= event["avg_batch_cost"]
    assert [event["step"] for event in epochs] == [1, 2]
    assert all(math.isfinite(event["holdout_nll"]) for event in epochs)


def test_throughput_adds_up(parts):
    trainer = parts.fit(parts.trainer("train.log_every=100"))
    for event in events(trainer.folder, "step"):
        assert event["ips"] == pytest.approx(event["avg_samples"] / event["avg_batch_cost"])


def test_logging_every_few_steps(parts):
    trainer = parts.fit(parts.trainer("train.batch_size=2", "train.log_every=3", "train.epochs=1"))
    assert [event["step"] for event in events(trainer.folder, "step")] == [3, 4]


# --- settings


def rates(**changes: Any) -> list[float]:
    settings = TrainSection(epochs=8, lr=0.4, **changes)
    return [learning_rate(settings, epoch) for epoch in range(1, 9)]


def test_learning_rates():
    assert rates() == [0.4] * 8
    cosine = rates(schedule="cosine")
    assert cosine[0] == 0.4
    assert cosine[4] == pytest.approx(0.2)  # half way
    assert cosine == sorted(cosine, reverse=True)
    assert 0 < cosine[-1] < 0.02
    linear = rates(schedule="linear", final_lr=0.4, schedule_epochs=4)
    assert linear == pytest.approx([0.4, 0.34, 0.28, 0.22, 0.16, 0.16, 0.16, 0.16])


def test_the_rates_of_cflow():
    """The figures of the official code: 25 meta epochs at 2e-4, down to a thousandth."""
    settings = TrainSection(epochs=25, lr=2e-4, schedule="cosine", final_lr=1e-3, warmup_epochs=2)
    known = {2: 1.9686e-4, 3: 1.9298e-4, 12: 1.0637e-4, 24: 9.8774e-7}  # by epochs done
    for done, expected in known.items():
        assert learning_rate(settings, done + 1) == pytest.approx(expected, rel=1e-4)
    warm = [learning_rate(settings, epoch, share) for epoch in (1, 2) for share in (0, 0.5)]
    start, end = 2e-5, 1.968615e-4  # from a tenth to the rate behind the warm-up
    assert warm == pytest.approx([start + (end - start) * p for p in (0, 0.25, 0.5, 0.75)])


def test_the_schedule_is_used(parts):
    settings = ("train.schedule=cosine", "train.warmup_epochs=2")
    trainer = parts.fit(parts.trainer(*settings))
    expected = [learning_rate(trainer.settings, epoch, 0.5) for epoch in range(1, 5)]  # two steps
    assert [e["lr"] for e in events(trainer.folder, "epoch")] == pytest.approx(expected)
    still = parts.trainer("train.lr=1e-12", name="still")
    before = trained(still.detector)
    parts.fit(still)
    for name, value in trained(still.detector).items():
        np.testing.assert_allclose(value, before[name], atol=1e-9)


def moves(parts: Parts, *settings: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return all parameters before one step, and how that step moved them."""
    one = ("train.epochs=1", "train.batch_size=8", "train.lr=0.001", "train.weight_decay=0")
    trainer = parts.trainer(*one, *settings, name=str(len(list(parts.folder.iterdir()))))
    before = trained(trainer.detector)
    parts.fit(trainer)
    after = trained(trainer.detector)
    return before, {name: after[name] - value for name, value in before.items()}


def test_the_first_step_is_adams(parts):
    """Adam's first step is lr·g/(|g| + ε): as long as the rate wherever there is a gradient."""
    _, moved = moves(parts)
    steps = np.concatenate([np.abs(step).ravel() for step in moved.values()])
    assert np.quantile(steps, 0.5) == pytest.approx(1e-3, rel=1e-2)
    assert steps.max() < 1.01e-3


def test_gradients_are_clipped(parts):
    """A norm far below Adam's ε = 1e-8 leaves steps far below the rate."""
    _, moved = moves(parts, "train.clip_norm=1e-12")
    assert max(np.abs(step).max() for step in moved.values()) < 1e-6


def test_weight_decay_is_coupled(parts):
    """Part of the gradient: when strong, it decides the sign of every step, but not its size."""
    before, moved = moves(parts, "train.weight_decay=1000000")
    for name, value in before.items():
        far = np.abs(value) > 1e-3
        np.testing.assert_allclose(moved[name][far], -1e-3 * np.sign(value[far]), rtol=1e-2)


def test_drop_last(parts):
    three = ("train.batch_size=3", "train.epochs=1")
    kept = parts.fit(parts.trainer(*three, name="kept"))
    dropped = parts.fit(parts.trainer(*three, "train.drop_last=true", name="dropped"))
    assert events(kept.folder, "epoch")[0]["lr"]
    assert len(events(kept.folder, "step")) == 3
    assert [event["avg_samples"] for event in events(dropped.folder, "step")] == [3, 3]


def test_weights_do_not_depend_on_where_and_how_often_is_logged(parts):
    one = parts.fit(parts.trainer(name="one"))
    two = parts.fit(parts.trainer("train.log_every=7", "data.workers=3", name="two"))
    assert weights(one.folder) == weights(two.folder)


def test_command_line_beats_the_values_of_a_category(data, tmp_path):
    import yaml

    plain = tiny_config().to_dict()
    plain["per_category"] = {"bottle": {"train.batch_size": 2, "train.lr": 0.5}}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(plain))
    run = train_tiny(data, tmp_path / "exp", "-cfg", str(file), "-o", "train.lr=0.001")
    stored = meta(run)["config"]["train"]
    assert (stored["batch_size"], stored["lr"]) == (4, 0.001)  # arguments() gives the batch size
    run = train_tiny(
        data, tmp_path / "exp2", "-cfg", str(file), "--batch_size", "3", "-o", "train.epochs=9"
    )
    stored = meta(run)["config"]["train"]
    assert (stored["batch_size"], stored["lr"]) == (3, 0.5)
    assert stored["epochs"] == 2  # a flag beats -o


@pytest.mark.parametrize(("clip", "decay"), [(1.0, 1e-2), (None, 1e-2), (1.0, 0.0), (1e3, 0.0)])
def test_gradients_are_limited_and_decayed_as_by_paddle(clip, decay):
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(shape).astype(np.float32) for shape in ((40, 30), (7,), (5, 4, 3))]
    settings = TrainSection(lr=1e-2, epsilon=1e-4, clip_norm=clip, weight_decay=decay)
    found = []
    for ours in (True, False):
        layers = paddle.nn.ParameterList(
            [paddle.create_parameter(x.shape, "float32") for x in start]
        )
        for parameter, value in zip(layers.parameters(), start, strict=True):
            parameter.set_value(value)
        limit = paddle.nn.ClipGradByGlobalNorm(clip) if clip else None
        adam = Adam(layers.parameters(), settings) if ours else paddle.optimizer.Adam(
            1e-2, epsilon=1e-4, parameters=layers.parameters(), weight_decay=decay or None,
            grad_clip=limit,
        )  # fmt: skip
        for step in range(1, 4):
            *moved, _ = layers.parameters() if step == 2 else (*layers.parameters(), None)
            sum((p * p * p).sum() * step for p in moved).backward()  # the last one rests once
            adam.step()
            adam.clear_grad(set_to_zero=False)
        found.append([p.numpy() for p in layers.parameters()])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
