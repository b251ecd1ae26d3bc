"""Pretrained weights: lookup order, downloads, mismatches, and the bundled file's origin."""

import hashlib
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle.vision.models import mobilenetv2, mobilenetv3, resnet
from safetensors.numpy import save_file

from models.backbones import BACKBONES, Backbone, build_backbone, weights
from models.backbones.weights import load_weights, read_weights
from utils import download
from utils.errors import UserError
from utils.torch_file import write_torch

NAME = "mobilenet_v2"
FILE = "small.pdparams"


def small_backbone() -> Backbone:
    return build_backbone(NAME, [2])


def arrays(value: float) -> dict[str, np.ndarray]:
    shapes = {key: tensor.shape for key, tensor in small_backbone().state_dict().items()}
    return {key: np.full(shape, value, np.float32) for key, shape in shapes.items()}


def first_value(backbone: Backbone) -> float:
    return float(next(iter(backbone.state_dict().values())).numpy().flat[0])


def write(path: Path, content: dict[str, np.ndarray]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pdparams":
        paddle.save({k: paddle.to_tensor(v) for k, v in content.items()}, str(path))
    elif path.suffix == ".npz":
        np.savez(path, **content)  # type: ignore[arg-type]
    elif path.suffix == ".pt":
        write_torch(path, content)
    else:
        save_file(content, path)
    return path


@pytest.fixture(autouse=True)
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Publish a file whose weights are all 4, and look for others in empty folders."""
    data = write(tmp_path / "server" / FILE, arrays(4)).read_bytes()
    monkeypatch.setattr(weights, "BUNDLED", tmp_path / "bundled")
    monkeypatch.setattr(weights, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(weights.PUBLISHED, NAME, (FILE, hashlib.md5(data).hexdigest()))
    monkeypatch.setenv("FLOWAD_WEIGHTS_URL", "http://127.0.0.1:9/")  # nobody listens there
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "PAUSES", (0, 0))
    return data


@pytest.fixture
def server(published: bytes) -> Iterator[str]:
    """Serve /good/, /wrong/ (another content) and /cut/ (the connection drops half-way)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, file = self.path.strip("/").split("/")
            body = published if kind != "wrong" else published[::-1]
            self.send_response(200 if file == FILE else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)

        def log_message(self, *_: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_lookup_order(tmp_path: Path, server: str, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = small_backbone()
    url = f"{server}/good/"
    cache = tmp_path / "cache" / FILE

    info = load_weights(backbone, base_url=url)
    assert (info.source, info.origin, first_value(backbone)) == (url + FILE, "download", 4)
    assert cache.is_file()

    info = load_weights(backbone, allow_random=True)  # no network needed any more
    assert (info.source, info.origin, first_value(backbone)) == (str(cache), "cache", 4)

    bundled = write(tmp_path / "bundled" / f"{NAME}.safetensors", arrays(2))
    info = load_weights(backbone)
    assert (info.source, info.origin, first_value(backbone)) == (str(bundled), "bundled", 2)

    given = write(tmp_path / "given.npz", arrays(1))
    info = load_weights(backbone, given)
    assert (info.source, info.origin, first_value(backbone)) == (str(given), "file", 1)
    assert info.sha256 == hashlib.sha256(given.read_bytes()).hexdigest()
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed == f"backbone {NAME}: weights from {given} (file, sha256 {info.sha256[:12]})"


def test_cached_file_with_wrong_md5_is_replaced(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = write(tmp_path / "cache" / FILE, arrays(9))
    monkeypatch.setenv("FLOWAD_WEIGHTS_URL", f"{server}/good/")
    backbone = small_backbone()
    assert load_weights(backbone).origin == "download"
    assert first_value(backbone) == 4
    assert [path.name for path in cache.parent.iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("wrong", "does not have md5"),
        ("cut", "connection lost after [0-9]+ of [0-9]+ bytes"),
        ("good/x", "404"),
        ("offline", "Connection refused"),
        ("nonsense", "unknown url type"),
    ],
)
def test_failed_download(tmp_path: Path, server: str, kind: str, reason: str) -> None:
    url = {"offline": "http://127.0.0.1:9/", "nonsense": "nonsense/"}.get(kind, f"{server}/{kind}/")
    if kind == "good/x":
        url = f"{server}/good/x"  # a file that is not there
    with pytest.raises(UserError, match=reason) as caught:
        load_weights(small_backbone(), base_url=url)
    message = str(caught.value)
    assert "\n" not in message
    for part in (url + FILE, str(tmp_path / "cache" / FILE), "model.backbone: efficientnet_lite0"):
        assert part in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_unpublished_backbone_without_its_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"efficientnet_lite0\.safetensors is missing"):
        load_weights(build_backbone("efficientnet_lite0", [2]))


def test_random_weights_are_seeded_and_do_not_depend_on_the_taps() -> None:
    first, again, other, deeper = (build_backbone(NAME, s) for s in ([2], [2], [2], [4]))
    infos = [
        load_weights(backbone, allow_random=True, seed=seed)
        for backbone, seed in ((first, 0), (again, 0), (other, 1), (deeper, 0))
    ]
    assert [info.origin for info in infos] == ["random"] * 4
    assert infos[0].source == "seed 0"
    assert infos[0].sha256 == infos[1].sha256 == first.weight_hash
    assert infos[2].sha256 != infos[0].sha256
    for key, tensor in first.state_dict().items():
        np.testing.assert_array_equal(deeper.state_dict()[key].numpy(), tensor.numpy())
    kernel = first.features[0][0].weight.numpy()
    assert kernel.std() == pytest.approx(np.sqrt(2 / 27), rel=0.1)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pdparams", ".pt"])
def test_formats_and_later_layers(tmp_path: Path, suffix: str) -> None:
    backbone = small_backbone()
    content = arrays(0.5)
    load_weights(backbone, write(tmp_path / "a.npz", content))
    expected = backbone.weight_hash
    more = {"features.18.0.weight": np.zeros((4, 4)), "classifier.1.bias": np.zeros(9)}
    load_weights(backbone, write(tmp_path / f"b{suffix}", {**content, **more}))
    assert backbone.weight_hash == expected
    content["features.0.0.weight"][3, 2, 1, 0] += 1e-3
    load_weights(backbone, write(tmp_path / f"c{suffix}", content))
    assert backbone.weight_hash != expected


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    content = arrays(1)
    keys = list(content)
    for key in keys[:4]:
        del content[key]
    content[keys[5]] = np.zeros((2, 1), np.float32)
    content["features.0.7.weight"] = content["other"] = np.zeros(1, np.float32)
    backbone = small_backbone()
    before = first_value(backbone)
    with pytest.raises(UserError) as caught:
        load_weights(backbone, write(tmp_path / "a.npz", content))
    assert str(caught.value) == (
        f"{tmp_path / 'a.npz'}: does not fit backbone {NAME}: "
        f"missing {keys[0]}, {keys[1]}, {keys[2]} and 1 more; "
        "unknown features.0.7.weight, other; "
        f"wrong shape {keys[5]} [2, 1] instead of [32, 1, 3, 3]"
    )
    assert first_value(backbone) == before


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pdparams", ".pt"])
def test_damaged_and_missing_files(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", arrays(1))
    whole = path.read_bytes()
    for length in (0, 5, 1000, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"a{suffix}: ") as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        read_weights(path)


def test_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    write(tmp_path / "a.npz", arrays(3)).rename(tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth").keys() == arrays(3).keys()
    write_torch(tmp_path / "b.pt", {}, {"epoch": 3})
    with pytest.raises(UserError, match=r"b\.pt: a flat state dict is needed"):
        read_weights(tmp_path / "b.pt")
    write_torch(tmp_path / "b.pt", arrays(4), {"epoch": 3})
    load_weights(backbone := small_backbone(), tmp_path / "b.pt")
    assert first_value(backbone) == 4


def test_mobilenet_v2_of_torchvision_sees_a_cat(shared_weights: Path) -> None:
    """Finish the network in numpy behind the last tap; ImageNet's classes 281 to 285 are cats."""
    from skimage.data import chelsea
    from skimage.transform import resize

    path = shared_weights / "mobilenet_v2.npz"
    backbone = build_backbone(NAME, [32])
    load_weights(backbone, path)
    photo = resize(chelsea()[:, 75:375], (224, 224), anti_aliasing=True)  # (H, W, 3) in [0, 1]
    image = ((photo - backbone.mean) / backbone.std).transpose(2, 0, 1)[None].astype("float32")
    x = backbone(paddle.to_tensor(image))[0].numpy()[0].reshape(320, -1)  # (C, H·W)
    head = np.load(path)
    w, gamma, beta, mean, variance = (
        head[f"features.18.{key}"]
        for key in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    )
    y = w[:, :, 0, 0] @ x
    y = (y - mean[:, None]) / np.sqrt(variance[:, None] + 1e-5) * gamma[:, None] + beta[:, None]
    y = np.clip(y, 0, 6).mean(1)
    logits = head["classifier.1.weight"] @ y + head["classifier.1.bias"]
    probability = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert probability[281:286].sum() > 0.8


def test_addresses_are_those_of_paddle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    known = {
        **resnet.model_urls,
        "mobilenet_v2": mobilenetv2.model_urls["mobilenetv2_1.0"],
        "mobilenet_v3_large": mobilenetv3.model_urls["mobilenet_v3_large_x1.0"],
    }
    # mcait is made of two others.
    assert set(weights.PUBLISHED) | {"efficientnet_lite0", "mcait"} == set(BACKBONES)
    checked = {name: entry for name, entry in weights.PUBLISHED.items() if entry[1]}
    for name, (file, md5) in checked.items():
        assert (weights.BASE_URL + file, md5) == known[name]
    assert set(weights.PUBLISHED) - set(checked) == {
        "efficientnet_b5", "deit_base_distilled_384", "cait_m48_448", "cait_s24_224",
    }  # fmt: skip


def test_file_without_a_published_checksum(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(weights.PUBLISHED, NAME, (f"{server}/good/{FILE}", None))
    monkeypatch.delenv("FLOWAD_WEIGHTS_URL")
    backbone = small_backbone()
    cache = tmp_path / "cache" / FILE
    for origin, shown in (("download", f"{server}/good/{FILE}"), ("cache", str(cache))):
        info = load_weights(backbone)
        assert (info.source, info.origin, first_value(backbone)) == (shown, origin, 4)
        assert info.sha256 == hashlib.sha256(cache.read_bytes()).hexdigest()
        printed = capsys.readouterr().err.splitlines()[-1]
        assert printed.endswith(f"unverified, as no md5 is published: its sha256 is {info.sha256}")
    cache.unlink()
    monkeypatch.setenv("FLOWAD_WEIGHTS_URL", f"{server}/wrong/")  # a mirror counts for all files
    with pytest.raises(UserError, match="the file received holds no weights"):
        load_weights(backbone)
    assert not cache.exists()
    with pytest.raises(UserError, match=r"put that file at .*small\.pdparams, or use"):
        load_weights(backbone, base_url="http://127.0.0.1:9/")


def test_bundled_file_is_the_one_described(repo: Path) -> None:
    facts = json.loads((repo / "pretrained/efficientnet_lite0.provenance.json").read_text())
    data = (repo / "pretrained" / facts["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == facts["sha256"]
    assert len(data) < 14e6


def test_bundled_file_is_reproducible(tmp_path: Path, repo: Path, shared_weights: Path) -> None:
    target = tmp_path / "efficientnet_lite0.safetensors"
    script = repo / "pretrained/make_efficientnet_lite0.py"
    source = shared_weights / "efficientnet_lite0.npz"
    subprocess.run([sys.executable, script, source, "--target", target], check=True)
    assert target.read_bytes() == (repo / "pretrained" / target.name).read_bytes()
