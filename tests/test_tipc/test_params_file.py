"""What a user may write: the params file, the mode, the interpreter, the data."""

import os
import shutil
import subprocess

import pytest

# ---- where it runs


def test_runs_from_any_folder(checkout, tmp_path):
    outside = tmp_path / "some where"
    outside.mkdir()
    done = checkout.run(checkout.DRIVER, checkout.CONFIG, "lite_train_lite_infer", cwd=outside)
    assert done.returncode == 0
    assert checkout.status()
    shutil.copy(checkout.root / checkout.CONFIG, outside / "mine.txt")
    done = checkout.run(
        *[checkout.DRIVER, "mine.txt", "lite_train_lite_infer"], cwd=outside, TIPC_OUTPUT="out put"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (outside / "out put/fastflow/lite_train_lite_infer/results_python.log").is_file()


def test_which_python_is_used(checkout, tmp_path):
    del checkout.environment["PYTHON"]
    tools = tmp_path / "bin"
    checkout.write_python(tools / "python3")
    (tools / "python3.7").write_text("#!/bin/sh\nexit 127\n")  # what version managers leave
    (tools / "python3.7").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    config = checkout.edit((3, "python:python3.7"))
    done = checkout.chain(config=config, PATH=path)
    assert done.returncode == 0, done.stderr
    assert "line 3 says python:python3.7, using python3" in done.stdout
    checkout.write_python(checkout.root / ".venv/bin/python")
    done = checkout.chain(config=config, PATH=path)
    assert "using .venv/bin/python" in done.stdout
    assert checkout.passed()[0].startswith(f"{checkout.PASSED}.venv/bin/python train.py")
    done = checkout.chain(config=config, PYTHON="no-such-python")
    assert done.returncode == 2
    assert "no-such-python" in checkout.one_line(done.stderr)


def test_a_python_without_paddle_is_one_line(checkout):
    done = checkout.chain(FAKE_FAIL="import")
    assert done.returncode == 2
    assert "cannot import paddle" in checkout.one_line(done.stderr)


# ---- the params file


def test_crlf_and_bom_are_read(checkout):
    text = (checkout.root / checkout.CONFIG).read_text().replace("\n", "\r\n")
    (checkout.root / "dos.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert checkout.chain(config="dos.txt").returncode == 0
    assert "\r" not in "".join(checkout.call("train.py"))


def test_urls_blanks_and_stars_stay_whole(checkout):
    (checkout.root / "my data/bottle").mkdir(parents=True)
    shutil.copytree(
        checkout.root / "lite_data/bottle", checkout.root / "my data/bottle", dirs_exist_ok=True
    )
    config = checkout.edit(
        (9, "--pretrained:https://host:80/a?b=c"),
        (11, "--data:lite_train_lite_infer=my data"),
        (14, "norm_train:train.py -cat bottle --note='two words' -o *"),
    )
    assert checkout.chain(config=config).returncode == 0
    arguments = checkout.call("train.py")
    assert {"--pretrained=https://host:80/a?b=c", "--data=my data", "--note=two words", "*"} <= set(
        arguments
    )
    shown = checkout.passed()[0]
    command = shown.removeprefix(checkout.PASSED).rpartition(" - ")[0]
    echoed = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
    )
    assert echoed.stdout.splitlines()[1:] == arguments  # the status line can be pasted


def test_nothing_in_the_file_is_run_by_the_shell(checkout):
    config = checkout.edit((14, "norm_train:train.py -o $(touch hacked) `touch hacked`"))
    checkout.chain(config=config)
    assert not (checkout.root / "hacked").exists()


def test_plain_values_serve_every_mode(checkout):
    assert checkout.chain(config=checkout.edit((6, "--epochs:5"))).returncode == 0
    assert "--epochs=5" in checkout.call("train.py")


def test_a_later_section_is_allowed(checkout):
    path = checkout.root / checkout.edit()
    path.write_text(path.read_text() + "\n\n")
    assert checkout.chain(config=path.name).returncode == 0
    path.write_text(path.read_text().rstrip() + "\n====benchmark_params====\nbatch_size:8\n")
    assert checkout.chain(config=path.name).returncode == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[:31], "has 31 lines"),
        (lambda lines: [*lines, "more:1"], "has 33 lines"),
        (lambda lines: [], "has 0 lines"),
        (lambda lines: [*lines[:11], "", *lines[12:]], "line 12 is blank"),
        (lambda lines: ["", *lines], "line 1 is blank"),
        (lambda lines: [*lines[:11], *lines[12:], "##"], "line 13 must begin with 'trainer:'"),
        (lambda lines: [*lines[:1], "model_name:../../x", *lines[2:]], "line 2"),
        (lambda lines: [*lines[:1], "model_name:", *lines[2:]], "line 2 is empty"),
        (lambda lines: [*lines[:3], "gpu_list:zero", *lines[4:]], "'zero' is not"),
        (lambda lines: [*lines[:5], "--epochs:whole_infer=3", *lines[6:]], "line 6 (--epochs)"),
        (lambda lines: [*lines[:10], "--data:null", *lines[11:]], "line 11 (--data)"),
        (lambda lines: [*lines[:12], "trainer:a/b", *lines[13:]], "'a/b' is not"),
        (lambda lines: [*lines[:16], "eval:eval.py 'x", *lines[17:]], "balanced quotes"),
        (lambda lines: [*lines[:27], "--use_gpu:npu", *lines[28:]], "'npu' is not True or False"),
        (lambda lines: [*lines[:28], "--batch_size:0", *lines[29:]], "'0' is not a number"),
    ],
)
def test_wrong_files_are_one_clear_line(checkout, change, words):
    lines = (checkout.root / checkout.CONFIG).read_text().splitlines()
    (checkout.root / "bad.txt").write_text("".join(f"{line}\n" for line in change(lines[:32])))
    for script in (checkout.DRIVER, "test_tipc/prepare.sh"):
        done = checkout.run(script, "bad.txt", "lite_train_lite_infer")
        assert done.returncode == 2
        assert words in checkout.one_line(done.stderr)
    assert not checkout.calls()


@pytest.mark.parametrize("mode", ["lite", "", "lite_train_lite_infer whole_infer", "*"])
def test_unknown_modes_are_refused(checkout, mode):
    done = checkout.chain(mode)
    assert done.returncode == 2
    assert "lite_train_lite_infer, lite_train_whole_infer" in checkout.one_line(done.stderr)


@pytest.mark.parametrize(
    "arguments", [[], ["setup.cfg"], ["no.txt", "whole_infer"], ["a", "b", "c", "d"]]
)
def test_wrong_calls_are_one_line(checkout, arguments):
    done = checkout.run(checkout.DRIVER, *arguments)
    assert done.returncode == 2
    checkout.one_line(done.stderr)


def test_every_shipped_file_is_valid(checkout):
    files = sorted((checkout.root / "test_tipc/configs").rglob("*.txt"))
    files = [file for file in files if "=train_params=" in file.read_text()]
    assert len(files) == 13
    for file in files:
        done = checkout.run("test_tipc/prepare.sh", str(file), "lite_train_lite_infer")
        assert done.returncode == 0


# ---- prepare.sh


def test_prepare_makes_lite_data_once(checkout):
    shutil.rmtree(checkout.root / "lite_data")
    arguments = ("test_tipc/prepare.sh", checkout.CONFIG, "lite_train_lite_infer")
    for _ in range(2):
        assert checkout.run(*arguments).returncode == 0
    (call,) = checkout.calls()
    generator = ["-m", "datasets.synthetic_bottle", "--out", "lite_data/bottle", "--seed", "0"]
    assert call["argv"] == generator


@pytest.mark.parametrize("mode", ["lite_train_whole_infer", "whole_train_whole_infer"])
def test_prepare_names_the_folder_to_fill(checkout, mode):
    for script in ("test_tipc/prepare.sh", checkout.DRIVER):
        done = checkout.run(script, checkout.CONFIG, mode)
        assert done.returncode == 2
        assert "data/bottle/train/good" in checkout.one_line(done.stderr)


def test_prepare_sees_through_links_and_half_sets(checkout):
    (checkout.root / "data/bottle").mkdir(parents=True)
    for part in ("train", "test"):
        (checkout.root / "data/bottle" / part).mkdir()
        link = checkout.root / "data/bottle" / part / "good"
        link.symlink_to(checkout.root / "lite_data/bottle" / part / "good")
    arguments = ("test_tipc/prepare.sh", checkout.CONFIG, "lite_train_whole_infer")
    assert checkout.run(*arguments).returncode == 0
    shutil.rmtree(checkout.root / "data/bottle/test")
    done = checkout.run(*arguments)
    assert done.returncode == 2
    assert "data/bottle/test" in checkout.one_line(done.stderr)


def test_prepare_wants_the_picture(checkout):
    (checkout.root / "images/bottle_good.png").unlink()
    done = checkout.run("test_tipc/prepare.sh", checkout.CONFIG, "lite_train_lite_infer")
    assert done.returncode == 2
    assert "line 31" in checkout.one_line(done.stderr)
