"""Published PyTorch weights as a checkpoint of this library: of FFL's released code and of FFSD's.

What names and shapes a file must have follows from our own networks: each variable has one PyTorch name.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ffl_jax import data, methods
from ffl_jax.errors import CheckpointError, ConfigError
from ffl_jax.methods import subnetworks
from ffl_jax.models import NETWORKS
from ffl_jax.models.densenet import DenseNet
from ffl_jax.models.googlenet import GoogLeNet
from ffl_jax.models.resnet import ResNet
from ffl_jax.models.resnet_cifar import ResNetCifar
from ffl_jax.models.wide_resnet import WideResNet
from ffl_jax.pytorch import reading
from ffl_jax.training import config as config_lib
from ffl_jax.training import steps
from ffl_jax.training.experiment import Experiment, run_record
from ffl_jax.workdir import checkpoint, files

_LISTED = 5
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Variables of a method, and the settings that describe it.

    Attributes:
      method: its name.
      network: name of the sub-networks' network; there are `num` of them, which share `shared_stages` stages.
      num_classes: C.
      variables: {"params": ..., "batch_stats": ...}, float32.
      left_out: names of entries that only training uses, and that we have no place for.
    """

    method: str
    network: str
    num: int
    shared_stages: int
    num_classes: int
    variables: dict
    left_out: tuple[str, ...] = ()


def load(source: str, paths: Sequence[str | Path], state: str = "", network: str = "") -> Weights:
    """Reads published weights.

    Args:
      source: "ffl-pytorch", networks and fusion module in one file or two; or "ffsd", one student or leader.
      paths: `.npz`, `.safetensors`, or what PyTorch wrote: `.pth`, `.pt`, `.tar`.
      state: the group to take, where files hold several.
      network: our name of the network; empty recognises it by names and shapes.

    Raises:
      CheckpointError: a file is missing, damaged, or holds other entries than the network has.
      ConfigError: a setting is wrong, or PyTorch is needed and not there.
    """
    found = reading.state_dicts(paths, state)
    return {"ffl-pytorch": _load_ffl, "ffsd": _load_ffsd}[source](found, network)


def write(weights: Weights, config: ConfigDict, workdir: str | Path):
    """Writes a checkpoint of step 0 and its `config.json`, for the dataset that `config` says.

    Args:
      weights: whose method and sub-networks take the place of those in `config`.
      config: the rest of the configuration, as for training.
      workdir: of the new run.

    Raises:
      FFLError: a setting is wrong, the dataset is missing or has other classes, or the workdir is in use.
    """
    config = _configured(config, weights)
    config_lib.check(config)
    dataset = data.load(config.data)
    if len(dataset.class_names) != weights.num_classes:
        raise CheckpointError(
            f"the weights are for {weights.num_classes} classes, but {dataset.name} has "
            f"{len(dataset.class_names)}: name the dataset that they were trained on, such as "
            "--config=configs/cifar100.py."
        )
    experiment = Experiment(config, dataset)
    params, statistics = (
        jax.tree.map(jnp.asarray, weights.variables[kind]) for kind in ("params", "batch_stats")
    )
    state = experiment.initial_state().replace(params=params, model_state={"batch_stats": statistics})
    directory = Path(workdir).absolute() / "checkpoints"
    with checkpoint.lock(workdir):
        if checkpoint.exists(directory):
            raise CheckpointError(f"{workdir} holds checkpoints already: choose another --workdir.")
        files.write_json(directory.parent / "config.json", config_lib.to_json(experiment.config))
        with checkpoint.Checkpoints(directory) as writer:
            writer.save(0, state, run_record(experiment))


def _configured(config, weights):
    config = ConfigDict(config.to_dict())
    if config.method.name != weights.method:
        config.method = {"name": weights.method} | methods.hyper_parameters(weights.method)
        recipe = methods.METHODS.lookup(weights.method).recipe(config.data.name)
        config.optimizer_rules = recipe.get("optimizer_rules", ())
        if "teachers" in config:
            del config["teachers"]
    config.subnetworks.network = weights.network
    config.subnetworks.num = weights.num
    config.subnetworks.shared_stages = weights.shared_stages
    return config


# -- the two codes -------------------------------------------------------------------------------------------


def _load_ffl(found, network):
    """FFL: a shared trunk, K branches "layer3_k" and heads "classfier3_k" (so spelt), and a fusion module."""
    where, net = reading.pick(found, "network of FFL (with classfier3_1.weight)", r"classfier3_1\.weight")
    fusion_where, fusion = reading.pick(
        found,
        "fusion module of FFL (with conv1_1.weight and fc2.weight); the released code writes it to a file of "
        "its own, a second --input",
        r"conv1_1\.weight",
        r"fc2\.weight",
    )
    network = network or _recognised(where, f"resnet{6 * _blocks(net) + 2}")
    module = _build(network, (ResNetCifar,), "FFL", where, net, "classfier3_1.weight")
    num, shared = _highest(net, r"classfier3_(\d+)\."), module.num_stages - 1
    method = methods.METHODS["ffl"](subnetworks.Stacked(module, num, shared), module.num_classes)
    entries = {f"net/{name}": value for name, value in net.items()}
    entries |= {f"fusion/{name}": value for name, value in fusion.items()}
    files = " and ".join(dict.fromkeys((where, fusion_where)))
    variables = _variables(method, entries, _ffl_name, f"{files}, {network} with K = {num},")
    return Weights("ffl", network, num, shared, module.num_classes, variables)


def _ffl_name(path, k):
    if path[0] == "fusion":
        names = {"depthwise_conv": "conv1", "depthwise_norm": "bn1", "head": "fc2"}
        return f"fusion/{(names | {'pointwise_conv': 'conv1_1', 'pointwise_norm': 'bn1_1'})[path[1]]}"
    name = _released_name(ResNetCifar, path[2:])
    if k is not None:
        name = re.sub("^fc$", f"classfier3_{k + 1}", name)
        name = re.sub(r"^layer3\.", f"layer3_{k + 1}.", name)
    return f"net/{name}"


def _load_ffsd(found, network):
    """FFSD: one student, or a leader, whose trans-fusion module is left out."""
    where, entries = reading.pick(
        found, "network of FFSD (with fc.weight or linear.weight)", r"(fc|linear)\.weight"
    )
    left_out = tuple(name for name in entries if name.startswith("trans_fusion_module."))
    entries = {name: value for name, value in entries.items() if name not in left_out}
    network = network or _recognised(where, _ffsd_network(entries))
    head = "linear.weight" if "linear.weight" in entries else "fc.weight"
    module = _build(network, tuple(_NAMES), "FFSD", where, entries, head)
    method = methods.METHODS["independent"](subnetworks.Stacked(module, num=1), module.num_classes)

    def name_of(path, k):
        return _released_name(type(module), path[2:])

    variables = _variables(method, entries, name_of, f"{where}, {network},")
    return Weights("independent", network, 1, 0, module.num_classes, variables, left_out)


def _ffsd_network(entries):
    """Our name of the network, from what names and shapes say of its family and depth."""
    if "pre_layers.0.weight" in entries:
        return "googlenet"
    if "dense1.0.conv1.weight" in entries:
        layers = _highest(entries, r"dense\d\.(\d+)\.") + 1
        return f"densenet{3 * layers + 4}_12"
    if "linear.weight" in entries:
        return f"wrn{6 * _blocks(entries) + 4}_{entries['linear.weight'].shape[-1] // 64}"
    if "layer4.0.conv1.weight" in entries:
        return {2: "resnet18", 6: "resnet34"}.get(_blocks(entries), "an unknown ResNet")
    return f"resnet{6 * _blocks(entries) + 2}"


def _highest(entries, pattern):
    """The largest of the numbers in the names that begin so; -1 without any."""
    return max((int(found[1]) for name in entries if (found := re.match(pattern, name))), default=-1)


def _blocks(entries):
    return _highest(entries, r"layer\d(?:_\d+)?\.(\d+)\.") + 1


def _recognised(where, network):
    if network not in NETWORKS:
        raise CheckpointError(
            f"{where} looks like {network} by its names and shapes, which is not there: name one of "
            f"{', '.join(sorted(NETWORKS))} with --network."
        )
    return network


def _build(network, families, source, where, entries, head):
    """The network called so, for as many classes as the entry `head` has rows."""
    if head not in entries or entries[head].ndim != 2:
        raise CheckpointError(
            f"{where}: {head} must be [classes, features]; it is missing or of other shape."
        )
    module = NETWORKS.lookup(network)(len(entries[head]))
    if not isinstance(module, families):
        raise ConfigError(f"--network={network}: {source}'s released code has no such network.")
    return module


# -- names ---------------------------------------------------------------------------------------------------


def _googlenet_name(found):
    stage, block, branch, layer, number = found.groups()
    # Convolution, norm and ReLU follow one another in a branch, in the last one after the max pool.
    position = 3 * (int(number) - 1) + (layer == "norm") + (branch == "4")
    branch = ("branch1x1", "branch3x3", "branch5x5", "branch_pool")[int(branch) - 1]
    return f"inception_{'abcde'[int(block)]}{int(stage) + 2}.{branch}.{position}"


_BLOCK = (r"stage(\d)_block(\d+)/", r"layer\1.\2.")
_RESNET = (
    *(("head", "fc"), ("stem_conv", "conv1"), ("stem_norm", "bn1"), _BLOCK),
    *(("shortcut_conv", "downsample.0"), ("shortcut_norm", "downsample.1"), ("norm", "bn")),
)
# Family -> what to replace, one after another, in the path of a layer of ours to have PyTorch's.
_NAMES = {
    ResNetCifar: _RESNET,
    ResNet: _RESNET,
    WideResNet: (
        *(("head", "linear"), ("stem_conv", "conv1"), ("stage3_norm", "bn1"), _BLOCK),
        *(("shortcut_conv", "shortcut.0"), ("norm", "bn")),
    ),
    DenseNet: (
        *(("head", "fc"), ("stem_conv", "conv1"), ("stage3_norm", "bn"), ("norm", "bn")),
        *((r"stage(\d)_layer(\d+)/", r"dense\1.\2."), (r"stage2_transition_(\w+)", r"trans1.\g<1>1")),
        (r"stage3_transition_(\w+)", r"trans2.\g<1>1"),
    ),
    GoogLeNet: (
        *(("head", "linear"), ("stem_conv", "pre_layers.0"), ("stem_norm", "pre_layers.1")),
        (r"stage(\d)_block(\d)/branch(\d)_(conv|norm)(\d)", _googlenet_name),
    ),
}


def _released_name(family: type, path: Sequence[str]) -> str:
    """PyTorch's name of a layer of ours; it counts blocks and layers from 0."""
    name = re.sub(r"(?<=block|layer)\d+", lambda found: str(int(found[0]) - 1), "/".join(path))
    for pattern, replacement in _NAMES[family]:
        name = re.sub(pattern, replacement, name)
    return name


def _variables(method, entries: dict[str, np.ndarray], name_of: Callable, what: str) -> dict:
    """The method's variables from a state dict that has exactly what they are made of.

    Args:
      method: whose variables.
      entries: {PyTorch's name: array}.
      name_of: (path of a layer, k of a branch or None) -> PyTorch's name of the layer.
      what: the state dict, for errors.
    """
    # Their shapes do not depend on the images' size.
    init = functools.partial(steps.init_variables, method, image_shape=(32, 32, 3))
    params, model_state = jax.eval_shape(init, jax.random.key(0))
    problems, used = [], set()

    def take(name, shape):
        used.add(name)
        axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[len(shape)]  # OIHW -> HWIO, [out, in] -> [in, out]
        wanted = tuple(shape[axis] for axis in np.argsort(axes))
        value = entries.get(name)
        if value is None:
            problems.append(f"{name} is missing")
        elif value.shape != wanted or value.dtype.kind != "f":
            problems.append(f"{name} is {value.dtype}{list(value.shape)}, not float32{list(wanted)}")
        else:
            with np.errstate(over="ignore"):
                value = value.astype(np.float32)
            if np.isfinite(value).all():
                return value.transpose(axes)
            problems.append(f"{name} has values that are infinite or not a number")
        return np.zeros(shape, np.float32)

    def leaf(path, abstract):
        _, *path, last = (key.key for key in path)
        if path[:2] != ["subnetworks", "branches"]:
            return take(f"{name_of(path, None)}.{_LEAVES[last]}", abstract.shape)
        num, *shape = abstract.shape
        return np.stack([take(f"{name_of(path, k)}.{_LEAVES[last]}", tuple(shape)) for k in range(num)])

    variables = jax.tree_util.tree_map_with_path(leaf, {"params": params, **model_state})
    problems += [f"{name} is unexpected" for name in sorted(entries.keys() - used)]
    if problems:
        rest = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(
            f"{what} does not fit: {'; '.join(problems[:_LISTED])}{rest}. Take the whole file, or name the "
            "network with --network."
        )
    return variables
