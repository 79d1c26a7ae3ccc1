"""Trains every method with the same data, network, epochs and seeds, one after another, and makes one table.

    .venv/bin/python launch/all_methods.py --output=runs/digits --at_least=0.95

Run again, it continues where it stopped. Arguments that it does not know go to every training, such as
`--config.data.data_dir=DIR`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main():
    from ffl_jax.methods import METHODS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="configs/digits.py", help="configuration file")
    parser.add_argument("--presets", default="", help="after the colon, such as network=resnet8,epochs=3")
    parser.add_argument("--methods", default=",".join(sorted(METHODS)), help="which methods")
    parser.add_argument("--seeds", default="0", help="one run each, such as 0,1,2")
    parser.add_argument("--output", required=True, help="folder for the runs and for results.md")
    parser.add_argument(
        "--at_least", type=float, default=0.0, help="fail where a deployed top-1 is below, 0..1"
    )
    options, others = parser.parse_known_args()
    methods, seeds = options.methods.split(","), [int(seed) for seed in options.seeds.split(",")]
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        parser.error(f"unknown method {unknown[0]}: known: {', '.join(sorted(METHODS))}")

    output, summaries = Path(options.output).absolute(), {}
    for seed in seeds:  # every method once first: a table is there early
        for method in methods:
            workdir = output / f"{method}_seed{seed}"
            presets = ",".join(filter(None, (f"method={method}", options.presets)))
            command = [sys.executable, "-m", "ffl_jax.main", f"--config={options.config}:{presets}"]
            command += [f"--config.seed={seed}", f"--workdir={workdir}", *others]
            print(f"-- {method}, seed {seed}", flush=True)
            code = subprocess.run(command, cwd=ROOT).returncode
            if code:
                sys.exit(f"error: {' '.join(command)} ended with exit code {code}.")
            summaries.setdefault(method, []).append(json.loads((workdir / "summary.json").read_text()))
    text = table(summaries)
    (output / "results.md").write_text(text)
    print(text)
    low = [method for method, runs in summaries.items() if min(deployed(runs)) < options.at_least]
    if low:
        sys.exit(f"error: below {options.at_least}: {', '.join(low)}.")


def deployed(runs: list[dict]) -> list[float]:
    return [run["predictors"][run["deploy"]]["top1"] for run in runs]


def table(summaries: dict[str, list[dict]]) -> str:
    """Markdown: a row for each method, the best first; top-1 in percent, mean ± sample standard deviation."""

    def percent(values):
        values = [100 * value for value in values]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"

    rows = [
        "| method | sub-networks | deployed | top-1 % | parameters | others, top-1 % | images/s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, runs in sorted(summaries.items(), key=lambda item: -statistics.mean(deployed(item[1]))):
        first = runs[0]
        names = [name for name in first["predictors"] if name != first["deploy"]]
        others = ", ".join(
            f"{name} {percent([run['predictors'][name]['top1'] for run in runs])}" for name in names
        )
        speeds = [run["images_per_second"] for run in runs if run["images_per_second"]]
        cells = [
            method,
            str(len(first["networks"])),
            first["deploy"],
            percent(deployed(runs)),
            f"{first['predictors'][first['deploy']]['parameters']:,}",
            others,
            f"{statistics.mean(speeds):.0f}" if speeds else "",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
