"""Twenty thousand mutated files for each reader: a result or one line, and nothing is executed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = 20_000
MEGABYTES = 400  # 256 of them may be copies that a small file asks for


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited as on Linux")
@pytest.mark.parametrize("reader", ["torch", "legacy", "pdparams", "safetensors", "npz"])
def test_mutated_files(reader: str, tmp_path: Path, repo: Path) -> None:
    """Half of the files in each of two processes, so that a crash is seen as one."""
    processes = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        command = [sys.executable, "-m", "tests.utils.fuzz_readers", reader, str(CASES // 2)]
        processes.append(
            subprocess.Popen(
                [*command, str(seed)], cwd=folder, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(repo)},
            )
        )  # fmt: skip
    for seed, process in enumerate(processes):
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
        report = json.loads(printed)
        print(reader, report)
        assert not report["broken"]
        assert report["accepted"] + report["refused"] == CASES // 2
        assert report["accepted"] > 100  # the mutations are not all of one kind
        assert report["refused"] > CASES // 10
        assert report["kilobytes"] < MEGABYTES * 1024
        assert not list((tmp_path / str(seed)).iterdir())
