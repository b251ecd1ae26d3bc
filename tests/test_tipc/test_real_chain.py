"""The real chain on lite_data, and a broken one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FLOWS = ("fastflow", "cflow", "csflow", "uflow")
DRIVER = "test_tipc/test_train_inference_python.sh"


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
    return subprocess.run(
        ["bash", str(repo / DRIVER), str(out / "params.txt"), "lite_train_lite_infer"],
        env={**os.environ, "PYTHON": sys.executable, "TIPC_OUTPUT": str(out)},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("flow", FLOWS)
def test_the_real_chain_passes(repo: Path, tmp_path: Path, flow: str) -> None:
    done = real_chain(repo, tmp_path, f"{flow}/train_infer_python.txt")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    folder = tmp_path / flow / "lite_train_lite_infer"
    status = (folder / "results_python.log").read_text()
    assert "Run failed" not in status
    assert status.count("Run successfully") >= 5
    (train_log,) = folder.glob("norm_train_gpus_*[0-9].log")
    contract = (
        r"loss: -?\d\S*.*, avg_reader_cost: \S+ sec, avg_batch_cost: \S+ sec, "
        r"avg_samples: \S+, ips: \S+ images/sec"
    )
    assert len(re.findall(contract, train_log.read_text())) >= 3
    (eval_log,) = folder.glob("*_eval.log")
    assert re.search(r"EVAL:  image-auc : [01]\.\d{6} pixel-auc:[01]\.\d{6}", eval_log.read_text())
    infer_log = (folder / "python_infer_cpu_batchsize_1.log").read_text()
    assert re.search(r"(Normal|Anomaly) - score:  -?\d+\.\d{3}", infer_log)
    assert (tmp_path / "run/bottle/train.log").is_file()


@pytest.mark.slow
def test_a_broken_config_fails_the_real_chain(repo: Path, tmp_path: Path) -> None:
    done = real_chain(repo, tmp_path, **{"--overwrite": "--overwrite -o train.learning_rat=1"})
    assert done.returncode == 1
    status = (tmp_path / "fastflow/lite_train_lite_infer/results_python.log").read_text()
    assert "Run failed with command - fastflow - " in status


@pytest.mark.slow
def test_two_processes_pass_the_real_chain(repo: Path, tmp_path: Path) -> None:
    shorter = {"--epochs:lite_train_lite_infer=3": "--epochs:lite_train_lite_infer=1"}
    done = real_chain(repo, tmp_path, "fastflow/train_fleet_infer_python.txt", **shorter)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    folder = tmp_path / "fastflow_fleet/lite_train_lite_infer"
    assert "process 1 of 2" in (folder / "norm_train_gpus_-1,-1.log").read_text()
    status = (folder / "results_python.log").read_text()
    assert "Run failed" not in status
    assert status.count("Run successfully") >= 5
