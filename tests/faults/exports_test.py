"""Exported files and images that are not what they should be: refused in one line, or named and left out.

FFL_LONG_FAULTS=1 python -m pytest tests/faults/exports_test.py does the long part: some thousands of flips,
cuts and odd cards.
"""

import copy
import importlib
import io
import json
import os
import socket
import sys
import zipfile
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from configs import digits
from ffl_jax import deployment, predict
from ffl_jax.deployment import card as cards
from ffl_jax.deployment import huggingface, predictor, safetensors
from ffl_jax.errors import CheckpointError, ConfigError, DatasetError, FFLError, ResourceError
from ffl_jax.methods import METHODS
from ffl_jax.workdir import sealing

FLIPS, CARDS = (500, 2000) if os.environ.get("FFL_LONG_FAULTS") else (15, 30)
CARD = {
    "card_version": 2,
    "modules": [],
    "ffl_jax": "0.1.0",
    "predictor": "sub_0",
    "method": "ffl",
    "networks": ["resnet8"],
    "dataset": "folder",
    "class_names": ["ant", "bee", "cat"],
    "image_size": [8, 8],
    "channels": "RGB",
    "crop": "pad",
    "max_value": 65535,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.25, 0.3],
    "parameters": 77587,
    "flops": 1000,
    "step": 69,
    "epoch": 3.0,
    "seed": 0,
    "test": {"top1": 0.5, "nll": None},
    "input": "nhwc-uint8",
    "precision": "float32",
    "checked_on": "test split",
    "architecture": {"network": "resnet8", "num_classes": 3},
}
IMAGES = np.random.default_rng(1).integers(256, size=(5, 8, 8, 3)).astype(np.uint8)


FORMATS = [name for name in deployment.FORMATS if name != "huggingface"]  # of one file


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{format: bytes of an exported ResNet-8 of random variables}, and its logits of `IMAGES`."""
    function, shapes = predictor.build(CARD)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), shapes)
    statistics = jax.tree.map(lambda x: 1 + np.abs(x), variables["batch_stats"])
    variables = {**variables, "batch_stats": statistics}
    path, contents = tmp_path_factory.mktemp("exported") / "model", {}
    for name in FORMATS:
        importlib.import_module(f"ffl_jax.deployment.{name}").write(path, function, variables, CARD)
        contents[name] = path.read_bytes()
    return contents, np.asarray(jax.jit(function)(variables, IMAGES))


def content(exported, name):
    return exported[0][name]


def refused(path, *words, kind=CheckpointError):
    """What stands behind `error: `: one line that names the file and holds the words."""
    with pytest.raises(kind) as caught:
        deployment.load(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("name", FORMATS)
def test_whole_files_are_read(exported, tmp_path, name):
    (tmp_path / "model").write_bytes(content(exported, name))
    model = deployment.load(tmp_path / "model")
    assert (model.format, model.card) == (name, CARD)
    limit = 1e-5 * np.abs(exported[1]).max()
    np.testing.assert_allclose(model.logits(IMAGES), exported[1], rtol=0, atol=limit)


# -- the bytes of a file ------------------------------------------------------------------------------------

FILES = {
    "empty": (lambda data: b"", "is no exported predictor"),
    "a text": (lambda data: b"no model", "is no exported predictor"),
    "a picture": (lambda data: b"\x89PNG\r\n\x1a\n", "is no exported predictor"),
    "a text in a zip": (lambda data: b"PK\x03\x04no model", "it has no digest"),
    "one byte": (lambda data: data[:1], ""),
    "half": (lambda data: data[: len(data) // 2], "export it again"),
    "without the last byte": (lambda data: data[:-1], "card or weights have changed"),
    "with a byte more": (lambda data: data + b"\0", "card or weights have changed"),
    "twice": (lambda data: data * 2, "card or weights have changed"),
    "a page of zeros": (
        lambda data: data[:8192] + b"\0" * 4096 + data[12288:],
        "card or weights have changed",
    ),
    "the digest of nothing": (
        lambda data: data.replace(sealing.EMPTY.encode()[:15], b"ffl_jax sha512 "),
        "it has no digest: an older version wrote it, or it is damaged; export it again",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("fault", FILES)
def test_damaged_files(exported, tmp_path, name, fault):
    damage, words = FILES[fault]
    (tmp_path / "model").write_bytes(damage(content(exported, name)))
    refused(tmp_path / "model", words)


@pytest.mark.parametrize("name", FORMATS)
def test_no_bit_is_without_effect(exported, tmp_path, name):
    data, path, rng = content(exported, name), tmp_path / "model", np.random.default_rng(7)
    edges = [*range(64), *range(8 * len(data) - 64, 8 * len(data))]
    for bit in (*edges, *rng.integers(8 * len(data), size=FLIPS)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        refused(path)
    for size in rng.integers(len(data), size=FLIPS // 5):
        path.write_bytes(data[:size])
        refused(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


NO_FILES = {
    "nothing": (lambda path: None, "there is no file"),
    "a link to nothing": (lambda path: path.symlink_to("none"), "there is no file"),
    "a link to itself": (lambda path: path.symlink_to(path), "cannot be read"),
    "a folder": (lambda path: path.mkdir(), "is a folder, not a file"),
    "a named pipe": (os.mkfifo, "is a named pipe, not a file"),
    "a socket": (make_socket, "is a socket, not a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "a name too long": (lambda path: None, "cannot be read"),
    "3 GB": (
        lambda path: [path.touch(), os.truncate(path, 3 * 10**9)],
        "has 3.0 GB, and at most 2.1 GB are read",
    ),
}


@pytest.mark.parametrize("fault", NO_FILES)
def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    make, words = NO_FILES[fault]
    path = tmp_path / ("x" * 300 if fault == "a name too long" else "model")
    make(path)
    refused(path, words)


def folder(tmp_path):
    """An export in the layout of the hub, random."""
    function, shapes = predictor.build(CARD)
    variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    huggingface.write(tmp_path / "model", function, variables, CARD)
    return tmp_path / "model"


def other(change):
    def damage(path):
        config = json.loads((path / "config.json").read_text())
        change(config)
        (path / "config.json").write_text(json.dumps(config))

    return damage


CHANGED = "config.json is not what was exported: export it again"
FOLDERS = {
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "has no model.safetensors"),
    "no config": (lambda path: (path / "config.json").unlink(), "there is no file"),
    "a flipped bit": (
        lambda path: (path / "model.safetensors").write_bytes(
            (path / "model.safetensors").read_bytes()[:-1] + b"\xff"
        ),
        "card or weights have changed",
    ),
    "another class": (
        other(lambda config: config["id2label"].update({"0": "cow"})),
        CHANGED,
    ),
    "another card": (
        other(lambda config: config["ffl_jax"].update(std=[1, 1, 1])),
        CHANGED,
    ),
    "one more key": (other(lambda config: config.update(more=1)), CHANGED),
    "no JSON": (lambda path: (path / "config.json").write_text("{"), CHANGED),
    "brackets": (lambda path: (path / "config.json").write_text("[" * 10**5), CHANGED),
    "a pipe": (
        lambda path: [(path / "config.json").unlink(), os.mkfifo(path / "config.json")],
        "is a named pipe, not a file",
    ),
    "weights of a file": (
        lambda path: safetensors.write(
            path / "model.safetensors", lambda weights, images: weights["a"] * 1.0, {"a": np.ones(1)}, CARD
        ),
        "",
    ),
}


@pytest.mark.parametrize("fault", FOLDERS)
def test_damaged_folders(tmp_path, fault):
    path, (damage, words) = folder(tmp_path), FOLDERS[fault]
    damage(path)
    refused(path, words)


def test_whole_folders_are_read(tmp_path):
    """Line ends of another system and a page of one's own are no damage."""
    path = folder(tmp_path)
    config = (path / "config.json").read_text().replace("\n", "\r\n")
    (path / "config.json").write_bytes(config.encode())
    (path / "README.md").write_text("mine")
    (path / ".gitattributes").write_text("")
    model = deployment.load(path)
    assert (model.format, model.card) == ("huggingface", CARD)


# -- files that are sealed all the same, by a program that is not this one ----------------------------------


def resealed(data, name, card=None, weights=None):
    """The bytes of a file with another card (its text), or, of safetensors, with other weights."""
    card = json.dumps(card) if isinstance(card, dict) else card
    if name == "stablehlo":
        content = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(content, "w") as new:
            new.writestr("card.json", card)
            new.writestr("program.bin", old.read("program.bin"))
            new.comment = sealing.EMPTY.encode()
        return content.getvalue()
    if name == "safetensors":
        from safetensors.numpy import load, save

        metadata = {"card": card or json.dumps(CARD), sealing.KEY: sealing.EMPTY}
        return save((weights or dict)(load(data)), metadata)
    import onnx

    model = onnx.load_model_from_string(data)
    onnx.helper.set_model_props(model, {"card": card, sealing.KEY: sealing.EMPTY})
    return model.SerializeToString()


def without(key):
    return {name: value for name, value in CARD.items() if name != key}


PROGRAMS = {  # that are not those of their card
    "another size": ({**CARD, "image_size": [8, 9]}, "image_size does not fit", ("stablehlo", "onnx")),
    "more classes": (
        {**CARD, "class_names": list("abcd"), "architecture": {"network": "resnet8", "num_classes": 4}},
        "",
        FORMATS,
    ),
    "other classes": ({**CARD, "class_names": ["ant", "bee"]}, "class_names are 2", FORMATS),
    "no card": ("{}", "its card has no card_version", FORMATS),
    "another network": (
        {**CARD, "architecture": {"network": "resnet14", "num_classes": 3}},
        "it lacks batch_stats/stage1_block2",
        ("safetensors",),
    ),
    "an unknown network": (
        {**CARD, "architecture": {"network": "resnet9", "num_classes": 3}},
        "its card's architecture is not known here: unknown network 'resnet9'",
        ("safetensors",),
    ),
    "an unknown method": (
        {**CARD, "architecture": {"method": {"name": "x"}, "subnetworks": {}, "num_classes": 3}},
        "",
        ("safetensors",),
    ),
}


@pytest.mark.parametrize(
    ("fault", "name"), [(fault, name) for fault, row in PROGRAMS.items() for name in row[2]]
)
def test_programs_of_another_card(exported, tmp_path, fault, name):
    card, words, _ = PROGRAMS[fault]
    sealing.write(tmp_path / "model", resealed(content(exported, name), name, card))
    refused(tmp_path / "model", words)


BIAS = "params/head/bias"
WEIGHTS = {
    "one missing": (lambda old: {k: v for k, v in old.items() if k != BIAS}, f"it lacks {BIAS}"),
    "one more": (lambda old: old | {"more": np.ones(3)}, "it has no place for more"),
    "another name": (lambda old: {k.upper(): v for k, v in old.items()}, "it lacks"),
    "another shape": (lambda old: old | {BIAS: np.zeros(4, np.float32)}, f"{BIAS} is float32 [4]"),
    "another type": (lambda old: old | {BIAS: np.zeros(3)}, f"{BIAS} is float64 [3]"),
    "NaN": (lambda old: old | {BIAS: np.float32([0, np.nan, 0])}, f"{BIAS} is not finite"),
    "infinite": (lambda old: old | {BIAS: np.float32([0, np.inf, 0])}, f"{BIAS} is not finite"),
    "none": (lambda old: {}, "it lacks"),
}


@pytest.mark.parametrize("fault", WEIGHTS)
def test_other_weights(exported, tmp_path, fault):
    weights, words = WEIGHTS[fault]
    data = resealed(content(exported, "safetensors"), "safetensors", weights=weights)
    sealing.write(tmp_path / "model", data)
    refused(tmp_path / "model", words)


def packed(data):
    """A zip of 3 MB whose program unpacks to 3 GB; written in pieces, to take no memory here."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("card.json", json.dumps(CARD))
        with archive.open("program.bin", "w", force_zip64=True) as member:
            for _ in range(3 if FLIPS == 15 else 3000):
                member.write(bytes(10**6))
        archive.comment = sealing.EMPTY.encode()
    return content.getvalue()


def external(data):
    """Weights in a file of their own, on a model that would compute without them."""
    import onnx

    model = onnx.load_model_from_string(data)
    first = next(one for one in model.graph.initializer if len(one.raw_data) > 1000)
    first.ClearField("raw_data")
    first.data_location = onnx.TensorProto.EXTERNAL
    first.external_data.add(key="location", value="weights.bin")
    onnx.helper.set_model_props(model, {"card": json.dumps(CARD), sealing.KEY: sealing.EMPTY})
    return model.SerializeToString()


def header(text, size=None):
    return lambda data: (len(text) if size is None else size).to_bytes(8, "little") + text


SEAL = sealing.EMPTY.encode()
HOSTILE = {
    "unpacks to more": ("stablehlo", packed, "it is packed"),
    "a header of 2^60 bytes": ("safetensors", header(b"{" + SEAL, 2**60), "its header has 1,152,921,504,606"),
    "a header of 100 MB": ("safetensors", header(b"{" + b" " * 10**8 + SEAL), "its header has 100,000,"),
    "a header of brackets": ("safetensors", header(b"{" + b'"a":[' * 10**5 + SEAL), "cannot be read"),
    "weights elsewhere": ("onnx", external, "cannot be read"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_nothing_is_unpacked_or_fetched(exported, tmp_path, monkeypatch, fault):
    name, make, words = HOSTILE[fault]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(10**6))
    sealing.write(tmp_path / "model", make(content(exported, name)))
    refused(tmp_path / "model", words)


# -- cards --------------------------------------------------------------------------------------------------

VALUES = [
    *(("card_version", value) for value in (0, -1, 1.0, True, "1", None)),
    *(("class_names", value) for value in ([], ["a", "a"], ["a", ""], ["a", 1], "abc", {"a": 0}, None)),
    *(("image_size", value) for value in ([0, -1], [10**9] * 2, [8], [8, 8, 3], [8.0, 8], 8, "88")),
    *(
        ("mean", value)
        for value in ([float("nan")] * 3, [125, 123, 114], [0.5], [True] * 3, ["0.5"] * 3, 0.5)
    ),
    *(("std", value) for value in ([0, 1, 1], [-1, 1, 1], [58, 57, 57], [float("inf")] * 3, None)),
    *(("crop", value) for value in ("none", None, ["pad"])),
    *(("max_value", value) for value in (0, -1, 255.5, "65535", None)),
    *(("architecture", value) for value in ({}, [], None, {"network": "resnet8"})),
    ("architecture", {"network": 8, "num_classes": 3}),
    ("architecture", {"method": {"name": "dml"}, "subnetworks": {"num": 10**9}, "num_classes": 3}),
    *(("input", value) for value in ("", "nchw", None)),
    *(("precision", value) for value in ("int8", 16, None)),
    *(("checked_on", value) for value in ("", "test", None)),
    *(("channels", value) for value in ("BGR", 3, None)),
    *(("test", value) for value in (0.5, [], {"top1": "0.5"}, {"top1": float("nan")})),
    *(("step", value) for value in (-1, 0.5, "69", None, 10**30)),
    *(("epoch", value) for value in (-1, "3", float("inf"), None)),
    *(("flops", value) for value in (-1, 0.5, "1")),
    *(("networks", value) for value in ([], "resnet8", [8])),
    *(("predictor", value) for value in ("", 0, None, "x" * 1001)),
]


def parse_refused(text, *words):
    with pytest.raises(CheckpointError) as caught:
        cards.parse(text)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for word in words:
        assert word in message


@pytest.mark.parametrize(("key", "value"), VALUES, ids=lambda value: repr(value)[:40])
def test_cards_of_odd_values(key, value):
    parse_refused(json.dumps({**CARD, key: value}), f"its card's {key} is", "export it again")


def test_cards_of_other_keys_and_versions(exported, tmp_path):
    assert cards.parse(json.dumps(CARD)) == CARD
    parse_refused(json.dumps({**CARD, "card_version": 1}), "a key that is not known, 'checked_on'")
    new = ("input", "precision", "checked_on", "max_value")
    old = json.dumps({key: x for key, x in CARD.items() if key not in new} | {"card_version": 1})
    assert cards.parse(old) == CARD
    for key in CARD:
        parse_refused(json.dumps(without(key)), f"its card has no {key}")
    parse_refused(json.dumps({**CARD, "more": 1}), "a key that is not known, 'more'")
    parse_refused(json.dumps({**CARD, "card_version": 3, "more": 1}), "its card_version is 3", "use a newer")
    many = json.dumps({**CARD, "class_names": [f"{k:x}" for k in range(10**6)]})
    parse_refused(many, "its card's class_names is ['0', '1'", "1 to 100000 texts")
    parse_refused("1" * 2**25, "its card has 33,554,432 bytes")
    for text in ("", "{", "[]", "null", "1", '{"a":' * 10**5, "\udcff", b"\xff\xfe"):
        parse_refused(text, "its card is not")
    for name in exported[0]:
        sealing.write(tmp_path / name, resealed(content(exported, name), name, without("std")))
        refused(tmp_path / name, "cannot be used: its card has no std: export it again")


@pytest.mark.parametrize("name", METHODS)
def test_a_card_can_describe_every_method(name):
    config = digits.get_config(f"method={name}").to_dict()
    sections = {key: config[key] for key in ("method", "subnetworks", "teachers") if key in config}
    card = json.loads(json.dumps({**CARD, "architecture": {**sections, "num_classes": 3}}))
    assert cards.parse(json.dumps(card)) == card


def mutated(rng):
    """A card with some of its values, at any depth, removed, doubled or replaced."""
    card = json.loads(json.dumps(CARD))
    odd = [
        None,
        True,
        -1,
        0,
        3,
        1e300,
        float("nan"),
        10**400,
        "",
        "é\nnew",
        "x" * 2000,
        [],
        {},
        [[]],
        {"": 0},
    ]
    for _ in range(rng.integers(1, 4)):
        here = card
        while True:
            places = list(here) if isinstance(here, dict) else list(range(len(here)))
            place = places[rng.integers(len(places))] if places else None
            inner = None if place is None else here[place]
            if isinstance(inner, dict | list) and inner and rng.random() < 0.6:
                here = inner
                continue
            break
        if place is None:
            continue
        if rng.random() < 0.3:
            del here[place]
        elif rng.random() < 0.2 and isinstance(here, dict):
            here[f"{place}2"] = copy.deepcopy(inner)
        else:
            here[place] = copy.deepcopy(odd[rng.integers(len(odd))])
        if not card:
            break
    return json.dumps(card)


def test_any_card_is_read_or_refused(exported, tmp_path):
    """And what is read is what was written, and gives a model, or a refusal, in turn."""
    rng, data, kept = np.random.default_rng(3), content(exported, "safetensors"), 0
    for _ in range(CARDS):
        text = mutated(rng)
        try:
            card = cards.parse(text)
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017, there need not be one
            continue
        assert card == json.loads(text)
        sealing.write(tmp_path / "model", resealed(data, "safetensors", text))
        try:
            model = deployment.load(tmp_path / "model")
        except CheckpointError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017
        else:
            assert len(model.class_names) == model.card["architecture"]["num_classes"] == 3
            kept += 1
    assert kept < CARDS / 2


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("Unable to initialize backend 'tpu'"), "Unable to initialize backend 'tpu'"),
        (AssertionError(), "there is none of that kind"),  # what JAX 0.10 raises for a missing CUDA
    ],
)
def test_a_device_that_is_not_there(exported, tmp_path, monkeypatch, error, words):
    (tmp_path / "model").write_bytes(content(exported, "stablehlo"))
    monkeypatch.setattr(jax, "devices", mock.Mock(side_effect=error))
    with pytest.raises(ConfigError, match=f"JAX finds no device: {words}; set JAX_PLATFORMS"):
        deployment.load(tmp_path / "model")


# -- images that are classified -----------------------------------------------------------------------------

PICTURES = {  # in the order of their names: what makes it, and what is said of it
    "a_pipe.png": (os.mkfifo, "is a named pipe, not a file"),
    "b_device.png": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "c_none.png": (lambda path: path.symlink_to("none"), "No such file"),
    "d_empty.png": (lambda path: path.write_bytes(b""), "it has 0 bytes"),
    "e_text.png": (lambda path: path.write_text("no image"), "it is not a PNG or JPEG image"),
    "f_large.png": (
        lambda path: [path.touch(), os.truncate(path, 2**31)],
        "has 2.1 GB, and at most 1.1 GB are read",
    ),
    "g_line\nfeed.png": (lambda path: path.write_bytes(b""), "it has 0 bytes"),
}


def run(capsys, *arguments):
    with pytest.raises(FFLError) as caught:
        predict.command(["predict", *map(str, arguments)])
    output, errors = capsys.readouterr()
    return [json.loads(line) for line in output.splitlines()], errors.splitlines(), caught.value


@pytest.fixture
def model(exported, tmp_path):
    (tmp_path / "model").write_bytes(exported[0]["safetensors"])
    return tmp_path / "model"


def test_images_that_cannot_be_used_do_not_stop_the_others(exported, model, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("0_first.png", "z_last.png"):
        Image.fromarray(IMAGES[0]).save(folder / name)
    for name, (make, _) in PICTURES.items():
        make(folder / name)
    faulty = [folder / name for name in PICTURES]
    best = int(exported[1][0].argmax())
    for arguments in ([folder], [folder / "0_first.png", *faulty, folder / "z_last.png"]):
        lines, errors, error = run(capsys, f"--model={model}", "--json", "--batch_size=3", *arguments)
        assert [os.path.basename(line["path"]) for line in lines] == ["0_first.png", "z_last.png"]
        assert [line["classes"][0]["index"] for line in lines] == [best, best]
        for (name, (_, words)), line in zip(PICTURES.items(), errors, strict=True):
            assert line.startswith(f"error: {folder}/{' '.join(name.split())} ")
            assert words in line
        assert isinstance(error, DatasetError)
        assert str(error).startswith(f"{len(PICTURES)} could not be used")


def test_a_row_stays_a_row(exported, tmp_path, capsys):
    card = {**CARD, "class_names": ["ant", "\xe9\nnew", "\x1b[31mcat"]}
    data = resealed(content(exported, "safetensors"), "safetensors", json.dumps(card))
    sealing.write(tmp_path / "model", data)
    Image.fromarray(IMAGES[0]).save(tmp_path / "two\nlines.png")
    predict.command(["predict", f"--model={tmp_path}/model", f"{tmp_path}/two\nlines.png"])
    _, row = capsys.readouterr().out.splitlines()
    assert row.startswith(rf"{tmp_path}/two\nlines.png  ")
    assert r"\x1b[31mcat " in row
    assert "\xe9\\nnew " in row


def test_memory_that_an_image_or_a_batch_needs(model, tmp_path, capsys, monkeypatch):
    """The image is named; of a batch it is said which flag makes it smaller."""
    for k in range(3):
        Image.fromarray(IMAGES[k]).save(tmp_path / f"{k}.png")
    read = deployment.Model.read_image

    def too_large(self, encoded):
        if encoded == (tmp_path / "1.png").read_bytes():
            raise MemoryError
        return read(self, encoded)

    monkeypatch.setattr(deployment.Model, "read_image", too_large)
    lines, errors, error = run(capsys, f"--model={model}", "--json", tmp_path)
    assert [line["path"][-5:] for line in lines] == ["0.png", "2.png"]
    assert "1.png" in errors[0]
    assert "memory" in errors[0]
    assert "batch_size" not in errors[0]
    assert isinstance(error, DatasetError)

    def out_of_memory(self, images):
        raise MemoryError

    monkeypatch.setattr(deployment.Model, "probabilities", out_of_memory)
    _, _, error = run(capsys, f"--model={model}", "--json", tmp_path)
    assert isinstance(error, ResourceError)
    assert str(error) == "out of memory for 3 images: lower --batch_size."


@pytest.mark.parametrize(("stdin", "words"), [(None, "closed"), ("large", "more than"), ("empty", "0 bytes")])
def test_standard_input(model, tmp_path, capsys, monkeypatch, stdin, words):
    if stdin:
        (tmp_path / "image").write_bytes(bytes(1000) if stdin == "large" else b"")
        monkeypatch.setattr("ffl_jax.data.limits.MAX_FILE_BYTES", 999)
        stdin = (tmp_path / "image").open()
    monkeypatch.setattr(sys, "stdin", stdin)
    lines, errors, error = run(capsys, f"--model={model}", "--json", "-")
    if stdin:
        stdin.close()
    assert (lines, len(errors), error.exit_code) == ([], 1, 3)
    assert words in errors[0]


def test_one_line_and_its_exit_code(exported, tmp_path, commands):
    """As a user sees it: of a file that is one bit off, and of one whose program is another's."""
    data = bytearray(exported[0]["stablehlo"])
    data[len(data) // 2] ^= 1
    (tmp_path / "model").write_bytes(data)
    result = commands.run("-m", "ffl_jax.predict", f"--model={tmp_path}/model", "x.png", code=4)
    assert result.stderr == (
        f"error: {tmp_path}/model cannot be used: it is not what was exported: card or weights have "
        "changed; export it again.\n"
    )
