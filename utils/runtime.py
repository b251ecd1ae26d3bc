"""The machine: device, threads, versions, seeds."""

import os
import platform
import sys
import warnings
from importlib import metadata

from utils.errors import UserError


def prepare() -> None:
    """Silence what users cannot act on; call before Paddle is imported for the first time."""
    for message in ("No ccache found", "When training, we now always track global mean"):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    os.environ.setdefault("GLOG_minloglevel", "2")


def use_device(name: str) -> str:
    """Select `cpu`, `gpu`, `gpu:N` or `auto` (a GPU if Paddle has one); return what is used."""
    import paddle

    available = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    if name == "auto":
        name = "gpu" if available else "cpu"
    if name != "cpu" and not (name == "gpu" or name.startswith("gpu:")):
        raise UserError(f"--device {name}: choose auto, cpu, gpu or gpu:N")
    if name != "cpu" and not paddle.is_compiled_with_cuda():
        raise UserError(
            f"--device {name}: this Paddle build has no GPU support; install paddlepaddle-gpu "
            "(see README) or use --device cpu"
        )
    if name != "cpu" and not available:
        raise UserError(f"--device {name}: no GPU found on this machine; use --device cpu")
    try:
        paddle.device.set_device(name)
    except ValueError as error:
        raise UserError(f"--device {name}: {' '.join(str(error).split())}") from None
    return str(paddle.device.get_device())


def peak_memory() -> int | None:
    """Return the most memory that this process has held so far, in MB; None where it is unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 10**6


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("paddlepaddle", "paddlepaddle-gpu", "numpy", "scipy", "opencv-python-headless")
    found = {"python": platform.python_version()}
    for package in (*packages, "pillow"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
