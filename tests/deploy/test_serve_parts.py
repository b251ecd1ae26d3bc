"""Parts of the service by themselves: batches, places, engines that fail or hang, log lines."""

import asyncio
import json
import logging
import math
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="pip install -r requirements-service.txt")

from deploy.bundle import read_bundle
from deploy.engines import EngineOptions, PaddleEngine
from deploy.service import logs
from deploy.service.body import Sent
from deploy.service.engine_process import EngineLost, EngineProcess
from deploy.service.limits import Limits, Places, Refusal
from deploy.service.metrics import Metrics
from deploy.service.models import Model
from deploy.service.service import Service
from deploy.service.worker import Batch, Worker
from metrics.drift import NormalNll
from metrics.threshold import fixed
from tests.deploy.serving import picture
from utils.errors import UserError
from utils.predictions import Output

SECONDS = 10


class Engine:
    """Scores are the mean of an image; waits until it is let go, or fails if it is told to."""

    def __init__(self) -> None:
        self.may_run = threading.Event()
        self.may_run.set()
        self.running = threading.Event()
        self.fails: Exception | None = None
        self.sizes: list[int] = []
        self.starts = 0
        self.killed = False
        self.refuses = False

    def start(self) -> str:
        if self.refuses:
            raise ValueError("no such engine")
        self.starts += 1
        assert self.may_run.wait(SECONDS)
        return "note"

    def close(self) -> None:
        self.killed = True

    def kill(self) -> None:
        self.killed = True

    def run(self, images):
        self.sizes.append(len(images))
        self.running.set()
        assert self.may_run.wait(SECONDS)
        if self.fails:
            raise self.fails
        scores = images.mean(axis=(1, 2, 3))
        return Output(images[:, 0], scores, [images[:, 1, ::2, ::2]], scores / 2)


def worker_of(engine: Engine, most: int = 4, **more) -> Worker:
    worker = Worker("m", engine, most=most, **more)
    worker.start()
    assert worker.ready.result(SECONDS) == "note"
    return worker


def image(value: float) -> np.ndarray:
    return np.full((3, 4, 6), value, np.float32)


def hold(engine: Engine) -> None:
    """Let the next run of an engine wait."""
    engine.may_run.clear()
    engine.running.clear()


def test_what_waits_together_is_run_together_and_each_gets_its_own():
    engine, batches = Engine(), list[Batch]()
    worker = worker_of(engine, on_batch=batches.append)
    hold(engine)
    jobs = [worker.submit(image(0))]
    assert engine.running.wait(SECONDS)
    jobs += [worker.submit(image(n)) for n in range(1, 7)]
    engine.may_run.set()
    found = [job.result(SECONDS) for job in jobs]
    assert engine.sizes == [1, 4, 2]
    assert [each.score for each in found] == list(range(7))
    assert all((each.anomaly_map == n).all() for n, each in enumerate(found))
    assert [each.evidence[0].shape for each in found] == [(2, 3)] * 7
    assert [each.nll for each in found] == [n / 2 for n in range(7)]
    worker.close()
    assert [batch.images for batch in batches] == [1, 4, 2]
    assert worker.seconds_per_image > 0


def test_a_patient_worker_waits_for_a_full_batch():
    engine = Engine()
    worker = worker_of(engine, most=2, patience=SECONDS)
    start = time.monotonic()
    jobs = [worker.submit(image(1))]
    time.sleep(0.05)
    jobs.append(worker.submit(image(2)))
    assert [job.result(SECONDS).score for job in jobs] == [1, 2]
    assert engine.sizes == [2]
    assert time.monotonic() - start < SECONDS / 2
    worker.close()


def test_what_is_cancelled_while_it_waits_is_not_run():
    engine = Engine()
    worker = worker_of(engine)
    hold(engine)
    first = worker.submit(image(1))
    assert engine.running.wait(SECONDS)
    second, third = worker.submit(image(2)), worker.submit(image(3))
    assert second.cancel()
    engine.may_run.set()
    assert first.result(SECONDS).score == 1
    assert third.result(SECONDS).score == 3
    assert engine.sizes == [1, 1]
    worker.close()


def test_closing_finishes_what_was_submitted():
    engine = Engine()
    worker = worker_of(engine)
    hold(engine)
    jobs = [worker.submit(image(n)) for n in range(9)]
    closing = threading.Thread(target=worker.close)
    closing.start()
    time.sleep(0.05)
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit(image(0))
    engine.may_run.set()
    closing.join(SECONDS)
    assert [job.result(0).score for job in jobs] == list(range(9))


def test_a_failed_run_fails_its_images_only():
    engine, batches = Engine(), list[Batch]()
    worker = worker_of(engine, on_batch=batches.append)
    engine.fails = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        worker.submit(image(1)).result(SECONDS)
    engine.fails = None
    assert worker.submit(image(2)).result(SECONDS).score == 2
    assert engine.starts == 1
    worker.close()
    assert [batch.failed for batch in batches] == [True, False]
    assert engine.killed


def test_a_lost_engine_is_started_anew():
    engine = Engine()
    worker = worker_of(engine)
    engine.fails = EngineLost("it ended")
    job = worker.submit(image(1))
    with pytest.raises(EngineLost, match="it ended"):
        job.result(SECONDS)
    engine.fails = None
    assert worker.submit(image(2)).result(SECONDS).score == 2
    assert engine.starts == 2
    assert worker.state == "ok"
    worker.close()


@pytest.fixture(scope="module")
def process(two_bundles):
    """Start an engine in a process of its own; it is stopped for good by the last test."""
    engine = EngineProcess(two_bundles[0], EngineOptions(), [1], 60)
    engine.start()
    yield engine
    engine.kill()


@pytest.mark.slow
def test_an_engine_in_a_process_gives_its_own_results(process, two_bundles):
    images = np.random.default_rng(0).random((2, 3, 64, 64), np.float32)
    found = process.run(images)
    expected = PaddleEngine(read_bundle(two_bundles[0]), EngineOptions()).run(images)
    for one, other in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.slow
def test_a_fault_is_told_and_the_process_goes_on(process):
    with pytest.raises(RuntimeError):
        process.run(np.zeros((1, 5, 64, 64), np.float32))
    assert process.run(np.zeros((1, 3, 64, 64), np.float32))[1].shape == (1,)


@pytest.mark.slow
def test_a_process_that_crashed_or_hangs_is_replaced(process):
    one = np.zeros((1, 3, 64, 64), np.float32)
    os.kill(process._process.pid, signal.SIGSEGV)
    with pytest.raises(EngineLost, match="ended with code"):
        process.run(one)
    process.start()
    expected = process.run(one)[1]
    os.kill(process._process.pid, signal.SIGSTOP)
    process._seconds = 0.5
    with pytest.raises(EngineLost, match=r"no answer of the engine within 0\.5 s"):
        process.run(one)
    process._seconds = 60
    process.start()
    assert process.run(one)[1] == expected
    process.close()
    assert process._process.exitcode == 0


def test_an_engine_that_is_not_there_is_a_user_error(two_bundles):
    engine = EngineProcess(two_bundles[0], EngineOptions(engine="onnx"), [1], 60)
    with pytest.raises(UserError, match=r"onnx|ONNX"):
        engine.start()


def test_places():
    places = Places(3)
    assert places.take(2)
    assert not places.take(2)
    assert places.taken == 2
    assert places.take(1)
    places.give_back(3)
    assert places.taken == 0


def model_of(engine: Engine, limits: Limits, metrics: Metrics | None = None) -> Model:
    bundle = SimpleNamespace(
        input_size=(4, 6), resize="pil", image_threshold=fixed(0.5), pixel_threshold=fixed(0.5),
        acontrario=None, nll=NormalNll(0.0, 0.1, 20), color_scale=(0.0, 1.0), about={},
    )  # fmt: skip
    return Model("m", bundle, engine, limits, metrics or Metrics(), most=4, patience=0)  # type: ignore[arg-type]


def test_a_changed_camera_is_in_the_metrics():
    metrics = Metrics()
    model = model_of(Engine(), Limits(), metrics)
    model.worker.start()

    def gauges() -> dict[str, float]:
        lines = metrics.text().decode().splitlines()
        found = re.findall(r'^flowad_(nll|drift_\w+)\{model="m"\} (\S+)$', "\n".join(lines), re.M)
        return {name: float(value) for name, value in found}

    async def see(*values: float) -> None:
        with ThreadPoolExecutor(1) as pool:
            for value in values:  # the engine's NLL is half the mean of the pixels
                png = cv2.imencode(".png", np.full((4, 6, 3), round(255 * value), np.uint8))[1]
                (result,) = await model.predict([Sent("a.png", png.tobytes())], pool, False)
                assert result["nll"] == pytest.approx(value / 2, abs=2e-3)

    assert math.isnan(gauges()["drift_z"])
    assert model.about()["drift"] == ""
    asyncio.run(see(*[0.0] * 10))
    assert gauges()["drift_alarm"] == 0
    assert abs(gauges()["drift_z"]) < 0.1
    asyncio.run(see(*[1.0] * 12))
    assert gauges()["drift_alarm"] == 1
    assert gauges()["nll"] == pytest.approx(0.5 * 12 / 22, abs=1e-3)
    assert model.about()["drift"].startswith("drift: z = +")
    assert model.about()["drift_alarm"] is True
    model.worker.close()


def test_a_full_queue_refuses_and_says_when_to_come_back():
    model = model_of(Engine(), Limits(waiting=3))
    model.worker.seconds_per_image = 2.5
    with model.accepted() as take:
        take(2)
        with (
            pytest.raises(Refusal, match="3 of 3 places of m are taken") as found,
            model.accepted(),
        ):
            pass
        assert (found.value.status, found.value.retry_after) == (503, 8)
    with model.accepted() as take, pytest.raises(Refusal):
        take(3)
    assert model.places.taken == 0


def test_a_result_that_is_late_leaves_nothing_behind():
    async def scenario() -> None:
        engine = Engine()
        metrics = Metrics()
        service = Service(Limits(), metrics, {"m": model_of(engine, Limits(), metrics)})
        await service.start()
        model = service.model(None)
        engine.sizes.clear()
        hold(engine)
        sent = [Sent("a", picture()), Sent("b", picture(seed=1))]
        blocking = asyncio.create_task(model.predict(sent[:1], service.pool, False))
        assert await asyncio.to_thread(engine.running.wait, SECONDS)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(model.predict(sent, service.pool, False), 0.2)
        engine.may_run.set()
        assert len(await blocking) == 1
        assert len(await model.predict(sent, service.pool, False)) == 2
        assert engine.sizes[0] == 1
        assert sum(engine.sizes) == 3
        service.close()

    asyncio.run(scenario())


def test_states_from_start_to_stop():
    async def scenario() -> None:
        engine = Engine()
        hold(engine)
        service = Service(Limits(), Metrics(), {"m": model_of(engine, Limits())})
        assert service.state == "starting"
        with pytest.raises(Refusal, match="m: starting") as found:
            service.model(None)
        assert found.value.status == 503
        starting = asyncio.create_task(service.start())
        await asyncio.sleep(0.05)
        engine.may_run.set()
        await starting
        assert service.about() == {"status": "ok", "models": {"m": "ok"}}
        service.stopping = True
        assert service.state == "stopping"
        service.close()

    asyncio.run(scenario())


def test_an_engine_that_cannot_be_started_is_remembered():
    async def scenario() -> None:
        engine = Engine()
        engine.refuses = True
        service = Service(Limits(), Metrics(), {"m": model_of(engine, Limits())})
        told = []
        service.on_failure = lambda: told.append(True)
        await service.start()
        assert str(service.failure) == "no such engine"
        assert told == [True]
        assert service.state == "failed"
        service.close()

    asyncio.run(scenario())


def test_log_lines_are_json_whatever_is_in_them():
    record = logging.LogRecord("x", logging.ERROR, "", 0, "a\nb", None, None)
    record.fields = {"path": 'é"\n', "client": ("x",)}
    text = logs._JsonLines().format(record)
    assert "\n" not in text
    found = json.loads(text)
    assert (found["event"], found["level"], found["path"]) == ("a\nb", "error", 'é"\n')
