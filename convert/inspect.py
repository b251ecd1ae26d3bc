"""Show what a file of weights holds, and guess what it is; nothing in it is executed."""

import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils import cli
from utils.errors import UserError
from utils.safe_arrays import shown
from utils.safe_pickle import NAME_TABLE
from utils.weight_file import WeightFile, read_weight_file


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.prog = "python -m convert inspect"
    parser.add_argument("input", help=".pth, .pt, .ckpt, .bin, .pdparams, .safetensors or .npz")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None) -> int:
    """Describe one file."""
    path = Path(parse(argv).input)
    file = read_weight_file(path)
    try:
        for line in describe(file):
            print(line)
        print(f"looks like: {guess(file)}", flush=True)
    except BrokenPipeError:  # a pager or `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def describe(file: WeightFile) -> Iterator[str]:
    """Yield a line for the file, every entry, what was left out, and the sums."""
    yield f"{file.path}: {file.form}, {file.path.stat().st_size:,} bytes"
    yield from entries(file.content)
    arrays = list(all_arrays(file.content))
    size = sum(array.nbytes for array in arrays)
    yield f"{len(arrays)} arrays, {sum(array.size for array in arrays):,} values, {size:,} bytes"
    for name in file.skipped:
        yield f"left out: {name}"


def entries(content: Any, place: str = "") -> Iterator[str]:
    """Yield `name  what it is` for everything in nested dicts, lists and tuples."""
    if isinstance(content, np.ndarray):
        yield f"  {place}  {content.dtype} {list(content.shape)}"
    elif isinstance(content, dict | list | tuple):
        if place:
            yield f"  {place}  {type(content).__name__} of {len(content)}"
        for key, value in items(content):
            yield from entries(value, f"{place}.{key}" if place else key)
    else:
        yield f"  {place}  {type(content).__name__} {shown(repr(content))}"


def items(content: Any) -> list[tuple[str, Any]]:
    """Return the entries of a dict, list or tuple, with names fit for a line."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    return [(shown(key, limit=200), value) for key, value in pairs if key != NAME_TABLE]


def all_arrays(content: Any) -> Iterator[np.ndarray]:
    """Yield all arrays in nested dicts, lists and tuples."""
    if isinstance(content, np.ndarray):
        yield content
    elif isinstance(content, dict | list | tuple):
        for _, value in items(content):
            yield from all_arrays(value)


def guess(file: WeightFile) -> str:
    """Say whose weights these are, and which command takes them."""
    from models.backbones.weights import state_dict

    from . import backbone, sources

    try:
        found = sources.identify(file.content).source.title
    except UserError:
        pass
    else:
        return f"a checkpoint of {found}: python -m convert detector"
    try:
        names = backbone.fitting(state_dict(file))
    except UserError:
        names = []
    if not names:
        return "nothing known here"
    return f"weights of backbone {' or '.join(names)}: python -m convert backbone"
