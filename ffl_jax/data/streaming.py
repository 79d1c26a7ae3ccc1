"""Datasets that do not fit in memory: read, decoded and cropped when they are needed, by worker processes.

Grain hands numbered pieces of batches to the workers and keeps a few ready ahead of the device. What is in a
piece is a pure function of (seed, epoch, position), so that a run may start anywhere, with any number of
workers, and nothing of it has to be saved.
"""

import concurrent.futures
import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
import threading
from multiprocessing import resource_tracker

import jax
import numpy as np
from absl import flags

from ffl_jax.data import augment, base, resident
from ffl_jax.data import pieces as pieces_lib
from ffl_jax.devices import parallel as parallel_lib
from ffl_jax.errors import ConfigError, FFLError, ResourceError

_BUFFERED = 2  # finished pieces that wait with each worker
_SHARED_MEMORY = "/dev/shm"
# Bytes from which an array goes through shared memory. The rest of a piece goes through a pipe, which takes
# up to 4096 bytes as a whole: whoever waits for the rest of half a message of a killed worker waits forever.
_SHARED_SIZE = 1024


class _Pipeline:
    """Pieces from number `start` on, made ahead by worker processes, or by a thread where there are none."""

    def __init__(self, pieces: pieces_lib.Pieces, start: int, workers: int):
        import grain

        if not flags.FLAGS.is_parsed():  # ours are parsed elsewhere; Grain's own are left at their defaults
            flags.FLAGS.mark_as_parsed()
        workers = min(workers, len(pieces) - start)
        _check_shared_memory(pieces, workers)
        options = grain.experimental.DatasetOptions(min_shm_size=_SHARED_SIZE)

        def iterate(first: int):
            dataset = grain.MapDataset.source(pieces)[first :: max(workers, 1)]
            dataset = dataset.to_iter_dataset(grain.ReadOptions(1, _BUFFERED))
            dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
            processes = grain.MultiprocessingOptions(min(workers, 1), _BUFFERED)
            return iter(dataset.mp_prefetch(processes, _begin_worker))

        # A pipeline for each worker and not one for all, which would end them one after the other.
        self._iterators = [iterate(start + worker) for worker in range(max(workers, 1))]
        self._per_batch, self._workers, self._taken = pieces.per_batch, workers, 0
        if workers:
            # The first call counts; Grain's own would let fifty arrays wait to be deleted, some for too long.
            grain.multiprocessing.SharedMemoryArray.enable_async_del(max_outstanding_requests=1)
            for iterator in self._iterators:
                iterator.get_state()  # makes the queues, but starts nothing
            with _signals_blocked():
                for iterator in self._iterators:
                    iterator.start_prefetch()

    def next_batch(self) -> tuple[np.ndarray, ...]:
        """The arrays of the next batch's pieces, joined into new ones."""
        pieces = [self._next() for _ in range(self._per_batch)]
        return tuple(np.concatenate(arrays) for arrays in zip(*pieces, strict=True))

    def _next(self):
        iterator = self._iterators[self._taken % len(self._iterators)]
        self._taken += 1
        try:
            return next(iterator)
        except FFLError as error:
            # Raised anew below: the worker's own one holds pieces in shared memory, which must not outlive
            # the run.
            refusal = type(error)(*error.args)
        except RuntimeError as error:
            if "exit code -" not in str(error):  # of a signal
                raise
            refusal = ResourceError(
                "a process that reads the data was killed, by the system for lack of memory perhaps: lower "
                "config.data.workers, and run the same command again."
            )
        raise refusal

    def close(self):
        """Ends the workers, all at once."""
        with concurrent.futures.ThreadPoolExecutor(len(self._iterators)) as executor:
            list(executor.map(lambda iterator: iterator.close(), self._iterators))
        self._iterators = []
        if self._workers:
            _delete_shared_memory()


def _delete_shared_memory():
    """Frees the pieces that nobody takes any more now: at the end of the process it would be too late."""
    import grain

    gc.collect()  # Grain leaves cycles that hold them
    pending = getattr(grain.multiprocessing.SharedMemoryArray, "_outstanding_del_requests", None)
    if pending is not None and pending.acquire(timeout=5):
        pending.release()


def _check_shared_memory(pieces: pieces_lib.Pieces, workers: int):
    """Raises ResourceError where finished pieces would not fit: the system kills who writes too many."""
    if not workers or not os.path.isdir(_SHARED_MEMORY):
        return
    # Of each worker: a queue, as many taken out of it, one on each side of it, one in a batch that is joined.
    each = (2 * _BUFFERED + 3) * pieces.piece_bytes
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if workers * each > free:
        raise ResourceError(
            f"{_SHARED_MEMORY} has {free / 1e6:.0f} MB free, and {workers} workers need "
            f"{workers * each / 1e6:.0f} MB: enlarge it (docker run --shm-size), or set config.data.workers "
            f"to {free // each} (0 reads in the process that trains)."
        )


@contextlib.contextmanager
def _signals_blocked():
    """Processes that are started inside never see SIGINT and SIGTERM.

    A terminal and some schedulers send them to every process of a run. Only the one that trains is to act:
    it still needs a batch or two, then it ends its workers itself.
    """
    resource_tracker.ensure_running()  # while it starts, it would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(index: int, count: int):
    """Lets a worker end with the process that started it, even if that was killed."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class TrainInput:
    """Feeds the training step; see `data.train_input`.

    One set of workers lives until `close`, through all epochs, as long as `batches` goes on where the last
    batch was.
    """

    kinds = parallel_lib.BATCH
    reusable = False

    def __init__(self, split: base.StreamedSplit, config, parallel, views: int):
        settings = config.data
        self._settings, self._seed, self._parallel, self._views = settings, config.seed, parallel, views
        self._pieces = pieces_lib.TrainPieces(
            split,
            config.batch_size,
            _process(config.batch_size),
            config.seed,
            settings.crop,
            settings.flip,
            # The device makes the views of images that are padded and cropped there.
            views if settings.crop == "resized" else 0,
            settings.sampling,
        )
        self._pipeline, self._next_step = None, -1
        self.steps_per_epoch = self._pieces.steps_per_epoch

    def batches(self, epoch: int, position: int):
        first = epoch * self.steps_per_epoch
        for step in range(first + position, first + self.steps_per_epoch):
            if step != self._next_step:
                self.close()
                start = step * self._pieces.per_batch
                self._pipeline = _Pipeline(self._pieces, start, self._settings.workers)
            arrays = self._pipeline.next_batch()
            self._next_step = step + 1
            yield self._parallel.place(arrays, parallel_lib.BATCH)

    def batch(self, arrays, step: jax.Array) -> dict[str, jax.Array]:
        images, labels, indices, *repeats = arrays
        about = (self._seed, step // self.steps_per_epoch, self._settings, self._views, *repeats)
        return {"image": resident.augmented(images, indices, *about), "label": labels}

    def close(self):
        if self._pipeline is not None:
            self._pipeline.close()
        self._pipeline, self._next_step = None, -1


class EvalInput:
    """Feeds the evaluation step; see `data.eval_input`. Workers live as long as one sweep over the split."""

    kinds = parallel_lib.BATCH

    def __init__(self, split: base.StreamedSplit, config, parallel):
        self._settings, self._parallel = config.data, parallel
        shares = parallel.shares
        self.batch_size = -(-min(config.evaluation.batch_size, len(split)) // shares) * shares
        process = _process(self.batch_size)
        self._pieces = pieces_lib.EvalPieces(split, self.batch_size, process, config.data.crop)

    def batches(self):
        pipeline = _Pipeline(self._pieces, 0, self._settings.workers)
        try:
            for _ in range(self._pieces.batches):
                yield self._parallel.place(pipeline.next_batch(), parallel_lib.BATCH)
        finally:
            pipeline.close()

    def batch(self, arrays) -> dict[str, jax.Array]:
        images, labels, weights = arrays
        image = augment.normalize(images, self._settings.mean, self._settings.std)
        return {"image": image, "label": labels, "weight": weights}


def _process(batch_size: int) -> tuple[int, int]:
    """(index, count) of the processes that share a batch."""
    count = jax.process_count()
    if batch_size % count:
        raise ConfigError(
            f"a batch of {batch_size} does not divide over {count} processes: set config.batch_size to a "
            f"multiple of {count}."
        )
    return jax.process_index(), count
