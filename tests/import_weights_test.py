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
from ffl_jax.pytorch import conversion, reading
from ffl_jax.training import config as config_lib
from ffl_jax.training import scoring
from ffl_jax.training.experiment import Experiment
from ffl_jax.workdir import checkpoint, outputs

DATA = Path(__file__).parent / "data"
# {network: {name: shape}} of the state dicts of FFSD's released code.
SHAPES = json.loads(gzip.decompress((DATA / "ffsd_state_dicts.json.gz").read_bytes()))
# FFSD's network -> (ours, classes, trained numbers as published: arXiv 2103.14473's code and torchvision).
FFSD = {
    "cifar100/resnet20": ("resnet20", 100, 278_324),
    "cifar100/resnet32": ("resnet32", 100, 472_756),
    "cifar100/resnet56": ("resnet56", 100, 861_620),
    "cifar100/wideresnet1602": ("wrn16_2", 100, 704_420),
    "cifar100/wideresnet2810": ("wrn28_10", 100, 36_546_980),
    "cifar100/wideresnet4002": ("wrn40_2", 100, 2_258_084),
    "cifar100/densenet": ("densenet40_12", 100, 1_100_428),
    "cifar100/googlenet": ("googlenet", 100, 6_258_500),
    "imagenet/resnet18": ("resnet18", 1000, 11_689_512),
    "imagenet/resnet34": ("resnet34", 1000, 21_797_672),
}


def zeros(name):
    """A state dict of that network, whose numbers do not matter and take no memory."""
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in SHAPES[name].items()}


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


def apply(weights, images, train=False):
    networks = subnetworks.build(weights.network, weights.num, weights.num_classes, weights.shared_stages)
    method = methods.METHODS[weights.method](networks, weights.num_classes)
    run = functools.partial(method.apply, train=train, mutable=["batch_stats"] if train else False)
    found = jax.jit(run)(weights.variables, np.float32(images))
    return found[0] if train else found


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


# -- FFSD ----------------------------------------------------------------------------------------------------


def check_recognised(weights, name):
    network, classes, size = FFSD[name.removesuffix("/leader")]
    assert (weights.network, weights.num_classes) == (network, classes)
    assert (weights.method, weights.num, weights.shared_stages) == ("independent", 1, 0)
    assert sum(leaf.size for leaf in jax.tree.leaves(weights.variables["params"])) == size
    # By hand: two convolutions, and the four entries of two norms each.
    assert len(weights.left_out) == (10 if name.endswith("leader") else 0)


@pytest.mark.parametrize(
    "name",
    [
        *("cifar100/resnet20", "cifar100/resnet32", "cifar100/resnet56", "cifar100/wideresnet2810/leader"),
        *("cifar100/wideresnet4002/leader", "imagenet/resnet34/leader"),  # the others below, with values
    ],
)
def test_every_network_of_ffsd_is_recognised(name, monkeypatch):
    check_recognised(load(monkeypatch, zeros(name)), name)


def test_students_are_leaders_without_the_trans_fusion_module():
    students = [name for name in SHAPES if f"{name}/leader" in SHAPES]
    assert len(students) == 5
    for name in students:
        leader = SHAPES[f"{name}/leader"].items()
        assert SHAPES[name] == {key: x for key, x in leader if not key.startswith("trans_fusion_module.")}


class Reference:
    """FFSD's networks in NumPy, float64 and evaluation mode, on PyTorch's names: [B, C, H, W] -> logits."""

    def __init__(self, state):
        self.state = {name: np.asarray(value, np.float64) for name, value in state.items()}

    def conv(self, x, name, stride=1):
        kernel = self.state[f"{name}.weight"]
        size = kernel.shape[-1]
        x = np.pad(x, ((0, 0), (0, 0), (size // 2, size // 2), (size // 2, size // 2)))
        rows, columns = ((n - size) // stride + 1 for n in x.shape[2:])
        sums = 0
        for i, j in np.ndindex(size, size):
            window = x[:, :, i::stride, j::stride][:, :, :rows, :columns]
            sums = sums + np.tensordot(kernel[:, :, i, j], window, (1, 1))
        return sums.swapaxes(0, 1) + self.state.get(f"{name}.bias", np.zeros(len(kernel)))[:, None, None]

    def norm(self, x, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, scale, bias = (self.state[f"{name}.{key}"][:, None, None] for key in keys)
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def max_pool(self, x, stride):
        x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
        rows, columns = ((n - 3) // stride + 1 for n in x.shape[2:])
        windows = [x[:, :, i::stride, j::stride][:, :, :rows, :columns] for i, j in np.ndindex(3, 3)]
        return np.max(windows, axis=0)

    def head(self, x, name):
        return x.mean((2, 3)) @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def blocks(self, stage):
        numbers = {int(name.split(".")[1]) for name in self.state if name.startswith(f"{stage}.")}
        return [f"{stage}.{number}" for number in sorted(numbers)]

    def resnet(self, x, imagenet=False):
        x = relu(self.norm(self.conv(x, "conv1", 2 if imagenet else 1), "bn1"))
        x = self.max_pool(x, 2) if imagenet else x
        for stage in (1, 2, 3, 4) if imagenet else (1, 2, 3):
            for block in self.blocks(f"layer{stage}"):
                stride = 2 if stage > 1 and block.endswith(".0") else 1
                y = relu(self.norm(self.conv(x, f"{block}.conv1", stride), f"{block}.bn1"))
                y = self.norm(self.conv(y, f"{block}.conv2"), f"{block}.bn2")
                if f"{block}.downsample.0.weight" in self.state:
                    x = self.norm(self.conv(x, f"{block}.downsample.0", stride), f"{block}.downsample.1")
                x = relu(x + y)
        return self.head(x, "fc")

    def wide_resnet(self, x):
        x = self.conv(x, "conv1")
        for stage in (1, 2, 3):
            for block in self.blocks(f"layer{stage}"):
                stride = 2 if stage > 1 and block.endswith(".0") else 1
                y = self.conv(relu(self.norm(x, f"{block}.bn1")), f"{block}.conv1")
                y = self.conv(relu(self.norm(y, f"{block}.bn2")), f"{block}.conv2", stride)
                x = y + (self.conv(x, f"{block}.shortcut.0", stride) if block.endswith(".0") else x)
        return self.head(relu(self.norm(x, "bn1")), "linear")

    def densenet(self, x):
        x = self.conv(x, "conv1")
        for stage in (1, 2, 3):
            for layer in self.blocks(f"dense{stage}"):
                y = self.conv(relu(self.norm(x, f"{layer}.bn1")), f"{layer}.conv1")
                x = np.concatenate([x, y], 1)
            if stage < 3:
                x = self.conv(relu(self.norm(x, f"trans{stage}.bn1")), f"trans{stage}.conv1")
                x = x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2).mean((3, 5))
        return self.head(relu(self.norm(x, "bn")), "fc")

    def googlenet(self, x):
        def layers(x, name, *positions):
            for position in positions:
                x = relu(self.norm(self.conv(x, f"{name}.{position}"), f"{name}.{position + 1}"))
            return x

        x = layers(x, "pre_layers", 0)
        for block in ("a3", "b3", "a4", "b4", "c4", "d4", "e4", "a5", "b5"):
            x = self.max_pool(x, 2) if block in ("a4", "a5") else x
            at = f"inception_{block}.branch"
            branches = [
                layers(x, f"{at}1x1", 0),
                layers(x, f"{at}3x3", 0, 3),
                layers(x, f"{at}5x5", 0, 3, 6),
                layers(self.max_pool(x, 1), f"{at}_pool", 1),
            ]
            x = np.concatenate(branches, 1)
        return self.head(x, "linear")


def relu(x):
    return np.maximum(x, 0)


@pytest.mark.parametrize(
    ("name", "side", "run"),
    [
        ("cifar100/resnet20/leader", 8, Reference.resnet),
        ("cifar100/wideresnet1602/leader", 8, Reference.wide_resnet),
        ("cifar100/densenet/leader", 8, Reference.densenet),
        ("cifar100/googlenet/leader", 8, Reference.googlenet),
        ("imagenet/resnet18/leader", 32, functools.partial(Reference.resnet, imagenet=True)),
    ],
)
def test_logits_of_ffsd(name, side, run, monkeypatch):
    """Every entry at its place: a network of each family computes what NumPy makes of the released names."""
    state = draw(SHAPES[name])
    images = np.random.default_rng(1).normal(size=(2, 3, side, side))
    weights = load(monkeypatch, state)
    check_recognised(weights, name)
    logits = apply(weights, images.transpose(0, 2, 3, 1))["logits"][0]
    assert relative(logits, run(Reference(state), images)) < 3e-6


# -- FFL -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "classes"), [(2, 100), (3, 10)])
def test_logits_of_ffl(num, classes):
    """The first step's logits of the independent PyTorch implementation (see tests/data/README.md)."""
    weights = conversion.load("ffl-pytorch", [DATA / f"ffl_resnet8_k{num}_init.npz"])
    assert (weights.method, weights.network, weights.num_classes) == ("ffl", "resnet8", classes)
    assert (weights.num, weights.shared_stages, weights.left_out) == (num, 2, ())
    steps = np.load(DATA / f"ffl_resnet8_k{num}_steps.npz")
    found = apply(weights, steps["step0/images"].transpose(0, 2, 3, 1), train=True)
    assert relative(found["logits"], steps["step0/logits"]) < 1e-5
    assert relative(found["fused_logits"], steps["step0/fused"]) < 1e-5


def ffl_state(part=""):
    arrays = np.load(DATA / "ffl_resnet8_k3_init.npz")
    prefix = f"init/{part}"
    return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


def test_statistics_of_ffl(monkeypatch):
    """Fresh ones are all 0 or 1: other numbers show that each goes to the place of its name."""
    state = {name: np.full(x.shape, i, np.float32) for i, (name, x) in enumerate(ffl_state().items())}
    found = load(monkeypatch, state, "ffl-pytorch").variables["batch_stats"]
    names = list(state)
    branches = found["subnetworks"]["branches"]
    for k in range(3):
        for leaf, name in (("mean", "running_mean"), ("var", "running_var")):
            expected = names.index(f"net/layer3_{k + 1}.0.downsample.1.{name}")
            assert (branches["stage3_block1"]["shortcut_norm"][leaf][k] == expected).all()
    expected = names.index("net/layer2.0.bn2.running_var")
    assert (found["subnetworks"]["trunk"]["stage2_block1"]["norm2"]["var"] == expected).all()
    expected = names.index("fusion/bn1_1.running_mean")
    assert (found["fusion"]["pointwise_norm"]["mean"] == expected).all()


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


@pytest.mark.parametrize("form", ["npz", "safetensors", "two npz", "two safetensors", "two pth"])
def test_forms_of_the_same_weights(form, tmp_path, monkeypatch):
    """One file or two, in any format, with the wrappings of the released code and of DataParallel."""
    parts = {name: ffl_state(f"{name}/") for name in ("net", "fusion")}
    expected = conversion.load("ffl-pytorch", [DATA / "ffl_resnet8_k3_init.npz"])
    saved = {"npz": lambda path, state: np.savez(path, **state), "pth": lambda path, _: path.touch()}
    saved["safetensors"] = lambda path, state: save_file(dict(state), path)
    if form.startswith("two"):
        suffix = form.removeprefix("two ")
        files = {
            tmp_path / f"Model_300.{suffix}": parts["net"],
            tmp_path / f"Module_300.{suffix}": parts["fusion"],
        }
    else:
        files = {tmp_path / f"both.{form}": ffl_state()}
    for path, state in files.items():
        saved[path.suffix[1:]](path, state)
    moments = {"state": {0: {"momentum_buffer": Tensor(np.ones(3))}}, "param_groups": [{"lr": 0.1}]}
    net = tensors(parts["net"], "module.") | {"module.bn1.num_batches_tracked": Tensor(np.int64(3))}
    pretend_pytorch(
        monkeypatch,
        {
            "Model_300.pth": {"epoch": 300, "state_dict": net, "optimizer": moments},
            "Module_300.pth": {"epoch": 300, "state_dict": tensors(parts["fusion"]), "optimizer": moments},
        },
    )
    weights = conversion.load("ffl-pytorch", list(files))
    jax.tree.map(np.testing.assert_array_equal, weights.variables, expected.variables)


def test_wrapping_of_ffsd(tmp_path, monkeypatch):
    state = draw(SHAPES["cifar100/resnet20/leader"])
    (tmp_path / "modelleader_best.pth").touch()
    content = {"weight": tensors(state), "epoch": 226, "cfg": "resnet20", "index": "leader"}
    pretend_pytorch(monkeypatch, {"modelleader_best.pth": content})
    weights = conversion.load("ffsd", [tmp_path / "modelleader_best.pth"])
    assert weights.network == "resnet20"
    kernel = weights.variables["params"]["subnetworks"]["branches"]["head"]["kernel"]
    np.testing.assert_array_equal(kernel[0], state["fc.weight"].T)


def test_one_of_several_states(monkeypatch):
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
    for state, offset in (("init", 0), ("final", 1)):
        weights = load(monkeypatch, content, "ffl-pytorch", state=state)
        bias = weights.variables["params"]["fusion"]["head"]["bias"]
        np.testing.assert_array_equal(bias, content["init/fusion/fc2.bias"] + np.float32(offset))


@pytest.mark.parametrize(
    ("name", "content", "error", "text"),
    [
        ("none.npz", None, CheckpointError, "there is no file"),
        ("weights.bin", b"", ConfigError, r"\.npz, \.safetensors, \.pth, \.pt, \.tar"),
        ("broken.npz", b"garbage", CheckpointError, "not a whole .npz archive"),
        (
            "broken.safetensors",
            b"garbage that is no header",
            CheckpointError,
            "cannot be read: .*download it again",
        ),
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


def test_pytorch_files_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "model_best.pth.tar").touch()
    with pytest.raises(ConfigError, match=r"pip install torch.*or convert the file to \.npz"):
        conversion.load("ffsd", [tmp_path / "model_best.pth.tar"])


def test_a_pickle_of_more_than_weights(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise pickle.UnpicklingError("Weights only load failed. Set weights_only=False, which is dangerous.")

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(Tensor=Tensor, load=refuse))
    (tmp_path / "network.pt").touch()
    with pytest.raises(CheckpointError, match="holds more than weights") as caught:
        conversion.load("ffsd", [tmp_path / "network.pt"])
    assert "weights_only" not in str(caught.value)


# -- what does not fit ---------------------------------------------------------------------------------------


def changed(**values):
    return lambda state: {**state, **{name.replace("__", "."): value for name, value in values.items()}}


def without(*prefixes):
    return lambda state: {name: x for name, x in state.items() if not name.startswith(prefixes)}


NAN = np.zeros((16, 3, 3, 3), np.float32)
NAN[3, 1, 2, 0] = np.nan


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        (
            without("layer2.1.bn2.running_var"),
            {},
            r"resnet20, does not fit: layer2\.1\.bn2\.running_var is missing",
        ),
        (changed(layer4__x=np.ones(2)), {}, r"layer4\.x is unexpected"),
        (changed(fc__bias=np.ones(99)), {}, r"fc\.bias is float64\[99\], not float32\[100\]"),
        (
            changed(conv1__weight=np.ones((3, 3, 3, 16))),
            {},
            r"conv1\.weight is .*, not float32\[16, 3, 3, 3\]",
        ),
        (changed(bn1__weight=np.ones(16, np.int64)), {}, r"bn1\.weight is int64\[16\]"),
        (changed(conv1__weight=NAN), {}, r"conv1\.weight has values that are infinite or not a number"),
        (changed(fc__bias=np.full(100, 1e300)), {}, r"fc\.bias has values that are infinite"),  # in float32
        (without("fc."), {}, r"no network of FFSD .*, but weights\.npz"),
        (changed(fc__weight=np.ones(100)), {}, r"fc\.weight must be \[classes, features\]"),
        (changed(layer1__3__x=np.ones(2)), {}, r"looks like resnet26 .* with --network"),
        # Two convolutions and the four entries of two norms, in two blocks more of each stage: 60.
        (lambda state: state, {"network": "resnet32"}, r"layer1\.3\.\S+ is missing;.* and 55 more"),
        (without("layer", "bn1", "conv1"), {}, r"no state dict at all"),
    ],
)
def test_entries_that_do_not_fit(change, options, text, monkeypatch):
    with pytest.raises(CheckpointError, match=text):
        load(monkeypatch, change(zeros("cifar100/resnet20")), **options)


def test_networks_that_the_code_does_not_have(monkeypatch):
    for name, text in (
        ("vgg16", "--network=vgg16: FFSD's released code"),
        ("resnet21", "did you mean resnet"),
    ):
        with pytest.raises(ConfigError, match=text):
            load(monkeypatch, zeros("cifar100/resnet20"), network=name)
    with pytest.raises(ConfigError, match="--network=resnet18: FFL's released code"):
        load(monkeypatch, ffl_state(), "ffl-pytorch", network="resnet18")
    for name in ("fusion/resnet_k2", "self_distillation/resnet"):
        with pytest.raises(CheckpointError, match="no network of FFSD"):
            load(monkeypatch, zeros(name))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without("fusion/"), "no fusion module of FFL .* a second --input, but weights.npz:net"),
        (without("net/"), "no network of FFL .*, but weights.npz:fusion"),
        (
            without("net/layer3_2.0.conv2.weight"),
            r"K = 3, does not fit: net/layer3_2\.0\.conv2\.weight is missing",
        ),
        (
            without("net/classfier3_3."),
            r"fusion/conv1\.weight is float32\[192, 1, 3, 3\], not .*\[128, 1, 3, 3\]",
        ),
    ],
)
def test_entries_of_ffl_that_do_not_fit(change, text, monkeypatch):
    with pytest.raises(CheckpointError, match=text):
        load(monkeypatch, change(ffl_state()), "ffl-pytorch")


# -- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    """Runs the command in this process."""

    def run(*arguments):
        argv = ["import_weights", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections reads what is set
        import_weights.command(argv)

    return run


def small_network():
    """Shapes of a ResNet-8 leader for 10 classes, in FFSD's names: the first block of each stage."""
    shapes = {
        name: shape for name, shape in SHAPES["cifar100/resnet20/leader"].items() if name[:5] != "layer"
    }
    shapes |= {name: shape for name, shape in SHAPES["cifar100/resnet20"].items() if name[6:9] == ".0."}
    return shapes | {"fc.weight": [10, 64], "fc.bias": [10]}


def test_a_leader_becomes_a_run_that_can_be_scored(command, tmp_path, capsys):
    """Against NumPy on the released names, over the test split; the weights overrule the configuration."""
    state = draw(small_network())
    np.savez(tmp_path / "leader.npz", **{f"state/{name}": value for name, value in state.items()})
    workdir = tmp_path / "run"
    arguments = ("--source=ffsd", f"--input={tmp_path}/leader.npz", f"--workdir={workdir}", "--config.seed=3")
    (tmp_path / "students.py").write_text(
        "from configs import digits\n\ndef get_config(arg=None):\n    config = digits.get_config()\n"
        "    config.teachers = {'network': 'resnet8', 'num': 1}\n    return config\n"
    )
    command(*arguments, f"--config={tmp_path}/students.py")
    assert capsys.readouterr().out.splitlines() == [
        "1 x resnet8 for 10 classes: independent",
        "left out, for training only: 10 entries of trans_fusion_module",
        f"written to {workdir}; score it with python -m ffl_jax.evaluate --workdir={workdir}",
    ]
    step, scores = scoring.evaluate_checkpoint(workdir)
    scores = scores["predictions"]
    assert step == 0
    config = outputs.read_json(workdir / "config.json")
    train, test, _ = digits.load(types.SimpleNamespace(image_size=0))
    mean, std = (train.images.reshape(-1, 3) / 255).mean(0), (train.images.reshape(-1, 3) / 255).std(0)
    np.testing.assert_allclose(config["data"]["mean"], mean)
    logits = Reference(state).resnet(((test.images / 255 - mean) / std).transpose(0, 3, 1, 2))
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), test.labels]
    assert scores.keys() == {"sub_0"}
    for one in scores.values():
        assert one["top1"] == (logits.argmax(-1) == test.labels).mean()
        np.testing.assert_allclose(one["nll"], nll.mean(), rtol=1e-5)
    assert config["method"] == {"name": "independent"}
    assert config["optimizer_rules"] == []
    assert "teachers" not in config
    assert config["seed"] == 3
    networks = {"network": "resnet8", "num": 1, "shared_stages": 0, "execution": "auto", "remat": False}
    assert config["subnetworks"] == networks

    with pytest.raises(CheckpointError, match="holds checkpoints already: choose another --workdir"):
        command(*arguments)


def test_ffl_becomes_a_checkpoint(command, tmp_path):
    """Bit by bit, with settings of the method that the configuration gave."""
    path, workdir = DATA / "ffl_resnet8_k3_init.npz", tmp_path / "run"
    command(
        *("--source=ffl-pytorch", f"--input={path}", f"--workdir={workdir}"),
        *("--config=configs/digits.py", "--config.method.temperature=4"),
    )
    run = checkpoint.load_run(workdir / "checkpoints", 0)
    config = run["config"]
    assert config == outputs.read_json(workdir / "config.json")
    networks = {"network": "resnet8", "num": 3, "shared_stages": 2, "execution": "auto", "remat": False}
    assert config["subnetworks"] == networks
    assert (config["method"]["name"], config["method"]["temperature"]) == ("ffl", 4)
    config = config_lib.from_json(config)
    abstract = Experiment(config, data.load(config.data)).abstract_state()
    state = checkpoint.restore(workdir / "checkpoints", 0, abstract)
    stored = {"params": state.params, **state.model_state}
    expected = conversion.load("ffl-pytorch", [path]).variables
    jax.tree.map(np.testing.assert_array_equal, stored, expected)


def test_refusals_of_the_command(command, tmp_path):
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
            command(*arguments)
    with contextlib.suppress(SystemExit):
        command("--help")
    assert not (tmp_path / "run").exists()
