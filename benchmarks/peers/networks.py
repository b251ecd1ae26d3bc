"""Networks of anomalib in the layouts of our presets, with random weights."""

import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.bench_inference import parts

importlib.import_module("benchmarks.peers.operators")  # before anything needs torchvision
torch: Any = importlib.import_module("torch")
timm: Any = importlib.import_module("timm")
MODELS = "anomalib.models.image"
LITE0 = "tf_efficientnet_lite0"
ENCODER = "feature_extractor."
LAST_BLOCK = {16: 5, 32: 7}  # how many of its blocks EfficientNet needs, by its coarsest stride


def build(preset: str, size: tuple[int, int], seed: int = 0) -> Any:
    """Return the network of a preset for images of `size` (height, width)."""
    torch.manual_seed(seed)
    flow, _, backbone = preset.removesuffix("_anomalib").partition("_")
    models = importlib.import_module(f"{MODELS}.{flow}.torch_model")
    if flow == "cflow" and backbone == "efficientnet_lite0":
        with patch.object(models, "TimmFeatureExtractor", _Lite0):
            return models.CflowModel(backbone, [8, 16, 32], pre_trained=False)
    if flow == "cflow":
        return models.CflowModel(backbone, ["layer2", "layer3", "layer4"], pre_trained=False)
    if flow == "uflow":
        with patch("timm.create_model", partial(_untrained, timm.create_model)):
            return models.UflowModel(size, 4, backbone)
    if flow == "csflow":
        plain = importlib.import_module("torchvision.models").efficientnet_b5
        with patch.object(models, "efficientnet_b5", lambda weights: plain(weights=None)):
            return models.CsFlowModel(size, 1024)
    if backbone == "efficientnet_lite0":
        return _lite0(models, size)
    return models.FastflowModel(size, backbone, pre_trained=False, conv3x3_only=True)


def _untrained(create: Any, *args: Any, **options: Any) -> Any:
    return create(*args, **{**options, "pretrained": False})


def _lite0(models: Any, size: tuple[int, int]) -> Any:
    """Return FastFlow on a backbone that anomalib does not offer, made of anomalib's own parts."""
    network = models.FastflowModel(size, "resnet18", pre_trained=False, conv3x3_only=True)
    network.feature_extractor = _lite0_backbone((4, 8, 16))
    about = network.feature_extractor.feature_info
    shapes = [
        [channels, size[0] // stride, size[1] // stride]
        for channels, stride in zip(about.channels(), about.reduction(), strict=True)
    ]
    network.norms = torch.nn.ModuleList(torch.nn.LayerNorm(shape) for shape in shapes)
    network.fast_flow_blocks = torch.nn.ModuleList(
        models.create_fast_flow_block(shape, conv3x3_only=True, hidden_ratio=1.0, flow_steps=8)
        for shape in shapes
    )
    return network


def _lite0_backbone(strides: Sequence[int]) -> Any:
    """Return timm's network up to the last level that is wanted, frozen."""
    levels = [int(np.log2(stride)) - 1 for stride in strides]
    backbone = timm.create_model(LITE0, pretrained=False, features_only=True, out_indices=levels)
    backbone.blocks = backbone.blocks[: LAST_BLOCK[strides[-1]]]
    return backbone.requires_grad_(requires_grad=False).eval()


class _Lite0(torch.nn.Module):  # type: ignore[misc,unused-ignore]
    """In the place of anomalib's feature extractor: levels by stride."""

    def __init__(self, backbone: str, layers: Sequence[int], *, pre_trained: bool) -> None:
        """Build it; name and weights are not chosen here."""
        del backbone, pre_trained
        super().__init__()
        self.layers = layers
        self.feature_extractor = _lite0_backbone(layers)
        self.out_dims = self.feature_extractor.feature_info.channels()

    def forward(self, images: Any) -> dict[int, Any]:
        """Return features (B, C, H, W) by stride."""
        return dict(zip(self.layers, self.feature_extractor(images), strict=True))


def prepared(case: str) -> tuple[Path, Any, Any]:
    """Return the folder of a prepared case, its images as the backbone wants them, the network."""
    folder, batch = parts(case)
    images = np.load(folder / "images.npy")[:batch]  # (B, 3, H, W) in [0, 1]
    mean, deviation = np.load(folder / "normalisation.npy").astype(np.float32)[:, :, None, None]
    network = build(folder.name, images.shape[2:])
    return folder, torch.from_numpy((images - mean) / deviation), network


def load(network: Any, file: Path) -> None:
    """Load all weights of ours into anomalib's FastFlow."""
    state = torch.load(file, weights_only=True)
    found = {name: state.pop(name) for name in list(state) if name.startswith(ENCODER)}
    load_backbone(network.feature_extractor, found)
    missing, unknown = network.load_state_dict(state, strict=False)
    if unknown or any(not name.startswith(ENCODER) for name in missing):
        raise ValueError(f"weights do not fit: {unknown[:3]}, {missing[:3]}")


def load_backbone(backbone: Any, state: dict[str, Any]) -> None:
    """Load ours; timm calls the parts of EfficientNet-Lite0 by other names, in the same order."""
    state = {name.removeprefix(ENCODER): value for name, value in state.items()}
    wanted = list(backbone.state_dict())
    if set(wanted) != set(state):
        state = dict(zip(wanted, (state[n] for n in sorted(state, key=_place)), strict=True))
    backbone.load_state_dict(state)


def _place(name: str) -> tuple[int, int]:
    """Return block and part of the block; sorting keeps the order within a part."""
    words = name.split(".")
    if words[0] != "blocks":
        return -1, 0
    return int(words[1]), ("expand", "depthwise", "project").index(words[2])


def trained_weights(network: Any) -> int:
    """Return how many weights training changes; CS-Flow's backbone gets no gradient."""
    frozen = "feature_extractor." if hasattr(network, "graph") else "-"
    named = network.named_parameters()
    return sum(p.numel() for name, p in named if p.requires_grad and not name.startswith(frozen))
