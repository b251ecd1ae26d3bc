"""Where foreign checkpoints come from: how each is recognised, and what its names do not say."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.weight_file import tensors

from . import cflow, csflow, fastflow, uflow
from .common import Arrays, Flow

OUTSIDE = "outside:"  # in front of names that are not the network's
NAMES = ("gathierry", "anomalib", "fastflow-paddle", "cflow", "csflow", "csflow-korean", "uflow")
_ANOMALIB = rf"^{OUTSIDE}(post_processor|image_threshold|normalization_metrics)\b"
# training-time entries inside U-Flow's official files
_NO_WEIGHTS = re.compile(r"log_loss_weights|aupro|f1|mcc|iou")
AGPL = "these weights and the code they come from are under the AGPL-3.0: mind it before you share"
OLD_LOSS = (
    "the loss summed over the batch: latents have a variance below 1, with which the NFA tree is "
    "of no use; nfa.method is none, thresholds are percentiles"
)
UNKNOWN_LOSS = (
    "if the code of 2022 trained it (before January 2024), the NFA tree is of no use: add "
    "-o model.loss=batch_sum -o nfa.method=none -o eval.pixel_threshold=percentile:99.9"
)


@dataclass(frozen=True)
class Source:
    """A project whose checkpoints can be read.

    `marks` are patterns of which each must occur in the names, `without` one that must not;
    `backbone` where names of the backbone begin, the first that occurs; `presets` the shipped
    configurations, of which the one with the same backbone (else the first) is taken, with
    `settings` changed. `unit` is what our maps and scores are above theirs; None: theirs depend on
    the other images.
    """

    name: str
    title: str
    read: Callable[[Arrays, Mapping[str, Any]], Flow]
    marks: tuple[str, ...]
    presets: tuple[str, ...]
    backbone: tuple[str, ...] = ()
    without: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unit: float | None = 0.0

    def fits(self, names: list[str]) -> bool:
        """Tell whether these names are of such a checkpoint."""
        occurs = [any(re.search(mark, name) for name in names) for mark in self.marks]
        excluded = self.without and any(re.search(self.without, name) for name in names)
        return all(occurs) and not excluded


_FASTFLOW = tuple(
    f"fastflow_{name}"
    for name in ("resnet18", "wide_resnet50_2", "deit_base_distilled_384", "cait_m48_448")
)
_UFLOW = ("uflow_mcait", "uflow_resnet18", "uflow_wide_resnet50_2")
_UFLOW_BACKBONE = (
    r"feature_extractor\.(?:feature_)?extractor\.", r"feature_extractor\.(?=extractor[12]\.)",
)  # fmt: skip
SOURCES = (  # a more special one stands before a more general one
    Source(
        "anomalib", "anomalib's FastFlow", fastflow.read, (r"^fast_flow_blocks\.",), _FASTFLOW,
        (r"feature_extractor\.",), unit=1.0,
    ),
    Source(
        "fastflow-paddle", "FastFlow-Paddle", fastflow.read,
        (r"^nf_flows\..*\bsubnet_2\.",), ("resnet18",), (r"feature_extractor\.",),
        notes=("its own thresholds are --image_threshold 0.8 --pixel_threshold 0.8",),
    ),
    Source(
        "gathierry", "gathierry's FastFlow", fastflow.read, (r"^nf_flows\.",), _FASTFLOW,
        (r"feature_extractor\.",), unit=1.0,
    ),
    Source(
        "anomalib", "anomalib's CFLOW-AD", cflow.read,
        (r"^decoders\.", r"^encoder\.feature_extractor\."), ("cflow_wide_resnet50_2_anomalib",),
        (r"encoder\.feature_extractor\.",), unit=None,
    ),
    Source(
        "cflow", "official CFLOW-AD", cflow.read, (r"^decoders\.",),
        ("cflow_wide_resnet50_2", "cflow_resnet18", "cflow_mobilenet_v3_large"), (r"encoder\.",),
        unit=None,
    ),
    Source(
        "anomalib", "anomalib's CS-Flow", csflow.read,
        (r"module_list\.\d+\.cross_convolution1\.",), ("csflow_efficientnet_b5_anomalib",),
        (
            r"feature_extractor\.feature_extractor\.backbone\.",
            r"feature_extractor\.feature_extractor\.feature_extractor\.",
        ),
    ),
    Source(
        "csflow-korean", "CS-Flow's Korean fork", csflow.read, (r"module_list\.4\.s1\.",),
        ("csflow_efficientnet_b5_korean",), without=r"module_list\.6\.",
    ),
    Source(
        "csflow", "official CS-Flow", csflow.read, (r"module_list\.\d+\.s1\.",),
        ("csflow_efficientnet_b5",),
    ),
    Source(
        "anomalib", "anomalib's U-Flow", uflow.read,
        (r"^flow\.module_list\.", rf"^feature_extractor\.feature_extractor\.|{_ANOMALIB}"), _UFLOW,
        _UFLOW_BACKBONE,
        settings={
            "model.loss": "batch_sum", "nfa.method": "none",
            "eval.image_threshold": "percentile:99", "eval.pixel_threshold": "percentile:99.9",
        },
        notes=(OLD_LOSS,),
    ),
    Source(
        "uflow", "official U-Flow", uflow.read, (r"^flow\.module_list\.",), _UFLOW,
        _UFLOW_BACKBONE,
        notes=(AGPL, UNKNOWN_LOSS),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A foreign checkpoint: its source, the flow's entries, the backbone's, and all the others."""

    source: Source
    flow: dict[str, np.ndarray]
    backbone: dict[str, np.ndarray]
    outside: dict[str, np.ndarray]


def identify(content: Any, wanted: str = "auto") -> Found:
    """Tell what a file's content is; `wanted` is one of `NAMES` or `auto`.

    Raise `UserError` if it is no known checkpoint, or not one of the wanted source.
    """
    inner, outside = _entries(content)
    names = [*inner, *(OUTSIDE + name for name in outside)]
    fitting = [source for source in SOURCES if source.fits(names)]
    if not fitting:
        raise UserError(
            f"no checkpoint of {', '.join(NAMES)}: its names are like "
            f"{', '.join(list(names)[:4])}; python -m convert inspect shows all of them"
        )
    family = fitting[0].read
    chosen = [s for s in SOURCES if s.read is family and s.name == wanted] or fitting
    if wanted not in ("auto", chosen[0].name):
        raise UserError(
            f"--source {wanted}: the names are those of {fitting[0].title}; leave --source out, "
            "or take another file"
        )
    flow, backbone = _split(inner, chosen[0].backbone)
    return Found(chosen[0], flow, backbone, outside)


def _entries(content: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the entries of the network, and those beside it."""
    if isinstance(content, dict) and "decoder_state_dict" in content:  # official CFLOW-AD
        encoder = tensors(content, at=["encoder_state_dict"])
        arrays = {f"encoder.{name}": array for name, array in encoder.items()}
        for level in range(len(content["decoder_state_dict"])):
            decoder = tensors(content, at=["decoder_state_dict", str(level)])
            arrays |= {f"decoders.{level}.{name}": array for name, array in decoder.items()}
        return arrays, {}
    arrays = tensors(content)
    if not any(name.startswith("model.") for name in arrays):
        return arrays, {}
    inner, outside = {}, {}
    for name, array in arrays.items():
        if name.startswith("model.") and not _NO_WEIGHTS.search(name):
            inner[name.removeprefix("model.")] = array
        else:
            outside[name] = array
    return inner, outside


def _split(
    arrays: Arrays, prefixes: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the flow's entries and the backbone's; a copy of those under another prefix goes."""
    flow = dict(arrays)
    copies = []
    for prefix in prefixes:
        own = {name: match.end() for name in arrays if (match := re.match(prefix, name))}
        copies.append({name[end:]: flow.pop(name) for name, end in own.items() if name in flow})
    return flow, next((copy for copy in copies if copy), {})
