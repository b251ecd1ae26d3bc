"""Stands for `python` in the chain's tests: records each call and leaves what the scripts leave."""

import json
import os
import shutil
import sys
from pathlib import Path


def record(arguments: list[str]) -> None:
    """Append the call to the file that FAKE_CALLS names."""
    call = {"argv": arguments, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
    with Path(os.environ["FAKE_CALLS"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(call) + "\n")


def options(arguments: list[str]) -> dict[str, str]:
    """Return the `--key=value` arguments."""
    return dict(word.split("=", 1) for word in arguments if word.startswith("--") and "=" in word)


def experiment(given: dict[str, str]) -> Path:
    """Return the folder that --exp_dir means."""
    name = given["--exp_dir"]
    return Path(name) if "/" in name else Path("results") / name


def train(given: dict[str, str]) -> None:
    """Leave the two checkpoint folders and print the log line of the TIPC contract."""
    for kind in ("last", "best"):
        (experiment(given) / "bottle" / kind).mkdir(parents=True, exist_ok=True)
    print(
        "loss: 1.5, avg_reader_cost: 0.1 sec, avg_batch_cost: 0.2 sec, avg_samples: 8, ips: 4 i/s"
    )


def evaluate(given: dict[str, str]) -> None:
    """Print the evaluation line; the run must have been trained."""
    assert (experiment(given) / "bottle/best").is_dir(), "not trained"
    print("EVAL:  image-auc : 0.987654 pixel-auc:0.912345")


def export(given: dict[str, str]) -> None:
    """Leave an exported model; the run must have been trained."""
    assert (experiment(given) / "bottle/best").is_dir(), "not trained"
    folder = Path(given["--save_inference_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("inference.json", "inference.yml"):
        (folder / name).write_text("{}")
    print(f"inference model has been saved into {folder}")


def infer(given: dict[str, str]) -> None:
    """Leave results.jsonl; the exported model must be there."""
    assert (Path(given["--save_inference_dir"]) / "inference.json").is_file(), "not exported"
    folder = Path(given["--output"])
    folder.mkdir(parents=True)
    line = {"path": given["--image_path"], "score": 0.614, "map_mean": 0.1, "map_max": 0.7}
    if os.environ.get("FAKE_NAN"):
        line["score"] = float("nan")
    (folder / "results.jsonl").write_text(json.dumps(line) + "\n")
    print("Normal - score:  0.614")


def quantize(given: dict[str, str]) -> None:
    """Leave a quantized model; the exported one must be there."""
    assert (Path(given["--save_inference_dir"]) / "inference.json").is_file(), "not exported"
    shutil.copytree(given["--save_inference_dir"], given["--output"], dirs_exist_ok=True)
    print(f"quantized model has been saved into {given['--output']}")


def synthesize(arguments: list[str]) -> None:
    """Leave a data set where --out says."""
    out = Path(arguments[arguments.index("--out") + 1])
    for part in ("train/good", "test/good", "test/hole", "ground_truth/hole"):
        (out / part).mkdir(parents=True)
        shutil.copy("images/bottle_good.png", out / part / "000.png")


SCRIPTS = {
    "train.py": train,
    "eval.py": evaluate,
    "deploy/export_model.py": export,
    "deploy/infer.py": infer,
    "deploy/quantize.py": quantize,
}


def main(arguments: list[str]) -> int:
    """Do what the named script would do; FAKE_FAIL names one that fails, FAKE_SILENT a mute one."""
    if arguments[:2] == ["-c", ""]:
        return 0
    if arguments[0] == "-c":
        print("a warning of paddle")
        print("gpus:", os.environ.get("FAKE_GPUS", "cpu-build"))
        return 0 if os.environ.get("FAKE_FAIL") != "import" else 1
    if arguments[0].startswith("test_tipc/"):
        os.execv(sys.executable, [sys.executable, *arguments])
    record(arguments)
    if arguments[:2] == ["-m", "datasets.synthetic_bottle"]:
        synthesize(arguments)
        return 0
    script = next(word for word in arguments if word in SCRIPTS)
    if os.environ.get("FAKE_FAIL") == script:
        print(f"error: {script} broke")
        return 1
    if os.environ.get("FAKE_SILENT") != script:
        SCRIPTS[script](options(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
