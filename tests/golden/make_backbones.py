"""Write backbones/*.npz: features of other projects' networks, with weights drawn from the names.

Run `python -m tests.golden.make_backbones` with PyTorch, torchvision, timm, efficientnet_pytorch
and Paddle installed, and PaddleClas's `ppcls` on the path; cases named on the command line only.
No pretrained weights are needed.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden import seeded_weights as seeded

FOLDER = Path(__file__).with_name("backbones")
Taps = dict[int, str]  # stride -> the layer whose output it is
RESNET: Taps = {4: "layer1", 8: "layer2", 16: "layer3", 32: "layer4"}
PADDLE_CLAS = "ppcls.arch.backbone.model_zoo"
STRIDES = (2, 4, 8, 16, 32)


def at(pattern: str, *places: int) -> Taps:
    """Name a layer per stride."""
    names = [pattern.format(place) for place in places]
    return dict(zip(STRIDES, names, strict=True))


# backbone, source: module that builds it, name there, pixels per side, layers of the taps.
# 72 pixels: TensorFlow's padding is as uneven in every layer as at 456, the size B5 is made for.
CASES: dict[tuple[str, str], tuple[str, str, int, Taps]] = {
    ("resnet18", "torchvision"): ("torchvision.models", "resnet18", 64, {2: "relu", **RESNET}),
    ("resnet18", "timm"): ("timm", "resnet18", 64, {2: "act1", **RESNET}),
    ("wide_resnet50_2", "torchvision"): (
        "torchvision.models", "wide_resnet50_2", 64, {2: "relu", **RESNET}),
    ("wide_resnet50_2", "timm"): ("timm", "wide_resnet50_2", 64, {2: "act1", **RESNET}),
    ("mobilenet_v2", "torchvision"): (
        "torchvision.models", "mobilenet_v2", 64, at("features.{}", 1, 3, 6, 13, 17)),
    ("mobilenet_v2", "timm"): ("timm", "mobilenetv2_100", 64, at("blocks.{}", 0, 1, 2, 4, 6)),
    ("mobilenet_v3_large", "torchvision"): (
        "torchvision.models", "mobilenet_v3_large", 64, at("features.{}", 1, 3, 6, 12, 15)),
    ("mobilenet_v3_large", "timm"): (
        "timm", "mobilenetv3_large_100", 64, at("blocks.{}", 0, 1, 2, 4, 5)),
    ("efficientnet_lite0", "timm"): (
        "timm", "tf_efficientnet_lite0", 65, at("blocks.{}", 0, 1, 2, 4, 6)),
    ("efficientnet_b5", "torchvision"): (
        "torchvision.models", "efficientnet_b5", 64, at("features.{}", 1, 2, 3, 5, 6)),
    ("efficientnet_b5", "timm"): (
        "timm", "tf_efficientnet_b5", 72, at("blocks.{}", 0, 1, 2, 4, 5)),
    ("efficientnet_b5", "timm-symmetric"): (
        "timm", "efficientnet_b5", 64, at("blocks.{}", 0, 1, 2, 4, 5)),
    ("efficientnet_b5", "efficientnet_pytorch"): (
        "efficientnet_pytorch", "efficientnet-b5", 64, at("_blocks.{}", 2, 7, 12, 26, 35)),
    ("efficientnet_b5", "paddleclas"): (
        f"{PADDLE_CLAS}.efficientnet", "EfficientNetB5", 72, {}),
    ("deit_base_distilled_384", "timm"): (
        "timm", "deit_base_distilled_patch16_384", 384, {16: "blocks.7"}),
    ("tiny_deit", "timm"): (
        "timm.models.deit", "VisionTransformerDistilled", 48, {16: "blocks.1"}),
    ("deit_base_distilled_384", "paddleclas"): (
        f"{PADDLE_CLAS}.distilled_vision_transformer", "DeiT_base_distilled_patch16_384", 384,
        {16: "blocks.7"}),
    ("cait_s24_224", "timm"): ("timm", "cait_s24_224", 224, {16: "blocks.20"}),
    ("cait_m48_448", "timm"): ("timm", "cait_m48_448", 448, {16: "blocks.40"}),
}  # fmt: skip
ARGUMENTS = {  # of the classes above that are no named network; TinyDeit of the tests is such a one
    "VisionTransformerDistilled": {
        "img_size": 48, "patch_size": 16, "embed_dim": 12, "depth": 3, "num_heads": 3,
        "num_classes": 5,
    },
}  # fmt: skip


def main(wanted: list[str]) -> None:
    """Write the file of every wanted case, or of all."""
    for (backbone, source), case in CASES.items():
        name = f"{backbone}.{source}"
        if not wanted or name in wanted:
            values = reference(*case)
            FOLDER.mkdir(exist_ok=True)
            np.savez_compressed(FOLDER / f"{name}.npz", **values)  # type: ignore[arg-type]
            print(name, (FOLDER / f"{name}.npz").stat().st_size)


def reference(module: str, name: str, size: int, taps: Taps) -> dict[str, np.ndarray]:
    """Return names and shapes, size of the image, and per stride sampled values and the norm."""
    network = build(module, name)
    values = {"size": np.array(size)}
    seen: dict[int, Any] = {}
    if module.startswith("ppcls"):
        shapes, run = in_paddle(network)
        hooked, register = dict(network.named_sublayers()), "register_forward_post_hook"
        taps = taps or paddle_clas_b5_taps(hooked)
    else:
        shapes, run = in_torch(network)
        hooked, register = dict(network.named_modules()), "register_forward_hook"
    for stride, layer in taps.items():
        getattr(hooked[layer], register)(keeper(seen, stride))
    run(size)
    for stride, feature in seen.items():
        if feature.ndim == 3:
            array = as_map(network.norm(feature).detach().numpy())
        else:
            array = feature.numpy()
        values[f"values{stride}"] = seeded.sample(array)
        values[f"norm{stride}"] = np.array(np.linalg.norm(array.astype(np.float64)))
        values[f"shape{stride}"] = np.array(array.shape)
    values["names"] = np.frombuffer(seeded.to_text(shapes).encode(), np.uint8)
    return values


def keeper(seen: dict[int, Any], stride: int) -> Callable[..., None]:
    """Return a hook that keeps the first output of a layer."""

    def keep(_layer: Any, _inputs: Any, output: Any) -> None:
        seen.setdefault(stride, output.detach())

    return keep


def build(module: str, name: str) -> Any:
    """Build a network without pretrained weights, as its project does."""
    package = importlib.import_module(module)
    if module == "timm":
        return package.create_model(name, pretrained=False)
    if module == "efficientnet_pytorch":
        return package.EfficientNet.from_name(name)
    return getattr(package, name)(**ARGUMENTS.get(name, {}))


def in_torch(network: Any) -> tuple[seeded.Shapes, Callable[[int], Any]]:
    """Fill a PyTorch network; return names and shapes, and a function that runs it."""
    torch = importlib.import_module("torch")
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    state = {key: torch.from_numpy(array) for key, array in seeded.draw_all(shapes).items()}
    network.load_state_dict(state)
    network.eval()

    def run(size: int) -> None:
        with torch.no_grad():
            network(torch.from_numpy(seeded.image(size)))

    return shapes, run


def in_paddle(network: Any) -> tuple[seeded.Shapes, Callable[[int], Any]]:
    """Do the same with a Paddle network."""
    paddle = importlib.import_module("paddle")
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    for key, array in seeded.draw_all(shapes).items():
        network.state_dict()[key].set_value(array)
    network.eval()

    def run(size: int) -> None:
        with paddle.no_grad():
            network(paddle.to_tensor(seeded.image(size)))

    return shapes, run


def paddle_clas_b5_taps(layers: dict[str, Any]) -> Taps:
    """Find the blocks 2, 7, 12, 26 and 35, which go by two names."""
    blocks = {int(name.split(".")[2]): name for name in layers if name.endswith(".")}
    return {s: blocks[b] for s, b in zip(STRIDES, (2, 7, 12, 26, 35), strict=True)}


def as_map(tokens: np.ndarray) -> np.ndarray:
    """Drop the first tokens of (1, N, C): (1, C, side, side)."""
    side = int(tokens.shape[1] ** 0.5)
    patches = tokens[:, tokens.shape[1] - side**2 :]
    return patches.transpose(0, 2, 1).reshape(1, -1, side, side)


if __name__ == "__main__":
    main(sys.argv[1:])
