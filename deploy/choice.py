"""Which engine runs a bundle here: the one asked for, or the fastest that passed at export."""

from dataclasses import replace

from deploy.bundle import QUANTIZED, Bundle
from deploy.engines import Engine, EngineOptions, open_engine
from deploy.parity import CANDIDATES, self_check
from utils.errors import UserError


def create_engine(bundle: Bundle, options: EngineOptions) -> tuple[Engine, str]:
    """Return an engine and one line about how it was chosen; empty if there is nothing to say."""
    if options.engine == "auto":
        return _fastest(bundle, options)
    if QUANTIZED in bundle.about and options.engine != "onnx":
        raise UserError(
            f"--engine {options.engine}: {bundle.folder} is quantized, and its thresholds are for "
            "ONNX Runtime; use --engine onnx"
        )
    entry = bundle.engines.get(options.engine, {"passed": True})
    # with Paddle's plain kernels the bundle was written, and so it runs
    if options.engine != "paddle" and not entry["passed"] and "ms" in entry:
        raise UserError(
            f"--engine {options.engine}: not for {bundle.folder}, where at export its "
            f"{entry['reason']}; use another one"
        )
    if options.engine != "paddle" or options.use_gpu or not options.onednn:
        return open_engine(bundle, options), ""
    # oneDNN can crash or be wrong on one processor and not on another: it is tried each time
    fault = self_check(bundle, options)
    if not fault:
        return open_engine(bundle, options), "oneDNN: on (the self-check passed)"
    plain = replace(options, onednn=False)
    return open_engine(bundle, plain), f"oneDNN: off (self-check: {fault})"


def _fastest(bundle: Bundle, options: EngineOptions) -> tuple[Engine, str]:
    """Try the engines that passed, by their time at export, until one runs here."""
    plain = replace(options, engine="paddle", onednn=False)
    passed = {
        name: entry
        for name, entry in bundle.engines.items()
        if entry["passed"] and name in CANDIDATES
    }
    if not passed:
        return open_engine(bundle, plain), "engine: paddle (the bundle has no measured engines)"
    reasons: list[str] = []
    for name in sorted(passed, key=lambda name: passed[name]["ms"]):
        wanted = replace(options, engine=CANDIDATES[name].engine, onednn=CANDIDATES[name].onednn)
        if wanted.onednn and wanted.use_gpu:
            continue
        engine, fault = _try(bundle, wanted)
        if engine is not None:
            why = "; ".join(reasons) or f"fastest at export, {passed[name]['ms']:g} ms"
            return engine, f"engine: {name} ({why})"
        reasons.append(f"not {name}: {fault}")
    raise UserError(f"--engine auto: none runs here ({'; '.join(reasons)})")


def _try(bundle: Bundle, options: EngineOptions) -> tuple[Engine | None, str]:
    """Return an engine, or None and why there is none."""
    fault = self_check(bundle, options) if options.onednn else ""
    if fault:
        return None, fault
    try:
        return open_engine(bundle, options), ""
    except UserError as error:
        return None, str(error)
