"""The TIPC chain against a fake project: layout, status lines, skips, failures."""

import re

import pytest

TWO_CARDS = {"FAKE_GPUS": "2"}


# ---- the whole chain


def test_a_cpu_machine_passes_with_the_documented_layout(checkout):
    done = checkout.chain()
    assert done.returncode == 0, done.stdout + done.stderr
    names = sorted(p.name for p in checkout.output().iterdir())
    assert names == [
        "norm_train_gpus_-1",
        "norm_train_gpus_-1.log",
        "norm_train_gpus_-1_eval.log",
        "norm_train_gpus_-1_export.log",
        "python_infer_cpu_batchsize_1",
        "python_infer_cpu_batchsize_1.log",
        "python_infer_cpu_batchsize_1_collect.log",
        "python_infer_cpu_batchsize_1_fp32.txt",
        "results_python.log",
    ]
    assert (checkout.output() / "norm_train_gpus_-1/inference.json").is_file()
    passed = checkout.passed()
    for line, script in zip(
        passed,
        ["train.py", "eval.py", "deploy/export_model.py", "deploy/infer.py", "collect_results.py"],
        strict=True,
    ):
        assert script in line
        assert line.endswith(".log ")
    assert not checkout.failed()
    assert "\033" not in "".join(checkout.status())
    assert re.search(r"5 passed, 0 failed, 2 skipped - total wall time \d+ min \d+ s", done.stdout)


def test_gpu_entries_are_skipped_with_the_reason(checkout):
    done = checkout.chain()
    skipped = checkout.skipped()
    assert len(skipped) == 2
    assert "norm_train on gpu_list entry 0" in skipped[0]
    assert "inference on gpu, batch size 1" in skipped[1]
    assert all("no CUDA" in line for line in skipped)
    assert "training on the CPU" in done.stdout
    assert all("--use_gpu=True" not in call["argv"] for call in checkout.calls())


def test_all_stages_get_the_same_run_and_data(checkout):
    checkout.chain()
    config = ["-cfg", "configs/fastflow_efficientnet_lite0.yaml", "-cat", "bottle"]
    folder = "./test_tipc/output/fastflow/lite_train_lite_infer"
    assert checkout.call("train.py") == [
        *["train.py", *config, "--overwrite", "--device=cpu", "--exp_dir=lite_train_lite_infer"],
        *["--epochs=3", "--batch_size=8", "--data=lite_data"],
    ]
    assert checkout.call("eval.py") == [
        *["eval.py", *config, "--device=cpu", "--data=lite_data"],
        "--exp_dir=lite_train_lite_infer",
    ]
    assert checkout.call("deploy/export_model.py") == [
        *["deploy/export_model.py", *config, "--exp_dir=lite_train_lite_infer"],
        f"--save_inference_dir={folder}/norm_train_gpus_-1",
    ]
    assert checkout.call("deploy/infer.py") == [
        *["deploy/infer.py", "--use_gpu=False", "--batch_size=1"],
        f"--save_inference_dir={folder}/norm_train_gpus_-1",
        *["--image_path=images/bottle_good.png", "--benchmark=True"],
        f"--output={folder}/python_infer_cpu_batchsize_1",
    ]


@pytest.mark.parametrize(
    ("mode", "epochs"),
    [("lite_train_whole_infer", 3), ("whole_train_whole_infer", 500)],
)
def test_whole_modes_train_on_data(checkout, mode, epochs):
    (checkout.root / "lite_data").rename(checkout.root / "data")
    assert checkout.chain(mode).returncode == 0
    arguments = checkout.call("train.py")
    wanted = {f"--epochs={epochs}", "--batch_size=8", "--data=data", f"--exp_dir={mode}"}
    assert wanted <= set(arguments)


def test_a_gpu_machine_trains_and_infers_on_the_gpu(checkout):
    done = checkout.chain(FAKE_GPUS="1")
    assert done.returncode == 0
    assert not checkout.skipped()
    assert "--device=gpu" in checkout.call("train.py")
    assert {call["gpu"] for call in checkout.calls()} == {"0"}
    assert (checkout.output() / "norm_train_gpus_0/inference.json").is_file()
    assert (checkout.output() / "python_infer_gpu_batchsize_1_fp32.txt").is_file()
    assert (checkout.output() / "python_infer_cpu_batchsize_1_fp32.txt").is_file()


def test_the_same_folder_serves_a_second_run(checkout):
    checkout.chain(FAKE_FAIL="eval.py")
    done = checkout.chain()
    assert done.returncode == 0
    assert not checkout.failed()


# ---- gpu_list


@pytest.mark.parametrize(
    ("entry", "name", "launch"),
    [
        ("1", "norm_train_gpus_1", []),
        ("0,1", "norm_train_gpus_0,1", ["-m", "paddle.distributed.launch", "--gpus=0,1"]),
        (
            "10.0.0.1,10.0.0.2;0,1",
            "norm_train_gpus_0,1_nodes_2",
            ["-m", "paddle.distributed.launch", "--gpus=0,1"],
        ),
    ],
)
def test_gpu_list_entries(checkout, entry, name, launch):
    config = checkout.edit((4, f"gpu_list:{entry}"))
    done = checkout.chain(config=config, **TWO_CARDS)
    assert done.returncode == 0, done.stdout
    assert (checkout.output() / name / "inference.json").is_file()
    train = checkout.call("train.py")
    assert train[: len(launch)] == launch
    assert ("--ips=10.0.0.1,10.0.0.2" in train) == (";" in entry)
    by_script = {c["argv"][0]: c["gpu"] for c in checkout.calls()}
    first_card = entry.rpartition(";")[2].split(",")[0]
    assert by_script["eval.py"] == first_card
    # the launcher hands out the cards itself
    assert by_script[train[0]] == (None if launch else first_card)


def test_several_processes_on_the_cpu(checkout):
    done = checkout.chain(
        config=checkout.edit((4, "gpu_list:0,1|-1,-1,-1"), (28, "--use_gpu:False"))
    )
    assert done.returncode == 0, done.stdout
    assert "norm_train on gpu_list entry 0,1" in checkout.skipped()[0]
    train = checkout.call("train.py")
    launched = ["-m", "paddle.distributed.launch", "--nproc_per_node=3", "--backend=gloo"]
    assert train[:4] == launched
    assert "--device=cpu" in train
    assert (checkout.output() / "norm_train_gpus_-1,-1,-1.log").is_file()
    assert [c["gpu"] for c in checkout.calls()] == [None] * len(checkout.calls())


def test_each_alternative_is_a_chain_with_logs_of_its_own(checkout):
    config = checkout.edit((4, "gpu_list:-1|1"), (28, "--use_gpu:False"))
    assert checkout.chain(config=config, **TWO_CARDS).returncode == 0
    for name in ("norm_train_gpus_-1.log", "norm_train_gpus_1.log"):
        assert (checkout.output() / name).is_file()
    logs = sorted(p.name for p in checkout.output().glob("python_infer_*_fp32.txt"))
    assert logs == [
        "python_infer_cpu_batchsize_1_fp32.txt",
        "python_infer_cpu_batchsize_1_norm_train_gpus_1_fp32.txt",
    ]
    devices = [w for c in checkout.calls() for w in c["argv"] if w.startswith("--device")]
    assert devices == ["--device=cpu"] * 2 + ["--device=gpu"] * 2


def test_a_card_that_is_not_there_is_skipped(checkout):
    checkout.chain(config=checkout.edit((4, "gpu_list:10|0")), **TWO_CARDS)
    (skipped,) = checkout.skipped()
    assert "no card 10: Paddle sees 2" in skipped


def test_another_device_key_is_read_and_not_used(checkout):
    assert checkout.chain(config=checkout.edit((5, "--cuda:True"))).returncode == 0
    assert not any("cuda" in word for word in checkout.call("train.py"))


# ---- failures


@pytest.mark.parametrize(
    ("script", "ran"),
    [("train.py", 1), ("eval.py", 5), ("deploy/export_model.py", 3), ("deploy/infer.py", 4)],
)
@pytest.mark.parametrize("how", ["FAKE_FAIL", "FAKE_SILENT"])
def test_a_broken_stage_fails_the_run(checkout, script, ran, how):
    done = checkout.chain(**{how: script})
    assert done.returncode == 1
    (failed,) = checkout.failed()
    assert script in failed
    assert len(checkout.passed()) == ran - 1
    assert "total wall time" in done.stdout


def test_stages_after_a_failure_are_named(checkout):
    checkout.chain(FAKE_FAIL="train.py")
    assert any("eval, export and inference" in s for s in checkout.skipped())


def test_a_model_of_an_earlier_run_does_not_pass(checkout):
    checkout.chain()
    assert checkout.chain(FAKE_FAIL="deploy/export_model.py").returncode == 1
    assert not (checkout.output() / "norm_train_gpus_-1/inference.json").exists()


def test_a_score_that_is_no_number_fails(checkout):
    assert checkout.chain(FAKE_NAN="1").returncode == 1
    (failed,) = checkout.failed()
    assert "collect_results.py" in failed


def test_only_skipped_inference_is_no_pass(checkout):
    done = checkout.chain(config=checkout.edit((28, "--use_gpu:True")))
    assert done.returncode == 3
    assert not checkout.failed()


def test_amp_is_skipped_without_a_gpu(checkout):
    config = checkout.CONFIG.replace("train_infer", "train_amp_infer")
    done = checkout.chain(config=config)
    assert done.returncode == 3
    assert "Run SKIPPED - fastflow_amp - amp_train on gpu_list entry 0" in done.stdout
    assert not checkout.calls()


def test_amp_runs_on_a_gpu(checkout):
    config = checkout.CONFIG.replace("train_infer", "train_amp_infer")
    assert checkout.chain(config=config, FAKE_GPUS="1").returncode == 0
    arguments = checkout.call("train.py")
    assert arguments[arguments.index("-o") + 1] == "train.amp=true"
    assert (checkout.output(model="fastflow_amp") / "amp_train_gpus_0/inference.json").is_file()


def test_null_stages_are_reported(checkout):
    config = checkout.edit((17, "eval:null"), (22, "norm_export:null"))
    assert checkout.chain(config=config).returncode == 0
    reasons = [line for line in checkout.skipped() if "is null" in line]
    assert len(reasons) == 2


# ---- whole_infer


def trained(checkout):
    (checkout.root / "results/lite_train_lite_infer/bottle/best").mkdir(parents=True)


def test_whole_infer_exports_and_infers(checkout):
    trained(checkout)
    done = checkout.chain("whole_infer")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--exp_dir=results/lite_train_lite_infer" in checkout.call("deploy/export_model.py")
    names = {p.name for p in checkout.output("whole_infer").iterdir()}
    assert {"whole_infer_export.log", "python_infer_cpu_batchsize_1.log", "inference"} <= names
    assert not any("train.py" in call["argv"] for call in checkout.calls())


def test_whole_infer_takes_a_gpu(checkout):
    trained(checkout)
    done = checkout.run(checkout.DRIVER, checkout.CONFIG, "whole_infer", "1", **TWO_CARDS)
    assert done.returncode == 0
    assert {call["gpu"] for call in checkout.calls()} == {"1"}


def test_whole_infer_uses_an_exported_model(checkout):
    model = checkout.root / "ready made"
    model.mkdir()
    (model / "inference.json").write_text("{}")
    config = checkout.edit((20, "--save_inference_dir:ready made"), (25, "infer_export:null"))
    assert checkout.chain("whole_infer", config).returncode == 0
    assert "--save_inference_dir=ready made" in checkout.call("deploy/infer.py")


def test_whole_infer_without_a_model_says_so(checkout):
    done = checkout.chain("whole_infer")
    assert done.returncode == 2
    assert "line 24" in checkout.one_line(done.stderr)


@pytest.mark.parametrize(("mode", "gpu"), [("lite_train_lite_infer", "0"), ("whole_infer", "x")])
def test_the_third_argument_is_checked(checkout, mode, gpu):
    done = checkout.run(checkout.DRIVER, checkout.CONFIG, mode, gpu)
    assert done.returncode == 2
    checkout.one_line(done.stderr)
