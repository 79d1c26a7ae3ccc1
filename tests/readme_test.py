"""The README's example of a method is a method: it registers, its gradients are right, it trains a step."""

import re

import conftest
import jax
import jax.numpy as jnp
import numpy as np

from configs import digits
from ffl_jax import methods, optimizers, steps

SHAPE = (8, 8, 3)


def test_example_of_a_method():
    (block,) = re.findall(r"```python\n(.*?)```", (conftest.ROOT / "README.md").read_text(), re.S)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    try:
        config = digits.get_config("method=mutual")
        method = methods.build(config, 10)
        made = optimizers.make_optimizers(
            method.trains,
            jax.eval_shape(lambda: steps.init_variables(method, jax.random.key(0), SHAPE))[0],
            config.optimizer,
            config.optimizer_rules,
            steps_per_epoch=1,
            epochs=1,
        )
        state = steps.create_state(method, made, jax.random.key(0), SHAPE)
        batch = {"image": jax.random.normal(jax.random.key(1), (8, *SHAPE)), "label": jnp.arange(8)}
        new = jax.jit(
            lambda state: steps.train_step(state, batch, method=method, optimizers=made, steps_per_epoch=1)
        )(state)
        assert np.isfinite(float(new.record["terms"]["loss"]))
        # By hand, for the distributions (1/2, 1/2) and (1/4, 3/4).
        logits = jnp.log(jnp.array([[[0.5, 0.5]], [[0.25, 0.75]]]))
        _, terms = method.objectives({"logits": logits}, jnp.array([0]), jnp.float32(0))
        forth = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
        back = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
        np.testing.assert_allclose(terms["distillation"], forth + back, rtol=1e-5)
        np.testing.assert_allclose(terms["cross_entropy"], np.log(2) + np.log(4), rtol=1e-6)
    finally:
        methods.METHODS.pop("mutual")
