"""Fixtures: where the checkout, the golden vectors and the real images are."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.small_run import copy_bottle, export, train_tiny

REPO = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("FLOWAD_SHARED", REPO.parent / "shared"))

LONGEST = ("test_tutorial.py", "test_real_chain.py", "test_every_config.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker is left alone with one."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no folder {name} in FLOWAD_SHARED or in ../shared")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    return _shared("data")


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    return _shared("weights")


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Return a reader of golden files: name without suffix -> {key: array}."""

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(_shared("golden") / f"{name}.npz") as file:
            return dict(file)

    return read


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Copy a few images of the bundled bottle set; each module has its own copy."""
    return copy_bottle(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def exp(data, tmp_path_factory) -> Path:
    """Train a tiny run on `data`."""
    folder = tmp_path_factory.mktemp("runs") / "exp"
    train_tiny(data, folder)
    return folder


@pytest.fixture(scope="module")
def bundle(exp, data, tmp_path_factory) -> Path:
    """Export the tiny run."""
    return export(exp, tmp_path_factory.mktemp("export") / "bundle", data)
