"""CL-ILR: its terms, its rescaled gradient and a whole step, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from ffl_jax.errors import ConfigError
from ffl_jax.methods import METHODS
from ffl_jax.methods.subnetworks import build


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def gradient_by_logits(logits, temperature, ce_weight, kd_weight):
    """(the terms of each head, the loss, its gradient)."""
    gradient, terms, loss = np.empty_like(logits), [], 0.0
    for k in range(len(logits)):
        target = np.mean([z for other, z in enumerate(logits) if other != k], axis=0)
        ce, by_ce = reference.cross_entropy_slope(logits[k])
        kd, by_kd, _ = reference.kl_divergence_slopes(logits[k], target, temperature)
        gradient[k] = ce_weight * by_ce + kd_weight * by_kd
        terms.append((ce, kd))
        loss += ce_weight * ce + kd_weight * kd
    return terms, loss, gradient


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize(
    ("settings", "ramp"),
    [
        ({}, 1.0),
        (
            {
                "temperature": 3.0,
                "cross_entropy_weight": 1.0,
                "distillation_weight": 1.0,
                "rampup_epochs": 80.0,
            },
            reference.RAMP,
        ),
    ],
)
def test_loss_and_gradient(num, settings, ramp):
    logits = reference.draw_logits(num)
    method = METHODS["cl_ilr"](build("tiny", num, 3, 2), 3, **settings)
    loss, terms, gradients = reference.loss_and_gradients(method, {"logits": logits})
    temperature, ce_weight, kd_weight = (3.0, 1.0, 1.0) if settings else (2.0, 0.5, 0.5)
    expected_terms, expected, gradient = gradient_by_logits(logits, temperature, ce_weight, ramp * kd_weight)
    for k, (ce, kd) in enumerate(expected_terms):
        np.testing.assert_allclose(terms[f"cross_entropy/sub_{k}"], ce, rtol=1e-10)
        np.testing.assert_allclose(terms[f"distillation/sub_{k}"], kd, rtol=1e-10)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)  # the ramp is float32
    np.testing.assert_allclose(gradients["logits"], gradient, rtol=1e-6, atol=1e-9)


@pytest.fixture(scope="module")
def step():
    return reference.Step("method=cl_ilr,network=tiny", 3)


def test_no_term_reaches_another_head_and_all_reach_the_trunk(step):
    gradients = step.term_gradients()
    for k in range(3):
        gradient = gradients[f"distillation/sub_{k}"]
        assert reference.largest(gradient["subnetworks"]["trunk"]) > 0
        for other in range(3):
            assert (reference.largest(reference.branch(gradient, other)) > 0) == (other == k)


def moved_by(step):
    """The gradient by the parameters of `Step.method`, as if nothing were rescaled."""
    logits = np.asarray(step.outputs["logits"])
    _, _, by_logits = gradient_by_logits(logits, 2.0, 0.5, 0.5)
    plain = METHODS["independent"](step.method.subnetworks, 3)  # the same networks without the rescaling

    def forward(params):
        variables = {"params": params, **step._state}
        outputs, _ = plain.apply(variables, step.batch["image"], train=True, mutable=["batch_stats"])
        return outputs["logits"]

    _, pullback = jax.vjp(jax.jit(forward), step.params)
    return pullback(by_logits)[0]["subnetworks"]


def test_a_step(step):
    """The trunk moves by a third of what its three heads send; they are not rescaled themselves."""
    own = moved_by(step)
    rescaled = {"trunk": jax.tree.map(lambda x: x / 3, own["trunk"]), "branches": own["branches"]}
    step.check_sgd({"subnetworks": rescaled}, nesterov=True)


def test_a_step_of_a_tree():
    """As in MCL-OKD: what two heads send to a limb is halved, and what two limbs send to the trunk again."""
    step = reference.Step("method=cl_ilr,network=tiny", 4, subnetworks={"shared_stages": 1, "limbs": (2,)})
    own = moved_by(step)
    assert own.keys() == {"trunk", "limbs_1", "branches"}
    ways = {"trunk": 4, "limbs_1": 2, "branches": 1}
    rescaled = {part: jax.tree.map(lambda x, n=ways[part]: x / n, tree) for part, tree in own.items()}
    step.check_sgd({"subnetworks": rescaled}, nesterov=True)


@pytest.mark.parametrize(("settings", "count"), [({}, 1_553_248), ({"limbs": (2,)}, 1_642_016)])
def test_parameters_of_both_forms(settings, count):
    """ResNet-32 for 100 classes: OKDDip's heads on one trunk, and MCL-OKD's tree, counted in their codes."""
    networks = build("resnet32", 4, 100, 1 if settings else 2, **settings)
    init = functools.partial(networks.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


def test_recipe():
    config = reference.common.get_config("method=cl_ilr", "cifar100")
    assert (config.subnetworks.num, config.subnetworks.shared_stages) == (4, 2)
    assert (config.optimizer.weight_decay, config.optimizer.schedule) == (5e-4, "cosine")


def make_method(num=3, network="tiny", shared_stages=2, limbs=(), **settings):
    return METHODS["cl_ilr"](build(network, num, 3, shared_stages, limbs=limbs), 3, **settings)


@pytest.mark.parametrize(
    ("epoch", "rampup_epochs", "weight"),  # exp(-5 (1 - e / 80)^2) / 2, NumPy in float64
    [(0.9, 80.0, 0.003369), (40.9, 80.0, 0.143252), (80.0, 80.0, 0.5), (0.0, 0.0, 0.5)],
)
def test_weight_is_constant_within_an_epoch(epoch, rampup_epochs, weight):
    method = make_method(rampup_epochs=rampup_epochs)
    _, terms = method.objectives({"logits": jnp.zeros((3, 2, 3))}, jnp.array([0, 2]), jnp.float32(epoch))
    np.testing.assert_allclose(terms["distillation_weight"], weight, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"shared_stages": 0},
            r"CLILR needs a shared trunk: its heads rescale .*\.shared_stages to 1 or more",
        ),
        (
            {"network": "tiny+tiny_wide", "num": 2, "shared_stages": 0},
            r"CLILR does not mix different networks",
        ),
        ({"limbs": (2,)}, r"limbs=\(2,\): each must .* divide subnetworks\.num=3"),
        ({"num": 4, "limbs": (4, 2)}, r"each must be a whole number that divides the next one"),
        ({"num": 4, "limbs": ("a",)}, r"limbs=\('a',\): each must be a whole number"),
        ({"num": 4, "limbs": (2,)}, r"with shared_stages=2: set subnetworks\.shared_stages to 1\."),
        (
            {"num": 4, "limbs": (2,), "network": "resnet18", "shared_stages": 3},
            r"with shared_stages=3: set subnetworks\.shared_stages to 1\.\.2\.",
        ),
        ({"num": 4, "limbs": (2, 2)}, r"with shared_stages=2: name fewer limbs"),
        ({"num": 1}, r"CLILR takes at least 2 sub-network\(s\), got 1"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_method(**settings).check()
