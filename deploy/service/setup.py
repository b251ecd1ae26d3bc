"""From the command line to a service: bundles, limits, token."""

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from deploy.bundle import Bundle, read_bundle
from deploy.engines import EngineOptions
from deploy.service.engine_process import EngineProcess
from deploy.service.limits import MOST_MEGAPIXELS, Limits
from deploy.service.metrics import Metrics
from deploy.service.models import Model
from deploy.service.service import Service
from utils.errors import UserError

# On a CPU, FastFlow on EfficientNet-Lite0 takes over a quarter longer per image in batches of 8
# than one by one.
CPU_BATCH, GPU_BATCH = 1, 8
TOKEN = "FLOWAD_TOKEN"  # the environment variable


def new_service(args: Namespace) -> Service:
    """Read all bundles; the engines start when the service starts."""
    if args.max_megapixels > MOST_MEGAPIXELS:
        raise UserError(f"--max_megapixels {args.max_megapixels}: at most {MOST_MEGAPIXELS}")
    if args.max_images > args.queue:
        raise UserError(f"--max_images {args.max_images}: more than --queue {args.queue} can hold")
    limits = Limits(
        body_bytes=args.max_body_mb * 1_000_000, pixels=args.max_megapixels * 1_000_000,
        images=args.max_images, waiting=args.queue, seconds=args.time_limit,
    )  # fmt: skip
    most = args.max_batch_size or (GPU_BATCH if args.use_gpu else CPU_BATCH)
    options = EngineOptions(
        use_gpu=args.use_gpu, gpu_id=args.gpu_id, cpu_threads=args.cpu_threads,
        onednn=args.enable_mkldnn, engine=args.engine, precision=args.precision,
        tensorrt=args.use_tensorrt, max_batch_size=most,
    )  # fmt: skip
    metrics, patience = Metrics(), args.batch_wait_ms / 1000
    models = {}
    for name, bundle in read_bundles(args.bundles).items():
        engine = EngineProcess(bundle.folder, options, sorted({1, most}), limits.seconds)
        models[name] = Model(name, bundle, engine, limits, metrics, most=most, patience=patience)
    token = read_token(args.token_file)
    return Service(limits, metrics, models, threads=args.image_threads, token=token)


def read_bundles(given: Sequence[str]) -> dict[str, Bundle]:
    """Read `[NAME=]FOLDER`s; `UserError` if two have one name."""
    found: dict[str, Bundle] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        bundle = read_bundle(folder if equals else text)
        name = name if equals else str((bundle.about.get("model") or {}).get("category") or "model")
        if not name or name in found:
            raise UserError(f"{text}: a second model '{name}'; name them, as in a={folder or text}")
        found[name] = bundle
    return found


def read_token(file: str | None) -> str | None:
    """Return the token that requests must bear, from a file or the environment; None without."""
    found = Path(file).read_text(encoding="utf-8").strip() if file else os.environ.get(TOKEN)
    if found is None:
        return None
    if not (len(found) >= 16 and found.isascii() and found.isprintable() and " " not in found):
        raise UserError("the token must be at least 16 printable ASCII characters without spaces")
    return found
