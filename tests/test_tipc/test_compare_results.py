"""Comparing results: agreement, differences, and every way of comparing nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def write(path: Path, **results: dict) -> Path:
    lines = [f"{name}.png\t{json.dumps(values)}" for name, values in results.items()]
    path.write_text("a line of the log\n" + "\n".join(lines) + "\n")
    return path


def values(score: float = 0.5, map_mean: float = 0.1, map_max: float = 2000.0) -> dict:
    return {"score": score, "map_mean": map_mean, "map_max": map_max}


def compare(repo: Path, golden: Path, log: Path, *more: str) -> subprocess.CompletedProcess[str]:
    script = repo / "test_tipc/compare_results.py"
    return subprocess.run(
        [sys.executable, str(script), f"--gt_file={golden}", f"--log_file={log}", *more],
        capture_output=True,
        text=True,
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 2
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert words in line


def test_agreement_passes_with_the_worst_error_of_each_key(repo: Path, tmp_path: Path) -> None:
    golden = write(tmp_path / "gt_fp32.txt", a=values(), b=values())
    log = write(tmp_path / "log_fp32.txt", a=values(score=0.50005), b=values(map_max=2001.0))
    done = compare(repo, golden, log)
    assert done.returncode == 0, done.stdout
    assert "score: largest error 5e-05" in done.stdout
    assert "at a.png" in done.stdout
    assert "map_max: largest error 1, 0.5 of the bound, at b.png" in done.stdout


@pytest.mark.parametrize(
    ("changed", "flags", "code"),
    [
        (values(score=0.501), (), 1),
        (values(score=0.501), ("--atol=1e-3",), 0),
        (values(map_max=2003.0), (), 1),
        (values(map_max=2003.0), ("--rtol=1e-2",), 0),
        (values(), ("--atol=0", "--rtol=0"), 0),
        (values(map_mean=0.1000001), ("--atol=0", "--rtol=0"), 1),
    ],
)
def test_differences_fail(
    repo: Path, tmp_path: Path, changed: dict, flags: tuple[str, ...], code: int
) -> None:
    golden = write(tmp_path / "gt_fp32.txt", a=values())
    done = compare(repo, golden, write(tmp_path / "log_fp32.txt", a=changed), *flags)
    assert done.returncode == code
    assert ("DIFFERS" in done.stdout) == bool(code)


def test_globs_take_each_file_to_its_precision(repo: Path, tmp_path: Path) -> None:
    for precision, score in (("fp32", 0.5), ("fp16", 0.6)):
        write(tmp_path / f"gt_{precision}.txt", a=values(score))
        for device in ("cpu", "gpu"):
            (tmp_path / device).mkdir(exist_ok=True)
            write(tmp_path / device / f"log_{precision}.txt", a=values(score))
    done = compare(repo, tmp_path / "gt_*.txt", tmp_path / "*/log_*.txt")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 4 * 3


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "true", '"0.5"', "null"])
@pytest.mark.parametrize("side", ["gt_fp32.txt", "log_fp32.txt"])
def test_no_number_is_refused(repo: Path, tmp_path: Path, bad: str, side: str) -> None:
    golden = write(tmp_path / "gt_fp32.txt", a=values())
    log = write(tmp_path / "log_fp32.txt", a=values())
    (tmp_path / side).write_text(f'a.png\t{{"score": {bad}, "map_mean": 0.1, "map_max": 1}}\n')
    refused(compare(repo, golden, log), "score of 'a.png'")


def test_comparing_nothing_is_refused(repo: Path, tmp_path: Path) -> None:
    golden = write(tmp_path / "gt_fp32.txt", a=values())
    log = write(tmp_path / "log_fp32.txt", a=values())
    refused(compare(repo, tmp_path / "x*_fp32.txt", log), "no file matches")
    refused(compare(repo, golden, tmp_path / "x*_fp32.txt"), "no file matches")
    refused(compare(repo, golden, golden), "nothing was compared")
    refused(compare(repo, golden, write(tmp_path / "empty_fp32.txt")), "no line of the form")
    refused(compare(repo, golden, write(tmp_path / "other_fp32.txt", b=values())), "no result")


def test_precision_must_be_in_the_names(repo: Path, tmp_path: Path) -> None:
    golden = write(tmp_path / "gt_fp32.txt", a=values())
    plain = write(tmp_path / "log.txt", a=values())
    refused(compare(repo, golden, plain), "must contain one of fp32, fp16, int8")
    refused(compare(repo, plain, golden), "must contain one of fp32, fp16, int8")
    half = write(tmp_path / "log_fp16.txt", a=values())
    refused(compare(repo, golden, half), "no golden file for fp16")


def test_odd_lines_are_refused(repo: Path, tmp_path: Path) -> None:
    golden = write(tmp_path / "gt_fp32.txt", a=values())
    log = tmp_path / "log_fp32.txt"
    good = f"a.png\t{json.dumps(values())}\n"
    for text, words in [
        (good + good, "twice"),
        ('a.png\t{"score": 0.5\n', "a.png"),
        ('a.png\t{"score": 0.5}\n', "has keys"),
        ("a.png\t{}\n", "no values"),
    ]:
        log.write_text(text)
        refused(compare(repo, golden, log), words)


def collect(repo: Path, folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "results.jsonl").write_text(text)
    script = repo / "test_tipc/collect_results.py"
    return subprocess.run(
        [sys.executable, str(script), "results.jsonl", "out_fp32.txt"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_collected_results_can_be_compared(repo: Path, tmp_path: Path) -> None:
    here = {"path": str(tmp_path / "images/ä b.png"), "verdict": "Normal", **values()}
    there = {"path": "/elsewhere/a.png", **values(score=1)}
    done = collect(repo, tmp_path, f"{json.dumps(here)}\n{json.dumps(there)}\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 images -> out_fp32.txt\n"
    first, second = (tmp_path / "out_fp32.txt").read_text(encoding="utf-8").splitlines()
    assert first.split("\t") == ["images/ä b.png", json.dumps(values())]
    assert second.split("\t")[0] == "/elsewhere/a.png"
    copy = tmp_path / "copy_fp32.txt"
    copy.write_text((tmp_path / "out_fp32.txt").read_text())
    assert compare(repo, tmp_path / "out_fp32.txt", copy).returncode == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}\n",
        json.dumps({"path": "a.png", **values(score=float("nan"))}),
        json.dumps({"path": "a.png", "score": 1, "map_mean": 1}),
        "no json",
    ],
)
def test_bad_results_are_not_collected(repo: Path, tmp_path: Path, text: str) -> None:
    done = collect(repo, tmp_path, text)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out_fp32.txt").exists()
