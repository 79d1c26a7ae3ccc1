"""Published PyTorch weights: what files may hold, FFL's and FFSD's names and values, the run they become."""

import contextlib
import functools
import gzip
import json
import pickle
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from ffl_jax import data, import_weights, methods
from ffl_jax.data import digits
from ffl_jax.errors import CheckpointError, ConfigError, DatasetError
from ffl_jax.methods import subnetworks
from ffl_jax.pytorch import reading
from ffl_jax.training import config as config_lib
from ffl_jax.training import conversion, scoring
from ffl_jax.training.experiment import Experiment
from ffl_jax.workdir import checkpoint, files

DATA = Path(__file__).parent / "data"
# {network: {name: shape}} of the state dicts of FFSD's released code.
SHAPES = json.loads(gzip.decompress((DATA / "ffsd_state_dicts.json.gz").read_bytes()))
# FFSD's network -> (ours, classes).
FFSD = {
    "cifar100/resnet20": ("resnet20", 100),
    "cifar100/resnet32": ("resnet32", 100),
    "cifar100/resnet56": ("resnet56", 100),
    "cifar100/wideresnet1602": ("wrn16_2", 100),
    "cifar100/wideresnet2810": ("wrn28_10", 100),
    "cifar100/wideresnet4002": ("wrn40_2", 100),
    "cifar100/densenet": ("densenet40_12", 100),
    "cifar100/googlenet": ("googlenet", 100),
    "imagenet/resnet18": ("resnet18", 1000),
    "imagenet/resnet34": ("resnet34", 1000),
}


def zeros(shapes):
    """A state dict whose numbers do not matter and take no memory."""
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}


def draw(shapes):
    """A random state dict, in which no norm is the identity."""
    rng = np.random.default_rng(0)

    def one(name, shape):
        if name.endswith("num_batches_tracked"):
            return np.int64(7)
        if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.2
        return rng.normal(0, scale, shape).astype(np.float32)

    return {name: one(name, shape) for name, shape in shapes.items()}


def load(monkeypatch, content, source="ffsd", **options):
    """Loads weights as if a file held `content`."""
    monkeypatch.setattr(reading, "read", lambda path: dict(content))
    return conversion.load(source, ["weights.npz"], **options)


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


# -- FFSD ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_every_network_of_ffsd_is_recognised(name, monkeypatch):
    network = FFSD.get(name.removesuffix("/leader"))
    if network is None:
        with pytest.raises(CheckpointError, match="no network of FFSD"):
            load(monkeypatch, zeros(SHAPES[name]))
        return
    monkeypatch.setattr(conversion, "_variables", lambda *_: {})
    weights = load(monkeypatch, zeros(SHAPES[name]))
    assert (weights.network, weights.num_classes) == network
    assert (weights.method, weights.num, weights.shared_stages) == ("independent", 1, 0)
    # By hand: two convolutions, and the four entries of two norms each.
    assert len(weights.left_out) == (10 if name.endswith("leader") else 0)
    # A student is its leader without that module.
    leader = SHAPES.get(f"{name}/leader", SHAPES[name])
    left = {key: shape for key, shape in leader.items() if not key.startswith("trans_fusion_module.")}
    assert name.endswith("leader") or SHAPES[name] == left


# Family -> {a layer of ours: the released code's}, by hand from that code: each rule once.
NAMES = {
    "cifar100/resnet20": {
        "stem_conv/kernel": "conv1.weight",
        "stage3_block2/conv2/kernel": "layer3.1.conv2.weight",
        "stage2_block1/norm1/scale": "layer2.0.bn1.weight",
        "stage2_block1/shortcut_conv/kernel": "layer2.0.downsample.0.weight",
        "stage2_block1/shortcut_norm/var": "layer2.0.downsample.1.running_var",
        "head/bias": "fc.bias",
    },
    "cifar100/wideresnet1602": {
        "stem_conv/bias": "conv1.bias",
        "stage1_block2/conv2/kernel": "layer1.1.conv2.weight",
        "stage3_block1/norm2/mean": "layer3.0.bn2.running_mean",
        "stage3_block1/shortcut_conv/bias": "layer3.0.shortcut.0.bias",
        "stage3_norm/bias": "bn1.bias",
        "head/kernel": "linear.weight",
    },
    "cifar100/densenet": {
        "stage3_layer12/conv1/kernel": "dense3.11.conv1.weight",
        "stage1_layer1/norm1/scale": "dense1.0.bn1.weight",
        "stage2_transition_conv/kernel": "trans1.conv1.weight",
        "stage3_transition_norm/var": "trans2.bn1.running_var",
        "stage3_norm/mean": "bn.running_mean",
        "head/bias": "fc.bias",
    },
    "cifar100/googlenet": {
        "stem_conv/bias": "pre_layers.0.bias",
        "stem_norm/var": "pre_layers.1.running_var",
        "stage1_block2/branch1_conv1/kernel": "inception_b3.branch1x1.0.weight",
        "stage2_block5/branch2_norm2/mean": "inception_e4.branch3x3.4.running_mean",
        "stage3_block1/branch3_conv3/kernel": "inception_a5.branch5x5.6.weight",
        "stage2_block1/branch4_conv1/kernel": "inception_a4.branch_pool.1.weight",
        "stage2_block1/branch4_norm1/scale": "inception_a4.branch_pool.2.weight",
    },
    "imagenet/resnet18": {"stage4_block2/norm2/bias": "layer4.1.bn2.bias"},
}


def numbered(shapes):
    """A state dict in which every entry holds its place."""
    return {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("name", NAMES)
def test_entries_of_ffsd_are_put_where_their_names_say(name, monkeypatch):
    """All have a place, those named above the right one; `models_wide_test` shows what it computes there."""
    shapes = SHAPES[f"{name}/leader"]
    variables = load(monkeypatch, numbered(shapes)).variables
    for ours, theirs in NAMES[name].items():
        layer, _, leaf = ours.rpartition("/")
        kind = "batch_stats" if leaf in ("mean", "var") else "params"
        found = functools.reduce(dict.get, layer.split("/"), variables[kind]["subnetworks"]["branches"])
        np.testing.assert_array_equal(found[leaf], list(shapes).index(theirs), ours)


def reference(state, x):
    """FFSD's CIFAR ResNet in NumPy, float64 and evaluation mode, on its names: [B, C, H, W] -> logits."""
    state = {name: np.asarray(value, np.float64) for name, value in state.items()}

    def layer(x, conv, norm, stride=1):
        kernel = state[f"{conv}.weight"]
        size = kernel.shape[-1]
        x = np.pad(x, ((0, 0), (0, 0), (size // 2, size // 2), (size // 2, size // 2)))
        rows, columns = ((n - size) // stride + 1 for n in x.shape[2:])
        sums = 0
        for i, j in np.ndindex(size, size):
            window = x[:, :, i::stride, j::stride][:, :, :rows, :columns]
            sums = sums + np.tensordot(kernel[:, :, i, j], window, (1, 1))
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, scale, bias = (state[f"{norm}.{key}"][:, None, None] for key in keys)
        return (sums.swapaxes(0, 1) - mean) / np.sqrt(var + 1e-5) * scale + bias

    x = np.maximum(layer(x, "conv1", "bn1"), 0)
    blocks = sorted({name.rsplit(".conv1", 1)[0] for name in state if ".conv1" in name})
    for block in (block for block in blocks if block.startswith("layer")):
        stride = 2 if block[5] > "1" and block.endswith(".0") else 1
        y = np.maximum(layer(x, f"{block}.conv1", f"{block}.bn1", stride), 0)
        y = layer(y, f"{block}.conv2", f"{block}.bn2")
        if f"{block}.downsample.0.weight" in state:
            x = layer(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
        x = np.maximum(x + y, 0)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


# -- FFL -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "classes"), [(2, 100), (3, 10)])
def test_logits_of_ffl(num, classes):
    """The first step's logits of the independent PyTorch implementation (see tests/data/README.md)."""
    weights = conversion.load("ffl-pytorch", [DATA / f"ffl_resnet8_k{num}_init.npz"])
    assert (weights.method, weights.network, weights.num_classes) == ("ffl", "resnet8", classes)
    assert (weights.num, weights.shared_stages, weights.left_out) == (num, 2, ())
    steps = np.load(DATA / f"ffl_resnet8_k{num}_steps.npz")
    method = methods.METHODS["ffl"](subnetworks.build("resnet8", num, classes, 2), classes)
    run = jax.jit(functools.partial(method.apply, train=True, mutable=["batch_stats"]))
    found, _ = run(weights.variables, np.float32(steps["step0/images"].transpose(0, 2, 3, 1)))
    assert relative(found["logits"], steps["step0/logits"]) < 1e-5
    assert relative(found["fused_logits"], steps["step0/fused"]) < 1e-5


def ffl_state(part=""):
    arrays = np.load(DATA / "ffl_resnet8_k3_init.npz")
    prefix = f"init/{part}"
    return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


def test_statistics_of_ffl(monkeypatch):
    """Fresh ones are all 0 or 1: other numbers show that each goes to the place of its name."""
    shapes = {name: x.shape for name, x in ffl_state().items()}
    statistics, names = (
        load(monkeypatch, numbered(shapes), "ffl-pytorch").variables["batch_stats"],
        list(shapes),
    )
    trunk, branches = statistics["subnetworks"]["trunk"], statistics["subnetworks"]["branches"]
    shortcut = branches["stage3_block1"]["shortcut_norm"]["mean"]
    found = {f"net/layer3_{k + 1}.0.downsample.1.running_mean": shortcut[k] for k in range(3)}
    found["net/layer2.0.bn2.running_var"] = trunk["stage2_block1"]["norm2"]["var"]
    found["fusion/bn1_1.running_mean"] = statistics["fusion"]["pointwise_norm"]["mean"]
    for name, value in found.items():
        np.testing.assert_array_equal(value, names.index(name), name)


# -- files ---------------------------------------------------------------------------------------------------


class Tensor:
    """As much of `torch.Tensor` as is read; floating-point ones are of a type that NumPy does not know."""

    def __init__(self, value, known=False):
        self.value, self.known = value, known

    def detach(self):
        return self

    def is_floating_point(self):
        return self.value.dtype.kind == "f"

    def float(self):
        return Tensor(self.value.astype(np.float32), known=True)

    def numpy(self):
        if self.is_floating_point() and not self.known:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.value


def pretend_pytorch(monkeypatch, contents):
    """A `torch` that loads `contents[file name]`, and only as weights."""

    def load(path, **options):
        assert options == {"map_location": "cpu", "weights_only": True}
        return contents[Path(path).name]

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(Tensor=Tensor, load=load))


def tensors(state, prefix=""):
    return {prefix + name: Tensor(value) for name, value in state.items()}


@pytest.mark.parametrize("form", ["npz", "two safetensors", "two pth"])
def test_forms_of_the_same_weights(form, tmp_path, monkeypatch):
    """One file or two, in any format, with the wrappings of the released code and of DataParallel."""
    parts = {"Model_300": ffl_state("net/"), "Module_300": ffl_state("fusion/")}
    states = parts if form.startswith("two") else {"both": ffl_state()}
    saved = {"npz": lambda path, state: np.savez(path, **state), "pth": lambda path, _: path.touch()}
    saved["safetensors"] = lambda path, state: save_file(dict(state), path)
    ending = form.removeprefix("two ")
    files = [tmp_path / f"{name}.{ending}" for name in states]
    for path, state in zip(files, states.values(), strict=True):
        saved[ending](path, state)
    moments = {"state": {0: {"momentum_buffer": Tensor(np.ones(3))}}, "param_groups": [{"lr": 0.1}]}
    net = tensors(parts["Model_300"], "module.") | {"module.bn1.num_batches_tracked": Tensor(np.int64(3))}
    pretend_pytorch(
        monkeypatch,
        {
            "Model_300.pth": {"epoch": 300, "state_dict": net, "optimizer": moments},
            "Module_300.pth": {
                "epoch": 300,
                "state_dict": tensors(parts["Module_300"]),
                "optimizer": moments,
            },
        },
    )
    monkeypatch.setattr(conversion, "_variables", lambda method, entries, *_: entries)
    found, expected = conversion.load("ffl-pytorch", files).variables, ffl_state()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name])


def test_wrapping_of_ffsd(tmp_path, monkeypatch):
    state = draw(small_network())
    (tmp_path / "modelleader_best.pth").touch()
    content = {"weight": tensors(state), "epoch": 226, "cfg": "resnet20", "index": "leader"}
    pretend_pytorch(monkeypatch, {"modelleader_best.pth": content})
    weights = conversion.load("ffsd", [tmp_path / "modelleader_best.pth"])
    assert weights.network == "resnet8"
    kernel = weights.variables["params"]["subnetworks"]["branches"]["head"]["kernel"]
    np.testing.assert_array_equal(kernel[0], state["fc.weight"].T)


def test_one_of_several_states(monkeypatch):
    monkeypatch.setattr(conversion, "_variables", lambda method, entries, *_: entries)
    content = {
        f"{at}/{name}": value + (at == "final")
        for name, value in ffl_state().items()
        for at in ("init", "final")
    }
    content |= {f"grad0/{name}": value for name, value in ffl_state().items() if "running" not in name}
    content["eval/logits"] = np.zeros((3, 8, 10))
    with pytest.raises(ConfigError, match=r"weights.npz:init/net, weights.npz:final/net; .* --state=GROUP"):
        load(monkeypatch, content, "ffl-pytorch")
    with pytest.raises(ConfigError, match=r"--state=last: .*there are: eval, final/fusion, final/net, grad0"):
        load(monkeypatch, content, "ffl-pytorch", state="last")
    with pytest.raises(CheckpointError, match=r"no network of FFL .*, but no state dict at all"):
        load(monkeypatch, content, "ffl-pytorch", state="grad0")
    weights = load(monkeypatch, content, "ffl-pytorch", state="final")
    bias = weights.variables["fusion/fc2.bias"]
    np.testing.assert_array_equal(bias, content["init/fusion/fc2.bias"] + np.float32(1))


@pytest.mark.parametrize(
    ("name", "content", "error", "text"),
    [
        ("none.npz", None, CheckpointError, "there is no file"),
        ("weights.bin", b"", ConfigError, r"\.npz, \.safetensors, \.pth, \.pt, \.tar"),
        ("broken.npz", b"garbage", CheckpointError, "not a whole .npz archive"),
        ("broken.safetensors", b"garbage", CheckpointError, "cannot be read: .*download it again"),
        ("broken.pth", b"garbage", CheckpointError, "cannot be read: no zip; download"),
    ],
)
def test_unreadable_files(name, content, error, text, tmp_path, monkeypatch):
    def refuse(path, **options):
        raise RuntimeError("no zip.\nAnd a page on what to do.")

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(Tensor=Tensor, load=refuse))
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=text):
        conversion.load("ffsd", [tmp_path / name])


def test_a_damaged_archive_and_a_pickle_in_it(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **{"conv1.weight": np.ones(1000), "bn1.running_mean": np.ones(3)})
    content = bytearray(path.read_bytes())
    content[2000] ^= 255
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"Bad CRC-32 for file 'conv1.weight.npy'; download it again"):
        conversion.load("ffsd", [path])
    np.savez(path, **{"conv1.weight": np.array([{}], object)})
    with pytest.raises(CheckpointError, match="Object arrays cannot be loaded"):
        conversion.load("ffsd", [path])


def test_pytorch_files_without_pytorch_and_of_more_than_weights(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise pickle.UnpicklingError("Weights only load failed. Set weights_only=False, which is dangerous.")

    (tmp_path / "best.pth.tar").touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match=r"pip install torch.*or convert the file to \.npz"):
        conversion.load("ffsd", [tmp_path / "best.pth.tar"])
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(Tensor=Tensor, load=refuse))
    with pytest.raises(CheckpointError, match="holds more than weights") as caught:
        conversion.load("ffsd", [tmp_path / "best.pth.tar"])
    assert "weights_only" not in str(caught.value)


# -- what does not fit ---------------------------------------------------------------------------------------


def without(state, *prefixes):
    return {name: x for name, x in state.items() if not name.startswith(prefixes)}


def small_network():
    """Shapes of a ResNet-8 leader for 10 classes, in FFSD's names: the first block of each stage."""
    leader, student = SHAPES["cifar100/resnet20/leader"], SHAPES["cifar100/resnet20"]
    shapes = {name: shape for name, shape in leader.items() if name[:5] != "layer"}
    shapes |= {name: shape for name, shape in student.items() if name[6:9] == ".0."}
    return shapes | {"fc.weight": [10, 64], "fc.bias": [10]}


def test_entries_that_do_not_fit(monkeypatch):
    """All at once, five of them told; and what keeps a network from being recognised."""
    state = zeros(small_network())
    spoilt = np.zeros((16, 3, 3, 3), np.float32)
    spoilt[3, 1, 2, 0] = np.nan
    changes = {
        "bn1.bias": np.ones(16, np.int64),
        "conv1.weight": spoilt,
        "fc.bias": np.full(10, 1e300),  # infinite in float32
        "fc.weight": np.ones((10, 63)),
        "bn1.x": np.ones(2),
    }
    with pytest.raises(CheckpointError) as raised:
        load(monkeypatch, without({**state, **changes}, "layer2.0.bn2.running_var"))
    message = str(raised.value)
    for text in (
        "weights.npz, resnet8, does not fit: ",
        "conv1.weight has values that are infinite or not a number",
        "fc.bias has values that are infinite",
        "fc.weight is float64[10, 63], not float32[10, 64]",
        "layer2.0.bn2.running_var is missing; ",
        " and 1 more. Take the whole file, or name the network with --network.",
    ):
        assert text in message
    for change, options, text in (
        ({**state, "x": np.ones(2)}, {}, "does not fit: x is unexpected"),
        (without(state, "fc."), {}, r"no network of FFSD .*, but weights\.npz"),
        ({**state, "fc.weight": np.ones(10)}, {}, r"fc\.weight must be \[classes, features\]"),
        ({**state, "layer1.3.x": np.ones(2)}, {}, "looks like resnet26 .* with --network"),
        # Two convolutions and the four entries of two norms, in two blocks more of each stage: 60.
        (state, {"network": "resnet20"}, r"layer1\.1\.\S+ is missing;.* and 55 more"),
        (without(state, "layer", "bn1", "conv1", "trans"), {}, "no state dict at all"),
    ):
        with pytest.raises(CheckpointError, match=text):
            load(monkeypatch, change, **options)


def test_networks_that_the_code_does_not_have(monkeypatch):
    state = zeros(small_network())
    with pytest.raises(ConfigError, match="--network=vgg16: FFSD's released code"):
        load(monkeypatch, state, network="vgg16")
    with pytest.raises(ConfigError, match="did you mean resnet"):
        load(monkeypatch, state, network="resnet21")
    with pytest.raises(ConfigError, match="--network=resnet18: FFL's released code"):
        load(monkeypatch, ffl_state(), "ffl-pytorch", network="resnet18")


@pytest.mark.parametrize(
    ("gone", "text"),
    [
        ("fusion/", "no fusion module of FFL .* a second --input, but weights.npz:net"),
        ("net/", "no network of FFL .*, but weights.npz:fusion"),
        ("net/layer3_2.0.conv2.w", r"K = 3, does not fit: net/layer3_2\.0\.conv2\.weight is missing"),
        ("net/classfier3_3.", r"fusion/conv1\.weight is float32\[192, 1, 3, 3\], not .*\[128, 1, 3, 3\]"),
    ],
)
def test_entries_of_ffl_that_do_not_fit(gone, text, monkeypatch):
    with pytest.raises(CheckpointError, match=text):
        load(monkeypatch, without(ffl_state(), gone), "ffl-pytorch")


# -- the command ---------------------------------------------------------------------------------------------


def convert(*arguments):
    import_weights.command(["import_weights", *map(str, arguments)])


def test_a_leader_becomes_a_run_that_can_be_scored(tmp_path, capsys):
    """Against NumPy on the released names, over the test split; the weights overrule the configuration."""
    state = draw(small_network())
    np.savez(tmp_path / "leader.npz", **{f"state/{name}": value for name, value in state.items()})
    workdir = tmp_path / "run"
    arguments = ("--source=ffsd", f"--input={tmp_path}/leader.npz", f"--workdir={workdir}", "--config.seed=3")
    (tmp_path / "students.py").write_text(
        "from configs import digits\n\ndef get_config(arg=None):\n    return digits.get_config('method=kd')\n"
    )
    convert(*arguments, f"--config={tmp_path}/students.py")
    assert capsys.readouterr().out.splitlines() == [
        "1 x resnet8 for 10 classes: independent",
        "left out, for training only: 10 entries of trans_fusion_module",
        f"written to {workdir}; score it with python -m ffl_jax.evaluate --workdir={workdir}",
    ]
    step, scores = scoring.evaluate_checkpoint(workdir)
    scores = scores["predictions"]
    assert step == 0
    config = files.read_json(workdir / "config.json")
    train, test, _ = digits.load(types.SimpleNamespace(image_size=0))
    mean, std = (train.images.reshape(-1, 3) / 255).mean(0), (train.images.reshape(-1, 3) / 255).std(0)
    np.testing.assert_allclose(config["data"]["mean"], mean)
    logits = reference(state, ((test.images / 255 - mean) / std).transpose(0, 3, 1, 2))
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), test.labels]
    assert scores.keys() == {"sub_0"}
    assert scores["sub_0"]["top1"] == (logits.argmax(-1) == test.labels).mean()
    np.testing.assert_allclose(scores["sub_0"]["nll"], nll.mean(), rtol=1e-5)
    assert config["method"] == {"name": "independent"}
    assert config["optimizer_rules"] == []
    assert "teachers" not in config
    assert config["seed"] == 3
    networks = {"network": "resnet8", "num": 1, "shared_stages": 0}
    assert config["subnetworks"] | networks == config["subnetworks"]

    with pytest.raises(CheckpointError, match="holds checkpoints already: choose another --workdir"):
        convert(*arguments)


def test_ffl_becomes_a_checkpoint(tmp_path):
    """Bit by bit, with settings of the method that the configuration gave."""
    path, workdir = DATA / "ffl_resnet8_k3_init.npz", tmp_path / "run"
    convert(
        *("--source=ffl-pytorch", f"--input={path}", f"--workdir={workdir}"),
        *("--config=configs/digits.py", "--config.method.temperature=4"),
    )
    run = checkpoint.load_run(workdir / "checkpoints", 0)
    config = run["config"]
    assert config == files.read_json(workdir / "config.json")
    networks = {"network": "resnet8", "num": 3, "shared_stages": 2}
    assert config["subnetworks"] | networks == config["subnetworks"]
    assert (config["method"]["name"], config["method"]["temperature"]) == ("ffl", 4)
    config = config_lib.from_json(config)
    abstract = Experiment(config, data.load(config.data)).abstract_state()
    state = checkpoint.restore(workdir / "checkpoints", 0, abstract)
    stored = state.variables
    expected = conversion.load("ffl-pytorch", [path]).variables
    jax.tree.map(np.testing.assert_array_equal, stored, expected)


def test_refusals_of_the_command(tmp_path):
    """In the order in which they are met; nothing is written."""
    np.savez(tmp_path / "leader.npz", **draw(small_network()))
    workdir = f"--workdir={tmp_path}/run"
    whole = ("--source=ffsd", f"--input={tmp_path}/leader.npz", workdir)
    folder = ("--config=configs/folder.py", f"--config.data.data_dir={tmp_path}/none")
    k2 = ("--source=ffl-pytorch", f"--input={DATA}/ffl_resnet8_k2_init.npz", workdir)
    for arguments, error, text in [
        (whole[1:], ConfigError, "--source is missing"),
        (whole[:1] + whole[2:], ConfigError, "--input is missing"),
        (whole[:2], ConfigError, "--workdir is missing"),
        ((*whole, "--config.epohs=3"), ConfigError, "config.epohs: did you mean epochs"),
        ((*whole, "--config.optimizer.learning_rate=-1"), ConfigError, "must be finite and not negative"),
        ((*whole, *folder), DatasetError, "none"),
        (k2, CheckpointError, "the weights are for 100 classes, but digits has 10"),
    ]:
        with pytest.raises(error, match=text):
            convert(*arguments)
    with contextlib.suppress(SystemExit):
        convert("--help")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("error", "reason"), [(KeyError(101), "KeyError 101"), (EOFError(), "EOFError")])
def test_a_reason_is_more_than_a_key(error, reason, tmp_path, monkeypatch):
    """PyTorch's reader of older files looks the first letter up: of a page saved by mistake, "h"."""

    def fail(path):
        raise error

    monkeypatch.setattr(reading, "_read_npz", fail)
    (tmp_path / "weights.npz").touch()
    with pytest.raises(CheckpointError, match=rf"weights\.npz cannot be read: {reason}; download"):
        reading.read(tmp_path / "weights.npz")
