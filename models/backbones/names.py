"""Names of layers in the weight files of other projects, and the epsilon of their batch norms."""

import re
from collections.abc import Sequence

import numpy as np

Arrays = dict[str, np.ndarray]
Names = dict[str, str]  # of a layer: in another project's file -> here

# What training loops, and modules that hold the network, put in front of its names.
WRAPPERS = re.compile(r"^(module\.|model\.|backbone\.)+")

# Heads of efficientnet_pytorch and of timm.
EFFICIENTNET_HEAD = ("_conv_head.", "_bn1.", "_fc.", "conv_head.", "bn2.", "classifier.")

# Layers of an inverted residual block, in the order of all the tuples here. Those that a block
# does not have, or a project gives no place, are empty.
BLOCK = (
    "expand.conv", "expand.norm", "depthwise.conv", "depthwise.norm",
    "squeeze.reduce", "squeeze.expand", "project.conv", "project.norm",
)  # fmt: skip
EFFICIENTNET_PYTORCH = (
    "_expand_conv", "_bn0", "_depthwise_conv", "_bn1",
    "_se_reduce", "_se_expand", "_project_conv", "_bn2",
)  # fmt: skip
CONV_NORM = ("0", "1")  # of a convolution and its norm where they are numbered
TIMM_STEM = ("conv_stem", "bn1")
TIMM_EPSILON = 1e-5  # of the batch norms of timm's own networks; those from TensorFlow have 1e-3


def unwrapped(arrays: Arrays) -> Arrays:
    """Take off what wrappers put in front of names, unless two would become one."""
    bare = {WRAPPERS.sub("", key): array for key, array in arrays.items()}
    return bare if len(bare) == len(arrays) else arrays


def below(prefix: str, arrays: Arrays) -> Arrays:
    """Return the arrays whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}


def timm_block(expands: bool) -> Sequence[str]:
    """Return timm's names of a block's layers: it counts the norms, and names by the order."""
    squeeze = ("se.conv_reduce", "se.conv_expand")
    if expands:
        return ("conv_pw", "bn1", "conv_dw", "bn2", *squeeze, "conv_pwl", "bn3")
    return ("", "", "conv_dw", "bn1", *squeeze, "conv_pw", "bn2")


def torchvision_block(expands: bool, squeezes: bool) -> Sequence[str]:
    """Return torchvision's names of a block's layers: it counts those that there are."""
    depthwise = int(expands)
    project = depthwise + 1 + squeezes
    return (
        *(("block.0.0", "block.0.1") if expands else ("", "")),
        *(f"block.{depthwise}.{layer}" for layer in (0, 1)),
        *(f"block.{depthwise + 1}.{layer}" for layer in ("fc1", "fc2")),
        *(f"block.{project}.{layer}" for layer in (0, 1)),
    )


def staged(pattern: str, sizes: Sequence[int]) -> list[str]:
    """Number blocks by stage and place, both from 0; `pattern` has a field for each."""
    return [pattern.format(stage, place) for stage, n in enumerate(sizes) for place in range(n)]


def efficientnet(sizes: Sequence[int]) -> Names:
    """Return the names of efficientnet_pytorch and timm; the first stage does not expand."""
    stem = ("stem.conv", "stem.norm")
    known = pair("", ("_conv_stem", "_bn0"), "", stem) | pair("", TIMM_STEM, "", stem)
    for number, block in enumerate(staged("blocks.{}.{}.", sizes)):
        own = f"blocks.{number}."
        known |= pair(f"_blocks.{number}.", EFFICIENTNET_PYTORCH, own, BLOCK)
        known |= pair(block, timm_block(expands=number >= sizes[0]), own, BLOCK)
    return known


def pair(foreign: str, layers: Sequence[str], own: str, own_layers: Sequence[str]) -> Names:
    """Match layers, each called by a prefix and its own name, there and here."""
    pairs = zip(layers, own_layers, strict=True)
    return {f"{foreign}{layer}": f"{own}{own_layer}" for layer, own_layer in pairs if layer}


def rename(arrays: Arrays, names: Names) -> Arrays:
    """Give layers their names here; others keep theirs."""
    renamed = {}
    for key, array in arrays.items():
        layer, dot, leaf = key.rpartition(".")
        renamed[names.get(layer, layer) + dot + leaf] = array
    return renamed


def with_epsilon(arrays: Arrays, theirs: float, own: float) -> Arrays:
    """Let batch norms with epsilon `own` do what they did with `theirs`, through their scale.

    The scale becomes γ·√((σ² + own) / (σ² + theirs)), which is exact for every variance.
    """
    scaled = dict(arrays)
    for key, variance in arrays.items():
        weight = f"{key.removesuffix('_variance')}weight"
        if key.endswith("._variance") and weight in arrays:
            variance = variance.astype(np.float64)
            ratio = np.sqrt((variance + own) / (variance + theirs))
            scaled[weight] = (arrays[weight] * ratio).astype(np.float32)
    return scaled
