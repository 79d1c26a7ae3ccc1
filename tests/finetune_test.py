"""Frozen sub-networks, learning rates by depth and kept batch statistics, against steps worked out apart."""

import functools
import shutil
import textwrap
import types

import chex
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import draw_model, equations, first_state, write_run
from seeds_test import final_state

from configs import common
from configs import digits as digits_config
from ffl_jax import methods
from ffl_jax.errors import ConfigError
from ffl_jax.methods import layers
from ffl_jax.models import NETWORKS
from ffl_jax.training import config as config_lib
from ffl_jax.training import experiment, loop, optimizers, start_weights, steps, teachers

CONSTANT = common.get_config().optimizer.to_dict() | {"schedule": "constant"}
PARAMS = {
    "fusion": {"head": {"kernel": jnp.array([1.0, -2.0])}},
    "subnetworks": {
        "branches": {
            "head": {"bias": jnp.array([3.0, 1.0])},
            "stage2_conv": {"kernel": jnp.array([2.0, -0.5])},
        },
        "trunk": {"stage1_conv": {"kernel": jnp.array([0.5, 4.0])}, "stem_conv": {"bias": jnp.array([1.0])}},
    },
}
GRADIENTS = jax.tree.map(lambda x: 0.1 + 0.3 * x, PARAMS)


def make(params=PARAMS, rules=(), freeze_steps=0, trains=None, **settings):
    default = CONSTANT | settings
    return optimizers.make_optimizers(
        trains or {"loss": ".*"}, params, default, rules, 2, 10, freeze_steps=freeze_steps
    )


def trajectory(optimizer, count, params=PARAMS):
    """[(parameters, state) after each of so many steps of the same gradient]."""
    state, update, seen = optimizer.init(params), jax.jit(optimizer.update), []
    for _ in range(count):
        updates, state = update(GRADIENTS, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((params, state))
    return seen


def below_heads(params):
    """The parameters that freezing holds, listed by hand."""
    networks = params["subnetworks"]
    return [networks["branches"]["stage2_conv"], networks["trunk"]]


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_nothing_of_a_frozen_network_moves_but_the_schedule(name):
    """Not by decay or moments, which stay 0; from then on it is a fresh optimiser, late in the schedule."""
    settings = {"name": name, "weight_decay": 0.1, "schedule": "step", "decay_epochs": (1, 2)}
    (optimizer,) = make(freeze_steps=3, **settings).values()
    (free,) = make(**settings).values()
    held, usual = trajectory(optimizer, 5), trajectory(free, 5)
    for params, state in held[:3]:
        chex.assert_trees_all_equal(below_heads(params), below_heads(PARAMS))
        inner = state.inner_states["0_held"].inner_state.inner_state
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(inner))
    for (params, _), (wanted, _) in zip(held, usual, strict=True):
        chex.assert_trees_all_equal(params["fusion"], wanted["fusion"])
        chex.assert_trees_all_equal(
            params["subnetworks"]["branches"]["head"], wanted["subnetworks"]["branches"]["head"]
        )
    # Steps 3 and 4 of two an epoch: the rate fell to a tenth at step 2, and to a hundredth at step 4.
    moved = PARAMS
    rates = {**CONSTANT, **settings, "schedule": "step", "decay_epochs": (0.5,), "learning_rate": 0.01}
    late = optimizers.optimizer(rates, 2, 10)
    state = late.init(PARAMS)
    for params, _ in held[3:]:
        updates, state = late.update(GRADIENTS, state, moved)
        moved = optax.apply_updates(moved, updates)
        chex.assert_trees_all_close(below_heads(params), below_heads(moved), rtol=2e-6)


def test_each_objective_holds_them():
    trains = {"first": "subnetworks/.*", "second": "subnetworks/(?!.*head/).*|fusion/.*"}
    for optimizer in make(freeze_steps=2, trains=trains).values():
        (first, _), _, (third, _) = trajectory(optimizer, 3)
        chex.assert_trees_all_equal(below_heads(first), below_heads(PARAMS))
        assert np.all(third["subnetworks"]["trunk"]["stem_conv"]["bias"] != 1.0)


# By hand, as BEiT's `get_num_layer_for_vit` and timm's `group_matcher` count them from the other end.
DEPTHS = {
    "vit_tiny_patch4": {"stem_positions": 13, "stem_class_token": 13, "stem_conv": 13, "stage1_block1": 12}
    | {"stage2_block1": 9, "stage4_block3": 1, "stage4_norm": 1, "head": 0},
    "convnext_tiny": {"stem_norm": 19, "stage1_block1": 18, "stage2_halving_conv": 15, "stage2_block1": 15}
    | {"stage3_halving_norm": 12, "stage3_block9": 4, "stage4_halving_norm": 3, "norm_head": 0, "head": 0},
    "resnet50": {"stem_conv": 17, "stage1_block1": 16, "stage3_block6": 4, "stage4_block3": 1, "head": 0},
    "densenet40_12": {"stem_conv": 37, "stage1_layer1": 36, "stage1_layer12": 25, "stage2_layer2": 23}
    | {"stage2_transition_norm": 24, "stage3_layer12": 1, "stage3_norm": 1, "head": 0},
    "mobilenetv2": {"stem_norm": 18, "stage1_block1": 17, "stage5_block4": 1, "stage5_conv": 1, "head": 0},
    "vgg13": {"stage1_conv1": 10, "stage1_norm1": 10, "stage1_conv2": 9, "stage5_norm2": 1, "head": 0},
    "tiny": {"stage1_conv": 3, "stage1_norm": 3, "stage3_norm": 1, "head": 0},
}


@pytest.mark.parametrize("name", DEPTHS)
def test_depths(name):
    network = NETWORKS.lookup(name)(10)
    init = functools.partial(network.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    alone = layers.depths({"subnetworks": {"networks_0": shapes}, "fusion": {"stage1_conv": shapes}})
    found = {layer: set(jax.tree.leaves(tree)) for layer, tree in alone["subnetworks"]["networks_0"].items()}
    assert {layer: found[layer] for layer in DEPTHS[name]} == {k: {n} for k, n in DEPTHS[name].items()}
    assert set(jax.tree.leaves(alone["fusion"])) == {0}
    # Cut into trunk and branch, and beside a shorter network, all have what they had.
    trunk = {layer: tree for layer, tree in shapes.items() if layer.startswith(("stem", "stage1"))}
    cut = {"trunk": trunk, "branches": {layer: shapes[layer] for layer in shapes.keys() - trunk.keys()}}
    cut = layers.depths({"subnetworks": cut | {"networks_1": {"stage1_conv": shapes["head"]}}})
    joined = cut["subnetworks"]["trunk"] | cut["subnetworks"]["branches"]
    chex.assert_trees_all_equal(joined, alone["subnetworks"]["networks_0"])
    assert set(jax.tree.leaves(cut["subnetworks"]["networks_1"])) == {1}


def test_layers_that_cannot_be_counted():
    params = {"subnetworks": {"networks_0": {"block1": jnp.zeros(1), "head": jnp.zeros(1)}}}
    with pytest.raises(ConfigError, match=r"layer_decay counts layers .* has 'block1': rename it, or set"):
        make(params, layer_decay=0.5)
    with pytest.raises(ConfigError, match=r"'block1'"):
        make(params, [("loss/.*", {"layer_decay": 0.5})])
    make(params, freeze_steps=1)


RATES = {"fusion": 0.1, "head": 0.1, "stage2_conv": 0.05, "stage1_conv": 0.025, "stem_conv": 0.0125}


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_rates_fall_with_the_depth(name):
    """Each layer moves as in a run whose rate is its own: 0.1 times 0.5 for each stage."""
    (optimizer,) = make(layer_decay=0.5, name=name, weight_decay=0.1).values()
    (params, _) = trajectory(optimizer, 2)[-1]
    for layer, rate in RATES.items():
        (alone,) = make(learning_rate=rate, name=name, weight_decay=0.1).values()
        (wanted, _) = trajectory(alone, 2)[-1]
        for one, other in ((params, wanted),):
            trees = [
                (t | t["subnetworks"]["trunk"] | t["subnetworks"]["branches"])[layer] for t in (one, other)
            ]
            chex.assert_trees_all_close(*trees, rtol=1e-6)
    # Of SGD also by hand: two steps of gradient 0.4 + decay from 1, Nesterov 0.9.
    x, buffer = 1.0, 0.0
    for _ in range(2):
        g = 0.4 + 0.1 * x
        buffer = 0.9 * buffer + g
        x -= 0.0125 * (g + 0.9 * buffer)
    if name == "sgd":
        np.testing.assert_allclose(params["subnetworks"]["trunk"]["stem_conv"]["bias"], [x], rtol=1e-6)


def test_rates_of_rules_and_depths_have_names():
    def named(rules=(), **settings):
        (optimizer,) = make(rules=rules, layer_decay=0.5, **settings).values()
        return {name: float(rate(0)) for name, rate in optimizer.rates.items()}

    usual = {"": 0.1, "/depth_1": 0.05, "/depth_2": 0.025, "/depth_3": 0.0125}
    assert named() == pytest.approx(usual)
    assert named([("loss/.*bias", {"weight_decay": 0.0})]) == pytest.approx(usual)  # no rate of its own
    own = ("loss/fusion/.*", {"learning_rate": 0.3})
    assert named([own]) == pytest.approx(usual | {"/rule_0": 0.3})
    trunk = ("loss/subnetworks/trunk/.*", {"learning_rate": 0.4})
    assert named([own, trunk]) == pytest.approx(
        {"": 0.1, "/rule_0": 0.3, "/depth_1": 0.05, "/rule_1/depth_2": 0.1, "/rule_1/depth_3": 0.05}
    )
    flat = ("loss/subnetworks/trunk/.*", {"layer_decay": 1.0, "learning_rate": 0.4})
    assert named([flat]) == pytest.approx({"": 0.1, "/depth_1": 0.05, "/rule_0": 0.4})


def experiment_of(name, kind=None, **keys):
    """(`harness.Training`, its step with what the configuration freezes) of a method on tiny networks."""
    config = harness.configuration(name, kind or harness.FIRST_KINDS[name])
    config.update_from_flattened_dict(keys)
    method = methods.build(config, harness.CLASSES)
    params, model_state = draw_model(method, harness.SHAPE)
    for kind in method.averages:  # begin with what they are of
        model_state[kind] = {"params": params, "batch_stats": model_state["batch_stats"]}
    frozen = optimizers.freeze_steps(config, 2)
    made = optimizers.make_optimizers(
        method.trains, params, config.optimizer, config.optimizer_rules, 2, config.epochs, frozen
    )
    state = first_state(method, made, harness.SHAPE, params, model_state)
    step = functools.partial(
        steps.train_step, method=method, optimizers=made, steps_per_epoch=2, freeze_steps=frozen
    )
    return method, state, step


def batch_of(method):
    batch = harness.draw_batch()
    if method.views:
        batch["image"] = jnp.stack([batch["image"] + 0.1 * k for k in range(method.subnetworks.num)])
    return batch


def parts(variables):
    """(all of the sub-networks but their heads, their heads, all else) as flat {path: array}."""
    below, heads, rest = {}, {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        keys = [key.key for key in path]
        keys = keys[1:] if keys[0] == "ema" else keys
        inside = keys[1] == "subnetworks"
        place = heads if inside and "head" in keys else below if inside else rest
        place[jax.tree_util.keystr(path)] = np.asarray(leaf)
    return below, heads, rest


@pytest.mark.parametrize("name", ["afd", "pcl"])
def test_all_but_heads_and_modules_stays_while_frozen(name):
    """Parameters, statistics and averages to the bit, for two epochs of two steps; then all moves.

    PCL's averages keep 2/3 from the third step on, where a mean of equal numbers is rounded.
    """
    keys = {"method.average_statistics": True} if name == "pcl" else {}
    rates = {"optimizer.warmup_epochs": 0.0, "optimizer.weight_decay": 0.1}
    method, state, step = experiment_of(name, **{"subnetworks.freeze_epochs": 2.0}, **rates, **keys)
    step, batch, first = jax.jit(step), batch_of(method), parts(state.variables)
    for _ in range(4):
        state = step(state, batch)
    below, heads, rest = parts(state.variables)
    assert any("batch_stats" in path for path in below)
    jax.tree.map(np.testing.assert_array_equal, below, first[0])
    assert all(np.any(heads[path] != first[1][path]) for path in heads)
    assert all(np.any(rest[path] != first[2][path]) for path in rest if "kernel" in path)
    below = parts(step(state, batch).variables)[0]
    same = [path for path in below if np.array_equal(below[path], first[0][path])]
    assert not [path for path in same if "ema" not in path], same


def test_a_frozen_step_is_that_of_a_linear_layer():
    """By NumPy in float64: heads on features of inference mode, their gradients scaled to the norm 0.5."""
    settings = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.1, "clip_norm": 0.5}
    keys = {f"optimizer.{key}": value for key, value in settings.items()}
    method, state, step = experiment_of(
        "independent", "separate", **{"subnetworks.freeze_epochs": 0.5}, **keys
    )
    batch = batch_of(method)
    after = jax.jit(step)(state, batch).params["subnetworks"]["branches"]["head"]
    gradients = {"kernel": [], "bias": []}
    for k in range(2):
        network, variables = method.extract(state.variables, f"sub_{k}")
        x = np.asarray(network.apply(variables, batch["image"], train=False).features, np.float64)
        head = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"]["head"])
        scores = np.exp(x @ head["kernel"] + head["bias"])
        error = scores / scores.sum(1, keepdims=True) - np.eye(harness.CLASSES)[np.asarray(batch["label"])]
        gradients["kernel"].append(x.T @ error / len(x))
        gradients["bias"].append(error.mean(0))
    norm = np.sqrt(sum(np.square(gradient).sum() for gradient in gradients.values()))
    assert norm > 0.5
    for name, gradient in gradients.items():
        start = np.asarray(state.params["subnetworks"]["branches"]["head"][name], np.float64)
        expected = start - 0.1 * (0.5 / norm * np.stack(gradient) + 0.1 * start)
        np.testing.assert_allclose(after[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kind"), [("independent", "mixed"), ("ffl", "shared and one more, vmapped"), ("pcl", None)]
)
def test_kept_statistics_are_used_and_stay(name, kind):
    keys = {"method.average_statistics": True} if name == "pcl" else {}
    method, state, step = experiment_of(name, kind, **{"subnetworks.statistics": "kept"}, **keys)
    batch = batch_of(method)
    step = jax.jit(step)
    after = once = step(state, batch)
    for _ in range(3):
        after = step(after, batch)

    def statistics(state):
        return [
            parts({"batch_stats": tree["batch_stats"]})[0]
            for tree in (state.model_state, state.model_state.get("ema", state.model_state))
        ]

    assert statistics(state)[0]
    jax.tree.map(np.testing.assert_array_equal, statistics(after), statistics(state))
    if name == "ffl":  # that of a module is nobody's start
        pair = (one.model_state["batch_stats"]["fusion"] for one in (state, after))
        assert not any(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
    if name == "independent":  # the logits are those of inference, and so is the gradient
        network, variables = method.extract(state.variables, "sub_1")

        def loss(params):
            images, labels = batch["image"], batch["label"]
            logits = network.apply(variables | {"params": params}, images, train=False).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        wanted = optax.sgd(0.1, 0.9, nesterov=True)
        gradient = jax.tree.map(
            lambda g, x: g + 1e-4 * x, jax.jit(jax.grad(loss))(variables["params"]), variables["params"]
        )
        updates, _ = wanted.update(gradient, wanted.init(variables["params"]))
        expected = optax.apply_updates(variables["params"], updates)
        actual = method.extract(once.variables, "sub_1")[1]["params"]
        chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_runs_side_by_side_take_one_side_of_the_step():
    """`vmap` over seeds would compute both, and choose, if it did not know that they are at one step."""
    method, state, step = experiment_of("independent", **{"subnetworks.freeze_epochs": 1.0})
    two = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    batch = batch_of(method)
    jaxpr = jax.make_jaxpr(jax.vmap(lambda state: step(state, batch)))(two)
    convolutions = [x for x in equations(jaxpr.jaxpr) if x.primitive.name == "conv_general_dilated"]
    outside = [x for x in jaxpr.jaxpr.eqns if x.primitive.name == "conv_general_dilated"]
    assert convolutions
    assert not outside


def test_devices_agree_while_frozen_and_after(commands):
    script = """
    import finetune_test as t, jax, numpy as np
    from ffl_jax.devices import parallel
    method, state, step = t.experiment_of("independent", "separate", **{"subnetworks.freeze_epochs": 1.0})
    batch = t.harness.draw_batch(8)
    found = []
    for settings in ({"num_devices": 1}, {"mode": "shard_map", "num_devices": 4, "subnetworks": 2}):
        runner = parallel.Parallel(**settings)
        def one(state, batch):
            return step(state, jax.tree.map(parallel.share, batch))
        program = runner.map(one, (parallel.OWN, parallel.SHARED), 0)
        placed, images = runner.place(state, parallel.OWN), runner.place(batch)
        for _ in range(3):
            placed = program(placed, images)
            found.append(t.parts(runner.fetch(placed).variables))
    for alone, together in zip(found[:3], found[3:], strict=True):
        for one, other in zip(alone, together, strict=True):
            for path in one:
                np.testing.assert_allclose(other[path], one[path], rtol=1e-4, atol=1e-5, err_msg=path)
    first = t.parts(state.variables)[0]
    for below, _, _ in (*found[:2], *found[3:5]):
        jax.tree.map(np.testing.assert_array_equal, below, first)
    """
    commands.run("-c", textwrap.dedent(script), devices=4)


def whole(start, **keys):
    config = digits_config.get_config("network=tiny,method=independent,epochs=3")
    config.subnetworks.update(num=1, start=(str(start),), freeze_epochs=1.0)
    config.update(num_seeds=2, batch_size=512)
    config.checkpoint.update(every_steps=2, keep=9)
    config.optimizer.update(name="adamw", learning_rate=0.01, layer_decay=0.5)
    config.update_from_flattened_dict(keys)
    return config


def test_a_frozen_run_is_told_and_continues_with_the_same_bits(traced_once, tmp_path, caplog):
    """Two seeds, continued from within the epoch that is frozen; what is left can be started from in turn."""
    config = digits_config.get_config("network=tiny,method=independent")
    config.subnetworks.num = 1
    write_run(tmp_path / "start", config)
    caplog.set_level("INFO")
    loop.train(whole(tmp_path / "start"), tmp_path / "whole")
    assert "Until epoch 1, step 3, sub-networks stay as they start, but for their heads" in caplog.text
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for saved in (tmp_path / "stopped").glob("seed_*/checkpoints/*"):
        if saved.name != "2":
            shutil.rmtree(saved)
    loop.train(whole(tmp_path / "start"), tmp_path / "stopped")
    assert "Continuing from step 2 of 9" in caplog.text
    for seed in ("seed_0", "seed_1"):
        one, other = tmp_path / "stopped" / seed, tmp_path / "whole" / seed
        assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
        states = [jax.tree.leaves(final_state(x)) for x in (one, other)]
        jax.tree.map(np.testing.assert_array_equal, *states)
    assert start_weights.find(f"{tmp_path}/whole/seed_0:sub_0").digest


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"subnetworks.freeze_epochs": 3.0}, r"freeze_epochs=3 of 3 epochs would freeze .* for ever: set it"),
        (
            {"subnetworks.freeze_epochs": 1.0, "subnetworks.start": ()},
            r"freeze_epochs=1.0 holds what .*start",
        ),
        ({"subnetworks.statistics": "kept", "subnetworks.start": ()}, r"statistics=kept holds what .*start"),
        ({"subnetworks.statistics": "keep"}, r"subnetworks\.statistics.*kept"),
        ({"optimizer.layer_decay": 1.5}, r"layer_decay must be in \(0, 1\]"),
        ({"subnetworks.freeze_epochs": -1.0}, r"freeze_epochs must be finite and not negative"),
    ],
)
def test_settings_that_are_refused(keys, message):
    config = whole("a", **{"subnetworks.freeze_epochs": 0.0})
    config.update_from_flattened_dict(keys)
    with pytest.raises(ConfigError, match=message):
        config_lib.check(config)


def test_patience_waits_for_the_frozen_epochs():
    """Six epochs of ten steps are frozen: only what stands still after them ends a run."""
    config = whole("a", epochs=30, **{"subnetworks.freeze_epochs": 6.0, "evaluation.patience": 3})
    config.evaluation.every_epochs = 1
    best = {"step": 20}
    assert not experiment.stands_still(config, 10, best, 80)
    assert experiment.stands_still(config, 10, best, 90)
    config.subnetworks.freeze_epochs = 0.0
    assert experiment.stands_still(config, 10, best, 50)


def test_teachers_are_trained_from_scratch():
    config = common.get_config("method=kd,network=tiny")
    config.subnetworks.update(start=("a",), freeze_epochs=2.0, statistics="kept")
    config.optimizer.layer_decay = 0.5
    teacher = teachers.teacher_config(config, 0)
    assert (teacher.subnetworks.freeze_epochs, teacher.subnetworks.statistics) == (0.0, "adapted")
    assert teacher.optimizer.layer_decay == 1.0


@pytest.mark.parametrize(
    ("found", "text"), [(["subnetworks"], "keep the batch"), (["fusion"], "changes nothing")]
)
def test_what_is_kept_is_told(found, text):
    state = types.SimpleNamespace(model_state={"batch_stats": dict.fromkeys(found)})
    config = whole("a", **{"subnetworks.statistics": "kept"})
    made = types.SimpleNamespace(config=config, freeze_steps=0, abstract_state=lambda: state)
    (said,) = start_weights.told(made)
    assert text in said
