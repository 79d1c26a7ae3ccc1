"""FFL against trajectories of an independent PyTorch implementation (see tests/data/README.md)."""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import AS_USERS
from harness import Training

from configs import cifar100
from ffl_jax import methods
from ffl_jax.methods import subnetworks
from ffl_jax.methods.base import KNOWLEDGE, LABELS, Term

DATA = Path(__file__).parent / "data"

# In float64 every number of the reference follows, except that here and there an activation lies so close to
# zero that the reference's float32 rounding put it on the other side of a ReLU. One such activation of a
# million changes a gradient by a percent, so each is set to the reference's side: (step, ReLU in the order of
# the forward pass, index, side). Found as those of |x| < 4e-6 whose side decides whether all that follows
# agrees.
SIDES = {
    "ffl_resnet8_k2": [(1, 6, (4, 4, 6, 62), -1)],  # 2.1e-7 in float64
    "ffl_resnet8_k3": [(0, 11, (1, 2, 6, 98), 1)],  # -9.0e-7 in float64
}
CASES = [("ffl_resnet8_k2", 2, 100), ("ffl_resnet8_k3", 3, 10)]


def load(name):
    return {**np.load(DATA / f"{name}_init.npz"), **np.load(DATA / f"{name}_steps.npz")}


def part(arrays, prefix):
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def path_of(name):
    """A PyTorch name -> (path in our parameters or statistics, branch or None, whether a statistic)."""
    group, name = name.split("/")
    *module, leaf = name.split(".")
    leaf = {"running_mean": "mean", "running_var": "var"}.get(leaf, leaf)
    branch = None
    if group == "fusion":
        names = {"conv1": "depthwise_conv", "bn1": "depthwise_norm", "conv1_1": "pointwise_conv"}
        path = ("fusion", (names | {"bn1_1": "pointwise_norm", "fc2": "head"})[module[0]])
    elif module[0] in ("conv1", "bn1"):
        path = ("subnetworks", "trunk", {"conv1": "stem_conv", "bn1": "stem_norm"}[module[0]])
    elif module[0].startswith("classfier3_"):
        branch, path = int(module[0][11:]) - 1, ("subnetworks", "branches", "head")
    else:
        stage, _, number = module[0].removeprefix("layer").partition("_")
        branch = int(number) - 1 if number else None
        names = {
            "bn1": "norm1",
            "bn2": "norm2",
            "downsample.0": "shortcut_conv",
            "downsample.1": "shortcut_norm",
        }
        inner = ".".join(module[2:])
        block = f"stage{stage}_block{int(module[1]) + 1}"
        where = "trunk" if branch is None else "branches"
        path = ("subnetworks", where, block, names.get(inner, inner))
    statistic = leaf in ("mean", "var")
    if leaf == "weight":
        leaf = "scale" if "norm" in path[-1] else "kernel"
    return (*path, leaf), branch, statistic


def to_flax(value):
    return value.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim])


def to_pytorch(value):
    return value.transpose({4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim])


def import_state(state, num):
    """(params, batch statistics) from PyTorch state dicts, branches stacked."""
    trees, stacks = ({}, {}), {}
    for name, value in state.items():
        path, branch, statistic = path_of(name)
        value = to_flax(value.astype(np.float64))
        if branch is not None:
            stacks.setdefault((path, statistic), [None] * num)[branch] = value
            value = np.stack([x for x in stacks[path, statistic] if x is not None])
        tree = trees[statistic]
        for key in path[:-1]:
            tree = tree.setdefault(key, {})
        tree[path[-1]] = value
    return trees


def pick(tree, name):
    """The array of `tree` that PyTorch calls `name`, in PyTorch's layout."""
    path, branch, _ = path_of(name)
    value = functools.reduce(lambda node, key: node[key], path, tree)
    return to_pytorch(np.asarray(value if branch is None else value[branch]))


def sketch_difference(actual, expected):
    """Estimate of norm(actual - tensor) / norm(tensor) from the tensor's stored sketch."""
    actual = np.asarray(actual, np.float64).ravel()
    signs = np.random.default_rng(actual.size).choice([-1.0, 1.0], (64, actual.size))
    return np.sqrt(np.mean((signs @ actual - expected[:-1]) ** 2)) / expected[-1]


def relative(actual, expected):
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected)


class Sides:
    """`nn.relu` that first puts chosen activations of a step on the given side of zero, gradients included.

    `step` may be traced, so that one program serves all steps.
    """

    def __init__(self, sides, step):
        self.sides, self.step, self.calls = sides, step, 0

    def __call__(self, x):
        for at, call, index, side in self.sides:
            if call == self.calls:
                distance = jax.lax.stop_gradient(side * 1e-9 - x[index])
                moved = jnp.where(jnp.abs(distance) < 4e-6, distance, jnp.nan)
                x = x.at[index].add(jnp.where(self.step == at, moved, 0))
        self.calls += 1
        return jax.nn.relu(x)


def make_method(num, classes, vectorize=False):
    return methods.METHODS["ffl"](subnetworks.build("resnet8", num, classes, 2, vectorize), classes)


def make_training(method, params, statistics):
    config = cifar100.get_config()
    config.optimizer.schedule = "constant"
    return Training(method, config, (32, 32, 3), variables=(params, {"batch_stats": statistics}))


def loss_and_gradient(method, params, statistics, inputs):
    images = jnp.asarray(inputs["images"].transpose(0, 2, 3, 1), jax.tree.leaves(params)[0].dtype)

    def loss(params):
        outputs, updates = method.apply(
            {"params": params, "batch_stats": statistics}, images, train=True, mutable=["batch_stats"]
        )
        # Epoch 80 holds the ramp at 1; the recorded weights are arbitrary, so they are applied here.
        _, terms = method.objectives(outputs, inputs["labels"].astype(np.int32), jnp.float32(80))
        terms = [term for term in terms.values() if isinstance(term, Term)]
        ce = sum(term.value for term in terms if term.kind == LABELS)
        kd = sum(term.value for term in terms if term.kind == KNOWLEDGE)
        return ce + inputs["ramp"] * kd, (ce, kd, outputs, updates["batch_stats"])

    return jax.value_and_grad(loss, has_aux=True)(params)


def check_step(value, ce, kd, outputs, inputs):
    np.testing.assert_allclose(value, inputs["loss"], rtol=1e-5)
    np.testing.assert_allclose(ce, inputs["ce"], rtol=1e-5)
    assert relative(outputs["logits"], inputs["logits"]) < 1e-5
    assert relative(outputs["fused_logits"], inputs["fused"]) < 1e-5
    # A KL is a small difference of logarithms near log(C), which float32 rounds by eps; the recorded sum too.
    resolution = np.finfo(np.float32).eps * 9 * np.log(inputs["fused"].shape[-1])
    np.testing.assert_allclose(kd, kl_sum_float64(inputs), rtol=1e-6, atol=resolution)
    np.testing.assert_allclose(inputs["mkd"], kl_sum_float64(inputs), rtol=1e-6, atol=resolution)


def check_gradients(gradients, arrays):
    for key, expected in part(arrays, "grad0/").items():
        assert sketch_difference(pick(gradients, key), expected) < 1e-4, key


def kl_sum_float64(inputs):
    def log_softmax(z):
        z = z.astype(np.float64) / 3
        return (
            z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
        )

    def kl(learner, teacher):
        q = np.exp(log_softmax(teacher)) + 1e-7
        return 9 * (q * (np.log(q) - log_softmax(learner))).sum(-1).mean()

    logits, fused = inputs["logits"].astype(np.float64), inputs["fused"]
    return sum(kl(z, fused) for z in logits) + kl(fused, logits.mean(0))


@pytest.mark.parametrize(("name", "num", "classes"), CASES)
def test_trajectory(name, num, classes, monkeypatch):
    """Three steps: losses, logits, every gradient, every final parameter, evaluation."""
    arrays = load(name)
    with jax.enable_x64(True):
        method = make_method(num, classes)
        params, statistics = jax.tree.map(jnp.asarray, import_state(part(arrays, "init/"), num))
        made = make_training(method, params, statistics)
        optimizer, opt_state = made.optimizers["loss"], made.state.opt_state["loss"]

        @jax.jit
        def program(params, statistics, inputs, step):
            with monkeypatch.context() as patch:
                patch.setattr(nn, "relu", Sides(SIDES[name], step))
                return loss_and_gradient(method, params, statistics, inputs)

        for step in range(3):
            inputs = part(arrays, f"step{step}/")
            (value, (ce, kd, outputs, statistics)), gradients = program(params, statistics, inputs, step)
            check_step(value, ce, kd, outputs, inputs)
            if step == 0:
                check_gradients(gradients, arrays)
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            params = optax.apply_updates(params, updates)

        final = part(arrays, "final/")
        for key, expected in final.items():
            if not path_of(key)[2]:
                assert sketch_difference(pick(params, key), expected) < 1e-5, key
        statistics = check_statistics(statistics, final)
        images = inputs["images"].transpose(0, 2, 3, 1)
        apply = jax.jit(functools.partial(method.apply, train=False))
        outputs = apply({"params": params, "batch_stats": statistics}, images)
        assert relative(outputs["logits"], arrays["eval/logits"]) < 1e-4
        assert relative(outputs["fused_logits"], arrays["eval/fused"]) < 1e-4


def check_statistics(ours, final):
    """Compares running means, and variances after turning ours into PyTorch's; returns ours, so turned.

    Ours average the biased variance v of M numbers, PyTorch's M / (M - 1) v. After three steps at momentum
    0.9 the initial variance of 1 has the weight 0.9**3 in both, the rest of the sum the factor M / (M - 1).
    """
    size = {"stem": 32, "stage1": 32, "stage2": 16, "stage3": 8, "depthwise": 8, "pointwise": 8}

    def convert(path, value):
        names = [key.key for key in path]
        if names[-1] == "mean":
            return value
        layer = next(name for name in names[1:] if name.split("_")[0] in size)
        count = 8 * size[layer.split("_")[0]] ** 2
        return 0.9**3 + (value - 0.9**3) * count / (count - 1)

    converted = jax.tree_util.tree_map_with_path(convert, ours)
    for key, expected in final.items():
        if path_of(key)[2]:
            assert relative(pick(converted, key), expected) < 1e-5, key
    return converted


@pytest.mark.parametrize("vectorize", [False, True])
def test_first_step_in_float32(vectorize):
    """What a run computes: float32, looped, with a user's options, or vmapped, as on accelerators.

    Of K = 2, since K = 3 hangs on one ReLU, see above.
    """
    name, num, classes = CASES[0]
    arrays = load(name)
    method = make_method(num, classes, vectorize)
    state = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), import_state(part(arrays, "init/"), num))
    inputs = part(arrays, "step0/")
    options = None if vectorize else AS_USERS
    step = jax.jit(functools.partial(loss_and_gradient, method), compiler_options=options)
    (value, (ce, kd, outputs, _)), gradients = step(*state, inputs)
    check_step(value, ce, kd, outputs, inputs)
    check_gradients(gradients, arrays)
