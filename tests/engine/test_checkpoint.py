"""Checkpoints: what is written comes back, and damage is named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from engine import checkpoint
from models.detector import Detector
from tests import small_run
from tests.small_run import changed, shake, untrained_run
from utils.config import Config, override
from utils.errors import UserError


def tiny_config(*settings: str) -> Config:
    return small_run.tiny_config("train.schedule=constant", *settings)


def adam(detector: Detector) -> paddle.optimizer.Adam:
    trained = [p for p in detector.parameters() if not p.stop_gradient]
    return paddle.optimizer.Adam(1e-3, parameters=trained)


def step(detector: Detector, optimizer: paddle.optimizer.Adam, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(24, 16), (40, 8), (112, 4)]
    features = [
        paddle.to_tensor(rng.standard_normal((2, c, s, s)).astype(np.float32)) for c, s in shapes
    ]
    detector.objective(features)[0].backward()
    optimizer.step()
    optimizer.clear_grad(set_to_zero=False)


def head(detector: Detector) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in detector.head_state().items()}


def meta(**changes) -> dict:
    made = {
        "category": "bottle", "preset": "p", "progress": {"epoch": 3},
        "backbone": {"sha256": "ab", "source": "here", "origin": "bundled"},
        "data": {"train": 1, "holdout": 1, "digest": "cd"},
    }  # fmt: skip
    return {**made, **changes}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[Path, Detector]:
    """A run's `last` with the optimizer of two steps, and its detector."""
    folder = tmp_path_factory.mktemp("run") / "last"
    detector = untrained_run(folder.parent, tiny_config())
    optimizer = adam(detector)
    for seed in (0, 1):
        step(detector, optimizer, seed)
    checkpoint.save(folder, detector, tiny_config(), meta(), optimizer)
    return folder, detector


@pytest.fixture
def saved(original, tmp_path) -> tuple[Path, Detector]:
    folder = tmp_path / "run/last"
    shutil.copytree(original[0], folder)
    return folder, original[1]


def reopened(folder: Path) -> checkpoint.Checkpoint:
    found = checkpoint.read(folder)
    assert found is not None
    return found


def fresh(folder: Path) -> Detector:
    return untrained_run(folder / "another", tiny_config("train.seed=5"))


def refusal(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_head_comes_back_bit_for_bit(saved, tmp_path):
    folder, detector = saved
    other = fresh(tmp_path)
    found = reopened(folder)
    assert found.config == tiny_config()
    assert found.meta["progress"] == {"epoch": 3}
    found.load_head(other)
    for name, value in head(detector).items():
        np.testing.assert_array_equal(head(other)[name], value)


def test_the_backbone_is_not_in_the_head(saved):
    names = set(load_file(saved[0] / checkpoint.HEAD))
    assert names
    assert not [name for name in names if "backbone" in name]
    assert {name for name in names if name.endswith("permutation")}


def test_head_in_paddles_own_format(saved, tmp_path):
    folder, detector = saved
    other = fresh(tmp_path)
    (folder / checkpoint.HEAD).unlink()
    reopened(folder).load_head(other)
    for name, value in head(detector).items():
        np.testing.assert_array_equal(head(other)[name], value)
    (folder / checkpoint.PADDLE_HEAD).unlink()
    assert "neither head.safetensors nor head.pdparams" in refusal(
        reopened(folder).load_head, other
    )


def test_the_optimizer_goes_on_where_it_was(saved, tmp_path):
    other = fresh(tmp_path)
    found = reopened(saved[0])
    found.load_head(other)
    optimizer = adam(other)
    found.load_optimizer(other, optimizer)
    reference = untrained_run(tmp_path / "ref", tiny_config())
    found.load_head(reference)
    again = adam(reference)
    found.load_optimizer(reference, again)
    assert {p.name for p in other.parameters()}.isdisjoint(p.name for p in reference.parameters())
    cold = untrained_run(tmp_path / "cold", tiny_config())
    found.load_head(cold)
    step(other, optimizer, 2)
    step(reference, again, 2)
    step(cold, adam(cold), 2)
    for name, value in head(other).items():
        np.testing.assert_array_equal(head(reference)[name], value)
    moved = [np.abs(head(cold)[n] - v).max() for n, v in head(other).items() if v.dtype.kind == "f"]
    assert max(moved) > 1e-5  # a forgotten optimizer would not have passed


RESUMES = """
import sys
from pathlib import Path
from tests.engine.test_checkpoint import adam, head, step, tiny_config
from tests.small_run import untrained_run
from engine import checkpoint
import numpy as np
folder = Path(sys.argv[1])
for _ in range(int(sys.argv[2])):  # each one shifts Paddle's name counters
    detector = untrained_run(Path(sys.argv[3]) / "x", tiny_config())
found = checkpoint.read(folder)
found.load_head(detector)
optimizer = adam(detector)
found.load_optimizer(detector, optimizer)
names = [p.name for p in detector.parameters() if not p.stop_gradient]
step(detector, optimizer, 2)
np.savez(sys.argv[3] + "/out.npz", first_name=names[0], **head(detector))
"""


@pytest.mark.slow
def test_the_optimizer_survives_other_parameter_names(saved, tmp_path, repo):
    """Paddle names parameters by counters, which differ between processes."""
    results = []
    for count in ("1", "3"):
        out = tmp_path / count
        out.mkdir()
        code = [sys.executable, "-c", RESUMES, str(saved[0]), count, str(out)]
        subprocess.run(code, cwd=repo, check=True, capture_output=True)
        with np.load(out / "out.npz") as file:
            results.append(dict(file))
    assert results[0].pop("first_name") != results[1].pop("first_name")
    for name, value in results[0].items():
        np.testing.assert_array_equal(results[1][name], value)


def test_no_parameter_is_without_its_moments(saved):
    state = load_file(saved[0] / checkpoint.OPTIMIZER)
    trained = [n for n, p in saved[1].named_parameters() if not p.stop_gradient]
    for name in trained:
        kinds = {key.split("/")[1] for key in state if key.startswith(f"{name}/")}
        assert len([kind for kind in kinds if "moment" in kind]) == 2, name
        assert len([kind for kind in kinds if "pow" in kind]) == 2, name


@pytest.mark.parametrize("name", [checkpoint.HEAD, checkpoint.OPTIMIZER])
@pytest.mark.parametrize("length", [0, 5, 2000, -1])
def test_truncated_tensors(saved, name, length):
    folder, detector = saved
    path = folder / name
    data = path.read_bytes()
    with changed(path, data[:length]):
        found = reopened(folder)
        load = found.load_head if name == checkpoint.HEAD else found.load_optimizer
        rest = () if name == checkpoint.HEAD else (adam(detector),)
        message = refusal(load, detector, *rest)
    assert message.startswith(f"{path}: cannot be read (")
    assert message.endswith("the checkpoint is damaged")


def test_a_missing_optimizer(saved):
    folder, detector = saved
    (folder / checkpoint.OPTIMIZER).unlink()
    message = refusal(reopened(folder).load_optimizer, detector, adam(detector))
    assert checkpoint.OPTIMIZER in message


def test_an_optimizer_of_another_configuration(saved, tmp_path):
    folder, detector = saved
    state = load_file(folder / checkpoint.OPTIMIZER)
    renamed = {key.replace("levels.0.", "levels.9."): value for key, value in state.items()}
    save_file(renamed, folder / checkpoint.OPTIMIZER)
    message = refusal(reopened(folder).load_optimizer, detector, adam(detector))
    assert "belongs to another configuration" in message


@pytest.mark.parametrize("setting", ["model.steps=1", "model.steps=3", "model.hidden_ratio=0.5"])
def test_a_head_of_another_configuration(saved, tmp_path, setting):
    other = untrained_run(tmp_path / "other", tiny_config(setting))
    message = refusal(reopened(saved[0]).load_head, other)
    assert checkpoint.HEAD in message
    assert "another configuration" in message or "unknown entry" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a JSON file; the checkpoint is damaged"),
        ("", "not a JSON file"),
        ("\xff", "not a JSON file"),
        ("[]", "checkpoint format None; this version reads 1"),
        ('{"format": 99}', "checkpoint format 99; this version reads 1"),
        ('{"format": 1}', "'config' is missing; the checkpoint is damaged"),
    ],
)
def test_damaged_meta_data(saved, text, words):
    path = saved[0] / checkpoint.META
    with changed(path, text.encode("latin-1")):
        message = refusal(checkpoint.read, saved[0])
    assert message.startswith(str(path))
    assert words in message


def test_a_configuration_of_another_version_is_named(saved):
    path = saved[0] / checkpoint.META
    document = json.loads(path.read_text(encoding="utf-8"))
    document["config"]["model"]["stepps"] = 3
    with changed(path, json.dumps(document).encode()):
        message = refusal(checkpoint.read, saved[0])
    assert f"{path}: unknown key 'model.stepps' (did you mean 'model.steps'?)" in message


def test_nothing_there(tmp_path):
    assert checkpoint.read(tmp_path / "run/last") is None


def test_a_missing_run_names_others(saved, tmp_path):
    run = saved[0].parent
    shutil.copytree(run, tmp_path / "results/exp_8_0/bottle")
    message = refusal(checkpoint.open_run, tmp_path / "results/exp/bottle", "last")
    assert "no 'last' checkpoint here" in message
    assert "results/exp_8_0/bottle" in message


def test_a_crash_between_the_renames_is_undone(saved):
    folder = saved[0]
    folder.rename(folder.with_name("last.old"))
    assert reopened(folder).meta["progress"] == {"epoch": 3}
    assert not folder.with_name("last.old").exists()


def test_a_failed_save_keeps_the_older_one(saved, monkeypatch):
    folder, detector = saved

    def full(*args, **keywords):
        raise OSError(28, "No space left on device", "head")

    monkeypatch.setattr(checkpoint, "_write_meta", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(folder, detector, tiny_config(), meta(progress={"epoch": 4}))
    assert reopened(folder).meta["progress"] == {"epoch": 3}
    assert [path.name for path in folder.parent.iterdir()] == ["last"]


def test_meta_data_can_be_added(saved):
    checkpoint.update_meta(reopened(saved[0]), calibration={"x": np.float32(0.5)})
    found = reopened(saved[0])
    assert found.meta["calibration"] == {"x": 0.5}
    assert found.meta["progress"] == {"epoch": 3}
    assert found.config == tiny_config()


@pytest.mark.parametrize(
    "setting",
    ["train.lr=0.5", "train.seed=1", "train.batch_size=2", "model.steps=3", "data.holdout=0.5",
     "model.input_size=96", "train.schedule=cosine", "data.resize=cv2"],
)  # fmt: skip
def test_a_resumed_run_keeps_its_settings(saved, setting):
    key, _, value = setting.partition("=")
    message = refusal(
        checkpoint.check_same_run, reopened(saved[0]), override(tiny_config(), [setting])
    )
    assert f"the run has {key} = " in message
    assert f"not {value}" in message or value in message


def test_a_resumed_run_may_move_and_last_longer(saved):
    settings = [
        "train.epochs=9", "train.patience=3", "data.root=x", "data.workers=9", "data.cache=false",
        "data.cache_dir=x", "train.log_every=1", "eval.size=256", "model.weights=moved.npz",
        "eval.image_threshold=percentile:95", "export.dir=x",
    ]  # fmt: skip
    for setting in settings:
        changed_config = override(tiny_config(), [setting])
        assert changed_config != tiny_config()
        checkpoint.check_same_run(reopened(saved[0]), changed_config)


def test_the_length_of_a_schedule_is_fixed(saved):
    """A cosine over more epochs would have had other rates from the start."""
    folder, detector = saved
    config = tiny_config("train.schedule=cosine")
    checkpoint.save(folder, detector, config, meta())
    longer = override(config, ["train.epochs=99"])
    assert "the run has train.epochs = " in refusal(
        checkpoint.check_same_run, reopened(folder), longer
    )


def test_other_images_or_weights_are_not_the_same_run(saved):
    found = reopened(saved[0])
    checkpoint.check_same_data(found, meta())
    message = refusal(checkpoint.check_same_data, found, meta(data={"digest": "xx"}))
    assert "training images changed since" in message
    other = {"sha256": "xx", "source": "there"}
    message = refusal(checkpoint.check_same_data, found, meta(backbone=other))
    assert "backbone weights changed since (here became there)" in message


def test_who_may_write_into_a_folder(saved, tmp_path):
    run, config = saved[0].parent, tiny_config()
    new = tmp_path / "new"
    for resume in (False, True):
        assert not checkpoint.goes_on(new, config, resume=resume, overwrite=False)
    assert checkpoint.goes_on(run, config, resume=True, overwrite=False)
    assert not checkpoint.goes_on(run, config, resume=False, overwrite=True)
    with pytest.raises(UserError, match="holds a run of 3 epochs; --resume goes on with it"):
        checkpoint.goes_on(run, config, resume=False, overwrite=False)
    with pytest.raises(UserError, match=r"the run has train\.lr"):
        checkpoint.goes_on(
            run, override(config, ["train.lr=0.5"]), resume=True, overwrite=False
        )  # fmt: skip
    (run / "last" / checkpoint.META).write_text("{")
    assert not checkpoint.goes_on(run, config, resume=False, overwrite=True)  # it is to go anyway


def test_removing_a_run_keeps_what_is_not_of_it(saved):
    run = saved[0].parent
    for name in ("train.log", "log.jsonl", "notes.txt"):
        (run / name).write_text("x")
    (run / "best.old").mkdir()
    (run / "predictions").mkdir()
    checkpoint.remove_run(run)
    assert sorted(path.name for path in run.iterdir()) == ["notes.txt", "predictions"]
    checkpoint.remove_run(run / "nothing here")


def test_shaken_detectors_differ(tmp_path):
    """The helper that the tests above rely on does move the weights."""
    one = untrained_run(tmp_path, tiny_config())
    before = head(one)
    shake(one, 1)
    assert any((head(one)[name] != value).any() for name, value in before.items())
