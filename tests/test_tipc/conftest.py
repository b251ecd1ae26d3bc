"""A small stand-in checkout in which the chain's scripts run against a fake `python`."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

FAKE = Path(__file__).with_name("fake_project.py")


@dataclass
class Checkout:
    """The stand-in checkout; `run` starts one of its scripts with bash."""

    CONFIG: ClassVar = "test_tipc/configs/fastflow/train_infer_python.txt"
    DRIVER: ClassVar = "test_tipc/test_train_inference_python.sh"
    PASSED: ClassVar = " Run successfully with command - fastflow - "
    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(
        self, script: str, *arguments: str, cwd: Path | None = None, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        outside = {
            k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "TIPC_OUTPUT")
        }
        return subprocess.run(
            ["bash", str(self.root / script), *arguments],
            cwd=cwd or self.root,
            env={**outside, **self.environment, **extra},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def chain(
        self, mode: str = "lite_train_lite_infer", config: str = CONFIG, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        return self.run(self.DRIVER, config, mode, cwd=None, **extra)

    def output(self, mode: str = "lite_train_lite_infer", model: str = "fastflow") -> Path:
        return self.root / "test_tipc/output" / model / mode

    def status(self, mode: str = "lite_train_lite_infer") -> list[str]:
        return (self.output(mode) / "results_python.log").read_text().splitlines()

    def passed(self) -> list[str]:
        return [line for line in self.status() if line.startswith(self.PASSED)]

    def failed(self) -> list[str]:
        start = " Run failed with command - fastflow - "
        return [line for line in self.status() if line.startswith(start)]

    def skipped(self) -> list[str]:
        return [line for line in self.status() if line.startswith(" Run SKIPPED - fastflow - ")]

    def calls(self) -> list[dict]:
        file = Path(self.environment["FAKE_CALLS"])
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def call(self, script: str) -> list[str]:
        """Return the arguments of the only call of `script`."""
        (found,) = [c["argv"] for c in self.calls() if script in c["argv"]]
        return found

    def edit(self, *changes: tuple[int, str], name: str = "edited.txt") -> str:
        """Write the shipped params file with some lines replaced; return the new file's name."""
        lines = (self.root / self.CONFIG).read_text().splitlines()
        for number, text in changes:
            lines[number - 1] = text
        (self.root / name).write_text("\n".join(lines) + "\n")
        return name

    @staticmethod
    def one_line(text: str) -> str:
        (line,) = text.strip().splitlines()
        return line

    @staticmethod
    def write_python(path: Path) -> Path:
        """Write a program that runs the fake project, under any name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "{FAKE}" "$@"\n')
        path.chmod(0o755)
        return path


@pytest.fixture
def checkout(tmp_path: Path, repo: Path) -> Checkout:
    root = tmp_path / "a check'out (1)"
    ignore = shutil.ignore_patterns("output", "__pycache__")
    shutil.copytree(repo / "test_tipc", root / "test_tipc", ignore=ignore)
    for folder in ("images", "lite_data/bottle/train/good", "lite_data/bottle/test/good"):
        (root / folder).mkdir(parents=True)
    for picture in ("images/bottle_good.png", "lite_data/bottle/train/good/0.png"):
        (root / picture).write_bytes(b"png")
    (root / "lite_data/bottle/test/good/0.png").write_bytes(b"png")
    return Checkout(
        root,
        {
            "PYTHON": str(Checkout.write_python(tmp_path / "the python")),
            "FAKE_CALLS": str(tmp_path / "calls.jsonl"),
        },
    )
