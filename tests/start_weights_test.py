"""Sub-networks that start from files of weights, exports and runs: what goes where, and what is refused."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import draw_model, first_state, write_run
from safetensors.numpy import save, save_file

from configs import digits as digits_config
from ffl_jax import data
from ffl_jax.errors import CheckpointError, ConfigError
from ffl_jax.models import NETWORKS, vit
from ffl_jax.pytorch import names
from ffl_jax.training import config as config_lib
from ffl_jax.training import start_weights
from ffl_jax.training.experiment import Experiment, check_belongs, run_record
from ffl_jax.workdir import sealing

GOLDEN = np.load(Path(__file__).parent / "data" / "vit_convnext.npz")
PREFIX = "vit/timm/weights/"
WEIGHTS = {k.removeprefix(PREFIX): GOLDEN[k] / np.float32(64) for k in GOLDEN if k.startswith(PREFIX)}


@pytest.fixture(autouse=True)
def small_vit(monkeypatch):
    """That of the golden weights, for images of 8 pixels; it has 5 classes there."""

    def network(num_classes):
        return vit.ViT(num_classes, patch=4, width=16, heads=2, blocks=(1, 1))

    monkeypatch.setitem(NETWORKS, "small_vit", network)


@pytest.fixture(scope="module")
def dataset():
    return data.load(digits_config.get_config().data)


def experiment(dataset, start, method="ffl", network="small_vit", **subnetworks):
    config = digits_config.get_config(f"method={method},network={network}")
    config.subnetworks.update(start=tuple(map(str, start)), **subnetworks)
    config_lib.check(config)
    return Experiment(config, dataset)


def installed(made):
    """(the variables of the sub-networks before the start, and with it)."""
    method = made.method
    params, model_state = draw_model(method, made.image_shape)
    state = first_state(method, made.optimizers, made.image_shape, params, model_state)
    return state.variables, start_weights.install(state, made).variables


def write(path, entries):
    save_file({name: np.ascontiguousarray(value) for name, value in entries.items()}, path)
    return path


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (7, 7)])
def test_positions_are_interpolated_as_timm_does(grid):
    resized = names.resized_positions(GOLDEN["positions/4x4"], grid)
    np.testing.assert_allclose(resized, GOLDEN[f"positions/{grid[0]}x{grid[1]}"], rtol=0, atol=2e-6)


def test_one_file_for_all_on_a_shared_trunk(dataset, tmp_path, caplog):
    """The trunk takes it once, the branches all of it but the head, and pixels are normalised as it wants."""
    caplog.set_level("INFO")
    path = write(tmp_path / "vit.safetensors", WEIGHTS)
    made = experiment(dataset, [path], shared_stages=1)
    assert made.config.data.mean == (0.485, 0.456, 0.406)
    assert made.config.data.std == (0.229, 0.224, 0.225)
    before, after = (x["params"]["subnetworks"] for x in installed(made))
    trunk, branches = after["trunk"], after["branches"]
    np.testing.assert_array_equal(trunk["stem_positions"], WEIGHTS["pos_embed"])
    np.testing.assert_array_equal(
        trunk["stem_conv"]["kernel"], WEIGHTS["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    )
    qkv = trunk["stage1_block1"]["attention"]["query_key_value"]
    np.testing.assert_array_equal(qkv["kernel"], WEIGHTS["blocks.0.attn.qkv.weight"].T)
    for k in range(2):
        np.testing.assert_array_equal(branches["stage2_norm"]["scale"][k], WEIGHTS["norm.weight"])
        block = branches["stage2_block1"]
        np.testing.assert_array_equal(block["mlp_expand"]["kernel"][k], WEIGHTS["blocks.1.mlp.fc1.weight"].T)
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(branches["head"][leaf], before["branches"]["head"][leaf])
    assert np.abs(np.diff(branches["head"]["kernel"], axis=0)).max() > 0.01
    assert "head is drawn anew, for that of the file is for 5 classes, not 10" in caplog.text


def test_heads_stay_apart_where_weights_are_equal(dataset, tmp_path):
    """Of ten classes, as here: one sub-network takes the head too, two equal ones do not."""
    rng = np.random.default_rng(0)
    head = {"head.weight": rng.normal(size=(10, 16)), "head.bias": rng.normal(size=10)}
    head = {name: value.astype(np.float32) for name, value in head.items()}
    first = write(tmp_path / "a.safetensors", WEIGHTS | head)
    second = write(tmp_path / "b.safetensors", WEIGHTS | {name: 2 * value for name, value in head.items()})
    for start, kept in (([first, second], (1, 2)), ([first], ()), ([first, first], ())):
        made = experiment(dataset, start, "independent", num=2)
        before, after = (x["params"]["subnetworks"]["branches"] for x in installed(made))
        expected = before["head"]["bias"]
        if kept:
            expected = np.stack([factor * head["head.bias"] for factor in kept])
        np.testing.assert_array_equal(after["head"]["bias"], expected)
        assert after["stage2_norm"]["bias"][1, 3] == WEIGHTS["norm.bias"][3]


def test_a_file_without_a_head(dataset, tmp_path, caplog):
    caplog.set_level("INFO")
    entries = {name: value for name, value in WEIGHTS.items() if not name.startswith("head.")}
    np.savez(tmp_path / "backbone.npz", **entries)
    installed(experiment(dataset, [tmp_path / "backbone.npz"], "independent", num=1))
    assert "its head is drawn anew, for the file has none" in caplog.text


def test_averages_begin_with_it(dataset, tmp_path):
    path = write(tmp_path / "vit.safetensors", WEIGHTS)
    variables = installed(experiment(dataset, [path], "pcl"))[1]
    ema = variables["ema"]["params"]["subnetworks"]
    np.testing.assert_array_equal(ema["trunk"]["stem_positions"], WEIGHTS["pos_embed"])
    jax.tree.map(
        np.testing.assert_array_equal, ema["branches"], variables["params"]["subnetworks"]["branches"]
    )


def run_of_tiny(dataset, path, **subnetworks):
    config = digits_config.get_config("method=independent,network=tiny")
    config.subnetworks.update(num=2, **subnetworks)
    config.data.mean, config.data.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    return write_run(path, config)[1].variables


def test_a_run_and_an_export(dataset, tmp_path):
    """Their arrays, their normalisation, and, with the same classes, their heads."""
    stored = run_of_tiny(dataset, tmp_path / "run")
    made = experiment(dataset, [f"{tmp_path}/run:sub_1"], "independent", "tiny", num=1)
    assert (made.config.data.mean, made.config.data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    second = jax.tree.map(lambda x: x[1:], {kind: tree["subnetworks"] for kind, tree in stored.items()})
    found = {kind: tree["subnetworks"] for kind, tree in installed(made)[1].items()}
    jax.tree.map(np.testing.assert_array_equal, found, second)

    alone = jax.tree.map(
        lambda x: np.asarray(x[0]), {kind: tree["branches"] for kind, tree in second.items()}
    )
    leaves = jax.tree_util.tree_leaves_with_path(alone)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
    card = {"mean": [0.1] * 3, "std": [0.4] * 3, "class_names": list(dataset.class_names)}
    card |= {"architecture": {"network": "tiny"}, "predictor": "sub_1"}
    export = tmp_path / "tiny.safetensors"
    sealing.write(export, save(arrays, {"card": json.dumps(card), sealing.KEY: sealing.EMPTY}))
    made = experiment(dataset, [export], "independent", "tiny", num=1)
    assert (made.config.data.mean, made.config.data.std) == ((0.1,) * 3, (0.4,) * 3)
    found = {kind: tree["subnetworks"] for kind, tree in installed(made)[1].items()}
    jax.tree.map(np.testing.assert_array_equal, found, second)
    export.write_bytes(export.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CheckpointError, match=r"tiny.safetensors: it is not what was exported"):
        experiment(dataset, [export], "independent", "tiny", num=1)
    with pytest.raises(CheckpointError, match=r"'ensemble' is not one plain network; write DIR:NAME"):
        experiment(dataset, [f"{tmp_path}/run:ensemble"], "independent", "tiny", num=1)


def test_a_tree_takes_a_network_into_trunk_limbs_and_branches(dataset, tmp_path):
    """All copies of each layer are as in that network, but for the heads, which stay as they are drawn."""
    stored = run_of_tiny(dataset, tmp_path / "run")
    tree = {"num": 4, "shared_stages": 1, "limbs": (2,)}
    made = experiment(dataset, [f"{tmp_path}/run:sub_1"], "cl_ilr", "tiny", **tree)
    wanted = jax.tree.map(
        lambda x: x[1], {kind: tree["subnetworks"]["branches"] for kind, tree in stored.items()}
    )
    before, after = installed(made)
    for kind, tree in after.items():
        parts = tree["subnetworks"]
        layers = {name: [one[name] for one in parts.values() if name in one] for name in wanted[kind]}
        assert all(
            len(found) == 1 for found in layers.values()
        )  # of the trunk, of two limbs or four branches
        for name, (found,) in layers.items():
            expected = (
                before[kind]["subnetworks"]["branches"]["head"] if name == "head" else wanted[kind][name]
            )
            jax.tree.map(
                lambda x, y: np.testing.assert_array_equal(x, np.broadcast_to(y, x.shape)), found, expected
            )


REFUSED = [
    (
        {"norm.weight": None},
        CheckpointError,
        r"vit.npz for sub_0, a small_vit by the names of timm, does not",
    ),
    ({"norm.weight": None}, CheckpointError, r"does not fit: norm.weight is missing. Take a file of that"),
    ({"blocks.2.norm1.bias": np.zeros(16, "f")}, CheckpointError, r"blocks.2.norm1.bias is unexpected"),
    ({"norm.bias": np.zeros(8, "f")}, CheckpointError, r"norm.bias is float32\[8\], not float32\[16\]"),
    ({"norm.bias": np.full(16, np.nan, "f")}, CheckpointError, r"norm.bias has values that are infinite"),
    (None, CheckpointError, r"vit.npz holds no ViT: it begins with conv1.weight"),
]


@pytest.mark.parametrize(("change", "error", "text"), REFUSED)
def test_what_does_not_fit_is_refused_by_name(dataset, tmp_path, change, error, text):
    entries = {"conv1.weight": np.zeros((1, 1), "f")}
    if change is not None:
        entries = {name: value for name, value in (WEIGHTS | change).items() if value is not None}
    np.savez(tmp_path / "vit.npz", **entries)
    with pytest.raises(error, match=text):
        installed(experiment(dataset, [tmp_path / "vit.npz"], "independent", num=1))


def test_settings_that_are_refused(dataset, tmp_path):
    one, two = (write(tmp_path / f"{name}.safetensors", WEIGHTS) for name in ("one", "two"))
    write(two, {name: 2 * value for name, value in WEIGHTS.items()})
    with pytest.raises(ConfigError, match=r"names 3 files or runs: give one for all 2 sub-networks, or"):
        experiment(dataset, [one] * 3)
    with pytest.raises(ConfigError, match="a shared trunk starts from one file"):
        installed(experiment(dataset, [one, two], shared_stages=1))
    with pytest.raises(CheckpointError, match=r"there is no file or run .*none.pth"):
        installed(experiment(dataset, [tmp_path / "none.pth"]))
    with pytest.raises(ConfigError, match="no names of other projects are known for Tiny"):
        installed(experiment(dataset, [one], network="tiny"))
    np.savez(
        tmp_path / "groups.npz", **{f"{key}/{k}": x for k, x in WEIGHTS.items() for key in ("net", "ema")}
    )
    with pytest.raises(ConfigError, match=r"holds 2 state dicts: write FILE:NAME, NAME one of ema, net"):
        installed(experiment(dataset, [tmp_path / "groups.npz"]))
    with pytest.raises(ConfigError, match=r"has no group 'nets', but ema, net"):
        installed(experiment(dataset, [f"{tmp_path}/groups.npz:nets"]))
    installed(experiment(dataset, [f"{tmp_path}/groups.npz:net"], "independent", num=1))


def test_the_digest_belongs_to_the_run(dataset, tmp_path):
    """A run continues with the same weights under another name, and without them, but not with others."""
    path = write(tmp_path / "vit.safetensors", WEIGHTS)
    record = run_record(experiment(dataset, [path], "independent"))
    again = json.loads(json.dumps(record))
    moved = path.rename(tmp_path / "moved.safetensors")
    check_belongs(again, experiment(dataset, [moved], "independent"), tmp_path)
    check_belongs(again, experiment(dataset, [path], "independent"), tmp_path)  # which is not there
    other = write(path, {name: 2 * value for name, value in WEIGHTS.items()})
    for start in ([other], []):
        changed = experiment(dataset, start, "independent")
        with pytest.raises(CheckpointError, match=r"belongs to another run: .*subnetworks.start_digests"):
            check_belongs(again, changed, tmp_path)
    # Its own configuration is trained again with that file alone.
    stored = Experiment(config_lib.from_json(again["config"]), dataset)
    with pytest.raises(CheckpointError, match=r"has the digest .*, not .* as in config.subnetworks"):
        installed(stored)
