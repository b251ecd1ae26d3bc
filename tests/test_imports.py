"""Who may import whom, by reading the source; and what every file must and must not hold."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("metrics", "utils", "models", "datasets", "engine", "deploy", "convert")
ENTRIES = ("train", "eval", "predict", "extract_features", "download_models")
SCRIPTS = (
    *ENTRIES,
    "deploy.export_model",
    "deploy.quantize",
    "deploy.infer",
    "deploy.serve",
    "datasets.download",
)
# The layer below everything: it needs no Paddle.
WIRING = ("engine.session", "engine.inputs")
CONVERTERS = ("convert.detector", "convert.to_torch")  # they write and read runs
L0 = ("metrics", *(f"utils.{name}" for name in (
    "config", "image", "files", "errors", "visualize", "predictions", "safe_pickle", "cli",
    "names", "report", "schema", "constraints", "animate", "archive", "download", "partial",
    "tiling", "safe_arrays", "stand_ins", "torch_tensors", "torch_file", "weight_file",
    "html", "published", "runs",
)))  # fmt: skip


def _sources() -> dict[str, Path]:
    files = [REPO / f"{name}.py" for name in ENTRIES]
    files += [file for package in PACKAGES for file in (REPO / package).rglob("*.py")]
    return {_name(file): file for file in files}


def _name(file: Path) -> str:
    parts = file.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = _sources()


def _imported(name: str, file: Path) -> set[str]:
    """Name every module that a file imports, also inside functions, in full."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            inside = {f"{base}.{alias.name}" for alias in node.names}
            found |= (inside & set(SOURCES)) or {base}
    return found


IMPORTS = {name: _imported(name, file) for name, file in SOURCES.items()}


def _within(module: str, groups: tuple[str, ...]) -> bool:
    return any(module == group or module.startswith(f"{group}.") for group in groups)


def _own(name: str) -> set[str]:
    return {module for module in IMPORTS[name] if _within(module, (*PACKAGES, *SCRIPTS))}


def _foreign(name: str) -> set[str]:
    tops = {module.partition(".")[0] for module in IMPORTS[name] - _own(name)}
    return tops - set(sys.stdlib_module_names)


def _members(*groups: str, but: tuple[str, ...] = ()) -> list[str]:
    found = [name for name in SOURCES if _within(name, groups) and name not in but]
    assert found, f"nothing is called {groups}"
    return found


def _check(name: str, allowed: tuple[str, ...]) -> None:
    wrong = sorted(module for module in _own(name) if not _within(module, allowed))
    assert not wrong, f"{name} imports {', '.join(wrong)}"


def test_the_reader_of_imports_sees_them():
    assert {"engine.checkpoint", "models", "datasets.records"} <= IMPORTS["engine.session"]
    assert "models.flows.ops" in IMPORTS["models.flows.layers"]
    assert "engine.session" in IMPORTS["train"]  # inside a function
    assert "utils.cli" in IMPORTS["predict"]


@pytest.mark.parametrize("name", _members(*L0))
def test_the_lowest_layer_needs_no_paddle(name):
    _check(name, L0)
    assert "paddle" not in _foreign(name)


@pytest.mark.parametrize("name", _members("models.flows"))
def test_the_flows_can_be_copied_out(name):
    _check(name, ("models.flows",))
    assert _foreign(name) <= {"paddle", "numpy"}
    tree = ast.parse(SOURCES[name].read_text(encoding="utf-8"))
    absolute = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
    assert not [module for module in absolute if module and module.startswith("models")]


@pytest.mark.parametrize("name", _members("models.backbones"))
def test_backbones(name):
    _check(name, ("models.backbones", "utils.download", "utils.errors", "utils.safe_pickle",
                  "utils.weight_file"))  # fmt: skip


@pytest.mark.parametrize("name", _members("datasets"))
def test_datasets(name):
    _check(name, ("datasets", *L0))
    paddle = {module for module in IMPORTS[name] if module.partition(".")[0] == "paddle"}
    assert paddle <= {"paddle.io"}


@pytest.mark.parametrize("name", [*_members("models.scoring", "models.detector"), "models"])
def test_detectors_know_models_only(name):
    _check(name, ("models", "utils.errors"))


@pytest.mark.parametrize("name", _members("engine", but=WIRING))
def test_the_engine_gets_its_detectors_handed_in(name):
    _check(name, (*L0, "engine"))
    assert not IMPORTS[name] & set(WIRING)


@pytest.mark.parametrize("name", _members("convert", but=CONVERTERS))
def test_the_readers_of_foreign_files_know_models_only(name):
    _check(name, (*L0, "utils.runtime", "models", "convert"))


def test_the_wiring_modules_are_for_scripts():
    """Runs know models and data, inputs only data; nothing else of the engine knows either."""
    _check("engine.session", (*L0, "engine", "models", "datasets"))
    _check("engine.inputs", (*L0, "engine.batches", "datasets"))
    users = {name for name, imported in IMPORTS.items() if imported & set(WIRING)}
    assert users <= {*SCRIPTS, *CONVERTERS, "engine.session"}


@pytest.mark.parametrize("name", _members("deploy", but=("deploy.export_model", "deploy.quantize")))
def test_deployment_needs_no_training_code(name):
    _check(name, (*L0, "utils.runtime", "deploy"))
    engines = {"paddle", "onnxruntime", "openvino"}
    assert name == "deploy.engines" or not _foreign(name) & engines


def test_runtime_imports_paddle_only_when_asked():
    _check("utils.runtime", ("utils.errors",))
    tree = ast.parse(SOURCES["utils.runtime"].read_text(encoding="utf-8"))
    top = [ast.unparse(n) for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert "paddle" not in " ".join(top)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_nothing_imports_a_script(name):
    assert not IMPORTS[name] & set(SCRIPTS)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_package_files_stay_light(name):
    """Importing a package must not import all of it: `models` alone builds detectors."""
    if SOURCES[name].name == "__init__.py" and name not in ("models", "models.backbones"):
        assert not IMPORTS[name]


def _repository_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPO, capture_output=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [REPO / name.decode() for name in listed.stdout.split(b"\0") if name]
    return [file for file in files if file.is_file()]


def test_modules_say_what_they_are():
    silent = []
    for file in _repository_files():
        if file.suffix != ".py":
            continue
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        if not re.match(r'"""[A-Z`].*(\.|\."""|:)$', first):
            silent.append(str(file.relative_to(REPO)))
    assert not silent


def test_no_file_names_a_path_of_some_machine():
    machine = re.compile(r"(?<![\w.>}*~-])/(work|tmp|root|home|Users|mnt)/\w")
    assert machine.search("see " + "/".join(["", "home", "me"]))
    assert not machine.search("lite_data/work/x, <folder>/tmp/x, $" + "{HOME}/root/x")
    found = []
    for file in _repository_files():
        data = file.read_bytes()
        if b"\0" in data[:4096]:  # not text
            continue
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
            if machine.search(line):
                found.append(f"{file.relative_to(REPO)}:{number}: {line.strip()[:80]}")
    assert not found
