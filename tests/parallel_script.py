"""Run by parallel_test.py with 8 devices: trains on some of them in both modes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from configs import digits
from ffl_jax import methods, optimizers, parallel, steps

IMAGE_SHAPE = (8, 8, 3)


def in_float64(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree)


def main(path):
    jax.config.update("jax_enable_x64", True)
    config = digits.get_config("network=resnet8")
    method = methods.build(config, 10)
    key = jax.random.key(0)
    params, _ = jax.eval_shape(lambda: steps.init_variables(method, key, IMAGE_SHAPE))
    made = optimizers.make_optimizers(
        method.trains, params, config.optimizer, config.optimizer_rules, steps_per_epoch=2, epochs=20
    )
    start = in_float64(jax.jit(lambda: steps.create_state(method, made, key, IMAGE_SHAPE))())
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
    np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1])
