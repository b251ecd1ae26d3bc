"""Convert or inspect files of weights: python -m convert {backbone,detector,inspect} --help."""

import importlib
import sys
from collections.abc import Sequence

from utils import cli, runtime

COMMANDS = {
    "backbone": "pretrained weights of a backbone -> a file with the names of this project",
    "detector": "a checkpoint of another project -> a run, and back",
    "inspect": "show what a file of weights holds",
}


def main(argv: Sequence[str] | None) -> int:
    """Run the command that the first argument names."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = cli.Parser(__doc__)
    parser.prog = "python -m convert"
    commands = "; ".join(f"{name}: {text}" for name, text in COMMANDS.items())
    parser.add_argument("command", choices=COMMANDS, help=commands)
    command = parser.parse_args(arguments[:1]).command
    runtime.prepare()
    return importlib.import_module(f"convert.{command}").main(arguments[1:])


if __name__ == "__main__":
    cli.run(main)
