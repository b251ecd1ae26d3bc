"""The command line: flags shared by the scripts, one-line errors, exit code 2."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import NoReturn

from metrics.drift import WINDOW
from utils.config import known_keys, parse_bool
from utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one line and the nearest flag."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def parse_args(self, args=None, namespace=None):
        """Parse; an unknown flag is an error that names the nearest one."""
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown argument '{unknown[0]}'{self._nearest(unknown[0])}")
        return known

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")

    def _nearest(self, flag: str) -> str:
        flags = [option for action in self._actions for option in action.option_strings]
        name = flag.partition("=")[0]
        tail = "." + name.lstrip("-").replace("-", "_")
        near = [f"-o {key}=…" for key in known_keys() if key.endswith(tail) and "-o" in flags]
        near += difflib.get_close_matches(name, flags, n=1, cutoff=0.6)
        return f" (did you mean '{near[0]}'?)" if near else ""


def flag(text: str) -> bool:
    """Read a boolean flag's value."""
    try:
        return parse_bool(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_flag(parser: argparse.ArgumentParser, name: str, help_text: str) -> None:
    """Add a boolean that may stand alone (true) or take true/false/1/0/yes/no."""
    parser.add_argument(name, nargs="?", const=True, default=False, type=flag, help=help_text)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the choice of a run's checkpoint; `args.checkpoint` is its name."""
    parser.add_argument(
        "--checkpoint", default="best", help="best, last, or best_<metric> of train.best_by"
    )
    parser.add_argument(
        "--is_last", nargs="?", const="true", dest="checkpoint", type=_last,
        default=argparse.SUPPRESS, help="the same as --checkpoint last",
    )  # fmt: skip


def add_high_precision(parser: argparse.ArgumentParser) -> None:
    """Add U-Flow's flag for the block form of its a-contrario test; None if it is not given."""
    parser.add_argument(
        "-hp", "--high-precision", nargs="?", const=True, type=flag,
        help="nfa.method block: do not round counts down",
    )  # fmt: skip


def add_drift_window(parser: argparse.ArgumentParser) -> None:
    """Add how many images the drift alarm looks at."""
    parser.add_argument(
        "--drift_window", type=positive, default=WINDOW,
        help=f"latest images that are compared with the normal ones of the training: {WINDOW}",
    )  # fmt: skip


def _last(text: str) -> str:
    return "last" if flag(text) else "best"


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def run(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run a script's main and exit; a user's mistake is one line on stderr and code 2.

    So is a file or folder that cannot be read or written.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a file's name must not break a narrow console
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main(None))
    except UserError as error:
        sys.exit(_fail(str(error), 2))
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(_fail(f"{error.filename}: {error.strerror}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("stopped by the user", 130))


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
