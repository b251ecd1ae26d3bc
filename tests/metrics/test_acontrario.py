"""The stored form of the a-contrario test: the same scores, strict reading."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from metrics.acontrario import METHODS, AContrario
from metrics.nfa import Null, calibrate, latent_energies, standard_nulls, tree_score
from metrics.nfa_block import block_score, exceedances
from utils.errors import UserError

CHANNELS = (6, 4)
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def latents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    made = [rng.standard_normal((6, 12, 8)), rng.standard_normal((4, 6, 4))]
    made[0][:, 3:6, 2:5] *= 4
    return made


def test_the_tree(latents):
    energies = latent_energies(latents)
    for nulls in (standard_nulls(CHANNELS), calibrate([e[None] for e in energies], CHANNELS)):
        for tests in ("total", "by_size"):
            test = AContrario("tree", (24, 16), CHANNELS, tuple(nulls), tests=tests)
            expected = tree_score(energies, nulls, (24, 16), tests=tests)
            np.testing.assert_array_equal(test.score(energies), expected)


@pytest.mark.parametrize("precise", [False, True])
def test_the_block(latents, precise):
    test = AContrario(
        "block", (24, 16), CHANNELS, tuple(standard_nulls(CHANNELS)), window=3, probability=0.8,
        high_precision=precise,
    )  # fmt: skip
    expected = block_score(latents, (24, 16), window=3, probability=0.8, high_precision=precise)
    np.testing.assert_array_equal(test.score([exceedances(z, 0.8) for z in latents]), expected)
    assert expected.max() > 0


def test_it_survives_json_and_yaml(latents):
    nulls = (Null(np.float64(5.5), 3.25), Null(4.0, np.float32(4.0)))
    test = AContrario("tree", (24, 16), CHANNELS, nulls, tail="both", tests="by_size")
    plain = test.to_dict()
    for again in (json.loads(json.dumps(plain)), yaml.safe_load(yaml.safe_dump(plain))):
        assert AContrario.from_dict(again) == test


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "leaf"}, "nfa method 'leaf': must be one of tree, block"),
        ({"method": ["tree"]}, "nfa method"),
        ({"tail": "lower"}, "nfa tail 'lower'"),
        ({"tests": None}, "nfa tests None"),
        ({"nulls": [[1.0, 2.0]]}, "1 null hypotheses for 2 scales"),
        ({"nulls": []}, "0 null hypotheses for 2 scales"),
        ({"nulls": [[1.0], [2.0]]}, "must be pairs of mean"),
        ({"nulls": [[1.0, 2.0], [0.0, 2.0]]}, "nfa nulls .* above 0"),
        ({"nulls": [[1.0, 2.0], [float("nan"), 2.0]]}, "nfa nulls .* above 0"),
        ({"nulls": [["1", 2.0], [1.0, 2.0]]}, "nfa nulls .* above 0"),
        ({"nulls": 3}, "nfa nulls 3: must be a list"),
        ({"size": 5}, "nfa size 5: must be a list"),
        ({"size": [24]}, "nfa size"),
        ({"size": [24, 0]}, "nfa size"),
        ({"size": [24, 1.5]}, "nfa size"),
        ({"channels": [6, True]}, "nfa channels"),
        ({"channels": [], "nulls": []}, "nfa channels"),
        ({"window": 1}, "nfa window 1"),
        ({"window": "5"}, "nfa window '5'"),
        ({"probability": 1.0}, "nfa probability 1.0"),
        ({"probability": "0.9"}, "nfa probability '0.9'"),
        ({"high_precision": "false"}, "nfa high_precision 'false': must be true or false"),
        ({"colour": "red"}, "unknown key 'colour'; known are method, size"),
    ],
)
def test_what_is_stored_is_checked(change, message):
    good = AContrario("tree", (24, 16), CHANNELS, tuple(standard_nulls(CHANNELS))).to_dict()
    assert AContrario.from_dict(good).to_dict() == good
    with pytest.raises(UserError, match=message) as caught:
        AContrario.from_dict({**good, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["method", "nulls", "high_precision"])
def test_a_missing_key_is_named(key):
    good = AContrario("tree", (24, 16), CHANNELS, tuple(standard_nulls(CHANNELS))).to_dict()
    del good[key]
    with pytest.raises(UserError, match=f"key '{key}' is missing; export or train again"):
        AContrario.from_dict(good)
    with pytest.raises(UserError, match="must be a mapping"):
        AContrario.from_dict(["tree"])  # type: ignore[arg-type]


def test_blocks_need_no_null_hypothesis(latents):
    test = AContrario("block", (24, 16), CHANNELS, (), window=3)
    again = AContrario.from_dict(json.loads(json.dumps(test.to_dict())))
    evidence = [exceedances(z, 0.9) for z in latents]
    np.testing.assert_array_equal(again.score(evidence), block_score(latents, (24, 16), window=3))


@pytest.mark.parametrize("method", METHODS)
def test_evidence_of_another_network(latents, method):
    test = AContrario(method, (24, 16), CHANNELS, tuple(standard_nulls(CHANNELS)))
    with pytest.raises(UserError, match="evidence of 1 scales for an NFA test of 2"):
        test.score(latent_energies(latents)[:1])


def test_reading_a_bundle_loads_no_statistics():
    """`deploy/infer.py` imports this for every bundle; most have no such test."""
    slow = ["paddle", "scipy.stats", "scipy.optimize", "scipy.interpolate", "skimage"]
    code = f"import sys, metrics.acontrario; sys.exit(str([m for m in {slow} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == "[]"
