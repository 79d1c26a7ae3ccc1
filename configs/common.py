"""What all experiments start from: FFL's published CIFAR recipe, on the method and networks that ARG picks.

ARG is what stands after the colon of `--config=configs/DATA.py:ARG`, such as
`method=ffl,network=resnet20+resnet32,epochs=60`; every other key can be set by `--config.KEY=VALUE`.
"""

import os

from ml_collections import ConfigDict

from ffl_jax import methods
from ffl_jax.errors import ConfigError
from ffl_jax.models import NETWORKS
from ffl_jax.registry import nearest
from ffl_jax.training.config import flatten, stretch

RECIPES = ("published", "common")
OPTIMISATION = ("epochs", "batch_size", "optimizer", "data")  # what "common" leaves out of a method's recipe


def get_config(
    arg: str | None = None, data: str = "cifar10", standard: dict | None = None, **presets: str | int
) -> ConfigDict:
    """The configuration for a config file to complete.

    Args:
      arg: the text after the colon; its keys are `method`, `network`, `epochs` and `recipe`. `recipe` is
        "published" (the default: what the method's authors used) or "common" (the same for every method, for
        comparisons on equal terms). Ramps and decays are stretched to `epochs`; `--config.epochs` would leave
        them where they are.
      data: the config file's name, for recipes that differ between datasets.
      standard: {key: value} of the dataset's common recipe that differ from the one below, also `epochs`.
      **presets: the file's own defaults for the keys of `arg`.
    """
    presets = {"method": "ffl", "network": "resnet32", "epochs": "", "recipe": "published"} | presets
    for item in filter(None, (arg or "").split(",")):
        key, _, value = item.partition("=")
        if key not in presets or not value:
            raise ConfigError(f"preset {item!r} after the colon: {nearest(key, presets)} Write key=value.")
        presets[key] = value
    if not str(presets["epochs"] or 1).isdecimal():
        raise ConfigError(f"preset epochs={presets['epochs']} after the colon is not a whole number.")
    if presets["recipe"] not in RECIPES:
        raise ConfigError(f"preset recipe={presets['recipe']}: {nearest(presets['recipe'], RECIPES)}")
    method = methods.METHODS.lookup(presets["method"])
    least, most = method.num
    networks = presets["network"].split("+")
    same = len(set(networks)) == 1

    config = ConfigDict()
    config.seed = 0
    config.num_seeds = 1  # runs side by side in one program: seeds seed, seed + 1, …
    config.epochs = 300
    config.batch_size = 128  # of all devices together
    config.accumulate = 1  # parts that the batch is taken in, one after another, to save memory
    config.precision = "float32"  # or bfloat16, for all but parameters, batch statistics and losses
    config.method = {"name": presets["method"], **methods.hyper_parameters(presets["method"])}
    config.subnetworks = {
        "network": networks[0] if same else presets["network"],
        "num": len(networks) if len(networks) > 1 else max(least, min(2, most or 2)),
        "shared_stages": 0,  # stem and that many stages exist once; 0: K separate networks
        "execution": "auto",  # of copies of one network: loop, vmap, or the faster one by measurement
        "remat": False,  # True: less memory, a third more work
    }
    if same and method.shares_trunk:
        config.subnetworks.shared_stages = NETWORKS.lookup(networks[0])(num_classes=2).num_stages - 1
    if methods.takes_teachers(presets["method"]):
        config.teachers = {
            "network": networks[0],  # or one for each, with + between them
            "num": 1,
            "runs": (),  # finished runs, "DIR" or "DIR:PREDICTION", one for each; () trains them first
            "epochs": 0,  # of each; 0: as many as the student
            "generations": 1,  # 2: the teachers are students of teachers themselves, and so on
        }
    config.optimizer = {
        "name": "sgd",  # or adam
        "learning_rate": 0.1,
        "weight_decay": 1e-4,
        "momentum": 0.9,
        "nesterov": True,
        "beta1": 0.9,
        "beta2": 0.999,
        "schedule": "step",  # or cosine, constant
        "decay_epochs": (150, 225),
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
        "image_size": 0,  # resize the shorter side, crop the centre; 0 takes images as they are
        "streaming": False,  # True: read and decode on demand, for datasets that do not fit in memory
        "workers": min(32, max(1, (os.cpu_count() or 2) - 1)),  # streaming: processes; 0: this one
        "validation_examples": 0,  # carved from the training split; the best epoch is chosen on them
        "crop": "pad",  # then cut at random places; or resized: random parts, streaming only
        "pad": 4,
        "pad_mode": "reflect",  # or zero
        "flip": True,
        "mean": (),  # of the channels, 0..1; () computes mean and std from the training split
        "std": (),
    }
    config.evaluation = {"batch_size": 500, "every_epochs": 1}
    config.checkpoint = {"every_epochs": 1, "every_steps": 0, "keep": 2}
    config.log_every_steps = 100  # a line of metrics.jsonl at least at the end of each epoch
    config.log_histograms = False  # True: of all parameters at every evaluation, in TensorBoard
    config.wandb = ""  # a project of Weights & Biases to show the run in; needs `pip install wandb`
    config.parallel = {
        "mode": "pmap",  # or shard_map, which the last two need
        "num_devices": 0,  # 0: all visible devices
        "subnetworks": 1,  # devices over which the sub-networks are spread
        "seeds": 1,  # devices over which the runs are spread
    }

    # What the dataset and the method want otherwise, each stated for a run of its own length.
    standard = {"epochs": config.epochs} | (standard or {})
    recipe = {"epochs": standard["epochs"]} | method.recipe(data)
    if len(networks) > 1:
        recipe = {key: value for key, value in recipe.items() if not key.startswith("subnetworks.")}
    published = {key: value for key, value in recipe.items() if key.split(".")[0] in OPTIMISATION}
    if presets["recipe"] == "common":
        recipe = {key: value for key, value in recipe.items() if key not in published}
    epochs = int(presets["epochs"] or recipe.get("epochs", standard["epochs"]))
    base = {"optimizer": config.optimizer.to_dict(), "method": config.method.to_dict()}
    settings = stretch(flatten(base), epochs, config.epochs)
    settings |= stretch(standard, epochs, standard["epochs"]) | stretch(recipe, epochs, published["epochs"])
    config.update_from_flattened_dict(settings | {"epochs": epochs})
    return config
