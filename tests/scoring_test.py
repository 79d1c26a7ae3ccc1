import json
import pathlib
import types

import numpy as np
import pytest
import scoring_script
from conftest import write_run

from configs import digits
from ffl_jax.errors import ConfigError
from ffl_jax.training import confusion, scoring, summary

SCRIPT = pathlib.Path(scoring_script.__file__)


@pytest.fixture(scope="module")
def results(commands, tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluation") / "results.json"
    commands.run(SCRIPT, path, devices=4)
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
    counts = np.zeros((4, 4), int)
    np.add.at(counts, (labels, answers[0]), 1)
    np.testing.assert_array_equal(confusion.matrix(classes), counts)
    assert classes["images"] == np.bincount(labels, minlength=4).tolist()
    assert classes["right"] == np.diag(counts).tolist()
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


def test_the_classes_of_another_prediction(tmp_path):
    """That is asked for; of a checkpoint of random variables."""
    experiment, _ = write_run(tmp_path, digits.get_config("method=independent,network=tiny"))
    with pytest.raises(ConfigError, match=r"independent has no prediction 'ensembel': did you mean ensemble"):
        scoring.evaluate_checkpoint(tmp_path, predictor="ensembel")
    _, scores = scoring.evaluate_checkpoint(tmp_path, predictor="ensemble")
    counts, per_class = confusion.matrix(scores["classes"]), scores["per_class"]
    labels = experiment.dataset.test.labels
    np.testing.assert_array_equal(counts.sum(1), np.bincount(labels))
    top1 = {name: one["top1"] * len(labels) for name, one in scores["predictions"].items()}
    assert np.trace(counts) == pytest.approx(top1["ensemble"]) != pytest.approx(top1["sub_0"])
    assert (per_class["prediction"], per_class["names"]) == ("ensemble", [str(k) for k in range(10)])
    assert per_class["accuracy"] == pytest.approx(np.diag(counts) / counts.sum(1))
    worst = per_class["confused"][0]
    assert worst["images"] == (counts - np.diag(np.diag(counts))).max()
    assert counts[int(worst["true"]), int(worst["predicted"])] == worst["images"]


def test_a_matrix_keeps_names_of_any_letters():
    names = ["a\rb", 'q"uote', "x,y", " pad ", "\u2028", "", "n\nl", "\r\n", "nul\0", "7", "=1+1"]
    counts = np.arange(121).reshape(11, 11)
    true, predicted = np.nonzero(counts)
    classes = {"images": counts.sum(1), "confusion": {"true": true, "predicted": predicted}}
    classes["confusion"]["images"] = counts[true, predicted]
    found, again = confusion.parse(confusion.csv_of(classes, names).encode())
    assert found == names
    np.testing.assert_array_equal(again, counts)


def test_summaries_of_earlier_versions():
    """One without classes is kept if its checkpoint has none either; else it is written again."""
    config = types.SimpleNamespace(seed=0)
    run = types.SimpleNamespace(scores={"test": {"predictions": {}}}, best=None)
    run.experiment = types.SimpleNamespace(config=config)
    old = {"status": "completed", "step": 7, "seed": 0, "best": None, "predictors": {}, "deploy": "sub_0"}
    old |= {"reliability": {}, "diversity": {}, "training": {}, "images_per_second": 1.0}
    assert summary.repeats(old, run, 7)
    assert "per_class" not in summary.joint([old, old])
    run.scores["test"]["classes"] = {"balanced_accuracy": {}}
    assert not summary.repeats(old, run, 7)
    assert summary.repeats(old | {"balanced_accuracy": {}, "per_class": {}}, run, 7)
    new = old | {"balanced_accuracy": {"sub_0": 0.5}, "per_class": {"names": ["a"]}}
    assert summary.joint([new, new])["per_class"] == [new["per_class"]] * 2
