"""The machine: device, threads, versions, seeds."""

import ctypes
import os
import platform
import sys
import warnings
from importlib import metadata

from utils.errors import UserError

THREADS = "OMP_NUM_THREADS"  # environment variable of OpenMP; Paddle sets it to 1 on its import
AUTOTUNE = "FLAGS_cudnn_exhaustive_search"
MOST_THREADS = 8  # small tensors gain nothing from more
_MMAP_MAX, _TRIM_THRESHOLD, _NEVER = -4, -1, -1  # mallopt(3) of the GNU C library
_free = False  # whether the number of threads is ours to choose


def prepare() -> None:
    """Silence what users cannot act on, and keep memory that was freed, for the next tensors.

    Call before Paddle is imported for the first time.
    """
    global _free
    _keep_memory()
    _free = THREADS not in os.environ
    for message in ("No ccache found", "When training, we now always track global mean"):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    os.environ.setdefault("GLOG_minloglevel", "2")


def _keep_memory() -> None:
    """Let the C library reuse large blocks, which it would give back to the system after each use.

    Getting 8 MB anew costs a page fault every 4 KB: ten times as long as filling them. Where the
    environment has a setting for the C library's memory, nothing is changed.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or chosen:
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
    if set_option is not None:
        set_option(_MMAP_MAX, 0)
        set_option(_TRIM_THRESHOLD, _NEVER)


def use_device(name: str) -> str:
    """Select `cpu`, `gpu`, `gpu:N` or `auto` (a GPU if Paddle has one); return what is used.

    On a CPU all cores work, up to `MOST_THREADS`, unless the environment says how many.
    """
    import paddle

    if _free:  # OpenMP reads it at the first operation; before the import, Paddle would complain
        os.environ[THREADS] = str(min(_cores(), MOST_THREADS))
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
    if name != "cpu" and AUTOTUNE not in os.environ:
        paddle.set_flags({AUTOTUNE: True})  # shapes stay the same, so a search pays
    return str(paddle.device.get_device())


def threads() -> int:
    """Return how many threads compute on a CPU."""
    text = os.environ.get(THREADS, "1")
    return int(text) if text.isdecimal() and int(text) else 1


def _cores() -> int:
    """Return the number of cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(allowed(0)) if allowed else os.cpu_count() or 1


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
