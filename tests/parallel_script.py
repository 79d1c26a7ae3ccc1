"""Run by parallel_test.py with 8 devices: trains on some of them in both modes, and by every method."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from conftest import draw_state
from method_test import RUN, configuration

from configs import digits
from ffl_jax import methods, optimizers, parallel, steps

IMAGE_SHAPE = (8, 8, 3)


def in_float64(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree)


def main(what, path):
    jax.config.update("jax_enable_x64", True)
    np.savez(path, **{"ffl": ffl, "every_method": every_method}[what]())


def every_method():
    """{"METHOD DEVICES LEAF": array} after two steps on 1 and on 8 devices."""
    results = {}
    for name, kind in dict(reversed(RUN)).items():  # of each method the first kind that it runs on
        config = configuration(name, kind)
        if "vmapped" in kind:  # as on a CPU: quicker to compile
            config.subnetworks.execution = "loop"
        method = methods.build(config, 10)
        made, start = initial(method, config)
        views = (method.subnetworks.num,) if method.views else ()
        rng = np.random.default_rng(0)
        images, labels = rng.normal(size=(16, *views, *IMAGE_SHAPE)), rng.integers(10, size=16)
        labels = labels.astype(np.int32)

        def step(state, images, labels, method=method, made=made, views=views):
            images = parallel.share(images)
            batch = {
                "image": jnp.moveaxis(images, 1, 0) if views else images,
                "label": parallel.share(labels),
            }
            return in_float64(
                steps.train_step(state, batch, method=method, optimizers=made, steps_per_epoch=2)
            )

        for devices in (1, 8):
            runner = parallel.Parallel("pmap", devices)
            program = runner.map(step, donate_argnums=(0,))
            state = runner.replicate(start)
            for _ in range(2):
                state = program(state, *runner.replicate((images, labels)))
            trained = (state.params, state.model_state, state.opt_state, state.record)
            for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(runner.fetch(trained)):
                results[f"{name} {devices} {jax.tree_util.keystr(leaf_path)}"] = np.asarray(leaf)
    return results


def initial(method, config):
    """(optimisers, first state in float64) of a method."""
    key = jax.random.key(0)
    params, _ = jax.eval_shape(lambda: steps.init_variables(method, key, IMAGE_SHAPE))
    made = optimizers.make_optimizers(
        method.trains, params, config.optimizer, config.optimizer_rules, steps_per_epoch=2, epochs=20
    )
    return made, in_float64(draw_state(method, made, IMAGE_SHAPE))


def ffl():
    """{"MODE DEVICES LEAF": array} of FFL after four steps."""
    config = digits.get_config("network=tiny")
    method = methods.build(config, 10)
    made, start = initial(method, config)
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(4, 16, *IMAGE_SHAPE)), rng.integers(10, size=(4, 16)).astype(np.int32)

    def step(state, images, labels):
        batch = {"image": parallel.share(images), "label": parallel.share(labels)}
        return in_float64(steps.train_step(state, batch, method=method, optimizers=made, steps_per_epoch=2))

    results = {}
    for mode in parallel.MODES:
        for devices in (1, 2, 4, 8) if mode == "pmap" else (1, 8):
            runner = parallel.Parallel(mode, devices)
            program = runner.map(step, donate_argnums=(0,))
            state = runner.replicate(start)
            for batch in zip(images, labels, strict=True):
                state = program(state, *runner.replicate(batch))
            trained = (state.params, state.model_state, state.opt_state, state.record)
            copies = [
                [np.asarray(leaf.addressable_shards[device].data) for leaf in jax.tree.leaves(trained)]
                for device in range(devices)
            ]
            for copy in copies[1:]:  # every device holds the same bits
                for one, other in zip(copies[0], copy, strict=True):
                    np.testing.assert_array_equal(one, other)
            for path_, leaf in jax.tree_util.tree_leaves_with_path(runner.fetch(trained)):
                results[f"{mode} {devices} {jax.tree_util.keystr(path_)}"] = np.asarray(leaf)
    return results


if __name__ == "__main__":
    main(*sys.argv[1:])
