"""A frozen backbone through Paddle Inference with oneDNN: three to four times eager mode's speed.

For many images on a CPU only, since making the graph takes as long as some twenty images. What it
gives is compared with eager mode before it is used.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from utils import runtime

from .flows import onednn

Extract = Callable[[Tensor], list[Tensor]]
WORTHWHILE = 48  # images
TOLERANCE = 1e-4  # of the largest value of a level


class FastBackbone:
    """Give the features of images (B, 3, H, W) of one size, as `detector.features` does."""

    def __init__(self, detector: nn.Layer) -> None:
        self._detector = detector
        self._predictor: Any = None
        self._checked = False

    def __call__(self, images: Tensor) -> list[Tensor]:
        if not self._checked:
            self._start(images)
        if self._predictor is None:
            return self._detector.features(images)
        # the predictor writes into the same tensors each time
        return [level.clone() for level in self._predictor.run([images])]

    def _start(self, images: Tensor) -> None:
        self._checked = True
        try:
            predictor = _predictor(self._detector, images.shape[1:])
            found = predictor.run([images])
        except (OSError, RuntimeError, ValueError):  # no space left, or an operator is refused
            return
        with paddle.no_grad():
            expected = self._detector.features(images)
        if all(map(_same, found, expected)):
            self._predictor = predictor


def fastest(detector: nn.Layer, count: int) -> Extract:
    """Return what gives the features of so many images soonest."""
    if count < WORTHWHILE or not onednn.is_usable() or not paddle.get_device().startswith("cpu"):
        return detector.features
    return FastBackbone(detector)


class _Features(nn.Layer):
    def __init__(self, detector: nn.Layer) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.detector.features(image)


def _predictor(detector: nn.Layer, shape: list[int]) -> Any:
    from paddle import inference

    layer = _Features(detector)
    spec = paddle.static.InputSpec([None, *shape], "float32", "image")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "backbone")
        paddle.jit.save(paddle.jit.to_static(layer, input_spec=[spec], full_graph=True), path)
        config = inference.Config(f"{path}.json", f"{path}.pdiparams")
        config.disable_gpu()
        config.set_cpu_math_library_num_threads(runtime.threads())
        config.enable_mkldnn()
        config.enable_new_executor()
        config.disable_glog_info()
        return inference.create_predictor(config)


def _same(found: Tensor, expected: Tensor) -> bool:
    ours, theirs = found.numpy(), expected.numpy()
    return bool(np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max())  # false for nan
