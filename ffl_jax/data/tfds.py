"""Every image-classification dataset of TensorFlow Datasets, by name, read without TensorFlow.

Only preparing a dataset (download, check, convert to ArrayRecord) needs TensorFlow, once.
"""

import concurrent.futures
import contextlib
import difflib
import errno
import functools
import importlib.util
import logging
import os
import pathlib
import re

import numpy as np
from absl import logging as absl_logging

from ffl_jax.data import base, cache, images, limits, roles
from ffl_jax.data import records as records_lib
from ffl_jax.errors import ConfigError, DatasetError, FFLError, ResourceError
from ffl_jax.workdir.paths import expanded

_NAME = re.compile(r"\w+(/[\w.-]+)?(:[\d.*]+)?")
# Those of TFDS whose classes are named by the files that they are prepared from, and not in its code.
_NAMED_BY_FILE = (
    *("cifar10", "cifar100", "cifar10_h", "cifar10_n", "cifar100_n", "deep_weeds", "omniglot", "stl10"),
    "stanford_dogs",
)
_COUNTING_THREADS = 16  # that wait for the disk or the network
_INSTALL = "run `pip install tensorflow` (or `pip install -e '.[prepare]'`) and the same command again"


def load(config):
    """Reads `config.name` (`name`, `name/config` or `name/config:version`), and prepares it first if need be.

    Which split is trained on, tested on and chosen by says `roles.choose`.
    """
    builder = _builder(config)
    if not (pathlib.Path(builder.data_dir) / "dataset_info.json").exists():
        _prepare(builder, config)
        builder = _builder(config)
    try:
        keys = _keys(config, builder.info)
        records = _records(config, builder, *keys)
        class_names = _class_names(builder, keys[1])
    except (FFLError, MemoryError, OSError):
        raise
    except Exception as error:  # words and numbers that lead nowhere, in a dozen types
        raise _damaged(config.name, builder.data_dir, error) from error
    splits = records_lib.splits(config, builder.info.full_name, records)
    train, test, *validation = (*splits, None) if config.test_fraction else splits
    return train, test, class_names, *validation


def _records(config, builder, image_key: str, label_key: str) -> dict[str, "Records"]:
    """{role: what is read} of each split, as of `roles.choose`."""
    labelled = {}
    for name in roles.SPLITS:
        if _num_examples(builder, name):
            _check_files(builder, name)
            records = Records(builder, name, image_key, label_key)
            labelled |= {name: records} if records.labelled() else {}
    chosen = roles.choose(config, config.name, labelled, builder.info.splits, "Splits")
    return {role: labelled[name] for role, name in chosen.items()}


def _num_examples(builder, split: str) -> int:
    return builder.info.splits[split].num_examples if split in builder.info.splits else 0


def _class_names(builder, key: str) -> tuple[str, ...]:
    """Raises DatasetError where the file that they were written to is gone: TFDS would number the classes."""
    count = builder.info.features[key].num_classes
    if count > limits.MAX_CLASSES:
        raise DatasetError(
            f"{builder.name} has {count} classes, and at most {limits.MAX_CLASSES} are allowed."
        )
    names, path = builder.info.features[key].names, pathlib.Path(builder.data_dir) / f"{key}.labels.txt"
    written = path.exists() and images.read_file(path).strip()
    if not written and names == [str(label) for label in range(len(names))]:
        if builder.name in _NAMED_BY_FILE or builder.name not in _registered():
            raise DatasetError(
                f"{path}, which names the {len(names)} classes, is missing: restore it, or write one name a "
                "line, in the order of the labels."
            )
        logging.info(
            "The classes of %s have no names: they are called 0 .. %d.", builder.name, len(names) - 1
        )
    return tuple(names)


class Records(base.Records):
    """The ArrayRecord files of one split, which TFDS wrote."""

    def __init__(self, builder, split: str, image_key: str, label_key: str):
        info = builder.info.splits[split]
        self._keys, self._num_classes = (image_key, label_key), builder.info.features[label_key].num_classes
        self.paths = [os.fspath(path) for path in info.filepaths]
        self._starts = np.cumsum([0, *info.shard_lengths])
        self.remedy = f"run `rm -r {builder.data_dir}` and the same command again"
        names = [os.path.basename(path) for path in self.paths]
        # TFDS's count of bytes as well: the files grow by 64 KiB at a time.
        sizes = np.array([info.num_bytes, *map(os.path.getsize, self.paths)])
        self.identity = base.digest(builder.info.full_name, *self._keys, *names, sizes, self._starts)
        states = [text for path in self.paths for text in (path, cache.file_state(path))]
        self.source = base.digest(self.identity, *states)

    def __len__(self):
        return int(self._starts[-1])

    def labelled(self) -> bool:
        """Whether the first record has a label: those of imagenet2012's test split are -1."""
        return self._parse(0, self._fetch([0])[0])[1] != -1

    def read(self, positions):
        for position, record in zip(positions, self._fetch(positions), strict=True):
            encoded, label = self._parse(position, record)
            if not 0 <= label < self._num_classes:
                raise DatasetError(
                    f"{self._where(position)} has label {label}, outside 0 .. {self._num_classes - 1}; "
                    "correct the dataset."
                )
            yield self._where(position), encoded, label

    def _where(self, position: int) -> str:
        shard = np.searchsorted(self._starts, position, side="right") - 1
        return f"Record {position - self._starts[shard]} of {self.paths[shard]}"

    def _parse(self, position: int, record: bytes) -> tuple[bytes, int]:
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            # Of all features only these two are looked at; the image stays encoded.
            image, label = (tf_example_pb2.Example.FromString(record).features.feature[k] for k in self._keys)
            return image.bytes_list.value[0], label.int64_list.value[0]
        except Exception as error:
            raise DatasetError(f"{self._where(position)} has no image or label; {self.remedy}.") from error

    def _fetch(self, positions) -> list[bytes]:
        try:
            return self._files.__getitems__(list(positions))
        except ResourceError:
            raise
        except Exception as error:
            if len(positions) > 1:  # Read one by one, to name the first damaged record.
                return [self._fetch([position])[0] for position in positions]
            raise DatasetError(
                f"{self._where(positions[0])} is damaged: {_line(error)} To repair, {self.remedy}."
            ) from error

    @functools.cached_property
    def _files(self):
        from array_record.python import array_record_data_source

        _allow_open_files(len(self.paths))
        # With their lengths given, the files are opened only when they are read.
        lengths = np.diff(self._starts)
        return array_record_data_source.ArrayRecordDataSource(
            [f"{path}[0:{length}]" for path, length in zip(self.paths, lengths, strict=True)]
        )


def _allow_open_files(count: int):
    """Lifts this process's limit on open files as far as it may where `count` more would pass it."""
    import resource  # Windows has none, where `predict` runs all the same

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 512  # beside them: libraries, checkpoints, the event file, pipes
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ResourceError(
            f"{count} files must be open at once, but the system allows this process {hard}: raise "
            f"`ulimit -n` to {needed}."
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _builder(config):
    """The TFDS builder, made from files alone: nothing here asks the network."""
    import tensorflow_datasets as tfds

    if not _NAME.fullmatch(config.name):
        raise ConfigError(
            f"config.data.name {config.name!r} is not a dataset name: write `name`, `name/config` or "
            "`name/config:1.0.0`."
        )
    short_name = re.split("[/:]", config.name)[0]
    data_dir = os.path.abspath(expanded(config.data_dir)) if config.data_dir else None
    _check_regular(pathlib.Path(data_dir or tfds.core.constants.DATA_DIR) / short_name)
    try:
        with _quiet():
            return tfds.builder(config.name, data_dir=data_dir, try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(short_name, {*base.SOURCES, *_registered()}, cutoff=0.5)
        advice = (
            f"the nearest are {', '.join(near)}" if near else "see tensorflow.org/datasets for their names"
        )
        raise ConfigError(
            f"config.data.name {config.name!r} is neither one of {', '.join(sorted(base.SOURCES))} "
            f"nor a TFDS dataset; {advice}."
        ) from error
    except ImportError as error:  # A few datasets, none of them of images, cannot be described without it.
        raise DatasetError(
            f"{config.name} cannot be used here: {_line(error)} Install that package with pip, or choose "
            "another dataset."
        ) from error
    except Exception as error:
        if isinstance(error, AssertionError | ValueError) and short_name in _registered():
            configs = ", ".join(list(tfds.builder_cls(short_name).builder_configs)[:20]) or "none"
            reason = _line(error).partition(" Here are")[0]
            raise ConfigError(
                f"config.data.name {config.name!r}: {reason} Known configurations: {configs}."
            ) from error
        raise _damaged(config.name, data_dir or "the TFDS folder", error) from error


def _damaged(name: str, folder: str, error: Exception) -> DatasetError:
    return DatasetError(
        f"The description of {name} in {folder} is damaged: {_line(error)} "
        "Remove the dataset's folder and run the same command again."
    )


def _registered() -> list[str]:
    """The names of the datasets that TFDS has code for."""
    import tensorflow_datasets as tfds

    return tfds.list_builders(with_community_datasets=False)


def _check_regular(folder: pathlib.Path):
    """Raises DatasetError for a pipe or device among a dataset's files, which reading would wait for."""
    for path in folder.rglob("*"):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise DatasetError(f"{path} is not a regular file; replace or remove it.")


@contextlib.contextmanager
def _quiet():
    """Keeps what TFDS logs on its way to an answer off the terminal: refusals are one line."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)


def _prepare(builder, config):
    """Downloads the dataset, or takes it from `config.manual_dir`, and writes ArrayRecord files."""
    target = pathlib.Path(builder.data_dir)
    if target.exists():
        raise DatasetError(
            f"{target} is half-prepared (it has no dataset_info.json), and partial data is never used: "
            f"run `rm -r {target}` and the same command again."
        )
    if config.manual_dir and not expanded(config.manual_dir).is_dir():
        raise DatasetError(
            f"config.data.manual_dir {config.manual_dir} is not a folder: give the folder of the files that "
            f"you downloaded by hand{_upstream(builder)}."
        )
    if importlib.util.find_spec("tensorflow") is None:
        others = sorted(path.parent.name for path in target.parent.glob("*/dataset_info.json"))
        partial = sorted(path.name for path in target.parent.glob("incomplete*"))
        raise DatasetError(
            f"{config.name} is not prepared in {target}"
            + (f" (version {', '.join(others)} is, use name:version to read it)" if others else "")
            + (f" (partial data in {', '.join(partial)} is never used)" if partial else "")
            + f": set config.data.data_dir to where it is, or, to prepare it, {_INSTALL}."
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.info("Preparing %s in %s", config.name, target)
    try:
        import tensorflow as tf
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.download import downloader

        tf.config.set_visible_devices([], "GPU")  # The accelerator's memory is for training.
        downloader.MAX_RETRIES = 5  # Ten, its default, take over three minutes to notice a missing network.
        download_config = tfds.download.DownloadConfig(
            manual_dir=os.fspath(expanded(config.manual_dir)) if config.manual_dir else None,
            try_download_gcs=False,
        )
        builder.download_and_prepare(download_config=download_config, file_format="array_record")
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EROFS,
            errno.EACCES,
        ):
            raise ResourceError(f"Cannot write {config.name} to {target}: {error.strerror}.") from error
        raise DatasetError(
            f"Preparing {config.name} in {target} failed: {_line(error)} Without a network, download the "
            f"files by hand into a folder{_upstream(builder)} and set config.data.manual_dir to it."
        ) from error


def _upstream(builder) -> str:
    names = sorted(info.filename for info in (builder.url_infos or {}).values() if info.filename)
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f" ({', '.join(names[:6])}{more})" if names else ""


def _keys(config, info) -> tuple[str, str]:
    """Names of the features of the image and the class: those of `config`, or of TFDS, or the only ones."""
    import tensorflow_datasets as tfds

    name = config.name
    types = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    # Read from a description, their order is that of a protobuf's map: another in each process.
    features = dict(sorted(info.features.items())) if hasattr(info.features, "items") else {}
    found = {role: [key for key, one in features.items() if isinstance(one, types[role])] for role in types}
    supervised = info.supervised_keys or ()
    if [key in names for key, names in zip(supervised, found.values(), strict=False)] != [True, True]:
        supervised = [names[0] if len(names) == 1 else "" for names in found.values()]
    keys = []
    for role, usual in zip(types, supervised, strict=False):
        keys.append(config[f"{role}_key"] or usual)
        if keys[-1] not in found[role]:
            raise _no_feature(name, role, keys[-1], found[role], features or [type(info.features).__name__])
    if features[keys[0]].np_dtype not in (np.uint8, np.uint16):
        raise DatasetError(
            f"{name} holds images of {np.dtype(features[keys[0]].np_dtype).name} values, not uint8 or "
            "uint16; choose another dataset."
        )
    return keys[0], keys[1]


def _no_feature(name: str, role: str, key: str, candidates: list[str], features) -> DatasetError:
    kind = {"image": "images", "label": "class labels"}[role]
    if candidates:
        said = f"config.data.{role}_key={key} is none of" if key else f"set config.data.{role}_key to one of"
        return DatasetError(f"{name} holds {kind} as {', '.join(candidates)}: {said} them.")
    return DatasetError(
        f"{name} is not an image-classification dataset: its features are {', '.join(features)}, and none "
        f"holds {kind}; choose another dataset."
    )


def _check_files(builder, split: str):
    import tensorflow_datasets as tfds

    if tfds.core.FileFormat.ARRAY_RECORD not in builder.info.available_file_formats():
        raise DatasetError(
            f"{builder.data_dir} is prepared as {builder.info.file_format.value}, which only TensorFlow can "
            f"read. To prepare it again as array_record, run `rm -r {builder.data_dir}`, or set another "
            f"config.data.data_dir; then {_INSTALL}."
        )
    builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
    info = builder.info.splits[split]
    missing = [path for path in info.filepaths if not path.exists()]
    if missing:
        raise DatasetError(
            f"{builder.data_dir} is half-prepared, {missing[0].name} is missing: run "
            f"`rm -r {builder.data_dir}` and the same command again."
        )
    paths, lengths = map(list, (info.filepaths, info.shard_lengths))
    with concurrent.futures.ThreadPoolExecutor(_COUNTING_THREADS) as executor:
        counts = executor.map(lambda path: _count(path, builder.data_dir), paths)
        for path, count, length in zip(paths, counts, lengths, strict=True):
            if count != length:
                raise DatasetError(
                    f"{path} has {count} records, and {length} by dataset_info.json: run "
                    f"`rm -r {builder.data_dir}` and the same command again."
                )


def _count(path, data_dir) -> int:
    """The number of records in a file, from its end: a millisecond."""
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(os.fspath(path))
        count = reader.num_records()
        reader.close()
    except Exception as error:
        raise DatasetError(
            f"{path} is damaged: {_line(error)} Run `rm -r {data_dir}` and the same command again."
        ) from error
    return count


def _line(error: Exception) -> str:
    """An error's message as one line that ends in a full stop, without the prefix that TFDS adds."""
    text = re.sub('^Failed to construct dataset .*?}": ', "", " ".join(str(error).split()))
    return (text if len(text) <= 300 else text[:300] + " ...").removesuffix(".") + "."
