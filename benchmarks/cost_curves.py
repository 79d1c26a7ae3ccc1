"""How the cost of a training step grows: measured curves with their slopes, as a table and a picture.

    python benchmarks/cost_curves.py --output=docs/cost.png [--config=configs/cifar100.py:network=resnet8]
                                     [--curves=networks,seeds,depth,devices,examples]

Every point is a `python -m ffl_jax.bench` of its own, on noise of CIFAR's size. The slope is that of a
straight line through the logarithms: 1 is proportional, 0 is no growth. Devices are forced ones, on the CPU;
they share its cores, so that what grows with them is what sharing costs.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = pathlib.Path(__file__).resolve().parent.parent
# curve -> (axis, points, what is measured)
CURVES = {
    "networks": ("sub-networks K", (2, 3, 4, 6, 8), "training step"),
    "seeds": ("seeds side by side", (1, 2, 4, 8), "training step"),
    "depth": ("depth of the ResNet", (8, 14, 20, 32, 44, 56), "training step"),
    "devices": ("devices, same batch", (1, 2, 4, 8), "training step"),
    "examples": ("training images", (1000, 4000, 16000, 64000), "input, on the device"),
}


def measured(curve: str, point: int, config: str) -> dict:
    """The row of the bench for one point of a curve."""
    what, flags = CURVES[curve][2], os.environ.get("XLA_FLAGS", "")
    options = {
        "networks": [f"--nums={point}"],
        "seeds": [f"--seeds={point}"],
        "depth": [],
        "devices": [],
        "examples": [f"--examples={point}", "--parts=input"],
    }[curve]
    if curve == "depth":
        config = f"{config.split(':')[0]}:network=resnet{point}"
    if curve == "devices":
        flags += f" --xla_force_host_platform_device_count={point}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ffl_jax.bench", f"--config={config}", "--synthetic=100"]
        command += ["--parts=step", *options, f"--json={folder}/rows.json"]
        subprocess.run(
            command, check=True, cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, stdout=subprocess.PIPE
        )
        rows = json.loads(pathlib.Path(folder, "rows.json").read_text())["rows"]
    return next(row for row in rows if row["what"] == what)


def slope(points, times) -> float:
    return float(np.polyfit(np.log(points), np.log(times), 1)[0])


def table(name: str, rows: dict[int, dict]) -> str:
    axis, _, what = CURVES[name]
    lines = [
        f"| {axis} | ms a batch, {what} | compilation s | temporary MB | exchanged MB (messages) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for point, row in rows.items():
        messages = (row.get("communication") or {}).values()
        exchanged = ""
        if messages:
            total = sum(one["bytes"] for one in messages) / 1e6
            exchanged = f"{total:.2f} ({sum(one['messages'] for one in messages)})"
        compiled = f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else ""
        temporary = f"{row['temporary_mb']:.0f}" if "temporary_mb" in row else ""
        lines.append(f"| {point} | {row['milliseconds']:.1f} | {compiled} | {temporary} | {exchanged} |")
    times = [row["milliseconds"] for row in rows.values()]
    return "\n".join([*lines, "", f"Slope {slope(list(rows), times):.2f}.", ""])


def draw(curves: dict[str, dict[int, dict]], path: str):
    figure, panels = plt.subplots(1, len(curves), figsize=(3.1 * len(curves), 2.9), squeeze=False)
    for panel, (name, rows) in zip(panels[0], curves.items(), strict=True):
        axis, _, what = CURVES[name]
        points, times = list(rows), [row["milliseconds"] for row in rows.values()]
        fitted = slope(points, times)
        middle = np.exp(np.mean(np.log(times)) + fitted * (np.log(points) - np.mean(np.log(points))))
        panel.plot(points, middle, color="0.7", linestyle="--", label=f"slope {fitted:.2f}")
        panel.plot(points, times, marker="o", color="C0")
        panel.set(xscale="log", yscale="log", xlabel=axis, ylim=(min(times) / 2, max(times) * 2))
        panel.set_title(what, fontsize=9)
        panel.set_xticks(points, [f"{point // 1000}k" if point >= 1000 else str(point) for point in points])
        panel.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        panel.minorticks_off()
        ticks = np.unique([float(f"{x:.1g}") for x in np.geomspace(min(times) / 1.5, max(times) * 1.5, 4)])
        panel.set_yticks(ticks)
        panel.legend(frameon=False, fontsize=8, loc="upper left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("milliseconds a batch")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="the picture, a PNG file")
    parser.add_argument("--config", default="configs/cifar100.py:network=resnet8")
    parser.add_argument("--curves", default=",".join(CURVES))
    arguments = parser.parse_args()
    curves = {}
    for name in arguments.curves.split(","):
        if name not in CURVES:
            parser.error(f"--curves: no curve {name!r}, there are {', '.join(CURVES)}")
        curves[name] = {}
        for point in CURVES[name][1]:
            print(f"{name} {point} ...", file=sys.stderr, flush=True)
            curves[name][point] = measured(name, point, arguments.config)
        print(table(name, curves[name]), flush=True)
    draw(curves, arguments.output)


if __name__ == "__main__":
    main()
