"""Configuration files and values that no run can have: one line, exit code 2, at once."""

import contextlib
import json
import os
import random
import time

import pytest

from configs import digits
from ffl_jax import main
from ffl_jax.errors import ConfigError
from ffl_jax.training import config as config_lib
from ffl_jax.training import defaults

BEGIN = "from configs import digits\ndef get_config(arg=None):\n    config = digits.get_config(arg)\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no function get_config(arg=None)"),
        ("get_config = 3", "has no function get_config(arg=None)"),
        ("def get_config(arg=None): pass", "get_config returned NoneType"),
        ("def get_config(arg=None): return {'epochs': 3}", "get_config returned dict"),
        ("def get_config(): return None", "returned NoneType"),
        (
            "from ml_collections import ConfigDict as C\nget_config = C",
            "config.method.name must name a method",
        ),
        (BEGIN + "    del config.data.pad\n    return config", "lacks config.data.pad: begin with"),
        (BEGIN + "    del config.data\n    return config", "lacks config.data.accept_changes"),
        (BEGIN + "    config.data = None\n    return config", "lacks config.data.accept_changes"),
        (BEGIN + "    config.epochs = '3'\n    return config", "file.py:4"),
        (
            BEGIN + "    config.unlock()\n    config.lerning_rate = 1.0\n    return config",
            "config.lerning_rate: did you mean optimizer.learning_rate?",
        ),
        (
            BEGIN + "    with config.ignore_type():\n        config.epochs = '3'\n    return config",
            "config.epochs must be a whole number, got '3'",
        ),
        (
            BEGIN + "    with config.ignore_type():\n        config.data.flip = 1\n    return config",
            "config.data.flip must be True or False, got 1",
        ),
        (
            BEGIN
            + "    with config.ignore_type():\n        config.optimizer.decay_epochs = 5\n    return config",
            "config.optimizer.decay_epochs must be a tuple, got 5",
        ),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        (BEGIN + "    raise SystemExit('away')", "SystemExit: away"),
        ("import no_such_package", "No module named 'no_such_package' ("),
        ("def get_config(:", "invalid syntax (file.py, line 1)"),
        ("\0\1\2", "null bytes"),
        ("# " + "x" * 2_000_000, "more than 1000000 bytes"),
        ("def get_config(arg=None): return get_config()", "RecursionError"),
    ],
)
def test_files(text, message, tmp_path):
    path = tmp_path / "file.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        main.parse(["main", f"--config={path}"])
    assert message in str(raised.value)
    assert str(path) in str(raised.value) or "config." in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("log_every_steps", 3_000_000_000, "must be below 2^31"),
        ("optimizer.decay_epochs", (1, 2**40), "must be below 2^31"),
        ("subnetworks.num", 100_000, "must be at most 128, got 100000"),
        ("num_seeds", 1_000_000, "must be at most 1024"),
        ("subnetworks.network", "resnet8+" * 5000 + "resnet8", "lists 5001 networks"),
        ("subnetworks.network", "", "unknown network ''"),
        ("subnetworks.network", "+", "unknown network ''"),
        ("method.kd_mode", "", "mkd, ens2fused"),
        ("data.validation_examples", -1, "not negative"),
        ("method.temperature", float("inf"), "must be finite"),
    ],
)
def test_values(key, value, message):
    config = digits.get_config()
    config.update_from_flattened_dict({key: value})
    began = time.monotonic()
    with pytest.raises(ConfigError) as raised:
        config_lib.check(config)
    assert message in str(raised.value)
    assert time.monotonic() - began < 5


def test_the_configuration_of_a_run_is_one(tmp_path):
    """All but what the command line says otherwise."""
    config = digits.get_config("method=ffsd,network=tiny")
    (tmp_path / "config.json").write_text(json.dumps(config_lib.to_json(config)))
    again = main.parse(["main", f"--config={tmp_path}/config.json", "--config.epochs=7"]).config
    config.epochs = 7
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"method": 3}', '{"method": {"name": []}}', "\0"])
def test_files_that_are_no_configuration_of_a_run(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError):
        main.parse(["main", f"--config={tmp_path}/x.json"])


def test_what_a_version_before_did_not_know_has_its_default():
    values = config_lib.to_json(digits.get_config())
    del values["accumulate"], values["method"]["smoothing"]
    assert config_lib.to_json(config_lib.from_json(values)) == config_lib.to_json(digits.get_config())


def test_random_values():
    """Any value under any key of any method gives a sound configuration or a `ConfigError`, in no time."""
    rng = random.Random(0)
    values = (
        *(None, True, -1, 0, 1, 3, 2**31, 2**63, 10**300, -0.0, 0.5, 1e-45, 1e39, float("nan"), float("inf")),
        *("", "0", "nan", "x" * 10_000, "é\n", "resnet8+resnet14", "../..", "\0", b"x", (), (1,), (0, 0, 0)),
        *(
            ("a", "b", "c"),
            (1, 2, 3),
            (3, 2),
            ((".*", {}),),
            (("(", {}),),
            (("", {"name": 3}),),
            {},
            {"a": 1},
        ),
        *([], [1.0], object(), (None,), ((".*", {"decay_epochs": 3}),), ((".*", {"learning_rate": "1"}),)),
    )
    methods = ("ffl", "kd", "feed", "afd", "kdcl", "mfef", "pcl", "okddip", "ffsd")
    for _ in range(2000 if os.environ.get("FFL_LONG_FAULTS") else 100):
        config = defaults.get_config(f"method={rng.choice(methods)},network=tiny", "digits")
        changes = {
            key: rng.choice(values)
            for key in rng.sample(sorted(defaults.flatten(config.to_dict())), rng.randint(1, 2))
        }
        with config.unlocked(), config.ignore_type():
            for key, value in changes.items():
                section, _, last = key.rpartition(".")
                (config[section] if section else config)[last] = value
        began = time.monotonic()
        with contextlib.suppress(ConfigError):
            config_lib.check(config)
        assert time.monotonic() - began < 5, changes
