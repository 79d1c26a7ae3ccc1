"""The K networks that train together: copies of one network, or different networks side by side."""

import itertools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from ffl_jax.devices import parallel
from ffl_jax.errors import ConfigError
from ffl_jax.models import NETWORKS, Network, NetworkOutputs
from ffl_jax.models.base import KEPT
from ffl_jax.registry import check_choice

# Of batch norm in training: taken from each batch, and remembered; or the running ones, which stay.
STATISTICS = ("adapted", "kept")


class Stacked(nn.Module):
    """K copies of one network, their variables stacked along a leading axis K, on an optional shared trunk.

    Attributes:
      network: the whole network; it is cut at `shared_stages` into trunk and branch.
      num: K.
      shared_stages: how many stages, the stem included, exist once; 0 gives K separate networks.
      limbs: how often each of the next stages exists, between trunk and branches: (2,) makes a tree of four
        branches, two of which grow from each limb.
      vectorize: run the branches by `vmap` instead of one after another; variables and results are the same.
        A vmapped convolution is a grouped one: fit for accelerators, on a CPU for the smallest maps only.
      remat: keep nothing of trunk and branches between forward and backward pass, but compute it anew.
      statistics: one of `STATISTICS`.
    """

    network: Network
    num: int = 2
    shared_stages: int = 0
    vectorize: bool = False
    remat: bool = False
    statistics: str = "adapted"
    limbs: tuple[int, ...] = ()

    are_copies: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.num < 1:
            raise ConfigError(f"subnetworks.num must be at least 1, got {self.num}.")
        if not 0 <= self.shared_stages < self.network.num_stages:
            raise ConfigError(
                f"subnetworks.shared_stages must be 0..{self.network.num_stages - 1} for a network of "
                f"{self.network.num_stages} stages, got {self.shared_stages}."
            )
        counts = (1, *self.limbs, self.num)
        whole = all(isinstance(count, int) and count > 0 for count in counts)
        if not whole or any(more % fewer for fewer, more in itertools.pairwise(counts)):
            raise ConfigError(
                f"subnetworks.limbs={self.limbs}: each must be a whole number that divides the next one, and "
                f"the last must divide subnetworks.num={self.num}."
            )
        most = self.network.num_stages - 1 - len(self.limbs)
        if self.limbs and not 1 <= self.shared_stages <= most:
            fit = "1" if most == 1 else f"1..{most}"
            advice = f"set subnetworks.shared_stages to {fit}" if most > 0 else "name fewer limbs"
            raise ConfigError(
                f"subnetworks.limbs={self.limbs} are stages between a trunk and branches, and a network of "
                f"{self.network.num_stages} stages has none there with shared_stages={self.shared_stages}: "
                f"{advice}."
            )

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool, mean_gradient: bool = False, joint_statistics: bool = True
    ) -> tuple[NetworkOutputs, ...]:
        """The outputs of the K sub-networks, in order.

        Args:
          images: [B, H, W, 3], or one view for each sub-network, [K, B, H, W, 3].
          train: use and update batch statistics.
          mean_gradient: where paths part, what flows back is the mean of their gradients instead of the sum.
          joint_statistics: the trunk takes all views as one batch, so that its batch statistics are theirs
            together; else one after another, and its running statistics move with each.
        """
        x, views, train, trunk_map = images, images.ndim == 5, _mode(self, train), None
        if self.shared_stages:
            trunk = self.network.clone(stop=self.shared_stages, parent=self, name="trunk")
            if views and not joint_statistics:
                x = _stack([_run(trunk, view, train, self.remat) for view in x])
            else:
                x = _run(trunk, x.reshape(-1, *x.shape[-3:]), train, self.remat)
                x = _grouped(x, self.num) if views else x
            trunk_map = self.network.feature_map(x)
        stage, paths, each = self.shared_stages, 1, views
        for num in self.limbs:
            x = _parted(x, num, each, paths / num if mean_gradient else 1.0)
            x = _stack(self._copies(f"limbs_{stage}", stage, num, x, each, train))
            x = _grouped(x, self.num, axes=2) if views else x
            stage, paths, each = stage + 1, num, True
        if self.shared_stages:
            x = _parted(x, self.num, each, paths / self.num if mean_gradient else 1.0)
        outputs = self._copies(parallel.STACKED, stage, self.num, x, each, train)
        if trunk_map is not None:
            maps = trunk_map if views else [trunk_map] * self.num
            outputs = [output.replace(trunk_map=x) for output, x in zip(outputs, maps, strict=True)]
        return _shown(self, tuple(outputs))

    def _copies(self, name, stage, num, x, each, train) -> list:
        """What `num` copies give of the stages from `stage` on, of a limb that one alone.

        Args:
          name: of their variables, which have a leading axis of copies.
          x: what they get; with `each` [num, ...], one for each.
        """
        last = name == parallel.STACKED
        part = self.network.clone(start=stage, stop=None if last else stage + 1, parent=None)
        if self.is_initializing():
            first = jax.random.split(self.make_rng("params"), num)
            one = _pick(x, 0) if each else x
            drawn = jax.vmap(lambda key: part.init(key, one, train=False))(first)
            for kind, tree in drawn.items():  # not every network has batch statistics
                self.put_variable(kind, name, tree)
        params, statistics = self.get_variable("params", name), self.get_variable("batch_stats", name, {})
        keys = None  # for what is random in training
        if train and self.has_rng("dropout"):
            keys = jax.random.split(self.make_rng("dropout"), num)

        def run(params, statistics, x, key):
            variables = {"params": params, "batch_stats": statistics}
            rngs = {} if key is None else {"dropout": key}
            outputs, updates = part.apply(variables, x, train, mutable=["batch_stats"], rngs=rngs)
            return outputs, updates.get("batch_stats", {})

        if self.remat:
            run = jax.checkpoint(run)
        spread = last and parallel.spread(num)  # then the variables are those of the sub-networks here
        if spread:
            x = parallel.to_subnetworks(x)
            keys = jax.tree.map(parallel.own_subnetworks, keys)
            x = jax.tree.map(parallel.own_subnetworks, x) if each else x
        here = jax.tree.leaves(params)[0].shape[0]
        if self.vectorize:
            axes = (0, 0, 0 if each else None, 0)
            outputs, new_statistics = jax.vmap(run, in_axes=axes)(params, statistics, x, keys)
        else:
            results = [
                run(*_pick((params, statistics), k), _pick(x, k) if each else x, _pick(keys, k))
                for k in range(here)
            ]
            outputs, new_statistics = zip(*results, strict=True)
            new_statistics = _stack(new_statistics)
        if train and statistics:
            self.put_variable("batch_stats", name, new_statistics)
        if spread:
            outputs = parallel.from_subnetworks(outputs if self.vectorize else _stack(outputs))
        return [_pick(outputs, k) for k in range(num)] if self.vectorize or spread else list(outputs)

    def member(self, k: int) -> Network:
        """Sub-network k as a plain network."""
        return _plain(self.network)

    def places(self, k: int) -> list[tuple[str, int | None]]:
        """[(name in the variables, which of its copies or None)] of the parts of sub-network k, in order."""
        levels = enumerate(self.limbs, start=self.shared_stages)
        limbs = [(f"limbs_{stage}", k * num // self.num) for stage, num in levels]
        return [("trunk", None), *limbs, (parallel.STACKED, k)]

    def extract(self, variables: dict, k: int) -> dict:
        """The variables of `member(k)`, taken from those of this module."""
        return _extracted(variables, self.places(k))


class Mixed(nn.Module):
    """Different networks side by side, each with variables of its own.

    Attributes:
      networks: in order.
      remat: keep nothing of them between forward and backward pass, but compute it anew.
      statistics: one of `STATISTICS`.
    """

    networks: tuple[Network, ...]
    remat: bool = False
    statistics: str = "adapted"

    shared_stages: ClassVar[int] = 0
    vectorize: ClassVar[bool] = False
    are_copies: ClassVar[bool] = False

    @property
    def num(self) -> int:
        return len(self.networks)

    def __call__(self, images: jax.Array, train: bool) -> tuple[NetworkOutputs, ...]:
        """[B, H, W, 3], or a view for each [K, B, H, W, 3] -> the outputs of the K sub-networks, in order."""
        views, train = images if images.ndim == 5 else [images] * self.num, _mode(self, train)
        outputs = tuple(
            _run(network, view, train, self.remat) for network, view in zip(self.networks, views, strict=True)
        )
        return _shown(self, outputs)

    def member(self, k: int) -> Network:
        """Sub-network k as a plain network."""
        return _plain(self.networks[k])

    def places(self, k: int) -> list[tuple[str, int | None]]:
        """As for `Stacked`."""
        return [(f"networks_{k}", None)]

    def extract(self, variables: dict, k: int) -> dict:
        """The variables of `member(k)`, taken from those of this module."""
        return _extracted(variables, self.places(k))


def _extracted(variables, places):
    found = {}
    for kind, tree in variables.items():
        there = [(tree[name], copy) for name, copy in places if name in tree]
        if there:
            parts = [part if copy is None else _pick(part, copy) for part, copy in there]
            found[kind] = {name: one for part in parts for name, one in part.items()}
    return found


def _mode(module, train):
    """What the networks of `Stacked` or `Mixed` get for `train`."""
    return KEPT if train and module.statistics == "kept" else train


def _plain(network):
    """The network as it is used after training."""
    return network.clone(dropout=0.0, drop_path=0.0)


def _run(network, x, train, remat):
    if not remat:
        return network(x, train)
    return nn.remat(lambda network, x: network(x, train))(network, x)


def _grouped(x, num, axes=1):
    """A tree of arrays whose first `axes` axes are examples -> [num, examples / num, ...]."""
    return jax.tree.map(lambda x: x.reshape(num, -1, *x.shape[axes:]), x)


def _parted(x, num, each, scale):
    """What `num` copies get of a tree of maps, of all the same or of [n, ...] `each` their own.

    Several of n that go into one copy become one batch; one that goes into several is repeated. What flows
    back is multiplied by `scale`.
    """
    if scale != 1:
        x = jax.tree.map(lambda x: scale * x + jax.lax.stop_gradient((1 - scale) * x), x)
    if not each:
        return x
    have = jax.tree.leaves(x)[0].shape[0]
    if have >= num:
        return _grouped(x, num, axes=2)
    return jax.tree.map(lambda x: jnp.repeat(x, num // have, axis=0), x)


def vectorized(method: nn.Module, vectorize: bool) -> nn.Module:
    """The method with its copies of one network run by `vmap`, or one after another; all else stays."""
    networks = method.subnetworks
    if not networks.are_copies or networks.vectorize == vectorize:
        return method
    return method.clone(subnetworks=networks.clone(vectorize=vectorize))


def frozen(method: nn.Module) -> nn.Module:
    """The method while its sub-networks stay as they are: trained by the batch statistics that they have."""
    return method.clone(subnetworks=method.subnetworks.clone(statistics="kept"))


def _shown(module, outputs):
    """The outputs; whoever makes the collection "intermediates" mutable finds their feature maps there."""
    module.sow("intermediates", "feature_maps", [output.feature_map for output in outputs])
    return outputs


def _pick(tree, k):
    return jax.tree.map(lambda leaf: leaf[k], tree)


def _stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def network_names(network: str, num: int, section: str = "subnetworks") -> list[str]:
    """The names that `network` ("resnet32", or "resnet32+resnet56") and `num` in a section stand for."""
    names = network.split("+")
    if num < 1:
        raise ConfigError(f"{section}.num must be at least 1, got {num}.")
    if len(names) == 1:
        return names * num
    if num != len(names):
        raise ConfigError(f"{section}.network={network!r} lists {len(names)} networks, but num={num}.")
    return names


def build(
    network: str,
    num: int,
    num_classes: int,
    shared_stages: int = 0,
    vectorize: bool = False,
    remat: bool = False,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    statistics: str = "adapted",
    limbs: tuple[int, ...] = (),
) -> Stacked | Mixed:
    """`Stacked` where all names in `network` ("resnet32", "resnet20+resnet32") are the same, else `Mixed`.

    Of `dropout` and `drop_path` each network takes what it has; one that none of them has must be 0.
    """
    names = network_names(network, num)
    check_choice("config.subnetworks.statistics", statistics, STATISTICS)
    networks, rates = [NETWORKS.lookup(name)(num_classes) for name in names], {}
    for key, rate in {"dropout": dropout, "drop_path": drop_path}.items():
        if rate and not any(key in one.drops for one in networks):
            raise ConfigError(f"config.subnetworks.{key}={rate}, but {network} has none: set it to 0.")
        rates[key] = rate
    networks = [one.clone(**{key: rates[key] for key in one.drops}) for one in networks]
    if len(set(names)) == 1:
        return Stacked(networks[0], num, shared_stages, vectorize, remat, statistics, tuple(limbs))
    for key, shared, none in (("shared_stages", shared_stages, 0), ("limbs", tuple(limbs), ())):
        if shared:
            raise ConfigError(
                f"different networks ({network}) cannot share a trunk: set config.subnetworks.{key}={none}, "
                f"got {shared}."
            )
    return Mixed(tuple(networks), remat, statistics)
