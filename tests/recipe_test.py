"""Soft and weighted labels through every method, against sums in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import CLASSES, FIRST_KINDS, SHAPE, configuration

from configs import digits
from ffl_jax import data, methods
from ffl_jax.data.base import Dataset, Split
from ffl_jax.devices.parallel import Parallel
from ffl_jax.errors import ConfigError, DatasetError
from ffl_jax.losses import SoftLabels, classes, cross_entropy
from ffl_jax.methods.base import LABELS, logged
from ffl_jax.training import config as config_lib
from ffl_jax.training import programs, recipe, steps
from ffl_jax.training.experiment import Experiment

HARD = np.array([3, 0, 9, 3, 5, 1])
RNG = np.random.default_rng(0)
# Less than half of a class's label may be its own: the likeliest has what is left.
SOFT = 0.6 * np.eye(CLASSES)[HARD] + 0.3 * np.eye(CLASSES)[HARD[::-1]] + 0.1 / CLASSES
WEIGHTS = tuple(RNG.uniform(0.01, 3, CLASSES).tolist())


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def build(name, **settings):
    config = configuration(name, FIRST_KINDS[name])
    config.method.update(settings)
    return methods.build(config, CLASSES)


def drawn_outputs(method):
    """What `__call__` gives, of the right shapes, at random: nothing has to be compiled."""
    views = (method.num_views,) if method.views else ()
    params, model_state = jax.eval_shape(lambda: steps.init_variables(method, jax.random.key(0), SHAPE))

    def run(variables):
        images = jnp.zeros((*views, len(HARD), *SHAPE))
        return method.apply(variables, images, train=True, mutable=list(model_state))[0]

    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(run, {"params": params, **model_state})
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.1, 3, leaf.shape), leaf.dtype), shapes)


def losses_of(method, outputs, labels):
    objectives, terms = method.objectives(outputs, labels, jnp.float32(100))
    return terms, {name: float(value) for name, value in logged(objectives | terms).items()}


@pytest.mark.parametrize("name", methods.METHODS)
def test_labels_of_every_method(name):
    """A one-hot soft label is the label; others change the cross-entropies, as stated, and nothing else."""
    method = build(name)
    outputs = drawn_outputs(method)
    _, hard = losses_of(method, outputs, jnp.asarray(HARD))
    _, same = losses_of(method, outputs, SoftLabels(jnp.eye(CLASSES)[HARD]))
    for key, value in hard.items():
        np.testing.assert_allclose(same[key], value, rtol=1e-5, err_msg=key)
    terms, soft = losses_of(method, outputs, SoftLabels(jnp.asarray(SOFT), WEIGHTS))
    predictions, compared = method.predictions(outputs), 0
    for key, term in terms.items():
        if getattr(term, "kind", "") != LABELS:
            np.testing.assert_allclose(soft[key], hard[key], rtol=1e-5, err_msg=key)
        elif term.learner in predictions:  # all but KDCL's target
            expected = -(np.array(WEIGHTS) * SOFT * log_softmax(predictions[term.learner])).sum(-1).mean()
            np.testing.assert_allclose(soft[key], expected, rtol=1e-5, err_msg=key)
            compared += 1
    assert compared >= method.subnetworks.num


def test_the_loss_moves_by_the_cross_entropies_alone():
    method = build("ffl")
    outputs = drawn_outputs(method)
    (terms, hard), (_, soft) = (
        losses_of(method, outputs, labels)
        for labels in (jnp.asarray(HARD), SoftLabels(jnp.asarray(SOFT), WEIGHTS))
    )
    moved = sum(soft[key] - hard[key] for key, term in terms.items() if getattr(term, "kind", "") == LABELS)
    np.testing.assert_allclose(soft["loss"] - hard["loss"], moved, rtol=1e-4)


def test_the_likeliest_class_is_that_of_the_label_and_not_of_its_weight():
    weights = (1e-3, 1.0, 1e3)
    soft = SoftLabels(jnp.array([[0.8, 0.1, 0.1], [0.2, 0.3, 0.5]]), weights)
    np.testing.assert_array_equal(classes(soft), [0, 2])


@pytest.mark.parametrize("variant", ["naive", "linear", "minlogit", "mean"])
def test_targets_of_kdcl_with_soft_labels(variant):
    """By brute force over the networks, or a grid of mixtures; weights change no target."""
    method = build("kdcl", variant=variant)
    outputs = drawn_outputs(method)
    target = method._target(outputs, SoftLabels(jnp.asarray(SOFT), WEIGHTS))
    logits = np.asarray(outputs["logits"], np.float64)
    losses = -(SOFT * log_softmax(logits)).sum(-1)
    if variant == "naive":
        expected = logits[losses.argmin(0), np.arange(len(HARD))]
    elif variant == "minlogit":
        expected = (logits - logits[:, np.arange(len(HARD)), HARD][..., None]).min(0)
    elif variant == "mean":
        expected = logits.mean(0)
    else:
        shares = np.linspace(0, 1, 2001)[:, None, None]
        mixtures = shares * logits[0] + (1 - shares) * logits[1]
        found = -(SOFT * log_softmax(mixtures)).sum(-1)
        actual = -(SOFT * log_softmax(target)).sum(-1)
        np.testing.assert_allclose(actual, found.min(0), atol=1e-5)
        return
    np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-5)


# -- the recipe ----------------------------------------------------------------------------------------------


def dataset(counts):
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    split = Split(np.zeros((len(labels), 8, 8, 3), np.uint8), labels)
    return Dataset("mine", split, split, tuple(f"class {c}" for c in range(len(counts))), "")


def make(counts=(6, 3, 1), **settings):
    config = digits.get_config("network=tiny")
    config.update_from_flattened_dict(settings)
    config_lib.check(config)
    return recipe.make(config, dataset(counts))


def test_by_default_there_is_none():
    assert make() is None


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"class_weights": ("balanced",)}, (10 / 18, 10 / 9, 10 / 3)),
        ({"class_weights": (1, 2.0, 0.5)}, (1, 2, 0.5)),
        ({"class_weights": ("balanced",), "label_smoothing": 0.1}, (10 / 18, 10 / 9, 10 / 3)),
        ({"label_smoothing": 0.3}, (1, 1, 1)),
    ],
)
def test_cross_entropy_of_weighted_and_smoothed_labels(settings, weights):
    """PyTorch's formula for CrossEntropyLoss(weight, label_smoothing), each example by itself."""
    labels, logits = np.array([2, 0, 1, 0]), np.random.default_rng(0).normal(size=(4, 3))
    batch = {"image": jnp.zeros((4, 1, 1, 3)), "label": jnp.asarray(labels)}
    made = make(**settings)(batch, jax.random.key(0))
    smoothing = settings.get("label_smoothing", 0.0)
    log_p = log_softmax(logits)
    expected = -(1 - smoothing) * np.take(weights, labels) * log_p[np.arange(4), labels]
    expected -= smoothing / 3 * (np.array(weights) * log_p).sum(-1)
    np.testing.assert_allclose(cross_entropy(jnp.asarray(logits), made["label"]), expected, rtol=1e-5)
    np.testing.assert_array_equal(classes(made["label"]), labels)
    assert made["image"] is batch["image"]


def test_what_no_run_can_have_is_refused():
    for settings, message in (
        ({"class_weights": (1.0, 2.0)}, r"has 2 number\(s\), but mine has 3 classes.*class 0, class 1"),
        ({"class_weights": ("balance",)}, "or balanced, or nothing"),
        ({"class_weights": (1.0, True, 1.0)}, "or balanced, or nothing"),
        ({"class_weights": (0.0, 0.0, 0.0)}, "all 0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be below 1"),
        ({"label_smoothing": -0.1}, "not negative"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(**settings)
    with pytest.raises(DatasetError, match="no training image of class 1 in mine"):
        make((6, 0, 4), class_weights=("balanced",))


# -- mixing --------------------------------------------------------------------------------------------------


def by_hand(made, images, labels, key):
    """(images, probabilities, own share) of neighbours i and i ^ 1, mixed in NumPy by the drawn mask."""
    own = np.asarray(made.draw_mask(jax.random.fold_in(key, 0x5EED0313), images.shape[-3:-1]), np.float64)
    other = np.arange(len(labels)) ^ 1
    mixed = own[..., None] * images + (1 - own[..., None]) * images[..., other, :, :, :]
    soft = np.eye(3)[labels]
    return mixed, own.mean() * soft + (1 - own.mean()) * soft[other], own.mean()


@pytest.mark.parametrize("views", [0, 2])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_neighbours_are_mixed_the_same_in_all_views(kind, views):
    made = make(**{f"mixing.{kind}_alpha": 0.8})
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(*(views,)[:views], 6, 8, 10, 3)), np.array([0, 1, 2, 2, 1, 0])
    run = jax.jit(lambda key: made({"image": jnp.asarray(images), "label": jnp.asarray(labels)}, key))
    shares = set()
    for seed in range(4):
        batch = run(key := jax.random.key(seed))
        mixed, probabilities, share = by_hand(made, images, labels, key)
        np.testing.assert_allclose(batch["image"], mixed, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(batch["label"].probabilities, probabilities, atol=1e-6)
        shares.add(share)
    assert len(shares) == 4


def draw_masks(count=2000, sides=(8, 12), **settings):
    made = make(**{f"mixing.{key}": value for key, value in settings.items()})
    masks = jax.vmap(lambda key: made.draw_mask(key, sides))(jax.random.split(jax.random.key(1), count))
    return np.asarray(masks, np.float64)


def test_shares_of_mixup():
    """Beta(0.4, 0.4) has the mean 1/2 and the variance 1 / (4 (2 * 0.4 + 1)) = 0.1389."""
    masks = draw_masks(mixup_alpha=0.4)
    assert np.ptp(masks, axis=(1, 2)).max() == 0
    shares = masks[:, 0, 0]
    assert abs(shares.mean() - 0.5) < 4 * np.sqrt(0.1389 / 2000)
    assert abs(shares.var() - 0.1389) < 0.012


def test_boxes_of_cutmix():
    """Their sides are those of the authors' code, cut at the image's border; shares are even for alpha 1."""
    masks = draw_masks(cutmix_alpha=1.0)
    assert set(np.unique(masks)) == {0.0, 1.0}
    whole = []
    for mask in 1 - masks:
        rows, columns = mask.any(1), mask.any(0)
        np.testing.assert_array_equal(mask, np.outer(rows, columns))  # a rectangle
        for line in (rows, columns):
            assert np.abs(np.diff(line.astype(int))).sum() <= 2  # in one piece
        if not (rows[0] or rows[-1] or columns[0] or columns[-1]):
            whole.append((rows.sum(), columns.sum()))
    # By brute force over the authors' rand_bbox: NumPy, 200,000 draws.
    rng = np.random.default_rng(0)
    cut = np.sqrt(1 - rng.random(200_000))
    areas = np.ones_like(cut)
    for side in (8, 12):
        half, centre = (side * cut).astype(int) // 2, rng.integers(side, size=len(cut))
        areas *= np.clip(centre + half, 0, side) - np.clip(centre - half, 0, side)
    actual = (1 - masks).sum(axis=(1, 2))
    assert abs(actual.mean() - areas.mean()) < 4 * areas.std() / np.sqrt(2000)
    assert all(rows % 2 == columns % 2 == 0 for rows, columns in whole)


def test_how_often_which():
    masks = draw_masks(mixup_alpha=0.4, cutmix_alpha=1.0, probability=0.8, cutmix_share=0.25)
    boxes = np.ptp(masks, axis=(1, 2)) > 0
    nothing = (masks == 1).all(axis=(1, 2))
    # Some boxes are empty, and some shares are 1 in float32.
    assert 0.8 * 0.25 * 0.7 < boxes.mean() < 0.8 * 0.25 + 0.04
    assert 0.2 - 0.04 < nothing.mean() < 0.2 + 0.1
    assert make(**{"mixing.mixup_alpha": 1.0, "mixing.probability": 0.0}) is None


def test_mixing_of_parts_is_that_of_the_whole():
    """A device that has an even part of a batch needs nothing from the others."""
    made, key = make(**{"mixing.mixup_alpha": 1.0, "label_smoothing": 0.1}), jax.random.key(2)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4, 4, 3)))
    labels = jnp.array([0, 1, 2, 0, 1, 2, 0, 1])
    whole = made({"image": images, "label": labels}, key)
    part = made({"image": images[2:6], "label": labels[2:6]}, key)
    np.testing.assert_allclose(part["image"], whole["image"][2:6], rtol=1e-6)
    np.testing.assert_allclose(part["label"].probabilities, whole["label"].probabilities[2:6], rtol=1e-6)
    with pytest.raises(ConfigError, match="each device has an even number, not 3"):
        made({"image": images[:3], "label": labels[:3]}, key)


def test_mixing_that_no_run_can_have_is_refused():
    for settings, message in (
        ({"mixing.probability": 1.5}, r"mixing\.probability must be in 0\.\.1, got 1\.5"),
        ({"mixing.mixup_alpha": 1.0, "batch_size": 33}, "even number, got 33"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(**settings)


def test_the_log_shows_what_networks_see():
    config = digits.get_config("network=tiny,method=independent")
    config.mixing.mixup_alpha = 1.0
    experiment, parallel = Experiment(config, data.load(config.data)), Parallel(num_devices=1)
    inputs = data.train_input(experiment.dataset.train, experiment.config, parallel)
    arrays = next(inputs.batches(0, 0))
    (shown,) = programs.images_shown(experiment, inputs, parallel, arrays)
    batch = inputs.batch(parallel.fetch(arrays), 0)
    batch = experiment.recipe(batch, jax.random.fold_in(experiment.initial_state().rng, 0))
    settings = experiment.config.data
    pixels = np.asarray(batch["image"][:32]) * np.array(settings.std) + np.array(settings.mean)
    assert np.abs(shown - 255 * pixels).max() < 0.501
