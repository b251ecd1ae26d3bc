"""The chains behind a trained model: ONNX, quantization, the service, the speed of training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_tipc.conftest import Checkout

PTQ = "test_tipc/test_ptq_inference_python.sh"
ONNX = "test_tipc/test_paddle2onnx.sh"
SERVING = "test_tipc/test_serving_infer_python.sh"
SPEED = "test_tipc/benchmark_train.sh"
PARAMS = "test_tipc/configs/fastflow/{}_infer_python.txt"


@pytest.fixture
def trained(checkout: Checkout) -> Checkout:
    """The stand-in checkout, with a run that lite_train_lite_infer would have left."""
    for kind in ("last", "best"):
        folder = checkout.root / "results/lite_train_lite_infer/bottle" / kind
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text("{}")
    return checkout


def status(checkout: Checkout, chain: str) -> str:
    folder = checkout.root / "test_tipc/output/fastflow" / chain
    return (folder / f"results_{chain}.log").read_text()


def test_paddle2onnx(trained: Checkout) -> None:
    done = trained.run(ONNX, PARAMS.format("paddle2onnx"), "paddle2onnx_infer")
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(trained, "paddle2onnx").count("Run successfully") == 6
    engines = [w for c in trained.calls() for w in c["argv"] if w.startswith("--engine")]
    assert engines == ["--engine=paddle", "--engine=onnx"]
    assert "--onnx" in trained.call("deploy/export_model.py")
    assert "total wall time" in status(trained, "paddle2onnx")


def test_quantization_takes_the_exported_model_of_the_same_training(trained: Checkout) -> None:
    for exports in (1, 1, 2):
        done = trained.run(PTQ, PARAMS.format("train_ptq"))
        assert done.returncode == 0, done.stdout + done.stderr
        calls = [c for c in trained.calls() if "deploy/export_model.py" in c["argv"]]
        assert len(calls) == exports
        if len(trained.calls()) > 4:  # the training was done again
            meta = trained.root / "results/lite_train_lite_infer/bottle/last/meta.json"
            meta.write_text('{"epoch": 2}')
    assert "Run SKIPPED" not in status(trained, "ptq")


@pytest.mark.parametrize(
    "stage", ["deploy/export_model.py", "deploy/quantize.py", "deploy/infer.py"]
)
def test_a_failed_stage_fails_the_chain(trained: Checkout, stage: str) -> None:
    done = trained.run(PTQ, PARAMS.format("train_ptq"), FAKE_FAIL=stage)
    assert done.returncode == 1
    assert "Run failed with command - fastflow - " in status(trained, "ptq")
    assert " 1 failed" in status(trained, "ptq")


def test_a_silent_stage_fails_the_chain(trained: Checkout) -> None:
    done = trained.run(ONNX, PARAMS.format("paddle2onnx"), FAKE_SILENT="deploy/infer.py")
    assert done.returncode == 1
    assert "Run SKIPPED - fastflow - comparison of the engines" in status(trained, "paddle2onnx")


def test_scores_that_are_not_numbers_fail_the_chain(trained: Checkout) -> None:
    done = trained.run(ONNX, PARAMS.format("paddle2onnx"), FAKE_NAN="1")
    assert done.returncode == 1


def test_params_files_of_windows_and_with_blanks(trained: Checkout) -> None:
    text = (trained.root / PARAMS.format("train_ptq")).read_text()
    text = text.replace("\n", "\r\n\r\n").replace("lite_data", "'my data/http://x:1'")
    (trained.root / "edited.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    done = trained.run(PTQ, "edited.txt")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "my data/http://x:1" in trained.call("deploy/quantize.py")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("PTQ:", "QTP:", "no line 'PTQ:value'"),
        ("--exp_dir:lite", "--exp_dir:no", "no trained model 'no_train_lite_infer'"),
        ("images/bottle_good", "images/none", "no image 'images/none.png'"),
        ("model_name:fastflow", "model_name:a/b", "model_name 'a/b' is not"),
    ],
)
def test_mistakes(trained: Checkout, old: str, new: str, message: str) -> None:
    text = (trained.root / PARAMS.format("train_ptq")).read_text()
    assert old in text
    (trained.root / "edited.txt").write_text(text.replace(old, new))
    done = trained.run(PTQ, "edited.txt")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_the_speed_of_training(checkout: Checkout) -> None:
    done = checkout.run(SPEED, Checkout.CONFIG, "benchmark_train")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = checkout.root / "test_tipc/output/fastflow/benchmark_train"
    (file,) = (folder / "index").iterdir()
    assert json.loads(file.read_text()) == {
        "model": "fastflow", "batch_size": 8, "precision": "fp32", "process_type": "SingleP",
        "device": "cpu", "ips": 4,
    }  # fmt: skip
    assert (
        "Run SKIPPED - fastflow - fastflow_bs8_amp_SingleP"
        in (folder / "results_benchmark.log").read_text()
    )
    assert "--batch_size=8" in checkout.call("train.py")


def test_one_combination(checkout: Checkout) -> None:
    done = checkout.run(SPEED, Checkout.CONFIG, "benchmark_train", "dynamic_bs4_fp32_MultiP")
    assert done.returncode == 0, done.stdout + done.stderr
    call = checkout.call("train.py")
    assert {"paddle.distributed.launch", "--nproc_per_node=2", "--batch_size=4"} <= set(call)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("benchmark_train", "dynamic_bs4_amp_SingleP"), 3),
        (("benchmark_train", "bs4"), 2),
        (("train",), 2),
    ],
)
def test_speed_that_cannot_be_measured(checkout: Checkout, arguments: tuple, code: int) -> None:
    assert checkout.run(SPEED, Checkout.CONFIG, *arguments).returncode == code


SERVICE = """
import http.server, json, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, code, value):
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        self.answer(200, {})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        result = {"score": 0.5, "map_mean": 0.1, "map_max": 0.7}
        self.answer(int(sys.argv[1]), {"results": [result]})
    def log_message(self, *args):
        pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[2])))
address = {"event": "listening", "host": "127.0.0.1", "port": server.server_address[1]}
print(json.dumps(address), file=sys.stderr, flush=True)
server.serve_forever()
"""


@pytest.mark.parametrize(
    ("status_code", "exit_code", "message"),
    [("200", "0", ""), ("422", "0", "422"), ("200", "3", "ended with code 3 after SIGTERM")],
)
def test_the_client_of_the_service(repo, tmp_path, status_code, exit_code, message) -> None:
    (tmp_path / "service.py").write_text(SERVICE)
    service = [sys.executable, str(tmp_path / "service.py"), status_code, exit_code]
    done = subprocess.run(
        [sys.executable, str(repo / "test_tipc/serving_client.py"), "--images",
         str(repo / "images/bottle_good.png"), "--results", str(tmp_path / "r.txt"), "--",
         *service],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == (1 if message else 0), done.stderr
    assert message in done.stderr
    if not message:
        name, tab, values = (tmp_path / "r.txt").read_text().partition("\t")
        assert name.endswith("images/bottle_good.png")
        assert tab
        assert json.loads(values) == {"score": 0.5, "map_mean": 0.1, "map_max": 0.7}


def test_a_service_that_does_not_start(repo: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(repo / "test_tipc/serving_client.py"), "--images",
         str(repo / "images/bottle_good.png"), "--results", str(tmp_path / "r.txt"), "--",
         sys.executable, "-c", "raise SystemExit(2)"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "the service did not say where it listens" in done.stderr
