"""What the values of a configuration must fulfil, alone and together."""

import itertools
from typing import TYPE_CHECKING

from metrics.threshold import parse_policy
from utils.errors import UserError
from utils.schema import CFlowModel, CSFlowModel, ModelSection, TrainSection, UFlowModel

if TYPE_CHECKING:
    from utils.config import Config

BEST_BY = ("auroc", "aupro", "miou")  # of pixels, on test images


def check(config: "Config", where: str) -> None:
    """Raise `UserError` for the first rule that the configuration breaks."""
    _check_numbers(config, where)
    _check_sizes(config.model, where)
    _check_nfa(config, where)
    data, train, settings = config.data, config.train, config.eval
    if not 0 < data.holdout < 1:
        raise UserError(f"{where}: data.holdout is {data.holdout}; it must lie between 0 and 1")
    if data.features and data.rotation:
        raise UserError(
            f"{where}: data.rotation turns images, but data.features holds their features, "
            "extracted before; set one of them only"
        )
    if needs_test(train) and 0 < train.patience < train.test_epochs:
        raise UserError(
            f"{where}: train.patience {train.patience} ends a run before the first evaluation at "
            f"train.test_epochs {train.test_epochs}; raise the former or lower the latter"
        )
    for name in train.best_by:
        if name not in BEST_BY:
            raise UserError(
                f"{where}: train.best_by names '{name}'; choose from {', '.join(BEST_BY)}"
            )
    if config.model.flow != "cflow":
        for key, value in (("train.fiber_batch", train.fiber_batch), ("eval.norm", settings.norm)):
            if value not in (0, "calibrated"):
                raise UserError(f"{where}: {key} is {value}; only model.flow cflow knows it")
    for name in ("image_threshold", "pixel_threshold"):
        policy = getattr(settings, name)
        _check_policy(f"{where}: eval.{name}", policy)
        if policy == "nfa" and config.nfa.method == "none":
            raise UserError(
                f"{where}: eval.{name} is 'nfa', but nfa.method is 'none'; set it to tree or block"
            )
    if settings.image_threshold == "fair":
        raise UserError(
            f"{where}: eval.image_threshold is 'fair', which is a rule for pixels; use percentile:q"
        )


def needs_test(train: TrainSection) -> bool:
    """Tell whether training looks at test images."""
    return train.select_on == "test" or bool(train.best_by)


_BOUNDS = {  # the least value allowed
    "train.epochs": 1, "train.sub_epochs": 1, "train.batch_size": 1, "train.log_every": 1,
    "train.test_epochs": 1, "train.patience": 0, "train.warmup_epochs": 0,
    "train.schedule_epochs": 0, "train.fiber_batch": 0, "train.final_lr": 0,
    "train.weight_decay": 0, "train.seed": 0, "eval.batch_size": 1, "data.workers": 0,
    "data.rotation": 0, "nfa.window": 2, "model.steps": 1, "model.blocks": 1, "model.hidden": 1,
    "model.last_kernel": 1, "model.blur_sigma": 0, "model.code_channels": 0,
}  # fmt: skip
_ABOVE_ZERO = (
    "train.lr", "train.epsilon", "train.clip_norm", "model.hidden_ratio", "model.alpha",
)  # fmt: skip


def _check_numbers(config: "Config", where: str) -> None:
    for key in (*_BOUNDS, *_ABOVE_ZERO):
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name, None)
        if value is None:  # a key of other flows
            continue
        if key in _BOUNDS and not value >= _BOUNDS[key]:
            raise UserError(f"{where}: {key} is {value}; it must be at least {_BOUNDS[key]}")
        if key in _ABOVE_ZERO and not value > 0:
            raise UserError(f"{where}: {key} is {value}; it must be greater than 0")
    if not all(0 <= beta < 1 for beta in config.train.betas):
        raise UserError(
            f"{where}: train.betas is {list(config.train.betas)}; both must be from 0 to below 1"
        )
    if not 0 < config.nfa.probability < 1:
        raise UserError(
            f"{where}: nfa.probability is {config.nfa.probability}; it must lie between 0 and 1"
        )


def _check_sizes(model: ModelSection, where: str) -> None:
    strides = list(model.strides)
    if not strides or strides != sorted(set(strides)) or strides[0] < 1:
        raise UserError(f"{where}: model.strides is {strides}; give increasing numbers from 1")
    coarsest = max(strides)
    if isinstance(model, UFlowModel) and any(2 * a != b for a, b in itertools.pairwise(strides)):
        raise UserError(
            f"{where}: model.strides is {strides}; U-Flow hands channels from level "
            "to level of twice the size, so each stride must be twice the one before"
        )
    if isinstance(model, CSFlowModel):
        _check_cross_scale(model, where)
        coarsest *= 4  # the image at a quarter of its size
    if isinstance(model, CFlowModel):
        _check_fibers(model, where)
    for size in model.input_size:
        if size < coarsest or size % coarsest:
            nearest = max(coarsest, round(size / coarsest) * coarsest)
            raise UserError(
                f"{where}: model.input_size {list(model.input_size)} is not a multiple of the "
                f"coarsest stride {coarsest}; use {nearest} instead of {size}"
            )


def _check_nfa(config: "Config", where: str) -> None:
    """The component tree and its null hypothesis need maps of some size at every level."""
    model = config.model
    coarsest = max(model.strides) * (4 if isinstance(model, CSFlowModel) else 1)
    if config.nfa.method != "none" and min(model.input_size) < 3 * coarsest:
        raise UserError(
            f"{where}: nfa.method {config.nfa.method} needs at least 3 rows and columns in the "
            f"coarsest map; take a model.input_size of at least {3 * coarsest}"
        )


def _check_cross_scale(model: CSFlowModel, where: str) -> None:
    if len(model.strides) > 1:
        raise UserError(
            f"{where}: model.strides is {list(model.strides)}; CS-Flow takes one tap at three "
            "sizes of the image: give one stride"
        )
    if model.last_kernel % 2 == 0:
        raise UserError(f"{where}: model.last_kernel is {model.last_kernel}; it must be odd")


def _check_fibers(model: CFlowModel, where: str) -> None:
    if model.code_channels % 4:
        raise UserError(
            f"{where}: model.code_channels is {model.code_channels}; it must be a multiple of 4"
        )
    if not 0 < model.peak_quantile <= 1:
        raise UserError(
            f"{where}: model.peak_quantile is {model.peak_quantile}; it must lie above 0, up to 1"
        )


def _check_policy(key: str, policy: str) -> None:
    try:
        name = parse_policy(policy).name
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    if name in ("f1", "youden", "zero_miss"):
        raise UserError(
            f"{key} is '{name}'; a stored threshold comes from normal images or from you, {name} "
            "is only shown in reports: use percentile:q or fixed:v"
        )
