"""The command line: one line per mistake, exit codes, booleans."""

import errno
import subprocess
import sys

import pytest

from utils import cli
from utils.errors import UserError


def parser() -> cli.Parser:
    made = cli.Parser("Do something.")
    made.add_argument("--exp_dir", default="exp")
    made.add_argument("--epochs", type=cli.positive)
    made.add_argument("-o", action="append", default=[])
    cli.add_flag(made, "--use_gpu", "run on the GPU")
    return made


def refusal(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(args)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [("--exp-dir", "--exp_dir"), ("--use_gpus=1", "--use_gpu"), ("--epoch", "--epochs")],
)
def test_an_unknown_flag_names_the_nearest(capsys, flag, nearest):
    err = refusal(capsys, flag, "3")
    assert f"unknown argument '{flag}'" in err
    assert nearest in err.split("did you mean")[1]


def test_a_key_of_the_configuration_given_as_a_flag(capsys):
    assert "(did you mean '-o train.lr=" in refusal(capsys, "--lr", "3")


def test_flags_are_not_abbreviated(capsys):
    assert "unknown argument '--exp'" in refusal(capsys, "--exp", "x")


def test_stray_words_are_errors(capsys):
    assert "unknown argument 'b=2'" in refusal(capsys, "-o", "a=1", "b=2")


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", ""])
def test_positive_numbers(capsys, value):
    assert "is not a whole number of at least 1" in refusal(capsys, "--epochs", value)
    assert parser().parse_args(["--epochs", "7"]).epochs == 7


@pytest.mark.parametrize(
    ("given", "value"),
    [([], False), (["--use_gpu"], True), (["--use_gpu", "--epochs", "1"], True)]
    + [(["--use_gpu", text], True) for text in ("true", "True", "1", "yes")]
    + [(["--use_gpu", text], False) for text in ("false", "FALSE", "0", "no")],
)
def test_booleans_bare_and_with_a_value(given, value):
    assert parser().parse_args(given).use_gpu is value


def test_a_boolean_that_is_none(capsys):
    assert "'maybe' is not one of true, false, 1, 0, yes, no" in refusal(
        capsys, "--use_gpu", "maybe"
    )


def run(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    assert isinstance(caught.value.code, int)
    return caught.value.code, capsys.readouterr().err


def raising(error: BaseException):
    def main(argv):
        raise error

    return main


def test_exit_codes(capsys):
    assert run(lambda argv: 0, capsys) == (0, "")
    assert run(lambda argv: 1, capsys) == (1, "")
    assert run(raising(UserError("x is 3")), capsys) == (2, "error: x is 3\n")
    assert run(raising(KeyboardInterrupt()), capsys) == (130, "error: stopped by the user\n")
    denied = PermissionError(errno.EACCES, "Permission denied", "a/b")
    assert run(raising(denied), capsys) == (2, "error: a/b: Permission denied\n")


def test_mistakes_of_ours_keep_their_trace():
    with pytest.raises(ZeroDivisionError):
        cli.run(raising(ZeroDivisionError()))
    with pytest.raises(OSError, match="without a file"):
        cli.run(raising(OSError("without a file")))


def test_a_narrow_console_does_not_break_on_names(repo):
    code = "from utils import cli; cli.run(lambda argv: print('瓶 ×', end='') or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True,
        env={"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.stdout == "\\u74f6 \\xd7"
