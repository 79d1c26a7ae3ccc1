"""What all experiments start from: FFL's published CIFAR recipe, on the method and networks that ARG picks.

ARG is what stands after the colon of `--config=configs/DATA.py:ARG`, such as
`method=ffl,network=resnet20+resnet32,epochs=60`; every other key can be set by `--config.KEY=VALUE`.
"""

from ml_collections import ConfigDict

from ffl_jax import methods
from ffl_jax.errors import ConfigError
from ffl_jax.models import NETWORKS
from ffl_jax.registry import nearest


def get_config(arg: str | None = None, **presets: str | int) -> ConfigDict:
    """The configuration for a config file to complete.

    Args:
      arg: the text after the colon; its keys are `method`, `network` and `epochs`. The recipe's ramp-up and
        decays are stretched to `epochs`; `--config.epochs` would leave them where they are.
      **presets: the file's own defaults for these keys.
    """
    presets = {"method": "ffl", "network": "resnet32", "epochs": 300} | presets
    for item in filter(None, (arg or "").split(",")):
        key, _, value = item.partition("=")
        if key not in presets or not value:
            raise ConfigError(f"preset {item!r} after the colon: {nearest(key, presets)} Write key=value.")
        presets[key] = value
    if not str(presets["epochs"]).isdecimal():
        raise ConfigError(f"preset epochs={presets['epochs']} after the colon is not a whole number.")
    epochs = int(presets["epochs"])
    networks = presets["network"].split("+")
    same = len(set(networks)) == 1

    config = ConfigDict()
    config.seed = 0
    config.epochs = epochs
    config.batch_size = 128  # of all devices together
    config.method = {"name": presets["method"], **methods.hyper_parameters(presets["method"])}
    config.subnetworks = {
        "network": networks[0] if same else presets["network"],
        "num": max(2, len(networks)),
        "shared_stages": 0,  # stem and that many stages exist once; 0: K separate networks
        "vectorize": False,  # True: vmap over the sub-networks, for accelerators
    }
    if "rampup_epochs" in config.method:
        config.method.rampup_epochs = float(round(epochs * 80 / 300))
    if same:  # the rule of the released code: all but the last stage
        config.subnetworks.shared_stages = NETWORKS.lookup(networks[0])(num_classes=2).num_stages - 1
    config.optimizer = {
        "name": "sgd",  # or adam
        "learning_rate": 0.1,
        "weight_decay": 1e-4,
        "momentum": 0.9,
        "nesterov": True,
        "beta1": 0.9,
        "beta2": 0.999,
        "schedule": "step",  # or cosine, constant
        "decay_epochs": tuple(sorted({epochs // 2, epochs * 3 // 4} - {0})),
        "decay_factor": 0.1,
        "warmup_epochs": 0.0,
    }
    # (regex over "objective/parameter/path", settings that differ); the first that matches counts.
    config.optimizer_rules = ()
    config.data = {
        "name": "",
        "data_dir": "",  # folder: the root of the tree; TFDS: where datasets are prepared, "" for its default
        "manual_dir": "",  # TFDS: files downloaded by hand, to prepare without a network
        "cache_dir": "",  # decoded images; "" for the user's cache folder
        "image_size": 0,  # folder: resize the shorter side, crop the centre; 0 takes images as they are
        "validation_examples": 0,  # carved from the training split; the best epoch is chosen on them
        "pad": 4,
        "flip": True,
        "mean": (),  # of the channels, 0..1; () computes mean and std from the training split
        "std": (),
    }
    config.evaluation = {"batch_size": 500, "every_epochs": 1}
    config.checkpoint = {"every_epochs": 1, "every_steps": 0, "keep": 2}
    config.log_every_steps = 100  # a line of metrics.jsonl at least at the end of each epoch
    config.parallel = {"mode": "pmap", "num_devices": 0}  # or shard_map; 0: all visible devices
    if presets["method"] == "ffl":
        config.optimizer_rules = (("loss/fusion/.*", {"weight_decay": 1e-5}),)
    return config
