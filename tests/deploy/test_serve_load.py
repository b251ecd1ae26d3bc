"""The service under load, under malformed requests, and stopped in the middle of both."""

import http.client
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.deploy.malformed import JSON, REFUSED, png_header, tile_bomb
from tests.deploy.serving import Answer, Running, ask, form, picture, serving
from tests.small_run import REPO

pytest.importorskip("fastapi", reason="pip install -r requirements-service.txt")
pytestmark = pytest.mark.slow

IMAGES = sorted((REPO / "lite_data/bottle/test").glob("*/*.png"))[:16]
CLIENTS = 8
REQUESTS = 60  # of each client
MALFORMED = 1000


@dataclass
class Tally:
    """What clients saw: answers, seconds of each, and requests that got none."""

    answers: list[tuple[Path, Answer]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def clients(service: Running, go_on: Callable[[int], bool], tally: Tally) -> list[threading.Thread]:
    """Start clients that each send one image after the other on a connection that is kept."""
    bodies = {path: form(path) for path in IMAGES}

    def client(number: int) -> None:
        connection = service.connect()
        count = 0
        while go_on(count):
            path = IMAGES[(number * 7 + count) % len(IMAGES)]
            body, kind = bodies[path]
            start = time.perf_counter()
            try:
                answer = ask(connection, "POST", "/predict", body, content_type=kind)
            except (OSError, http.client.HTTPException) as error:
                tally.lost.append(type(error).__name__)
                return
            tally.seconds.append(time.perf_counter() - start)
            tally.answers.append((path, answer))
            count += 1
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    return threads


def test_sustained_load(two_bundles, tmp_path, capsys):
    """Nothing is lost, and nobody's score depends on who else is in a batch."""
    with serving(tmp_path, str(two_bundles[0]), "--max_batch_size", "8") as service:
        alone = {
            path: service.predict(path).json["results"][0]["score"] for path in IMAGES
        }  # one after the other: batches of one
        assert service.metric('flowad_batch_images_sum{model="bottle"}') == len(IMAGES)
        tally, start = Tally(), time.perf_counter()
        for thread in clients(service, lambda count: count < REQUESTS, tally):
            thread.join()
        took = time.perf_counter() - start
        assert tally.lost == []
        assert Counter(answer.status for _, answer in tally.answers) == {200: CLIENTS * REQUESTS}
        for path, answer in tally.answers:
            assert answer.json["results"][0]["score"] == pytest.approx(alone[path], abs=1e-5)
        batches = service.metric('flowad_batch_images_count{model="bottle"}') - len(IMAGES)
        mean = CLIENTS * REQUESTS / batches
        middle, late = np.percentile(tally.seconds, [50, 99]) * 1000
        with capsys.disabled():
            print(
                f"\n{CLIENTS} clients: {CLIENTS * REQUESTS / took:.1f} requests/s, p50 "
                f"{middle:.0f} ms, p99 {late:.0f} ms, {mean:.2f} images a batch"
            )
        assert mean > 1.2
        assert late < 30_000
        assert len(set(alone.values())) > len(IMAGES) / 2


def test_a_full_queue_sends_clients_away_and_recovers(two_bundles, tmp_path):
    with serving(tmp_path, str(two_bundles[0]), "--queue", "8", "--max_images", "8") as service:
        body, kind = form(*IMAGES[:8])
        answers: list[Answer] = []

        def client() -> None:
            answers.extend(
                service.ask("POST", "/predict", body, content_type=kind) for _ in range(4)
            )

        threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = Counter(answer.status for answer in answers)
        assert set(statuses) == {200, 503}
        assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status == 503)
        assert service.predict(IMAGES[0]).status == 200
        assert service.metric('flowad_waiting_images{model="bottle"}') == 0


def test_a_stop_under_load_finishes_what_was_accepted(two_bundles, tmp_path):
    with serving(tmp_path, str(two_bundles[0])) as service:
        tally = Tally()
        threads = clients(service, lambda count: True, tally)
        time.sleep(2)
        service.process.send_signal(signal.SIGTERM)
        while service.process.poll() is None:  # it still answers while it drains
            time.sleep(0.05)
        assert service.process.wait(60) == 0
        for thread in threads:
            thread.join(60)
        assert {answer.status for _, answer in tally.answers} == {200}
        logged = [e for e in service.events() if e.get("path") == "/predict"]
        assert Counter(e["status"] for e in logged) == {200: len(tally.answers)}
        assert set(tally.lost) <= {"ConnectionRefusedError", "ConnectionResetError"}
        assert [e["event"] for e in service.events()][-1] == "stopped"


def malformed(rng: np.random.Generator) -> tuple[bytes, str]:
    """Return the body and content type of one request that must be refused."""
    good = picture(60, 80, (".jpg", ".png", ".bmp", ".tiff", ".webp")[rng.integers(5)], 1)
    body, kind = form(good)
    case = rng.integers(9)
    if case == 0:  # a truncated image
        return form(good[: rng.integers(0, len(good) * 4 // 5)])[0], kind
    if case == 1:  # its beginning is gone
        return form(good[rng.integers(8, len(good)) :])[0], kind
    if case == 2:
        return form(rng.bytes(int(rng.integers(0, 5000))))[0], kind
    if case == 3:  # a truncated form
        return body[: rng.integers(0, len(body) - 4)], kind
    if case == 4:
        return body, ("text/plain", "image/png", "", "multipart/mixed", "nonsense;;=")[
            rng.integers(5)
        ]
    if case == 5:
        return form(png_header(*rng.integers(8000, 2**31, 2).tolist()))[0], kind
    if case == 6:  # truncated or garbled JSON
        text = b'{"images": ["' + b"A" * int(rng.integers(1, 99)) + b'"]}'
        return text[: rng.integers(0, len(text))], JSON
    if case == 7:
        return form(tile_bomb())[0], kind
    body, kind, _, _ = list(REFUSED.values())[rng.integers(len(REFUSED))]
    return body, kind


def test_a_thousand_malformed_requests(service):
    rng = np.random.default_rng(0)
    expected = service.predict(IMAGES[0], query="?model=fast").json["results"]
    statuses: Counter[int] = Counter()
    connection = service.connect()
    memory = service.metric("process_resident_memory_bytes")
    for number in range(MALFORMED):
        body, kind = malformed(rng)
        headers = {"X-Filling": "x" * 200_000} if number % 50 == 49 else {}
        answer = ask(connection, "POST", "/predict?model=fast", body, content_type=kind, **headers)
        assert 400 <= answer.status < 500, (number, answer.body, kind, body[:300])
        statuses[answer.status] += 1
        assert answer.json["error"]
        if answer.headers.get("connection") == "close":
            connection.close()
    assert statuses.total() == MALFORMED
    assert {400, 413, 415, 422} <= set(statuses)
    assert service.ask("GET", "/health").json["status"] == "ok"
    assert service.predict(IMAGES[0], query="?model=fast").json["results"] == expected
    assert service.metric("process_resident_memory_bytes") - memory < 200e6
    assert service.metric('flowad_waiting_images{model="fast"}') == 0
