"""The sections of a configuration: names, types, defaults and what they mean."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class BackboneKeys:
    """Keys of section `model` that all flows share: the frozen network and what it sees."""

    backbone: str = "efficientnet_lite0"
    weights: str | None = None  # file of backbone weights; null: bundled, cache, download
    padding: str | None = None  # of its convolutions; null: the network's usual one
    before_norm: bool = False  # mobilenet_v3_large: tap before the last batch norm of a block
    last_block: int | None = None  # efficientnet_lite0: tap this block at the coarsest stride
    input_size: tuple[int, int] = (256, 256)  # height, width; one number means a square
    strides: tuple[int, ...] = (4, 8, 16)  # backbone levels the flow sees, finest first


@dataclass(frozen=True)
class FastFlowModel(BackboneKeys):
    """Section `model` when `flow: fastflow`."""

    flow: Literal["fastflow"] = "fastflow"
    coupling: Literal["one_sided", "two_sided"] = "one_sided"
    steps: int = 8  # coupling steps per level
    hidden_ratio: float = 1.0  # hidden channels of a subnet / its input channels
    conv3x3_only: bool = True  # false: kernels alternate 3, 1, 3, …
    permute: Literal["hard", "soft"] = "hard"  # permutations, or rotations as some files have them
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
class CFlowModel(BackboneKeys):
    """Section `model` when `flow: cflow`; keys that FastFlow has too mean the same."""

    flow: Literal["cflow"] = "cflow"
    strides: tuple[int, ...] = (8, 16, 32)
    steps: int = 8
    code_channels: int = 128  # of the position code, a multiple of 4; 0: not conditional
    permute: Literal["soft", "hard"] = "soft"  # rotations (official) or permutations (anomalib)
    clamp: Literal["tanh", "tanh_scaled", "atan"] = "tanh"
    alpha: float = 1.9
    peak_quantile: float = 1.0  # of training likelihoods that counts as normal; 1: their maximum
    blur_sigma: float = 0.0


@dataclass(frozen=True)
class CSFlowModel(BackboneKeys):
    """Section `model` when `flow: csflow`; the image is seen at full, half and quarter size."""

    flow: Literal["csflow"] = "csflow"
    strides: tuple[int, ...] = (32,)  # one tap
    blocks: int = 4
    hidden: int = 1024  # channels inside the cross-scale networks
    last_kernel: int = 5  # of the last block; all others have 3
    use_gamma: bool = True  # learned damping of the networks' outputs, from 0
    alpha: float = 3.0
    permutation: Literal["official", "anomalib"] = "official"
    score: Literal["mean", "std", "max"] = "mean"  # of ½·z² over all scales, or of the map
    map_from: Literal["largest", "all"] = "largest"  # scale; all: their product


@dataclass(frozen=True)
class UFlowModel(BackboneKeys):
    """Section `model` when `flow: uflow`; keys that FastFlow has too mean the same."""

    flow: Literal["uflow"] = "uflow"
    steps: int = 4
    hidden_ratio: float = 1.0
    permute: Literal["hard", "soft"] = "hard"
    clamp: Literal["tanh", "tanh_scaled", "atan"] = "tanh"
    alpha: float = 2.0
    norm: Literal["layer", "none"] = "layer"
    loss: Literal["per_sample", "batch_sum"] = "per_sample"  # batch_sum: the code of 2022
    init: Literal["torch", "paddle"] = "torch"
    score: Literal["probability", "energy", "nll"] = "probability"
    align_corners: bool = False
    blur_sigma: float = 0.0
    score_from: Literal["sharp", "smooth"] = "sharp"


ModelSection = FastFlowModel | CFlowModel | CSFlowModel | UFlowModel
MODEL_SECTIONS: dict[str, type[ModelSection]] = {
    "fastflow": FastFlowModel,
    "cflow": CFlowModel,
    "csflow": CSFlowModel,
    "uflow": UFlowModel,
}


@dataclass(frozen=True)
class DataSection:
    """Section `data`."""

    root: str = "data"
    # how the folders of a category are arranged; auto: as what they look like
    layout: Literal[
        "auto", "mvtec", "mvtec2", "visa", "btad", "mpdd", "mtd", "kolektor", "folder"
    ] = "auto"
    # pil: antialiased bilinear; lanczos: antialiased Lanczos; cv2: plain bilinear
    resize: Literal["pil", "lanczos", "cv2"] = "pil"
    rotation: float = 0.0  # training images are turned by up to so many degrees, at random
    # share of train/good that selects the model and fits thresholds, where there is no validation/
    holdout: float = 0.1
    workers: int = 2  # threads that read images
    cache: bool = True  # keep the frozen features of the training images on disk
    cache_dir: str = ".feature_cache"
    features: str | None = None  # folder of extract_features.py to train from, without images


@dataclass(frozen=True)
class TrainSection:
    """Section `train`."""

    epochs: int = 500  # the papers' meta epochs: after each one, checkpoints and new rate
    sub_epochs: int = 1  # passes over the training images that make an epoch
    batch_size: int = 32
    drop_last: bool = False  # leave out a last batch that is not full
    fiber_batch: int = 0  # cflow: a step for so many fibres of a level; 0: for whole maps
    fiber_remainder: Literal["drop", "merge"] = "drop"  # fibres that fill no batch of their own
    lr: float = 1e-3
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    schedule_epochs: int = 0  # when the rate reaches its end; 0: train.epochs
    final_lr: float = 0.0  # the schedule's end, as a share of train.lr
    warmup_epochs: int = 0  # the rate rises linearly over these, step by step, from a tenth
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam
    epsilon: float = 1e-8  # of Adam
    weight_decay: float = 1e-5  # coupled L2, as Adam of both frameworks has it
    clip_norm: float | None = None  # gradients' global norm
    patience: int = 0  # stop after so many epochs without a better selection value; 0: never
    select_on: Literal["holdout", "test"] = "holdout"  # what `best` follows
    test_epochs: int = 1  # epochs between evaluations on test images, if something asks for them
    best_by: tuple[str, ...] = ()  # also keep the best on test by auroc, aupro or miou (of pixels)
    seed: int = 0
    amp: bool = False  # half precision, GPU only
    log_every: int = 10  # steps


@dataclass(frozen=True)
class EvalSection:
    """Section `eval`."""

    batch_size: int = 32
    size: Literal["input", "256", "original"] = "input"  # where pixel metrics are computed
    # cflow: what likelihoods are compared with: the peaks stored at training, or (published
    # figures) those of all test images, or of each batch of them
    norm: Literal["calibrated", "dataset", "batch"] = "calibrated"
    image_threshold: str = "percentile:99"  # of held-out normal images, or fixed:0.8, or nfa
    pixel_threshold: str = "percentile:99.9"  # of held-out normal pixels, or fixed:0.8, fair, nfa


@dataclass(frozen=True)
class NfaSection:
    """Section `nfa`: the a-contrario test of U-Flow on the latents of any flow."""

    method: Literal["none", "tree", "block"] = "none"
    tail: Literal["upper", "both"] = "upper"  # tree; both: the reference code
    tests: Literal["total", "by_size"] = "total"  # tree: what the number of tests counts
    calibrate: bool = True  # tree: fit the null hypothesis to held-out normals
    window: int = 5  # block: positions a side on the finest scale
    probability: float = 0.9  # block: quantile that a latent exceeds
    high_precision: bool = False  # block: counts are not rounded down


@dataclass(frozen=True)
class ExportSection:
    """Section `export`."""

    dir: str = "deploy/inference"


SECTIONS: dict[str, type] = {
    "data": DataSection,
    "train": TrainSection,
    "eval": EvalSection,
    "nfa": NfaSection,
    "export": ExportSection,
}
