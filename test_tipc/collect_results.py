"""Turn the results.jsonl of deploy/infer.py into the lines that compare_results.py reads."""

import argparse
import json
import math
import sys
from pathlib import Path

KEYS = ("score", "map_mean", "map_max")


def result_lines(text: str) -> list[str]:
    """Return one `name<TAB>{"score":..,"map_mean":..,"map_max":..}` line per line of JSON.

    The name is the image's path, relative to the working folder where it lies in it.
    Raise ValueError on no line at all, a missing key and a value that is no finite number.
    """
    records = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not records:
        raise ValueError("no image in it")
    return [_line(record) for record in records]


def _line(record: dict[str, object]) -> str:
    name = _name(str(record.get("path", "")))
    values = {key: record.get(key) for key in KEYS}
    for key, value in values.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key} of '{name}' is {value}, not a finite number")
    return f"{name}\t{json.dumps(values)}"


def _name(path: str) -> str:
    if not path:
        raise ValueError("a line has no path")
    here = Path.cwd()
    full = here / path
    return (full.relative_to(here) if full.is_relative_to(here) else full).as_posix()


def main() -> None:
    """Read SOURCE, write TARGET; one line and exit code 1 where that is impossible."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="results.jsonl of deploy/infer.py")
    parser.add_argument("target", type=Path, help="text file to write; name it …_fp32.txt")
    args = parser.parse_args()
    try:
        lines = result_lines(args.source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"{args.source}: {error}")
    args.target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} images -> {args.target}")


if __name__ == "__main__":
    main()
