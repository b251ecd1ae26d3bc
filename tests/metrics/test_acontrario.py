"""The stored form of the a-contrario test: the same scores, strict reading."""

import json

import numpy as np
import pytest
import yaml

from metrics.acontrario import AContrario
from metrics.nfa import Null, calibrate, latent_energies, standard_nulls, tree_score
from metrics.nfa_block import block_score, exceedances
from utils.errors import UserError

CHANNELS = (6, 4)


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
        ({"tail": "lower"}, "nfa tail 'lower'"),
        ({"nulls": [[1.0, 2.0]]}, "1 null hypotheses for 2 scales"),
        ({"nulls": [[1.0], [2.0]]}, "a value is missing or wrong"),
        ({"size": 5}, "a value is missing or wrong"),
        ({"colour": "red"}, "must be a mapping with method, size"),
    ],
)
def test_what_is_stored_is_checked(change, message):
    good = AContrario("tree", (24, 16), CHANNELS, tuple(standard_nulls(CHANNELS))).to_dict()
    with pytest.raises(UserError, match=message):
        AContrario.from_dict({**good, **change})
