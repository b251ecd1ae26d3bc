"""Where pretrained weights come from: a given file, the bundle, Paddle's cache, the network."""

import hashlib
import os
import re
import sys
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urljoin

import numpy as np

from utils.download import fetch, file_hash
from utils.errors import UserError
from utils.safe_pickle import read_pdparams
from utils.weight_file import WeightFile, read_weight_file, tensors

from .base import Backbone
from .names import Arrays, below, unwrapped

BUNDLED = Path(__file__).resolve().parents[2] / "pretrained"
BUNDLED_NAME = "efficientnet_lite0"
CACHE = Path("~/.cache/paddle/hapi/weights")  # shared with paddle.vision
BASE_URL = "https://paddle-hapi.bj.bcebos.com/models/"
BASE_URL_VARIABLE = "FLOWAD_WEIGHTS_URL"
LARGEST = 4 * 10**9  # bytes of a file; CaiT-M48 has 1.4 GB
CLAS_URL = "https://paddle-imagenet-models-name.bj.bcebos.com/dygraph/"
CAIT_URL = "https://passl.bj.bcebos.com/vision_transformers/cait/"
# File at BASE_URL, or URL, and md5. Those of paddle.vision.models come with an md5; PaddleClas
# and PASSL publish none.
PUBLISHED: dict[str, tuple[str, str | None]] = {
    "resnet18": ("resnet18.pdparams", "cf548f46534aa3560945be4b95cd11c4"),
    "wide_resnet50_2": ("wide_resnet50_2.pdparams", "0282f804d73debdab289bd9fea3fa6dc"),
    "mobilenet_v2": ("mobilenet_v2_x1.0.pdparams", "0340af0a901346c8d46f4529882fb63d"),
    "mobilenet_v3_large": (
        "mobilenet_v3_large_x1.0.pdparams",
        "118db5792b4e183b925d8e8e334db3df",
    ),
    "efficientnet_b5": (f"{CLAS_URL}EfficientNetB5_pretrained.pdparams", None),
    "deit_base_distilled_384": (
        f"{CLAS_URL}DeiT_base_distilled_patch16_384_pretrained.pdparams",
        None,
    ),
    "cait_m48_448": (f"{CAIT_URL}cait_m48_448.pdparams", None),
    "cait_s24_224": (f"{CAIT_URL}cait_s24_224.pdparams", None),
}


@dataclass(frozen=True)
class WeightInfo:
    """Tell where weights came from.

    Attributes:
        source: a path, a URL, or `seed N`.
        origin: `file`, `bundled`, `cache`, `download` or `random`.
        sha256: of the file; of the arrays when random.
    """

    source: str
    origin: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.source} ({self.origin}, sha256 {self.sha256[:12]})"


def load_weights(
    backbone: Backbone,
    source: Path | None = None,
    *,
    allow_random: bool = False,
    seed: int = 0,
    base_url: str | None = None,
) -> WeightInfo:
    """Fill `backbone`, set its `weight_hash`, and print the choice to stderr.

    Taken is the first that exists: `source`; `pretrained/<name>.safetensors`; Paddle's cache, if
    the md5 is right; with `allow_random` seeded random weights, else a download into that cache.
    `base_url` (default: the environment variable FLOWAD_WEIGHTS_URL, else the publisher's server)
    ends in a slash. Where no md5 is published, the file is taken as it is and its sha256 printed.
    A backbone of several networks finds each by its own name, or all in one `source`, under the
    prefixes of `Backbone.parts`. Raise `UserError` if nothing is found or if names or shapes do
    not fit.
    """
    if source is not None:
        infos = [_load_file(backbone, source)]
    else:
        parts = backbone.parts().values()
        infos = [_load_named(part, allow_random, seed, base_url) for part in parts]
    backbone.weight_hash = _joined([part.weight_hash for part in backbone.parts().values()])
    origins = dict.fromkeys(info.origin for info in infos)
    return WeightInfo(
        " and ".join(info.source for info in infos),
        "random" if "random" in origins else " and ".join(origins),
        _joined([info.sha256 for info in infos]),
    )


def read_weights(path: Path) -> Arrays:
    """Read the state dict in a file of weights of any form, as `state_dict` does."""
    return state_dict(read_weight_file(path))


def state_dict(file: WeightFile) -> Arrays:
    """Return the state dict in a file of weights, name -> array.

    The names that PyTorch gives to the statistics of batch norms become Paddle's; counters and
    what wrappers put in front of all names go.
    """
    try:
        arrays = tensors(file.content)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
    for torch_name, name in (("running_mean", "_mean"), ("running_var", "_variance")):
        arrays = {re.sub(rf"\b{torch_name}$", name, key): a for key, a in arrays.items()}
    return unwrapped({k: a for k, a in arrays.items() if not k.endswith(".num_batches_tracked")})


def fit(backbone: Backbone, arrays: Arrays, source: str) -> tuple[Arrays, list[str]]:
    """Bring what `read_weights` gives to the names and layouts of `backbone`, as float32.

    Names carry the prefixes of `Backbone.parts`. Return also the names of what it does not use.
    Raise `UserError` if names or shapes do not fit.
    """
    parts = backbone.parts()
    strays = [key for key in arrays if not key.startswith(tuple(parts))]
    if strays:
        raise UserError(
            f"{source}: does not fit backbone {backbone.name}: keys begin with "
            f"{' or '.join(parts)}, unlike {', '.join(strays[:3])}; join a file of each with "
            f"python -m convert backbone FILE FILE --arch {backbone.name}"
        )
    fitted: Arrays = {}
    unused: list[str] = []
    for prefix, part in parts.items():
        found, rest = _fit_part(part, below(prefix, arrays), source)
        fitted |= {prefix + key: array for key, array in found.items()}
        unused += [prefix + key for key in rest]
    return fitted, unused


def _load_file(backbone: Backbone, source: Path) -> WeightInfo:
    arrays, _ = fit(backbone, read_weights(source), str(source))
    for prefix, part in backbone.parts().items():
        _fill(part, below(prefix, arrays))
    info = WeightInfo(str(source), "file", file_hash(source, "sha256"))
    print(f"backbone {backbone.name}: weights from {info}", file=sys.stderr)
    return info


def _load_named(
    backbone: Backbone, allow_random: bool, seed: int, base_url: str | None
) -> WeightInfo:
    found = _find(backbone.name)
    note = ""
    if found is None and allow_random:
        _fill(backbone, _random_arrays(backbone, seed))
        info = WeightInfo(f"seed {seed}", "random", backbone.weight_hash)
    else:
        path, shown, origin = found or _download(backbone.name, base_url)
        _fill(backbone, fit(backbone, read_weights(path), str(path))[0])
        info = WeightInfo(shown, origin, file_hash(path, "sha256"))
        if origin != "bundled" and PUBLISHED[backbone.name][1] is None:
            note = f"; unverified, as no md5 is published: its sha256 is {info.sha256}"
    print(f"backbone {backbone.name}: weights from {info}{note}", file=sys.stderr)
    return info


def _joined(hashes: list[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _find(name: str) -> tuple[Path, str, str] | None:
    """Return path, the name to show and origin of weights on this machine."""
    bundled = BUNDLED / f"{name}.safetensors"
    if bundled.is_file():
        return bundled, str(bundled), "bundled"
    if name in PUBLISHED:
        address, md5 = PUBLISHED[name]
        cached = CACHE.expanduser() / _file_name(address)
        if cached.is_file() and md5 in (None, file_hash(cached, "md5")):
            return cached, str(cached), "cache"
    return None


def _download(name: str, base_url: str | None) -> tuple[Path, str, str]:
    """Fetch published weights into the cache; return what `_find` does."""
    if name not in PUBLISHED:
        raise UserError(
            f"no weights for backbone {name}: they are published nowhere and "
            f"{BUNDLED / name}.safetensors is missing; restore that file or give a path"
        )
    address, md5 = PUBLISHED[name]
    server = base_url or os.environ.get(BASE_URL_VARIABLE)
    url = server + _file_name(address) if server else urljoin(BASE_URL, address)
    path = CACHE.expanduser() / _file_name(address)
    try:
        fetch(url, path, LARGEST, partial(_check_received, md5=md5))
    except UserError as error:
        raise UserError(
            f"no weights for backbone {name}: {error}; put that file"
            f"{f', with md5 {md5},' if md5 else ''} at {path}, or use the bundled weights: "
            f"model.backbone: {BUNDLED_NAME}"
        ) from None
    return path, url, "download"


def _check_received(path: Path, md5: str | None) -> None:
    if md5 and file_hash(path, "md5") != md5:
        raise UserError(f"the file received does not have md5 {md5}")
    try:  # a page of a proxy must not stay in the cache
        read_pdparams(path)
    except UserError:
        raise UserError("the file received holds no weights") from None


def _file_name(address: str) -> str:
    return address.rpartition("/")[2]


def _fit_part(backbone: Backbone, arrays: Arrays, source: str) -> tuple[Arrays, list[str]]:
    arrays = backbone.translate(arrays)
    own = backbone.state_dict()
    unused = [key for key in arrays if key not in own and backbone.is_unused_key(key)]
    missing = [key for key in own if key not in arrays]
    extra = [key for key in arrays if key not in own and key not in unused]
    wrong = [
        f"{key} {list(arrays[key].shape)} instead of {list(tensor.shape)}"
        for key, tensor in own.items()
        if key in arrays and list(arrays[key].shape) != list(tensor.shape)
    ]
    problems = [
        f"{what} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for what, keys in (("missing", missing), ("unknown", extra), ("wrong shape", wrong))
        if keys
    ]
    if problems:
        raise UserError(f"{source}: does not fit backbone {backbone.name}: {'; '.join(problems)}")
    return {key: np.ascontiguousarray(arrays[key], np.float32) for key in own}, unused


def _fill(backbone: Backbone, arrays: Arrays) -> None:
    own = backbone.state_dict()
    digest = hashlib.sha256()
    for key in sorted(own):
        own[key].set_value(arrays[key])
        digest.update(f"{key} {arrays[key].shape}".encode() + arrays[key].tobytes())
    backbone.weight_hash = digest.hexdigest()


def _random_arrays(backbone: Backbone, seed: int) -> dict[str, np.ndarray]:
    """Draw kernels from N(0, 2 / fan_in), and what transformers need; keep the rest as it is.

    Matrices come from N(0, 1 / fan_in), embeddings from N(0, 0.02²). Biases, norms and scales
    stay. The draw depends on the seed and the name alone, so not on the chosen strides.
    """
    arrays = {key: tensor.numpy() for key, tensor in backbone.state_dict().items()}
    for key, array in arrays.items():
        if spread := _spread(array):
            rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
            noise = rng.standard_normal(array.shape, dtype=np.float32)
            arrays[key] = (spread * noise).astype(np.float32)
    return arrays


def _spread(array: np.ndarray) -> float:
    if array.ndim == 4:  # kernel (C_out, C_in / groups, k, k)
        return np.sqrt(2 / array[0].size)
    if array.ndim == 2:  # matrix (C_in, C_out)
        return np.sqrt(1 / len(array))
    return 0.02 if array.ndim == 3 else 0.0  # embedding (1, N, C), or what stays
