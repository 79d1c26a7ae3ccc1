"""Knowledge distillation: its loss in numbers, what it moves, and what it shows of its teachers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import draw_variables
from reference import first_state

from configs import cifar10, cifar100, common
from ffl_jax import methods
from ffl_jax.errors import ConfigError
from ffl_jax.methods.base import logged
from ffl_jax.training import steps

LOGITS = np.array([[[1.0, 2, 3], [0, 0, 0]]])
TEACHERS = np.array([[[3.0, 1, 0], [1, -1, 0]], [[2, 0, -1], [1, 1, 0]]])
LABELS = np.array([0, 2])
BATCH, SHAPE = 6, (8, 8, 3)


def configuration(teachers="tiny+tiny_wide", **settings):
    config = common.get_config("method=kd,network=tiny")
    config.teachers.network, config.teachers.num = teachers, len(teachers.split("+"))
    config.method.update(settings)
    return config


def make_method(teachers="tiny+tiny_wide", classes=3, **settings):
    return methods.build(configuration(teachers, **settings), classes)


def objectives(logits, teachers, **settings):
    method = make_method("+".join(["tiny"] * len(teachers)), **settings)
    outputs = {"logits": jnp.float32(logits), "teacher_logits": jnp.float32(teachers)}
    scalars, terms = method.objectives(outputs, jnp.asarray(LABELS), jnp.float32(7.5))
    return scalars, logged(terms)


BLEND = {"variant": "blend", "weight": 0.9, "temperature": 4.0}


# NumPy, float64: CE is 1.753109 throughout; KL, loss, and the loss's gradient by the student's logits.
@pytest.mark.parametrize(
    ("num", "settings", "kl", "loss", "gradient"),
    [
        (1, {}, 1.232566, 2.985675, [[-0.906951, 0.194988, 0.711963], [-0.005995, 0.321311, -0.315316]]),
        (2, {}, 1.129492, 2.882601, [[-0.906951, 0.194988, 0.711963], [0.050160, 0.224920, -0.275080]]),
        (
            2,
            {"weight": 0.5, "temperature": 2.0},
            1.097242,
            2.301730,
            [[-0.676089, 0.160350, 0.515738], [0.107402, 0.196299, -0.303701]],
        ),
        (1, BLEND, 1.241372, 1.292545, [[-0.453647, 0.074768, 0.378879], [-0.137945, 0.158971, -0.021026]]),
        (2, BLEND, 1.135592, 1.197344, [[-0.453647, 0.074768, 0.378879], [-0.087118, 0.068559, 0.018559]]),
    ],
)
def test_loss_and_its_gradient(num, settings, kl, loss, gradient):
    scalars, terms = objectives(LOGITS, TEACHERS[:num], **settings)
    expected = {"cross_entropy/student": 1.753109, "distillation/student": kl}
    chex.assert_trees_all_close(terms, expected, atol=1e-6)
    assert scalars.keys() == {"loss"}
    np.testing.assert_allclose(scalars["loss"], loss, atol=2e-6)
    by_logits, by_teachers = jax.jit(
        jax.grad(lambda z, t: objectives(z, t, **settings)[0]["loss"], argnums=(0, 1))
    )(jnp.float32(LOGITS), jnp.float32(TEACHERS[:num]))
    np.testing.assert_allclose(by_logits[0], gradient, atol=1e-6)
    np.testing.assert_array_equal(by_teachers, 0)


def test_predictions():
    outputs = {"logits": jnp.float32(LOGITS), "teacher_logits": jnp.float32(TEACHERS)}
    predictions = make_method().predictions(outputs)
    assert list(predictions) == ["student", "teacher_0", "teacher_1", "teacher_ensemble"]
    expected = {"student": LOGITS[0], "teacher_0": TEACHERS[0], "teacher_1": TEACHERS[1]}
    # The mean of the logits, not of the probabilities; by hand.
    expected["teacher_ensemble"] = np.array([[2.5, 0.5, -0.5], [1, 0, 0]])
    chex.assert_trees_all_close(predictions, expected, rtol=1e-6)
    one = make_method("tiny")
    alone = one.predictions(outputs | {"teacher_logits": outputs["teacher_logits"][:1]})
    assert list(alone) == ["student", "teacher_0"]  # a mean of one would be that teacher twice
    assert one.headline == "student"
    assert one.network_names() == ("student",)


def draw(method):
    images = jnp.float32(np.random.default_rng(1).normal(size=(BATCH, *SHAPE)))
    return draw_variables(method, images), images


def test_which_gradient_reaches_what():
    """The student's own parameters, each of them, and not one of a teacher's."""
    method = make_method()
    variables, images = draw(method)
    labels = jnp.arange(BATCH) % 3

    @jax.jit
    def gradients(params, term):
        def terms(params):
            outputs, _ = method.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            scalars, terms = method.objectives(outputs, labels, jnp.float32(0))
            return jnp.stack([*logged(terms).values(), scalars["loss"]])[term]

        return jax.grad(terms)(params)

    for term in range(3):
        gradient = gradients(variables["params"], term)
        assert gradient.keys() == {"subnetworks", "teachers"}
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
            assert np.any(leaf) == (path[0].key == "subnetworks"), (term, jax.tree_util.keystr(path))


def test_teachers_are_always_in_evaluation_mode():
    method = make_method()
    variables, images = draw(method)
    expected = method.apply(variables, images, train=False)
    actual, updates = method.apply(variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(actual["teacher_logits"], expected["teacher_logits"])
    assert np.abs(actual["logits"] - expected["logits"]).max() > 1e-3
    chex.assert_trees_all_equal(updates["batch_stats"]["teachers"], variables["batch_stats"]["teachers"])
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(
            updates["batch_stats"]["subnetworks"], variables["batch_stats"]["subnetworks"]
        )
    # Each teacher is the network of its place.
    alone = method.teachers.networks[1].apply(
        {kind: tree["teachers"]["networks_1"] for kind, tree in variables.items()}, images, train=False
    )
    np.testing.assert_allclose(actual["teacher_logits"][1], alone.logits, rtol=1e-6, atol=1e-6)


def test_a_step_of_the_recipe():
    """Against Nesterov's first step in float64: p - lr * 1.9 (g + decay p), and teachers as they were."""
    config = configuration()
    method = methods.build(config, 3)
    variables, images = draw(method)
    params = variables["params"]
    batch = {"image": images, "label": jnp.arange(BATCH) % 3}
    model_state = {"batch_stats": variables["batch_stats"]}
    state, step = first_state(method, config, params, model_state, SHAPE)

    @jax.jit
    def gradient(params):
        def loss(params):
            outputs, _ = method.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return method.objectives(outputs, batch["label"], jnp.float32(0))[0]["loss"]

        return jax.grad(loss)(params)

    after = jax.jit(step)(state, batch)
    chex.assert_trees_all_equal(after.params["teachers"], params["teachers"])
    expected = jax.tree.map(
        lambda p, g: np.float64(p) - 0.1 * 1.9 * (np.float64(g) + 5e-4 * np.float64(p)),
        params["subnetworks"],
        gradient(params)["subnetworks"],
    )
    chex.assert_trees_all_close(after.params["subnetworks"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "hinton"}, r"method\.variant must be one of additive, blend, got 'hinton'"),
        ({"variant": "blend"}, r"share of 1 - weight: .*below 1, .*got 1\.0"),
        ({"variant": "blend", "weight": 1.5}, "got 1.5"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_method(**settings)


def test_more_than_one_student():
    with pytest.raises(ConfigError, match=r"KD takes 1 sub-network\(s\), got 2"):
        methods.build(common.get_config("method=kd,network=resnet8+resnet8"), 3)


@pytest.mark.parametrize("module", [cifar10, cifar100])
def test_published_pair(module):
    """ResNet-110 of bottlenecks teaches ResNet-32 of 10 or 100 classes, by OKDDip's released script."""
    config = module.get_config("method=kd")
    assert (config.teachers.network, config.teachers.num) == ("resnet110_bottleneck", 1)
    assert (config.subnetworks.network, config.subnetworks.num) == ("resnet32", 1)
    assert config.method.to_dict() == {
        "name": "kd",
        "variant": "additive",
        "weight": 1.0,
        "temperature": 3.0,
        "smoothing": 0.0,
    }
    common_recipe = module.get_config("method=independent")
    assert (config.optimizer.weight_decay, config.data.pad_mode) == (5e-4, "zero")
    config.optimizer.weight_decay = common_recipe.optimizer.weight_decay
    assert config.optimizer == common_recipe.optimizer
    # ResNet-32 with projections, 10 and 100 classes: 466906 and 472756 parameters.
    classes = 10 if module is cifar10 else 100
    method = methods.build(config, classes)
    shapes, _ = jax.eval_shape(
        lambda: steps.init_variables(method, jax.random.key(0), image_shape=(32, 32, 3))
    )
    sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in shapes.items()}
    assert sizes["subnetworks"] == {10: 466906, 100: 472756}[classes]
    assert sizes.keys() == {"subnetworks", "teachers"}
    assert common.get_config("method=kd,network=resnet8", "digits").teachers.network == "resnet8"
