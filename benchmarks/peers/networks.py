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
    if backbone == "efficientnet_lite0":
        return _with_lite0(flow, models, size)
    if flow == "cflow":
        return models.CflowModel(backbone, ["layer2", "layer3", "layer4"], pre_trained=False)
    if flow == "uflow":
        with patch("timm.create_model", partial(_untrained, timm.create_model)):
            return models.UflowModel(size, 4, backbone)
    if flow == "csflow":
        plain = importlib.import_module("torchvision.models").efficientnet_b5
        with patch.object(models, "efficientnet_b5", lambda weights: plain(weights=None)):
            return models.CsFlowModel(size, 1024)
    return models.FastflowModel(size, backbone, pre_trained=False, conv3x3_only=True)


def _untrained(create: Any, *args: Any, **options: Any) -> Any:
    return create(*args, **{**options, "pretrained": False})


def _with_lite0(flow: str, models: Any, size: tuple[int, int]) -> Any:
    """Return a flow on a backbone that anomalib does not offer, in the place of one that it does.

    Sizes of our presets where they are not those of the flow's paper.
    """
    if flow == "fastflow":
        return _fastflow_with_lite0(models, size)
    if flow == "cflow":
        with patch.object(models, "TimmFeatureExtractor", _Lite0):
            return models.CflowModel(LITE0, [8, 16, 32], pre_trained=False)
    if flow == "uflow":
        with patch.object(models, "get_feature_extractor", _NormalisedLite0):
            return models.UflowModel(size, 4, LITE0)
    with (
        patch.object(models, "CsFlowMultiScaleFeatureExtractor", _Lite0AtThreeScales),
        patch.object(models, "InputNode", partial(_input_of_lite0, models.InputNode)),
    ):
        return models.CsFlowModel(size, 128, n_coupling_blocks=2)


def _input_of_lite0(create: Any, channels: int, *size: int, name: str) -> Any:
    """Return an input of CS-Flow, which has the channels of EfficientNet-B5 written into it."""
    return create(192 if channels == 304 else channels, *size, name=name)


def _fastflow_with_lite0(models: Any, size: tuple[int, int]) -> Any:
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


class _NormalisedLite0(torch.nn.Module):  # type: ignore[misc,unused-ignore]
    """In the place of anomalib's feature extractor of U-Flow."""

    def __init__(self, backbone: str, size: tuple[int, int]) -> None:
        """Build it; the name is not chosen here."""
        del backbone
        super().__init__()
        self.scale_factors = [4, 8, 16]
        self.scales = range(len(self.scale_factors))
        self.feature_extractor = _lite0_backbone(self.scale_factors)
        self.channels = self.feature_extractor.feature_info.channels()
        self.norms = torch.nn.ModuleList(
            torch.nn.LayerNorm([channels, size[0] // factor, size[1] // factor])
            for channels, factor in zip(self.channels, self.scale_factors, strict=True)
        )

    def forward(self, images: Any) -> list[Any]:
        """Return the normalised features (B, C, H, W)."""
        self.feature_extractor.eval()
        found = self.feature_extractor(images)
        return [norm(level) for norm, level in zip(self.norms, found, strict=True)]


class _Lite0AtThreeScales(torch.nn.Module):  # type: ignore[misc,unused-ignore]
    """In the place of anomalib's feature extractor of CS-Flow: block 14, 192 channels."""

    def __init__(self, n_scales: int, input_size: tuple[int, int]) -> None:
        """Build it."""
        super().__init__()
        self.sizes = [[side // 2**scale for side in input_size] for scale in range(n_scales)]
        whole = timm.create_model(LITE0, pretrained=False).eval()
        self.backbone = torch.nn.Sequential(whole.conv_stem, whole.bn1, *whole.blocks[:6])
        self.backbone.requires_grad_(requires_grad=False)

    def forward(self, images: Any) -> list[Any]:
        """Return the features (B, 192, H, W) of the image at each scale."""
        resize = torch.nn.functional.interpolate
        return [self.backbone(resize(images, size=tuple(size))) for size in self.sizes]


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
