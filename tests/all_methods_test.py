"""The table of all methods: means and deviations by hand."""

import importlib.util

from conftest import ROOT

spec = importlib.util.spec_from_file_location("all_methods", ROOT / "launch" / "all_methods.py")
all_methods = importlib.util.module_from_spec(spec)
spec.loader.exec_module(all_methods)


def summary(deploy, networks, speed, **top1):
    predictors = {name: {"top1": value, "parameters": 1234} for name, value in top1.items()}
    return {"deploy": deploy, "networks": networks, "images_per_second": speed, "predictors": predictors}


def test_table():
    runs = {
        "dml": [
            summary("sub_0", ["a", "a"], 100.0, sub_0=0.5, ensemble=0.6),
            summary("sub_0", ["a", "a"], 300.0, sub_0=0.54, ensemble=0.6),
        ],
        "ffsd": [
            summary("leader", ["a"] * 3, None, sub_0=0.7, leader=0.75),
            summary("leader", ["a"] * 3, None, sub_0=0.7, leader=0.85),
        ],
    }
    # Of 50 and 54: 52, and the root of (2^2 + 2^2) / 1.
    assert all_methods.table(runs).splitlines()[2:] == [
        "| ffsd | 3 | leader | 80.00 ± 7.07 | 1,234 | sub_0 70.00 ± 0.00 |  |",
        "| dml | 2 | sub_0 | 52.00 ± 2.83 | 1,234 | ensemble 60.00 ± 0.00 | 200 |",
    ]
