"""Trained weights that sub-networks start from: files of torchvision and timm, exports, and finished runs.

`config.subnetworks.start` names one for all sub-networks, or one for each: "FILE", "FILE:GROUP" where a
file holds several state dicts, or "DIR", "DIR:PREDICTION" for a run. What they hold is in the first state, so
in every checkpoint: a run that continues needs them no more.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from ffl_jax import methods
from ffl_jax.errors import CheckpointError, ConfigError
from ffl_jax.models.vit import ViT
from ffl_jax.pytorch import names, reading
from ffl_jax.training import config as config_lib
from ffl_jax.training import optimizers, steps
from ffl_jax.workdir import checkpoint, sealing
from ffl_jax.workdir.paths import expanded

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std that torchvision's weights want
_KEY = "config.subnetworks.start"
_HEAD = ("params", "head", "bias")


@dataclasses.dataclass(frozen=True)
class Start:
    """A file of weights, or a run.

    Attributes:
      place: the file or folder.
      part: of it, what stands after the colon; may be empty.
      mean, std: the images' that the weights were trained on; ImageNet's for a file that does not say.
      digest: SHA-256 of what it holds, or empty where it is not there.
      class_names: of its head, where it says them.
      own: whether its arrays are called and laid out as ours.
    """

    place: Path
    part: str
    digest: str = ""
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    class_names: tuple[str, ...] | None = None
    own: bool = False


def find(name: str) -> Start:
    """What an entry of `config.subnetworks.start` names; only a run's arrays and a file's bytes are read."""
    path, colon, part = name.rpartition(":")
    if not colon or expanded(name).exists():
        path, part = name, ""
    place = expanded(path)
    if place.is_dir():
        step = checkpoint.find(place / "checkpoints")
        run = checkpoint.load_run(place / "checkpoints", step)
        settings = config_lib.from_json(run["config"])
        digest = hashlib.sha256()
        for path, leaf in sorted(traverse_util.flatten_dict(_run_variables(place, part)[1]).items()):
            digest.update("/".join(path).encode() + np.asarray(leaf).tobytes())
        classes = tuple(run["dataset"]["class_names"])
        return Start(place, part, digest.hexdigest(), settings.data.mean, settings.data.std, classes, True)
    if not place.is_file():
        return Start(place, part)
    with open(place, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    card = _card(place)
    if card is None:
        return Start(place, part, digest)
    try:
        sealing.check(place.read_bytes())
    except CheckpointError as error:
        raise CheckpointError(f"{_KEY}: {place}: {error}") from None
    if "network" not in card["architecture"]:
        raise CheckpointError(
            f"{_KEY}: {place} is not one plain network, but the {card['predictor']} of several."
        )
    return Start(
        place, part, digest, tuple(card["mean"]), tuple(card["std"]), tuple(card["class_names"]), True
    )


def _card(place) -> dict | None:
    """The card of an export of ours in safetensors; None of any other file."""
    if place.suffix != ".safetensors":
        return None
    try:
        with open(place, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            card = json.loads(file.read(min(size, place.stat().st_size)))["__metadata__"]["card"]
        return json.loads(card)
    except (ValueError, KeyError, TypeError):  # what is wrong with it is told where its arrays are read
        return None


def resolve(config: ConfigDict):
    """Fills in the digests of the start and, where they are empty, `data.mean` and `data.std`.

    Nothing is looked for where all of these are known, as in a checkpoint.

    Raises:
      ConfigError: starts want different normalisations, and none is set.
      CheckpointError: a start cannot be read.
    """
    section = config.subnetworks
    if not section.start or (section.start_digests and config.data.mean):
        return
    starts = [find(name) for name in section.start]
    if all(start.digest for start in starts) and not section.start_digests:
        section.start_digests = tuple(start.digest for start in starts)
    if not config.data.mean:
        wanted = {(start.mean, start.std) for start in starts}
        if len(wanted) > 1:
            raise ConfigError(
                f"{_KEY}: they were trained on images of different mean and std: set config.data.mean and "
                "config.data.std."
            )
        ((config.data.mean, config.data.std),) = wanted


def install(state: steps.TrainState, experiment) -> steps.TrainState:
    """The first state with the weights of the start in place of random ones, also in averages of them.

    Heads stay as they are drawn where the classes are others, and where several sub-networks begin with the
    same weights, which would never come apart.

    Raises:
      ConfigError: a trunk would start from several files.
      CheckpointError: a start is missing, damaged or another one, or does not fit its sub-network.
    """
    section, method = experiment.config.subnetworks, experiment.method
    if not section.start:
        return state
    networks, num = method.subnetworks, method.subnetworks.num
    starts = [find(name) for name in section.start]
    for start, digest in zip(starts, section.start_digests, strict=False):
        if start.digest and start.digest != digest:
            raise CheckpointError(
                f"{_KEY}: {start.place} has the digest {start.digest[:12]}, not {digest[:12]} as in "
                "config.subnetworks.start_digests: put that file back, or leave the digests out."
            )
    if networks.shared_stages and len({start.digest for start in starts}) > 1:
        raise ConfigError(f"{_KEY}: a shared trunk starts from one file: name one, or set shared_stages=0.")
    starts = starts * (num // len(starts))
    variables = state.variables
    flat = traverse_util.flatten_dict(
        {kind: tree["subnetworks"] for kind, tree in variables.items() if "subnetworks" in tree}
    )
    flat, read = {path: np.array(leaf) for path, leaf in flat.items()}, functools.cache(reading.read)
    for k, start in enumerate(starts):
        alone = all(k == one or start.digest != other.digest for one, other in enumerate(starts))
        for (kind, *path), value in _load(start, k, experiment, alone, read).items():
            ((name, copy),) = (one for one in networks.places(k) if (kind, one[0], *path) in flat)
            flat[kind, name, *path][... if copy is None else copy] = value
    joint = jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(flat))

    def put(tree):
        return {
            kind: {**one, "subnetworks": joint[kind]} if kind in joint else one for kind, one in tree.items()
        }

    variables = put(variables)
    variables |= {kind: put(variables[kind]) for kind in method.averages}
    return state.replace(params=variables.pop("params"), model_state=variables)


def told(experiment) -> list[str]:
    """What is said at the beginning of how the start is trained."""
    section, frozen, said = experiment.config.subnetworks, experiment.freeze_steps, []
    if frozen:
        said += [
            f"Until epoch {section.freeze_epochs:g}, step {frozen}, sub-networks stay as they start, but for "
            "their heads; learning rates and ramps count on meanwhile."
        ]
    if section.statistics == "kept":
        found = "subnetworks" in experiment.abstract_state().model_state.get("batch_stats", {})
        said += [
            "Sub-networks keep the batch statistics of their start."
            if found
            else "config.subnetworks.statistics=kept changes nothing: the networks have no batch statistics."
        ]
    return said


def _load(start, k, experiment, alone, read) -> dict:
    """{(kind, *path): array} of what sub-network k takes; `alone` if no other one takes it as well."""
    method, name = experiment.method, experiment.method.subnetwork_names()[k]
    network = method.subnetworks.member(k)
    images = jax.ShapeDtypeStruct((1, *experiment.image_shape), np.float32)
    shapes = jax.eval_shape(functools.partial(network.init, train=False), jax.random.key(0), images)
    shapes = traverse_util.flatten_dict(shapes)
    called, entries, source = _entries(start, network, shapes, read)
    anew = _why_head_is_drawn(start, len(entries.get(called.get(_HEAD), ())), experiment, alone)
    if anew and _HEAD not in shapes:
        raise ConfigError(f"{_KEY}: {start.place}: {name} has no layer called head that could be drawn anew.")
    taken, loaded = names.Entries(entries, start.own), {}
    for path, leaf in shapes.items():
        if path[1] == "head" and anew:
            taken.leave(called[path])
            continue
        if isinstance(network, ViT) and path[1] == "stem_positions":
            taken.resize_positions(called[path], network.grid(experiment.image_shape))
        loaded[path] = taken.take(called[path], leaf.shape)
    of = config_lib.network_names(experiment.config)[k]
    advice = "Take a file of that network, or set config.subnetworks.network."
    taken.check(f"{_KEY}: {start.place} for {name}, a {of} by the names of {source},", advice)
    head = f"its head is drawn anew, for {anew}" if anew else "its head too"
    logging.info("%s starts from %s, %s.", name, start.place, head)
    _tell_normalisation(start, experiment.config.data)
    return loaded


def _why_head_is_drawn(start, classes, experiment, alone) -> str:
    """The reason why a head for so many classes is not taken; empty where it is."""
    wanted = experiment.method.num_classes
    if classes != wanted:
        return f"that of the file is for {classes} classes, not {wanted}" if classes else "the file has none"
    if start.class_names not in (None, tuple(experiment.dataset.class_names)):
        return "that of the file is for other classes"
    return "" if alone else "several sub-networks begin with the same weights"


def _tell_normalisation(start, data):
    if not (close(start.mean, data.mean) and close(start.std, data.std)):
        logging.warning(
            "%s was trained on images of mean %s and std %s%s; those of this run are others.",
            *(start.place, start.mean, start.std, "" if start.own else ", as most are"),
        )


def close(x: Sequence[float], y: Sequence[float]) -> bool:
    """Whether means or deviations differ by less than half a grey level, as by rounding or by few images."""
    return all(abs(a - b) < 0.5 / 255 for a, b in zip(x, y, strict=True))


def _entries(start, network, shapes, read):
    """({path: name of the entry}, entries, whose names they are), by the rules that fit best."""
    if not start.place.exists():
        raise CheckpointError(f"{_KEY}: there is no file or run {start.place}.")
    if start.own:
        if start.place.is_dir():
            variables = traverse_util.flatten_dict(_run_variables(start.place, start.part)[1], sep="/")
            arrays = jax.tree.map(np.asarray, variables)
        else:
            arrays = read(start.place, _KEY)
        return {path: "/".join(path) for path in shapes}, arrays, "this project"
    rules = names.RULES.get(type(network))
    if rules is None:
        raise ConfigError(
            f"{_KEY}: {start.place}: no names of other projects are known for {type(network).__name__}."
        )
    groups = reading.groups(read(start.place, _KEY))
    if start.part:
        if start.part not in groups:
            raise ConfigError(
                f"{_KEY}: {start.place} has no group {start.part!r}, but {', '.join(sorted(groups))}."
            )
        groups = {start.part: groups[start.part]}
    best = []
    for group, entries in groups.items():
        for source in rules:
            called = {path: names.torch_name(network, path[1:], source) for path in shapes}
            best.append((len(entries.keys() & set(called.values())), group, source, called))
    most, group, source, called = max(best, key=lambda one: one[0])
    if not most:
        some = ", ".join(list(groups[group])[:3])
        raise CheckpointError(
            f"{_KEY}: {start.place} holds no {type(network).__name__}: it begins with {some}."
        )
    rivals = sorted({one[1] for one in best if one[0] == most})
    if len(rivals) > 1:
        raise ConfigError(
            f"{_KEY}: {start.place} holds {len(rivals)} state dicts: write FILE:NAME, NAME one of "
            f"{', '.join(rivals)}."
        )
    return called, groups[group], source


@functools.lru_cache(maxsize=2)
def _run_variables(folder: Path, prediction: str):
    """(network, variables) of one prediction of a finished run, of whatever classes and image size."""
    directory = folder / "checkpoints"
    step = checkpoint.find(directory)
    run = checkpoint.load_run(directory, step)
    settings, shape = config_lib.from_json(run["config"]), tuple(run["dataset"]["image_shape"])
    method = methods.build(settings, len(run["dataset"]["class_names"]))
    prediction = prediction or method.headline
    if prediction not in method.network_names():
        raise CheckpointError(
            f"{_KEY}: {folder}: {prediction!r} is not one plain network; write DIR:NAME with NAME one of "
            f"{', '.join(method.network_names())}."
        )

    def first():
        params, _ = steps.init_variables(method, jax.random.key(0), shape)
        rules = (settings.optimizer, settings.optimizer_rules, 1, settings.epochs)
        frozen = optimizers.freeze_steps(settings, 1)
        made = optimizers.make_optimizers(method.trains, params, *rules, frozen)
        return steps.create_state(method, made, jax.random.key(0), shape)

    state = checkpoint.restore(directory, step, jax.eval_shape(first))
    return method.extract(state.variables, prediction)
