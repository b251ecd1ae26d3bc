"""What `inspect` tells about a file."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from convert.inspect import main
from models.backbones import BACKBONES
from tests.golden import seeded_weights as seeded
from utils.errors import UserError
from utils.torch_file import write_torch


def lines(path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert main([str(path)]) == 0
    return capsys.readouterr().out.splitlines()


def test_nested_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.ckpt"
    arrays = {"w": np.zeros((2, 3), np.float32), "n": np.array(5)}
    write_torch(path, arrays, {"epoch": 7, "sizes": [[4, "x"], None]})
    assert lines(path, capsys) == [
        f"{path}: torch, {path.stat().st_size:,} bytes",
        "  state_dict  dict of 2",
        "  state_dict.w  float32 [2, 3]",
        "  state_dict.n  int64 []",
        "  epoch  int 7",
        "  sizes  list of 2",
        "  sizes.0  list of 2",
        "  sizes.0.0  int 4",
        "  sizes.0.1  str 'x'",
        "  sizes.1  NoneType None",
        "2 arrays, 7 values, 32 bytes",
        "looks like: nothing known here",
    ]


def test_names_that_would_break_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_torch(tmp_path / "a.pt", {"a\nb\x1b[2J": np.zeros(1)}, {"t": "long " * 100})
    found = lines(tmp_path / "a.pt", capsys)
    assert len(found) == 6
    assert all(line.isprintable() and len(line) < 200 for line in found[1:])


def test_guess_of_a_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = BACKBONES["mobilenet_v2"]([32]).state_dict()
    arrays = {key: seeded.draw(key, tensor.shape) for key, tensor in state.items()}
    paddle.save({k: paddle.to_tensor(a) for k, a in arrays.items()}, str(tmp_path / "a.pdparams"))
    found = lines(tmp_path / "a.pdparams", capsys)
    assert len(found) == 1 + len(arrays) + 2  # Paddle's table of names is not shown
    assert found[-1] == "looks like: weights of backbone mobilenet_v2: python -m convert backbone"


def test_guess_of_a_detector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {"decoders.0.module_list.0.subnet.0.weight": np.zeros((8, 4), np.float32)}
    write_torch(tmp_path / "a.pt", arrays)
    assert lines(tmp_path / "a.pt", capsys)[-1] == (
        "looks like: a checkpoint of official CFLOW-AD: python -m convert detector"
    )


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.pth: no such file"):
        main([str(tmp_path / "a.pth")])


def test_the_command_line(tmp_path: Path, repo: Path) -> None:
    """Also stop without a word where the reader of the output does."""
    write_torch(tmp_path / "a.pt", {f"name{i}": np.zeros(1) for i in range(20_000)})

    def run(*arguments: object, **options) -> subprocess.Popen:
        command = [sys.executable, "-m", "convert", *map(str, arguments)]
        return subprocess.Popen(command, cwd=repo, stderr=subprocess.PIPE, text=True, **options)

    child = run("inspect", tmp_path / "a.pt", stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline().startswith(f"{tmp_path / 'a.pt'}: torch, ")
    child.stdout.close()
    assert child.stderr is not None
    assert (child.stderr.read(), child.wait()) == ("", 0)

    for arguments, message in (
        (["inspekt"], "python -m convert: error: argument command: invalid choice: 'inspekt'"),
        ([], "python -m convert: error: the following arguments are required: command"),
        (["inspect", "--fast", "x"], "python -m convert inspect: error: unknown argument '--fast'"),
        (["inspect", tmp_path], f"error: {tmp_path}: is a folder"),
    ):
        child = run(*arguments)
        assert child.stderr is not None
        error = child.stderr.read()
        assert child.wait() == 2
        assert error.startswith(message)
        assert error.count("\n") == 1
