"""Fixtures of the service: two bundles, and a running service of both."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import train
from deploy import parity
from tests.deploy.serving import Running, serving
from tests.small_run import arguments, copy_bottle, export, tiny_config, untrained_run

NFA = ("model.strides=[8,16]", "eval.image_threshold=nfa", "eval.pixel_threshold=nfa")


@pytest.fixture(scope="session")
def two_bundles(tmp_path_factory) -> tuple[Path, Path]:
    """Export an untrained FastFlow, and a U-Flow whose NFA decides."""
    folder = tmp_path_factory.mktemp("bundles")
    data = copy_bottle(folder / "data")
    untrained_run(folder / "fast/bottle", tiny_config())
    args = arguments(data, folder / "uflow", *(x for s in NFA for x in ("-o", s)))
    args[1] = "configs/uflow_efficientnet_lite0.yaml"
    assert train.main([*args, "-cat", "bottle", "--epochs", "1"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        only_paddle = {name: parity.CANDIDATES[name] for name in ("paddle",)}
        patch.setattr(parity, "CANDIDATES", only_paddle)  # the others are not tried, to save time
        return (
            export(folder / "fast", folder / "fast_bundle", data),
            export(folder / "uflow", folder / "uflow_bundle", data),
        )


@pytest.fixture(scope="session")
def service(two_bundles, tmp_path_factory) -> Iterator[Running]:
    """Start a service of both bundles, `fast` and `uflow`, with small limits."""
    pytest.importorskip("fastapi", reason="pip install -r requirements-service.txt")
    fast, uflow = two_bundles
    flags = (
        "--engine",
        "paddle",
        "--max_megapixels",
        "2",
        "--max_body_mb",
        "2",
        "--max_images",
        "8",
    )
    with serving(
        tmp_path_factory.mktemp("service"), f"fast={fast}", f"uflow={uflow}", *flags
    ) as running:
        yield running
