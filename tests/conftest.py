"""Fixtures: where the checkout, the golden vectors and the real images are."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("FLOWAD_SHARED", REPO.parent / "shared"))


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
