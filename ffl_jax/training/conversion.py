"""Published PyTorch weights as a checkpoint of this library: of FFL's released code and of FFSD's."""

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
from ffl_jax.pytorch import names, reading
from ffl_jax.training import config as config_lib
from ffl_jax.training import steps
from ffl_jax.training.experiment import Experiment, run_record
from ffl_jax.workdir import checkpoint, files

_FFSD = (ResNetCifar, ResNet, WideResNet, DenseNet, GoogLeNet)


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
    name_of = functools.partial(_ffl_name, module)
    variables = _variables(method, entries, name_of, f"{files}, {network} with K = {num},")
    return Weights("ffl", network, num, shared, module.num_classes, variables)


def _ffl_name(network, path, k):
    if path[0] == "fusion":
        layers = {"depthwise_conv": "conv1", "depthwise_norm": "bn1", "head": "fc2"}
        layers |= {"pointwise_conv": "conv1_1", "pointwise_norm": "bn1_1"}
        return f"fusion/{layers[path[1]]}.{names.LEAVES.get(path[2], path[2])}"
    name = names.torch_name(network, path[2:])
    if k is not None:
        name = re.sub(r"^fc\.", f"classfier3_{k + 1}.", name)
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
    module = _build(network, _FFSD, "FFSD", where, entries, head)
    method = methods.METHODS["independent"](subnetworks.Stacked(module, num=1), module.num_classes)

    def name_of(path, k):
        return names.torch_name(module, path[2:])

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


def _variables(method, entries: dict[str, np.ndarray], name_of: Callable, what: str) -> dict:
    """The method's variables from a state dict that has exactly what they are made of.

    Args:
      method: whose variables.
      entries: {PyTorch's name: array}.
      name_of: (path of a variable, k of a branch or None) -> PyTorch's name of it.
      what: the state dict, for errors.
    """
    # Their shapes do not depend on the images' size.
    init = functools.partial(steps.init_variables, method, image_shape=(32, 32, 3))
    params, model_state = jax.eval_shape(init, jax.random.key(0))
    taken = names.Entries(entries)

    def leaf(path, abstract):
        _, *path = (key.key for key in path)
        if path[:2] != ["subnetworks", "branches"]:
            return taken.take(name_of(path, None), abstract.shape)
        num, *shape = abstract.shape
        return np.stack([taken.take(name_of(path, k), tuple(shape)) for k in range(num)])

    variables = jax.tree_util.tree_map_with_path(leaf, {"params": params, **model_state})
    taken.check(what, "Take the whole file, or name the network with --network.")
    return variables
