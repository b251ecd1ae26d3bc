"""Configuration: complete files, exact errors, overrides, values per category."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import yaml

from utils import config
from utils.config import (
    Config,
    assignments,
    differences,
    from_dict,
    load,
    override,
    parse_bool,
)
from utils.errors import UserError
from utils.schema import FastFlowModel

REPO = Path(__file__).resolve().parents[2]
SHIPPED = sorted((REPO / "configs").rglob("*.yaml"))
# What a preset may leave to the defaults: where things are and how a machine is used.
MAY_BE_LEFT_OUT = {
    "data.workers", "data.cache", "data.cache_dir", "train.amp", "train.log_every",
    "train.test_epochs", "train.warmup_epochs", "train.drop_last", "model.norm_momentum",
    # what one flow, one backbone or one paper asks for
    "model.padding", "model.before_norm", "model.last_block", "model.permute", "data.features",
    "data.rotation",
    "train.sub_epochs", "train.fiber_batch", "train.fiber_remainder", "train.final_lr",
    "train.schedule_epochs", "train.betas", "train.epsilon", "train.best_by", "eval.norm",
    "nfa.method", "nfa.tail", "nfa.tests", "nfa.calibrate", "nfa.window", "nfa.probability",
    "nfa.high_precision",
}  # fmt: skip


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "x.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        override(Config(), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_there_are_the_four_presets():
    names = {file.stem for file in SHIPPED}
    flows = {f"fastflow_{b}" for b in ("resnet18", "wide_resnet50_2", "efficientnet_lite0")}
    assert names >= {"resnet18", *flows}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_files_are_short_and_complete(file):
    text = file.read_text(encoding="utf-8")
    loaded = load(file)
    assert text.startswith("# ")  # says what it is
    assert len(text.partition("per_category:")[0].splitlines()) <= 50
    plain = yaml.safe_load(text)
    given = {f"{s}.{k}" for s in plain if s != "per_category" for k in plain[s]}
    every = {
        f"{s}.{k}" for s, keys in loaded.to_dict().items() if s != "per_category" for k in keys
    }
    assert every - given <= MAY_BE_LEFT_OUT
    assert given <= every


def test_the_fastflow_paddle_preset():
    """Values of the reference: configs/resnet18.yaml and its constants file (cli.md §4)."""
    c = load(REPO / "configs/resnet18.yaml")
    assert isinstance(c.model, FastFlowModel)
    assert c.model.backbone == "resnet18"
    assert (c.model.steps, c.model.hidden_ratio, c.model.alpha) == (4, 1.06, 2.0)
    assert (c.model.coupling, c.model.norm, c.model.norm_momentum) == ("two_sided", "batch", 0.95)
    assert c.model.conv3x3_only
    assert c.model.input_size == (256, 256)
    assert c.model.strides == (4, 8, 16)
    assert (c.train.lr, c.train.weight_decay, c.train.clip_norm) == (1e-3, 1e-5, 0.9)
    assert (c.train.epochs, c.train.batch_size, c.train.patience) == (500, 32, 30)
    assert c.eval.batch_size == 40
    assert (c.eval.image_threshold, c.eval.pixel_threshold) == ("fixed:0.8", "fixed:0.8")
    assert c.model.blur_sigma == 6


def test_unknown_key_in_a_file_names_file_and_nearest(tmp_path):
    file = written(tmp_path, "train:\n  learning_rate: 0.1\n")
    with pytest.raises(UserError) as caught:
        load(file)
    expected = f"{file}: unknown key 'train.learning_rate' (did you mean 'train.lr'?)"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("train.clip_nrom=1", "train.clip_norm"),
        ("train.steps=3", "model.steps"),  # right key, wrong section
        ("lr=1", "train.lr"),
        ("model.imput_size=64", "model.input_size"),
    ],
)
def test_unknown_override_names_the_nearest(text, nearest):
    assert f"(did you mean '{nearest}'?)" in refusal(text)


def test_unknown_section(tmp_path):
    with pytest.raises(UserError, match=r"unknown section 'modle' \(did you mean 'model'\?\)"):
        load(written(tmp_path, "modle:\n  steps: 3\n"))
    assert "model, data, train, eval, nfa, export" in refusal("foo.bar=1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.lr=fast", "train.lr is 'fast'; it must be a number"),
        ("train.lr=.inf", "it must be a number"),
        ("train.lr=.nan", "it must be a number"),
        ("train.lr=true", "it must be a number"),
        ("train.lr=0", "train.lr is 0.0; it must be greater than 0"),
        ("train.epochs=2.5", "it must be a whole number"),
        ("train.epochs=null", "it must be a whole number"),
        ("train.epochs=0", "train.epochs is 0; it must be at least 1"),
        ("train.seed=-1", "at least 0"),
        ("train.amp=maybe", "train.amp is 'maybe'; it must be true or false"),
        ("train.amp=2", "true or false"),
        ("model.backbone=[a]", "it must be text"),
        ("model.clamp=sigmoid", "choose from tanh, tanh_scaled, atan"),
        ("model.flow=nice", "model.flow is 'nice'; choose from fastflow"),
        ("model.flow=[fastflow]", "choose from fastflow"),
        ("model.input_size=[1, 2, 3]", "give one number or a list of 2"),
        ("model.strides=[0, 4]", "increasing numbers from 1"),
        ("model.strides=[8, 4]", "increasing numbers from 1"),
        ("model.strides=[]", "increasing numbers from 1"),
        ("model.input_size=100", "coarsest stride 16; use 96 instead of 100"),
        ("model.input_size=0", "use 16 instead of 0"),
        ("data.holdout=1", "between 0 and 1"),
        ("train.clip_norm=0", "greater than 0"),
        ("train.weight_decay=-1", "at least 0"),
        ("eval.size=512", "choose from input, 256, original"),
        ("eval.image_threshold=percntile:99", "must be percentile:q"),
        ("eval.pixel_threshold=f1", "use percentile:q or fixed:v"),
        ("train.lr", "no '='; write -o section.key=value"),
        ("train.lr={", "not a YAML value"),
    ],
)
def test_wrong_values_name_key_value_and_rule(text, words):
    message = refusal(text)
    assert words in message
    assert message.startswith("-o")


def test_patience_must_outlast_the_first_test_evaluation():
    late = ("train.select_on=test", "train.patience=5", "train.test_epochs=10")
    message = refusal(*late)
    assert "train.patience 5" in message
    assert "train.test_epochs 10" in message
    override(Config(), (*late[:2], "train.test_epochs=5"))
    override(Config(), ("train.patience=5", "train.test_epochs=10"))  # follows the hold-out


@pytest.mark.parametrize("text", ["", "42", "- a\n- b\n", "a: [", "\x00", "train: 3\n"])
def test_files_that_are_no_configuration(tmp_path, text):
    with pytest.raises(UserError) as caught:
        load(written(tmp_path, text))
    assert "x.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_its_neighbour(tmp_path):
    written(tmp_path, "train:\n  lr: 1\n")
    with pytest.raises(UserError, match=r"y\.yaml: no such config file \(did you mean '.*x\.yaml'"):
        load(tmp_path / "y.yaml")
    with pytest.raises(UserError, match=r"no such config file$"):
        load(tmp_path / "none" / "quite_another_name.yaml")


def test_overrides_have_the_last_word_and_the_types_of_the_fields(tmp_path):
    file = written(tmp_path, "train:\n  lr: 0.5\n  epochs: 3\n")
    texts = (
        "train.lr=1e-4", "train.lr=2e-4", "train.clip_norm=1", "train.epochs=1e2",
        "model.input_size=[64, 96]", "model.strides=16", "train.seed=12345678901234567890",
    )  # fmt: skip
    c = load(file, texts)
    assert c.train.lr == 2e-4
    assert isinstance(c.train.clip_norm, float)
    assert c.train.epochs == 100
    assert isinstance(c.train.epochs, int)
    assert c.model.input_size == (64, 96)
    assert c.model.strides == (16,)
    assert c.train.seed == 12345678901234567890  # not by way of a float
    assert load(file).train == dataclasses.replace(Config().train, lr=0.5, epochs=3)


def test_a_file_may_write_numbers_as_yaml_does_not_read_them(tmp_path):
    c = load(written(tmp_path, "train:\n  lr: 1e-4\n  weight_decay: '2e-5'\n"))
    assert (c.train.lr, c.train.weight_decay) == (1e-4, 2e-5)


@pytest.mark.parametrize(
    ("text", "value"),
    [(t, v) for v, ts in {True: "true True 1 yes YES on", False: "false 0 no off FALSE"}.items()
     for t in ts.split()],
)  # fmt: skip
def test_booleans(text, value):
    assert parse_bool(text) is value
    assert override(Config(), [f"train.drop_last={text}"]).train.drop_last is value


def test_null_where_a_value_is_optional():
    c = override(Config(), ["train.clip_norm=0.5", "model.weights=w.npz"])
    c = override(c, ["train.clip_norm=null", "model.weights=null"])
    assert c.train.clip_norm is None
    assert c.model.weights is None


@pytest.mark.parametrize(
    "text", ["010", "yes", "null", "a: b", "a #b", "[x", "1e3", 'q"\\', "瓶 子"]
)
def test_assignments_keep_text_as_it_is(text):
    assert override(Config(), assignments({"data.root": text})).data.root == text


def test_assignments_leave_out_what_was_not_given():
    assert assignments({"data.root": None, "train.epochs": 3}) == ["train.epochs=3"]


def test_values_per_category(tmp_path):
    wood = "  wood:\n    model.input_size: 512\n    train.lr: 1e-3\n"
    text = f"model:\n  steps: 3\nper_category:\n{wood}"
    c = load(written(tmp_path, text), ["train.epochs=7"])
    own, other = c.for_category("wood"), c.for_category("bottle")
    assert own.model.input_size == (512, 512)
    assert (own.train.lr, own.train.epochs) == (1e-3, 7)
    assert isinstance(own.model, FastFlowModel)
    assert own.model.steps == 3
    assert other.model.input_size == Config().model.input_size
    assert not own.per_category
    assert not other.per_category


def test_values_per_category_of_any_data_set(tmp_path):
    """Names are those of folders: BTAD's and the user's own, in any spelling."""
    names = {"'01'": 1, "pcb1": 2, "My Part-7": 3, "钢板": 4}
    lines = "".join(f"  {name}: {{train.epochs: {value}}}\n" for name, value in names.items())
    c = load(written(tmp_path, f"per_category:\n{lines}"))
    asked = ["01", "PCB1", "my_part_7", "钢板", "1"]
    assert [c.for_category(name).train.epochs for name in asked] == [1, 2, 3, 4, 500]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["01"], r"per_category\.1: the name is not text to YAML; put it in quotes"),
        (
            ["metal_nut", "Metal Nut"],
            r"per_category\.Metal Nut: is 'metal_nut' in another spelling",
        ),
    ],
)
def test_names_per_category_that_cannot_be(tmp_path, names, words):
    lines = "".join(f"  {name}: {{train.epochs: 1}}\n" for name in names)
    with pytest.raises(UserError, match=words):
        load(written(tmp_path, f"per_category:\n{lines}"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "model.input_sise: 64",
            r"per_category.wood: unknown key 'model.input_sise' \(did you mean",
        ),
        ("model.input_size: 65", "per_category.wood: model.input_size"),
        ("input_size: 64", r"did you mean 'model.input_size'\?\); use section.key"),
    ],
)
def test_values_per_category_are_checked_when_the_file_is_read(tmp_path, line, words):
    with pytest.raises(UserError, match=words):
        load(written(tmp_path, f"per_category:\n  wood:\n    {line}\n"))


def test_per_category_must_be_a_table(tmp_path):
    with pytest.raises(UserError, match=r"per_category\.wood is 3"):
        load(written(tmp_path, "per_category:\n  wood: 3\n"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_resolved_configuration_survives_yaml_and_json(file):
    import json

    c = load(file, ["model.input_size=[128, 256]", "train.lr=1e-4"])
    assert from_dict(json.loads(json.dumps(c.to_dict())), "json") == c
    assert from_dict(yaml.safe_load(yaml.safe_dump(c.to_dict())), "yaml") == c


def test_differences():
    other = override(Config(), ["train.lr=0.5", "model.input_size=64"])
    assert differences(Config(), Config()) == {}
    assert differences(Config(), other) == {
        "train.lr": (1e-3, 0.5), "model.input_size": ([256, 256], [64, 64]),
    }  # fmt: skip


def test_defaults_are_valid_themselves():
    assert from_dict({}, "defaults") == Config()
    assert from_dict(Config().to_dict(), "defaults") == Config()


def test_the_nearest_key_is_always_one_that_exists():
    c = Config().to_dict()
    every = {f"{s}.{k}" for s in c if s != "per_category" for k in c[s]}
    for section, name in itertools.product(config.SECTIONS, ("sede", "batchsize", "weigths")):
        message = refusal(f"{section}.{name}=1")
        if "did you mean" in message:
            assert message.split("did you mean '")[1].split("'")[0] in every
