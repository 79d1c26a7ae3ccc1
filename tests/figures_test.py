"""The figures of a report: what they say of one seed and of several, and where their axes and legends end."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.legend import Legend

from ffl_jax.reporting import figures
from ffl_jax.reporting.drawing import LIGHT, render
from ffl_jax.reporting.groups import Group
from ffl_jax.reporting.runs import FinishedRun

SEVERAL, ONE = "mean ± std over seeds", "one seed"


def make_run(method, seed, top1):
    """Almost perfect at its end, with seeds far apart, so that margins and bands would leave the domain."""
    rows = [{"epoch": x / 2, "split": "train", "sub_0/nll": 2.0 * seed + 0.01 / x} for x in range(1, 7)]
    different = {"diversity/disagreement": 0.0, "diversity/kl": 1e-3 * seed, "diversity/cka": 1.0}
    scores = {"sub_0/top1": top1 - 0.2 * seed, "sub_0/nll": 0.01}
    rows += [{"epoch": float(x), "split": "test", **scores, **different} for x in range(1, 4)]
    costs = {"sub_0": 1e6, "ensemble": 1.3e6}
    predictors = {name: {"top1": top1, "flops": flops, "ece": 0.01} for name, flops in costs.items()}
    count = [0.0] * 13 + [20.0, 100.0]
    bins = {"count": count, "confidence": [0.9] * 15, "accuracy": [1.0] * 15}
    summary = {"reliability": {"sub_0": bins}, "training": {"flops": 1e9 * (1 + seed + len(method))}}
    roles = {
        "sub_0": {"kind": "network", "network": "tiny"},
        "ensemble": {"kind": "ensemble", "network": None},
    }
    about = ("digits", method, ("tiny", "tiny"), seed, "sub_0", predictors, roles)
    return FinishedRun(Path(f"{method}{seed}"), {}, summary, rows, *about)


def make_group(method, seeds, top1=1.0):
    runs = tuple(make_run(method, seed, top1) for seed in range(seeds))
    return Group("digits", method, ("tiny", "tiny"), runs)


def drawn(name, groups):
    """The figure as it is before it becomes a PNG."""
    found = []

    def function(groups, theme):
        found.append(figures._FIGURES[name][0](groups, theme))
        return found[0]

    assert render(function, groups, LIGHT)
    return found[0]


def texts(figure):
    return [text.get_text() for one in figure.findobj(Legend) for text in one.get_texts()]


GROUPS = {
    "one run": [make_group("ffl", 1)],
    "one method": [make_group("ffl", 3)],
    "two methods": [make_group("ffl", 3), make_group("independent", 3, 0.97)],
    "one seed of one": [make_group("ffl", 1), make_group("independent", 3, 0.97)],
    "many": [
        make_group(name, 2, 0.9 + i / 100) for i, name in enumerate(("dml", "kdcl", "one", "ffl", "mfef"))
    ],
}


@pytest.mark.parametrize("name", figures._FIGURES)
@pytest.mark.parametrize("groups", ["one run", "one seed of one", "many"])
def test_legends_are_whole_and_axes_end_where_their_quantity_does(name, groups):
    figure = drawn(name, GROUPS[groups])
    for one in figure.findobj(Legend):
        box = one.get_window_extent()
        assert (box.x0 >= 0) & (box.x1 <= figure.bbox.width), texts(figure)
        assert (box.y0 >= 0) & (box.y1 <= figure.bbox.height), texts(figure)
    for axes in figure.axes if name != "accuracy" else ():
        low, high = axes.get_ylim()
        assert 0 <= low < high
        if name in ("curves", "cost"):
            assert high <= 100
    if name == "accuracy":
        low, high = figure.axes[0].get_xlim()
        assert 0 <= low < high <= 100
    if name == "diversity":
        assert [axes.get_ylim()[1] <= most for axes, most in zip(figure.axes, (100, np.inf, 1), strict=True)]


@pytest.mark.parametrize(
    ("groups", "there", "not_there"),
    [("one run", ONE, SEVERAL), ("one method", SEVERAL, ONE), ("one seed of one", ONE, "nothing else")],
)
def test_lines_say_whether_they_are_of_one_seed(groups, there, not_there):
    for name in ("curves", "losses"):
        said = texts(drawn(name, GROUPS[groups]))
        assert any(there in text for text in said)
        assert not any(not_there in text for text in said)


def test_bars_say_whether_they_are_of_one_seed():
    assert texts(drawn("accuracy", GROUPS["one run"])) == ["shipped, one seed", "ensemble"]
    several = ["mean over seeds, shipped", "one seed", "ensemble"]
    assert texts(drawn("accuracy", GROUPS["two methods"])) == several
    assert set(texts(drawn("accuracy", GROUPS["one seed of one"]))) == {*several, "shipped, one seed"}


def test_training_lines_that_cover_little_are_joined():
    """Three steps of a hundred at the end of an epoch are no point of their own."""
    group = make_group("ffl", 1)
    rows = group.runs[0].metrics
    rows += [
        {"epoch": 3.04, "split": "train", "sub_0/nll": 50.0},
        {"epoch": 3.5, "split": "train", "sub_0/nll": 0.0},
    ]
    epochs, values = group.curve("train", "sub_0/nll")
    assert list(epochs) == [0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert values[0, -1] == pytest.approx(50 * 0.04 / 0.5)


@pytest.mark.parametrize("top1", [-3.0, 0.0, 7.0])
def test_absurd_accuracies_are_drawn(top1):
    """Of a damaged file; what would leave an axis with nothing is not cut off."""
    for name in ("accuracy", "curves", "cost"):
        drawn(name, [make_group("ffl", 2, top1)])


@pytest.mark.parametrize(
    ("seconds", "unit"), [(0.4, "seconds"), (90, "seconds"), (5000, "minutes"), (9e4, "hours")]
)
def test_times_of_training_are_in_the_unit_of_the_longest(seconds, unit):
    groups = [make_group(method, 1) for method in ("ffl", "dml")]
    for group, share in zip(groups, (1, 1 / 3), strict=True):
        group.runs[0].summary["training"] = {"seconds": seconds * share}
    axes = drawn("cost", groups).axes[-1]
    assert axes.get_xlabel() == f"{unit}, all starts together"
    longest = axes.collections[0].get_offsets()[:, 0].max()
    assert longest == pytest.approx(seconds / {"seconds": 1, "minutes": 60, "hours": 3600}[unit])
