"""FEED: the distance of maps, translators and paraphrasers in numbers, and what each objective moves."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import draw_variables
from reference import first_state

from configs import cifar10, cifar100, common
from ffl_jax import methods
from ffl_jax.errors import ConfigError
from ffl_jax.methods.base import logged
from ffl_jax.methods.feed import Paraphraser, Translator, feature_distance
from ffl_jax.training import steps

BATCH, SHAPE = 6, (8, 8, 3)


def configuration(teachers="tiny+tiny_wide", **settings):
    config = common.get_config("method=feed,network=tiny")
    config.teachers.network, config.teachers.num = teachers, len(teachers.split("+"))
    config.method.update(settings)
    return config


def make_method(teachers="tiny+tiny_wide", classes=3, **settings):
    return methods.build(configuration(teachers, **settings), classes)


def as_map(*values):
    """A map of one pixel for a batch of one."""
    return jnp.array(values, jnp.float32)[None, None, None]


def objectives(translated, targets, logits=((2.0, 1, 0), (0, 0.5, 1.5)), labels=(0, 2), **settings):
    method = make_method("+".join(["tiny"] * len(targets)), **settings)
    logits = jnp.float32(logits)[None]
    outputs = {
        "logits": logits,
        "teacher_logits": jnp.concatenate([logits] * len(targets)),
        "teacher_maps": tuple(targets),
        "translated": tuple(translated),
        "targets": tuple(targets),
    }
    scalars, terms = method.objectives(outputs, jnp.asarray(labels), jnp.float32(3))
    return scalars, logged(terms)


# -- the distance --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(  # by hand: (3, 4) becomes (0.6, 0.8)
    ("x", "target", "expected"),
    [((1, 0), (3, 4), 1.2), ((4, 3), (3, 4), 0.4), ((4, 3), (0, 5), 1.2), ((3, 4), (3, 4), 0.0)],
)
def test_distance(x, target, expected):
    distances = [feature_distance(as_map(*x), as_map(*target), how) for how in ("sum", "mean")]
    np.testing.assert_allclose(distances, [[expected], [expected / 2]], atol=1e-6)


def test_loss_of_two_teachers():
    """Terms 0.2 and 0.6 of a mean over two elements, times 500; and the cross-entropy, NumPy in float64."""
    scalars, terms = objectives([as_map(4, 3)] * 2, [as_map(3, 4), as_map(0, 5)])
    expected = {
        "cross_entropy/student": 0.435987,
        "distillation/teacher_0": 100.0,
        "distillation/teacher_1": 300.0,
    }
    chex.assert_trees_all_close(terms, expected, rtol=1e-5)
    assert scalars.keys() == {"loss"}
    np.testing.assert_allclose(scalars["loss"], 400.435987, rtol=1e-6)
    scalars, _ = objectives([as_map(4, 3)] * 2, [as_map(3, 4), as_map(0, 5)], weight=0.5, reduction="sum")
    np.testing.assert_allclose(scalars["loss"], 0.5 * 1.6 + 0.435987, rtol=1e-6)


def test_distance_is_taken_for_each_example():
    """Of two examples, whose mean it is not the distance of: 1.2 and 0 (by hand)."""
    x, target = jnp.concatenate([as_map(1, 0), as_map(6, 8)]), jnp.concatenate([as_map(3, 4)] * 2)
    np.testing.assert_allclose(feature_distance(x, target, "sum"), [1.2, 0.0], atol=1e-6)
    _, terms = objectives([x], [target])
    np.testing.assert_allclose(terms["distillation/teacher_0"], 500 * 0.3, rtol=1e-5)


@pytest.mark.parametrize("target", [(3, 4), (0, 5)])
def test_gradient_of_the_distance(target):
    """(g - u (u . g)) / |v| with u = phi(v), g = sign(u - phi(target)): by hand, the same for both."""
    gradient = jax.grad(lambda x: feature_distance(x, as_map(*target), "sum")[0])(as_map(4, 3))
    np.testing.assert_allclose(gradient.ravel(), [0.168, -0.224], atol=1e-6)
    by_target = jax.grad(lambda t: objectives([as_map(4, 3)], [t])[0]["loss"])(as_map(*target))
    np.testing.assert_array_equal(by_target, 0)  # a teacher is a constant


def test_distance_does_not_see_the_scale():
    rng = np.random.default_rng(0)
    x, target = rng.uniform(size=(2, 2, 4, 4, 5))

    @jax.jit
    def evaluate(x, target):
        distance, pullback = jax.vjp(lambda x: feature_distance(x, target, "sum"), x)
        return distance, pullback(jnp.ones_like(distance))[0]

    with jax.enable_x64(True):
        distance, gradient = jax.device_get(evaluate(x, target))
        scaled = [
            (*jax.device_get(evaluate(factor * x, other * target)), factor)
            for factor, other in ((1, 7), (7, 1))
        ]
    assert (distance > 0.1).all()
    assert (distance <= np.sqrt(2 * 80)).all()  # of maps without negative values
    for same, by_scaled, factor in scaled:
        np.testing.assert_allclose(same, distance, rtol=1e-12)
        np.testing.assert_allclose(by_scaled * factor, gradient, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(np.einsum("bhwd,bhwd->b", gradient, x), 0, atol=1e-13)


@pytest.mark.parametrize("zero", ["map", "target", "both"])
def test_maps_without_a_direction(zero):
    """phi of all zeros is all zeros, and no gradient is lost to a NaN."""
    x = as_map(0, 0) if zero != "target" else as_map(4, 3)
    target = as_map(0, 0) if zero != "map" else as_map(3, 4)
    distance, gradient = jax.value_and_grad(lambda x: feature_distance(x, target, "sum")[0])(x)
    # By hand: 0.6 + 0.8, in whichever it remains.
    np.testing.assert_allclose(distance, {"map": 1.4, "target": 1.4, "both": 0.0}[zero], atol=1e-6)
    assert np.isfinite(gradient).all()
    # The norm's floor: 3e-13 in one element is 0.3 of it.
    np.testing.assert_allclose(feature_distance(as_map(3e-13, 0), as_map(0, 0), "sum"), [0.3], rtol=1e-5)


def test_scale_of_the_loss():
    """Random maps of 8x8x64: 5.17 for half-normal, 6.23 for rectified normal ones, within 1 %; in float64."""
    rng = np.random.default_rng(0)
    x, target = jnp.float32(rng.normal(size=(2, 16, 8, 8, 64)))
    for function, expected in ((jnp.abs, 5.17), (jax.nn.relu, 6.23)):
        distance = feature_distance(function(x), function(target)).mean()
        np.testing.assert_allclose(500 * distance, expected, rtol=0.01)


def test_larger_map_is_pooled_to_the_smaller():
    rng = np.random.default_rng(0)
    large, small = rng.uniform(size=(2, 4, 6, 5)), rng.uniform(size=(2, 2, 3, 5))
    pooled = large.reshape(2, 2, 2, 3, 2, 5).mean(axis=(2, 4))

    def unit(x):
        return x / np.sqrt((x**2).sum(axis=(1, 2, 3), keepdims=True))

    expected = np.abs(unit(pooled) - unit(small)).mean(axis=(1, 2, 3))
    large, small = jnp.float32(large), jnp.float32(small)
    np.testing.assert_allclose(feature_distance(large, small), expected, rtol=1e-5)
    np.testing.assert_allclose(feature_distance(small, large), expected, rtol=1e-5)


def test_half_precision_is_left_behind():
    distance = feature_distance(jnp.ones((1, 8, 8, 64), jnp.bfloat16), jnp.ones((1, 8, 8, 64), jnp.bfloat16))
    assert distance.dtype == jnp.float32
    # 4096 squares add up to 4096 in float32; in bfloat16 the sum would stop at 256.
    ones, twos = jnp.ones((1, 8, 8, 64), jnp.bfloat16), jnp.arange(4096).reshape(1, 8, 8, 64) % 2
    expected = np.abs(1 / 64 - np.arange(4096) % 2 / np.sqrt(2048)).mean()  # NumPy, float64
    np.testing.assert_allclose(feature_distance(ones, twos.astype(jnp.bfloat16)), [expected], rtol=1e-5)


# -- the modules ---------------------------------------------------------------------------------------------


def test_translator():
    """One channel; kernels of 1/9 (the last -1/9), biases 0.1, -0.2, 0.05. NumPy, float64."""
    x = jnp.arange(9, dtype=jnp.float32).reshape(1, 3, 3, 1) - 2
    params = {
        f"conv{i + 1}": {"kernel": jnp.full((3, 3, 1, 1), kernel), "bias": jnp.array([bias])}
        for i, (kernel, bias) in enumerate(((1 / 9, 0.1), (1 / 9, -0.2), (-1 / 9, 0.05)))
    }
    actual = Translator().apply({"params": params}, x, 1)
    expected = [
        [-0.022119, -0.034959, -0.025412],
        [-0.039623, -0.060336, -0.044287],
        [-0.031996, -0.048951, -0.035288],
    ]
    np.testing.assert_allclose(actual[0, :, :, 0], expected, atol=1e-6)
    target = jnp.array([[0.0, 1, 0], [2, 0, 0], [0, 0, 1]]).reshape(1, 3, 3, 1)
    np.testing.assert_allclose(feature_distance(actual, target, "sum"), [4.511741], atol=1e-5)
    np.testing.assert_allclose(feature_distance(actual, target), [0.501305], atol=1e-6)


def test_identity_translator():
    identity = jnp.zeros((3, 3, 2, 2)).at[1, 1].set(jnp.eye(2))
    params = {f"conv{i}": {"kernel": identity, "bias": jnp.zeros(2)} for i in (1, 2, 3)}
    x = jnp.float32(np.random.default_rng(0).uniform(size=(2, 3, 3, 2)))
    actual = Translator().apply({"params": params}, x, 2)
    np.testing.assert_array_equal(actual, x)
    np.testing.assert_array_equal(feature_distance(actual, x), 0)


@pytest.mark.parametrize(  # 9 a^2 + a + 9 a b + b + 9 b^2 + b, by hand
    ("width", "features", "expected"),
    [(64, 64, 110784), (64, 128, 258368), (128, 128, 442752), (512, 512, 7079424), (64, 32, 64640)],
)
def test_parameters_of_a_translator(width, features, expected):
    shapes = jax.eval_shape(
        lambda: Translator().init(jax.random.key(0), jnp.zeros((1, 8, 8, width)), features)
    )
    assert sum(x.size for x in jax.tree.leaves(shapes)) == expected


@pytest.mark.parametrize(  # with one half of the channels, by hand
    ("width", "encoder", "total"), [(64, 64640, 129312), (512, 4129792, 8259840)]
)
def test_parameters_of_a_paraphraser(width, encoder, total):
    outputs, shapes = jax.eval_shape(
        lambda: Paraphraser().init_with_output(jax.random.key(0), jnp.zeros((1, 8, 8, width)))
    )
    sizes = {name: sum(x.size for x in layer.values()) for name, layer in shapes["params"].items()}
    assert sum(sizes.values()) == total
    assert sum(size for name, size in sizes.items() if name.startswith("encoder")) == encoder
    assert [x.shape for x in outputs] == [(1, 8, 8, width // 2), (1, 8, 8, width)]


def test_initial_layers():
    """Kernels and biases uniform in +-1 / sqrt(9 * 16) = +-1/12: standard deviation 1 / (12 sqrt(3))."""
    params = jax.jit(lambda: Translator().init(jax.random.key(0), jnp.zeros((1, 4, 4, 16)), 16))()["params"]
    for layer in params.values():
        for x in layer.values():
            assert np.abs(x).max() <= 1 / 12
            assert np.abs(x).max() > 0.8 / 12
        np.testing.assert_allclose(layer["kernel"].std(), 1 / 12 / np.sqrt(3), rtol=0.05)


# -- the whole -----------------------------------------------------------------------------------------------


def draw(method):
    images = jnp.float32(np.random.default_rng(1).normal(size=(BATCH, *SHAPE)))
    variables = draw_variables(method, images)
    return variables["params"], variables["batch_stats"], images


def loss_and_terms(method, params, statistics, images):
    outputs, _ = method.apply(
        {"params": params, "batch_stats": statistics}, images, train=True, mutable=["batch_stats"]
    )
    scalars, terms = method.objectives(outputs, jnp.arange(BATCH) % 3, jnp.float32(0))
    return scalars, logged(terms)


def term_gradients(method, params, statistics, images):
    """{term: gradient} of all terms and objectives."""

    def terms(params):
        scalars, terms = loss_and_terms(method, params, statistics, images)
        return scalars | terms

    return reference.term_gradients(terms, params)


def part_of(path):
    """The part of the method that a parameter belongs to; the student's classifier is one of its own."""
    names = [key.key for key in path]
    return "head" if names[0] == "subnetworks" and "head" in names else names[0]


@pytest.mark.parametrize("target", ["map", "factor"])
def test_which_gradient_reaches_what(target):
    """Every translator learns from its own teacher alone, and no teacher and no other objective from it."""
    method = make_method(target=target)
    parts = {"head", "subnetworks", "teachers", "translators_0", "translators_1"}
    reached = {
        "cross_entropy/student": {"subnetworks", "head"},
        "distillation/teacher_0": {"subnetworks", "translators_0"},
        "distillation/teacher_1": {"subnetworks", "translators_1"},
        "loss": {"subnetworks", "head", "translators_0", "translators_1"},
    }
    assert set(method.trains) == {"loss"} | ({"paraphraser"} if target == "factor" else set())
    if target == "factor":
        parts |= {"paraphrasers_0", "paraphrasers_1"}
        reached |= {f"reconstruction/teacher_{i}": {f"paraphrasers_{i}"} for i in range(2)}
        reached["paraphraser"] = {"paraphrasers_0", "paraphrasers_1"}
    gradients = term_gradients(method, *draw(method))
    assert gradients.keys() == reached.keys()
    for term, gradient in gradients.items():
        found = set()
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
            part = part_of(path)
            found.add(part)
            assert np.any(leaf) == (part in reached[term]), f"{term} -> {jax.tree_util.keystr(path)}"
        assert found == parts


def test_terms_of_a_pass():
    """From the modules' own outputs, in float64 with NumPy: the right maps meet, whatever their sizes."""
    method = make_method()  # tiny ends at 2x2x16, tiny_wide at 4x4x24
    params, statistics, images = draw(method)
    variables = {"params": params, "batch_stats": statistics}

    def map_of(network, *path):
        own = variables
        for key in path:
            own = {kind: tree[key] for kind, tree in own.items()}
        own = jax.tree.map(lambda x: x[0], own) if path[0] == "subnetworks" else own
        return np.float64(jax.jit(functools.partial(network.apply, train=False))(own, images).feature_map)

    student = map_of(method.subnetworks.network, "subnetworks", "branches")
    assert student.shape == (BATCH, 2, 2, 16)
    outputs = jax.jit(functools.partial(method.apply, train=False))(variables, images)
    _, terms = method.objectives(outputs, jnp.arange(BATCH) % 3, jnp.float32(0))
    for i in range(2):
        target = map_of(method.teachers.networks[i], "teachers", f"networks_{i}")
        if i == 1:
            assert target.shape == (BATCH, 4, 4, 24)
            target = target.reshape(BATCH, 2, 2, 2, 2, 24).mean(axis=(2, 4))
        x = np.float64(
            Translator().apply({"params": params[f"translators_{i}"]}, jnp.float32(student), target.shape[-1])
        )
        unit = [y / np.sqrt((y**2).sum(axis=(1, 2, 3), keepdims=True)) for y in (x, target)]
        expected = 500 * np.abs(unit[0] - unit[1]).mean()
        np.testing.assert_allclose(terms[f"distillation/teacher_{i}"].value, expected, rtol=1e-4)


def test_factors_take_the_place_of_maps():
    method = make_method("tiny", target="factor")
    params, statistics, images = draw(method)
    variables = {"params": params, "batch_stats": statistics}
    outputs = jax.jit(functools.partial(method.apply, train=False))(variables, images)
    factor, reconstruction = Paraphraser().apply(
        {"params": params["paraphrasers_0"]}, outputs["teacher_maps"][0]
    )
    assert factor.shape == outputs["translated"][0].shape == (BATCH, 2, 2, 8)
    error = np.float64(reconstruction) - np.float64(outputs["teacher_maps"][0])
    for how, expected in (("l1", np.abs(error).mean()), ("l2", (error**2).mean())):  # NumPy, float64
        one = make_method("tiny", target="factor", reconstruction=how)
        scalars, terms = one.objectives(outputs, jnp.arange(BATCH) % 3, jnp.float32(0))
        np.testing.assert_allclose(scalars["paraphraser"], expected, rtol=1e-5)
        np.testing.assert_allclose(terms["reconstruction/teacher_0"].value, expected, rtol=1e-5)
        distance = 500 * feature_distance(outputs["translated"][0], factor).mean()
        np.testing.assert_allclose(terms["distillation/teacher_0"].value, distance, rtol=1e-5)


def test_teachers_change_places_with_their_translators():
    method, swapped = make_method("tiny+tiny_wide"), make_method("tiny_wide+tiny")
    params, statistics, images = draw(method)

    def swap(tree):
        teachers = {f"networks_{i}": tree["teachers"][f"networks_{1 - i}"] for i in range(2)}
        translators = {f"translators_{i}": tree.get(f"translators_{1 - i}") for i in range(2)}
        return {**tree, **(translators if "translators_0" in tree else {}), "teachers": teachers}

    scalars, terms = loss_and_terms(method, params, statistics, images)
    other, other_terms = loss_and_terms(swapped, swap(params), swap(statistics), images)
    np.testing.assert_allclose(other["loss"], scalars["loss"], rtol=1e-6)
    for i in range(2):
        np.testing.assert_array_equal(
            other_terms[f"distillation/teacher_{1 - i}"], terms[f"distillation/teacher_{i}"]
        )
    assert abs(terms["distillation/teacher_0"] / terms["distillation/teacher_1"] - 1) > 1e-2


def test_shared_translator():
    method = make_method("tiny+tiny", shared_translator=True)
    params, statistics, images = draw(method)
    assert [name for name in params if name.startswith("translators")] == ["translators_0"]
    # With the same translator twice, separate ones say the same.
    separate = make_method("tiny+tiny")
    scalars, terms = loss_and_terms(method, params, statistics, images)
    other, _ = loss_and_terms(
        separate, {**params, "translators_1": params["translators_0"]}, statistics, images
    )
    np.testing.assert_array_equal(scalars["loss"], other["loss"])
    assert terms["distillation/teacher_0"] != terms["distillation/teacher_1"]
    with pytest.raises(ConfigError, match=r"shared_translator needs .*equally wide.* \[16, 24\] channels"):
        jax.eval_shape(
            lambda: steps.init_variables(
                make_method(shared_translator=True), jax.random.key(0), image_shape=SHAPE
            )
        )


def make_state(config, initial=False):
    """A method, its first state (all random, or the `initial` one of a run), and its compiled step."""
    method = methods.build(config, 3)
    params, statistics, images = draw(method)
    model_state = {"batch_stats": statistics}
    if initial:
        initialize = jax.jit(functools.partial(steps.init_variables, method, image_shape=SHAPE))
        params, model_state = initialize(jax.random.key(config.seed))
    state, step = first_state(method, config, params, model_state, SHAPE)
    return method, state, jax.jit(step), {"image": images, "label": jnp.arange(BATCH) % 3}


def test_a_step_of_both_objectives():
    """Against Nesterov's first step in float64, p - lr * 1.9 (g + decay p), each from its own objective."""
    method, state, train_step, batch = make_state(configuration("tiny", target="factor"))
    gradients = term_gradients(method, state.params, state.model_state["batch_stats"], batch["image"])
    after = train_step(state, batch)
    for part, objective in (
        ("subnetworks", "loss"),
        ("translators_0", "loss"),
        ("paraphrasers_0", "paraphraser"),
    ):
        expected = jax.tree.map(
            lambda p, g: np.float64(p) - 0.1 * 1.9 * (np.float64(g) + 1e-4 * np.float64(p)),
            state.params[part],
            gradients[objective][part],
        )
        chex.assert_trees_all_close(after.params[part], expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(after.params["teachers"], state.params["teachers"])
    chex.assert_trees_all_equal(
        after.model_state["batch_stats"]["teachers"], state.model_state["batch_stats"]["teachers"]
    )


def test_without_weight_it_is_plain_training():
    """From the same seed, with weight 0, the student is that of `independent`; translators only decay."""
    _, state, train_step, batch = make_state(configuration("tiny", weight=0.0), initial=True)
    config = common.get_config("method=independent,network=tiny")
    config.subnetworks.num = 1
    _, plain, plain_step, _ = make_state(config, initial=True)
    chex.assert_trees_all_equal(state.params["subnetworks"], plain.params["subnetworks"])
    translator = state.params["translators_0"]["conv1"]["kernel"]
    for _ in range(2):
        state, plain = train_step(state, batch), plain_step(plain, batch)
    chex.assert_trees_all_close(
        state.params["subnetworks"], plain.params["subnetworks"], rtol=1e-5, atol=1e-6
    )
    # Nesterov on the decay alone, in float64: v = 0.9 v + d p, p = p - lr (d p + 0.9 v), twice.
    kernel, velocity = np.float64(translator), 0.0
    for _ in range(2):
        velocity = 0.9 * velocity + 1e-4 * kernel
        kernel = kernel - 0.1 * (1e-4 * kernel + 0.9 * velocity)
    np.testing.assert_allclose(state.params["translators_0"]["conv1"]["kernel"], kernel, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "logits"}, r"method\.target must be one of map, factor, got 'logits'"),
        ({"reduction": "max"}, r"method\.reduction must be one of mean, sum"),
        ({"reconstruction": "l3"}, r"method\.reconstruction must be one of l1, l2"),
        ({"factor_rate": 0.0}, r"method\.factor_rate must be above 0 and at most 1, got 0\.0"),
        ({"factor_rate": 1.5}, r"got 1\.5"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_method(**settings)


@pytest.mark.parametrize(("module", "classes", "student"), [(cifar10, 10, 466906), (cifar100, 100, 472756)])
def test_recipe_and_parameters(module, classes, student):
    """Three teachers like the student; 110784 parameters for each translator, and the student's own count."""
    config = module.get_config("method=feed")
    teachers = config.teachers
    assert (teachers.network, teachers.num, teachers.generations) == ("resnet32", 3, 1)
    assert (config.method.weight, config.method.reduction, config.method.target) == (500.0, "mean", "map")
    assert config.optimizer == module.get_config("method=independent").optimizer
    method = methods.build(config, classes)
    shapes, _ = jax.eval_shape(
        lambda: steps.init_variables(method, jax.random.key(0), image_shape=(32, 32, 3))
    )
    sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in shapes.items()}
    expected = {f"translators_{i}": 110784 for i in range(3)}
    assert sizes == expected | {"subnetworks": student, "teachers": 3 * student}


def test_recipe_of_factor_transfer():
    """`epochs=164` puts the decays at 82 and 123, where factor transfer's released code has them."""
    config = cifar10.get_config("method=feed,epochs=164")
    assert config.epochs == 164
    assert config.optimizer.decay_epochs == (82, 123)
