"""Write convert/*.npz: what anomalib's detectors give, with weights drawn from their names.

Run `python -m tests.golden.make_detectors` with anomalib 2.7 and its PyTorch installed; cases
named on the command line only. With `--checkpoints FOLDER` it also saves Lightning checkpoints
there, for `python -m convert detector` and its --verify. No pretrained weights are needed.
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden import seeded_detectors
from tests.golden import seeded_weights as seeded

FOLDER = Path(__file__).with_name("convert")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KEPT = 1 << 14  # values of an output, at most
STORED = ("fastflow", "cflow", "csflow", "uflow")
RESNET = {"backbone": "resnet18", "pre_trained": False}
# class of anomalib.models, its arguments, height and width of the image
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "fastflow": ("Fastflow", {**RESNET, "flow_steps": 3}, (64, 96)),
    "cflow": (
        "Cflow",
        {**RESNET, "coupling_blocks": 2, "condition_vector": 16, "clamp_alpha": 1.7},
        (64, 96),
    ),
    "csflow": ("Csflow", {"cross_conv_hidden_channels": 4, "n_coupling_blocks": 2}, (128, 128)),
    "uflow": ("Uflow", {"backbone": "resnet18"}, (64, 96)),
    # by hand only
    "fastflow_wide": ("Fastflow", {**RESNET, "backbone": "wide_resnet50_2"}, (64, 96)),
    "cflow_full": ("Cflow", RESNET, (256, 256)),
    "uflow_wide": ("Uflow", {"backbone": "wide_resnet50_2"}, (64, 96)),
    "uflow_mcait": ("Uflow", {"backbone": "mcait"}, (448, 448)),
    "fastflow_deit": (
        "Fastflow",
        {"backbone": "deit_base_distilled_patch16_384", "flow_steps": 2, "pre_trained": False},
        (384, 384),
    ),
}


def main(argv: list[str]) -> None:
    """Write the file of every wanted case, or of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=", ".join(CASES))
    parser.add_argument("--checkpoints", type=Path)
    args = parser.parse_args(argv)
    without_downloads()
    for name in args.cases or CASES:
        kind, arguments, size = CASES[name]
        module = build(kind, arguments, size)
        image = seeded_detectors.photograph(*size)
        found = outputs(name, module.model, normalised(image))
        if args.checkpoints:
            save_checkpoint(module, args.checkpoints / f"{name}.ckpt")
            np.savez(args.checkpoints / f"{name}.npz", image=image, **found)  # type: ignore[arg-type]
        names = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        kept = {key: value for key, value in found.items() if value.size <= KEPT}
        text = np.frombuffer(seeded.to_text(names).encode(), np.uint8)
        FOLDER.mkdir(exist_ok=True)
        if name in STORED:
            kept |= {"names": text, "size": np.array(size)}
            np.savez_compressed(FOLDER / f"{name}.npz", **kept)  # type: ignore[arg-type]
        print(name, {key: value.shape for key, value in kept.items()})


def _module(name: str) -> Any:
    return importlib.import_module(name)


def without_downloads() -> None:
    """Take pretrained weights away from the networks that insist on them."""
    timm, models = _module("timm"), _module("torchvision.models")
    network = _module("anomalib.models.image.csflow.torch_model")
    network.efficientnet_b5 = lambda weights: models.efficientnet_b5(weights=None)
    create = timm.create_model
    timm.create_model = lambda name, pretrained=False, **options: create(name, **options)


def build(kind: str, arguments: dict[str, Any], size: tuple[int, int]) -> Any:
    """Build a module with drawn weights and a threshold of images."""
    torch = _module("torch")
    transforms = _module("torchvision.transforms.v2")
    steps = [transforms.Resize(size, antialias=True), transforms.Normalize(MEAN, STD)]
    wrap = _module("anomalib.pre_processing").PreProcessor
    processor = wrap(transform=transforms.Compose(steps))
    make = getattr(_module("anomalib.models"), kind)
    module = make(**arguments, pre_processor=processor).eval()
    state = module.state_dict()
    for key, tensor in state.items():
        if key.startswith("post_processor."):
            continue
        array = seeded_detectors.draw(key, tuple(tensor.shape))
        if not key.endswith("downsample_kernel"):
            state[key] = torch.from_numpy(array)
    state["post_processor._image_threshold"] = torch.tensor(-0.25)
    module.load_state_dict(state, strict=True)
    return module


def normalised(image: np.ndarray) -> Any:
    """Bring an image to what the networks expect."""
    torch = _module("torch")
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (MEAN, STD))
    return (torch.from_numpy(image) - mean) / std


def outputs(name: str, network: Any, image: Any) -> dict[str, np.ndarray]:
    """Return latents, log-determinants, map and score under the names of convert/verify.py."""
    result = network(image)
    found: dict[str, Any] = {"anomaly_map": result.anomaly_map, "score": result.pred_score}
    network.eval()
    if name.startswith("fastflow"):
        is_resnet = hasattr(network, "norms")
        features = network._get_cnn_features if is_resnet else network._get_vit_features
        for level, feature in enumerate(features(image)):
            z, log_det = network.fast_flow_blocks[level](feature)
            found |= {f"z{level}": z, f"logdet{level}": log_det}
    elif name.startswith("cflow"):
        found = cflow_outputs(network, image)
    elif name.startswith("csflow"):
        latents, _ = network.graph(network.feature_extractor(image))  # log-det summed over images
        found |= {f"z{level}": z for level, z in enumerate(latents)}
    else:
        latents, log_det = network.encode(network.feature_extractor(image))
        found |= {f"z{level}": z for level, z in enumerate(latents)}
        found["logdet"] = log_det
    return {key: value.detach().numpy() for key, value in found.items()}


def cflow_outputs(network: Any, image: Any) -> dict[str, Any]:
    """Return latents and log-determinants by fibre; the map depends on the batch."""
    found: dict[str, Any] = {}
    utils = _module("anomalib.models.image.cflow.utils")
    features = network.encoder(image)
    for level, layer in enumerate(network.pool_layers):
        feature = features[layer]
        fibers = feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1])
        code = utils.positional_encoding_2d(network.condition_vector, *feature.shape[2:])
        codes = code.permute(1, 2, 0).reshape(-1, len(code)).repeat(len(image), 1)
        z, log_det = network.decoders[level](fibers, [codes])
        found |= {f"z{level}": z, f"logdet{level}": log_det}
    return found


def save_checkpoint(module: Any, path: Path) -> None:
    """Save as a training does."""
    lightning = _module("lightning.pytorch")
    trainer = lightning.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)


if __name__ == "__main__":
    main(sys.argv[1:])
