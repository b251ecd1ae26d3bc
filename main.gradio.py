"""A page to try a detector, on AI Studio or anywhere: python main.gradio.py."""

import html
import inspect
import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from deploy.bundle import SIDECAR, read_bundle
from deploy.choice import create_engine
from deploy.engines import EngineOptions
from utils import cli, runtime
from utils.errors import UserError
from utils.image import decode_image, resize, to_input
from utils.predictions import Judge
from utils.visualize import PREDICTED, Picture, fitted, outlined, overlay, resize_map

ROOT = Path(__file__).resolve().parent
BUNDLE = "FLOWAD_BUNDLE"  # names a folder that deploy/export_model.py wrote
PLACES = ("deploy/inference", "pretrained/bottle")  # where one is looked for without it
EXAMPLES = ("images/bottle_good.png", "images/bottle_bad.png")
MOST_PIXELS = 50_000_000
MOST_BYTES = 16_000_000
SIDE = 960  # of pictures on the page, pixels
FONTS = ("system-ui", "sans-serif")  # nothing is loaded from elsewhere
STYLE = """
.verdict { font-size: 1.6rem; font-weight: 650; margin: .2rem 0; }
.bad { color: #b3261e; } .good { color: #17663a; }
.dark .bad { color: #ff9a91; } .dark .good { color: #77d39d; }
.meter { position: relative; height: 1rem; margin: 1.8rem 0 .4rem; border-radius: .5rem;
  background: linear-gradient(to right, #8884 50%, #b3261e55 50%); }
.cut { position: absolute; left: 50%; bottom: 100%; transform: translateX(-50%);
  font-size: .85rem; }
.dot { position: absolute; top: 50%; width: 1.1rem; height: 1.1rem; border-radius: 50%;
  transform: translate(-50%, -50%); background: currentColor; border: 2px solid #fff; }
"""
HEAD = """
# FlowAD
选一张图片，或拖到框里：分数超过阈值就是有缺陷，青色轮廓是找到的区域。图片只在这台服务器上计算，不保存。

*Choose a picture or drop one: a score above the threshold means a defect, cyan outlines show where.
It is judged on this server and not kept.*
"""
ABOUT = "模型 model: {flow} ({category})，输入 input {size}，{threshold}"


class Shown(NamedTuple):
    """A judged picture (H, W, 3), its map (h, w) and its defective pixels, for drawing again."""

    picture: Picture
    anomaly_map: np.ndarray
    defective: np.ndarray


class Inspector:
    """Judge pictures with a bundle, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.bundle = read_bundle(folder)
        self._engine, _ = create_engine(self.bundle, EngineOptions(cpu_threads=2))
        cuts = self.bundle.image_threshold, self.bundle.pixel_threshold
        self._judge = Judge(*cuts, self.bundle.acontrario)
        self._lock = Lock()

    def __call__(self, path: Path) -> tuple[Shown, dict[str, Any]]:
        """Return what can be drawn and the result; `UserError` for what is no picture."""
        pixels = decode_image(path.read_bytes(), path.name, MOST_PIXELS)
        seen = to_input(pixels, self.bundle.input_size, self.bundle.resize)
        with self._lock:
            found = self._engine.run(seen[None]).of(0)
        judged = self._judge(found, pixels.shape[:2])
        height, width = pixels.shape[:2]
        size = fitted((height, width), SIDE) if max(height, width) > SIDE else (height, width)
        small = resize_map(judged.anomaly_map, size)
        return Shown(resize(pixels, size), small, judged.defective), judged.result

    def drawn(self, shown: Shown | None, percent: float) -> Picture | None:
        """Lay the heat map over a picture, so many percent opaque, with the outlines."""
        if shown is None:
            return None
        scale = self.bundle.color_scale
        heat = overlay(shown.picture, shown.anomaly_map, *scale, alpha=percent / 100)
        return outlined(heat, shown.defective, PREDICTED)

    def verdict(self, result: Mapping[str, Any]) -> str:
        """Return verdict, score and threshold as HTML."""
        name, value, cut = "分数 score", result["score"], result["threshold"]
        if self.bundle.image_threshold.policy == "nfa":
            name, value, cut = "−log10 NFA", -result["log_nfa"], 0.0
        bad = result["verdict"] == "Anomaly"
        half = max(1.2 * abs(value - cut), abs(cut) / 2, 1e-6)
        place = 50 + 50 * (value - cut) / half
        kind, text = ("bad", "有缺陷 Anomaly") if bad else ("good", "良品 Normal")
        regions = len(result["regions"])
        return (
            f'<p class="verdict {kind}">{text}</p>'
            f'<div class="meter {kind}"><span class="cut">阈值 threshold {cut:.4g}</span>'
            f'<span class="dot" style="left: {place:.1f}%"></span></div>'
            f"<p>{name} {value:.4g}，区域 regions {regions}</p>"
        )

    def about(self) -> str:
        """Return one line on the model, in Markdown."""
        model = self.bundle.about.get("model") or {}
        return ABOUT.format(
            flow=model.get("preset", ""), category=model.get("category", ""),
            size="×".join(map(str, self.bundle.input_size)),
            threshold=self.bundle.image_threshold.describe(),
        )  # fmt: skip


def bundle_folder() -> Path:
    """Return the bundle to use; `UserError` with the remedy if there is none."""
    given = os.environ.get(BUNDLE)
    places = [Path(given)] if given else [ROOT / place for place in PLACES]
    found = next((place for place in places if (place / SIDECAR).is_file()), None)
    if found is None:
        raise UserError(
            f"no model in {' or '.join(map(str, places))}; make one with deploy/export_model.py, "
            f"or name its folder in {BUNDLE}"
        )
    return found


def build(inspector: Inspector) -> tuple[Any, dict[str, Any]]:
    """Return the page and the options to launch it with, which differ between versions."""
    import gradio as gr

    def judge(path: str | None, percent: float) -> tuple[Shown | None, Picture | None, str]:
        if not path:
            return None, None, ""
        try:
            shown, result = inspector(Path(path))
        except UserError as error:
            return None, None, f'<p class="bad">{html.escape(str(error))}</p>'
        return shown, inspector.drawn(shown, percent), inspector.verdict(result)

    look = {"theme": gr.themes.Default(font=FONTS, font_mono=("monospace",)), "css": STYLE}
    with gr.Blocks(
        title="FlowAD", analytics_enabled=False, **accepted(gr.Blocks.__init__, look)
    ) as page:
        gr.Markdown(HEAD)
        shown = gr.State()
        with gr.Row():
            with gr.Column():
                photo = gr.Image(
                    type="filepath", image_mode=None, sources=["upload", "clipboard"],
                    label="图片 picture", height=400,
                )  # fmt: skip
                gr.Examples([str(ROOT / each) for each in EXAMPLES], photo, label="示例 examples")
            with gr.Column():
                heat = gr.Image(label="异常图 anomaly map", interactive=False, height=400)
                percent = gr.Slider(0, 100, 50, step=5, label="热图不透明度 opacity of the map, %")
                verdict = gr.HTML()
        gr.Markdown(inspector.about())
        photo.change(judge, [photo, percent], [shown, heat, verdict])
        percent.change(inspector.drawn, [shown, percent], heat, show_progress="hidden")
    page.queue(max_size=32)
    limits = {"allowed_paths": [str(ROOT / "images")], "max_file_size": MOST_BYTES}
    return page, accepted(page.launch, {**look, **limits})


def accepted(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a function takes in this version."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line, which has nothing to set."""
    return cli.Parser(__doc__).parse_args(argv)


def main(argv: Sequence[str] | None) -> int:
    """Show the page until it is stopped; address and port are Gradio's own settings."""
    parse(argv)
    runtime.prepare()
    if find_spec("gradio") is None:
        raise UserError("gradio is not installed; pip install -r requirements-gradio.txt")
    page, options = build(Inspector(bundle_folder()))
    page.launch(**options)
    return 0


if __name__ == "__main__":
    cli.run(main)
