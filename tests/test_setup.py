"""The set-up scripts, with a stand-in for Python; what the requirement files list."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
SCRIPTS = ("quickstart.sh", "runtests.sh", "train.sh", ".ci/run")
REQUIREMENTS = (
    "requirements.txt", "requirements-dev.txt", "requirements-onnx.txt",
    "requirements-openvino.txt", "requirements-visualdl.txt", "requirements-tensorboard.txt",
    "requirements-service.txt", "requirements-gradio.txt", "requirements-torch.txt",
)  # fmt: skip
# What a package is imported as, where that is not its name.
IMPORTED_AS = {
    "paddlepaddle": "paddle", "opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml",
    "scikit-learn": "sklearn", "scikit-image": "skimage", "python-multipart": "python_multipart",
    "prometheus-client": "prometheus_client", "tensorboardx": "tensorboardX",
}  # fmt: skip
# Modules of packages that are imported with the one that brings them.
BROUGHT_BY = {"starlette": "fastapi", "pydantic": "fastapi", "hypothesis": "schemathesis"}
ASKED_FOR_BY = ("pytest.importorskip", "importlib.util.find_spec")
STAGES = ["train.py", "eval.py", "predict.py", "deploy/export_model.py", "deploy/infer.py"]
# FastFlow-Paddle's order
CATEGORIES = [
    "toothbrush", "screw", "hazelnut", "transistor", "tile", "pill", "bottle", "cable", "capsule",
    "carpet", "grid", "leather", "metal_nut", "wood", "zipper",
]  # fmt: skip

# Plays Python: notes its arguments in $CALLS, makes the results that quickstart.sh looks for,
# and fails where $FAIL_AT is part of the command.
FAKE = r"""#!/bin/bash
sleep 0.02  # so that results of one stage are newer than those of the stage before
case "$1 $2" in
    "-c "*) printf "${FAKE_VERSION:-3.12}"; exit ;;
    "-m pip") echo "$*" >> "$CALLS"
        case "$3" in
            --version) exit ;;
            show) [ -n "${FAKE_GPU:-}" ]; exit ;;
            install) cat "${@: -1}" > "$CALLS.wanted"
                [ -z "${FAKE_LACKS:-}" ] || ! grep "$FAKE_LACKS" "$CALLS.wanted" > /dev/null ||
                    { echo "error: no such build" >&2; exit 1; } ;;
        esac ;;
    "-m venv") echo "$*" >> "$CALLS"; mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
    *) echo "$*" >> "$CALLS" ;;
esac
if [ -n "${FAIL_AT:-}" ]; then
    case "$*" in *"$FAIL_AT"*) echo "error: told to fail" >&2; exit 3 ;; esac
fi
run=results/quickstart/bottle
case "$1" in
    train.py) [ ! -e $run/last ] || echo "goes on" >> "$CALLS"
        mkdir -p $run/last; echo > $run/last/meta.json ;;
    eval.py) mkdir -p $run; echo > $run/results.json ;;
    predict.py) mkdir -p $run/predictions; echo > $run/predictions/results.jsonl ;;
    deploy/export_model.py) mkdir -p $run/inference; echo > $run/inference/inference.yml ;;
    deploy/infer.py) mkdir -p $run/inference_predictions
        echo > $run/inference_predictions/results.jsonl ;;
esac
"""


class Checkout:
    """A copy of the scripts, in a folder with spaces, whose Python is a stand-in."""

    def __init__(self, repo: Path, folder: Path) -> None:
        self.root = folder / "a check out"
        self.calls = folder / "calls"
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in ("PYTHON", "EPOCHS")},
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "CALLS": str(self.calls),
        }
        for name in (*SCRIPTS, *REQUIREMENTS):
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repo / name, target)
        for name in ("configs/fastflow_efficientnet_lite0.yaml", "pretrained/weights.json"):
            self.write(name, "first\n")
        self.write("lite_data/bottle/train/good/000.png", "first\n")
        (folder / "bin").mkdir()
        for name in ("python", "python3", *(f"python3.{minor}" for minor in range(10, 14))):
            self.script(folder / "bin" / name)

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def script(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE)
        path.chmod(0o755)
        return path

    def run(self, script: str, *arguments: str, shell: str = "bash", **environment: str):
        """Run a script from another folder and forget the calls of the run before."""
        self.calls.write_text("")
        return subprocess.run(
            [shell, str(self.root / script), *arguments], cwd=self.root.parent, text=True,
            env={**self.environment, **environment}, capture_output=True, timeout=60,
        )  # fmt: skip

    def start(self, script: str, *arguments: str, **environment: str) -> "subprocess.Popen[bytes]":
        self.calls.write_text("")
        return subprocess.Popen(
            ["sh", str(self.root / script), *arguments], cwd=self.root.parent,
            env={**self.environment, **environment}, start_new_session=True,
        )  # fmt: skip

    def called(self, prefix: str = "") -> list[str]:
        lines = self.calls.read_text().splitlines()
        return [line for line in lines if line.startswith(prefix)]

    def stages(self) -> list[str]:
        return [name for name in STAGES if self.called(name)]


@pytest.fixture
def checkout(repo: Path, tmp_path: Path) -> Checkout:
    return Checkout(repo, tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(repo: Path, script: str) -> None:
    shell = "sh" if script == "train.sh" else "bash"
    subprocess.run([shell, "-n", str(repo / script)], check=True)


def test_old_python_is_refused_in_one_line(checkout: Checkout) -> None:
    result = checkout.run("quickstart.sh", FAKE_VERSION="3.9")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "python3 is 3.9" in result.stderr
    assert "3.10 3.11 3.12 3.13" in result.stderr
    assert not (checkout.root / ".venv").exists()


def test_unusable_named_python_is_refused(checkout: Checkout) -> None:
    result = checkout.run("quickstart.sh", PYTHON="/nowhere/python3")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "PYTHON=/nowhere/python3 is no working Python" in result.stderr


def test_named_python_is_taken(checkout: Checkout, tmp_path: Path) -> None:
    checkout.script(tmp_path / "my own" / "python")
    assert checkout.run("quickstart.sh", "--install", PYTHON="my own/python").returncode == 0
    result = checkout.run("quickstart.sh", "--install", PYTHON="elsewhere/python")
    assert result.returncode == 0, "an existing .venv needs no other Python"


def test_quickstart_runs_everything_once(checkout: Checkout) -> None:
    first = checkout.run("quickstart.sh")
    assert first.returncode == 0, first.stderr
    assert checkout.stages() == STAGES
    assert not checkout.called("goes on")
    assert checkout.called("-m pip install")
    second = checkout.run("quickstart.sh")
    assert second.returncode == 0, second.stderr
    assert checkout.stages() == []
    assert not checkout.called("-m pip install")
    assert second.stdout.count("reused") == len(STAGES)
    assert checkout.called("- results/quickstart/bottle"), "the summary comes every time"


def test_quickstart_makes_only_what_is_missing(checkout: Checkout) -> None:
    checkout.run("quickstart.sh")
    run = checkout.root / "results/quickstart/bottle"
    (run / "results.json").unlink()
    (run / "inference/inference.yml").unlink()
    checkout.run("quickstart.sh")
    assert checkout.stages() == ["eval.py", "deploy/export_model.py", "deploy/infer.py"]


def test_quickstart_goes_on_with_a_killed_training(checkout: Checkout) -> None:
    assert checkout.run("quickstart.sh", FAIL_AT="train.py").returncode == 3
    checkout.write("results/quickstart/bottle/last/meta.json", "an epoch")
    assert checkout.run("quickstart.sh").returncode == 0
    assert checkout.called("train.py")[0].endswith("--resume")
    assert checkout.called("goes on")


@pytest.mark.parametrize("change", ["config", "pictures", "epochs"])
def test_quickstart_starts_anew_when_the_recipe_changes(checkout: Checkout, change: str) -> None:
    checkout.run("quickstart.sh")
    if change == "config":
        checkout.write("configs/fastflow_efficientnet_lite0.yaml", "second\n")
    if change == "pictures":
        checkout.write("lite_data/bottle/train/good/000.png", "second\n")
    checkout.run("quickstart.sh", **({"EPOCHS": "7"} if change == "epochs" else {}))
    assert checkout.stages() == STAGES
    assert not checkout.called("goes on")


@pytest.mark.parametrize("stage", STAGES)
def test_quickstart_stops_at_the_first_error(checkout: Checkout, stage: str) -> None:
    result = checkout.run("quickstart.sh", FAIL_AT=stage)
    assert result.returncode == 3
    assert "told to fail" in result.stderr
    assert "failed, for the reason above" in result.stderr.splitlines()[-1]
    assert checkout.stages() == STAGES[: STAGES.index(stage) + 1]


def test_failed_installation_is_tried_again(checkout: Checkout) -> None:
    assert checkout.run("quickstart.sh", FAIL_AT="pip install").returncode == 1
    assert checkout.stages() == []
    assert checkout.run("quickstart.sh").returncode == 0
    assert checkout.called("-m pip install")


def test_changed_requirements_are_installed_again(checkout: Checkout) -> None:
    checkout.run("quickstart.sh", "--install")
    checkout.write("requirements.txt", "numpy\n")
    checkout.run("quickstart.sh", "--install")
    assert len(checkout.called("-m pip install")) == 1


def test_gpu_build_is_left_alone(checkout: Checkout) -> None:
    def wanted() -> str:
        return checkout.calls.with_name("calls.wanted").read_text()

    checkout.run("quickstart.sh", "--install")
    assert "\npaddlepaddle>" in wanted()
    checkout.write("requirements.txt", (checkout.root / "requirements.txt").read_text() + "\n")
    checkout.run("quickstart.sh", "--install", FAKE_GPU="yes")
    assert "\npaddlepaddle" not in wanted()
    assert "\nnumpy" in wanted()


def test_unknown_argument(checkout: Checkout) -> None:
    result = checkout.run("quickstart.sh", "--instal")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert not checkout.called()


def test_train_sh_goes_on_after_a_failure(checkout: Checkout) -> None:
    python = {"python": "python3", "dir_name": "mine"}
    result = checkout.run("train.sh", "--data", "/my data", FAIL_AT="category grid", **python)
    assert result.returncode != 0
    calls = checkout.called("train.py")
    assert [line.split()[-1] for line in calls] == CATEGORIES
    assert all("--exp_dir mine --data /my data" in line for line in calls)
    assert checkout.called("eval.py") == ["eval.py --exp_dir mine --category all"]
    assert result.stderr.splitlines()[-1].endswith("above: grid")


def test_train_sh_spreads_categories_over_gpus(checkout: Checkout) -> None:
    result = checkout.run(
        "train.sh", "--jobs", "3", "--data", "d", "--gpus", "0,2", "--resume", shell="sh",
        python="python3", FAIL_AT="category pill",
    )  # fmt: skip
    calls = checkout.called("train.py")
    assert sorted(line.split()[-1] for line in calls) == sorted(CATEGORIES)
    assert all("--data d --resume --category" in line for line in calls)
    used = [line.split("--device ")[1].split()[0] for line in calls]
    assert set(used) == {"gpu:0", "gpu:2"}
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].endswith("above: pill")
    assert checkout.called()[-1] == "eval.py --exp_dir exp --category all"


def test_train_sh_trains_other_categories(checkout: Checkout) -> None:
    result = checkout.run("train.sh", shell="sh", python="python3", categories="cap lid")
    assert result.returncode == 0, result.stderr
    assert [line.split()[-1] for line in checkout.called("train.py")] == ["cap", "lid"]
    assert "--device" not in "".join(checkout.called())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--jobs", "0"), "--jobs 0: must be a whole number"),
        (("--jobs", "two"), "--jobs two: must be a whole number"),
        (("--jobs",), "--jobs: a value is missing"),
        (("--gpus", "gpu:1"), "--gpus gpu:1: must be numbers"),
    ],
)
def test_train_sh_refuses(checkout: Checkout, arguments: tuple[str, ...], message: str) -> None:
    result = checkout.run("train.sh", *arguments, shell="sh", python="python3")
    assert result.returncode == 2
    assert message in result.stderr
    assert not checkout.called()


def test_train_sh_stops_its_workers(checkout: Checkout, tmp_path: Path) -> None:
    """A signal reaches the trainings, and no further one is started."""
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\necho "$$" >> "$CALLS.running"\nexec sleep 60\n')
    slow.chmod(0o755)
    running = Path(f"{checkout.calls}.running")
    process = checkout.start("train.sh", "--jobs", "2", python=str(slow))
    deadline = time.monotonic() + 20
    while not running.exists() or len(running.read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 130
    for pid in map(int, running.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert len(running.read_text().split()) == 2


def test_train_sh_succeeds_in_any_shell(checkout: Checkout) -> None:
    checkout.script(checkout.root / ".venv/bin/python")
    result = checkout.run("train.sh", shell="sh")
    assert result.returncode == 0, result.stderr
    assert len(checkout.called("train.py --exp_dir exp")) == 15
    result = checkout.run("train.sh", shell="sh", FAIL_AT="eval.py")
    assert result.returncode != 0


@pytest.mark.parametrize("script", ["runtests.sh", ".ci/run"])
@pytest.mark.parametrize("fails", ["", "ruff check", "ruff format", "mypy", "pytest"])
def test_runtests_passes_the_exit_code_on(checkout: Checkout, script: str, fails: str) -> None:
    result = checkout.run(script, **({"FAIL_AT": f"-m {fails}"} if fails else {}))
    assert result.returncode == (3 if fails else 0), result.stderr
    checks = ["ruff check", "ruff format", "mypy", "pytest"]
    expected = checks[: checks.index(fails) + 1] if fails else checks
    assert [c for c in checks if checkout.called(f"-m {c}")] == expected


def test_runtests_goes_on_without_pytorch(checkout: Checkout) -> None:
    line = "PyTorch's CPU build is not to be had here (see .venv/torch.log): tests use the stored"
    result = checkout.run("runtests.sh")
    assert result.returncode == 0
    assert line not in result.stdout
    assert len(checkout.called("-m pip install")) == 8
    (checkout.root / ".venv/installed-requirements-torch.txt").unlink()
    result = checkout.run("runtests.sh", FAKE_LACKS="torch==")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(line) == 1
    assert "no such build" not in result.stderr
    assert "no such build" in (checkout.root / ".venv/torch.log").read_text()
    assert checkout.called("-m pytest")


@pytest.mark.slow
def test_quickstart_for_real(repo: Path, tmp_path: Path) -> None:
    """One epoch through the whole chain, with this Python in place of an installation."""
    root = tmp_path / "real check out"
    ignored = (".git", ".venv", "results", ".feature_cache", ".*_cache", "__pycache__", "tests")
    shutil.copytree(repo, root, ignore=shutil.ignore_patterns(*ignored))
    python = root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$2" = pip ] && exit\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "EPOCHS": "1"}
    command = ["bash", str(root / "quickstart.sh")]
    for expected in (0, 5):
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=500
        )
        assert result.returncode == 0, result.stderr
        summary = result.stdout.partition("== summary")[2]
        assert summary.count("reused") == expected
        dynamic, exported = re.findall(r"^bottle_bad\.png +(\S+) +(\S+)$", summary, re.M)[0]
        assert abs(float(dynamic) - float(exported)) < 1e-5
        assert "image AUROC" in summary
        pictures = re.findall(r"results/\S+\.png", summary)
        assert len(pictures) == 2
        assert all((root / picture).is_file() for picture in pictures)


def _packages(path: Path) -> dict[str, str]:
    """Return {package: version range} of a requirement file."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    found = (re.match(r"([a-z0-9_-]+)([^;]*)", line, re.I) for line in lines if line)
    return {match[1].lower(): match[2].strip() for match in found if match}


def _modules(packages: Iterable[str]) -> set[str]:
    return {IMPORTED_AS.get(name, name) for name in packages}


def _foreign_imports(repo: Path, files: Iterable[Path]) -> set[str]:
    """Return the top-level modules imported that are neither Python's nor ours."""
    own = {path.stem for path in (*repo.iterdir(), *repo.glob("tests/**/*.py"))}
    found: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ASKED_FOR_BY:
                names = [a.value for a in node.args if isinstance(a, ast.Constant)]
                found |= {str(name).partition(".")[0] for name in names}
    found = found - own - set(sys.stdlib_module_names)
    return {BROUGHT_BY.get(name, name) for name in found}


def _source(repo: Path, folders: Iterable[str]) -> list[Path]:
    return [path for folder in folders for path in sorted(repo.glob(folder))]


def test_requirements_are_what_is_imported(repo: Path) -> None:
    packages = ("datasets", "deploy", "engine", "metrics", "models", "utils", "convert")
    files = _source(repo, ["*.py", *(f"{package}/**/*.py" for package in packages)])
    imported = _foreign_imports(repo, files)
    listed = _modules(_packages(repo / "requirements.txt"))
    extras = {
        module
        for name in REQUIREMENTS[2:]
        for module in _modules(_packages(repo / name))
    }  # fmt: skip
    assert listed - imported == set(), "listed, but imported nowhere"
    assert imported - listed - extras == set(), "imported, but listed nowhere"
    assert {"visualdl", "tensorboardX", "gradio"} <= imported


def test_dev_requirements_are_what_the_tests_import(repo: Path) -> None:
    imported = _foreign_imports(
        repo, _source(repo, ["tests/**/*.py", "benchmarks/**/*.py", "test_tipc/**/*.py"])
    )
    development = ("requirements-dev.txt", "requirements-torch.txt")
    optional = {m for name in REQUIREMENTS[2:] for m in _modules(_packages(repo / name))}
    listed = {m for name in development for m in _modules(_packages(repo / name))}
    run_time = _modules(_packages(repo / "requirements.txt"))
    tools = {"ruff", "mypy", "pytest-xdist", "nbclient", "ipykernel"}  # the last two by docs/
    assert listed - imported == tools
    assert imported - listed - run_time - optional == set()


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_requirements_have_both_ends(repo: Path, name: str) -> None:
    expected = r"==[\d.]+(\+cpu)?" if "torch" in name else r">=[\d.]+,<[\d.]+"
    for package, versions in _packages(repo / name).items():
        assert re.fullmatch(expected, versions), f"{package} {versions}"


def test_python_range_is_the_same_everywhere(repo: Path) -> None:
    stated = re.search(
        r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (repo / "pyproject.toml").read_text()
    )
    assert stated
    versions = " ".join(f"3.{minor}" for minor in range(int(stated[1]), int(stated[2])))
    assert f'TESTED="{versions}"' in (repo / "quickstart.sh").read_text()
