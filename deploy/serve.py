"""Serve exported bundles over HTTP: scores, verdicts and heat maps, and a page to try them."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli
from utils.errors import UserError


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "bundles", nargs="+", metavar="[NAME=]FOLDER",
        help="bundles; a name that is left out is the category that the model was trained on",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: reachable from elsewhere")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--token_file", help="holds the bearer token; default: $FLOWAD_TOKEN")
    parser.add_argument(
        "--engine", default="paddle",
        help="paddle, onnx, openvino, or auto: the fastest that passed its comparison at export",
    )  # fmt: skip
    cli.add_flag(parser, "--use_gpu", "run on the GPU")
    parser.add_argument("--gpu_id", type=int, default=0)
    parser.add_argument("--cpu_threads", type=cli.positive, default=1, help="of each engine")
    cli.add_flag(parser, "--enable_mkldnn", "oneDNN kernels, if they pass a self-check first")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32")
    cli.add_flag(parser, "--use_tensorrt", "on NVIDIA GPUs; building its engine takes minutes")
    parser.add_argument(
        "--max_batch_size", type=cli.positive,
        help="images that are run at once; default: 8 on a GPU, 1 on a CPU, where more is slower",
    )  # fmt: skip
    parser.add_argument(
        "--batch_wait_ms", type=float, default=0,
        help="wait for more images; 0: run those that came while the engine was busy",
    )  # fmt: skip
    parser.add_argument(
        "--queue", type=cli.positive, default=64, help="images per model that may wait"
    )
    parser.add_argument("--max_images", type=cli.positive, default=64, help="of one request")
    parser.add_argument("--max_body_mb", type=cli.positive, default=16, help="of one request")
    parser.add_argument("--max_megapixels", type=cli.positive, default=50, help="of one image")
    parser.add_argument("--time_limit", type=cli.positive, default=30, help="s per request")
    parser.add_argument(
        "--image_threads", type=cli.positive, default=2, help="for decoding and drawing"
    )
    parser.add_argument(
        "--drain", type=float, default=1, help="s from SIGTERM until connections are refused"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None) -> int:
    """Serve until SIGTERM or Ctrl-C; finish what was accepted."""
    args = parse(argv)
    try:
        from deploy.service import logs
        from deploy.service.app import build
        from deploy.service.server import bound, server
        from deploy.service.setup import new_service
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed; pip install -r requirements-service.txt"
        ) from None
    service = new_service(args)
    logs.set_up()
    service.warn_if_open(args.host)
    address = bound(args.host, args.port)
    try:
        server(build(service), service, max(0.0, args.drain)).run([address])
    finally:
        service.close()
    if service.failure is not None:
        raise service.failure
    logs.event("stopped")
    return 0


if __name__ == "__main__":
    cli.run(main)
