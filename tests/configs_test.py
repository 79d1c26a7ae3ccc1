"""The experiments' files and the domain of every value in them."""

import importlib
import json
import pathlib
import sys

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from configs import cifar10, cifar100, common, digits
from ffl_jax import methods
from ffl_jax.errors import ConfigError
from ffl_jax.training import config as config_lib
from ffl_jax.training import defaults

FOLDER = pathlib.Path(cifar100.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("common", "__init__"))


def load(name, arg=None):
    return importlib.import_module(f"configs.{name}").get_config(arg)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_gives_a_configuration_that_a_run_can_have(name):
    config = load(name)
    assert isinstance(config, ml_collections.ConfigDict)
    config_lib.check(config)
    assert config.method.name == "ffl"
    assert config.data.name
    method = methods.build(config, 10)
    assert method.subnetworks.num == config.subnetworks.num == 2
    assert method.temperature == 3


@pytest.mark.parametrize("name", NAMES)
def test_every_file_says_how_to_run_it_and_is_short(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert f"configs/{name}.py" in text or "./launch/" in text
    assert len(text.splitlines()) <= 40


@pytest.mark.parametrize("name", NAMES)
def test_presets_choose_other_networks(name):
    config = load(name, "method=ffl,network=resnet20+resnet32")
    config_lib.check(config)
    assert config.subnetworks.network == "resnet20+resnet32"
    assert config.subnetworks.num == 2
    assert config.subnetworks.shared_stages == 0
    assert [methods.build(config, 10).subnetworks.member(k).blocks for k in range(2)] == [3, 5]


@pytest.mark.parametrize(
    ("arg", "network", "num", "shared_stages"),
    [
        ("network=resnet56", "resnet56", 2, 2),
        ("network=resnet20+resnet20+resnet20", "resnet20", 3, 2),
        ("network=resnet18", "resnet18", 2, 3),
        ("network=resnet8+resnet14+resnet20", "resnet8+resnet14+resnet20", 3, 0),
        ("", "resnet32", 2, 2),
    ],
)
def test_equal_networks_share_all_but_the_last_stage(arg, network, num, shared_stages):
    subnetworks = cifar100.get_config(arg).subnetworks
    actual = (subnetworks.network, subnetworks.num, subnetworks.shared_stages)
    assert actual == (network, num, shared_stages)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("network=resnet33", r"unknown network 'resnet33'.*resnet32"),
        ("netwrk=resnet32", r"netwrk=resnet32.*network"),
        ("network=", "network="),
        ("resnet32", "key=value"),
        ("method=fll", r"unknown method 'fll'.*ffl"),
        ("recipe=fair", r"recipe=fair.*common, finetune, modern, published"),
        ("epochs=ten", "epochs=ten"),
    ],
)
def test_wrong_presets(arg, message):
    with pytest.raises(ConfigError, match=message):
        cifar100.get_config(arg)


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_modern_recipes_hold_for_every_method(name):
    """What a method cannot do without stays."""
    own = cifar100.get_config(f"method={name},recipe=common,epochs=300")
    for recipe, rules in (("modern", 1), ("finetune", 0)):
        config = cifar100.get_config(f"method={name},recipe={recipe},epochs=300")
        config_lib.check(config)
        assert config.optimizer_rules[: len(own.optimizer_rules)] == own.optimizer_rules
        assert len(config.optimizer_rules) == len(own.optimizer_rules) + rules
        assert (config.method, config.subnetworks) == (own.method, own.subnetworks)
    assert (config.optimizer.clip_norm, config.optimizer.name, config.optimizer.weight_decay) == (1, "sgd", 0)
    assert config.optimizer.learning_rate == pytest.approx(0.0025)  # 0.01 of 512, for 128


def test_the_modern_recipe_is_that_of_deit():
    config = cifar100.get_config("recipe=modern")
    assert (config.epochs, config.label_smoothing, config.data.policy, config.data.erasing) == (
        *(300, 0.1, "trivial", 0.25),
    )
    optimizer, mixing = config.optimizer, config.mixing
    assert (optimizer.name, optimizer.weight_decay, optimizer.schedule) == ("adamw", 0.05, "cosine")
    assert (optimizer.learning_rate, optimizer.warmup_epochs) == (pytest.approx(5e-4 / 4), 5)
    assert (mixing.mixup_alpha, mixing.cutmix_alpha, mixing.probability, mixing.cutmix_share) == (
        0.8,
        1,
        1,
        0.5,
    )
    shorter = cifar100.get_config("recipe=modern,epochs=60")
    assert (shorter.epochs, shorter.optimizer.warmup_epochs, shorter.method.rampup_epochs) == (60, 1, 16)
    # Its batch is 64, and its images are not flipped.
    config = digits.get_config("recipe=modern")
    assert (config.epochs, config.batch_size, config.data.flip) == (20, 64, False)
    assert config.optimizer.learning_rate == pytest.approx(5e-4 / 8)


@pytest.mark.parametrize("module", [cifar10, cifar100])
def test_cifar_follows_the_published_recipe(module):
    """Read in the released code, which has CIFAR-100 alone; CIFAR-10 takes all but the channels' values."""
    config = module.get_config()
    assert config.epochs == 300
    assert config.batch_size == 128
    assert config.subnetworks.to_dict() == {
        **{"network": "resnet32", "num": 2, "shared_stages": 2, "execution": "auto", "remat": False},
        **{"start": (), "start_digests": (), "freeze_epochs": 0.0, "statistics": "adapted"},
        **{"dropout": 0.0, "drop_path": 0.0, "limbs": ()},
    }
    assert config.method.to_dict() == {
        "name": "ffl",
        "temperature": 3.0,
        "rampup_epochs": 80.0,
        "kd_mode": "mkd",
        "smoothing": 1e-7,
        "fusion_features": 0,
    }
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.momentum) == ("sgd", 0.1, 0.9)
    assert optimizer.nesterov is True
    assert optimizer.weight_decay == 1e-4
    assert (optimizer.schedule, tuple(optimizer.decay_epochs), optimizer.decay_factor) == (
        "step",
        (150, 225),
        0.1,
    )
    assert optimizer.warmup_epochs == 0
    ((pattern, overrides),) = config.optimizer_rules
    assert (pattern, dict(overrides)) == ("loss/fusion/.*", {"weight_decay": 1e-5})
    assert (config.data.pad, config.data.flip) == (4, True)


def test_cifar_channels():
    assert cifar100.get_config().data.name == "cifar100"
    assert cifar100.get_config().data.mean == pytest.approx((0.507059, 0.486667, 0.440784), abs=1e-6)
    assert cifar100.get_config().data.std == pytest.approx((0.267451, 0.256471, 0.276078), abs=1e-6)
    assert cifar10.get_config().data.name == "cifar10"
    # 125.3, 123.0, 113.9 and 63.0, 62.1, 66.7 of 255.
    assert cifar10.get_config().data.mean == pytest.approx((0.491373, 0.482353, 0.446667), abs=1e-6)
    assert cifar10.get_config().data.std == pytest.approx((0.247059, 0.243529, 0.261569), abs=1e-6)


@pytest.mark.parametrize(
    ("module", "arg", "std"),
    [  # ONE's script has these for both, FFSD's first revision for CIFAR-10; the others have the dataset's.
        (cifar100, "method=one", (0.2023, 0.1994, 0.2010)),
        (cifar10, "method=one", (0.2023, 0.1994, 0.2010)),
        (cifar10, "method=ffsd", (0.2023, 0.1994, 0.2010)),
        (cifar100, "method=ffsd", (0.267451, 0.256471, 0.276078)),
        (cifar100, "method=one,recipe=common", (0.267451, 0.256471, 0.276078)),
        (cifar10, "method=ffsd,recipe=common", (0.247059, 0.243529, 0.261569)),
    ],
)
def test_channels_of_a_method_of_its_own(module, arg, std):
    data = module.get_config(arg).data
    assert data.std == pytest.approx(std, abs=1e-6)
    own = std[0] == 0.2023
    assert (data.mean == (0.4914, 0.4822, 0.4465)) == own


def test_digits_are_not_flipped():
    assert digits.get_config().data.flip is False
    assert load("svhn").data.flip is False


@pytest.fixture
def parse(monkeypatch):
    """The configuration that flags give: locked."""

    def read(*arguments):
        argv = ["program", f"--config={FOLDER / 'digits.py'}", *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
        values(argv)
        return values.config

    return read


def test_overrides_change_a_value(parse):
    config = parse("--config.method.temperature=2.5", "--config.optimizer.decay_epochs=(3,4)")
    assert config.method.temperature == 2.5
    assert config.optimizer.decay_epochs == (3, 4)


@pytest.mark.parametrize("key", ["epoch", "optimizer.learnin_rate", "method.temprature", "data.batch_size"])
def test_unknown_keys_are_refused(parse, key):
    with pytest.raises((AttributeError, KeyError)):
        parse(f"--config.{key}=1")
    config = parse()
    *path, last = key.split(".")
    for name in path:
        config = config[name]
    with pytest.raises((AttributeError, KeyError)):  # by code, too
        setattr(config, last, 1)


@pytest.mark.parametrize(("key", "value"), [("epochs", "many"), ("optimizer.learning_rate", "high")])
def test_values_of_another_type_are_refused(parse, key, value):
    with pytest.raises((TypeError, ValueError, flags.Error)):
        parse(f"--config.{key}={value}")


def changed(key, value):
    config = digits.get_config()
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({key: value})
    return config


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("seed", [-1, 2**32]),
        ("epochs", [0, -3]),
        ("batch_size", [0, -64]),
        ("log_every_steps", [0]),
        ("evaluation.batch_size", [0]),
        ("evaluation.every_epochs", [0]),
        ("checkpoint.every_epochs", [0]),
        ("checkpoint.every_steps", [-1]),
        ("checkpoint.keep", [0]),
        ("data.pad", [-1]),
        ("data.image_size", [-8]),
        ("data.validation_examples", [-1]),
        ("subnetworks.num", [1, 0, -2]),
        ("subnetworks.shared_stages", [-1]),
        ("parallel.num_devices", [-1]),
        ("method.rampup_epochs", [-1.0, float("nan"), float("inf")]),
        ("method.temperature", [0.0, -3.0, float("nan"), float("inf")]),
        ("optimizer.name", ["adagrad"]),
        ("optimizer.schedule", ["exponential"]),
        ("optimizer.learning_rate", [0.0, -0.1, float("nan"), float("inf")]),
        ("optimizer.weight_decay", [-1e-4, float("nan")]),
        ("optimizer.warmup_epochs", [-1.0]),
        ("optimizer.momentum", [1.0, -0.1]),
        ("optimizer.beta1", [1.0]),
        ("optimizer.beta2", [-0.5]),
        ("optimizer.decay_factor", [0.0, 2.0]),
        ("optimizer.decay_epochs", [(225, 150), (0,)]),
        ("data.mean", [(0.5,), (0.1, 0.2, 0.3, 0.4)]),
        ("data.std", [(0.5, 0.5)]),
    ],
)
def test_values_out_of_their_domain_are_refused(key, values):
    for value in values:
        with pytest.raises(ConfigError) as error:
            config_lib.check(changed(key, value))
        assert key in str(error.value)
        assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.5, 0.5, 0.5), ()),
        ((), (0.5, 0.5, 0.5)),
        ((0.5, 0.5, 0.5), (0.5, 0.0, 0.5)),
    ],
)
def test_mean_and_std_go_together(mean, std):
    config = changed("data.mean", mean)
    config.data.std = std
    with pytest.raises(ConfigError, match=r"config\.data.*mean and std"):
        config_lib.check(config)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.5, 0.5, 0.5), (0.5, 0.5, -0.5)),
        ((0.5, 0.5, 0.5), (0.5, float("nan"), 0.5)),
        ((0.5, float("inf"), 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_mean_and_std_are_finite(mean, std):
    config = changed("data.mean", mean)
    config.data.std = std
    with pytest.raises(ConfigError, match=r"config\.data"):
        config_lib.check(config)


@pytest.mark.parametrize(("key", "value"), [("method.smoothing", -1e-7), ("method.fusion_features", -1)])
def test_settings_of_the_method_out_of_their_domain_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        config_lib.check(changed(key, value))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer_rules", (("loss/.*", {"decay": 1.0}),), "unknown setting 'decay'"),
        ("optimizer_rules", (("loss/.*", {"weight_decay": -1.0}),), "weight_decay must be .* got -1.0"),
        ("subnetworks.network", "resnet8+resnet14+resnet20", "lists 3 networks, but num=2"),
    ],
)
def test_rules_and_networks_are_checked(key, value, message):
    with pytest.raises(ConfigError, match=message):
        config_lib.check(changed(key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method.rampup_epochs", 0.0),
        ("data.pad", 0),
        ("checkpoint.every_steps", 5),
        ("optimizer.momentum", 0.0),
        ("optimizer.weight_decay", 0.0),
        ("optimizer.decay_factor", 1.0),
        ("optimizer.decay_epochs", ()),
        ("optimizer_rules", ()),
        ("seed", 0),
    ],
)
def test_values_at_the_edge_are_allowed(key, value):
    config_lib.check(changed(key, value))


@pytest.mark.parametrize("name", NAMES)
def test_json_and_back(name):
    config = load(name)
    values = json.loads(json.dumps(config_lib.to_json(config)))
    again = config_lib.from_json(values)
    assert again.to_dict() == config.to_dict()
    assert config_lib.to_json(again) == values
    assert isinstance(again.optimizer.decay_epochs, tuple)
    config_lib.check(again)


def test_flatten():
    assert defaults.flatten({"a": {"b": 1, "c": {"d": (2,)}}, "e": 3}) == {"a.b": 1, "a.c.d": (2,), "e": 3}


FREE = {
    "modules": ("json",),
    "epochs": 500,
    "log_every_steps": 1,
    "log_histograms": True,
    "wandb": "project",
    "evaluation.batch_size": 7,
    "evaluation.every_epochs": 2,
    "evaluation.patience": 3,
    "checkpoint.every_steps": 9,
    "checkpoint.keep": 5,
    "parallel.mode": "shard_map",
    "parallel.num_devices": 1,
    "parallel.subnetworks": 2,
    "parallel.seeds": 2,
    "data.title": "mine",
    "data.data_dir": "elsewhere",
    "data.manual_dir": "elsewhere",
    "data.cache_dir": "elsewhere",
    "data.cache_gigabytes": 9.0,
    "data.accept_changes": True,
    "data.workers": 3,
    "subnetworks.execution": "loop",
    "subnetworks.remat": True,
    "subnetworks.start": ("other.safetensors",),
}


def test_fixed_part():
    """Every key but the free ones must stay when a run continues."""
    config = cifar100.get_config()
    expected = config_lib.fixed_part(config_lib.to_json(config))
    for key, value in defaults.flatten(config.to_dict()).items():
        other = cifar100.get_config()
        with other.unlocked(), other.ignore_type():
            change = "dml" if key == "method.name" else FREE.get(key, f"not {value}")
            other.update_from_flattened_dict({key: change})
        same = config_lib.fixed_part(config_lib.to_json(other)) == expected
        assert same == (key in FREE or key == "checkpoint.every_epochs"), key


def test_the_end_of_a_cosine_schedule_is_fixed():
    config, other = digits.get_config(), digits.get_config()
    assert config.optimizer.schedule == "cosine"
    other.epochs += 1
    parts = [config_lib.fixed_part(config_lib.to_json(one)) for one in (config, other)]
    assert parts[0] != parts[1]


def test_common_takes_presets_of_a_file():
    assert common.get_config(None, network="resnet8").subnetworks.network == "resnet8"
    assert common.get_config("network=resnet14", network="resnet8").subnetworks.network == "resnet14"


@pytest.mark.parametrize("epochs", [300, 60, 7, 1])
def test_stretch_follows_in_proportion(epochs):
    values = {
        "rampup_epochs": 80.0,
        "every_epochs": 5,
        "learning_rate": 0.1,
        "optimizer": {"decay_epochs": (150, 225)},
        "optimizer_rules": (("a/.*", {"decay_epochs": (75,), "learning_rate": 1.0}),),
    }
    expected = {
        300: (80.0, (150, 225), (75,)),
        60: (16.0, (30, 45), (15,)),
        7: (2.0, (3, 5), (1,)),
        1: (0.0, (), ()),
    }[epochs]
    actual = defaults.stretch(values, epochs, 300)
    assert actual == {
        "rampup_epochs": expected[0],
        "every_epochs": 5,
        "learning_rate": 0.1,
        "optimizer": {"decay_epochs": expected[1]},
        "optimizer_rules": (("a/.*", {"decay_epochs": expected[2], "learning_rate": 1.0}),),
    }


class Recipe(methods.Method):
    """A method with a recipe of 200 epochs."""

    warmup_epochs: float = 30.0

    num = (3, None)

    @classmethod
    def recipe(cls, data):
        assert data == "somewhere"
        return {
            "epochs": 200,
            "optimizer.decay_epochs": (50, 100),
            "data.pad_mode": "zero",
            "batch_size": 64,
            "subnetworks.num": 4,
            "optimizer_rules": (("loss/.*", {"decay_epochs": (100,)}),),
        }


@pytest.mark.parametrize(
    ("arg", "epochs", "decays", "rule_decays", "warmup", "pad_mode", "batch_size", "num"),
    [
        ("", 200, (50, 100), (100,), 20.0, "zero", 64, 4),
        ("epochs=20", 20, (5, 10), (10,), 2.0, "zero", 64, 4),
        ("recipe=common", 300, (150, 225), (150,), 30.0, "reflect", 128, 4),
        ("recipe=common,epochs=30", 30, (15, 22), (15,), 3.0, "reflect", 128, 4),
        ("network=resnet8+resnet14+resnet20", 200, (50, 100), (100,), 20.0, "zero", 64, 3),
    ],
)
def test_recipes(monkeypatch, arg, epochs, decays, rule_decays, warmup, pad_mode, batch_size, num):
    monkeypatch.setitem(methods.METHODS, "recipe", Recipe)
    config = common.get_config(arg, "somewhere", method="recipe")
    actual = (config.epochs, config.optimizer.decay_epochs, config.optimizer_rules[0][1]["decay_epochs"])
    assert actual == (epochs, decays, rule_decays)
    assert (config.method.warmup_epochs, config.data.pad_mode) == (warmup, pad_mode)
    assert (config.batch_size, config.subnetworks.num) == (batch_size, num)


def test_a_dataset_with_a_standard_of_its_own():
    standard = {"epochs": 90, "optimizer.decay_epochs": (30, 60), "batch_size": 256}
    config = common.get_config("method=ffl,network=resnet18", "imagenet", standard)
    assert (config.epochs, config.optimizer.decay_epochs, config.batch_size) == (90, (30, 60), 256)
    assert config.method.rampup_epochs == 24  # 80 of 300
    config = common.get_config("epochs=30", "imagenet", standard)
    assert (config.epochs, config.optimizer.decay_epochs) == (30, (10, 20))
