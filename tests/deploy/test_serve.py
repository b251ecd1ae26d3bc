"""The service as its users meet it: results, refusals, tokens, start and stop."""

import base64
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.deploy.malformed import FORM, REFUSED
from tests.deploy.serving import ask, form, picture, serving
from tests.small_run import REPO, script
from utils.errors import UserError
from utils.image import read_image
from utils.visualize import heat_map, resize_map

pytest.importorskip("fastapi", reason="pip install -r requirements-service.txt")

IMAGES = sorted((REPO / "lite_data/bottle/test").glob("*/000.png"))
TOKEN = "correct-horse-battery"


@pytest.fixture(scope="module")
def inferred(two_bundles, tmp_path_factory) -> dict[str, dict[str, dict]]:
    """Return what deploy/infer.py says of IMAGES, by model and path."""
    from deploy import infer

    found = {}
    for name, bundle in zip(("fast", "uflow"), two_bundles, strict=True):
        out = tmp_path_factory.mktemp(name)
        infer.main(
            ["--save_inference_dir", str(bundle), "--output", str(out), "--save_maps",
             "--image_path", str(REPO / "lite_data/bottle/test/*/000.png")]
        )  # fmt: skip
        lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()
        results = [json.loads(line) for line in lines]
        found[name] = {r["path"]: {**r, "values": np.load(out / r["map"])} for r in results}
    return found


@pytest.mark.parametrize("model", ["fast", "uflow"])
def test_results_are_those_of_infer(service, inferred, model):
    assert len(IMAGES) == 4
    answer = service.predict(*IMAGES, query=f"?model={model}")
    assert answer.status == 200
    assert answer.json["model"] == model
    for path, found in zip(IMAGES, answer.json["results"], strict=True):
        expected = inferred[model][str(path)]
        assert found["name"] == path.name
        assert (found["height"], found["width"]) == read_image(path).shape[:2]
        for key in ("score", "threshold", "pixel_threshold", "map_mean", "map_max"):
            assert found[key] == pytest.approx(expected[key], abs=1e-5)
        assert found["verdict"] == expected["verdict"]
        assert len(found["regions"]) == len(expected["regions"])
        for one, other in zip(found["regions"], expected["regions"], strict=True):
            assert one == pytest.approx(other, abs=1e-4)
        assert ("log_nfa" in found) == (model == "uflow")
        assert found.get("log_nfa") == pytest.approx(expected.get("log_nfa"), abs=1e-3)
        assert "map" not in found


def test_a_map_has_the_colours_and_geometry_of_the_image(service, inferred, two_bundles):
    from deploy.bundle import read_bundle

    answer = service.predict(IMAGES[1], query="?model=fast&map=true")
    png = base64.b64decode(answer.json["results"][0]["map"])
    with Image.open(io.BytesIO(png)) as found:
        pixels = np.asarray(found)
    expected = inferred["fast"][str(IMAGES[1])]["values"]
    colours = heat_map(expected, *read_bundle(two_bundles[0]).color_scale)
    assert pixels.shape == colours.shape
    assert np.abs(pixels.astype(int) - colours).mean() < 0.5
    assert pixels.std() > 1


def test_a_large_map_is_scaled_down_and_keeps_its_sides():
    from deploy.service.models import heat_png

    values = resize_map(np.linspace(0, 1, 12).reshape(3, 4), (1500, 3000))
    with Image.open(io.BytesIO(heat_png(values, (0.0, 1.0)))) as found:
        assert found.size == (1024, 512)


def test_json_gives_the_same_as_a_form(service):
    texts = [base64.b64encode(path.read_bytes()).decode() for path in IMAGES[:2]]
    body = json.dumps({"images": texts}).encode()
    found = service.ask("POST", "/predict?model=fast", body, content_type="application/json").json[
        "results"
    ]
    expected = service.predict(*IMAGES[:2], query="?model=fast").json["results"]
    assert [each["name"] for each in found] == ["image 1", "image 2"]
    for one, other in zip(found, expected, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-6)


def test_an_image_is_turned_upright_and_names_are_only_labels(service):
    picture_file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(picture(40, 60))).save(picture_file, "JPEG", exif=exif)
    body, kind = form(picture_file.getvalue())
    body = body.replace(b"0.bin", b"../../etc/passwd")
    found = service.ask("POST", "/predict?model=fast", body, content_type=kind).json["results"][0]
    assert (found["width"], found["height"]) == (40, 60)
    assert found["name"] == "../../etc/passwd"


def test_models_tell_what_they_are_and_no_path(service, two_bundles):
    answer = service.ask("GET", "/models")
    first, second = answer.json["models"]
    assert (first["name"], second["name"]) == ("fast", "uflow")
    assert first["state"] == "ok"
    assert second["image_threshold"]["policy"] == "nfa"
    assert "NFA below 1" in second["image_threshold"]["text"]
    assert first["input_size"] == [64, 64]
    assert str(two_bundles[0].parent) not in answer.body.decode()


def test_health_and_metrics(service):
    before = service.metric('flowad_images_total{model="fast",verdict="Anomaly"}')
    normal = service.metric('flowad_images_total{model="fast",verdict="Normal"}')
    service.predict(*IMAGES, query="?model=fast")
    after = service.metric('flowad_images_total{model="fast",verdict="Anomaly"}')
    assert after - before + service.metric(
        'flowad_images_total{model="fast",verdict="Normal"}'
    ) - normal == len(IMAGES)
    assert service.metric('flowad_requests_total{path="/predict",status="200"}') > 0
    assert service.metric('flowad_waiting_images{model="fast"}') == 0
    assert service.metric("process_resident_memory_bytes") > 1e7
    health = service.ask("GET", "/health")
    assert (health.status, health.json) == (
        200, {"status": "ok", "models": {"fast": "ok", "uflow": "ok"}},
    )  # fmt: skip


def test_small_answers_are_not_held_back(service):
    """Nagle's algorithm and delayed acknowledgements would make it 40 ms."""
    connection = service.connect()
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        ask(connection, "GET", "/health")
        seconds.append(time.perf_counter() - start)
    connection.close()
    assert sorted(seconds)[4] < 0.03


def test_each_request_is_one_line_without_its_content(service):
    service.predict(IMAGES[0], query="?model=fast", X_Request_ID="order-17")
    line = service.logged("order-17")
    assert line["event"] == "request"
    assert (line["method"], line["path"], line["status"]) == ("POST", "/predict", 200)
    assert (line["model"], line["images"], line["client"]) == ("fast", 1, "127.0.0.1")
    assert line["ms"] > 0
    assert "score" not in line
    answer = service.ask("GET", "/health", X_Request_ID="no\tgood; " + "x" * 90)
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


@pytest.mark.parametrize("case", REFUSED)
def test_refused_bodies(service, case):
    body, kind, status, text = REFUSED[case]
    answer = service.ask("POST", "/predict?model=fast", body, content_type=kind)
    assert answer.status == status, answer.body
    assert text in answer.json["error"]
    assert "\n" not in answer.json["error"]
    assert answer.json["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("POST", "/predict", 422, "add ?model= with one of fast, uflow"),
        ("POST", "/predict?model=../fast", 404, "there is fast, uflow"),
        ("POST", "/predict?model=fast&map=perhaps", 422, "query.map"),
        ("POST", "/predict?model=fast&pam=1", 422, "query.pam"),
        ("GET", "/predict", 405, "Method Not Allowed"),
        ("GET", "/../requirements.txt", 404, "Not Found"),
        ("GET", "/index.html", 404, "Not Found"),
    ],
)  # fmt: skip
def test_refused_addresses(service, method, path, status, text):
    answer = service.ask(method, path, b"" if method == "POST" else None)
    assert answer.status == status
    assert text in answer.json["error"]


def test_a_body_of_unknown_length_is_cut_off(service):
    with socket.create_connection(("127.0.0.1", service.port), 30) as connection:
        head = f"POST /predict?model=fast HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\n"
        connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(3):
            connection.sendall(b"b71b0\r\n" + b"x" * 750_000 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /predict?model=fast HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["long header", "many headers", "TLS", "length", "chunk"],
)
def test_what_is_no_http_gets_an_answer_too(service, head):
    with socket.create_connection(("127.0.0.1", service.port), 30) as connection:
        connection.sendall(head)
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_a_body_that_does_not_come_and_a_result_that_is_late(two_bundles, tmp_path):
    with serving(tmp_path, str(two_bundles[0]), "--time_limit", "1") as service:
        with socket.create_connection(("127.0.0.1", service.port), 30) as connection:
            head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\n"
            connection.sendall(head.encode() + b"Content-Length: 1000\r\n\r\n--x")
            found = connection.recv(4096)
        assert found.startswith(b"HTTP/1.1 408 ")
        assert service.predict(picture()).status == 200
        assert service.metric('flowad_waiting_images{model="bottle"}') == 0


def test_a_token_is_asked_for(two_bundles, tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    with serving(tmp_path, str(two_bundles[0]), "--token_file", str(tmp_path / "token")) as service:
        for path in ("/", "/health", "/docs", "/openapi.json"):
            assert service.ask("GET", path).status == 200, path
        for given in ("", "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer \xe9"):
            answer = service.predict(picture(), Authorization=given)
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/models", "/metrics", "/predict", "/elsewhere"):
            assert service.ask("GET", path).status == 401, path
        assert service.predict(picture(), Authorization=f"Bearer {TOKEN}").status == 200
        assert service.ask("GET", "/models", Authorization=f"Bearer {TOKEN}").status == 200
        described = service.ask("GET", "/openapi.json").json
        assert described["paths"]["/predict"]["post"]["security"] == [{"HTTPBearer": []}]
        assert TOKEN not in service.log.read_text()


def test_a_token_of_the_environment(two_bundles, tmp_path):
    with serving(tmp_path, str(two_bundles[0]), "--drain", "0", FLOWAD_TOKEN=TOKEN) as service:
        assert service.ask("GET", "/models").status == 401
        service.process.terminate()
        assert service.process.wait(30) == 0


def test_the_engine_may_start_long_after_the_port(two_bundles, tmp_path):
    with serving(tmp_path, str(two_bundles[0]), wait=False) as service:
        seen = {service.ask("GET", "/health").status}
        early = service.predict(picture())
        service.wait("ok")
        seen.add(service.ask("GET", "/health").status)
        assert seen == {503, 200}
        assert early.status == 503
        assert int(early.headers["retry-after"]) > 0


def test_what_is_said_to_wrong_commands(two_bundles, tmp_path):
    from deploy import serve

    def said(*args: str) -> str:
        with pytest.raises(UserError) as found:
            serve.main(["--port", "0", *args])
        return str(found.value)

    fast, uflow = map(str, two_bundles)
    assert "no inference.yml here" in said(str(tmp_path))
    assert "a second model 'bottle'" in said(fast, uflow)
    assert "--max_images 64: more than --queue 8" in said(fast, "--queue", "8")
    assert "--max_megapixels 500: at most 170" in said(fast, "--max_megapixels", "500")
    (tmp_path / "token").write_text("short")
    assert "at least 16" in said(fast, "--token_file", str(tmp_path / "token"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--port {port}: cannot be used (Address already in use)" in said(
            fast, "--port", port
        )
    assert "--port 99999: must be" in said(fast, "--port", "99999")


def test_an_engine_that_cannot_start_ends_the_service(two_bundles):
    done = script("deploy/serve.py", str(two_bundles[0]), "--port", "0", "--engine", "onnx")
    assert done.returncode == 2
    assert re.match(r"error: .*(onnx|ONNX)", done.stderr.splitlines()[-1])


def test_without_its_packages_the_service_names_the_remedy(two_bundles, tmp_path):
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError(name='fastapi')")
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from utils import cli; "
        "from deploy import serve; cli.run(serve.main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(two_bundles[0])], cwd=REPO,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "fastapi is not installed; pip install -r requirements-service.txt" in done.stderr


def test_it_runs_without_the_training_code(two_bundles, tmp_path):
    """What the container image holds is enough."""
    for name in ("deploy", "utils", "metrics"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("models", "datasets", "engine", "convert"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not here')\n")
    (tmp_path / "run").mkdir()
    with serving(tmp_path / "run", str(two_bundles[0]), root=tmp_path) as service:
        assert service.predict(IMAGES[0]).status == 200


@pytest.mark.slow
def test_a_slow_head_is_cut_off(service):
    from deploy.service import server

    with socket.create_connection(("127.0.0.1", service.port), server.HEAD_SECONDS + 20) as slow:
        start = time.monotonic()
        slow.sendall(b"GET /health HTTP/1.1\r\nX: ")
        assert slow.recv(100) == b""
    assert server.HEAD_SECONDS - 1 < time.monotonic() - start < server.HEAD_SECONDS + 5
