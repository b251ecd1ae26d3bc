"""The stages that are measured: their cases, whose code competes, and how equal it must be."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["own", "peers"]


@dataclass(frozen=True)
class Side:
    """A competitor: the module that measures it, in which environment, and the cases it is spared.

    A case takes too long for a competitor, or more memory than a usual machine has. The stage's
    aim is about rivals only.
    """

    name: str
    module: str
    environment: Kind = "own"
    needs: str = ""  # package without which it is left out
    spared: tuple[str, ...] = ()
    rival: bool = True


@dataclass(frozen=True)
class Stage:
    """What is measured; `sides[0]` is ours. `quick` is the case of a trial run.

    tolerances: largest difference between the sides by value, `""` for all others; reach: the
    ratio that is aimed at; threads: how many each process gets, in turn; prepare: a module that is
    run first for each case, as side `prepare`; rounds: fresh processes of each side; calls: timed
    calls in each; reaches: aims of single cases; beside: what is measured beside the time.
    """

    title: str
    sides: tuple[Side, ...]
    cases: tuple[str, ...]
    quick: str
    reach: float
    tolerances: tuple[tuple[str, float], ...] = (("", 1e-6),)
    threads: tuple[int, ...] = (1, 2)
    prepare: str = ""
    rounds: int = 3
    calls: int = 3
    reaches: tuple[tuple[str, float], ...] = ()
    beside: str = "memory, MB"

    def aim(self, case: str, side: str) -> float | None:
        """Return the ratio to a side that is aimed at in a case; None if there is no aim."""
        if any(each.name == side and not each.rival for each in self.sides):
            return None
        aims = dict(self.reaches)
        return aims.get(f"{case}, {side}", aims.get(case, self.reach))

    def tolerance(self, name: str) -> float:
        """Return the largest difference that is allowed for a value."""
        table = dict(self.tolerances)
        return next((table[key] for key in table if key and name.startswith(key)), table[""])


INFERRED = (
    "fastflow_efficientnet_lite0", "fastflow_resnet18", "uflow_resnet18", "cflow_resnet18",
    "cflow_efficientnet_lite0", "csflow_efficientnet_lite0", "uflow_efficientnet_lite0",
)  # fmt: skip
FASTFLOWS = ("fastflow_efficientnet_lite0, batch 8", "fastflow_resnet18, batch 8")
HEADS = ("fastflow_efficientnet_lite0, batch 4", "fastflow_resnet18, batch 4")
LARGE = ("cflow_wide_resnet50_2_anomalib", "csflow_efficientnet_b5_anomalib")
GROWTH = {  # what grows with which size, through which values
    "metrics, images": (25, 50, 100, 200, 400), "metrics, pixels": (64, 128, 256, 512),
    "NFA, side": (16, 32, 64, 128), "NFA, channels": (16, 64, 256, 1024),
    "FastFlow step, batch": (2, 4, 8, 16, 32), "FastFlow step, side": (8, 16, 32, 64),
    "FastFlow step, channels": (16, 32, 64, 128, 256),
}  # fmt: skip
NOTES = {
    "backbone": """Ours is Paddle Inference with oneDNN: made once per run, compared with eager mode
before it is used, and only for 48 images or more on a CPU.""",
    "head": """The losses agree to 1e-5 before times are compared. With EfficientNet-Lite0's few
channels, what Paddle computes between the convolutions, in one thread, weighs more.""",
    "convergence": """Each with the settings of its own project: batch size, learning rate, steps.
anomalib's scores of CFLOW-AD are relative to a batch, so all test images are one batch there.""",
    "verdict": """What is around the network, by a clock around each part of a JPEG: reading 3 ms,
resizing with antialiasing 6 ms, map, threshold and regions 6 ms (these random weights call 14 % of
the pixels defective). Of a PNG, decoding takes 20 ms, 15 to 18 with OpenCV's decoder. Gone since
the first measurement: two copies of the picture, and float64 maps of its size. The share asked for
would need a slower network.""",
    "loading": "Reading goes on in threads while the network computes; no /dev/shm is involved.",
    "construction": "The file is without the backbone on both sides. Theirs holds permutations as "
    "matrices.",
    "growth": """The exponent is the slope in the log plot without the smallest sizes: 1 is in
proportion, 2 with the square, as pixels grow with the side. Convolutions grow with the square of
the channels in the end.""",
    "training": """anomalib's network, loss and optimiser run in a plain loop, without Lightning,
callbacks and validation; ours is `train.py` with its held-out images and progress, without writing
checkpoints. Features of the backbone are cached on our side and computed in every epoch on theirs.
CFLOW-AD steps on 64 positions there and on whole maps here, all positions once in both. A
profile of FastFlow's step on ResNet-18 by Linux's `perf`, before copies of channels went to oneDNN
too: 57 % of the samples are in convolutions of that library, which PyTorch has as well, 16 % in
threads that wait while Paddle computes in one. Tried in CS-Flow: blocked orders for all arrays of
a convolution, which gain as much in some as they lose in others.""",
    "inference": """Ours is `--engine auto`, what was fastest at export. CFLOW-AD, CS-Flow and
U-Flow on EfficientNet-Lite0 are in the command but not measured yet. anomalib's own OpenVINO
export was not measured; OpenVINO runs our graph.""",
}
STAGES = {
    "metrics": Stage(
        "AUROC, AP and AUPRO of all pixels",
        (
            Side("ours", "benchmarks.bench_metrics"),
            Side(
                "scikit-learn", "benchmarks.bench_metrics", needs="sklearn", spared=("1000x512",)
            ),
        ),
        ("83x256", "1000x512"), "12x64", 10.0, (("aupro", 1e-2), ("", 1e-6)), (1,),
    ),
    "nfa": Stage(
        "a-contrario test from latents to the map",
        (
            Side("ours", "benchmarks.bench_nfa"),
            Side("networkx tree", "benchmarks.bench_nfa", needs="networkx"),
        ),
        ("resnet18 256", "mcait 448"), "mcait 448", 20.0, threads=(1,),
        reaches=(("mcait 448", 1.0),),
    ),
    "backbone": Stage(
        "the frozen backbone, eight images of 256x256",
        (
            Side("ours", "benchmarks.bench_backbone"),
            Side("plain eager Paddle", "benchmarks.bench_backbone"),
            Side("PyTorch", "benchmarks.peers.backbone", "peers"),
        ),
        FASTFLOWS, FASTFLOWS[1], 1.0, (("", 1e-4),), prepare="benchmarks.bench_backbone",
        reaches=tuple((f"{case}, plain eager Paddle", 3.0) for case in FASTFLOWS),
    ),
    "head": Stage(
        "a step of FastFlow's head: forward, backward, Adam, four images of 256x256",
        (
            Side("ours", "benchmarks.bench_head"),
            Side("channels first, Paddle's convolution", "benchmarks.bench_head"),
            Side("anomalib, PyTorch, channels last", "benchmarks.peers.head", "peers"),
            Side("anomalib, PyTorch, as it is", "benchmarks.peers.head", "peers"),
        ),
        HEADS, HEADS[1], 0.77, (("", 1e-5),), (2,), prepare="benchmarks.bench_head", rounds=2,
        reaches=tuple((f"{case}, channels first, Paddle's convolution", 2.5) for case in HEADS),
    ),
    "convergence": Stage(
        "training from files of bottle until image AUROC is 0.99, evaluations not counted",
        (
            Side("ours", "benchmarks.bench_convergence"),
            Side("anomalib, PyTorch", "benchmarks.peers.convergence", "peers"),
        ),
        tuple(f"{flow}_efficientnet_lite0, seed 0" for flow in ("fastflow", "cflow")),
        "fastflow_efficientnet_lite0, seed 0", 1.0, threads=(2,),
        prepare="benchmarks.bench_convergence", rounds=1, beside="epochs",
    ),
    "verdict": Stage(
        "from an image file of 900x900 to the verdict, and the share of the network in it",
        (
            Side("ours", "benchmarks.bench_verdict"),
            Side("the network alone", "benchmarks.bench_verdict"),
        ),
        tuple(f"fastflow_{net}, {kind}" for net in ("efficientnet_lite0", "resnet18")
              for kind in ("PNG", "JPEG")),
        "fastflow_resnet18, PNG", 0.85, threads=(2,), prepare="benchmarks.bench_verdict",
    ),
    "loading": Stage(
        "reading, decoding and resizing 64 PNG files of 900x900, and the frozen backbone on them",
        (
            Side("ours", "benchmarks.bench_loading"),
            Side("the backbone of a training", "benchmarks.bench_loading"),
        ),
        tuple(f"fastflow_{net}, batch 64" for net in ("efficientnet_lite0", "resnet18")),
        "fastflow_resnet18, batch 64", 1.0, prepare="benchmarks.bench_loading", rounds=2,
    ),
    "construction": Stage(
        "building the two largest detectors",
        (
            Side("ours", "benchmarks.bench_construction"),
            Side("anomalib, PyTorch", "benchmarks.peers.construction", "peers"),
        ),
        LARGE, LARGE[0], 1.0, (("", 0.0),), (2,), rounds=2, beside="file of trained weights, MB",
    ),
    "growth": Stage(
        "how time and memory grow",
        (Side("ours", "benchmarks.bench_growth"),),
        tuple(f"{what} {value}" for what, values in GROWTH.items() for value in values),
        "metrics, images 25", 1.0, threads=(1,), rounds=2,
    ),
    "training": Stage(
        "an epoch of training after the first, 64 images of 256x256 from files",
        (
            Side("ours", "benchmarks.bench_training"),
            Side("anomalib, PyTorch", "benchmarks.peers.training", "peers"),
        ),
        (
            "fastflow_efficientnet_lite0", "fastflow_resnet18", "uflow_resnet18", "cflow_resnet18",
            "csflow_efficientnet_b5_anomalib",
        ),
        "uflow_resnet18", 1.2, (("", 0.0),), (2,), rounds=2, calls=1,
        reaches=(("cflow_resnet18", 2.0), ("csflow_efficientnet_b5_anomalib", 1.1)),
    ),
    "inference": Stage(
        "exported detectors, from images of 256x256 in memory to maps and scores",
        (
            Side("ours", "benchmarks.bench_inference"),
            Side("Paddle Inference", "benchmarks.bench_inference", rival=False),
            Side("ONNX Runtime", "benchmarks.bench_inference", needs="onnxruntime", rival=False),
            Side("OpenVINO", "benchmarks.bench_inference", needs="openvino", rival=False),
            Side("anomalib, PyTorch", "benchmarks.peers.inference", "peers"),
            Side("anomalib, OpenVINO", "benchmarks.peers.inference", "peers"),
        ),
        tuple(f"{preset}, batch {b}" for preset in INFERRED for b in (1, 8)),
        "uflow_efficientnet_lite0, batch 1", 1.5, (("trained", 0.0), ("", 1e-4)), (2,),
        prepare="benchmarks.bench_inference", rounds=2,
        reaches=(
            *((f"{preset}, batch {b}, anomalib, OpenVINO", 1.0)
              for preset in INFERRED for b in (1, 8)),
            *((f"{preset}, batch {b}", 2.5)
              for preset in INFERRED if "lite0" in preset for b in (1, 8)),
        ),
    ),
}  # fmt: skip
