import json
import pathlib

import numpy as np
import pytest
import scoring_script

from ffl_jax.training.confusion import matrix

SCRIPT = pathlib.Path(scoring_script.__file__)


@pytest.fixture(scope="module")
def results(commands, tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluation") / "results.json"
    commands.run(SCRIPT, path, devices=8)
    return json.loads(path.read_text())


@pytest.mark.parametrize("devices", scoring_script.DEVICES)
def test_every_example_counts_once(results, devices):
    """In batches of 8, whatever the size: counts equal NumPy's exactly, losses within float32."""
    images = (np.array(results["images"]) / 255 - 0.5) / 0.25
    labels = np.array(results["labels"])
    logits = np.einsum("nd,kdc->knc", images.reshape(33, -1), np.array(results["kernels"]))
    predictions = {"sub_0": logits[0], "sub_1": logits[1], "ensemble": logits.mean(0)}
    for size in scoring_script.SIZES:
        scores = results["scores"][f"{devices} {size}"]["predictions"]
        assert scores.keys() == predictions.keys()
        for name, z in predictions.items():
            correct = (z[:size].argmax(-1) == labels[:size]).sum()
            log_probabilities = z[:size] - np.log(np.exp(z[:size]).sum(-1, keepdims=True))
            nll = -log_probabilities[np.arange(size), labels[:size]].mean()
            assert scores[name]["top1"] == correct / size, (size, name)
            assert scores[name]["top5"] == 1.0
            np.testing.assert_allclose(scores[name]["nll"], nll, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("devices", scoring_script.DEVICES)
def test_classes_are_counted_over_all_devices(results, devices):
    """Each of 33 images once, against NumPy; what is not shipped has no matrix, but its balanced accuracy."""
    images = (np.array(results["images"]) / 255 - 0.5) / 0.25
    labels = np.array(results["labels"])
    answers = np.einsum("nd,kdc->knc", images.reshape(33, -1), np.array(results["kernels"])).argmax(-1)
    classes = results["scores"][f"{devices} 33"]["classes"]
    confusion = np.zeros((4, 4), int)
    np.add.at(confusion, (labels, answers[0]), 1)
    np.testing.assert_array_equal(matrix(classes), confusion)
    assert classes["images"] == np.bincount(labels, minlength=4).tolist()
    assert classes["right"] == np.diag(confusion).tolist()
    for k, name in enumerate(("sub_0", "sub_1")):
        recalls = [(answers[k] == label)[labels == label].mean() for label in range(4)]
        assert classes["balanced_accuracy"][name] == pytest.approx(np.mean(recalls))


def test_diversity_does_not_depend_on_the_devices(results):
    for size in scoring_script.SIZES:
        one = results["scores"][f"1 {size}"]["diversity"]
        assert one.keys() == {"disagreement", "kl", "cka"}
        for devices in scoring_script.DEVICES[1:]:
            other = results["scores"][f"{devices} {size}"]["diversity"]
            for name, values in one.items():
                np.testing.assert_allclose(other[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
