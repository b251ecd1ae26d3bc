"""Compare inference results with stored ones and fail where they differ or nothing was compared.

Both files hold lines `name<TAB>{"score":..,"map_mean":..,"map_max":..}`; other lines are skipped.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PRECISIONS = ("fp32", "fp16", "int8")
Results = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Difference:
    """The largest difference of one key: where, how large, and the share of the bound it takes."""

    key: str
    name: str
    error: float
    share: float


def precision_of(path: Path) -> str:
    """Return the precision that the file name carries; ValueError where it carries none."""
    found = [precision for precision in PRECISIONS if precision in path.name]
    if len(found) != 1:
        raise ValueError(f"{path}: the name must contain one of {', '.join(PRECISIONS)}")
    return found[0]


def read_results(path: Path) -> Results:
    """Read the result lines of one file; ValueError on NaN, infinity, duplicates or no line."""
    results: Results = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, tab, text = line.partition("\t")
        if not tab or not text.lstrip().startswith("{"):
            continue
        if name in results:
            raise ValueError(f"{path}: '{name}' stands there twice")
        results[name] = _values(path, name, text)
    if not results:
        raise ValueError(f"{path}: no line of the form name<TAB>{{...}}")
    return results


def _values(path: Path, name: str, text: str) -> dict[str, float]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: '{name}': {error}") from None
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{path}: {key} of '{name}' is {value!r}, not a number")
        if not math.isfinite(value):
            raise ValueError(f"{path}: {key} of '{name}' is {value}")
    if not values:
        raise ValueError(f"{path}: '{name}' has no values")
    return {key: float(value) for key, value in values.items()}


def worst_differences(
    expected: Results, actual: Results, atol: float, rtol: float
) -> list[Difference]:
    """Return the worst difference of each key; a share above 1 breaks |a - e| <= atol + rtol |e|.

    Raise ValueError where an expected name or key is missing: silence would look like agreement.
    """
    worst: dict[str, Difference] = {}
    for name, values in expected.items():
        if name not in actual:
            raise ValueError(f"'{name}' has no result")
        if actual[name].keys() != values.keys():
            raise ValueError(f"'{name}' has keys {sorted(actual[name])}, not {sorted(values)}")
        for key, value in values.items():
            error = abs(actual[name][key] - value)
            bound = atol + rtol * abs(value)
            share = error / bound if bound else (math.inf if error else 0.0)
            if key not in worst or share > worst[key].share:
                worst[key] = Difference(key, name, error, share)
    return list(worst.values())


def compare_files(
    golden: Iterable[Path], logs: Iterable[Path], atol: float, rtol: float
) -> dict[Path, list[Difference]]:
    """Compare each log with the golden results of its precision; return the worst per log and key.

    A log that is itself one of the golden files is left out. Raise ValueError where nothing is
    left to compare or a file cannot be used.
    """
    golden = list(golden)
    expected: dict[str, Results] = {}
    for path in golden:
        group = expected.setdefault(precision_of(path), {})
        results = read_results(path)
        if twice := sorted(group.keys() & results.keys()):
            raise ValueError(f"{path}: '{twice[0]}' stands in another golden file too")
        group.update(results)
    report = {}
    for log in logs:
        if any(log.samefile(path) for path in golden):
            continue
        precision = precision_of(log)
        if precision not in expected:
            raise ValueError(f"{log}: no golden file for {precision}")
        try:
            report[log] = worst_differences(expected[precision], read_results(log), atol, rtol)
        except ValueError as error:
            raise ValueError(f"{log}: {error}") from None
    if not report:
        raise ValueError("nothing was compared: no log besides the golden files")
    return report


def matching_files(pattern: str) -> list[Path]:
    """Return the files that a glob pattern matches, sorted; ValueError where there is none."""
    path = Path(pattern)
    anchor = Path(path.anchor)
    files = sorted(file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file())
    if not files:
        raise ValueError(f"no file matches '{pattern}'")
    return files


def _print_report(report: dict[Path, list[Difference]]) -> bool:
    agreed = True
    for log, differences in report.items():
        for worst in differences:
            verdict = "ok" if worst.share <= 1 else "DIFFERS"
            agreed &= worst.share <= 1
            print(
                f"{verdict:7} {log}  {worst.key}: largest error {worst.error:.3g}, "
                f"{worst.share:.2g} of the bound, at {worst.name}"
            )
    return agreed


def main() -> int:
    """Return 0 where all results agree, 1 where one differs, 2 where a file cannot be compared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gt_file", required=True, help="golden files, a quoted glob pattern")
    parser.add_argument("--log_file", required=True, help="files to check, a quoted glob pattern")
    parser.add_argument("--atol", type=float, default=1e-4)
    parser.add_argument("--rtol", type=float, default=1e-3)
    args = parser.parse_args()
    try:
        golden, logs = matching_files(args.gt_file), matching_files(args.log_file)
        report = compare_files(golden, logs, args.atol, args.rtol)
    except (OSError, ValueError) as error:
        print(f"compare_results: {error}", file=sys.stderr)
        return 2
    return 0 if _print_report(report) else 1


if __name__ == "__main__":
    sys.exit(main())
