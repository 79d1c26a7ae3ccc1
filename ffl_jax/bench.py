"""Measures how fast this machine trains: `python -m ffl_jax.bench [--config=configs/DATA.py]`."""

import json
from pathlib import Path

from absl import flags

from ffl_jax import cli
from ffl_jax.registry import nearest

USAGE = """
python -m ffl_jax.bench [--config=configs/DATA.py[:PRESETS]] [--config.KEY=VALUE ...]
                        [--parts=step,evaluation,input,loop,start,kernels] [--executions=loop,vmap]
                        [--nums=1,2,4] [--precisions=float32,bfloat16] [--batch_sizes=128,1024] [--seeds=1,5]
                        [--synthetic=CLASSES [--examples=N]] [--json=FILE]

Parts: `step`, the bare training step on a batch that stays on the device, once for each combination of what
the lists name; `evaluation`, its step; `input`, the batches alone; `loop`, real training in a folder of its
own, which is removed; `start`, a new process up to its first step, with an empty cache of compiled programs
and with a full one; `kernels`, what the bare step spends its time on, by layers and by operations. Times are
medians over blocks of calls. FLOPs are XLA's count for plain convolutions, a multiply-add as two; peaks are
those of a large matrix product and a large sum, measured here.
"""
PARTS = ("step", "evaluation", "input", "loop", "start", "kernels")
# What multiplies to the rows of the step: {flag: (key of the configuration, what it lists)}.
GRID = {
    "executions": ("subnetworks.execution", "loop, vmap, or both; by default that of the configuration"),
    "precisions": ("precision", "float32, bfloat16, or both"),
    "nums": ("subnetworks.num", "numbers of sub-networks"),
    "batch_sizes": ("batch_size", "batch sizes"),
    "seeds": ("num_seeds", "numbers of seeds side by side"),
}


def command(argv: list[str]):
    values, given = cli.new_flags(), argv[1:]
    text = f"What to measure, of {', '.join(PARTS)}."
    flags.DEFINE_list("parts", ["step", "evaluation", "input", "loop"], text, flag_values=values)
    for name, (_, text) in GRID.items():
        flags.DEFINE_list(name, [], f"For the step: {text}.", flag_values=values)
    flags.DEFINE_integer(
        "synthetic", 0, "Classes of noise to train on; 0 loads the dataset.", 0, flag_values=values
    )
    flags.DEFINE_integer("examples", 0, "Images of noise; 0 for 200 batches.", 0, flag_values=values)
    flags.DEFINE_string("json", None, "A file for the same numbers.", flag_values=values)
    cli.parse(values, argv, USAGE, config=True)
    for part in values.parts:
        if part not in PARTS:
            raise cli.ConfigError(f"--parts: {nearest(part, PARTS)}")
    grid = {key: [_value(name, text) for text in values[name].value] for name, (key, _) in GRID.items()}

    from ffl_jax.measure import speed

    bench = speed.Benchmark(values.config, values.synthetic, values.examples)
    print(bench.heading(), flush=True)
    for part in values.parts:
        if part == "step":
            bench.training_steps({key: choices for key, choices in grid.items() if choices})
        elif part == "start":
            bench.start([argument for argument in given if argument.startswith("--config")])
        else:
            getattr(bench, part)()
    memory = bench.memory()
    print(f"\nPeak memory: {', '.join(f'{name} {size:.0f} MB' for name, size in memory.items())}")
    if values.json:
        results = bench.machine | {"memory_mb": memory, "rows": bench.rows, "kernels": bench.shares}
        Path(values.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _value(flag, text):
    if flag in ("executions", "precisions"):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise cli.ConfigError(f"--{flag} takes whole numbers from 1 on, got {text!r}.")
    return int(text)


def run():
    cli.run(command, huge_pages=True, answers=True)


if __name__ == "__main__":
    run()
