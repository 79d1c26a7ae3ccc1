"""How fast a machine trains, and how far that is from what it could do."""

import contextlib
import dataclasses
import itertools
import math
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ffl_jax import data
from ffl_jax.data import Dataset, Split
from ffl_jax.devices import backend
from ffl_jax.devices.parallel import SHARED, Parallel
from ffl_jax.devices.timing import step_seconds
from ffl_jax.errors import ConfigError
from ffl_jax.measure import kernels
from ffl_jax.training import config as config_lib
from ffl_jax.training import cost, loop, scoring, steps, vectorize
from ffl_jax.training.experiment import Experiment, versions
from ffl_jax.workdir import files

# The result, or several in parentheses, and the name; of one in two halves, the second.
_COLLECTIVE = re.compile(
    r" = (\S+|\(.*?\)) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-done)?\("
)
_COLUMNS = ("what", "seeds", "K", "batch", "execution", "precision", "ms", "images/s", "GFLOP/s (of peak)")
_COLUMNS += ("GB/s (of peak)", "compile s", "temporary MB", "exchanged MB (messages)")
_LOOP_SECONDS = 20.0
_STREAM_SECONDS = 10.0
_SHOWN = 15  # rows of a table of kernels


class Benchmark:
    """Prints a row of a table as soon as it is measured, and keeps it.

    Attributes:
      machine: {name: value} of the device, its measured peaks and the versions.
      rows: what was measured, dictionaries.
      shares: {"layers", "operations": [`kernels.Share` as a dictionary]} of a step, if that was measured.
    """

    def __init__(self, config, synthetic: int, examples: int = 0):
        """Args: synthetic: classes of noise to train on, 0 loads the dataset. examples: of the noise."""
        # Compilation is a part of what is measured.
        jax.config.update("jax_enable_compilation_cache", False)
        config_lib.check(config)
        if config.num_seeds > 1:
            raise ConfigError(f"config.num_seeds={config.num_seeds}: for the bench, write --seeds=1,2,….")
        # All but the grid of steps has one seed.
        self._parallel = Parallel(**(config.parallel.to_dict() | {"seeds": 1}))
        self._parallel.check_batch_size(config.batch_size, config.accumulate)
        self._dataset = noise(config, synthetic, examples) if synthetic else data.load(config.data)
        self._experiment = Experiment(config, self._dataset)
        vectorize.settle(self._experiment, self._parallel)
        self._config = self._experiment.config
        self.rows, self.shares = [], {}
        device = self._parallel.devices[0]
        self.machine = {
            "device": device.device_kind if device.platform != "cpu" else f"CPU ({platform.machine()})",
            "devices": self._parallel.num_devices,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "versions": versions(),
            "peaks": {precision: peak_flops(precision) for precision in ("float32", "bfloat16")},
            "bandwidth": bandwidth(),
        }

    def heading(self) -> str:
        """Machine, configuration, and the head of the table."""
        machine, config = self.machine, self._config
        peaks = ", ".join(f"{x / 1e9:.0f} GFLOP/s in {name}" for name, x in machine["peaks"].items())
        made_of = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        size = "x".join(map(str, self._experiment.image_shape[:2]))
        return (
            f"{machine['devices']} x {machine['device']}, {machine['cores']} cores; {made_of}\n"
            f"peaks measured: {peaks}, {machine['bandwidth'] / 1e9:.0f} GB/s\n"
            f"{config.method.name}, {config.subnetworks.network}, images of {size}\n\n"
            f"| {' | '.join(_COLUMNS)} |\n|{' --- |' * len(_COLUMNS)}"
        )

    def training_steps(self, grid: dict[str, list]):
        """The bare training step for each combination of the grid's values."""
        configs = []
        for combination in itertools.product(*grid.values()):
            configs.append(type(self._config)(self._config.to_dict()))
            configs[-1].update_from_flattened_dict(dict(zip(grid, combination, strict=True)))
            config_lib.check(configs[-1])
            self._parallel.check_batch_size(configs[-1].batch_size, configs[-1].accumulate)
        for config in configs:
            experiment = Experiment(config, self._dataset)
            parallel = Parallel(**config.parallel, num_seeds=config.num_seeds)
            parallel.check_networks(experiment.method.subnetworks)
            vectorize.settle(experiment, parallel)
            step, state, batch = vectorize.training_step(experiment, experiment.method, parallel)
            compiled, facts = self._compile(step, (state, batch), experiment)
            flops = cost.training_flops(experiment)
            facts["flops"] = flops and flops * config.num_seeds
            seconds = step_seconds(compiled, state, batch)
            self._row("training step", experiment, seconds, config.batch_size, facts)

    def evaluation(self):
        """A batch of the test split scored; without its input where that is streamed."""
        state = self._state()
        method, test = self._experiment.method, self._dataset.test
        sums = scoring.SplitSums(steps.eval_step, method, test, self._config, self._parallel)
        with contextlib.closing(sums.input.batches()) as batches:
            arguments = (sums.zero, state.variables, next(batches))
        compiled, facts = self._compile(sums.program, arguments, self._experiment)
        facts["flops"] = cost.evaluation_flops(self._experiment, sums.input.batch_size)
        seconds = step_seconds(compiled, *arguments)
        self._row("evaluation step", self._experiment, seconds, sums.input.batch_size, facts)

    def input(self):
        """Batches of the training split: on the device where it is resident, on the host where it streams."""
        method, config = self._experiment.method, self._experiment.config
        inputs = data.train_input(self._dataset.train, config, self._parallel, method.num_views)
        try:
            if inputs.reusable:
                seconds = self._resident_seconds(inputs)
                self._row("input, on the device", self._experiment, seconds, config.batch_size, {})
            else:
                seconds = self._streamed_seconds(inputs)
                workers = max(1, config.data.workers)
                self._row(f"input, {workers} worker(s)", self._experiment, seconds, config.batch_size, {})
                self._say_workers(config.batch_size / seconds / workers)
        finally:
            inputs.close()

    def _resident_seconds(self, inputs):
        def run(carry, arrays):
            total, step = carry
            batch = inputs.batch(arrays, step)
            return total + batch["image"].sum() + batch["label"].sum(), (step + 1) % inputs.steps_per_epoch

        program = self._parallel.map(run, (SHARED, inputs.kinds), donate=(0,))
        carry = self._parallel.place((jnp.zeros(()), np.int32(0)))
        return step_seconds(program, carry, next(inputs.batches(0, 0)))

    def _streamed_seconds(self, inputs):
        """Of one batch, once the first quarter of them has emptied the buffers."""
        times, began, stream = [], time.perf_counter(), inputs.batches(0, 0)
        while time.perf_counter() - began < _STREAM_SECONDS or len(times) < 8:
            batch = next(stream, None)
            if batch is None:
                stream = inputs.batches(0, 0)
                continue
            jax.block_until_ready(batch)
            times.append(time.perf_counter())
        settled = times[len(times) // 4 :]
        return (settled[-1] - settled[0]) / (len(settled) - 1)

    def _say_workers(self, each):
        for row in self.rows:
            if row["what"] == "training step":
                wanted = row["images_per_second"] / each
                print(f"(a worker makes {each:.0f} images/s: the step above wants {wanted:.1f})")

    def loop(self):
        """Real training for about 20 s, input, log and checkpoints included, at the speed that it tells.

        The bare step is timed before and after it, for machines that other work shares.
        """
        step, state, batch = vectorize.training_step(
            self._experiment, self._experiment.method, self._parallel
        )
        seconds = step_seconds(step, state, batch)
        config = type(self._config)(self._experiment.config.to_dict())
        dataset = self._dataset
        most = max(2, int(_LOOP_SECONDS / seconds)) * config.batch_size
        if isinstance(dataset.train, Split) and len(dataset.train) > most:
            dataset = dataclasses.replace(
                dataset, train=dataset.train.take(np.arange(len(dataset.train)) < most)
            )
        per_epoch = -(-len(dataset.train) // config.batch_size)
        config.epochs = max(1, round(_LOOP_SECONDS / seconds / per_epoch))
        config.optimizer.schedule = "constant"
        config.log_every_steps = max(1, min(config.log_every_steps, per_epoch * config.epochs // 4))
        config.evaluation.every_epochs = config.checkpoint.every_epochs = config.epochs
        with tempfile.TemporaryDirectory() as workdir:
            summary = loop.train(config, workdir, dataset)
        speed = summary["images_per_second"]
        self._row("training loop", self._experiment, config.batch_size / speed, config.batch_size, {})
        again = step_seconds(step, self._state(), batch)
        more = 2 * config.batch_size / speed / (seconds + again) - 1
        print(
            f"(a bare step takes {1e3 * seconds:.1f} ms before and {1e3 * again:.1f} ms after; one of the "
            f"loop {100 * more:+.1f} %)"
        )

    def start(self, arguments: list[str]):
        """From the start of `ffl_jax.main` to its first step, with an empty cache and with a full one."""
        with tempfile.TemporaryDirectory() as folder:
            for what in ("start to first step, cache empty", "start to first step, cache full"):
                environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
                workdir = Path(folder) / str(len(self.rows))
                program = [sys.executable, "-m", "ffl_jax.main", *arguments]
                program += ["--config.log_every_steps=1", f"--workdir={workdir}"]
                with open(f"{folder}/log", "w") as log:
                    process = subprocess.Popen(program, env=environment, stderr=log)
                    while process.poll() is None and not _has_lines(workdir / "metrics.jsonl"):
                        time.sleep(0.1)
                    process.terminate()
                    process.wait()
                seconds = files.read_json(workdir / "summary.json").get("training", {}).get("start_seconds")
                if seconds is None:
                    lines = Path(f"{folder}/log").read_text(errors="replace").splitlines()
                    raise ConfigError(f"{' '.join(program)}: {lines[-1] if lines else 'it said nothing'}")
                self._row(what, self._experiment, seconds, None, {})

    def kernels(self):
        """What the bare step spends its time on: a table of layers, and one of the longest operations."""
        step, state, batch = vectorize.training_step(
            self._experiment, self._experiment.method, self._parallel
        )
        compiled = step.lower(state, batch).compile()
        states = [compiled(state, batch)]

        def call():
            states.append(compiled(states.pop(), batch))
            return states[0]

        tables = kernels.measure(compiled, call)
        for name, shares in zip(("layers", "operations"), tables, strict=True):
            self.shares[name] = [dataclasses.asdict(share) for share in shares]
            total = sum(share.milliseconds for share in shares)
            count = sum(share.kernels for share in shares)
            print(f"\n| {name}: {total:.1f} ms, {count:.0f} kernels | ms | % | kernels |")
            print(f"|{' --- |' * 4}")
            for share in shares[:_SHOWN]:
                cells = share.name[:90], f"{share.milliseconds:.2f}"
                cells += f"{100 * share.milliseconds / total:.1f}", f"{share.kernels:.0f}"
                print(f"| {' | '.join(cells)} |", flush=True)

    def memory(self) -> dict[str, float]:
        """Peaks of this process and, where they are counted, of the first device, in megabytes."""
        unit = 1e6 if sys.platform == "darwin" else 1e3
        sizes = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
        stats = self._parallel.devices[0].memory_stats() or {}
        return sizes | ({"device": stats["peak_bytes_in_use"] / 1e6} if "peak_bytes_in_use" in stats else {})

    def _state(self):
        return vectorize.training_step(self._experiment, self._experiment.method, self._parallel)[1]

    def _compile(self, program, arguments, experiment):
        """(the program, compiled; what is known of it before it runs)."""
        start = time.perf_counter()
        compiled = program.lower(*arguments).compile()
        facts = {"compile_seconds": time.perf_counter() - start}
        facts["bytes"] = _count(compiled.cost_analysis(), "bytes accessed")
        memory = compiled.memory_analysis()
        facts["temporary_mb"] = memory.temp_size_in_bytes / 1e6 if memory else None
        facts["communication"] = communication(compiled.as_text())
        return compiled, facts | {"precision": experiment.config.precision}

    def _row(self, what, experiment, seconds, batch_size, facts):
        config, networks = experiment.config, experiment.method.subnetworks
        row = {
            "what": what,
            "num_seeds": config.num_seeds,
            "num": networks.num,
            "batch_size": batch_size,
            "execution": "vmap" if networks.vectorize else "loop",
            "precision": config.precision,
            "milliseconds": 1e3 * seconds,
            "images_per_second": batch_size * config.num_seeds / seconds if batch_size else None,
            **facts,
        }
        self.rows.append(row)

        def shown(key, digits):
            return f"{row[key]:.{digits}f}" if row.get(key) else ""

        def rate(key, peak):
            each = row[key] / seconds if row.get(key) else None
            return f"{each / 1e9:.0f} ({100 * each / peak:.0f} %)" if each else ""

        cells = [what, row["num_seeds"], networks.num, batch_size or "", row["execution"], row["precision"]]
        cells += [shown("milliseconds", 1 if seconds > 0.1 else 3), shown("images_per_second", 0)]
        cells += [rate("flops", self.machine["peaks"][config.precision])]
        cells += [rate("bytes", self.machine["bandwidth"])]
        cells += [shown("compile_seconds", 1), shown("temporary_mb", 0), _exchanged(row.get("communication"))]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def noise(config, classes: int, examples: int = 0):
    """Random images of `config.data.image_size` pixels (32 if that is 0): so many, by default 200 batches."""
    rng, side = np.random.default_rng(0), config.data.image_size or 32

    def split(count):
        images = rng.integers(0, 256, (count, side, side, 3), np.uint8)
        return Split(images, rng.integers(0, classes, count).astype(np.int32))

    names = tuple(f"class {index}" for index in range(max(2, classes)))
    train, test = split(examples or 200 * config.batch_size), split(config.evaluation.batch_size)
    return Dataset("noise", train, test, names, "noise")


def _has_lines(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def peak_flops(precision: str) -> float:
    """FLOP/s of a large matrix product on one device."""
    side = 1024 if backend.is_cpu() else 8192
    x = jnp.full((side, side), 1e-3, precision)
    return 2 * side**3 / step_seconds(jax.jit(lambda x: x @ x), x)


def bandwidth() -> float:
    """Bytes/s, read and written, of a large sum on one device."""
    x = jnp.ones(1 << 26, jnp.float32)
    return 2 * x.nbytes / step_seconds(jax.jit(lambda x: x + 1, donate_argnums=0), x)


def communication(program: str) -> dict[str, dict[str, int]]:
    """{operation: {"bytes", "messages"}} that a program, XLA's text of it, exchanges between devices.

    Bytes are those of the results on one device, so that those of an all-reduce are what is reduced, whatever
    the algorithm sends for it. The body of a loop counts once.
    """
    found = {}
    for shapes, operation in _COLLECTIVE.findall(program):
        one = found.setdefault(operation, {"bytes": 0, "messages": 0})
        one["messages"] += 1
        for kind, bits, sides in re.findall(r"\b([a-z]+)(\d*)\[([\d,]*)\]", shapes):
            size = 1 if kind == "pred" else int(bits) // 8
            one["bytes"] += size * math.prod(int(side) for side in sides.split(",") if side)
    return found


def _exchanged(operations) -> str:
    if not operations:
        return ""
    bytes_, messages = (sum(one[key] for one in operations.values()) for key in ("bytes", "messages"))
    return f"{bytes_ / 1e6:.2f} ({messages})"


def _count(analysis, key) -> float | None:
    analysis = analysis[0] if isinstance(analysis, list | tuple) and analysis else analysis
    return (analysis or {}).get(key) or None
