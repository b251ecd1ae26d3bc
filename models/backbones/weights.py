"""Where pretrained weights come from: a given file, the bundle, Paddle's cache, the network."""

import hashlib
import os
import re
import sys
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tqdm import tqdm

from utils.errors import UserError
from utils.files import atomic_replace
from utils.safe_pickle import read_pdparams

from .base import Backbone

BUNDLED = Path(__file__).resolve().parents[2] / "pretrained"
BUNDLED_NAME = "efficientnet_lite0"
CACHE = Path("~/.cache/paddle/hapi/weights")  # shared with paddle.vision
BASE_URL = "https://paddle-hapi.bj.bcebos.com/models/"
BASE_URL_VARIABLE = "FLOWAD_WEIGHTS_URL"
TIMEOUT = 20.0  # seconds without a byte
# file and md5, as in paddle.vision.models
PUBLISHED = {
    "resnet18": ("resnet18.pdparams", "cf548f46534aa3560945be4b95cd11c4"),
    "wide_resnet50_2": ("wide_resnet50_2.pdparams", "0282f804d73debdab289bd9fea3fa6dc"),
    "mobilenet_v2": ("mobilenet_v2_x1.0.pdparams", "0340af0a901346c8d46f4529882fb63d"),
    "mobilenet_v3_large": (
        "mobilenet_v3_large_x1.0.pdparams",
        "118db5792b4e183b925d8e8e334db3df",
    ),
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
    `base_url` (default: the environment variable FLOWAD_WEIGHTS_URL, else Paddle's server) ends
    in a slash. Raise `UserError` if nothing is found or if names or shapes do not fit.
    """
    found = _find(backbone.name, source)
    if found is None and allow_random:
        _fill(backbone, _random_arrays(backbone, seed), "random weights")
        info = WeightInfo(f"seed {seed}", "random", backbone.weight_hash)
    else:
        path, shown, origin = found or _download(backbone.name, base_url)
        _fill(backbone, read_weights(path), str(path))
        info = WeightInfo(shown, origin, _digest(path, "sha256"))
    print(f"backbone {backbone.name}: weights from {info}", file=sys.stderr)
    return info


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Read a `.safetensors`, `.npz` or `.pdparams` file, name -> array; nothing is executed.

    The names that PyTorch gives to the statistics of batch norms become Paddle's.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; it should hold backbone weights")
    if path.suffix not in READERS:
        raise UserError(f"{path}: unknown suffix; backbone weights are {', '.join(READERS)} files")
    try:
        arrays = READERS[path.suffix](path)
    except UserError:
        raise
    except Exception as error:  # a damaged file can break the readers in any way
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: damaged {path.suffix} file ({reason}); copy it again") from None
    for torch_name, name in (("running_mean", "_mean"), ("running_var", "_variance")):
        arrays = {re.sub(rf"\b{torch_name}$", name, key): a for key, a in arrays.items()}
    return {k: a for k, a in arrays.items() if not k.endswith(".num_batches_tracked")}


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".safetensors": load_file,
    ".npz": _read_npz,
    ".pdparams": read_pdparams,
}


def _find(name: str, source: Path | None) -> tuple[Path, str, str] | None:
    """Return path, the name to show and origin of weights on this machine."""
    if source is not None:
        return source, str(source), "file"
    bundled = BUNDLED / f"{name}.safetensors"
    if bundled.is_file():
        return bundled, str(bundled), "bundled"
    if name in PUBLISHED:
        file, md5 = PUBLISHED[name]
        cached = CACHE.expanduser() / file
        if cached.is_file() and _digest(cached, "md5") == md5:
            return cached, str(cached), "cache"
    return None


def _download(name: str, base_url: str | None) -> tuple[Path, str, str]:
    """Fetch published weights into the cache; return what `_find` does."""
    if name not in PUBLISHED:
        raise UserError(
            f"no weights for backbone {name}: they are published nowhere and "
            f"{BUNDLED / name}.safetensors is missing; restore that file or give a path"
        )
    file, md5 = PUBLISHED[name]
    url = (base_url or os.environ.get(BASE_URL_VARIABLE) or BASE_URL) + file
    path = CACHE.expanduser() / file
    try:
        with atomic_replace(path) as temporary:
            _fetch(url, temporary)
            if _digest(temporary, "md5") != md5:
                raise ConnectionError(f"the file received does not have md5 {md5}")
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(
            f"no weights for backbone {name}: {url} failed ({error}); put that file, with "
            f"md5 {md5}, at {path}, or use the bundled weights: model.backbone: {BUNDLED_NAME}"
        ) from None
    return path, url, "download"


def _fetch(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, path.open("wb") as file:
        size = int(response.headers.get("Content-Length", 0))
        with tqdm(total=size or None, unit="B", unit_scale=True, desc=url) as progress:
            while block := response.read(1 << 20):
                progress.update(file.write(block))
        if file.tell() < size:
            raise ConnectionError(f"connection lost after {file.tell()} of {size} bytes")


def _fill(backbone: Backbone, arrays: dict[str, np.ndarray], source: str) -> None:
    own = backbone.state_dict()
    missing = [key for key in own if key not in arrays]
    extra = [key for key in arrays if key not in own and not backbone.is_unused_key(key)]
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
    digest = hashlib.sha256()
    for key in sorted(own):
        array = np.ascontiguousarray(arrays[key], dtype=np.float32)
        own[key].set_value(array)
        digest.update(f"{key} {array.shape}".encode() + array.tobytes())
    backbone.weight_hash = digest.hexdigest()


def _random_arrays(backbone: Backbone, seed: int) -> dict[str, np.ndarray]:
    """Draw kernels from N(0, 2 / fan_in); keep biases, norms and statistics as they are.

    The draw depends on the seed and the name alone, so not on the chosen strides.
    """
    arrays = {key: tensor.numpy() for key, tensor in backbone.state_dict().items()}
    for key, array in arrays.items():
        if array.ndim == 4:  # (C_out, C_in / groups, k, k)
            rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
            scale = np.sqrt(2 / array[0].size)
            arrays[key] = scale * rng.standard_normal(array.shape, dtype=np.float32)
    return arrays


def _digest(path: Path, method: str) -> str:
    digest = hashlib.new(method, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
