"""What saves time and memory: bfloat16, a batch in parts, and networks that are computed anew."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import equations
from harness import CLASSES, Training, configuration, in_float64

from ffl_jax import methods
from ffl_jax.devices.parallel import Parallel
from ffl_jax.errors import ConfigError
from ffl_jax.training import config as config_lib
from ffl_jax.training import steps


@pytest.mark.parametrize("name", methods.METHODS)
def test_bfloat16_is_what_all_networks_compute_in(name):
    """Every convolution and product of the forward pass, those of teachers and averaged copies too."""
    made = Training.of(name)
    variables, images = {"params": made.state.params, **made.state.model_state}, made.batch()["image"]

    def forward(variables, images):
        return steps.apply(
            made.method, variables, images, "bfloat16", train=True, mutable=list(made.state.model_state)
        )

    program = jax.make_jaxpr(forward)(variables, images)
    types = [
        {variable.aval.dtype.name for variable in equation.invars}
        for equation in equations(program.jaxpr)
        if equation.primitive.name in ("conv_general_dilated", "dot_general")
    ]
    assert len(types) > 4
    assert all(one == {"bfloat16"} for one in types), types
    outputs, state = jax.eval_shape(forward, variables, images)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((outputs, state))} <= {"float32", "int32"}


@pytest.mark.parametrize("name", ["ffl", "pcl"])
def test_bfloat16_stays_near_float32(name):
    """And the state keeps its form."""
    made = Training.of(name)
    batch = made.batch()
    exact, coarse = (
        jax.jit(functools.partial(made.step, precision=precision))(made.state, batch)
        for precision in steps.PRECISIONS
    )
    forms = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in (made.state, exact, coarse)]
    assert forms[0] == forms[1] == forms[2]
    for term, value in exact.record["terms"].items():
        np.testing.assert_allclose(coarse.record["terms"][term], value, rtol=0.05, atol=0.02, err_msg=term)

    def moved(state):
        pairs = zip(jax.tree.leaves(made.state.params), jax.tree.leaves(state.params), strict=True)
        return np.concatenate([np.ravel(new - old) for old, new in pairs])

    difference = np.linalg.norm(moved(coarse) - moved(exact)) / np.linalg.norm(moved(exact))
    assert 1e-4 < difference < 0.1  # bfloat16 has three digits


@pytest.mark.parametrize("name", ["kdcl", "afd"])  # a view for each sub-network; three objectives
def test_a_batch_in_parts_has_the_gradient_of_the_whole(name):
    """Where the parts are alike, so that they have the whole's batch statistics, which are averaged twice."""
    with jax.enable_x64(True):
        made = Training.of(name)
        batch = made.batch(4)
        batch = {
            "image": jnp.concatenate([batch["image"]] * 2, axis=-4),
            "label": jnp.concatenate([batch["label"]] * 2),
        }
        state = in_float64(made.state)
        whole, parts = (
            jax.jit(functools.partial(made.step, accumulate=accumulate))(state, batch)
            for accumulate in (1, 2)
        )
    for (path, expected), actual in zip(
        jax.tree_util.tree_leaves_with_path((whole.params, whole.opt_state, whole.record["terms"])),
        jax.tree.leaves((parts.params, parts.opt_state, parts.record["terms"])),
        strict=True,
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11, err_msg=str(path))
    assert int(parts.record["steps"]) == int(parts.record["finite_steps"]) == 1
    counts = [float(one["count"]) for one in parts.record["predictions"].values()]
    assert counts == [8.0] * len(counts)
    statistics = jax.device_get(
        [one.model_state["batch_stats"]["subnetworks"] for one in (state, whole, parts)]
    )
    for old, once, twice in zip(*map(jax.tree.leaves, statistics), strict=True):
        new = (once - 0.9 * old) / 0.1
        np.testing.assert_allclose(twice, 0.81 * old + 0.19 * new, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["shared", "separate and one more, vmapped", "mixed"])
def test_networks_computed_anew_give_the_same_and_keep_less(kind):
    config, states, kept = configuration("ffl", kind), [], []
    plain = methods.build(config, CLASSES)
    for remat in (False, True):
        made = Training(plain.clone(subnetworks=plain.subnetworks.clone(remat=remat)), config)
        batch = made.batch()
        states.append(jax.jit(made.step)(made.state, batch))

        def pullback(params, method=made.method, batch=batch, model_state=made.state.model_state):
            def forward(params):
                variables = {"params": params, **model_state}
                outputs, _ = method.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
                return method.objectives(outputs, batch["label"], 0.0)[0]["loss"]

            return jax.vjp(forward, params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(pullback, made.state.params))
        kept.append(sum(leaf.size for leaf in leaves))
    for expected, actual in zip(*(jax.tree.leaves(state.params) for state in states), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert kept[1] < 0.6 * kept[0]


def test_refusals_name_key_and_way_out():
    config = configuration("ffl", "shared")
    config.precision = "float16"
    with pytest.raises(
        ConfigError, match=r"config.precision must be one of float32, bfloat16, got 'float16'"
    ):
        config_lib.check(config)
    config.precision, config.accumulate = "float32", 0
    with pytest.raises(ConfigError, match=r"config.accumulate must be at least 1, got 0"):
        config_lib.check(config)
    config.accumulate, config.subnetworks.execution = 1, "fast"
    with pytest.raises(ConfigError, match="execution must be one of auto, loop, vmap, got 'fast'"):
        config_lib.check(config)
    with pytest.raises(ConfigError, match=r"in 3 parts each: set config.batch_size to 126 or 129"):
        Parallel(num_devices=1).check_batch_size(128, 3)
