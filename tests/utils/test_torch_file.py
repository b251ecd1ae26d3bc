"""PyTorch's files are read without PyTorch, bit for bit, and nothing in them is executed."""

import os
import pickle
import re
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.utils import torch_cases as made
from tests.utils.torch_cases import assert_same
from utils.errors import UserError
from utils.torch_file import read_torch, write_torch
from utils.weight_file import read_weight_file, tensors

FORMS = ("zip", "legacy")
WRITTEN = (
    "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32",
    "uint16", "uint8", "bool", "complex64", "complex128",
)  # fmt: skip


@pytest.fixture(scope="module")
def stored(repo: Path) -> Path:
    return repo / "tests/golden/torch_files"


def expected(stored: Path, group: str) -> dict[str, np.ndarray]:
    with np.load(stored / "expected.npz") as file:
        names = [name for name in file.files if name.startswith(f"{group}.")]
        return {name.removeprefix(f"{group}."): file[name] for name in names}


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_torch(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def write(form: str, path: Path, pickled: bytes) -> Path:
    return (made.zip_file if form == "zip" else made.legacy_file)(path, pickled)


@pytest.mark.parametrize("name", ["dtypes", "views"])
@pytest.mark.parametrize("ending", [".pt", "_legacy.pt"])
def test_stored_files_of_both_forms(stored: Path, name: str, ending: str) -> None:
    content, skipped = read_torch(stored / f"{name}{ending}")
    assert_same(content, expected(stored, name))
    assert not skipped


def test_sums_are_checked_where_they_were_written(stored: Path, tmp_path: Path) -> None:
    content, _ = read_torch(stored / "views_without_sums.pt")
    assert_same(content, expected(stored, "views"))
    data = bytearray((stored / "views.pt").read_bytes())
    data[data.index(np.arange(24, dtype="<f4").tobytes())] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    assert "has a wrong check sum" in refusal(tmp_path / "a.pt")


def test_arrays_cannot_be_changed_through_each_other(stored: Path) -> None:
    for ending in (".pt", "_legacy.pt"):
        content, _ = read_torch(stored / f"views{ending}")
        assert np.shares_memory(content["base"], content["row"])
        assert not any(array.flags.writeable for array in content.values())


def test_lightning_checkpoint_without_lightning(stored: Path) -> None:
    file = read_weight_file(stored / "lightning.ckpt")
    assert_same(tensors(file.content), expected(stored, "lightning"))
    assert file.skipped == [
        "hyper_parameters.path (pathlib.PosixPath)",
        "hyper_parameters.pre_processor (torchvision.transforms.v2._container.Compose)",
        "hyper_parameters.mode (torchvision.transforms.functional.InterpolationMode)",
    ]
    assert file.content["hyper_parameters"] == {"width": 3, "dtype": "torch.float32"}
    (counts,) = file.content["callbacks"].values()
    assert (counts["best"], counts["history"], float(counts["score"])) == (0.25, [1, 2.5], 0.5)
    optimizer = file.content["optimizer_states"][0]
    assert optimizer["param_groups"][0]["betas"] == (0.9, 0.999)
    assert optimizer["state"][0]["exp_avg"].shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sparse", r"a tensor made by torch\._utils\._rebuild_sparse_tensor; convert it"),
        ("quantized", r"a tensor made by torch\._utils\._rebuild_qtensor; convert it"),
        ("meta", r"a tensor made by torch\._utils\._rebuild_meta_tensor_no_storage"),
        ("float8", r"a tensor of torch\.float8_e4m3fn; convert it"),
        ("module", r"holds a whole torch\.nn\.modules\.linear\.Linear; a state dict is needed"),
        ("own_class", r"asks for \S+\.Scale, which weights do not need; .* torch\.save\(model"),
        ("program", r"is a TorchScript program; a state dict is needed"),
    ],
)
def test_stored_files_that_are_refused(stored: Path, name: str, reason: str) -> None:
    assert re.search(reason, refusal(stored / f"refused_{name}.pt"))


def test_big_endian_files(stored: Path, tmp_path: Path) -> None:
    """Swap every storage of a file, as a big-endian machine would have written it."""
    wanted = expected(stored, "dtypes")
    swapped = tmp_path / "a.pt"
    with zipfile.ZipFile(stored / "dtypes.pt") as old, zipfile.ZipFile(swapped, "w") as new:
        order = ["float64", "float32", "float16", "bfloat16", *list(wanted)[4:]]
        for entry in old.infolist():
            data = old.read(entry)
            folder, _, key = entry.filename.rpartition("/")
            if folder.endswith("/data") and key.isdigit():
                name = order[int(key)]
                kind = "u2" if name == "bfloat16" else wanted[name].dtype.str[1:]
                data = np.frombuffer(data, f"<{kind}").astype(f">{kind}").tobytes()
            new.writestr(entry.filename, b"big" if entry.filename.endswith("byteorder") else data)
    assert_same(read_torch(swapped)[0], wanted)


def attacks(victim: Path | str) -> dict[str, bytes]:
    """Return pickles that would make the file `victim`, by the name that they need."""
    touch, opened = made.text(f"touch {victim}"), made.text(f"open({str(victim)!r}, 'w')")
    path = made.text(str(victim))
    return {
        "os.system": made.call("os", "system", touch),
        "posix.system": made.call("posix", "system", touch),
        "subprocess.Popen": made.call("subprocess", "Popen", touch),
        "builtins.eval": made.call("builtins", "eval", opened),
        "builtins.exec": made.call("__builtin__", "exec", opened),
        "io.open": made.call("io", "open", path, made.text("w")),
        "numpy.save": made.call("numpy", "save", path, b"K\1"),
        "runpy.run_path": made.call("runpy", "run_path", path),
        "importlib.import_module": made.call("importlib", "import_module", made.text("this")),
        "builtins.getattr": made.call("builtins", "getattr", b"ctorch\nload\n", made.text("a")),
        "webbrowser.open": b"(" + path + b"iwebbrowser\nopen\n",
        "operator.attrgetter": made.call("operator", "attrgetter", made.text("system")),
        "unheard_of.Thing": b"cunheard_of\nThing\n)\x81}b",
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("named", attacks(""))
def test_hostile_pickles_are_refused_by_name(tmp_path: Path, form: str, named: str) -> None:
    victim = tmp_path / "victim"
    path = write(form, tmp_path / "a.pt", made.dict_of(w=made.tensor(), x=attacks(victim)[named]))
    assert refusal(path).startswith(f"refused: the file asks for {named}, which weights do not")
    assert not victim.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name",
    ["torch.hub.load", "torch.load", "torch.jit._serialization.load", "functools.partial",
     "torch.storage._load_from_bytes", "torch._dynamo.x", "lightning.pytorch.core.saving._load"],
)  # fmt: skip
def test_functions_of_known_libraries_are_never_called(
    tmp_path: Path, form: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls, states, items and attributes of a stand-in have no effect."""
    victim = tmp_path / "victim"
    inner = pickle.dumps(os.getcwd) + b"c" + str(victim).encode()
    module, _, function = name.rpartition(".")
    attack = made.call(module, function, b"C" + bytes([len(inner) % 256]) + inner[:255])
    attack += made.dict_of(x=b"K\1")[2:-1] + b"b" + b"K\1a" + made.text("k") + b"K\1s"
    path = write(form, tmp_path / "a.pt", made.dict_of(w=made.tensor(), x=attack + b")R"))
    content, skipped = read_torch(path)
    assert skipped == [f"x ({name})"]
    assert_same(dict(content), {"w": np.array([1, 2, 3, 4], "f4")})
    assert not victim.exists()
    with pytest.raises(UserError, match=r"the state dict holds what is no tensor: x \("):
        tensors(content)


def test_classes_of_the_reader_cannot_be_changed(tmp_path: Path) -> None:
    """A state for a class or a function would outlive the file."""
    for target in (b"cnumpy\ndtype\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"]", b"K\1"):
        state = b"(N}" + made.text("set_state") + b"K\1s" + b"tb"
        made.zip_file(tmp_path / "a.pt", made.dict_of(w=made.tensor(), x=target + state))
        if target in (b"]", b"K\1"):
            assert "a state for something that has none" in refusal(tmp_path / "a.pt")
        else:
            assert read_torch(tmp_path / "a.pt")[1]
    wanted = np.arange(3.0)
    path = made.zip_file(tmp_path / "a.pt", pickle.dumps({"w": wanted}, 2))
    assert_same(read_torch(path)[0], {"w": wanted})


GET, PUT = (lambda n: b"h" + bytes([n])), (lambda n: b"q" + bytes([n]))
DOUBLED = b"]" + b"".join(PUT(n) + b"0](" + GET(n) + GET(n) + b"e" for n in range(60))
WIDE = b"](" + 300 * b"N" + b"e" + PUT(0) + b"0](" + 100_000 * GET(0) + b"e"
COPIES = b"](" + 90_000 * b"N" + b"e" + PUT(0) + b"0cbuiltins\ntuple\n" + PUT(1) + b"0](" + (
    90_000 * (GET(1) + GET(0) + b"\x85R") + b"e")  # fmt: skip
CODES = b"X\x06\0\0\0latin1" + PUT(1) + b"0c_codecs\nencode\n" + PUT(2) + b"0](" + (
    9000 * (GET(2) + GET(0) + GET(1) + b"\x86R") + b"e")  # fmt: skip
FORGED = {
    "shared parts": (DOUBLED, "refer to each other again and again"),
    "shared wide list": (WIDE, "refer to each other again and again"),
    "cycle": (b"]" + PUT(0) + GET(0) + b"a", "nested more than 64 deep"),
    "deep": (1000 * b"]" + 999 * b"a", "nested more than 64 deep"),
    "deep tuples": (b"N" + 200_000 * b"\x85", "nested more than 64 deep"),
    "copies": (COPIES, "many times the size of the file"),
    "codes": (made.text("x" * 60_000) + PUT(0) + b"0" + CODES, "many times the size"),
    "steps": (2_000_001 * b"N" + b"0", "structure is too large"),
    "number": (b"\x8b\xff\xff\0\0" + 65535 * b"\x7f", "a number of .* bits at w"),
    "long text": (b"\x8d" + 7 * b"\xff" + b"\x0f", "bytes announced"),
    "long bytes": (b"\x8e\xff\xff\xff\xff\0\0\0\0", "bytes announced"),
    "bytearray": (b"\x96" + 8 * b"\xff", "bytes announced"),
    "buffer": (b"C\1x\x98", "an instruction that files of weights do not need"),
    "next buffer": (b"\x97", "an instruction that files of weights do not need"),
    "extension": (b"\x82\1", "an instruction that files of weights do not need"),
    "text reference": (b"Pos.system\n", "an instruction that files of weights do not need"),
    "reference": (b"(K\1K\2tQ", "a reference to something else than a storage"),
    "call of text": (made.text("x") + b")R", "a call of something that cannot be called"),
    "call of array": (made.tensor() + b")R", "a call of something that cannot be called"),
    "append": (made.text("x") + b"K\1a", "added to what is no list"),
    "item": (b"]K\1K\2s", "set in what is no dict"),
    "line breaks": (b"\x8c\x03a\nb\x8c\x01c\x93", r"asks for a\\nb\.c, which"),
    "long name": (made.text("a" * 5000) + made.text("b") + b"\x93", "asks for a{199}…, which"),
    "codec": (made.call("_codecs", "encode", made.text("x"), made.text("rot13")), "encoding rot13"),
    "objects": (pickle.dumps(np.array([{}], object), 2)[2:-1], "arrays of type O8; only numbers"),
    "record": (pickle.dumps(np.zeros(1, "i4,f4"), 2)[2:-1], "arrays of type V8; only numbers"),
    "short array": (pickle.dumps(np.zeros(9), 2)[2:-1].replace(b"K\x09\x85", b"K\x08\x85"),
                    r"an array of shape \(8,\) in 72 bytes"),
    "far array": (pickle.dumps(np.zeros(9), 2)[2:-1].replace(b"K\x09\x85", b"K\x0a\x85"),
                  r"an array of shape \[10\] reaches over its 72 bytes"),
}  # fmt: skip


def refusal_and_peak(path: Path) -> tuple[str, int]:
    tracemalloc.start()
    try:
        return refusal(path), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", FORGED)
def test_forged_pickles_are_refused(tmp_path: Path, kind: str) -> None:
    attack, reason = FORGED[kind]
    message = refusal(made.zip_file(tmp_path / "a.pt", made.dict_of(w=attack)))
    assert re.search(reason, message), message


@pytest.mark.parametrize("kind", [kind for kind in FORGED if kind.startswith(("long", "byte"))])
def test_announced_sizes_are_not_believed(tmp_path: Path, kind: str) -> None:
    path = made.zip_file(tmp_path / "a.pt", made.dict_of(w=FORGED[kind][0]))
    assert refusal_and_peak(path)[1] < 1e6


def test_copies_are_stopped_in_time(tmp_path: Path) -> None:
    path = made.zip_file(tmp_path / "a.pt", made.dict_of(w=COPIES))
    assert refusal_and_peak(path)[1] < 300e6


def test_keys_that_take_long_to_compare_are_left_out(tmp_path: Path) -> None:
    nested = b"N" + b"".join(PUT(n) + GET(n) + b"\x86" for n in range(60))
    huge = made.number((1 << 61) - 1 << 61)
    entries = b"}(" + nested + b"K\1" + huge + b"K\2" + b"K\5K\3u"
    path = made.zip_file(tmp_path / "a.pt", made.dict_of(w=entries))
    content, skipped = read_torch(path)
    assert content == {"w": {5: 3}}
    assert skipped == ["w.a tuple as a key (a tuple as a key)", "w.a int as a key (a int as a key)"]


BIG = 1 << 40
VIEWS: dict[str, tuple[dict[str, Any], str]] = {
    "too long": ({"shape": (5,)}, r"an array of shape \[5\] reaches over its 16 bytes"),
    "offset": ({"offset": 1}, "reaches over"),
    "stride": ({"shape": (2,), "strides": (4,)}, "reaches over"),
    "negative stride": ({"strides": (-1,), "offset": 3}, "without a proper shape"),
    "negative offset": ({"offset": -1}, "without a proper shape"),
    "negative size": ({"shape": (-1,)}, "without a proper shape"),
    "overflow": ({"shape": (2,), "strides": (1 << 61,)}, "reaches over"),
    "huge": ({"shape": (1 << 63,), "strides": (0,)}, "without a proper shape"),
    "expanded": ({"shape": (BIG, BIG), "strides": (0, 0)}, "many times the size of the file"),
    "expanded a little": ({"shape": (1 << 27,), "strides": (0,)}, "many times the size"),
    "dimensions": ({"shape": (1,) * 40, "strides": (1,) * 40}, "without a proper shape"),
    "no match": ({"shape": (2, 2)}, "not a whole PyTorch file"),
    "storage": ({"count": BIG}, "its arrays are larger than the file"),
    "negative storage": ({"count": -4}, "without a proper shape"),
    "other size": ({"count": 3}, "no entry a/data/0 of 12 bytes|another size"),
    "no storage": ({"key": "7"}, "no entry a/data/7 of 16|storages are not those"),
    "key": ({"key": "../../x"}, "no entry|storages are not those"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", VIEWS)
def test_tensors_are_checked_before_they_are_made(tmp_path: Path, form: str, kind: str) -> None:
    changed, reason = VIEWS[kind]
    path = write(form, tmp_path / "a.pt", made.dict_of(w=made.tensor(**changed)))
    message, peak = refusal_and_peak(path)
    assert re.search(reason, message), message
    assert peak < 1e6


def test_small_tensors_may_be_expanded(tmp_path: Path) -> None:
    tensor = made.tensor(shape=(1000, 4), strides=(0, 1))
    content, _ = read_torch(made.zip_file(tmp_path / "a.pt", made.dict_of(w=tensor)))
    assert_same(content["w"], np.tile(np.array([1, 2, 3, 4], "f4"), (1000, 1)))


def test_a_tensor_referred_to_many_times_counts_each_time(tmp_path: Path) -> None:
    tensor = made.tensor(shape=(1 << 22,), strides=(0,))  # 16 MiB
    items = tensor + PUT(0) + 20 * GET(0)
    path = made.zip_file(tmp_path / "a.pt", made.dict_of(w=b"](" + items + b"e"))
    assert "many times the size" in refusal(path)


def test_bool_and_bfloat16_are_what_they_mean(tmp_path: Path) -> None:
    tensor = made.tensor(kind="torch\nBoolStorage")
    path = made.zip_file(tmp_path / "a.pt", made.dict_of(w=tensor), {"0": b"\0\1\2\xff"})
    assert_same(read_torch(path)[0]["w"], np.array([False, True, True, True]))
    tensor = made.tensor(kind="torch\nBFloat16Storage")
    halves = np.array([0x3F80, 0xFF80, 0x7FC1, 0x0001], "<u2").tobytes()
    path = made.zip_file(tmp_path / "a.pt", made.dict_of(w=tensor), {"0": halves})
    wanted = np.array([0x3F800000, 0xFF800000, 0x7FC10000, 0x00010000], np.uint32)
    assert_same(read_torch(path)[0]["w"], wanted.view(np.float32))


def test_archives_that_lie(tmp_path: Path) -> None:
    pickled = made.dict_of(w=made.tensor())
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickled)
    assert "is compressed, which PyTorch never does" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/data.pkl", pickled)
    assert "twice or encrypted" in refusal(path)
    whole = made.zip_file(path, pickled).read_bytes()
    listed = whole.index(b"PK\1\2")  # data.pkl's entry in the table of contents
    for place, value, reason in (
        (20, (1 << 31), "is compressed"),  # compressed size alone
        (42, 5, "is not where it should be"),  # where the entry begins
        (16, 1, "has a wrong check sum"),
        (8, 1, "twice or encrypted"),
    ):
        data = bytearray(whole)
        data[listed + place : listed + place + 4] = value.to_bytes(4, "little")
        path.write_bytes(data)
        assert reason in refusal(path)
    data = bytearray(whole)
    data[listed + 20 : listed + 28] = 2 * (1 << 31).to_bytes(4, "little")
    path.write_bytes(data)
    assert "is not where it should be" in refusal(path)
    assert "cut off" in refusal(made.zip_file(path, b""))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("b/data.pkl", pickled)
    assert "neither of torch.save nor" in refusal(path)


def test_every_cut_gives_one_line(stored: Path, tmp_path: Path) -> None:
    for name in ("views.pt", "views_legacy.pt"):
        whole = (stored / name).read_bytes()
        for length in range(0, len(whole) - 1, 13):
            (tmp_path / "a.pt").write_bytes(whole[:length])
            refusal(tmp_path / "a.pt")


def test_written_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.pt"
    arrays = {
        **{name: np.arange(6).reshape(2, 3).astype(name) for name in WRITTEN},
        "empty": np.zeros((0, 3), "f4"), "scalar": np.array(3.5), "big": np.arange(3, dtype=">f4"),
        "transposed": np.arange(6.0).reshape(2, 3).T, "sliced": np.arange(12.0)[::3],
    }  # fmt: skip
    write_torch(path, arrays)
    native = {k: np.ascontiguousarray(a, a.dtype.newbyteorder("=")) for k, a in arrays.items()}
    native["scalar"] = arrays["scalar"]  # ascontiguousarray makes it a row
    assert_same(read_torch(path), (native, []))
    extra = {"epoch": 3, "lr": 0.5, "plain": [True, None, ("x", -(1 << 70))], "more": {"a": {}}}
    write_torch(path, arrays, extra)
    assert_same(read_torch(path), ({"state_dict": native, **extra}, []))
    write_torch(path, {}, {"state_dict": "none"})
    assert read_torch(path) == ({"state_dict": "none"}, [])
    assert [file.name for file in path.parent.iterdir()] == ["a.pt"]


def test_written_storages_are_aligned(tmp_path: Path) -> None:
    write_torch(tmp_path / "a.pt", {f"w{n}": np.full(n, n, "f4") for n in range(1, 20)})
    data = (tmp_path / "a.pt").read_bytes()
    for n in range(2, 20):
        assert data.index(np.full(n, n, "<f4").tobytes()) % 64 == 0


@pytest.mark.parametrize(
    ("value", "named"),
    [(np.array(["x"]), "str32"), ({1}, "set"), (1 << 5000, "int"), (b"", "bytes")],
)
def test_what_cannot_be_written(tmp_path: Path, value: Any, named: str) -> None:
    with pytest.raises(UserError, match=rf"a\.pt: cannot hold an? .*{named}"):
        write_torch(tmp_path / "a.pt", {}, {"x": value})
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_memory_is_that_of_the_file(tmp_path: Path, form: str) -> None:
    """Fifty megabytes: one copy of them as they are, three as bfloat16 with its float32."""
    count = 12_500_000
    for kind, size, limit in (("FloatStorage", 4, 1.2), ("BFloat16Storage", 2, 6.5)):
        tensor = made.tensor(shape=(count,), count=count, kind=f"torch\n{kind}")
        data = bytes(count * size)
        if form == "zip":
            path = made.zip_file(tmp_path / "a.pt", made.dict_of(w=tensor), {"0": data})
        else:
            path = made.legacy_file(tmp_path / "a.pt", made.dict_of(w=tensor), {"0": (count, data)})
        del data
        tracemalloc.start()
        content, _ = read_torch(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert content["w"].shape == (count,)
        assert peak < limit * path.stat().st_size
