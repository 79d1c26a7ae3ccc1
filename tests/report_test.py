"""The report on run folders written here by hand, with numbers that can be checked on paper."""

import csv
import dataclasses
import html.parser
import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from ffl_jax import evaluate
from ffl_jax.data import base
from ffl_jax.errors import ConfigError
from ffl_jax.methods import METHODS
from ffl_jax.models import NETWORKS
from ffl_jax.reporting import (
    by_class,
    cells,
    comparability,
    confusion,
    drawing,
    groups,
    published,
    report,
    runs,
    statistics,
)
from ffl_jax.training import confusion as table
from ffl_jax.training import metrics, scoring
from ffl_jax.workdir.files import write_json

# Test top-1 of what is shipped, in percent, by seed. FFL: mean 55, deviation the root of (4 + 1 + 9) / 2.
FFL = {0: 53.0, 1: 54.0, 2: 58.0}
ALONE = {0: 50.0, 1: 52.0, 2: 54.0}  # FFL less these: 3, 2 and 4, so mean 3 and deviation 1
CLASSES = ["cat", "<i>, b", "a|b"]  # of which the second has no images
CONFIG = {
    "seed": 0,
    "num_seeds": 1,
    "epochs": 2,
    "batch_size": 64,
    "precision": "float32",
    "method": {"name": "", "temperature": 3.0},
    "optimizer": {"name": "sgd", "learning_rate": 0.1, "weight_decay": 1e-4, "decay_epochs": [1]},
    "optimizer_rules": [],
    "data": {"name": "cifar10", "data_dir": "/somewhere", "flip": True, "validation_examples": 0},
    "subnetworks": {"network": "resnet32", "num": 2, "shared_stages": 2, "execution": "loop"},
    "evaluation": {"batch_size": 500},
}


def scores(top1, parameters=1000, flops=2e6):
    own = {"top1": top1 / 100, "parameters": parameters, "flops": flops}
    return own | {"top5": 0.9, "nll": 1.5, "ece": 0.05}


def write_run(folder, method="ffl", seed=0, top1=53.0, new=False, status="completed", **settings):
    """A finished run of two ResNet-32; `new` adds what early versions did not record."""
    folder.mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG))
    config["seed"], config["method"]["name"] = seed, method
    for key, value in settings.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config)[name] = value
    predictors = {"ensemble": scores(top1 + 1, 2000, 4e6), "sub_0": scores(top1), "sub_1": scores(top1 - 1)}
    summary = {
        "status": status,
        "step": 20,
        "epoch": 2.0,
        "seed": seed,
        "method": method,
        "networks": ["resnet32", "resnet32"],
        "dataset": config["data"]["name"],
        "predictors": predictors,
        "deploy": "sub_0",
        "best": None,
        "images_per_second": 100.0 + seed,
        "device": "1 x cpu",
        "versions": {"jax": "0.10.2"},
    }
    lines = []
    for epoch in (1, 2):
        line = {"step": 10 * epoch, "epoch": float(epoch), "split": "test", "sub_0/nll": 2.0 / epoch}
        line["sub_0/top1"] = epoch / 2 * top1 / 100
        lines += [{"step": 10 * epoch, "epoch": float(epoch), "split": "train", "sub_0/nll": 1.5}, line]
        if new:
            line |= {"diversity/disagreement": 0.2, "diversity/kl": 0.1, "diversity/cka": 0.9}
    if new:
        filled = {"count": [10, 30], "confidence": [0.9, 0.97], "accuracy": [0.8, 0.9]}
        bins = {key: [0] * 13 + last for key, last in filled.items()}
        best = {"step": 10, "epoch": 1.0, "validation_top1": 0.6}
        summary |= {
            "reliability": {name: bins for name in predictors},
            "diversity": {"disagreement": 0.25, "kl": 0.125, "cka": 0.75},
            "training": {"flops": 2e15, "seconds": 5025.0 + 60 * seed},
            "fingerprint": "0123456789abcdef",
            "best": best | {"predictors": {"sub_0": scores(top1 - 5)}},
        }
        summary |= {"balanced_accuracy": dict.fromkeys(predictors, (top1 + 2) / 100)}
        summary |= {"per_class": {"names": CLASSES, "accuracy": [0.75 + seed / 10, None, 0.5]}}
        counts = [f"cat,{6 + seed},0,{4 - seed}", '"<i>, b",0,0,0', "a|b,4,1,5"]
        (folder / "confusion.csv").write_text("\n".join(['true \\ predicted,cat,"<i>, b",a|b', *counts, ""]))
    write_json(folder / "config.json", config)
    write_json(folder / "summary.json", summary)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_both(folder, **options):
    for method, values in (("ffl", FFL), ("independent", ALONE)):
        for seed, top1 in values.items():
            write_run(folder / f"{method}_seed{seed}", method, seed, top1, **options)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Reports on runs with all fields, and on runs of an early version."""
    folder = tmp_path_factory.mktemp("report")
    report.write([write_both(folder / "new_runs", new=True)], folder / "new")
    report.write([write_both(folder / "old_runs")], folder / "old")
    return folder


def rows_of(folder):
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        return {(row["method"], row["prediction"]): row for row in csv.DictReader(file)}


# -- statistics --------------------------------------------------------------------------------------------


def test_spread():
    one = statistics.spread([53.0, 54.0, None, 58.0])
    assert (one.mean, one.count) == (55, 3)
    assert one.std == pytest.approx(2.6457513)
    assert statistics.spread([4.0]) == statistics.Spread(4.0, None, 1)
    assert statistics.spread([None]) is None


@pytest.mark.parametrize(
    ("count", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (31, 2.042)]
)
def test_the_interval_follows_the_printed_table_of_t(count, quantile):
    """Two-sided 95 %, count - 1 degrees of freedom: three decimals, as in any textbook."""
    ours = {seed: float(seed % 2) for seed in range(count)} | {99: 5.0}
    theirs = {seed: 0.0 for seed in range(count)} | {98: 5.0}
    ones = count // 2
    mean = ones / count
    variance = (ones * (1 - mean) ** 2 + (count - ones) * mean**2) / (count - 1)
    one = statistics.paired_difference(ours, theirs)
    assert (one.count, one.mean) == (count, pytest.approx(mean))
    half = quantile * (variance / count) ** 0.5
    assert (one.low, one.high) == pytest.approx((mean - half, mean + half), abs=1e-3)


def test_too_few_pairs():
    one = statistics.paired_difference({0: 3.0, 1: 1.0, 2: 3.0}, {0: 1.0, 2: None})
    assert one == statistics.Difference(2.0, None, None, 1)
    assert statistics.paired_difference({0: 3.0}, {1: 1.0}) is None
    assert not statistics.Difference(2.0, None, None, 1).clear
    assert statistics.Difference(2.0, 0.1, 3.9, 3).clear


# -- run folders -------------------------------------------------------------------------------------------


def test_a_folder_of_runs_seeds_and_a_run_named_twice(tmp_path):
    write_run(tmp_path / "runs" / "ffl_seed0")
    joint = tmp_path / "runs" / "joint"
    for seed in (1, 2):
        write_run(joint / f"seed_{seed}", seed=seed)
        write_run(joint / f"seed_{seed}" / "teachers" / "0", seed=seed)  # belongs to its student
    shutil.copy(joint / "seed_1" / "config.json", joint)
    write_json(joint / "summary.json", {"status": "completed", "seed": [1, 2]})
    found, unusable, damaged = runs.read([tmp_path / "runs", joint, joint / "seed_2"])
    assert sorted(run.folder.name for run in found) == ["ffl_seed0", "seed_1", "seed_2"]
    assert (unusable, damaged) == ([], {})
    (members,) = groups.group(found, unusable).values()
    assert [one.seeds for one in members] == [[0, 1, 2]]


def damage(folder, **changes):
    """Changes a summary; None takes the key out."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8")) | changes
    write_json(folder / "summary.json", {key: x for key, x in summary.items() if x is not None})


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda run: (run / "summary.json").unlink(), "no summary.json, it has not come to its end"),
        (lambda run: (run / "summary.json").write_text('{"status": "comp'), "summary.json cannot be read"),
        (lambda run: (run / "summary.json").write_text("[]"), "summary.json is not that of a run"),
        (lambda run: (run / "config.json").unlink(), "no config.json"),
        (lambda run: damage(run, status="preempted"), "preempted at step 20, epoch 2"),
        (lambda run: damage(run, status="diverged"), "diverged at step 20, epoch 2"),
        (lambda run: damage(run, deploy=None), "summary.json lacks 'deploy'"),
        (lambda run: damage(run, deploy="leader"), "no predictor 'leader'"),
        (lambda run: damage(run, predictors={"sub_0": {"flops": 1}}), "no test scores of sub_0"),
        (lambda run: damage(run, predictors={"sub_0": 3}), "'predictors' of another kind"),
        (lambda run: damage(run, networks="resnet32"), "'networks' of another kind"),
        (lambda run: damage(run, seed=[0, 1]), "several seeds, whose folders seed_N are gone"),
    ],
)
def test_a_run_that_cannot_be_used_is_named_and_left_out(tmp_path, break_it, reason):
    broken = write_run(tmp_path / "a", seed=0)
    break_it(broken)
    with pytest.raises(ConfigError, match=re.escape(reason)):
        runs.read([broken])
    write_run(tmp_path / "b", seed=1)
    found, unusable, _ = runs.read([tmp_path])
    assert [run.seed for run in found] == [1]
    assert (unusable[0].folder, reason in unusable[0].reason) == (broken, True)


def test_damaged_lines_of_metrics_are_left_out(tmp_path):
    folder = write_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('[1]\n{}\n{"step": 30, "ep')  # the last is being written
    (run,), _, damaged = runs.read([folder])
    assert len(run.metrics) == 4
    assert damaged == {folder: "2 damaged line(s)"}
    (folder / "metrics.jsonl").unlink()
    assert runs.read([folder])[2] == {folder: "no metrics.jsonl"}


def test_damaged_extras_count_as_missing(tmp_path):
    runs_folder = write_both(tmp_path / "runs", new=True)
    damage(runs_folder / "ffl_seed0", reliability="x", diversity=[], training=3, best={"predictors": 1})
    damage(runs_folder / "ffl_seed1", reliability={"sub_0": {"count": [1], "confidence": []}}, versions=[1])
    damage(runs_folder / "ffl_seed2", training={"flops": "many", "seconds": float("inf")}, fingerprint=4)
    for seed in ALONE:
        shown = {"ensemble": {"flops": "many"}, "sub_0": {"top1": ALONE[seed] / 100, "flops": "many"}}
        damage(runs_folder / f"independent_seed{seed}", predictors=shown)
    with open(runs_folder / "ffl_seed0" / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "epoch": 3.0, "split": "test", "sub_0/top1": "good"}\n')
    report.write([runs_folder], tmp_path / "out")
    row = rows_of(tmp_path / "out")["ffl", "sub_0"]
    assert (float(row["top1_mean"]), float(row["training_flops_mean"])) == (pytest.approx(0.55), 2e15)
    assert row["training_seconds_mean"] == "5085.0"  # of seed 1 alone


def test_training_counts_the_teachers(tmp_path):
    """Those that a run trained first, and theirs: 2, 0.5 and 0.25 P; what one does not tell is unknown."""
    student = write_run(tmp_path / "kd", "kd", new=True)
    for folder, training in (
        ("teachers/0", {"flops": 5e14, "seconds": 100.0}),
        ("teachers/0/teachers/0", {"flops": 2.5e14}),
    ):
        damage(write_run(student / folder, "kd", 1000), training=training)

    def training():
        (run,), *_ = runs.read([tmp_path])
        return run.summary["training"]

    assert training() == {"flops": 2.75e15}
    (student / "teachers/0/summary.json").write_text("{")
    assert training() == {}


def test_refusals(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", method__temperature=4.0)
    with pytest.raises(
        ConfigError, match=r"two runs of ffl .* seed 0: .*/a and .*/b, .* config.method; leave one"
    ):
        runs.read([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no run"):
        runs.read([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="is no folder"):
        runs.read([tmp_path / "none"])
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        report.write([tmp_path / "a"], tmp_path / "file")


# -- what compares -----------------------------------------------------------------------------------------


def check(folder):
    """(warnings, notes) on all runs in a folder, as text."""
    found, unusable, _ = runs.read([folder])
    (members,) = groups.group(found, unusable).values()
    return tuple("\n".join(texts) for texts in comparability.check(members))


def test_alike_runs_give_no_warning(tmp_path):
    assert check(write_both(tmp_path)) == ("", "")


@pytest.mark.parametrize(
    ("setting", "value", "warning"),
    [
        ("epochs", 3, "`epochs`: 2 in ffl, independent seed 0, 1; 3 in independent seed 2."),
        ("batch_size", 32, "`batch_size`: 64 in ffl, independent seed 0, 1; 32 in independent seed 2."),
        ("precision", "bfloat16", "`precision`: float32 in ffl, independent seed 0, 1; bfloat16 in"),
        ("data__flip", False, "`data.flip`: True in ffl, independent seed 0, 1; False in independent"),
        ("optimizer__learning_rate", 0.05, "`optimizer.learning_rate`: 0.1 in"),
        ("method__temperature", 4.0, "`method.temperature`: 3 in independent seed 0, 1; 4 in independent"),
        ("optimizer_rules", [[".*", {}]], "`optimizer_rules`: () in independent seed 0, 1;"),
        ("subnetworks__shared_stages", 0, "`subnetworks.shared_stages`: 2 in independent seed 0, 1; 0 in"),
    ],
)
def test_a_setting_that_differs_is_named_with_values_and_runs(tmp_path, setting, value, warning):
    write_both(tmp_path)
    shutil.rmtree(tmp_path / "independent_seed2")
    write_run(tmp_path / "independent_seed2", "independent", 2, **{setting: value})
    assert warning in check(tmp_path)[0]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("method__temperature", 4.0),
        ("evaluation__batch_size", 3),
        ("subnetworks__execution", "vmap"),
        ("precision", None),
    ],
)
def test_what_may_differ_does(tmp_path, setting, value):
    """A method's own settings, those that change no number, and those that an early version did not have."""
    write_run(tmp_path / "a", "ffl", 0, **{setting: value})
    write_run(tmp_path / "b", "ffl", 1, **{setting: value})
    for seed in (0, 1):
        write_run(tmp_path / f"alone{seed}", "independent", seed)
    assert check(tmp_path) == ("", "")


def test_notes_on_the_methods_own(tmp_path):
    for seed in (0, 1):
        own = {"optimizer_rules": [["x", {}]], "subnetworks__shared_stages": 1}
        write_run(tmp_path / f"ffl{seed}", "ffl", seed, **own)
        write_run(tmp_path / f"alone{seed}", "independent", seed)
    damage(tmp_path / "ffl0", device="1 x H100")
    warnings, notes = check(tmp_path)
    assert warnings == ""
    assert "`subnetworks.shared_stages`: 1 in ffl; 2 in independent." in notes
    assert "`optimizer_rules`: ffl set some parameters' optimiser apart" in notes
    assert "`device`: 1 x cpu in independent, ffl seed 1; 1 x H100 in ffl seed 0." in notes


def test_seeds_versions_data_and_unfinished_runs(tmp_path):
    write_both(tmp_path)
    damage(tmp_path / "ffl_seed0", status="diverged")
    damage(tmp_path / "ffl_seed1", status="preempted")
    damage(tmp_path / "ffl_seed2", versions={"jax": "0.11.0"}, fingerprint="a" * 40)
    damage(tmp_path / "independent_seed0", fingerprint="a" * 40)
    warnings, _ = check(tmp_path)
    assert f"`{tmp_path}/ffl_seed0`: diverged at step 20, epoch 2; left out of every mean." in warnings
    assert "One run only, which says nothing about chance: ffl." in warnings
    assert "`seed`: 2 in ffl; 0, 1, 2 in independent. Means are over different seeds." in warnings
    assert "`versions.jax`: 0.10.2 in independent; 0.11.0 in ffl." in warnings


def test_other_data_of_one_name_is_another_dataset(tmp_path):
    """By the fingerprint, where that does not come from another number of validation examples."""
    write_both(tmp_path)
    for seed, fingerprint in enumerate("abb"):
        for method in ("ffl", "independent"):
            damage(tmp_path / f"{method}_seed{seed}", fingerprint=fingerprint * 40)
    found = groups.group(*runs.read([tmp_path])[:2])
    assert {name: [one.seeds for one in members] for name, members in found.items()} == {
        "cifar10 (aaaaaaaaaaaa)": [[0], [0]],
        "cifar10 (bbbbbbbbbbbb)": [[1, 2], [1, 2]],
    }
    for seed, carved in ((0, 5), (1, 0), (2, 0)):
        for method in ("ffl", "independent"):
            path = tmp_path / f"{method}_seed{seed}" / "config.json"
            config = json.loads(path.read_text())
            config["data"]["validation_examples"] = carved
            write_json(path, config)
    assert list(groups.group(*runs.read([tmp_path])[:2])) == ["cifar10"]


def test_image_folders_of_early_versions_are_told_apart_by_their_place(tmp_path):
    for seed, place in ((0, "/a"), (1, "/b")):
        write_run(tmp_path / str(seed), seed=seed, data__name="folder", data__data_dir=place)
    warnings, _ = check(tmp_path)
    assert "`data.data_dir`: /a in ffl seed 0; /b in ffl seed 1." in warnings
    assert "No independent training with the same network beside ffl" in warnings


def test_the_baseline_is_the_same_network(tmp_path):
    """Two plain networks in one run stand for one; other networks do not."""
    one, both = ["resnet32"], ["resnet32", "wrn16_2"]
    for name, method, names in (
        *(("a", "independent", one), ("b", "independent", both), ("c", "ffl", both)),
        *(("d", "kd", both[1:]), ("e", "dml", one)),
    ):
        damage(write_run(tmp_path / name, method), networks=names)
    found, unusable, _ = runs.read([tmp_path])
    (members,) = groups.group(found, unusable).values()
    by_folder = {one.runs[0].folder.name: one for one in members}
    bases = {name: groups.baseline(one, members) for name, one in by_folder.items()}
    assert bases == {"a": None, "b": None, "c": by_folder["b"], "d": None, "e": by_folder["a"]}


# -- predictions -------------------------------------------------------------------------------------------


def test_names_tell_the_roles_in_early_versions(tmp_path):
    """Whatever stands in place of them; where one alone is damaged, only that one is guessed."""
    expected = {
        "ema_fused": ("fused", None),
        "ema_1": ("network", "y"),
        "ensemble": ("ensemble", None),
        "fused": ("fused", None),
        "leader": ("network", "z"),
        "sub_1": ("network", "y"),
        "sub_7": ("network", "x"),
        "student": ("network", "x"),
        "teacher_ensemble": ("teacher", None),
    }
    folder = write_run(tmp_path / "a")
    damage(folder, networks=["x", "y", "z"], predictors={name: scores(50) for name in expected})
    damage(folder, deploy="sub_1")

    def roles():
        (run,), *_ = runs.read([folder])
        return {name: (role["kind"], role["network"]) for name, role in run.roles.items()}

    for given in (None, 3, [], {"sub_1": 3, "ema_1": {"kind": []}, "alpha": {"kind": "teacher"}}):
        damage(folder, roles=given)
        assert roles() == expected
        assert list(roles()).index("fused") < list(roles()).index("ema_fused")
    damage(folder, roles={"sub_1": {"kind": "network"}, "leader": {"kind": "teacher", "network": None}})
    assert roles() == expected | {"leader": ("teacher", None)}


ROLES = {
    "alpha": {"kind": "network", "network": "wrn16_2"},
    "beta": {"kind": "network", "network": "resnet32"},
    "blend": {"kind": "ensemble", "network": None},
    "all": {"kind": "ensemble", "network": None},
    "brew": {"kind": "fused", "network": None},
    "old_master": {"kind": "teacher", "network": None},
}


@pytest.fixture
def own_names(tmp_path, monkeypatch):
    """(A report on a method with the predictions above, [(label, x)] of the dots in its pictures).

    `alpha` has the top-1 of FFL, and every further one, from A to Z, a point more.
    """
    for seed, top1 in FFL.items():
        folder = write_run(tmp_path / "runs" / f"own{seed}", "kdcl", seed)
        others = enumerate(sorted(ROLES.keys() - {"alpha"}), 1)
        shown = {"alpha": scores(top1)} | {name: scores(top1 + i, flops=3e6 * i) for i, name in others}
        damage(folder, networks=["resnet32", "wrn16_2"], predictors=shown, deploy="alpha", roles=ROLES)
        folder = write_run(tmp_path / "runs" / f"alone{seed}", "independent", seed)
        damage(folder, networks=["wrn16_2"], predictors={"only": scores(ALONE[seed])}, deploy="only")
    figure = published.lookup("cifar10", "resnet32", "ffl")[0]
    figures = {("cifar10", "wrn16_2", "kdcl"): [dataclasses.replace(figure, prediction="ensemble")]}
    monkeypatch.setattr(published, "lookup", lambda *key: figures.get(key, []))
    dots, scatter = [], Axes.scatter

    def watched(axes, x, y, **options):
        dots.append((options.get("label"), x))
        return scatter(axes, x, y, **options)

    monkeypatch.setattr(Axes, "scatter", watched)
    report.write([tmp_path / "runs"], tmp_path / "out")
    return tmp_path / "out", dots


def test_a_methods_own_names_come_out_as_what_they_are(own_names):
    folder, dots = own_names
    text = (folder / "report.md").read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    assert (
        "| kdcl | resnet32 + wrn16_2 | alpha | 55.00 ± 2.65 | +3.00 [+0.52, +5.48], n = 3 | 3 | 2 |" in text
    )
    networks, ensembles = "alpha 55.00 ± 2.65, beta 57.00 ± 2.65", "all 56.00 ± 2.65, blend 58.00 ± 2.65"
    assert f"| kdcl | {networks} | {ensembles} | brew 59.00 ± 2.65 | old_master 60.00 ± 2.65 |" in text
    assert "| kdcl | wrn16_2 | ensemble | 58.00 ± 2.65 | 2 | 94.01 ± 0.11 [1]†" in text
    rows = rows_of(folder)
    names = ["alpha", "beta", "all", "blend", "brew", "old_master"]
    assert [name for method, name in rows if method == "kdcl"] == names
    assert [name for name in names if rows["kdcl", name]["published_percent"]] == ["blend"]
    assert float(rows["kdcl", "alpha"]["difference_mean"]) == pytest.approx(0.03)
    marks = [dot for dot in dots if dot[0] in ("ensemble", "fused")]
    assert marks == 2 * [("ensemble", pytest.approx(58)), ("fused", pytest.approx(59))]  # light and dark
    assert {len(x) for label, x in dots if label == "others"} == {4}  # no teacher


# -- published figures -------------------------------------------------------------------------------------


def test_published_figures_by_dataset_network_and_method():
    (ffl,) = published.lookup("cifar10", "resnet32", "ffl")
    assert (ffl.top1, ffl.std, ffl.epochs) == (94.01, 0.11, 300)
    assert (ffl.prediction, ffl.second_hand) == ("network", True)
    assert "AAAI 2021" in ffl.source.citation
    ffsd = published.lookup("cifar100", "resnet32", "ffsd")[0]  # of 74.92, 74.82 and 74.82
    assert (ffsd.top1, ffsd.std, ffsd.runs, ffsd.selection) == (74.85, 0.06, 3, "best")
    assert published.lookup("cifar100", "resnet110", "ffl") == []  # that table's ResNet-110 has bottlenecks
    assert published.lookup("cifar100", "resnet110_bottleneck", "ffl")[0].top1 == 77.22
    assert published.lookup("digits", "resnet8", "ffl") == []


def test_every_published_row_can_be_met():
    rows = published._figures()
    keys = [(x.dataset, x.network, x.method, x.prediction, x.source.key, x.top1) for x in rows]
    assert len(set(keys)) == len(rows)
    for row in rows:
        assert row.dataset in {"cifar10", "cifar100", "imagenet2012", *base.SOURCES}
        assert row.network in NETWORKS, row
        assert row.method in METHODS, row
        assert row.prediction in ("network", "ensemble", "unknown")
        assert row.selection in ("last", "best", "unknown")
        assert 50 < row.top1 < 100
        assert row.std is None or 0 < row.std < 1
        assert row.source.url.startswith("https://")
    assert {row.source.key for row in rows} == set(published.sources())


# -- tables ------------------------------------------------------------------------------------------------


def test_markdown(written):
    text = (written / "new" / "report.md").read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    lines = text.splitlines()
    # 3 ± 4.303 / sqrt(3) = 3 ± 2.484
    ffl = "| ffl | resnet32 × 2 | sub_0 | 55.00 ± 2.65 | 50.00 ± 2.65 | +3.00 [+0.52, +5.48], n = 3 "
    ffl += "| 94.01 ± 0.11 [1]† | 3 | 2 |"
    assert ffl in lines
    alone = "| independent | resnet32 × 2 | sub_0 | 52.00 ± 2.00 | 47.00 ± 2.00 | – | – | 3 | 2 |"
    assert lines.index(alone) == lines.index(ffl) + 1
    assert "| ffl | sub_0 55.00 ± 2.65, sub_1 54.00 ± 2.65 | ensemble 56.00 ± 2.65 |" in lines
    cost = "| 1.500 ± 0.000 | 0.050 ± 0.000 | 90.00 ± 0.00 | 1,000 | 2 M | 2 P | 1 h 25 min | 101 ± 1 "
    cost += "| 25.0 ± 0.0 | 0.125 ± 0.000 | 0.750 ± 0.000 |"
    assert f"| ffl | resnet32 × 2 {cost}" in lines
    assert "above: ffl; below: none; not told apart: none." in text
    assert "compare only where the recipe is the same" in text
    assert "| ffl | resnet32 | one network | 55.00 ± 2.65 | 2 | 94.01 ± 0.11 [1]† | – | 300 | – |" in text
    assert "1. Wu and Gong" in text
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    names = ["accuracy", "curves", "losses", "cost", "reliability", "diversity", "confusion"]
    assert pictures == [f"cifar10_{name}.png" for name in names]
    for name in pictures:
        with Image.open(written / "new" / name) as image:
            assert len(image.convert("RGB").getcolors(10**6)) > 50, "nothing is drawn"


def test_what_early_versions_did_not_record_is_left_out_and_said(written):
    text = (written / "old" / "report.md").read_text(encoding="utf-8")
    assert "| ffl | resnet32 × 2 | sub_0 | 55.00 ± 2.65 | +3.00 [+0.52, +5.48], n = 3 |" in text
    assert "Empty, and left out: chosen by validation, %." in text
    assert "Empty, and left out: training FLOPs; training time; disagreement %; KL; CKA." in text
    assert "- Reliability: the runs record no `reliability`." in text
    assert "- What is taken for what: all seeds of a row need a confusion.csv, of the same classes." in text
    assert "class by class" not in text
    assert not (written / "old" / "cifar10_diversity.png").exists()
    assert rows_of(written / "old")["ffl", "sub_0"]["training_flops_mean"] == ""


def test_csv_has_every_number_unrounded(written):
    rows = rows_of(written / "new")
    names = ("sub_0", "sub_1", "ensemble")
    assert list(rows) == [(method, name) for method in ("ffl", "independent") for name in names]
    ffl = rows["ffl", "sub_0"]
    expected = {  # of the seeds' numbers above, by hand
        "top1_mean": 0.55,
        "top1_std": 0.026457513110645906,
        "validation_chosen_top1_mean": 0.5,
        "difference_mean": 0.03,
        "training_seconds_mean": 5085,
        "training_seconds_std": 60,
        "images_per_second_mean": 101,
        "balanced_accuracy_mean": 0.57,
        "balanced_accuracy_std": 0.026457513110645906,
        "flops": 2e6,
    }
    assert {key: float(ffl[key]) for key in expected} == pytest.approx(expected)
    assert float(ffl["difference_low"]) == pytest.approx(0.03 - 0.04303 / 3**0.5, abs=1e-5)
    assert (ffl["seeds"], ffl["difference_seeds"], ffl["ships"], ffl["epochs"]) == ("0 1 2", "3", "yes", "2")
    assert (ffl["validation_chosen_epochs"], ffl["published_percent"]) == ("1", "94.01 ± 0.11 (PCL paper)")
    assert rows["ffl", "ensemble"]["difference_mean"] == rows["independent", "sub_0"]["difference_mean"] == ""


def test_class_by_class(written):
    """Means over three seeds, by hand: cats 85 % right, and 3 of 10 taken for the last, 4 and 1 of that."""
    text = (written / "new" / "report.md").read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    confused = "a\\|b → cat: 40.0, cat → a\\|b: 30.0, a\\|b → \\<i>, b: 10.0"
    for method, balanced in (("ffl", "57.00 ± 2.65"), ("independent", "54.00 ± 2.00")):
        assert f"| {method} | {balanced} | a\\|b: 50.0, cat: 85.0 | {confused} |" in text
    page = (written / "new" / "index.html").read_text(encoding="utf-8")
    assert "<i>" not in page


def test_a_matrix_for_each_row_that_has_one(tmp_path):
    """Of two groups one has a seed whose classes are others."""
    write_both(tmp_path, new=True)
    table = tmp_path / "ffl_seed1" / "confusion.csv"
    table.write_text(table.read_text().replace("cat", "dog"))
    found, unusable, _ = runs.read([tmp_path])
    (members,) = groups.group(found, unusable).values()
    (group,), (one,) = zip(*by_class.confusions(members).items(), strict=True)
    assert group.method == "independent"
    shares = [[0.7, 0, 0.3], [float("nan")] * 3, [0.4, 0.1, 0.5]]
    np.testing.assert_allclose(one.shares, shares)  # equal_nan


@pytest.mark.parametrize("num", [3, 11, 26, 100, 501])
def test_matrices_are_drawn_for_any_number_of_classes(tmp_path, num, monkeypatch):
    """Up to the pixels; the largest error of all stands out of a cell that shows several."""
    monkeypatch.setattr(drawing.Figure, "savefig", lambda figure, data, **_: data.write(bytes(24)))
    seen = []
    monkeypatch.setattr(
        Axes, "imshow", lambda axes, x, *_, f=Axes.imshow, **o: seen.append(x) or f(axes, x, *_, **o)
    )
    counts = np.eye(num) * 100
    counts[1, num - 1] = 60
    confusions = {}
    for method in ("ffl", "independent"):
        (run,), *_ = runs.read([write_run(tmp_path / method, method)])
        confusions[groups.Group("x", method, run.networks, (run,))] = by_class.Confusion(
            ["n" * 99 + str(i) for i in range(num)], counts
        )
    (picture,), missing = confusion.draw(confusions, "x")
    assert (picture.name, missing) == ("x_confusion", [])
    right, wrong = seen[:2]
    assert np.nanmax(right) == 1
    assert np.nanmax(wrong) == wrong[-1, -1] if num > 250 else wrong[-2, -1] == pytest.approx(60 / 160)
    assert max(right.shape) <= 250


def test_evaluate_says_which_classes(tmp_path, capsys, monkeypatch):
    """Two evaluations' worth of scores, by hand: twelve classes, one without images."""
    names = [*(f"class {k}" for k in range(10)), "a|b\n", "unseen"]
    confused = np.diag([*range(10, 20), 3, 0])
    confused[10, :3] = 4, 0, 1
    confused[0, 10] = 10
    sums = {"images": confused.sum(1), "right": {"sub_0": np.diag(confused)}, "confusion": confused}
    classes = metrics.class_scores(sums, "sub_0")
    scores = {"predictions": {"sub_0": {"top1": 0.5, "top5": 1, "nll": 2, "ece": 0.125}}, "classes": classes}
    scores["per_class"] = table.per_class(classes, names, "sub_0")
    asked = []
    monkeypatch.setattr(scoring, "evaluate_checkpoint", lambda *given: asked.append(given) or (7, scores))
    evaluate.command(["evaluate", "--workdir=w", "--predictor=sub_0"])
    text = capsys.readouterr().out
    assert asked == [(pathlib.Path("w"), None, "test", None, "sub_0")]
    balanced = 100 * (0.5 + 3 / 8 + 9) / 11
    assert f"| sub_0 | 50.00 | 100.00 | 2.0000 | 0.1250 | {balanced:.2f} |" in text
    first = "| a\\|b\\\\n | 37.50 | 8 |\n| class 0 | 50.00 | 20 |\n| class 1 | 100.00 | 11 |"
    assert "sub_0 by class, worst first (10 of 11 classes; all with --per_class)" in text
    assert f"| class | accuracy % | images |\n| --- | ---: | ---: |\n{first}" in text
    assert "class 9" not in text
    assert "without images: unseen" in text
    pairs = ["| class 0 | a\\|b\\\\n | 10 | 50.00 |", "| a\\|b\\\\n | class 0 | 4 | 50.00 |"]
    assert "\n".join([*pairs, "| a\\|b\\\\n | class 2 | 1 | 12.50 |"]) in text
    evaluate.command(["evaluate", "--workdir=w", "--per_class"])
    assert "| class 9 | 100.00 | 19 |" in capsys.readouterr().out
    assert "too many classes" not in text
    evaluate.command(["evaluate", "--workdir=w", "--confusion"])
    read_names, counts = table.parse(capsys.readouterr().out.encode())
    assert read_names == names
    np.testing.assert_array_equal(counts, confused)
    classes["confusion"] = None
    scores["per_class"] = table.per_class(classes, names, "sub_0")
    evaluate.command(["evaluate", "--workdir=w"])
    assert capsys.readouterr().out.endswith("too many classes to count which is taken for which\n")
    with pytest.raises(ConfigError, match="12 classes have too large a confusion matrix"):
        evaluate.command(["evaluate", "--workdir=w", "--confusion"])


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (23514410, "23.5 M"), (1e9, "1 G"), (3.27e16, "32.7 P")]
)
def test_large_numbers(value, text):
    assert cells.scaled(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(97.2, "97 s"), (200, "3 min"), (5025, "1 h 24 min"), (90_000, "25 h 00 min")]
)
def test_durations(seconds, text):
    assert cells.duration(seconds) == text


def test_markdown_shows_what_is_written():
    assert cells.escape("a|b <i> `c` *d* sub_0") == "a\\|b \\<i> \\`c\\` \\*d\\* sub_0"


def test_labels_keep_their_distance():
    """Three that crowd around 1 are centred there; the fourth is far away."""
    assert drawing.spaced([0.9, 1.0, 1.1, 5.0], 1.0) == pytest.approx([0.0, 1.0, 2.0, 5.0])


# -- the page ----------------------------------------------------------------------------------------------

# Shows the page as wide as a phone, sorts its first table, and tells what a browser made of it.
WATCH = """<!doctype html><iframe id="page" style="width: 390px; height: 800px" src="%s"></iframe><pre></pre>
<script>
onload = () => {
  const {contentDocument: page, contentWindow: view} = document.getElementById("page");
  const body = page.querySelector("table").tBodies[0];
  const methods = () => [...body.rows].map((row) => row.cells[0].textContent);
  const found = {
    title: page.title,
    width: page.documentElement.scrollWidth,
    requests: view.performance.getEntriesByType("resource").map((entry) => entry.name),
    images: [...page.images].map((image) => image.naturalWidth),
    before: methods(),
  };
  page.querySelectorAll("th button")[3].click();
  page.querySelectorAll("th button")[3].click();
  document.querySelector("pre").textContent = JSON.stringify({...found, after: methods()});
};
</script>
"""


@pytest.fixture(scope="module")
def browse():
    """Opens a page in a browser that reaches no network; returns (what it found, lines on its console)."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("no Chromium: apt-get install chromium")

    def open_page(path, profile):
        watch = path.with_name("watch.html")
        watch.write_text(WATCH % path.name)
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        options += ["--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND"]
        options += ["--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", f"file://{watch}"]
        result = subprocess.run([binary, *options], capture_output=True, text=True, timeout=120, check=True)
        found = re.search(r"<pre>(.+)</pre>", result.stdout)
        assert found, result.stdout + result.stderr
        console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
        return json.loads(html.unescape(found[1])), console

    return open_page


def test_page_in_a_browser(written, browse, tmp_path):
    found, console = browse(written / "new" / "index.html", tmp_path)
    assert console == []
    assert found["requests"] == []
    assert found["title"] == "Runs compared · cifar10"
    assert len(found["images"]) == 7
    assert min(found["images"]) > 500
    assert found["width"] <= 390, "a phone would scroll the page sideways"
    assert found["before"] == ["ffl", "independent"]
    assert found["after"] == ["independent", "ffl"], "by top-1, the smallest first"


def test_the_browser_would_tell(written, browse, tmp_path):
    """The same eyes on a page with an error, a request and something wide."""
    page = (written / "old" / "index.html").read_text(encoding="utf-8")
    wrong = '<img src="http://outside.invalid/a.png" style="width: 900px"><script>nonsense()</script></body>'
    (tmp_path / "index.html").write_text(page.replace("</body>", wrong), encoding="utf-8")
    found, console = browse(tmp_path / "index.html", tmp_path / "profile")
    assert "nonsense is not defined" in console[0]
    assert found["requests"] == ["http://outside.invalid/a.png"]
    assert found["width"] > 390


def test_page_holds_all_that_it_shows(written):
    """Without a browser: well-formed, nothing is fetched, and both themes have their figures."""
    sources, open_tags = [], []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "link", "img", "source"):
                open_tags.append(tag)
            fetched = ("src", "srcset", "href") if tag != "a" else ()
            sources.extend(value for key, value in attributes if key in fetched)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    page = (written / "new" / "index.html").read_text(encoding="utf-8")
    Parser(convert_charrefs=True).feed(page)
    assert open_tags == []
    assert len(sources) == 15  # seven figures, light and dark, and the icon
    assert all(value.startswith("data:") for value in sources)
    assert "url(" not in page
    assert len(set(sources)) == 15


def test_text_from_files_is_no_markup(tmp_path):
    for seed in (0, 1):
        damage(write_run(tmp_path / "runs" / str(seed), seed=seed), dataset="<script>x|y", device="`<b>`")
    report.write([tmp_path / "runs"], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<script>x" not in page
    assert "<b>" not in page
    assert (tmp_path / "out" / "_script_x_y_accuracy.png").exists()


# -- the command -------------------------------------------------------------------------------------------


def test_command(commands, tmp_path):
    """Where texts are ASCII unless somebody says otherwise."""
    write_run(tmp_path / "runs" / "a", seed=0)
    write_run(tmp_path / "runs" / "b", seed=1, top1=54)
    arguments = ("runs/a", "--output=out", "runs/b")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = commands.run("-m", "ffl_jax.report", *arguments, cwd=tmp_path, env=ascii_only)
    pictures = [f"cifar10_{name}.png" for name in ("accuracy", "curves", "losses", "cost")]
    assert result.stdout.startswith(f"written to out: report.md, results.csv, index.html, {pictures[0]}")
    assert "2 finished runs" in result.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.md", "results.csv", "index.html", *pictures}
    assert "53.50 ± 0.71" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--output=out"], "no run is given"),
        (["runs"], "--output is missing"),
        (["nowhere", "--output=out"], "nowhere is no folder"),
    ],
)
def test_usage(commands, tmp_path, arguments, text):
    result = commands.run("-m", "ffl_jax.report", *arguments, code=2, cwd=tmp_path)
    assert text in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
