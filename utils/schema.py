"""The sections of a configuration: names, types, defaults and what they mean."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FastFlowModel:
    """Section `model` when `flow: fastflow`."""

    flow: Literal["fastflow"] = "fastflow"
    backbone: str = "efficientnet_lite0"
    weights: str | None = None  # file of backbone weights; null: bundled, cache, download
    input_size: tuple[int, int] = (256, 256)  # height, width; one number means a square
    strides: tuple[int, ...] = (4, 8, 16)  # backbone levels the flow sees, finest first
    coupling: Literal["one_sided", "two_sided"] = "one_sided"
    steps: int = 8  # coupling steps per level
    hidden_ratio: float = 1.0  # hidden channels of a subnet / its input channels
    conv3x3_only: bool = True  # false: kernels alternate 3, 1, 3, …
    clamp: Literal["tanh", "tanh_scaled", "atan"] = "tanh"
    alpha: float = 2.0  # bound of the clamped log-scale
    norm: Literal["layer", "batch", "none"] = "layer"  # between backbone and flow
    norm_momentum: float = 0.9  # BatchNorm only: share of the running statistics that is kept
    global_scale: Literal["softplus", "raw"] = "softplus"
    init: Literal["torch", "paddle"] = "torch"  # whose default initialisation of convolutions
    loss_norm: Literal["per_element", "none"] = "per_element"
    score: Literal["probability", "energy", "nll"] = "probability"  # what the map shows
    align_corners: bool = False  # of the maps' up-sampling
    blur_sigma: float = 0.0  # smooths the map, in input pixels
    score_from: Literal["sharp", "smooth"] = "sharp"  # the score's map: before or after the blur


@dataclass(frozen=True)
class UFlowModel:
    """Section `model` when `flow: uflow`; keys that FastFlow has too mean the same."""

    flow: Literal["uflow"] = "uflow"
    backbone: str = "efficientnet_lite0"
    weights: str | None = None
    input_size: tuple[int, int] = (256, 256)
    strides: tuple[int, ...] = (4, 8, 16)  # each twice the one before
    steps: int = 4
    hidden_ratio: float = 1.0
    clamp: Literal["tanh", "tanh_scaled", "atan"] = "tanh"
    alpha: float = 2.0
    norm: Literal["layer", "none"] = "layer"
    loss: Literal["per_sample", "batch_sum"] = "per_sample"  # batch_sum: the code of 2022
    init: Literal["torch", "paddle"] = "torch"
    score: Literal["probability", "energy", "nll"] = "probability"
    align_corners: bool = False
    blur_sigma: float = 0.0
    score_from: Literal["sharp", "smooth"] = "sharp"


ModelSection = FastFlowModel | UFlowModel
MODEL_SECTIONS: dict[str, type[ModelSection]] = {"fastflow": FastFlowModel, "uflow": UFlowModel}


@dataclass(frozen=True)
class DataSection:
    """Section `data`."""

    root: str = "data"
    resize: Literal["pil", "cv2"] = "pil"  # pil: antialiased bilinear; cv2: plain bilinear
    holdout: float = 0.1  # share of train/good that selects the model and fits thresholds
    workers: int = 2  # threads that read images
    cache: bool = True  # keep the frozen features of the training images on disk
    cache_dir: str = ".feature_cache"


@dataclass(frozen=True)
class TrainSection:
    """Section `train`."""

    epochs: int = 500
    batch_size: int = 32
    drop_last: bool = False  # leave out a last batch that is not full
    lr: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: int = 0  # the rate rises linearly over these
    weight_decay: float = 1e-5  # coupled L2, as Adam of both frameworks has it
    clip_norm: float | None = None  # gradients' global norm
    patience: int = 0  # stop after so many epochs without a better selection value; 0: never
    select_on: Literal["holdout", "test"] = "holdout"  # what `best` follows
    test_epochs: int = 1  # with select_on test: epochs between evaluations
    seed: int = 0
    amp: bool = False  # half precision, GPU only
    log_every: int = 10  # steps


@dataclass(frozen=True)
class EvalSection:
    """Section `eval`."""

    batch_size: int = 32
    size: Literal["input", "256", "original"] = "input"  # where pixel metrics are computed
    image_threshold: str = "percentile:99"  # of held-out normal images, or fixed:0.8
    pixel_threshold: str = "percentile:99.9"  # of held-out normal pixels, or fixed:0.8


@dataclass(frozen=True)
class ExportSection:
    """Section `export`."""

    dir: str = "deploy/inference"


SECTIONS: dict[str, type] = {
    "data": DataSection,
    "train": TrainSection,
    "eval": EvalSection,
    "export": ExportSection,
}
