"""What all experiments start from: every key of a configuration, with FFL's published CIFAR recipe."""

import os

from ml_collections import ConfigDict

from ffl_jax import methods
from ffl_jax.errors import ConfigError
from ffl_jax.models import NETWORKS
from ffl_jax.registry import nearest

# What `recipe=NAME` sets for every method. `rate` is the learning rate for a batch of 512, and goes with it.
_NO_DECAY = (("[^/]+/.*/(bias|scale)", {"weight_decay": 0.0}),)
MODERN = {
    # DeiT: Touvron et al., 2021, arXiv 2012.12877, table 9, without what is of its network (stochastic depth)
    # or repeats images; TrivialAugment in place of RandAugment, which it equals without a setting.
    "modern": {
        "epochs": 300,
        "rate": 5e-4,
        "optimizer.name": "adamw",
        "optimizer.weight_decay": 0.05,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_epochs": 5.0,
        "optimizer_rules": _NO_DECAY,
        "label_smoothing": 0.1,
        "mixing.mixup_alpha": 0.8,
        "mixing.cutmix_alpha": 1.0,
        "data.policy": "trivial",
        "data.erasing": 0.25,
    },
    # ViT: Dosovitskiy et al., 2021, arXiv 2010.11929, sec. B.1.1: SGD without weight decay, cosine, gradients
    # clipped to norm 1, the largest but one of its rates for small datasets; its 10,000 steps on CIFAR, with
    # its code's 500 of warm-up.
    "finetune": {
        "epochs": 100,
        "rate": 0.01,
        "optimizer.nesterov": False,
        "optimizer.weight_decay": 0.0,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_epochs": 5.0,
        "optimizer.clip_norm": 1.0,
    },
}
RECIPES = ("published", "common", *MODERN)
OPTIMISATION = ("epochs", "batch_size", "optimizer", "data")  # what "common" leaves out of a method's recipe


def every_key(method: str) -> ConfigDict:
    """All that a configuration of the method called `method` holds; each value is of its key's type."""
    least, most = methods.METHODS.lookup(method).num
    config = ConfigDict()
    config.modules = ()  # your own, to import: they register methods, networks and datasets
    config.seed = 0
    config.num_seeds = 1  # runs side by side in one program: seeds seed, seed + 1, …
    config.epochs = 300
    config.batch_size = 128  # of all devices together
    config.accumulate = 1  # parts that the batch is taken in, one after another, to save memory
    # Factors of the classes' cross-entropies: one number each, or ("balanced",): n / (C n_c) of the training
    # split.
    config.class_weights = ()
    config.label_smoothing = 0.0  # this share of a label is spread evenly over all classes
    config.mixing = {  # of pairs of images and their labels, the same for all views of an image
        "mixup_alpha": 0.0,  # above 0: mixup, with shares from Beta(alpha, alpha)
        "cutmix_alpha": 0.0,  # above 0: CutMix
        "probability": 1.0,  # that a batch is mixed
        "cutmix_share": 0.5,  # of the mixed batches, where both are on
    }
    # Above 0: averages of all that is trained, and of batch statistics, are predictions `ema_NAME` too.
    config.ema_decay = 0.0
    config.precision = "float32"  # or bfloat16, for all but parameters, batch statistics and losses
    config.method = {"name": method, **methods.hyper_parameters(method)}
    config.subnetworks = {
        "network": "resnet32",  # or one for each, with + between them
        "num": max(least, min(2, most or 2)),
        "shared_stages": 0,  # stem and that many stages exist once; 0: K separate networks
        "limbs": (),  # (2,): the next stage exists twice, which makes a tree of four branches
        "execution": "auto",  # of copies of one network: loop, vmap, or the faster one by measurement
        "remat": False,  # True: less memory, a third more work
        "start": (),  # weights to begin with, one for all or one for each: docs/finetune.md
        "start_digests": (),  # filled in by the run
        "freeze_epochs": 0.0,  # for so long all of the start but the heads stays as it is
        "statistics": "adapted",  # of the start's batch norms; or kept: they are used in training, and stay
        "dropout": 0.0,  # in training, of transformers
        "drop_path": 0.0,  # stochastic depth in training, of the last block of transformers and ConvNeXts
    }
    if methods.takes_teachers(method):
        config.teachers = {
            "network": "resnet32",  # as above
            "num": 1,
            "runs": (),  # finished runs, "DIR" or "DIR:PREDICTION", one for each; () trains them first
            "epochs": 0,  # of each; 0: as many as the student
            "generations": 1,  # 2: the teachers are students of teachers themselves, and so on
        }
    config.optimizer = _optimizer_keys()
    # (regex over "objective/parameter/path", settings that differ); the first that matches counts.
    config.optimizer_rules = ()
    config.data = _data_keys()
    config.evaluation = {
        "batch_size": 500,
        "every_epochs": 1,
        "patience": 0,  # evaluations without a better validation score that end training; 0: none do
    }
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
    return config


def _optimizer_keys() -> dict:
    return {
        "name": "sgd",  # or adam, adamw, lamb
        "learning_rate": 0.1,
        "weight_decay": 1e-4,
        "momentum": 0.9,
        "nesterov": True,
        "beta1": 0.9,
        "beta2": 0.999,
        "layer_decay": 1.0,  # the rate of each block is that of the next one, or of the head, times this
        "clip_norm": 0.0,  # an objective's gradient is scaled down to this norm; 0: never
        "schedule": "step",  # or cosine, constant
        "decay_epochs": (150, 225),
        "decay_factor": 0.1,
        "warmup_epochs": 0.0,
    }


def _data_keys() -> dict:
    return {
        "name": "",
        "title": "",  # in tables, cards and names of runs; "" for the name, or the folder's
        "data_dir": "",  # folder: the tree, or a file .npz, .csv, .parquet; TFDS: where datasets are prepared
        "manual_dir": "",  # TFDS: files downloaded by hand, to prepare without a network
        "cache_dir": "",  # decoded images; "" for the user's cache folder
        "cache_gigabytes": 50.0,  # of decoded images there; those that are used least go
        "image_key": "",  # column of paths in a table, "" for path; feature of a TFDS dataset with several
        "label_key": "",  # column of classes in a table, "" for label; feature of a TFDS dataset with several
        "split_key": "",  # column of a table that says train, test or val, "" for split
        "image_size": 0,  # resize the shorter side, crop the centre; 0 takes images as they are
        "max_value": 65535,  # of greys with more than 8 bits: 4095 where 12 bits are used; it becomes white
        "accept_changes": False,  # True: a run continues with a dataset whose images have changed
        "streaming": False,  # True: read and decode on demand, for datasets that do not fit in memory
        "workers": min(32, max(1, (os.cpu_count() or 2) - 1)),  # streaming: processes; 0: this one
        "test_fraction": 0.0,  # of the training images of each class, where there is no test split
        "validation_examples": 0,  # carved from the training split; the best epoch is chosen on them
        "validation_fraction": 0.0,  # the same, of the training images of each class
        "missing_classes": False,  # True: test and validation images may lack some classes
        "sampling": "shuffled",  # or balanced: each class equally often, in as many steps
        "crop": "pad",  # then cut at random places; or resized: random parts, streaming only
        "pad": 4,
        "pad_mode": "reflect",  # or zero
        "flip": True,
        "policy": "none",  # or trivial: TrivialAugment, one operation of 14 on each image
        "erasing": 0.0,  # the probability that a rectangle of an image is filled with noise
        "mean": (),  # of the channels, 0..1; () computes mean and std from the training split
        "std": (),
    }


def get_config(
    arg: str | None = None, data: str = "cifar10", standard: dict | None = None, **presets: str | int
) -> ConfigDict:
    """The configuration for a config file to complete, on the method and networks that `arg` picks.

    Args:
      arg: what stands after the colon of `--config=configs/DATA.py:ARG`, such as
        `method=ffl,network=resnet20+resnet32,epochs=60,recipe=common`. The recipe is "published" (the
        default: what the method's authors used), "common" (the same for every method, for comparisons on
        equal terms), or one of `MODERN`, which are so too. Ramps and decays are stretched to `epochs`;
        `--config.epochs` would leave them where they are.
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
    networks = presets["network"].split("+")
    config = every_key(presets["method"])
    if len(set(networks)) == 1:
        config.subnetworks.network = networks[0]
        if method.shares_trunk:
            config.subnetworks.shared_stages = NETWORKS.lookup(networks[0])(num_classes=2).num_stages - 1
    else:
        config.subnetworks.network = presets["network"]
    if len(networks) > 1:
        config.subnetworks.num = len(networks)
    if "teachers" in config:
        config.teachers.network = networks[0]

    # What the dataset and the method want otherwise, each stated for a run of its own length.
    standard = {"epochs": config.epochs} | (standard or {})
    recipe = {"epochs": standard["epochs"]} | method.recipe(data)
    if len(networks) > 1:
        recipe = {key: value for key, value in recipe.items() if not key.startswith("subnetworks.")}
    published = {key: value for key, value in recipe.items() if key.split(".")[0] in OPTIMISATION}
    if presets["recipe"] != "published":
        recipe = {key: value for key, value in recipe.items() if key not in published}
    modern = MODERN.get(presets["recipe"], {})
    epochs = int(presets["epochs"] or (modern or recipe).get("epochs", standard["epochs"]))
    base = {"optimizer": config.optimizer.to_dict(), "method": config.method.to_dict()}
    settings = stretch(flatten(base), epochs, config.epochs)
    settings |= stretch(standard, epochs, standard["epochs"]) | stretch(recipe, epochs, published["epochs"])
    if modern:
        settings |= _modern(modern, epochs, settings.get("batch_size", config.batch_size))
        settings["optimizer_rules"] = recipe.get("optimizer_rules", ()) + modern.get("optimizer_rules", ())
    config.update_from_flattened_dict(settings | {"epochs": epochs})
    return config


def _modern(recipe: dict, epochs: int, batch_size: int) -> dict:
    """The settings of one of `MODERN` for a run of so many epochs, with the rate for that batch."""
    settings = stretch(recipe, epochs, recipe["epochs"])
    return settings | {"optimizer.learning_rate": settings.pop("rate") * batch_size / 512}


def stretch(values: dict, epochs: int, standard: int) -> dict:
    """Settings of a run of `standard` epochs for one of `epochs`: what counts epochs follows in proportion.

    These are the keys that end in `_epochs`, at any depth, those in `optimizer_rules` included. Ramps and
    warm-ups are rounded, decays fall at the beginning of a whole epoch.
    """

    def one(key, value):
        if isinstance(value, dict):
            return stretch(value, epochs, standard)
        if key.endswith("optimizer_rules"):
            return tuple((pattern, stretch(overrides, epochs, standard)) for pattern, overrides in value)
        if not key.endswith("_epochs") or key == "every_epochs":
            return value
        if isinstance(value, tuple):
            return tuple(sorted({int(x * epochs // standard) for x in value} - {0}))
        return float(round(value * epochs / standard))

    return {key: one(key, value) for key, value in values.items()}


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
