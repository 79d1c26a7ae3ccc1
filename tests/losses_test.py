"""Losses against closed forms and sums in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from configs import common
from ffl_jax import losses, methods
from ffl_jax.methods import METHODS
from ffl_jax.methods.subnetworks import build

STUDENT, TEACHER = np.array([[1.0, 2, 3], [0, 0, 0]]), np.array([[3.0, 1, 0], [1, -1, 0]])
SMOOTHING = 1e-7
TEMPERATURES = (0.05, 0.5, 1.0, 3.0, 20.0)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl_reference(student, teacher, temperature, smoothing):
    """(loss, gradient of its sum by student, by teacher), float64."""
    log_p, log_s = log_softmax(student / temperature), log_softmax(teacher / temperature)
    q = np.exp(log_s) + smoothing
    log_q = np.log(q, out=log_s.copy(), where=q > 0)
    loss = temperature**2 * (q * (log_q - log_p)).sum(-1)
    by_student = temperature * (q.sum(-1, keepdims=True) * np.exp(log_p) - q)
    slope = np.exp(log_s) * (log_q - log_p)
    by_teacher = temperature * (slope - np.exp(log_s) * slope.sum(-1, keepdims=True))
    return loss, by_student, by_teacher


def extreme_pairs():
    """Logits [8, 4] of students and teachers: from -200 to 200, opposed, equal, and all the same."""
    rng = np.random.default_rng(0)
    peaks = 400.0 * np.eye(4) - 200
    students = np.concatenate([peaks, rng.uniform(-200, 200, (2, 4)), np.full((1, 4), -200), peaks[:1]])
    teachers = np.concatenate([peaks[::-1], rng.uniform(-200, 200, (2, 4)), peaks[:1], np.full((1, 4), 200)])
    return students, teachers


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (-1, 0.006738),
        (0, 0.006738),
        (1, 0.007629),
        (10, 0.021750),
        (20, 0.060055),
        (40, 0.286505),
        (60, 0.731616),
        (79, 0.999219),
        (80, 1.0),
        (300, 1.0),
    ],
)  # exp(-5 (1 - e / 80)^2) by hand
def test_sigmoid_rampup(epoch, expected):
    actual = losses.sigmoid_rampup(jnp.float32(epoch), 80)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=6e-7)


def test_sigmoid_rampup_over_no_epochs_is_one():
    np.testing.assert_array_equal(losses.sigmoid_rampup(jnp.array([0.0, 1.0, 7.0]), 0), np.ones(3))
    assert losses.sigmoid_rampup(jnp.int32(0), 0.0).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cross_entropy(dtype):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.uniform(-200, 200, (3, 5, 7)), dtype)
    labels = rng.integers(0, 7, 5)
    reference = -log_softmax(np.asarray(logits, np.float64))[:, np.arange(5), labels]
    actual = losses.cross_entropy(logits, jnp.asarray(labels))  # [K, B, C] and [B] -> [K, B]
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, reference, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(losses.cross_entropy(logits[0], labels), reference[0], rtol=1e-6, atol=1e-6)


def test_cross_entropy_gradient_is_softmax_minus_label():
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(2, 4, 5)), rng.integers(0, 5, 4)
    actual = jax.grad(lambda x: losses.cross_entropy(x, jnp.asarray(labels)).sum())(jnp.float32(logits))
    np.testing.assert_allclose(actual, np.exp(log_softmax(logits)) - np.eye(5)[labels], atol=1e-6)


def test_kl_divergence():
    # By hand: sum of 9 q (log q - log p) over the classes, and its mean over the two examples.
    student, teacher = jnp.float32(STUDENT), jnp.float32(TEACHER)
    actual = losses.kl_divergence(student, teacher, 3.0, SMOOTHING)
    assert actual.shape == (2,)
    np.testing.assert_allclose(actual.mean(), 1.232568, atol=6e-7)
    np.testing.assert_allclose(losses.kl_divergence(student, teacher, 3.0).mean(), 1.232566, atol=6e-7)


def test_kl_divergence_gradient():
    gradient = jax.grad(lambda x: losses.kl_divergence(x, jnp.float32(TEACHER), 3.0, SMOOTHING).mean())
    # By hand: T / 2 * [(1 + 3e-7) softmax(z / T) - q].
    expected = [[-0.451967, 0.072624, 0.379343], [-0.172661, 0.154644, 0.018017]]
    np.testing.assert_allclose(gradient(jnp.float32(STUDENT)), expected, atol=1e-6)


def test_kl_divergence_without_smoothing_is_plain_kl():
    softmax = np.exp(log_softmax(TEACHER / 2))
    expected = 4 * (softmax * (np.log(softmax) - log_softmax(STUDENT / 2))).sum(-1)
    np.testing.assert_allclose(losses.kl_divergence(STUDENT, TEACHER, 2.0, 0.0), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.kl_divergence(STUDENT, TEACHER, 2.0), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.kl_divergence(STUDENT, STUDENT, 2.0), [0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("classes", "expected"), [(3, 2.700e-6), (10, 9.000005e-6), (100, 9.000045e-5), (1000, 9.00045e-4)]
)  # 9 (1 + C s) log(1 + C s), by hand
def test_kl_divergence_of_equal_logits_is_the_constant_of_smoothing(classes, expected):
    zeros = np.zeros((1, classes))
    with jax.enable_x64(True):
        actual = losses.kl_divergence(jnp.asarray(zeros), jnp.asarray(zeros), 3.0, SMOOTHING)
        np.testing.assert_allclose(actual, [expected], rtol=2e-6)
    # In float32 it is a difference of logarithms near log C.
    resolution = np.finfo(np.float32).eps * 9 * np.log(classes)
    actual = losses.kl_divergence(jnp.float32(zeros), jnp.float32(zeros), 3.0, SMOOTHING)
    np.testing.assert_allclose(actual, [expected], rtol=0, atol=resolution)


def test_kl_divergence_of_opposed_extremes():
    student, teacher = jnp.array([[0.0, 0.0], [-300.0, 300.0]]), jnp.array([[300.0, -300.0]])
    actual = losses.kl_divergence(student, teacher, 3.0, SMOOTHING)  # one teacher, two students
    np.testing.assert_allclose(actual, [6.238312, 1800.000166], rtol=2e-7)  # NumPy, float64


@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kl_divergence_of_extremes_is_finite_and_exact(dtype, smoothing):
    students, teachers = (jnp.asarray(x, dtype) for x in extreme_pairs())

    def loss(students, teachers, temperature):
        values = losses.kl_divergence(students, teachers, temperature, smoothing)
        return values.sum(), values

    evaluate = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    for temperature in TEMPERATURES:
        gradients, values = evaluate(students, teachers, temperature)
        assert values.dtype == jnp.float32
        arrays = (np.asarray(x, np.float64) for x in (students, teachers))
        expected, *expected_gradients = kl_reference(*arrays, temperature, smoothing)
        np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-6 * temperature**2)
        # Gradients come in the type of the logits: bfloat16 keeps 8 bits.
        rtol = 1e-5 if dtype == jnp.float32 else 2**-8
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert gradient.dtype == dtype
            gradient = np.asarray(gradient, np.float64)
            np.testing.assert_allclose(
                gradient, expected_gradient, rtol=rtol, atol=2e-6 * max(1, temperature)
            )


def test_kl_divergence_broadcasts_a_teacher_over_subnetworks():
    rng = np.random.default_rng(3)
    students, teacher = rng.normal(size=(3, 4, 5)), rng.normal(size=(4, 5))
    actual = losses.kl_divergence(jnp.float32(students), jnp.float32(teacher), 3.0, SMOOTHING)
    assert actual.shape == (3, 4)
    expected = [kl_reference(student, teacher, 3.0, SMOOTHING)[0] for student in students]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("types", [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float32")])
def test_losses_are_float32(types):
    students, teachers = (jnp.asarray(x, dtype) for x, dtype in zip((STUDENT, TEACHER), types, strict=True))
    assert losses.kl_divergence(students, teachers, 3.0, SMOOTHING).dtype == jnp.float32
    assert losses.cross_entropy(students, jnp.array([0, 1])).dtype == jnp.float32


# -- forms of the released codes -----------------------------------------------------------------------------

GATE = reference.softmax(np.random.default_rng(7).normal(size=(reference.BATCH, 3)))
ATTENTION = reference.softmax(np.random.default_rng(8).normal(size=(reference.BATCH, 2, 2)))


def targets_of(name, seen, settings):
    """[(a learner, what it learns from, the share of that)] by the formulas, of the logits that are seen."""
    logits, gate = seen
    others = [[z for other, z in enumerate(logits) if other != k] for k in range(3)]
    if name == "one":
        return [(k, np.einsum("bk,kbc->bc", gate, logits), 1) for k in range(3)]
    if name == "okddip":
        peers = np.einsum("bad,dbc->abc", ATTENTION, logits[:2])
        return [(0, peers[0], 1), (1, peers[1], 1), (2, logits[:2].mean(axis=0), 1)]
    if settings.get("variant") == "pairwise":
        return [(k, z, 1 / 2) for k in range(3) for z in others[k]]
    return [(k, np.mean(others[k], axis=0), 1) for k in range(3)]


def released_loss(name, learners, seen, settings):
    """The loss in NumPy: `learners` is (logits, gate) where a prediction learns, `seen` where it teaches."""
    logits, gate = learners
    predictions = [*logits, np.einsum("bk,kbc->bc", gate, logits)] if name == "one" else logits
    total = sum(reference.cross_entropy(z, reference.LABELS).mean() for z in predictions)
    temperature, weight = settings["temperature"], 1.0 if name == "dml" else reference.RAMP
    for k, target, share in targets_of(name, seen, settings):
        q = reference.softmax(target / temperature) + settings["smoothing"]
        gap = np.log(q) - np.log(reference.softmax(logits[k] / temperature))
        total += weight * share * temperature**2 * (q * gap).sum(-1).mean()
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.01])
@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("dml", {"variant": "pairwise"}),
        ("dml", {"variant": "mean_logits"}),
        ("cl_ilr", {"cross_entropy_weight": 1.0, "distillation_weight": 1.0, "rampup_epochs": 80.0}),
        ("one", {}),
        ("okddip", {}),
    ],
)
def test_targets_that_gradients_flow_into(name, more, detached, smoothing):
    """Against central differences of the formula, through the learners alone or through the targets too.

    A smoothing of 0.01, since 1e-7 would be lost in the differences.
    """
    settings = {"temperature": 3.0, "smoothing": smoothing}
    flag = {"target_grad": "none" if detached else "full"} if name == "okddip" else {}
    flag = flag or {"detached_targets": detached}
    logits = reference.draw_logits(3)
    with jax.enable_x64(True):
        networks = build("tiny", 3, reference.CLASSES, 2)
        method = METHODS[name](networks, reference.CLASSES, **settings, **more, **flag)

        def loss(logits, gate):
            outputs = {"logits": logits, "attention": jnp.asarray(ATTENTION), "gate": gate}
            outputs["ensemble_logits"] = logits[:2].mean(axis=0)
            outputs["fused_logits"] = jnp.einsum("bk,kbc->bc", gate, logits)
            epoch = jnp.asarray(reference.EPOCH)
            return method.objectives(outputs, jnp.asarray(reference.LABELS), epoch)[0]["loss"]

        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(logits, GATE)

    fixed, settings = (logits, GATE), settings | more
    expected = reference.slopes(
        lambda x: released_loss(name, x, fixed if detached else x, settings), list(fixed)
    )
    np.testing.assert_allclose(value, released_loss(name, fixed, fixed, settings), rtol=1e-6)
    for actual, slope in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(actual, slope, rtol=1e-6, atol=1e-7)


def test_smoothing_of_a_trained_teacher():
    student, teacher = reference.draw_logits(2)
    config = common.get_config("method=kd,network=tiny")
    config.method.smoothing = 0.01
    outputs = {"logits": jnp.asarray(student[None]), "teacher_logits": (jnp.asarray(teacher),)}
    objectives = methods.build(config, 3).objectives(outputs, jnp.asarray(reference.LABELS), jnp.float32(0))
    q = reference.softmax(teacher / 3) + 0.01
    kd = 9 * (q * np.log(q / reference.softmax(student / 3))).sum(-1).mean()
    expected = reference.cross_entropy(student, reference.LABELS).mean() + kd
    np.testing.assert_allclose(objectives[0]["loss"], expected, rtol=1e-6)
