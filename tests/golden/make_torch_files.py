"""Write torch_files/*: what PyTorch and Lightning save, and expected.npz, the arrays in it.

Run `python -m tests.golden.make_torch_files` with PyTorch, torchvision and Lightning installed.
"""

import enum
import importlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).with_name("torch_files")
DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
    "uint16", "uint32", "uint64", "bool", "complex64", "complex128",
)  # fmt: skip


class Scale(enum.Enum):
    """An object of a module that no reader knows."""

    SMALL = 1


def main() -> None:
    torch = importlib.import_module("torch")
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    FOLDER.mkdir(exist_ok=True)
    expected: dict[str, np.ndarray] = {}
    for name, content in (("dtypes", dtypes(torch)), ("views", views(torch))):
        torch.save(content, FOLDER / f"{name}.pt")
        torch.save(content, FOLDER / f"{name}_legacy.pt", _use_new_zipfile_serialization=False)
        expected |= {f"{name}.{key}": as_numpy(torch, value) for key, value in content.items()}
    torch.serialization.set_crc32_options(False)
    torch.save(views(torch), FOLDER / "views_without_sums.pt")
    torch.serialization.set_crc32_options(True)
    for name, content in refused(torch).items():
        torch.save(content, FOLDER / f"refused_{name}.pt")
    program = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(program, FOLDER / "refused_program.pt")
    expected |= {f"lightning.{key}": value for key, value in lightning(torch).items()}
    np.savez_compressed(FOLDER / "expected.npz", **expected)  # type: ignore[arg-type]
    print(sum(file.stat().st_size for file in FOLDER.iterdir()), "bytes in", FOLDER.name)


def as_numpy(torch: Any, tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return tensor.resolve_conj().resolve_neg().numpy()


def dtypes(torch: Any) -> dict[str, Any]:
    """Some of each type, an empty one and a scalar."""
    made = {name: torch.arange(-2, 10).reshape(3, 4).to(getattr(torch, name)) for name in DTYPES}
    return {**made, "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}


def views(torch: Any) -> dict[str, Any]:
    """Tensors that share two storages."""
    base = torch.arange(24.0).reshape(4, 6)
    half = torch.arange(8).to(torch.bfloat16)
    return {
        "base": base, "row": base[1], "column": base[:, 2], "transposed": base.T,
        "strided": base[::2, 1::3], "expanded": base[0].expand(3, 6),
        "parameter": torch.nn.Parameter(base), "half": half, "half_end": half[5:],
        "conjugate": torch.complex(base, base + 1)[2:].conj(),
    }  # fmt: skip


def refused(torch: Any) -> dict[str, Any]:
    """What is no plain tensor, and whole objects."""
    square = torch.eye(2)
    return {
        "sparse": {"w": square.to_sparse()},
        "quantized": {"w": torch.quantize_per_tensor(square, 0.1, 0, torch.quint8)},
        "float8": {"w": square.to(torch.float8_e4m3fn)},
        "meta": {"w": torch.empty(2, device="meta")},
        "module": torch.nn.Linear(2, 2),
        "own_class": {"state_dict": {"w": square}, "scale": Scale.SMALL},
    }


def lightning(torch: Any) -> dict[str, np.ndarray]:
    """Train a tiny module for two steps; return its state dict."""
    pl = importlib.import_module("lightning.pytorch")
    transforms = importlib.import_module("torchvision.transforms.v2")
    module_class: Any = pl.LightningModule
    callback_class: Any = pl.Callback

    class Tiny(module_class):
        def __init__(self, **settings: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))

        def training_step(self, batch: Any, _: int) -> Any:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.1)

    class Count(callback_class):
        def state_dict(self) -> dict[str, Any]:
            return {"best": np.float64(0.25), "history": [1, 2.5], "score": torch.tensor(0.5)}

    data = torch.utils.data.TensorDataset(torch.rand(8, 3))
    module = Tiny(
        width=3,
        path=Path("some/where"),
        dtype=torch.float32,
        pre_processor=transforms.Compose([transforms.Resize(8)]),
        mode=transforms.InterpolationMode.BILINEAR,
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=2, logger=False, callbacks=[Count()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    buffer = io.BytesIO()
    torch.save(trainer._checkpoint_connector.dump_checkpoint(), buffer)
    (FOLDER / "lightning.ckpt").write_bytes(buffer.getvalue())
    return {key: as_numpy(torch, value) for key, value in module.state_dict().items()}


if __name__ == "__main__":
    main()
