"""Scores against loops and sums in NumPy float64."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffl_jax.training import metrics


def reference(logits, labels):
    """Scores by a stable sort of each example's classes, float64."""
    logits = np.asarray(logits, np.float64)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    order = np.argsort(-logits, axis=-1, kind="stable")  # ties: the lower index first
    correct = order[:, 0] == labels
    confidence = probabilities.max(-1)
    ece = 0.0
    for b in range(15):  # bins (b / 15, (b + 1) / 15]
        members = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if members.any():
            ece += members.mean() * abs(correct[members].mean() - confidence[members].mean())
    return {
        "top1": correct.mean(),
        "top5": (order[:, :5] == labels[:, None]).any(-1).mean(),
        "nll": -np.log(probabilities[np.arange(len(labels)), labels]).mean(),
        "ece": ece,
    }


classification_sums = jax.jit(metrics.classification_sums)


def scores(logits, labels, weights=None):
    return metrics.classification_scores(jax.device_get(classification_sums(logits, labels, weights)))


def draw(seed, examples, classes, scale=2.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(examples, classes))).astype(np.float32), rng.integers(
        0, classes, examples
    )


@pytest.mark.parametrize(("classes", "scale"), [(2, 1.0), (5, 3.0), (10, 0.1), (10, 2.0), (100, 5.0)])
def test_scores(classes, scale):
    logits, labels = draw(0, 300, classes, scale)
    chex.assert_trees_all_close(scores(logits, labels), reference(logits, labels), rtol=1e-5, atol=1e-7)


def test_scores_by_hand():
    # Softmax of (log 3, 0, 0, ...) over 7 classes: 1/3 for the first, 1/9 for each other one.
    logits = np.tile(np.log([3.0, 1, 1, 1, 1, 1, 1]), (4, 1)).astype(np.float32)
    actual = scores(logits, np.array([0, 1, 5, 6]))
    # The last five tie: label 1 is second, 5 sixth, 6 seventh. Confidence 1/3 against an accuracy of 1/4.
    expected = {"top1": 1 / 4, "top5": 2 / 4, "nll": np.log(3) / 4 + 3 * np.log(9) / 4, "ece": 1 / 12}
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


def test_ties_go_to_the_lower_index():
    logits, labels = np.zeros((12, 12), np.float32), np.arange(12)
    actual = scores(logits, labels)
    assert actual["top1"] == pytest.approx(1 / 12)  # only label 0
    assert actual["top5"] == pytest.approx(5 / 12)  # labels 0..4
    logits, labels = draw(1, 400, 10)
    logits = np.round(logits)  # many ties, first and fifth places among them
    chex.assert_trees_all_close(scores(logits, labels), reference(logits, labels), rtol=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_top5_of_at_most_five_classes_is_one(classes):
    assert scores(*draw(2, 50, classes))["top5"] == 1.0


def test_certain_predictions_lie_in_the_last_bin():
    actual = scores(np.float32([[100, 0, 0], [0, 100, 0]]), np.array([0, 0]))
    chex.assert_trees_all_close(actual, {"top1": 0.5, "top5": 1.0, "nll": 50.0, "ece": 0.5}, rtol=1e-6)


def test_calibration_bins():
    """One example in each of 15 equal bins, right and wrong by turns, so that no two bins may be joined."""
    confidence = (np.arange(15) + 0.5) / 15
    logits = np.log(np.tile((1 - confidence[:, None]) / 39, (1, 40)))
    logits[:, 7] = np.log(confidence)
    correct = np.arange(15) % 2 == 0
    actual = scores(logits.astype(np.float32), np.where(correct, 7, 8))
    assert actual["ece"] == pytest.approx(np.abs(correct - confidence).mean(), rel=1e-5)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    """Bins are (b / 15, (b + 1) / 15]: Guo et al., 2017, sec. 2. Two classes, float32 near the edges."""
    edges = np.arange(8, 15) / 15
    logits = (np.log(edges / (1 - edges)) + np.arange(-40, 41)[:, None] / 1e7).astype(np.float32)
    rows = np.stack([logits.ravel(), np.zeros(logits.size, np.float32)], -1)[:, None]
    one_by_one = jax.jit(jax.vmap(metrics.classification_sums, (0, None)))
    sums = jax.device_get(one_by_one(rows, np.zeros(1, int)))
    places = sums["bin_confidence"].sum(-1) * np.float32(15)
    assert len(set(places) & set(range(8, 15))) >= 3  # on an edge to the bit; rounding leaves some edges out
    np.testing.assert_array_equal(sums["bin_count"].argmax(-1), np.ceil(places) - 1)


def test_padding_counts_nothing():
    logits, labels = draw(3, 40, 10)
    weights = np.float32(np.arange(40) < 27)
    actual = scores(logits, labels, jnp.asarray(weights))
    chex.assert_trees_all_close(actual, reference(logits[:27], labels[:27]), rtol=1e-5)
    sums = classification_sums(logits, labels, jnp.zeros(40))
    chex.assert_trees_all_equal(sums, jax.tree.map(jnp.zeros_like, sums))


def test_padding_that_is_not_a_number_counts_nothing():
    logits, labels = draw(4, 4, 10)
    logits[3] = np.nan
    actual = scores(logits, labels, jnp.array([1.0, 1.0, 1.0, 0.0]))
    chex.assert_trees_all_close(actual, reference(logits[:3], labels[:3]), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("label", [0, 3, 9])
def test_examples_that_are_not_numbers_are_wrong(bad, label):
    logits = np.zeros((2, 10), np.float32)
    logits[0, :2] = bad
    logits[1, label] = 5
    sums = jax.device_get(classification_sums(logits, np.full(2, label)))
    assert (sums["count"], sums["top1"], sums["top5"]) == (2, 1, 1)


def test_merged_batches_equal_one_pass():
    logits, labels = draw(5, 64, 10)
    whole = classification_sums(logits, labels)
    parts = [
        classification_sums(logits[a:b], labels[a:b]) for a, b in [(0, 16), (16, 32), (32, 48), (48, 64)]
    ]
    merged = jax.tree.map(lambda *leaves: sum(leaves), *jax.device_get(parts[::-1]))
    chex.assert_trees_all_close(merged, whole, rtol=1e-5)
    chex.assert_trees_all_close(metrics.classification_scores(merged), reference(logits, labels), rtol=1e-5)


def test_sums_of_half_precision_logits_are_float32():
    logits, labels = draw(6, 30, 10)
    logits = jnp.asarray(logits, jnp.bfloat16)
    sums = classification_sums(logits, labels)
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype("float32")}
    rounded = np.asarray(logits, np.float64)
    chex.assert_trees_all_close(metrics.classification_scores(sums), reference(rounded, labels), rtol=1e-5)


def reference_diversity(logits, features):
    """In float64, from centred samples [N, D] rather than from sums."""
    z = np.float64(logits)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    centred = [x - x.mean(0) for x in map(np.float64, features)]

    def alignment(x, y):
        return np.square(x.T @ y).sum() / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))

    pairs = [[(i, j) for j in range(len(z))] for i in range(len(z))]
    functions = {
        "disagreement": lambda i, j: (z[i].argmax(-1) != z[j].argmax(-1)).mean(),
        "kl": lambda i, j: (p[i] * np.log(p[i] / p[j])).sum(-1).mean(),
        "cka": lambda i, j: alignment(centred[i], centred[j]),
    }
    return {name: np.array([[f(*pair) for pair in row] for row in pairs]) for name, f in functions.items()}


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 2, 4)])
def test_diversity(sizes):
    """Three networks, the last nearly a rotation of the first; 6 of 20 images are padding."""
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 2, (3, 20, 5)).astype(np.float32)
    logits[2] = logits[0] + 0.1 * logits[2]
    maps = [
        rng.gamma(1, 1, (20, size, size, d)).astype(np.float32)
        for size, d in zip(sizes, (6, 3, 6), strict=True)
    ]
    maps[2] = (maps[0] @ np.linalg.qr(rng.normal(size=(6, 6)))[0] + 0.1 * maps[2]).astype(np.float32)
    weights = np.float32(np.arange(20) < 14)
    whole = jax.device_get(jax.jit(metrics.diversity_sums)(logits, maps, weights))
    actual = metrics.diversity_scores(whole)
    samples = [x[:14].reshape(-1, x.shape[-1]) for x in maps]
    if len(set(sizes)) > 1:
        samples = [x[:14].mean((1, 2)) for x in maps]
    expected = reference_diversity(logits[:, :14], samples)
    assert expected["cka"][0, 2] > 0.9 > 0.5 > expected["cka"][0, 1]
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)
    halves = [
        metrics.diversity_sums(logits[:, part], [x[part] for x in maps], weights[part])
        for part in (slice(0, 10), slice(10, 20))
    ]
    merged = metrics.diversity_scores(jax.device_get(jax.tree.map(jnp.add, *halves)))
    chex.assert_trees_all_close(merged, actual, rtol=1e-4, atol=1e-6)
    assert metrics.mean_over_pairs(actual["kl"]) == pytest.approx(actual["kl"].sum() / 6, abs=1e-6)


def test_constant_features_align_with_nothing():
    maps = [np.ones((4, 1, 1, 2), np.float32), np.eye(4, dtype=np.float32).reshape(4, 1, 1, 4)]
    sums = jax.device_get(metrics.diversity_sums(jnp.zeros((2, 4, 3)), maps, jnp.ones(4)))
    np.testing.assert_allclose(metrics.diversity_scores(sums)["cka"], [[0, 0], [0, 1]], atol=1e-6)


def test_reliability():
    """Confidences 0.4, 0.9, 0.9 with three classes: bins 6 and 14 of 15, counted from 1."""
    p = np.array([[0.4, 0.3, 0.3], [0.05, 0.9, 0.05], [0.9, 0.05, 0.05]])
    sums = jax.device_get(classification_sums(jnp.log(p), np.array([0, 1, 1])))
    diagram = {name: np.array(values) for name, values in metrics.reliability(sums).items()}
    expected = {name: np.zeros(15) for name in diagram}
    expected["count"][[5, 13]] = 1, 2
    expected["confidence"][[5, 13]] = 0.4, 0.9
    expected["accuracy"][[5, 13]] = 1, 0.5
    chex.assert_trees_all_close(diagram, expected, rtol=1e-6)


# -- class by class ----------------------------------------------------------------------------------------


class_sums = jax.jit(metrics.class_sums, static_argnums=3)


def test_what_is_taken_for_what():
    """Against a loop; the last 30 of 200 images are padding, and two have no answer."""
    predictions = {name: draw(seed, 200, 7)[0] for seed, name in enumerate(("a", "b"))}
    labels = draw(0, 200, 6)[1]  # the last class has no image
    for image, bad in ((3, np.nan), (4, np.inf)):  # argmax takes both for the largest
        predictions["b"][image, labels[image]] = bad
    weights = np.float32(np.arange(200) < 170)
    sums = jax.device_get(class_sums(predictions, labels, weights, "b"))
    confusion = np.zeros((7, 7), int)
    for row, label in zip(predictions["b"][:170], labels, strict=False):
        if np.isfinite(row).all():
            confusion[label, row.argmax()] += 1
    np.testing.assert_array_equal(sums["confusion"], confusion)
    assert confusion.sum() == 168
    np.testing.assert_array_equal(sums["images"], np.bincount(labels[:170], minlength=7))
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype("int32")}
    scores = metrics.class_scores(sums, "b")
    right = {name: z.argmax(-1) == labels for name, z in predictions.items()}
    right["b"][3:5] = False
    recalls = {name: [x[:170][labels[:170] == k].mean() for k in range(6)] for name, x in right.items()}
    assert scores["balanced_accuracy"] == pytest.approx({name: np.mean(x) for name, x in recalls.items()})
    assert scores["right"] == np.diag(confusion).tolist()
    dense = np.zeros((7, 7), int)
    entries = scores["confusion"]
    dense[entries["true"], entries["predicted"]] = entries["images"]
    np.testing.assert_array_equal(dense, confusion)
    assert json.loads(json.dumps(scores)) == scores


def test_class_counts_agree_with_top1():
    """Logits that are finite, but whose softmax is not, are no answer to either."""
    logits, labels = draw(2, 64, 5)
    logits = np.round(logits)  # with ties
    logits[5], logits[6] = [3e38, -3e38, 0, 0, 0], -np.inf
    sums = jax.device_get(class_sums({"a": logits}, labels, np.ones(64), "a"))
    top1 = classification_sums(logits, labels)["top1"]
    assert np.trace(sums["confusion"]) == sums["right"]["a"].sum() == top1
    assert sums["confusion"].sum() == 62


def test_counts_are_exact_beyond_float32():
    """2**24 + 1 has no float32."""
    one = class_sums({"a": np.eye(2, dtype=np.float32)}, np.array([0, 0]), np.ones(2), "a")
    many = jax.tree.map(lambda x: x * 2**24, one)
    total = jax.device_get(jax.tree.map(jnp.add, many, one))
    np.testing.assert_array_equal(total["confusion"], [[2**24 + 1] * 2, [0, 0]])


def test_a_training_step_counts_no_classes():
    """Its record has these sums alone, of a few numbers each."""
    sums = classification_sums(*draw(0, 8, 40))
    assert sums.keys() == {"count", "top1", "top5", "nll", "bin_count", "bin_confidence", "bin_correct"}
    assert max(leaf.size for leaf in sums.values()) == metrics.CALIBRATION_BINS


def test_of_very_many_classes_errors_are_not_told_apart():
    """Nothing as large as classes times classes is made."""
    num = metrics.LARGEST_CONFUSION + 1
    logits = jnp.zeros((4, num)).at[:, 7].set(1)
    shapes = jax.eval_shape(lambda: metrics.class_sums({"a": logits}, jnp.full(4, 7), jnp.ones(4), "a"))
    assert max(leaf.size for leaf in jax.tree.leaves(shapes)) == num
    scores = metrics.class_scores(
        jax.device_get(metrics.class_sums({"a": logits}, jnp.array([7, 7, 7, 9]), jnp.ones(4), "a")), "a"
    )
    assert (scores["confusion"], scores["balanced_accuracy"]) == (None, {"a": 0.5})
