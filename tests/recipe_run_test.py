"""Whole runs with all of the recipe's parts at once, stopped and continued, and runs that end early."""

import shutil

import jax
import numpy as np
import pytest
from seeds_test import final_state, stopped_at

from configs import digits
from ffl_jax.errors import ConfigError, Preempted
from ffl_jax.training import loop, teachers
from ffl_jax.workdir import files
from ffl_jax.workdir.log import read_metrics

pytestmark = pytest.mark.usefixtures("traced_once")


def configuration(**settings):
    """Two seeds, and each batch in two parts; of the method there is little, for compiling takes long."""
    config = digits.get_config("network=tiny,method=independent,epochs=2")
    config.subnetworks.num = 1
    config.update(num_seeds=2, batch_size=256, accumulate=2, label_smoothing=0.1, class_weights=(2.0,) * 10)
    config.mixing.update(mixup_alpha=0.8, cutmix_alpha=1.0)
    config.data.update(sampling="balanced", policy="trivial", erasing=0.25)
    config.optimizer.update(name="lamb", clip_norm=1.0, learning_rate=0.01)
    config.ema_decay = 0.9
    config.update_from_flattened_dict(settings)
    return config


def test_a_stopped_run_continues_with_the_same_bits(tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    summary = loop.train(configuration(), whole)
    for name in ("sub_0", "ema_sub_0"):
        assert summary["predictors"][name]["nll"][0] != summary["predictors"][name]["nll"][1]
    with monkeypatch.context() as patch:
        stopped_at(3, patch)
        with pytest.raises(Preempted):
            loop.train(configuration(), stopped)
    assert 0 < files.read_json(stopped / "summary.json")["step"] < 12
    loop.train(configuration(), stopped)
    for seed in ("seed_0", "seed_1"):
        one, other = stopped / seed, whole / seed
        assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
        for leaf, wanted in zip(*(jax.tree.leaves(final_state(x)) for x in (one, other)), strict=True):
            np.testing.assert_array_equal(leaf, wanted)


def early(**settings):
    """At a rate that float32 does not see, only the batch statistics move the scores, and soon no more."""
    config = digits.get_config("network=tiny,method=independent,epochs=30")
    config.update(batch_size=512)
    config.subnetworks.num = 1
    config.optimizer.update(learning_rate=1e-30, momentum=0.0, nesterov=False, schedule="constant")
    config.checkpoint.every_epochs = 50
    config.evaluation.update(every_epochs=1, patience=2)
    config.data.validation_examples = 100
    config.update_from_flattened_dict(settings)
    return config


@pytest.fixture(scope="module")
def ended(tmp_path_factory, traced_once):
    workdir = tmp_path_factory.mktemp("early")
    return workdir, loop.train(early(), workdir)


def best_of(workdir):
    """(epoch of the first of the best validation scores, the last epoch), by the log."""
    rows = [row for row in read_metrics(workdir / "metrics.jsonl")[0] if row["split"] == "validation"]
    top1 = [row["sub_0/top1"] for row in rows]
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    return top1.index(max(top1)) + 1, len(rows)


def test_a_run_that_gets_no_better_is_complete_and_saved(ended):
    workdir, summary = ended
    best, last = best_of(workdir)
    assert last == best + 2 < 30
    assert (summary["status"], summary["epoch"], summary["best"]["epoch"]) == ("completed", last, best)
    assert files.read_json(workdir / "summary.json") == summary
    assert loop.train(early(), workdir) == summary  # nothing to do


def test_more_patience_goes_on(ended, tmp_path, caplog):
    workdir = shutil.copytree(ended[0], tmp_path / "on")
    with caplog.at_level("INFO"):
        summary = loop.train(early(**{"evaluation.patience": 4}), workdir)
    best, last = best_of(workdir)
    assert last == best + 4 == summary["epoch"] < 30
    assert "not better in 4 evaluations of the validation split" in caplog.text


def test_a_teacher_may_have_ended_early(ended):
    problem = teachers._problem(ended[0], "", 0, None)
    assert problem is None


def test_patience_needs_a_validation_split(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluation\.patience waits.*validation_examples, now 0"):
        loop.train(early(**{"data.validation_examples": 0}), tmp_path)
