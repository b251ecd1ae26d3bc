"""The real chain on lite_data, and a broken one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

OTHERS = ("cflow", "csflow", "uflow")  # than FastFlow, which runs through all chains
DEPLOY = {
    "test_paddle2onnx.sh": "paddle2onnx", "test_ptq_inference_python.sh": "train_ptq",
    "test_serving_infer_python.sh": "serving",
}  # fmt: skip
ONE_EPOCH = {"--epochs:lite_train_lite_infer=3": "--epochs:lite_train_lite_infer=1"}
DRIVER = "test_train_inference_python.sh"


def real_chain(
    repo: Path, out: Path, config: str = "fastflow/train_infer_python.txt", **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run a params file in the real checkout with everything written below `out`."""
    for needed in ("train.py", "eval.py", "deploy/export_model.py", "deploy/infer.py"):
        if not (repo / needed).is_file():
            pytest.skip(f"no {needed}")
    text = (repo / "test_tipc/configs" / config).read_text()
    text = re.sub(r"(--exp_dir:lite_train_lite_infer)=[^|]+", rf"\1={out}/run", text)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (out / "params.txt").write_text(text)
    return run_driver(repo, DRIVER, out, str(out / "params.txt"), "lite_train_lite_infer")


def run_driver(
    repo: Path, name: str, out: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of the real test_tipc/, with its output below `out`."""
    return subprocess.run(
        ["bash", str(repo / "test_tipc" / name), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "TIPC_OUTPUT": str(out)},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


@pytest.fixture(scope="module")
def fastflow(repo: Path, tmp_path_factory) -> Path:
    """Run FastFlow's chain as it is shipped; return where it wrote."""
    folder = tmp_path_factory.mktemp("chain")
    check(real_chain(repo, folder), folder, "fastflow")
    return folder


def check(done: subprocess.CompletedProcess[str], out: Path, flow: str) -> None:
    """Check that a chain passed, and the lines that others read from its logs."""
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    folder = out / flow / "lite_train_lite_infer"
    status = (folder / "results_python.log").read_text()
    assert "Run failed" not in status
    assert status.count("Run successfully") >= 5
    (train_log,) = folder.glob("norm_train_gpus_*[0-9].log")
    contract = (
        r"loss: -?\d\S*.*, avg_reader_cost: \S+ sec, avg_batch_cost: \S+ sec, "
        r"avg_samples: \S+, ips: \S+ images/sec"
    )
    assert re.search(contract, train_log.read_text())
    (eval_log,) = folder.glob("*_eval.log")
    assert re.search(r"EVAL:  image-auc : [01]\.\d{6} pixel-auc:[01]\.\d{6}", eval_log.read_text())
    infer_log = (folder / "python_infer_cpu_batchsize_1.log").read_text()
    assert re.search(r"(Normal|Anomaly) - score:  -?\d+\.\d{3}", infer_log)
    assert (out / "run/bottle/train.log").is_file()


@pytest.mark.slow
def test_scores_are_the_stored_ones(repo: Path, fastflow: Path) -> None:
    """Measured with one and two threads, with and without oneDNN: within 3e-7 after 3 epochs."""
    found = fastflow / "fastflow/lite_train_lite_infer/python_infer_cpu_batchsize_1_fp32.txt"
    golden = repo / "test_tipc/results/python_fastflow_results_fp32.txt"
    command = [sys.executable, str(repo / "test_tipc/compare_results.py"), "--atol=1e-3"]
    done = subprocess.run(
        [*command, f"--gt_file={golden}", f"--log_file={found}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 3


@pytest.mark.slow
@pytest.mark.parametrize("driver", DEPLOY)
def test_the_chains_behind_it_pass(repo: Path, fastflow: Path, driver: str) -> None:
    for module in ("paddle2onnx", "onnxruntime", "fastapi"):
        pytest.importorskip(module)
    text = (repo / f"test_tipc/configs/fastflow/{DEPLOY[driver]}_infer_python.txt").read_text()
    text = re.sub(r"^--exp_dir:.*$", f"--exp_dir:{fastflow}/run", text, flags=re.M)
    params = fastflow / f"{driver}.txt"
    params.write_text(text)
    done = run_driver(repo, driver, fastflow, str(params))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert re.search(
        r"Summary - fastflow - \w+ - [3-9] passed, 0 failed, [01] skipped", done.stdout
    )


@pytest.mark.slow
@pytest.mark.parametrize("flow", OTHERS)
def test_the_real_chain_passes(repo: Path, tmp_path: Path, flow: str) -> None:
    done = real_chain(repo, tmp_path, f"{flow}/train_infer_python.txt", **ONE_EPOCH)
    check(done, tmp_path, flow)


@pytest.mark.slow
def test_a_broken_config_fails_the_real_chain(repo: Path, tmp_path: Path) -> None:
    done = real_chain(repo, tmp_path, **{"--overwrite": "--overwrite -o train.learning_rat=1"})
    assert done.returncode == 1
    status = (tmp_path / "fastflow/lite_train_lite_infer/results_python.log").read_text()
    assert "Run failed with command - fastflow - " in status


@pytest.mark.slow
def test_two_processes_pass_the_real_chain(repo: Path, tmp_path: Path) -> None:
    done = real_chain(repo, tmp_path, "fastflow/train_fleet_infer_python.txt", **ONE_EPOCH)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    folder = tmp_path / "fastflow_fleet/lite_train_lite_infer"
    assert "process 1 of 2" in (folder / "norm_train_gpus_-1,-1.log").read_text()
    status = (folder / "results_python.log").read_text()
    assert "Run failed" not in status
    assert status.count("Run successfully") >= 5
