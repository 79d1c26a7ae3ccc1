"""Run by parallel_test.py with 8 devices: trains on some of them in both modes, and by every method.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 PYTHONPATH=. python tests/parallel_script.py matrix

compares one device with all layouts of 2, 4 and 8, by every method; it takes a quarter of an hour.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from conftest import draw_state
from method_test import FIRST_KINDS, configuration

from configs import digits
from ffl_jax import methods
from ffl_jax.devices import parallel
from ffl_jax.training import optimizers, steps

IMAGE_SHAPE = (8, 8, 3)
# (shares of the batch, devices for the sub-networks)
LAYOUTS = ((2, 1), (1, 2), (4, 1), (1, 4), (2, 2), (8, 1), (1, 8), (2, 4))


def in_float64(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree)


class Steps:
    """The training step of a method in float64, and batches for it."""

    def __init__(self, method, config, num_steps):
        self.method = method
        key = jax.random.key(0)
        params, _ = jax.eval_shape(lambda: steps.init_variables(method, key, IMAGE_SHAPE))
        self.optimizers = optimizers.make_optimizers(
            method.trains, params, config.optimizer, config.optimizer_rules, steps_per_epoch=2, epochs=20
        )
        self.start = in_float64(draw_state(method, self.optimizers, IMAGE_SHAPE))
        self.views = (method.subnetworks.num,) if method.views else ()
        rng = np.random.default_rng(0)
        images = rng.normal(size=(num_steps, 16, *self.views, *IMAGE_SHAPE))
        labels = rng.integers(10, size=(num_steps, 16)).astype(np.int32)
        self.batches = list(zip(images, labels, strict=True))

    def step(self, state, images, labels):
        images = parallel.share(images)
        batch = {
            "image": jnp.moveaxis(images, 1, 0) if self.views else images,
            "label": parallel.share(labels),
        }
        return in_float64(
            steps.train_step(state, batch, method=self.method, optimizers=self.optimizers, steps_per_epoch=2)
        )

    def trained(self, runner, start=None):
        """All that is trained or logged, on the devices."""

        def program(state, images, labels):
            return runner.for_seeds(lambda state: self.step(state, images, labels))(state)

        kinds = (parallel.OWN, parallel.SHARED, parallel.SHARED)
        program = runner.map(program, kinds, 0, donate_argnums=(0,))
        state = runner.place(self.start if start is None else start, parallel.OWN)
        for batch in self.batches:
            state = program(state, *runner.place(batch))
        return state.params, state.model_state, state.opt_state, state.record


def numbers(run, tree):
    """{"RUN LEAF": array}."""
    return {
        f"{run} {jax.tree_util.keystr(path)}": np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def configured(name, num=None):
    """The first kind of sub-networks that a method runs on; their number is even, or as given."""
    config = configuration(name, FIRST_KINDS[name])
    config.subnetworks.execution = "loop"  # as on a CPU: quicker to compile
    most = methods.METHODS[name].num[1]
    if most != 1:
        num = config.subnetworks.num + config.subnetworks.num % 2 if num is None else num
        config.subnetworks.num = num if most is None else min(num, most)
    return config


def every_method():
    """{"METHOD DEVICES LEAF": array} after two steps on 1 device, and on 8: 4 shares, or 8 for K = 1."""
    results = {}
    for name in methods.METHODS:
        config = configured(name)
        made = Steps(methods.build(config, 10), config, 2)
        for devices in (1, 8):
            subnetworks = 2 if devices == 8 and config.subnetworks.num > 1 else 1
            runner = parallel.Parallel("shard_map", devices, subnetworks)
            results |= numbers(f"{name} {devices}", runner.fetch(made.trained(runner)))
    return results


def ffl():
    """{"MODE DEVICES LEAF": array} of FFL after four steps."""
    config = digits.get_config("network=tiny")
    made = Steps(methods.build(config, 10), config, 4)
    results = {}
    for mode in parallel.MODES:
        for devices in (1, 2, 4, 8) if mode == "pmap" else (1, 8):
            runner = parallel.Parallel(mode, devices)
            trained = made.trained(runner)
            copies = [
                [np.asarray(leaf.addressable_shards[device].data) for leaf in jax.tree.leaves(trained)]
                for device in range(devices)
            ]
            for copy in copies[1:]:  # every device holds the same bits
                for one, other in zip(copies[0], copy, strict=True):
                    np.testing.assert_array_equal(one, other)
            results |= numbers(f"{mode} {devices}", runner.fetch(trained))
    # Two runs, of which the second begins elsewhere, on 2 shares x 2 for the runs x 2 for the sub-networks.
    other = made.start.replace(params=jax.tree.map(lambda x: 1.1 * x, made.start.params))
    both = jax.tree.map(lambda *x: jnp.stack(x), made.start, other)
    runner = parallel.Parallel("shard_map", 8, subnetworks=2, seeds=2, num_seeds=2)
    placed = made.trained(runner, both)
    branch = jax.tree.leaves(placed[0]["subnetworks"]["branches"])[0]
    assert branch.addressable_shards[0].data.shape[:2] == (1, 1), "each device has one network of one run"
    trained = runner.fetch(placed)
    results |= numbers("mesh 8", jax.tree.map(lambda x: x[0], trained))
    results |= numbers("mesh_second 8", jax.tree.map(lambda x: x[1], trained))
    results |= numbers("second 1", made.trained(parallel.Parallel("shard_map", 1), other))
    return results


def matrix():
    """Prints the largest difference of every method on every layout from one device."""
    for name in methods.METHODS:
        for num in (2, 4, 8):
            config = configured(name, num)
            if config.subnetworks.num != num and num > 2:
                continue
            least = methods.METHODS[name].num[0]
            if num < least:
                continue
            made = Steps(methods.build(config, 10), config, 2)
            alone = jax.device_get(made.trained(parallel.Parallel("shard_map", 1)))
            for shares, spread in LAYOUTS:
                if spread > 1 and spread != config.subnetworks.num:
                    continue
                runner = parallel.Parallel("shard_map", shares * spread, spread)
                trained = jax.device_get(runner.fetch(made.trained(runner)))
                difference = max(
                    float(np.abs(one - other).max() / (1e-3 + np.abs(one).max()))
                    for one, other in zip(*(jax.tree.leaves(x[:3]) for x in (alone, trained)), strict=True)
                )
                print(f"{name} K={config.subnetworks.num} {shares}x{spread}: {difference:.1e}", flush=True)
                jax.clear_caches()


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    what, *path = sys.argv[1:]
    results = {"ffl": ffl, "every_method": every_method, "matrix": matrix}[what]()
    if path:
        np.savez(path[0], **results)
