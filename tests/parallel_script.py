"""Run by parallel_test.py with 8 devices: trains on some of them in both modes, and by every method.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 PYTHONPATH=. python tests/parallel_script.py matrix

compares one device with all layouts of 2, 4 and 8, by every method; it takes a quarter of an hour.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from harness import CLASSES, FIRST_KINDS, Training, configuration, in_float64

from configs import digits
from ffl_jax import methods
from ffl_jax.devices import parallel
from ffl_jax.training.recipe import Recipe

# (shares of the batch, devices for the sub-networks)
LAYOUTS = ((2, 1), (1, 2), (4, 1), (1, 4), (2, 2), (8, 1), (1, 8), (2, 4))


class Steps:
    """The training steps of a method in float64, on several devices, and batches for them."""

    def __init__(self, config, num_steps, **settings):
        """Args: settings: of `steps.train_step`."""
        self._settings = settings
        self.made = Training(methods.build(config, CLASSES), config)
        self.start = in_float64(self.made.state)
        self.batches = [self.made.batch(16, seed) for seed in range(num_steps)]
        if self.made.method.views:  # devices share the first axis
            self.batches = [one | {"image": jnp.moveaxis(one["image"], 0, 1)} for one in self.batches]

    def step(self, state, batch):
        batch = jax.tree.map(parallel.share, batch)
        if self.made.method.views:
            batch["image"] = jnp.moveaxis(batch["image"], 1, 0)
        return in_float64(self.made.step(state, batch, **self._settings))

    def trained(self, runner, starts=None):
        """All that is trained or logged, on the devices."""
        program = runner.map(self.step, (parallel.OWN, parallel.SHARED), 0, donate=(0,))
        state = runner.place_runs(starts or [self.start])
        for batch in self.batches:
            state = program(state, runner.place(batch))
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
        made = Steps(config, 2)
        for devices in (1, 8):
            subnetworks = 2 if devices == 8 and config.subnetworks.num > 1 else 1
            runner = parallel.Parallel("shard_map", devices, subnetworks)
            results |= numbers(f"{name} {devices}", runner.fetch(made.trained(runner)))
    return results


def recipe():
    """{"lamb DEVICES LEAF": array} with mixed, smoothed, weighted labels, clipped gradients and averages.

    Its sub-networks are a tree of four branches.
    """
    config = configured("cl_ilr", 4)
    config.subnetworks.update(shared_stages=1, limbs=(2,))
    config.optimizer.update(name="lamb", clip_norm=0.01)
    config.ema_decay = 0.9
    mixed = Recipe(CLASSES, tuple(0.1 * k for k in range(CLASSES)), 0.1, 0.8, 1.0)
    made, results = Steps(config, 3, recipe=mixed), {}
    for devices in (1, 8):
        runner = parallel.Parallel("shard_map", devices, 2 if devices == 8 else 1)
        results |= numbers(f"lamb {devices}", runner.fetch(made.trained(runner)))
    return results


def ffl():
    """{"MODE DEVICES LEAF": array} of FFL after four steps."""
    config = digits.get_config("network=tiny")
    made = Steps(config, 4)
    results = {}
    for mode in parallel.MODES:
        for devices in (1, 8):
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
    runner = parallel.Parallel("shard_map", 8, subnetworks=2, seeds=2, num_seeds=2)
    placed = made.trained(runner, [made.start, other])
    branch = jax.tree.leaves(placed[0]["subnetworks"]["branches"])[0]
    assert branch.addressable_shards[0].data.shape[:2] == (1, 1), "each device has one network of one run"
    for name, one in zip(("mesh", "mesh_second"), runner.fetch_runs(placed), strict=True):
        results |= numbers(f"{name} 8", one)
    results |= numbers("second 1", made.trained(parallel.Parallel("shard_map", 1), [other]))
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
            made = Steps(config, 2)
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
    results = {"ffl": ffl, "recipe": recipe, "every_method": every_method, "matrix": matrix}[what]()
    if path:
        np.savez(path[0], **results)
