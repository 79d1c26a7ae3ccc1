"""CIFAR, Fashion-MNIST and SVHN in their authors' files, and their download from a server that fails."""

import gzip
import hashlib
import http.server
import io
import os
import pickle
import struct
import tarfile
import threading

import numpy as np
import pytest
import scipy.io
from conftest import data_section

from ffl_jax import data
from ffl_jax.data import cifar, originals
from ffl_jax.errors import DatasetError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 32, 32, 3), np.uint8)
LABELS = np.array([0, 1, 2, 3] * 3)
NAMES = ("apple", "bee", "cup", "day")
ROWS = IMAGES.transpose(0, 3, 1, 2).reshape(12, -1)  # as CIFAR stores them: all reds first
# {file: positions} of a dataset of ten images to train on, two to test
CIFAR10 = {f"data_batch_{i + 1}": slice(2 * i, 2 * i + 2) for i in range(5)} | {"test_batch": slice(10, 12)}
CIFAR100 = {"train": slice(0, 10), "test": slice(10, 12)}


def config(name, data_dir="", **changes):
    return data_section(name=name, data_dir=str(data_dir), **changes)


def by_python_2(rows: np.ndarray, key: bytes, labels) -> bytes:
    """A batch as the published files hold it: opcodes of cPickle's protocol 2, byte by byte."""
    text = lambda value: b"U" + bytes([len(value)]) + value  # noqa: E731
    pixels = np.ascontiguousarray(rows).tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01"
    array += b"(K%cM%st" % (len(rows), struct.pack("<H", rows.shape[1]))
    array += b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array += b"\x89T" + struct.pack("<I", len(pixels)) + pixels + b"tb"
    numbers = b"](" + b"".join(b"K%c" % label for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(key) + numbers + b"u."


def python_files(name, protocol=None):
    batches, key, meta, names = {
        "cifar10": (CIFAR10, b"labels", "batches.meta", b"label_names"),
        "cifar100": (CIFAR100, b"fine_labels", "meta", b"fine_label_names"),
    }[name]
    files = {}
    for file, chosen in batches.items():
        batch = {b"data": ROWS[chosen], key: LABELS[chosen].tolist(), b"coarse_labels": [0]}
        files[file] = (
            pickle.dumps(batch, protocol) if protocol else by_python_2(ROWS[chosen], key, LABELS[chosen])
        )
    return files | {meta: pickle.dumps({names: [one.encode() for one in NAMES]}, protocol or 2)}


def binary_files(name):
    batches, meta = {
        "cifar10": (CIFAR10, "batches.meta.txt"),
        "cifar100": (CIFAR100, "fine_label_names.txt"),
    }[name]
    labels = LABELS[:, None] if name == "cifar10" else np.stack([LABELS * 0 + 7, LABELS], axis=1)
    rows = np.concatenate([labels.astype(np.uint8), ROWS], axis=1)
    files = {f"{file}.bin": rows[chosen].tobytes() for file, chosen in batches.items()}
    return files | {meta: "\n".join(NAMES).encode() + b"\n\n"}


def write(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def packed(folder: str, files) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def assert_ours(dataset):
    assert dataset.class_names == NAMES
    np.testing.assert_array_equal(dataset.train.images, IMAGES[:10])
    np.testing.assert_array_equal(dataset.test.images, IMAGES[10:])
    np.testing.assert_array_equal(np.concatenate([dataset.train.labels, dataset.test.labels]), LABELS)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("place", ["inside", "itself", "archive", "named archive", "manual"])
@pytest.mark.parametrize("form", ["python 2", "binary"])
def test_cifar_as_people_have_it(name, place, form, tmp_path):
    version = cifar._VERSIONS[name][form == "binary"]
    files = binary_files(name) if form == "binary" else python_files(name)
    where = tmp_path
    if "archive" in place:
        (tmp_path / version.archive).write_bytes(packed(version.folder, files))
        where = tmp_path / version.archive if place == "named archive" else tmp_path
    else:
        write(tmp_path / version.folder, files)
        where = tmp_path / version.folder if place == "itself" else tmp_path
    section = config(name, manual_dir=str(where)) if place == "manual" else config(name, where)
    assert_ours(data.load(section))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar_pickled_again_by_python_3(protocol, tmp_path):
    write(tmp_path / "cifar-100-python", python_files("cifar100", protocol))
    assert_ours(data.load(config("cifar100", tmp_path)))


def test_another_size(tmp_path):
    write(tmp_path / "cifar-100-python", python_files("cifar100"))
    dataset = data.load(config("cifar100", tmp_path, image_size=16))
    assert dataset.train.images.shape == (10, 16, 16, 3)


class Evil:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda canary: pickle.dumps({b"data": Evil(canary)}), "it asks for posix.mkdir"),
        (lambda _: pickle.dumps([1]), "it is no dictionary"),
        (lambda _: pickle.dumps({b"data": ROWS.astype(float), b"fine_labels": [1]}), "numbers of type"),
        (lambda _: pickle.dumps({b"data": ROWS, b"fine_labels": [1]}), "it has pixels (12, 3072)"),
        (lambda _: pickle.dumps({b"data": ROWS}), "fine_labels"),
        (lambda _: by_python_2(ROWS, b"fine_labels", LABELS)[:-100], "no pickle of CIFAR"),
        (lambda _: b"", "Ran out of input"),
        (lambda _: b"\x80\x02X\xff\xff\xff\x7f", "no pickle of CIFAR"),
    ],
)
def test_a_pickle_runs_no_code(content, message, tmp_path):
    write(tmp_path / "cifar-100-python", python_files("cifar100") | {"train": content(tmp_path / "canary")})
    with pytest.raises(DatasetError, match=r"cifar-100-python/train is damaged") as raised:
        data.load(config("cifar100", tmp_path))
    assert message in str(raised.value)
    assert not (tmp_path / "canary").exists()


def test_no_flipped_bit_of_an_archive_is_trained_on(tmp_path):
    """Nor a piece of one: gzip has a checksum over all of it."""
    whole, path = packed("cifar-100-python", python_files("cifar100")), tmp_path / "cifar-100-python.tar.gz"
    damaged = [whole[:end] for end in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    for place in RNG.integers(10, len(whole), 500 if os.environ.get("FFL_LONG_FAULTS") else 15):
        damaged.append(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"\.tar\.gz is damaged: .*download it again"):
            data.load(config("cifar100", tmp_path))


@pytest.mark.parametrize("missing", ["test_batch.bin", "data_batch_3.bin", "batches.meta.txt"])
def test_a_missing_file_is_named(missing, tmp_path):
    files = binary_files("cifar10")
    del files[missing]
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(packed("cifar-10-batches-bin", files))
    with pytest.raises(DatasetError, match=f"has no {missing}: unpack or download it again"):
        data.load(config("cifar10", tmp_path))


def test_a_folder_without_it(tmp_path):
    with pytest.raises(
        DatasetError, match=r"has no cifar10: it must hold cifar-10-binary.tar.gz, cifar-10-python"
    ):
        data.load(config("cifar10", tmp_path))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist(suffix, tmp_path):
    """A head of four numbers for images, two for labels, in the order of big computers."""
    for name, chosen in (("train", slice(0, 10)), ("t10k", slice(10, 12))):
        grey = IMAGES[chosen, :28, :28, 0]
        arrays = {
            "images-idx3-ubyte": (grey, b"\x00\x00\x08\x03"),
            "labels-idx1-ubyte": (LABELS[chosen], b"\0\0\x08\x01"),
        }
        for kind, (array, head) in arrays.items():
            content = head + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()
            (tmp_path / f"{name}-{kind}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    dataset = data.load(config("fashion_mnist", tmp_path))
    np.testing.assert_array_equal(dataset.test.images, np.stack([IMAGES[10:, :28, :28, 0]] * 3, axis=-1))
    np.testing.assert_array_equal(dataset.train.labels, LABELS[:10])
    assert dataset.class_names[9] == "Ankle boot"
    (tmp_path / f"t10k-labels-idx1-ubyte{suffix}").write_bytes(b"\0\0\x0d\x01")
    with pytest.raises(DatasetError, match=r"t10k-labels-idx1-ubyte(.gz)? is damaged"):
        data.load(config("fashion_mnist", tmp_path))


def test_svhn(tmp_path):
    for name, chosen in (("train", slice(0, 10)), ("test", slice(10, 12))):
        y = np.where(LABELS[chosen] == 0, 10, LABELS[chosen])[:, None]  # the digit 0 is class 10
        scipy.io.savemat(tmp_path / f"{name}_32x32.mat", {"X": IMAGES[chosen].transpose(1, 2, 3, 0), "y": y})
    dataset = data.load(config("svhn_cropped", tmp_path))
    np.testing.assert_array_equal(dataset.train.images, IMAGES[:10])
    np.testing.assert_array_equal(dataset.test.labels, LABELS[10:])
    assert dataset.class_names == tuple("0123456789")


# -- downloading -------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`; `faults` are what goes wrong with the first, second, ... request."""

    content, faults, asked = b"", [], []

    def do_GET(self):
        fault = self.faults.pop(0) if self.faults else ""
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.asked.append(start)
        if fault == "404":
            return self.send_error(404)
        start = 0 if fault == "no ranges" else start
        content = self.content[start:]
        if fault == "wrong":
            content = bytes(len(content))
        self.send_response(206 if start else 200)
        lie = {"claims more": 10, "claims less": -10}.get(fault, 0)
        self.send_header("Content-Length", str(len(content) + lie))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """(a server of CIFAR-100, its faults, where the requests began)"""
    content = packed("cifar-100-binary", binary_files("cifar100"))
    handler = type("Handler", (Server,), {"content": content, "faults": [], "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/cifar-100-binary.tar.gz"
        sha256 = hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(cifar._DOWNLOADS, "cifar100", originals.Download(url, len(content), sha256))
        monkeypatch.setattr(originals.time, "sleep", lambda seconds: None)
        monkeypatch.setenv("TFDS_DATA_DIR", "/nowhere")
        yield handler
        running.shutdown()


@pytest.mark.parametrize(
    ("faults", "begun"),
    [
        ([], [0]),
        (["cut", "cut"], [0, 1, 2]),  # halves, and then from there
        (["cut", "no ranges"], [0, 1]),
        (["wrong"], [0, 0]),
        (["404", "404"], [0, 0, 0]),
        (["claims more"], [0]),
        (["claims less", "", ""], [0, 1]),
    ],
)
def test_download(faults, begun, server, tmp_path):
    server.faults[:] = faults
    section = config("cifar100", cache_dir=str(tmp_path))
    assert_ours(data.load(section))
    whole = len(server.content)
    parts = {0: 0, 1: whole // 2, 2: whole // 2 + (whole - whole // 2) // 2}
    if faults[:1] == ["claims less"]:
        parts[1] = whole - 10
    assert server.asked == [parts[one] for one in begun]
    assert_ours(data.load(section))  # it is kept
    assert len(server.asked) == len(begun)
    assert [path.name for path in (tmp_path / "downloads" / "cifar100").iterdir()] == [
        "cifar-100-binary.tar.gz"
    ]


def test_a_download_goes_on_where_another_start_left_it(server, tmp_path):
    server.faults[:] = ["cut"] + ["404"] * 4
    section = config("cifar100", cache_dir=str(tmp_path))
    with pytest.raises(
        DatasetError, match=r"Cannot download .*404.* or put cifar-100-binary.tar.gz, or cifar-100-p"
    ):
        data.load(section)
    assert_ours(data.load(section))
    assert server.asked[-1] == len(server.content) // 2


def test_no_network(server, tmp_path, monkeypatch):
    gone = originals.Download("http://127.0.0.1:9/cifar-100-binary.tar.gz", 10, "")
    monkeypatch.setitem(cifar._DOWNLOADS, "cifar100", gone)
    with pytest.raises(
        DatasetError, match=r"Cannot download http://127.0.0.1:9/.*refused.*config.data.data_dir"
    ):
        data.load(config("cifar100", cache_dir=str(tmp_path)))
