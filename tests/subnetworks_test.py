"""Stacked and different sub-networks, against plain networks run alone; in float64, past any rounding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import draw_variables

from ffl_jax.errors import ConfigError
from ffl_jax.methods.subnetworks import Mixed, Stacked, build, network_names
from ffl_jax.models import NETWORKS

# The copies' statistics and gradients come from the same numbers, summed in another order.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def shapes(module):
    images = jnp.zeros((1, 8, 8, 3))
    return jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), images)


def draw_images():
    return jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 3)))


def weigh(outputs, k):
    """A number that hangs on all of a sub-network's outputs, in another way for each k."""
    weights = jnp.cos(jnp.arange(outputs.logits.size) + k).reshape(outputs.logits.shape)
    return (weights * outputs.logits).sum() + (outputs.feature_map**2).sum() * (k + 1)


def train(module, variables, images):
    """(outputs, new statistics, gradients) of all sub-networks together, in training mode."""

    def loss(params):
        outputs, updates = module.apply(
            variables | {"params": params}, images, train=True, mutable=["batch_stats"]
        )
        return sum(weigh(output, k) for k, output in enumerate(outputs)), (outputs, updates["batch_stats"])

    gradients, (outputs, statistics) = jax.grad(loss, has_aux=True)(variables["params"])
    return outputs, statistics, gradients


def _taken(tree, k):
    return jax.tree.map(lambda leaf: leaf[k], tree)


@pytest.mark.parametrize(("num", "shared_stages", "limbs"), [(2, 0, ()), (3, 2, ()), (4, 1, (2,))])
def test_vmap_equals_loop_and_both_equal_plain_networks(num, shared_stages, limbs):
    loop, vmap = (
        build("resnet8", num, 10, shared_stages, vectorize, limbs=limbs) for vectorize in (False, True)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes(loop), shapes(vmap))
    with jax.enable_x64(True):
        variables, images = draw_variables(loop, draw_images()), draw_images()
        outputs, statistics, gradients = jax.jit(functools.partial(train, loop))(variables, images)
        vmapped = jax.jit(functools.partial(train, vmap))(variables, images)
        assert len(outputs) == num
        chex.assert_trees_all_close(vmapped, (outputs, statistics, gradients), **TOLERANCE)

        @jax.jit
        def run_alone(variables, k):
            def loss(params):
                output, updates = loop.member(0).apply(
                    variables | {"params": params}, images, train=True, mutable=["batch_stats"]
                )
                return weigh(output, k), (output, updates["batch_stats"])

            gradient, (output, statistics) = jax.grad(loss, has_aux=True)(variables["params"])
            return output, statistics, gradient

        alone = [run_alone(loop.extract(variables, k), k) for k in range(num)]
        for k, (output, new_statistics, gradient) in enumerate(alone):
            actual = (outputs[k].logits, outputs[k].features, outputs[k].feature_map)
            expected = (output.logits, output.features, output.feature_map)
            chex.assert_trees_all_close(actual, expected, **TOLERANCE)
            chex.assert_trees_all_close(loop.extract({"": statistics}, k)[""], new_statistics, **TOLERANCE)
            own = _taken(gradients["branches"], k)
            chex.assert_trees_all_close(own, {name: gradient[name] for name in own}, **TOLERANCE)
            if shared_stages:
                trunk_map = output.feature_maps[shared_stages - 1]
                chex.assert_trees_all_close(outputs[k].trunk_map, trunk_map, **TOLERANCE)
            else:
                assert outputs[k].trunk_map is None
        # The gradient of what is shared is the sum of what the sub-networks send there.
        shared = {"trunk": range(num)} if shared_stages else {}
        shared |= {("limbs_1", limb): (2 * limb, 2 * limb + 1) for limb in range(2) if limbs}
        for place, members in shared.items():
            own = gradients[place] if place == "trunk" else _taken(gradients[place[0]], place[1])
            for name, gradient in own.items():
                total = jax.tree.map(lambda *leaves: sum(leaves), *[alone[k][2][name] for k in members])
                chex.assert_trees_all_close(gradient, total, **TOLERANCE)


@pytest.mark.parametrize("kind", ["loop", "vmap", "mixed"])
def test_every_subnetwork_sees_its_own_view(kind):
    """K views against each network alone on its view, without a trunk: statistics included."""
    module = build("tiny+tiny_wide" if kind == "mixed" else "tiny", 2, 10, vectorize=kind == "vmap")
    with jax.enable_x64(True):
        variables = draw_variables(module, draw_images())
        views = jnp.stack([draw_images(), jnp.flip(draw_images(), 2) + 1])
        outputs, updates = jax.jit(functools.partial(module.apply, train=True, mutable=["batch_stats"]))(
            variables, views
        )
        for k in range(2):
            alone, statistics = jax.jit(
                functools.partial(module.member(k).apply, train=True, mutable=["batch_stats"])
            )(module.extract(variables, k), views[k])
            chex.assert_trees_all_close(outputs[k].logits, alone.logits, **TOLERANCE)
            chex.assert_trees_all_close(module.extract(updates, k), statistics, **TOLERANCE)


@pytest.mark.parametrize("vectorize", [False, True])
def test_the_trunk_takes_all_views_as_one_batch(vectorize):
    module = build("tiny", 2, 10, 1, vectorize)
    with jax.enable_x64(True):
        variables, views = draw_variables(module, draw_images()), jnp.stack([draw_images(), draw_images()])
        apply = jax.jit(functools.partial(module.apply, train=True, mutable=["batch_stats"]))
        joint, updates = apply(variables, views)
        single, expected = apply(variables, draw_images())
        # Twice the same images have the statistics of one time.
        chex.assert_trees_all_close((joint, updates), (single, expected), **TOLERANCE)
        other, _ = apply(variables, views.at[1].add(1.0))
        assert jnp.abs(other[0].logits - joint[0].logits).max() > 1e-3  # through the statistics alone
        assert other[0].trunk_map.shape == (4, 8, 8, 4)


@pytest.mark.parametrize("vectorize", [False, True])
def test_the_trunk_takes_one_view_after_another(vectorize):
    """Each view has its own statistics, and the running ones move with each: against plain networks."""
    module = build("tiny", 2, 10, 1, vectorize)
    with jax.enable_x64(True):
        views = jnp.stack([draw_images(), jnp.flip(draw_images(), 2) + 1])
        variables = draw_variables(module, views[0])
        apply = functools.partial(module.apply, train=True, joint_statistics=False, mutable=["batch_stats"])
        outputs, updates = jax.jit(apply)(variables, views)
        alone = jax.jit(functools.partial(module.member(0).apply, train=True, mutable=["batch_stats"]))
        before = variables["batch_stats"]["trunk"]
        for k in range(2):
            own = module.extract(variables, k)
            expected, statistics = alone(own | {"batch_stats": own["batch_stats"] | before}, views[k])
            chex.assert_trees_all_close(outputs[k].logits, expected.logits, **TOLERANCE)
            before = {name: statistics["batch_stats"][name] for name in before}
        chex.assert_trees_all_close(updates["batch_stats"]["trunk"], before, **TOLERANCE)


@pytest.mark.parametrize("vectorize", [False, True])
def test_limbs_take_their_views_as_one_batch(vectorize):
    module = build("tiny", 4, 10, 1, vectorize, limbs=(2,))
    with jax.enable_x64(True):
        variables, views = draw_variables(module, draw_images()), jnp.stack([draw_images()] * 4)
        apply = jax.jit(functools.partial(module.apply, train=True, mutable=["batch_stats"]))
        # Four times the same images have the statistics of one time, …
        chex.assert_trees_all_close(apply(variables, views), apply(variables, views[0]), **TOLERANCE)
        # … and without statistics each goes its own way.
        alone = jax.jit(functools.partial(module.apply, train=False))
        views = views + jnp.arange(4.0)[:, None, None, None, None]
        together = alone(variables, views)
        for k in range(4):
            single = alone(variables, views[k])[k].logits
            chex.assert_trees_all_close(together[k].logits, single, **TOLERANCE)


def test_mean_gradient_where_paths_part():
    module = build("tiny", 4, 10, 1, limbs=(2,))
    with jax.enable_x64(True):
        variables, images = draw_variables(module, draw_images()), draw_images()

        @functools.partial(jax.jit, static_argnums=0)
        def gradients(mean):
            def loss(params):
                outputs = module.apply(variables | {"params": params}, images, False, mean)
                return sum(weigh(output, k) for k, output in enumerate(outputs))

            return jax.value_and_grad(loss)(variables["params"])

        (value, plain), (mean_value, mean) = gradients(False), gradients(True)
        chex.assert_trees_all_close(value, mean_value, **TOLERANCE)
        for part, ways in {"branches": 1, "limbs_1": 2, "trunk": 4}.items():
            expected = jax.tree.map(lambda leaf, ways=ways: leaf / ways, plain[part])
            chex.assert_trees_all_close(mean[part], expected, **TOLERANCE)


def test_inference_leaves_statistics_as_they_are():
    module = build("resnet8", 2, 10, 2)
    with jax.enable_x64(True):
        variables = draw_variables(module, draw_images())

        @jax.jit
        def run(variables):
            return module.apply(variables, draw_images(), train=False, mutable=["batch_stats"])

        _, updates = run(variables)
        chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("kind", ["shared", "separate", "mixed"])
def test_a_member_alone_repeats_the_joint_prediction(kind):
    network = "resnet8+resnet14" if kind == "mixed" else "resnet8"
    module = build(network, 2, 10, 2 if kind == "shared" else 0)
    with jax.enable_x64(True):
        variables, images = draw_variables(module, draw_images()), draw_images()
        joint = jax.jit(functools.partial(module.apply, train=False))(variables, images)
        for k in range(2):
            alone = jax.jit(functools.partial(module.member(k).apply, train=False))
            output = alone(module.extract(variables, k), images)
            chex.assert_trees_all_close(output.logits, joint[k].logits, **TOLERANCE)
        assert np.abs(joint[0].logits - joint[1].logits).max() > 1e-2


def test_extracted_variables_are_those_of_the_plain_network():
    for module in (build("resnet8", 3, 10, 2), build("resnet8", 2, 10), build("resnet8+resnet14", 2, 10)):
        for k in range(module.num):
            extracted = jax.eval_shape(functools.partial(module.extract, k=k), shapes(module))
            chex.assert_trees_all_equal_shapes_and_dtypes(extracted, shapes(module.member(k)))


def test_branches_start_different():
    module = build("resnet8", 3, 10, 2)
    params = jax.jit(functools.partial(module.init, train=False))(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    kernels = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params["params"]["branches"])
        if path[-1].key == "kernel"
    ]
    assert len(kernels) == 4
    for kernel in kernels:
        drawn = np.asarray(kernel).reshape(3, -1)
        np.testing.assert_array_less(np.abs(np.corrcoef(drawn))[np.triu_indices(3, 1)], 0.2)


def test_mixed_networks():
    module = build("resnet8+resnet14+resnet8", 3, 10)
    assert isinstance(module, Mixed)
    assert module.num == 3
    assert [module.member(k).blocks for k in range(3)] == [1, 2, 1]
    variables = shapes(module)
    assert set(variables["params"]) == {"networks_0", "networks_1", "networks_2"}


@pytest.mark.parametrize("network", ["resnet8", "resnet8+resnet8"])
def test_equal_networks_are_stacked(network):
    module = build(network, 2, 10, 1)
    assert isinstance(module, Stacked)
    assert (module.num, module.shared_stages, module.network.num_classes) == (2, 1, 10)


def test_network_names():
    assert network_names("resnet8", 3) == ["resnet8"] * 3
    assert network_names("resnet8+resnet14", 2) == ["resnet8", "resnet14"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet8", 0, 10), r"subnetworks\.num must be at least 1.*got 0"),
        (("resnet8", 2, 10, -1), r"shared_stages must be 0\.\.2.*got -1"),
        (("resnet8", 2, 10, 3), r"shared_stages must be 0\.\.2.*got 3"),
        (("resnet18", 2, 10, 4), r"shared_stages must be 0\.\.3.*got 4"),
        (("resnet8+resnet14", 2, 10, 1), r"resnet8\+resnet14.*shared_stages=0, got 1"),
        (("resnet8+resnet14", 3, 10), r"lists 2 networks, but num=3"),
        (("resnet8+resnet14+resnet20", 2, 10), r"lists 3 networks, but num=2"),
        (("resnet9", 2, 10), r"unknown network 'resnet9'.*resnet8"),
        (("resnet8+resnet9", 2, 10), r"unknown network 'resnet9'"),
    ],
)
def test_impossible_subnetworks_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build(*arguments)


def test_stacked_checks_itself():
    network = NETWORKS.lookup("resnet8")(10)
    for num in (-1, 0):
        with pytest.raises(ConfigError, match=rf"subnetworks\.num must be at least 1.*got {num}"):
            Stacked(network, num=num)
    with pytest.raises(ConfigError, match="shared_stages"):
        Stacked(network, shared_stages=3)
