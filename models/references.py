"""Numbers of a flow's parameters that papers and reference code state, to set beside ours."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Reference(NamedTuple):
    """Hold a stated count and the settings of section `model` for which it is stated."""

    flow: str
    backbone: str
    settings: dict[str, Any]
    parameters: str
    source: str


OFFICIAL_CFLOW = {"steps": 8, "code_channels": 128}
# Frozen permutations and the norms in front of a flow are not part of these counts.
REFERENCES = (
    Reference("fastflow", "resnet18", {"conv3x3_only": True}, "4.9 M", "paper"),
    Reference("fastflow", "wide_resnet50_2", {"conv3x3_only": False}, "41.3 M", "paper"),
    Reference("fastflow", "deit_base_distilled_384", {"steps": 20}, "7,074,500", "PyTorch code"),
    Reference("fastflow", "cait_m48_448", {"steps": 20}, "7,074,500", "PyTorch code"),
    Reference("cflow", "wide_resnet50_2", OFFICIAL_CFLOW, "81,647,616", "official code"),
    Reference("cflow", "resnet18", OFFICIAL_CFLOW, "8,620,032", "official code"),
    Reference("cflow", "mobilenet_v3_large", OFFICIAL_CFLOW, "2,557,440", "official code"),
    Reference(
        "csflow", "efficientnet_b5", {"blocks": 4, "hidden": 1024}, "275,227,288", "official code"
    ),
    Reference(
        "csflow", "efficientnet_b5", {"blocks": 1, "hidden": 512}, "66,157,734", "Korean fork"
    ),
    Reference("uflow", "mcait", {"steps": 4}, "12,216,480", "official code"),
    Reference("uflow", "resnet18", {"steps": 4}, "1,479,880", "official code"),
    Reference("uflow", "wide_resnet50_2", {"steps": 4}, "23,594,080", "official code"),
)


def published_count(model: Mapping[str, Any]) -> str:
    """Return the count stated for this section `model` with its source, or an empty text."""
    for entry in REFERENCES:
        same_kind = (entry.flow, entry.backbone) == (model["flow"], model["backbone"])
        if same_kind and all(model[key] == value for key, value in entry.settings.items()):
            return f"{entry.parameters} ({entry.source})"
    return ""
