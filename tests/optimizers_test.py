"""Optimisers and schedules against steps worked out by hand, in NumPy float64."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar100
from ffl_jax.errors import ConfigError
from ffl_jax.training import optimizers

DEFAULT = cifar100.get_config().optimizer.to_dict()
CONSTANT = {**DEFAULT, "schedule": "constant"}
PARAMS = {
    "subnetworks": {"head": {"kernel": jnp.array([1.0, -2.0])}},
    "fusion": {"head": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0])}},
}
GRADIENTS = {
    "subnetworks": {"head": {"kernel": jnp.array([0.5, 0.25])}},
    "fusion": {"head": {"kernel": jnp.array([0.5, 0.25]), "bias": jnp.array([-1.0])}},
}


def make(rules=(), default=CONSTANT, trains=None, params=PARAMS):
    return optimizers.make_optimizers(trains or {"loss": ".*"}, params, default, rules, 10, 300)


def trajectory(optimizer, params, gradients, steps):
    """The parameters after each of so many steps of the same gradient."""
    state, update, seen = optimizer.init(params), jax.jit(optimizer.update), []
    for _ in range(steps):
        updates, state = update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        seen.append(params)
    return seen


def sgd(start, gradient, decay, steps, momentum=0.9, nesterov=True):
    """PyTorch's SGD: decay joins the gradient before the momentum, the rate multiplies last."""
    x, buffer, seen = np.asarray(start, np.float64), 0.0, []
    for _ in range(steps):
        g = gradient + decay * x
        buffer = momentum * buffer + g
        x = x - 0.1 * (g + momentum * buffer if nesterov else buffer)
        seen.append(x)
    return seen


def test_sgd_of_a_scalar():
    # By hand: Nesterov 0.9, rate 0.1, decay 1e-4, gradient 0.5 from 1.
    (optimizer,) = make(params={"x": jnp.float32(1)}).values()
    actual = [step["x"] for step in trajectory(optimizer, {"x": jnp.float32(1)}, {"x": jnp.float32(0.5)}, 3)]
    np.testing.assert_allclose(actual, [0.90498100, 0.76945571, 0.59747647], rtol=2e-7)
    np.testing.assert_allclose(sgd(1, 0.5, 1e-4, 3), [0.90498100, 0.76945571, 0.59747647], atol=5e-9)


@pytest.mark.parametrize("nesterov", [True, False])
def test_two_groups_decay_apart(nesterov):
    """Every parameter of a group decays, biases as well, before the momentum."""
    default = {**CONSTANT, "weight_decay": 0.1, "nesterov": nesterov}
    (optimizer,) = make([("loss/fusion/.*", {"weight_decay": 0.01})], default).values()
    steps = trajectory(optimizer, PARAMS, GRADIENTS, 3)
    for group, decay in (("subnetworks", 0.1), ("fusion", 0.01)):
        for name, start in PARAMS[group]["head"].items():
            gradient = np.asarray(GRADIENTS[group]["head"][name], np.float64)
            expected = sgd(np.asarray(start, np.float64), gradient, decay, 3, nesterov=nesterov)
            actual = [step[group]["head"][name] for step in steps]
            np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_sgd_without_momentum():
    (optimizer,) = make(default={**CONSTANT, "momentum": 0.0, "nesterov": False}).values()
    actual = trajectory(optimizer, PARAMS, GRADIENTS, 2)[1]["fusion"]["head"]["bias"]
    np.testing.assert_allclose(actual, sgd([3.0], -1.0, 1e-4, 2, momentum=0, nesterov=False)[1], rtol=1e-6)


def test_adam():
    default = {**CONSTANT, "name": "adam", "learning_rate": 0.01, "weight_decay": 0.1}
    default |= {"beta1": 0.8, "beta2": 0.95}
    (optimizer,) = make(default=default).values()
    x, g0 = np.array([1.0, -2.0]), np.array([0.5, 0.25])
    first = second = 0.0
    steps = trajectory(optimizer, PARAMS, GRADIENTS, 2)
    for step in (1, 2):
        g = g0 + 0.1 * x  # L2, as PyTorch's Adam; not AdamW
        first, second = 0.8 * first + 0.2 * g, 0.95 * second + 0.05 * g**2
        x = x - 0.01 * (first / (1 - 0.8**step)) / (np.sqrt(second / (1 - 0.95**step)) + 1e-8)
        np.testing.assert_allclose(steps[step - 1]["subnetworks"]["head"]["kernel"], x, rtol=1e-6)


def test_adamw():
    """PyTorch's: the decay is not scaled, and the rate multiplies it."""
    default = {**CONSTANT, "name": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}
    (optimizer,) = make(default=default | {"beta1": 0.8, "beta2": 0.95}).values()
    x, g = np.array([1.0, -2.0]), np.array([0.5, 0.25])
    first = second = 0.0
    steps = trajectory(optimizer, PARAMS, GRADIENTS, 2)
    for step in (1, 2):
        first, second = 0.8 * first + 0.2 * g, 0.95 * second + 0.05 * g**2
        adam = (first / (1 - 0.8**step)) / (np.sqrt(second / (1 - 0.95**step)) + 1e-8)
        x = x - 0.01 * 0.1 * x - 0.01 * adam
        np.testing.assert_allclose(steps[step - 1]["subnetworks"]["head"]["kernel"], x, rtol=1e-6)


def test_lamb_of_every_stacked_network():
    """Algorithm 2 of the paper, layer by layer and network by network; a layer of zeros takes Adam's step."""
    rng = np.random.default_rng(0)
    drawn = [{"kernel": rng.normal(size=(3, 4, 2)), "bias": np.zeros((3, 2))} for _ in range(2)]
    params, gradients = ({"subnetworks": {"branches": {"head": jax.tree.map(jnp.asarray, x)}}} for x in drawn)
    gradients["subnetworks"]["branches"]["head"]["bias"] += 0.1
    default = {**CONSTANT, "name": "lamb", "learning_rate": 0.01, "weight_decay": 0.1}
    (optimizer,) = make(default=default, params=params).values()
    steps = trajectory(optimizer, params, gradients, 2)
    for name in ("kernel", "bias"):
        g = np.asarray(gradients["subnetworks"]["branches"]["head"][name], np.float64)
        for k in range(3):
            x, first, second = drawn[0][name][k], 0.0, 0.0
            for step in (1, 2):
                first, second = 0.9 * first + 0.1 * g[k], 0.999 * second + 0.001 * g[k] ** 2
                r = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-6) + 0.1 * x
                ratio = np.linalg.norm(x) / np.linalg.norm(r) if np.linalg.norm(x) else 1.0
                x = x - 0.01 * ratio * r
                actual = steps[step - 1]["subnetworks"]["branches"]["head"][name][k]
                np.testing.assert_allclose(actual, x, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("norm", [0.0, 0.5, 100.0])
def test_clipping_counts_what_an_objective_trains(norm):
    """`first` trains the fusion alone, whose gradient has the norm sqrt(0.5^2 + 0.25^2 + 1) = 1.1456."""
    default = {**CONSTANT, "momentum": 0.0, "nesterov": False, "weight_decay": 0.1, "clip_norm": norm}
    trains = {"first": "fusion/.*", "second": "subnetworks/.*"}
    for objective, optimizer in make(default=default, trains=trains).items():
        (params,) = trajectory(optimizer, PARAMS, GRADIENTS, 1)
        group, length = ("fusion", 1.145644) if objective == "first" else ("subnetworks", 0.559017)
        factor = min(1, norm / length) if norm else 1
        for name, x in PARAMS[group]["head"].items():
            expected = x - 0.1 * (factor * GRADIENTS[group]["head"][name] + 0.1 * x)  # decay is not clipped
            np.testing.assert_allclose(params[group]["head"][name], expected, rtol=1e-6)
        other = "subnetworks" if objective == "first" else "fusion"
        jax.tree.map(np.testing.assert_array_equal, params[other], PARAMS[other])


def test_a_rule_cannot_clip_a_part():
    with pytest.raises(ConfigError, match=r"clip_norm.*together: set config\.optimizer\.clip_norm"):
        make([("loss/fusion/.*", {"clip_norm": 1.0})])


def test_the_first_rule_that_matches_counts():
    rules = [
        ("loss/fusion/.*/bias", {"weight_decay": 0.0}),
        ("loss/fusion/.*", {"weight_decay": 0.3}),
        ("loss/.*/kernel", {"weight_decay": 0.6}),  # reaches what is left: that of the sub-networks
    ]
    (optimizer,) = make(rules, {**CONSTANT, "momentum": 0.0, "nesterov": False}).values()
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    (params,) = trajectory(optimizer, PARAMS, zeros, 1)
    expected = {
        "subnetworks": {"head": {"kernel": np.array([1.0, -2.0]) * (1 - 0.1 * 0.6)}},
        "fusion": {"head": {"kernel": np.array([1.0, -2.0]) * (1 - 0.1 * 0.3), "bias": np.array([3.0])}},
    }
    chex.assert_trees_all_close(params, expected, rtol=1e-6)


def test_a_rule_must_match_the_whole_path():
    with pytest.raises(ConfigError, match=r"'loss/fusion' matches no parameter"):
        make([("loss/fusion", {"weight_decay": 0.3})])
    with pytest.raises(ConfigError, match=r"'fusion/\.\*' matches no parameter.*\(loss\)"):
        make([("fusion/.*", {"weight_decay": 0.3})])


def test_frozen_parameters_stay_bitwise_the_same():
    trains = {"first": "fusion/.*", "second": "fusion/head/bias"}
    first, second = make(trains=trains).values()
    for params in trajectory(first, PARAMS, GRADIENTS, 3):
        chex.assert_trees_all_equal(params["subnetworks"], PARAMS["subnetworks"])
    assert np.all(params["fusion"]["head"]["kernel"] != PARAMS["fusion"]["head"]["kernel"])
    for params in trajectory(second, PARAMS, GRADIENTS, 3):
        chex.assert_trees_all_equal(params["subnetworks"], PARAMS["subnetworks"])
        chex.assert_trees_all_equal(params["fusion"]["head"]["kernel"], PARAMS["fusion"]["head"]["kernel"])
    assert np.all(params["fusion"]["head"]["bias"] != PARAMS["fusion"]["head"]["bias"])


def test_rules_of_several_objectives():
    trains = {"first": ".*", "second": "fusion/.*"}
    rules = [("second/.*", {"name": "adam", "learning_rate": 0.5, "weight_decay": 0.0})]
    first, second = make(rules, trains=trains).values()
    (params,) = trajectory(second, PARAMS, GRADIENTS, 1)
    np.testing.assert_allclose(params["fusion"]["head"]["bias"], [3.5], rtol=1e-6)  # Adam's first step is lr
    (params,) = trajectory(first, PARAMS, GRADIENTS, 1)
    np.testing.assert_allclose(params["fusion"]["head"]["bias"], sgd([3.0], -1.0, 1e-4, 1)[0], rtol=1e-6)


def rates(settings, steps_per_epoch, epochs, steps):
    schedule = jax.jit(optimizers.learning_rate_schedule({**DEFAULT, **settings}, steps_per_epoch, epochs))
    return [float(schedule(step)) for step in steps]


def test_published_schedule():
    steps = [0, 149 * 391, 150 * 391 - 1, 150 * 391, 224 * 391, 225 * 391 - 1, 225 * 391, 300 * 391 - 1]
    expected = [0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001, 0.001]
    np.testing.assert_allclose(rates({}, 391, 300, steps), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "epochs", "text"),
    [
        ({}, 300, "0.1, times 0.1 at each of epochs [150, 225]"),
        ({}, 200, "0.1, times 0.1 at each of epochs [150]; decay_epochs [225] lie behind the end at 200"),
        ({}, 30, "0.1, and never falls; decay_epochs [150, 225] lie behind the end at 30"),
        ({"schedule": "cosine", "warmup_epochs": 5.0}, 30, "0.1, reached at epoch 5, cosine until epoch 30"),
        (
            {"schedule": "constant", "layer_decay": 0.75},
            30,
            "0.1, times 0.75 for each block below the head, constant until epoch 30",
        ),
    ],
)
def test_the_course_of_the_rate_is_told(settings, epochs, text):
    start = {"learning_rate": 0.1, "schedule": "step", "decay_epochs": (150, 225), "decay_factor": 0.1}
    start |= {"layer_decay": 1.0}
    assert optimizers.course(start | {"warmup_epochs": 0.0} | settings, epochs) == text


def test_constant_schedule():
    assert rates({"schedule": "constant"}, 5, 300, [0, 5 * 299]) == pytest.approx([0.1, 0.1])


def test_cosine_schedule():
    # By hand: 0.1 (1 + cos(pi t / 40)) / 2 over 4 epochs of 10 steps.
    expected = [0.1, 0.0853553391, 0.05, 0.0146446609, 0.0]
    np.testing.assert_allclose(rates({"schedule": "cosine"}, 10, 4, [0, 10, 20, 30, 40]), expected, atol=1e-8)


def test_warm_up_then_cosine():
    # 10 steps up, then 0.1 (1 + cos(pi (t - 10) / 40)) / 2.
    settings = {"schedule": "cosine", "warmup_epochs": 1.0}
    expected = [0.0, 0.01, 0.05, 0.09, 0.1, 0.05, 0.0]
    np.testing.assert_allclose(rates(settings, 10, 5, [0, 1, 5, 9, 10, 30, 50]), expected, atol=1e-8)


def test_warm_up_then_steps():
    """Decay epochs count from the beginning of the run, not from the end of the warm-up."""
    settings = {"warmup_epochs": 0.5, "decay_epochs": (2, 3), "decay_factor": 0.5}
    steps = [0, 1, 3, 4, 15, 16, 23, 24, 40]
    expected = [0.0, 0.025, 0.075, 0.1, 0.1, 0.05, 0.05, 0.025, 0.025]
    np.testing.assert_allclose(rates(settings, 8, 5, steps), expected, rtol=1e-6)


def test_the_rate_moves_with_the_steps_of_a_run():
    default = {**DEFAULT, "decay_epochs": (1, 2), "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    params = {"x": jnp.float32(0)}
    (optimizer,) = optimizers.make_optimizers({"loss": ".*"}, params, default, (), 2, 3).values()
    seen = [step["x"] for step in trajectory(optimizer, params, {"x": jnp.float32(-1)}, 6)]
    moves = np.diff([0.0, *seen])
    np.testing.assert_allclose(moves, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-4)


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("name", ["rmsprop", ""], "one of sgd, adam, adamw, lamb"),
        ("schedule", ["linear"], "one of step, cosine, constant"),
        ("learning_rate", [0.0, -0.1, float("inf"), float("nan")], "finite number > 0"),
        ("clip_norm", [-1.0, float("inf")], "finite number >= 0"),
        ("weight_decay", [-1e-4, float("inf"), float("nan")], "finite number >= 0"),
        ("warmup_epochs", [-1.0, float("nan")], "finite number >= 0"),
        ("momentum", [-0.1, 1.0, 2.0, float("nan")], r"in \[0, 1\)"),
        ("beta1", [-0.1, 1.0], r"in \[0, 1\)"),
        ("beta2", [-0.1, 1.0], r"in \[0, 1\)"),
        ("decay_factor", [0.0, -1.0, 1.5], r"in \(0, 1\]"),
        ("layer_decay", [0.0, -1.0, 1.5], r"in \(0, 1\]"),
        ("decay_epochs", [(225, 150), (150, 150), (0, 10), (-1,)], "increasing and after the warm-up"),
    ],
)
def test_values_out_of_their_domain(key, values, message):
    for value in values:
        with pytest.raises(ConfigError, match=rf"optimizer\.{key} must be .*{message}.*, got"):
            make(default={**DEFAULT, key: value})
        if key != "clip_norm":
            with pytest.raises(ConfigError, match=rf"loss/fusion/\.\*\.{key} must be .*{message}.*, got"):
                make([("loss/fusion/.*", {key: value})])


def test_decay_during_the_warm_up():
    with pytest.raises(ConfigError, match="decay_epochs"):
        make(default={**DEFAULT, "decay_epochs": (3, 10), "warmup_epochs": 5.0})


def test_unknown_setting():
    with pytest.raises(ConfigError, match=r"unknown setting 'weigth_decay' .*did you mean weight_decay"):
        make([("loss/fusion/.*", {"weigth_decay": 0.0})])


@pytest.mark.parametrize(
    "rule",
    [
        "loss/fusion/.*",
        ("loss/fusion/.*",),
        ("loss/fusion/.*", {}, {}),
        ("loss/(fusion/.*", {"weight_decay": 0.0}),
        ("loss/fusion/.*", 1e-5),
        (1e-5, {"weight_decay": 0.0}),
        ("loss/fusion/.*", "ab"),
    ],
)
def test_rules_that_are_none(rule):
    with pytest.raises(ConfigError, match="optimizer_rules"):
        make([rule])


def test_a_value_of_another_type_in_a_rule():
    for key, value in itertools.product(("weight_decay", "learning_rate"), ("1e-5", None)):
        with pytest.raises(ConfigError, match=key):
            make([("loss/fusion/.*", {key: value})])
