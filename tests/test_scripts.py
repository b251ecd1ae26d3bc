"""The scripts as processes: flags, exit codes, one line for every mistake of a user."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest

import train
from tests.small_run import PRESET, REPO, arguments, copy_bottle, script, train_tiny
from utils.errors import UserError

SCRIPTS: dict[str, list[str]] = {
    "train.py": [], "eval.py": [], "predict.py": ["--image_path", "x.png"],
    "deploy/export_model.py": [], "deploy/infer.py": [],
}  # fmt: skip
# Flags and defaults of the FastFlow-Paddle command line (cli.md §4). What the default category is
# follows from what was trained; thresholds are the run's own instead of 0.8.
FLAGS: dict[str, dict[str, Any]] = {
    "train.py": {
        "-cfg": "configs/resnet18.yaml", "--config": "configs/resnet18.yaml", "-cat": None,
        "--category": None, "--exp_dir": "", "--data": None, "--epochs": None,
        "--batch_size": None, "--test_epochs": None,
    },
    "eval.py": {
        "-cfg": None, "--config": None, "--data": None, "-cat": None, "--category": None,
        "--exp_dir": "exp",
    },
    "predict.py": {
        "-cfg": None, "--config": None, "--image_path": "x.png", "-cat": None, "--category": None,
        "--exp_dir": "exp", "--image_threshold": None, "--pixel_threshold": None,
    },
    "deploy/export_model.py": {
        "-cfg": None, "--config": None, "-cat": None, "--category": None, "--exp_dir": "exp",
        "--save_inference_dir": None,
    },
    "deploy/infer.py": {
        "-cfg": None, "--config": None, "--image_path": "images/bottle_bad.png",
        "--save_inference_dir": "deploy/inference", "--use_gpu": False, "--benchmark": False,
        "--warmup": 0, "--batch_size": 1, "--max_batch_size": 16, "--image_threshold": None,
        "--pixel_threshold": None,
    },
}  # fmt: skip
VALUES: dict[type, str] = {int: "3", float: "0.5", str: "text", bool: "True", type(None): "3"}


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line on stderr of a script that refused."""
    assert done.returncode == 2, done.stderr + done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def module(name: str):
    return importlib.import_module(name.removesuffix(".py").replace("/", "."))


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_of_the_command_line_contract(name):
    parse = module(name).parse
    for flag, default in FLAGS[name].items():
        key = {"-cfg": "--config", "-cat": "--category"}.get(flag, flag)
        assert getattr(parse(SCRIPTS[name]), key[2:]) == default
        value = VALUES[type(default)]
        given = getattr(parse([*SCRIPTS[name], flag, value]), key[2:])
        given = given[0] if isinstance(given, list) else given  # several categories
        assert str(given) in (value, f"{value}.0")
    for flag in ("--use_gpu", "--benchmark"):  # bare, as in the document
        if flag in FLAGS[name]:
            assert getattr(parse([*SCRIPTS[name], flag]), flag[2:]) is True


@pytest.mark.parametrize("name", ["eval.py", "predict.py", "deploy/export_model.py"])
def test_is_last_names_a_checkpoint(name):
    parse = module(name).parse
    assert parse(SCRIPTS[name]).checkpoint == "best"
    for given, expected in (
        (["--is_last"], "last"), (["--is_last", "true"], "last"), (["--is_last", "0"], "best"),
        (["--checkpoint", "best_miou"], "best_miou"),
    ):  # fmt: skip
        assert parse([*SCRIPTS[name], *given]).checkpoint == expected


@pytest.mark.parametrize("name", SCRIPTS)
def test_unknown_flags_are_one_line_without_paddle(name, repo):
    """What is wrong with the arguments is said before anything slow is imported."""
    code = (
        f"import sys, runpy; sys.argv = {[name, *SCRIPTS[name], '--exp-dri', 'x']}\n"
        f"try: runpy.run_path('{name}', run_name='__main__')\n"
        "finally: assert 'paddle' not in sys.modules and 'cv2' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=False
    )
    line = refusal(done)
    assert "--exp-dri" in line
    if "--exp_dir" in FLAGS[name]:
        assert "(did you mean '--exp_dir'?)" in line


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as caught:
        module(name).parse(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert not [flag for flag in FLAGS[name] if flag not in out]


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("train.py", ["-cfg", "configs/resnet81.yaml"], "did you mean 'configs/resnet18.yaml'"),
        ("train.py", ["-o", "train.learning_rate=1"], "did you mean 'train.lr'"),
        ("train.py", ["-o", "train.lr=fast"], "train.lr is 'fast'; it must be a number"),
        ("train.py", ["--epochs", "0"], "--epochs: '0' is not a whole number of at least 1"),
        ("train.py", ["--lr", "1"], "did you mean '-o train.lr="),
        ("train.py", ["--data", "nowhere"], "nowhere: no such folder"),
        ("train.py", ["--data", "lite_data", "-cat", "botle"], "'botle' (found: bottle)"),
        ("train.py", ["--data", "lite_data", "--device", "gpu"], "--device gpu"),
        ("train.py", ["--data", "lite_data", "-o", "train.amp=1"], "train.amp: half precision"),
        ("train.py", ["--resume"], "--resume needs --exp_dir"),
        ("eval.py", ["--exp_dir", "none"], "no 'best' checkpoint here; train first"),
        ("eval.py", ["--exp_dir", "none", "-cat", "all"], "no trained category here"),
        ("eval.py", ["--eval-size", "300"], "invalid choice: '300'"),
        ("predict.py", ["--image_path", "nowhere.png"], "nowhere.png: no such file or folder"),
        ("predict.py", ["--image_path", "images", "--exp_dir", "none"], "no 'best' checkpoint"),
        ("predict.py", [], "required: --image_path"),
        ("deploy/export_model.py", ["--exp_dir", "none"], "no 'best' checkpoint here"),
        ("deploy/infer.py", ["--save_inference_dir", "none"], "none: no inference.yml here"),
        ("deploy/infer.py", ["--image_path", "*.xyz"], "no images here"),
        ("deploy/infer.py", ["--use_gpu", "maybe"], "'maybe' is not one of true, false"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(name, args, words, monkeypatch, repo, capsys):
    monkeypatch.chdir(repo)
    with pytest.raises((UserError, SystemExit)) as caught:
        module(name).main(args)
    code = caught.value.code if isinstance(caught.value, SystemExit) else 2
    text = str(caught.value) + capsys.readouterr().err
    assert code == 2
    assert words in text
    assert "\n" not in text.strip()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("train.py", ["--data", "lite_data", "-cat", "botle"]),
        ("deploy/infer.py", ["--save_inference_dir", "none"]),
        pytest.param("eval.py", ["--exp_dir", "none"], marks=pytest.mark.slow),
        pytest.param(
            "predict.py", ["--image_path", "images", "--exp_dir", "none"], marks=pytest.mark.slow
        ),
        pytest.param("deploy/export_model.py", ["--exp_dir", "none"], marks=pytest.mark.slow),
    ],
)
def test_mistakes_are_one_line_without_a_trace(name, args):
    assert refusal(script(name, *args)).startswith("error: ")


def test_missing_backbone_weights_are_one_line(tmp_path):
    done = script(
        "train.py", "--data", "lite_data", "--exp_dir", str(tmp_path / "run"), "--device", "cpu",
        HOME=str(tmp_path), FLOWAD_WEIGHTS_URL="http://127.0.0.1:9/",
    )  # fmt: skip
    line = refusal(done)
    assert "http://127.0.0.1:9/resnet18.pdparams" in line
    assert "efficientnet_lite0" in line
    assert not (tmp_path / "run").exists()


def check(capsys, *args: str) -> tuple[int, str]:
    code = train.main([*args, "-cfg", str(REPO / "configs/resnet18.yaml"), "--check"])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out


def test_check_reports_and_exits_zero(data, capsys):
    code, out = check(capsys, "--data", str(data))
    assert code == 0
    assert "train: 8 images (good 8)" in out
    assert "good 3" in out
    assert out.endswith("\nok\n")


def test_check_of_a_damaged_set_exits_non_zero(tmp_path):
    copy_bottle(tmp_path)
    (tmp_path / "bottle/train/good/000.png").write_bytes(b"broken")
    (tmp_path / "bottle/ground_truth/contamination/000_mask.png").unlink()
    done = script("train.py", "--data", str(tmp_path), "--check")
    assert done.returncode == 1
    assert "000.png" in done.stdout
    assert "without mask" in done.stdout
    assert done.stderr == ""


def test_check_of_all_categories(tmp_path, capsys):
    copy_bottle(tmp_path, train=3, good=1, defective=1)
    shutil.copytree(tmp_path / "bottle", tmp_path / "wood")
    (tmp_path / "wood/train/good/001.png").write_bytes(b"broken")
    code, out = check(capsys, "--data", str(tmp_path), "-cat", "all")
    assert code == 1
    assert out.index("wood: ") < out.index("bottle: ")  # in the order of tables
    assert out.count("not ok") == 1


def test_a_corrupt_training_image_is_named(tmp_path):
    copy_bottle(tmp_path)
    (tmp_path / "bottle/train/good/002.png").write_bytes(b"broken")
    for setting in ("data.cache=true", "data.cache=false"):
        with pytest.raises(UserError, match=r"train/good/002\.png: cannot read this image"):
            train.main(arguments(tmp_path, tmp_path / "run", "-o", setting, "--overwrite"))
    assert not (tmp_path / "run/bottle/last").exists()


@pytest.mark.slow
def test_the_whole_way(data, tmp_path, repo):
    """Train, evaluate, predict, export and infer as a user would, from the command line."""
    exp = tmp_path / "exp dir"
    done = script("train.py", *arguments(data, exp))
    assert done.returncode == 0, done.stderr
    assert "device: cpu" in done.stdout
    assert "image threshold " in done.stdout
    assert "guaranteed" in done.stdout or "false-alarm rate at most" in done.stdout
    command = re.search(r"next: python (eval\.py .*)", done.stdout)
    assert command
    assert f"'{exp}'" in command[1]  # can be pasted although it has a blank
    evaluated = script("eval.py", "--exp_dir", str(exp), "--data", str(data))
    assert evaluated.returncode == 0, evaluated.stderr
    assert re.search(
        r"^EVAL:  image-auc : [01]\.\d{6} pixel-auc:[01]\.\d{6}$", evaluated.stdout, re.M
    )
    bad = str(repo / "images/bottle_bad.png")
    predicted = script("predict.py", "--exp_dir", str(exp), "--image_path", bad)
    assert predicted.returncode == 0, predicted.stderr
    line = re.compile(r"^(Normal|Anomaly) - score:  -?\d+\.\d{3}$", re.M)
    assert line.search(predicted.stdout)
    bundle = tmp_path / "the bundle"
    exported = script(
        "deploy/export_model.py", "--exp_dir", str(exp), "--save_inference_dir", str(bundle)
    )
    assert exported.returncode == 0, exported.stderr
    assert f"inference model has been saved into {bundle}" in exported.stdout
    inferred = script(
        "deploy/infer.py", "--save_inference_dir", str(bundle), "--image_path", bad,
        "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert inferred.returncode == 0, inferred.stderr
    found = [line.search(done.stdout) for done in (predicted, inferred)]
    assert found[0]
    assert found[1]
    assert found[0][0] == found[1][0]  # the document: both print the same score


def test_scripts_work_from_any_directory(data, tmp_path, repo):
    exp = tmp_path / "exp"
    train_tiny(data, exp)
    away = tmp_path / "away"
    away.mkdir()
    done = script(
        "predict.py", "--exp_dir", str(exp), "--image_path", str(repo / "images"), cwd=away
    )
    assert done.returncode == 0, done.stderr
    assert list(away.iterdir()) == []


def test_the_run_tells_what_it_was(data, tmp_path):
    """The resolved configuration, seed, versions and hashes lie beside the weights."""
    run = train_tiny(data, tmp_path / "exp", "-o", "train.seed=7")
    meta = json.loads((run / "last/meta.json").read_text(encoding="utf-8"))
    assert meta["config"]["train"]["seed"] == 7
    assert meta["config"]["model"]["input_size"] == [64, 64]
    assert meta["preset"] == PRESET
    assert meta["category"] == "bottle"
    assert re.fullmatch("[0-9a-f]{64}", meta["backbone"]["sha256"])
    assert re.fullmatch("[0-9a-f]{64}", meta["data"]["digest"])
    assert (meta["data"]["train"], meta["data"]["holdout"]) == (6, 2)
    assert meta["versions"]["numpy"]
    assert meta["progress"]["epoch"] == 2
