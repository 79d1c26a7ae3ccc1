import copy
import pathlib

import numpy as np
import pytest

from configs import digits
from ffl_jax import data
from ffl_jax.errors import CheckpointError, ConfigError, DatasetError
from ffl_jax.training import config as config_lib
from ffl_jax.training.experiment import RUN_FORMAT, Experiment, check_belongs, resolve


def make_dataset(count=100):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(count, 8, 8, 3)).astype(np.uint8) // np.array([1, 2, 4], np.uint8)
    split = data.Split(images, (np.arange(count) % 10).astype(np.int32))
    return data.Dataset("toy", split, split, tuple("abcdefghij"), "0123456789abcdef")


def test_mean_and_std_are_those_of_the_training_split():
    dataset = make_dataset()
    config = resolve(digits.get_config(), dataset)
    pixels = dataset.train.images.reshape(-1, 3).astype(np.float64) / 255
    np.testing.assert_allclose(config.data.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(config.data.std, pixels.std(0), rtol=1e-10)


def test_given_mean_and_std_stay():
    config = digits.get_config()
    config.data.mean, config.data.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    resolved = resolve(config, make_dataset())
    assert (resolved.data.mean, resolved.data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_images_of_one_colour_have_a_std():
    black = data.Split(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int32))
    config = resolve(digits.get_config(), data.Dataset("black", black, black, ("a", "b"), ""))
    np.testing.assert_allclose(config.data.std, [1 / 255] * 3)


def test_runs_of_all_seeds_share_what_is_compiled():
    joint = Experiment(digits.get_config("network=tiny,method=independent"), make_dataset())
    one, other = joint.of_seed(1), joint.of_seed(2)
    assert one._create is other._create is joint._create
    assert one.abstract_state() is other.abstract_state()


def test_fewer_examples_than_a_batch():
    with pytest.raises(DatasetError, match=r"63 training examples .* now 64"):
        Experiment(digits.get_config(), make_dataset(63))


def test_padding_beyond_the_image():
    config = digits.get_config()
    config.data.pad = 8
    with pytest.raises(ConfigError, match=r"data\.pad=8 .* 8x8"):
        Experiment(config, make_dataset())


def test_check_belongs_lists_the_differences():
    experiment = Experiment(digits.get_config(), make_dataset())
    run = {
        "format": RUN_FORMAT,
        "versions": {},
        "config": config_lib.to_json(experiment.config),
        "dataset": {"fingerprint": experiment.dataset.fingerprint, "train_examples": 100},
    }
    where = pathlib.Path("checkpoints/5")
    check_belongs(run, experiment, where)
    free = copy.deepcopy(run)
    free["config"]["log_every_steps"] = 1
    free["config"]["parallel"]["mode"] = "shard_map"
    free["config"]["data"]["data_dir"] = "elsewhere"
    check_belongs(free, experiment, where)
    other = copy.deepcopy(run)
    other["config"]["method"]["temperature"] = 4.0
    other["dataset"] = {"fingerprint": "f" * 64, "train_examples": 99}
    with pytest.raises(
        CheckpointError, match=r"checkpoints/5 .*temperature: 4\.0 .* 3\.0 now; .*\(99 .*\(100\)"
    ):
        check_belongs(other, experiment, where)
    with pytest.raises(CheckpointError, match="format 0"):
        check_belongs(run | {"format": 0}, experiment, where)
