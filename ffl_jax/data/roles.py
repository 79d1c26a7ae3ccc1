"""Which part of a dataset of one's own is trained on, tested on, and chosen by."""

import logging
from collections.abc import Collection, Iterable

from ffl_jax.errors import ConfigError, DatasetError

SPLITS = ("train", "test", "val", "valid", "validation")


def some(names: list[str]) -> str:
    """The first names, and how many more there are: errors stay on one line."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def choose(config, where, labelled: Collection[str], there: Iterable[str], what: str) -> dict[str, str]:
    """{role: name of the part}: `train`, `test`, and perhaps `validation`. Says what is used, and what not.

    The first of `SPLITS` behind `train` that has labels is the test split, and where that is `test`, the next
    is the validation split, unless one is carved. With `config.test_fraction` there is `train` alone.

    Args:
      config: the `data` section.
      where: the folder or file of them all.
      labelled: names of the parts that can be learned from or tested on.
      there: names of all parts.
      what: they are, for what is said: "Folders".

    Raises:
      ConfigError: `config.test_fraction` is set where there is something to test on.
      DatasetError: there is nothing to train or to test on.
    """
    held_out = [name for name in SPLITS[1:] if name in labelled]
    if config.test_fraction and held_out:
        raise ConfigError(
            f"config.data.test_fraction={config.test_fraction} takes a test split from the training images, "
            f"but {where} has {some(held_out)}: set it to 0, or move that away."
        )
    if "train" not in labelled or not (held_out or config.test_fraction):
        raise DatasetError(
            f"{where} needs images to train on and to test on, in train and in test or val, and has only "
            f"{some(sorted(labelled)) or 'others'}; set config.data.test_fraction to split train, or add "
            "what is missing."
        )
    roles = {"train": "train"} | dict(zip(("test",), held_out, strict=False))
    others = held_out[1:] if roles.get("test") == "test" else []
    carved = config.validation_examples or config.validation_fraction
    if others and not carved:
        roles["validation"] = others[0]
        logging.info("The validation split is %s/%s.", where, others[0])
    if held_out and roles["test"] != "test":
        logging.info("The test split is %s/%s: there is no test with labels of train.", where, roles["test"])
    unused = sorted(set(there) - set(roles.values()))
    if unused:
        advice = ""
        if carved and others:
            key = "validation_examples" if config.validation_examples else "validation_fraction"
            advice = f" To use {others[0]}, set config.data.{key}=0."
        logging.warning("%s of %s that are not used: %s.%s", what, where, some(unused), advice)
    return roles


def refuse_keys(config, where):
    """Raises ConfigError for names of columns that are given for what has none."""
    for key in ("image_key", "label_key", "split_key"):
        if config[key]:
            raise ConfigError(
                f"config.data.{key}={config[key]} names a column of a table, or a feature of a TFDS dataset, "
                f"and {where} has neither: leave it empty."
            )


def check_classes(config, where, split: str, train: Collection[str], other: Collection[str]):
    """Raises DatasetError unless a split has the classes of `train`, or, where that is allowed, some of them.

    Args: train, other: names of classes, those of `split` second.
    """
    lacking, unknown = sorted(set(train) - set(other)), sorted(set(other) - set(train))
    if lacking and config.missing_classes and not unknown:
        logging.warning("Classes of %s without an image in %s: %s.", where, split, some(lacking))
        return
    parts = ((lacking, "only in train"), (unknown, f"only in {split}"))
    differences = "; ".join(f"{part}: {some(names)}" for names, part in parts if names)
    if differences:
        advice = "" if unknown else ", or set config.data.missing_classes=True"
        raise DatasetError(
            f"{where} has different classes in train and {split}, {differences}; make them agree{advice}."
        )
