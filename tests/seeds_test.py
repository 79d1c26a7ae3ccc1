"""Several seeds in one program: each must end like a run of its own, and be one for every command."""

import csv
import shutil

import jax
import numpy as np
import pytest
from conftest import assert_same_lines

from configs import digits
from ffl_jax import data, main
from ffl_jax.devices import backend, preemption
from ffl_jax.devices.parallel import OWN, Parallel
from ffl_jax.errors import CheckpointError, ConfigError, NonFiniteError, Preempted
from ffl_jax.reporting import report
from ffl_jax.training import config as config_lib
from ffl_jax.training import loop, scoring, steps
from ffl_jax.training.experiment import Experiment
from ffl_jax.workdir import checkpoint, files
from ffl_jax.workdir.log import read_metrics

SEEDS = (3, 4)

pytestmark = pytest.mark.usefixtures("traced_once")


def configuration(num_seeds=2, seed=3, **settings):
    """KDCL has a view for each sub-network and learns from the validation split: seeds keep all apart."""
    config = digits.get_config("network=tiny,method=kdcl,epochs=2")
    config.update(seed=seed, num_seeds=num_seeds, batch_size=128, log_every_steps=2)
    config.data.validation_examples = 100
    config.checkpoint.every_steps = 4
    # Rounding grows from step to step, faster at the higher rates at which such a network still learns.
    config.optimizer.learning_rate = 0.01
    config.update_from_flattened_dict(settings)
    return config


def final_state(workdir):
    directory = workdir / "checkpoints"
    step = checkpoint.find(directory)
    config = config_lib.from_json(checkpoint.load_run(directory, step)["config"])
    experiment = Experiment(config, data.load(config.data))
    state = checkpoint.restore(directory, step, experiment.abstract_state())
    return jax.tree.map(np.asarray, state.replace(rng=jax.random.key_data(state.rng)))


@pytest.fixture(scope="module")
def joint(traced_once, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("joint")
    return workdir, loop.train(configuration(), workdir)


@pytest.fixture(scope="module")
def single(traced_once, tmp_path_factory):
    """{seed: (workdir, summary)} of each seed alone."""
    workdirs = {seed: tmp_path_factory.mktemp(str(seed)) for seed in SEEDS}
    return {seed: (path, loop.train(configuration(1, seed), path)) for seed, path in workdirs.items()}


def test_each_seed_equals_its_single_run(joint, single):
    workdir, summary = joint
    for index, seed in enumerate(SEEDS):
        own = workdir / f"seed_{seed}"
        alone, single_summary = single[seed]
        state, expected = final_state(own), final_state(alone)
        for (path, leaf), wanted in zip(
            jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(leaf, wanted, rtol=2e-4, atol=2e-5, err_msg=str(path))
        lines, wanted_lines = (read_metrics(one / "metrics.jsonl")[0] for one in (own, alone))
        assert_same_lines(lines, wanted_lines, {"train": 128, "validation": 100, "test": 360})
        own_summary = files.read_json(own / "summary.json")
        assert own_summary["seed"] == single_summary["seed"] == summary["seed"][index] == seed
        assert own_summary["predictors"].keys() == single_summary["predictors"].keys()
        assert checkpoint.whole_steps(own / "checkpoints") == checkpoint.whole_steps(alone / "checkpoints")


def test_the_joint_summary_lists_the_seeds(joint):
    workdir, summary = joint
    assert summary == files.read_json(workdir / "summary.json")
    assert (summary["status"], summary["step"], summary["epoch"]) == ("completed", 22, 2.0)
    assert summary["seed"] == list(SEEDS)
    assert [one["predictors"].keys() for one in summary["best"]] == [summary["predictors"].keys()] * 2
    for name, scores in summary["predictors"].items():
        for key, values in scores.items():
            own = [files.read_json(workdir / f"seed_{seed}" / "summary.json") for seed in SEEDS]
            assert values == [one["predictors"][name][key] for one in own]
    nll = summary["predictors"]["sub_0"]["nll"]
    assert nll[0] != nll[1]  # they are two
    assert files.read_json(workdir / "config.json")["num_seeds"] == 2


def test_seeds_share_the_time_of_their_training(joint):
    """Their seconds add up to what passed between the first file and the last."""
    workdir, summary = joint
    began, ended = (
        (workdir / name).stat().st_mtime for name in (f"seed_{SEEDS[0]}/config.json", "summary.json")
    )
    seconds = [one["seconds"] for one in summary["training"]]
    assert 0.6 * (ended - began) < sum(seconds) <= ended - began + 0.1


def test_a_seed_is_a_run_for_other_commands(joint):
    workdir, summary = joint
    step, scores = scoring.evaluate_checkpoint(workdir / "seed_4")
    assert step == 22
    nll = scores["predictions"]["sub_0"]["nll"]
    assert nll == pytest.approx(summary["predictors"]["sub_0"]["nll"][1], rel=1e-5)
    with pytest.raises(ConfigError, match=r"holds 2 seeds: choose one, such as --workdir=.*/seed_3"):
        scoring.evaluate_checkpoint(workdir)


def test_complete_seeds_are_left_alone(joint):
    workdir, summary = joint
    assert loop.train(configuration(), workdir) == summary
    (workdir / "seed_4" / "summary.json").unlink()
    again = loop.train(configuration(), workdir)
    assert again["predictors"] == summary["predictors"]
    assert (workdir / "seed_4" / "summary.json").exists()


def stopped_at(step, monkeypatch):
    """A signal comes as soon as that many steps were begun."""
    begun = []
    advance = loop.Progress.advance

    def count(progress, steps):
        begun.append(steps)
        advance(progress, steps)

    monkeypatch.setattr(loop.Progress, "advance", count)
    monkeypatch.setattr(preemption, "requested", lambda: sum(begun) >= step)


def test_stopped_and_killed_seeds_continue_with_the_same_bits(joint, tmp_path, monkeypatch):
    """Killed between the saves of two seeds: they go on from the newest step that both have."""
    with monkeypatch.context() as patch:
        stopped_at(6, patch)
        with pytest.raises(Preempted):
            loop.train(configuration(), tmp_path)
    summary = files.read_json(tmp_path / "summary.json")
    assert summary["status"] == "preempted"
    newest = checkpoint.whole_steps(tmp_path / "seed_3" / "checkpoints")
    assert newest[-1] == summary["step"] >= 6
    shutil.rmtree(tmp_path / "seed_4" / "checkpoints" / str(newest[-1]))
    loop.train(configuration(), tmp_path)
    workdir, _ = joint
    for seed in SEEDS:
        own, expected = tmp_path / f"seed_{seed}", workdir / f"seed_{seed}"
        assert (own / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
        for leaf, wanted in zip(*(jax.tree.leaves(final_state(one)) for one in (own, expected)), strict=True):
            np.testing.assert_array_equal(leaf, wanted)
    shutil.rmtree(tmp_path / "seed_4" / "checkpoints")
    with pytest.raises(CheckpointError, match="no step is whole in the checkpoints of all seeds"):
        loop.train(configuration(), tmp_path)


def test_vectorized_seeds_give_the_same_numbers(single, tmp_path, monkeypatch):
    """In the first two steps; rounding grows in those that follow."""
    with backend.as_accelerator(), monkeypatch.context() as patch:
        stopped_at(2, patch)
        with pytest.raises(Preempted):
            loop.train(configuration(**{"subnetworks.execution": "loop"}), tmp_path)
    for seed in SEEDS:
        line, expected = (
            read_metrics(one / "metrics.jsonl")[0][0] for one in (tmp_path / f"seed_{seed}", single[seed][0])
        )
        assert line.keys() == expected.keys()
        assert line["step"] == 2
        for name in line.keys() - {"split"}:
            # Of the scores, one image of two batches, which may change sides.
            atol = 1.01 / (2 * 128) if name.endswith(("top1", "top5", "ece")) else 1e-4
            np.testing.assert_allclose(line[name], expected[name], rtol=1e-3, atol=atol, err_msg=name)


def test_vectorized_step_in_float64():
    """Two states and two batches at once, and one after the other."""
    experiment = Experiment(configuration(1), data.load(digits.get_config().data))
    made = experiment.method
    views = (made.subnetworks.num,) if made.views else ()
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):

        def double(x):
            return x.astype("float64") if jax.numpy.issubdtype(x.dtype, jax.numpy.floating) else x

        states = [
            jax.tree.map(
                double, steps.create_state(made, experiment.optimizers, jax.random.key(seed), (8, 8, 3))
            )
            for seed in SEEDS
        ]
        batches = [
            {"image": rng.normal(size=(*views, 8, 8, 8, 3)), "label": rng.integers(10, size=8)} for _ in SEEDS
        ]

        def step(own):
            return steps.train_step(*own, method=made, optimizers=experiment.optimizers, steps_per_epoch=11)

        pairs = list(zip(states, batches, strict=True))
        stacked = jax.tree.map(lambda *x: jax.numpy.stack(x), *pairs)
        with backend.as_accelerator():
            runner = Parallel("shard_map", num_devices=1, num_seeds=2)
            together = runner.map(step, (OWN,))(stacked)
        for index, pair in enumerate(pairs):
            alone = jax.jit(step)(pair)
            for actual, expected in zip(
                jax.tree.leaves((together.params, together.opt_state, together.model_state)),
                jax.tree.leaves((alone.params, alone.opt_state, alone.model_state)),
                strict=True,
            ):
                np.testing.assert_allclose(actual[index], expected, rtol=1e-9, atol=1e-10)


def test_a_seed_that_diverges_is_named_and_ends_all(tmp_path):
    config = digits.get_config("network=tiny,method=independent,epochs=2")
    config.update(seed=SEEDS[0], num_seeds=2, batch_size=128, log_every_steps=2)
    config.subnetworks.num = 1
    config.optimizer.learning_rate = 1e30
    with pytest.raises(NonFiniteError, match=r"lower config.optimizer.learning_rate"):
        loop.train(config, tmp_path)
    summaries = [files.read_json(tmp_path / f"seed_{seed}" / "summary.json") for seed in SEEDS]
    assert [one["status"] for one in summaries] == ["diverged", "preempted"]
    assert files.read_json(tmp_path / "summary.json")["status"] == "diverged"


def test_one_checkpoint_is_too_few():
    with pytest.raises(ConfigError, match=r"config.checkpoint.keep must be at least 2 with several seeds"):
        config_lib.check(configuration(**{"checkpoint.keep": 1}))


def test_streamed_data_is_refused():
    config = configuration(**{"data.streaming": True, "data.image_size": 8})
    with pytest.raises(ConfigError, match=r"config.num_seeds=2 shares a dataset in memory"):
        config_lib.check(config)


def test_the_command_shows_mean_and_deviation(tmp_path, capsys, monkeypatch):
    def trained(config, workdir):
        assert config.num_seeds == 3
        return {"status": "completed", "predictors": {"sub_0": {"top1": [0.5, 0.6, 0.7]}}}

    monkeypatch.setattr(loop, "train", trained)
    argv = ["main", "--config.num_seeds=3", "--config.seed=2"]
    monkeypatch.setattr("sys.argv", argv)
    main.command(argv)
    output = capsys.readouterr().out
    assert "sub_0 60.00 ± 10.00 %" in output
    assert "runs/digits_ffl_resnet8_seeds2-4" in output


def test_the_report_takes_the_seeds(joint, tmp_path):
    """What real runs record is what the report reads."""
    workdir, summary = joint
    report.write([workdir], tmp_path)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = {row["prediction"]: row for row in csv.DictReader(file)}
    assert rows.keys() == summary["predictors"].keys()
    for name, row in rows.items():
        for key in ("top1", "top5", "nll", "ece"):
            values = summary["predictors"][name][key]
            np.testing.assert_allclose(float(row[f"{key}_mean"]), np.mean(values))
            np.testing.assert_allclose(float(row[f"{key}_std"]), np.std(values, ddof=1))
        best = [one["predictors"][name]["top1"] for one in summary["best"]]
        np.testing.assert_allclose(float(row["validation_chosen_top1_mean"]), np.mean(best))
        assert (row["dataset"], row["method"], row["seeds"], row["epochs"]) == ("digits", "kdcl", "3 4", "2")
    text = (tmp_path / "report.md").read_text()
    assert "damaged" not in text
    assert (tmp_path / "digits_curves.png").exists()
