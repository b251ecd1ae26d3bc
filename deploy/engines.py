"""Engines that run a bundle: Paddle Inference, ONNX Runtime and OpenVINO, on a CPU or a GPU."""

import importlib.util
import tempfile
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from deploy.bundle import NLL, Bundle
from utils.errors import UserError
from utils.predictions import Output

GPU_MEMORY = 256  # MB of Paddle's initial pool


@dataclass(frozen=True)
class EngineOptions:
    """How to run. `onednn` is about Paddle on a CPU, `tensorrt` about NVIDIA GPUs."""

    use_gpu: bool = False
    gpu_id: int = 0
    cpu_threads: int = 1
    onednn: bool = False
    engine: str = "paddle"
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    tensorrt: bool = False
    max_batch_size: int = 16  # that TensorRT prepares for


class Engine(ABC):
    """Run a bundle.

    Attributes:
        name: on the command line.
        package, distributions, install: the module it needs, where it comes from, how to get it.
        options: how it was asked to run.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    distributions: ClassVar[tuple[str, ...]]
    install: ClassVar[str]

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self.options = options
        self._gives_nll = NLL in bundle.about.get("outputs", ())  # older bundles do not
        if importlib.util.find_spec(self.package) is None:
            raise UserError(
                f"--engine {self.name}: {self.package} is not installed; {self.install}"
            )
        if options.tensorrt and not options.use_gpu:
            raise UserError("--use_tensorrt: TensorRT is for NVIDIA GPUs; add --use_gpu True")

    @classmethod
    def version(cls) -> str:
        """Return what is installed."""
        for distribution in cls.distributions:
            with suppress(metadata.PackageNotFoundError):
                return f"{distribution} {metadata.version(distribution)}"
        return "version unknown"

    def run(self, images: np.ndarray) -> Output:
        """Return what the bundle says of images (B, 3, H, W) in [0, 1]."""
        outputs = self._outputs(np.ascontiguousarray(images, np.float32))
        anomaly_map, score, *further = outputs
        nll = further.pop(0).reshape(-1) if self._gives_nll else None
        return Output(anomaly_map[:, 0], score.reshape(-1), further, nll)

    @abstractmethod
    def _outputs(self, images: np.ndarray) -> list[np.ndarray]:
        """Run the graph; outputs are in its order."""


class PaddleEngine(Engine):
    """Paddle Inference; on a GPU also through TensorRT."""

    name, package, install = "paddle", "paddle", "pip install -r requirements.txt"
    distributions = ("paddlepaddle-gpu", "paddlepaddle")

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        super().__init__(bundle, options)
        from paddle import inference

        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        graph, parameters = bundle.graph, bundle.parameters
        assert graph is not None  # `create_engine` leads no quantized bundle here
        if options.use_gpu:
            _require_paddle_gpu()
            if options.tensorrt:
                self._scratch = tempfile.TemporaryDirectory()
                graph, parameters = _through_tensorrt(bundle, options, Path(self._scratch.name))
        config = inference.Config(str(graph), str(parameters))
        _configure(config, inference.PrecisionType, options)
        self._predictor = inference.create_predictor(config)
        self._input = self._predictor.get_input_handle(self._predictor.get_input_names()[0])

    def _outputs(self, images: np.ndarray) -> list[np.ndarray]:
        self._input.reshape(images.shape)
        self._input.copy_from_cpu(images)
        self._predictor.run()
        names = self._predictor.get_output_names()
        return [self._predictor.get_output_handle(name).copy_to_cpu() for name in names]


def _require_paddle_gpu() -> None:
    import paddle

    if not paddle.is_compiled_with_cuda():
        raise UserError(
            "--use_gpu: this Paddle build has no GPU support; install paddlepaddle-gpu (see "
            "README) or use --use_gpu False"
        )
    if paddle.device.cuda.device_count() == 0:
        raise UserError("--use_gpu: no GPU found on this machine; use --use_gpu False")


def _configure(config: Any, precisions: Any, options: EngineOptions) -> None:
    """Set up a paddle.inference.Config; `precisions` is its PrecisionType."""
    if options.use_gpu:
        kind = {"fp32": "Float32", "fp16": "Half", "bf16": "Bfloat16"}[options.precision]
        if options.tensorrt:  # the graph was converted with this precision
            kind = "Float32"
        config.enable_use_gpu(GPU_MEMORY, options.gpu_id, getattr(precisions, kind))
    else:
        config.disable_gpu()
        config.set_cpu_math_library_num_threads(options.cpu_threads)
    if options.onednn and not options.use_gpu:
        config.enable_mkldnn()
    else:
        config.disable_mkldnn()  # on by default, and it breaks some operators
    if not options.use_gpu and options.precision != "fp32":
        if options.precision == "fp16" or not options.onednn:
            raise UserError(
                f"--precision {options.precision}: Paddle on a CPU computes in fp32, or in bf16 "
                "with --enable_mkldnn True"
            )
        config.enable_mkldnn_bfloat16()
    config.enable_new_executor()  # without it, memory_optim fails for Paddle 3 graphs
    config.enable_memory_optim()
    config.disable_glog_info()


def _through_tensorrt(bundle: Bundle, options: EngineOptions, folder: Path) -> tuple[Path, Path]:
    """Convert the graph with Paddle 3's own TensorRT module; return the new graph's files.

    Building the engines takes minutes, and they fit this GPU only, so nothing is kept.
    """
    try:
        from paddle import tensorrt
    except ImportError:
        raise UserError(
            "--use_tensorrt: this Paddle has no TensorRT; install TensorRT and the "
            "paddlepaddle-gpu that was built for it, or leave --use_tensorrt out"
        ) from None
    size = (3, *bundle.input_size)
    assert bundle.graph is not None
    shapes = tensorrt.Input(
        min_input_shape=(1, *size),
        optim_input_shape=(1, *size),
        max_input_shape=(options.max_batch_size, *size),
        name="image",
    )
    config = tensorrt.TensorRTConfig(inputs=[shapes])
    kind = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}[options.precision]
    config.precision_mode = getattr(tensorrt.PrecisionMode, kind)
    config.save_model_dir = str(folder / "inference")
    tensorrt.convert(str(bundle.graph.with_suffix("")), config)
    return folder / "inference.json", folder / "inference.pdiparams"


class OnnxEngine(Engine):
    """ONNX Runtime on a CPU, or on an NVIDIA GPU by CUDA or TensorRT."""

    name, package, install = "onnx", "onnxruntime", "pip install onnxruntime"
    distributions = ("onnxruntime-gpu", "onnxruntime")

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        super().__init__(bundle, options)
        import onnxruntime

        providers = onnx_providers(options, onnxruntime.get_available_providers())
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.cpu_threads
        settings.inter_op_num_threads = 1
        # threads that wait actively cost more than they save on a machine with other work
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        settings.log_severity_level = 3  # errors
        try:
            self._session = onnxruntime.InferenceSession(
                str(onnx_file(bundle)), settings, providers=providers
            )
        except Exception as error:  # its classes of errors have no common ancestor
            raise UserError(
                f"{bundle.onnx}: ONNX Runtime cannot run it ({_brief(error)})"
            ) from None
        wanted = providers[0][0]
        if wanted not in self._session.get_providers():  # it falls back without notice
            raise UserError(
                f"--use_gpu: ONNX Runtime could not start {wanted}; see its requirements"
            )
        self._input = self._session.get_inputs()[0].name

    def _outputs(self, images: np.ndarray) -> list[np.ndarray]:
        return self._session.run(None, {self._input: images})


def onnx_providers(options: EngineOptions, available: list[str]) -> list[tuple[str, dict]]:
    """Return ONNX Runtime's execution providers and their settings, the preferred one first."""
    if options.precision != "fp32" and not options.tensorrt:
        raise UserError(
            f"--precision {options.precision}: ONNX Runtime computes in fp32 unless "
            "--use_tensorrt True is given; choose --engine openvino or paddle, or fp32"
        )
    providers: list[tuple[str, dict]] = []
    if options.tensorrt:
        settings = {"device_id": options.gpu_id}
        if options.precision != "fp32":
            settings[f"trt_{options.precision}_enable"] = True
        providers.append(("TensorrtExecutionProvider", settings))
    if options.use_gpu:
        # tf32, its default, is too coarse for scores that agree to five digits
        providers.append(("CUDAExecutionProvider", {"device_id": options.gpu_id, "use_tf32": 0}))
    for name, _ in providers:
        if name not in available:
            raise UserError(
                f"--use_gpu: this ONNX Runtime has no {name}; pip install onnxruntime-gpu, or use "
                "--use_gpu False"
            )
    return [*providers, ("CPUExecutionProvider", {})]


class OpenVinoEngine(Engine):
    """OpenVINO on a CPU, or on a GPU of Intel; it reads the ONNX graph."""

    name, package, install = "openvino", "openvino", "pip install openvino"
    distributions = ("openvino",)

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        super().__init__(bundle, options)
        import openvino

        core = openvino.Core()
        device = openvino_device(options, core.available_devices)
        settings = openvino_settings(
            options, core.get_property(device, "OPTIMIZATION_CAPABILITIES")
        )
        try:
            self._model = core.compile_model(str(onnx_file(bundle)), device, settings)
        except RuntimeError as error:
            raise UserError(f"{bundle.onnx}: OpenVINO cannot run it ({_brief(error)})") from None

    def _outputs(self, images: np.ndarray) -> list[np.ndarray]:
        found = self._model([images])
        return [found[i] for i in range(len(found))]


def openvino_device(options: EngineOptions, available: list[str]) -> str:
    """Return OpenVINO's name of the device."""
    if options.tensorrt:
        raise UserError("--use_tensorrt: OpenVINO has none; choose --engine onnx or paddle")
    if not options.use_gpu:
        return "CPU"
    device = f"GPU.{options.gpu_id}"
    if device not in available and not (options.gpu_id == 0 and "GPU" in available):
        raise UserError(
            f"--use_gpu: OpenVINO sees no {device}, only {', '.join(available)}; it is for GPUs of "
            "Intel; use --use_gpu False, or --engine onnx or paddle"
        )
    return device


def openvino_settings(options: EngineOptions, capabilities: list[str]) -> dict[str, Any]:
    """Return the properties to compile with, given what the device can compute in."""
    if options.precision.upper() not in capabilities:
        raise UserError(
            f"--precision {options.precision}: OpenVINO does not compute in it on this device; "
            "choose fp32"
        )
    kind = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}[options.precision]
    # without this hint, it takes bf16 where the processor has it
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": kind, "PERFORMANCE_HINT": "LATENCY"}
    if not options.use_gpu:
        settings["INFERENCE_NUM_THREADS"] = options.cpu_threads
    return settings


def onnx_file(bundle: Bundle) -> Path:
    """Return the bundle's ONNX graph; `UserError` if it has none."""
    if bundle.onnx is None:
        raise UserError(
            f"{bundle.folder}: no ONNX graph in this bundle; export again with --onnx, or use "
            "--engine paddle"
        )
    return bundle.onnx


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (PaddleEngine, OnnxEngine, OpenVinoEngine)
}


def open_engine(bundle: Bundle, options: EngineOptions) -> Engine:
    """Start the engine that the options name; `UserError` if it cannot run here."""
    if options.engine not in ENGINES:
        raise UserError(f"--engine {options.engine}: choose one of {', '.join(ENGINES)}, auto")
    return ENGINES[options.engine](bundle, options)
