"""From configuration to one optax transformation for each objective of a method."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ffl_jax.devices import parallel
from ffl_jax.errors import ConfigError
from ffl_jax.methods import layers
from ffl_jax.registry import nearest

OPTIMIZERS = ("sgd", "adam", "adamw", "lamb")
SCHEDULES = ("step", "cosine", "constant")
# What makes a rate.
_RATE = ("learning_rate", "layer_decay", "schedule", "decay_epochs", "decay_factor", "warmup_epochs")


class Optimizer(NamedTuple):
    """An `optax.GradientTransformation` of the whole parameter tree, and what a log shows of it.

    Attributes:
      init, update: see there.
      rates: {name: step -> learning rate}. "" is that of the parameters that no rule names, or that the last
        of the rules does where they name all; "/rule_N" that of the rule number N, where it has its own. With
        `layer_decay` these are of heads and modules, and "/depth_N" and "/rule_N/depth_N" those of the
        layers that are so far from the head.
      trained: a tree like the parameters that says of each whether it moves.
    """

    init: Callable
    update: Callable
    rates: dict[str, optax.Schedule]
    trained: Any


def learning_rate_schedule(settings: Mapping, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Step -> learning rate.

    Args:
      settings: `learning_rate` > 0; `schedule`, one of `SCHEDULES`; `decay_epochs` and `decay_factor`, for
        "step", which multiplies by the factor at the beginning of each of these 0-based epochs;
        `warmup_epochs`, over which the rate first rises linearly from 0.
      steps_per_epoch: turns epochs into steps.
      epochs: of the whole run; "cosine" ends there, at 0.
    """
    peak, warmup = settings["learning_rate"], round(settings["warmup_epochs"] * steps_per_epoch)
    if settings["schedule"] == "step":
        steps = {}
        for epoch in settings["decay_epochs"]:
            step = round(epoch * steps_per_epoch) - warmup
            steps[step] = steps.get(step, 1.0) * settings["decay_factor"]
        schedule = optax.piecewise_constant_schedule(peak, steps)
    elif settings["schedule"] == "cosine":
        schedule = optax.cosine_decay_schedule(peak, max(1, round(epochs * steps_per_epoch) - warmup))
    else:
        schedule = optax.constant_schedule(peak)
    if not warmup:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), schedule], [warmup])


def freeze_steps(config, steps_per_epoch: int) -> int:
    """How many steps `config.subnetworks.freeze_epochs` are; one at least, if it is not 0."""
    epochs = config.subnetworks.freeze_epochs
    return max(1, round(epochs * steps_per_epoch)) if epochs else 0


def optimizer(
    settings: Mapping, steps_per_epoch: int, epochs: int, first: int = 0
) -> optax.GradientTransformation:
    """One of `OPTIMIZERS`.

    SGD with momentum and Adam have the weight decay added to the gradient first, as in PyTorch. AdamW, which
    does not scale it (Loshchilov & Hutter, 2019), and LAMB (You et al., 2020) have it added to the step.

    Args:
      settings: see `learning_rate_schedule`, and the keys that are read here.
      steps_per_epoch, epochs: for the schedule.
      first: the step before which nothing moves: no decay is added, moments stay 0, and are then corrected
        as in a run that begins there; the schedule alone counts from the beginning of this run.
    """
    schedule = learning_rate_schedule(settings, steps_per_epoch, epochs)
    if first:
        late = _optimizer(settings, lambda step: schedule(step + first))
        return optax.transforms.conditionally_mask(late, lambda step: step >= first)
    return _optimizer(settings, schedule)


def _optimizer(settings, schedule):
    name = settings["name"]
    decay = optax.add_decayed_weights(settings["weight_decay"])
    betas = {"b1": settings["beta1"], "b2": settings["beta2"]}
    if name == "sgd":
        core = optax.sgd(schedule, settings["momentum"] or None, nesterov=settings["nesterov"])
        return optax.chain(decay, core)
    if name == "adam":
        return optax.chain(decay, optax.adam(schedule, **betas))
    if name == "adamw":
        return optax.chain(optax.scale_by_adam(**betas), decay, optax.scale_by_learning_rate(schedule))
    adapted = (optax.scale_by_adam(**betas, eps=1e-6), decay, _scale_by_trust_ratio())
    return optax.chain(*adapted, optax.scale_by_learning_rate(schedule))


def _scale_by_trust_ratio() -> optax.GradientTransformation:
    """Makes a layer's step as long as its parameters, where neither is 0; optax's joins stacked networks."""

    def scale(path, update, param):
        axes = range(parallel.is_stacked(path), update.ndim)  # each network by itself

        def norm(x):
            return jnp.sqrt(jnp.square(x).sum(axis=axes, keepdims=True))

        length, wanted = norm(update), norm(param)
        return update * jnp.where((length > 0) & (wanted > 0), wanted / length, 1.0)

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(scale, updates, params))


def _clip(norm: float, is_trained) -> optax.GradientTransformation:
    """Scales an objective's gradient down to that norm, over all that it trains on whatever device."""

    def clip(updates, params):
        factor = norm / jnp.maximum(parallel.norm(updates, is_trained), norm)
        return jax.tree.map(lambda x: factor * x, updates)

    return optax.stateless(clip)


def course(settings: Mapping, epochs: int) -> str:
    """How the learning rate goes over a run of so many epochs, in words; also what of it has no effect."""
    text = f"{settings['learning_rate']:g}"
    if settings["layer_decay"] != 1:
        text += f", times {settings['layer_decay']:g} for each block below the head"
    if settings["warmup_epochs"]:
        text += f", reached at epoch {settings['warmup_epochs']:g}"
    if settings["schedule"] != "step":
        return f"{text}, {settings['schedule']} until epoch {epochs}"
    falls = [epoch for epoch in settings["decay_epochs"] if epoch < epochs]
    late = [epoch for epoch in settings["decay_epochs"] if epoch >= epochs]
    text += (
        f", times {settings['decay_factor']:g} at each of epochs {falls}" if falls else ", and never falls"
    )
    return f"{text}; decay_epochs {late} lie behind the end at {epochs}" if late else text


def check_settings(settings: Mapping, where: str):
    """Raises ConfigError, naming the key under `where`, for a value out of its domain or of another type."""

    def require(key, wanted, is_fine):
        try:
            if is_fine(settings[key]):
                return
        except TypeError:
            pass
        raise ConfigError(f"{where}.{key} must be {wanted}, got {settings[key]!r}.")

    require("name", f"one of {', '.join(OPTIMIZERS)}", lambda x: x in OPTIMIZERS)
    require("schedule", f"one of {', '.join(SCHEDULES)}", lambda x: x in SCHEDULES)
    require("learning_rate", "a finite number > 0", lambda x: 0 < x < float("inf"))
    for key in ("weight_decay", "warmup_epochs", "clip_norm"):
        require(key, "a finite number >= 0", lambda x: 0 <= x < float("inf"))
    for key in ("momentum", "beta1", "beta2"):
        require(key, "in [0, 1)", lambda x: 0 <= x < 1)
    for key in ("decay_factor", "layer_decay"):
        require(key, "in (0, 1]", lambda x: 0 < x <= 1)
    require(
        "decay_epochs",
        "increasing and after the warm-up",
        lambda x: list(x) == sorted(set(x)) and all(epoch > settings["warmup_epochs"] for epoch in x),
    )


def merge_rules(default: Mapping, rules: Sequence) -> list[tuple[str, dict]]:
    """Checks `rules`, pairs of a regex and overrides; returns them with full settings, a catch-all last."""
    merged = []
    for rule in rules:
        try:
            pattern, overrides = rule
            re.compile(pattern)
            unknown = set(overrides) - set(default)
        except (TypeError, ValueError, re.error) as error:
            raise ConfigError(
                f"optimizer_rules: {rule!r} is not a pair (regex, {{setting: value}}): {error}"
            ) from error
        if unknown:
            key = min(unknown)
            raise ConfigError(
                f"optimizer_rules: unknown setting {key!r} for {pattern!r}: {nearest(key, default)}"
            )
        if "clip_norm" in overrides:
            raise ConfigError(
                f"optimizer_rules: clip_norm, for {pattern!r}, is of all that an objective trains together: "
                "set config.optimizer.clip_norm."
            )
        merged.append((pattern, {**default, **overrides}))
    for pattern, settings in [("optimizer", default), *merged]:
        check_settings(settings, pattern)
    return [*merged, (".*", dict(default))]


def make_optimizers(
    trains: Mapping[str, str],
    params,
    default: Mapping,
    rules: Sequence,
    steps_per_epoch: int,
    epochs: int,
    freeze_steps: int = 0,
) -> dict[str, Optimizer]:
    """{objective: its optimiser}.

    Args:
      trains: objective -> regex over parameter paths such as "fusion/head/kernel"; what it does not match in
        full stays as it is.
      params: parameters or their shapes.
      default: settings of an optimiser, see `optimizer` and `learning_rate_schedule`.
      rules: pairs (regex, overrides); the first to match "objective/parameter/path" in full counts.
      steps_per_epoch, epochs: for the schedules.
      freeze_steps: for so long sub-networks but their heads stay as they are, see `optimizer`.

    Raises:
      ConfigError: a setting is unknown or out of its domain, a rule matches no parameter, or layers cannot be
        counted.
    """
    table = merge_rules(default, rules)
    unused = set(range(len(rules)))
    decays = any(settings["layer_decay"] != 1 for _, settings in table)
    depths = layers.depths(params) if decays else jax.tree.map(lambda _: 0, params)
    held = layers.body(params) if freeze_steps else jax.tree.map(lambda _: False, params)
    optimizers = {}
    for objective, trained in trains.items():
        labels, kinds = _labels(objective, trained, table, depths, held)
        unused -= {index for index, _, _ in kinds.values()}
        groups = {
            name: optimizer(_at(table, *place), steps_per_epoch, epochs, freeze_steps if held else 0)
            for name, (*place, held) in kinds.items()
        }
        trained = jax.tree.map(lambda name: name != "frozen", labels)
        if not all(jax.tree.leaves(trained)):
            groups["frozen"] = optax.set_to_zero()
        used = {(index, depth) for index, depth, _ in kinds.values()} or {(len(rules), 0)}
        rates = {
            name: learning_rate_schedule(settings, steps_per_epoch, epochs)
            for name, settings in _rates(table, used).items()
        }
        whole = optax.multi_transform(groups, labels)
        if default["clip_norm"]:
            whole = optax.chain(_clip(default["clip_norm"], trained), whole)
        optimizers[objective] = Optimizer(*whole, rates, trained)
    if unused:
        raise ConfigError(
            f"optimizer_rules: {table[min(unused)][0]!r} matches no parameter of an objective "
            f"({', '.join(trains)}): write it as objective/path, for instance 'loss/fusion/.*'."
        )
    return optimizers


def _labels(objective: str, trained: str, table, depths, held) -> tuple[Any, dict[str, tuple]]:
    """(a tree of labels like the parameters, {label: (rule, depth, whether it is held at first)}).

    Args: trained, table: see `make_optimizers`. depths, held: trees like the parameters.
    """
    kinds = {}

    def label(path, depth, held):
        path = "/".join(key.key for key in path)
        if not re.fullmatch(trained, path):
            return "frozen"
        index = next(i for i, (rule, _) in enumerate(table) if re.fullmatch(rule, f"{objective}/{path}"))
        depth = depth if table[index][1]["layer_decay"] != 1 else 0
        name = f"{index}{f'_{depth}' if depth else ''}{'_held' if held else ''}"
        kinds[name] = index, depth, held
        return name

    return jax.tree_util.tree_map_with_path(label, depths, held), kinds


def _at(table, index: int, depth: int) -> dict:
    """The settings of a rule so far from the head."""
    settings = table[index][1]
    return {**settings, "learning_rate": settings["learning_rate"] * settings["layer_decay"] ** depth}


def _rates(table, used: set[tuple[int, int]]) -> dict[str, dict]:
    """{name: settings} of `Optimizer.rates`, from the (rule, depth) that an objective uses."""
    last, rates = table[max(used)[0]][1], {}
    for index, depth in used:
        has_own = any(table[index][1][key] != last[key] for key in _RATE)
        rule = f"/rule_{index}" if has_own else ""
        rates[f"{rule}{f'/depth_{depth}' if depth else ''}"] = _at(table, index, depth)
    return dict(sorted(rates.items()))
