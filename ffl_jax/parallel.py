"""Data parallelism: the only file that names devices, meshes, mapped axes, `pmap` and `shard_map`.

Every program is written for one device. `Parallel.map` runs it on all of them: its arguments and results
are replicated, and inside it `share` picks this device's part of a batch, `mean` and `sum` join what the
devices computed. Outside a mapped program these three do nothing, so that the same code runs alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ffl_jax.errors import ConfigError

_AXIS = "data"
MODES = ("pmap", "shard_map")


def axis_name() -> str | None:
    """The mapped axis over devices where the caller is traced inside one, else None."""
    try:
        lax.axis_index(_AXIS)
    except NameError:
        return None
    return _AXIS


def mean(tree):
    """Mean of every leaf over the devices."""
    return lax.pmean(tree, _AXIS) if axis_name() else tree


def sum(tree):
    """Sum of every leaf over the devices."""
    return lax.psum(tree, _AXIS) if axis_name() else tree


def first(tree):
    """The first device's copy of every leaf, bit for bit, where a mean of equal copies would be rounded."""
    if not axis_name():
        return tree
    here = lax.axis_index(_AXIS) == 0
    return lax.psum(jax.tree.map(lambda x: jnp.where(here, x, jnp.zeros_like(x)), tree), _AXIS)


def share(batch: jax.Array) -> jax.Array:
    """This device's contiguous part of a replicated batch [B, ...] -> [B / devices, ...]."""
    if not axis_name():
        return batch
    size = batch.shape[0] // lax.axis_size(_AXIS)
    return lax.dynamic_slice_in_dim(batch, lax.axis_index(_AXIS) * size, size)


class Parallel:
    """Runs one-device programs on several devices, with equal results in both modes.

    Attributes:
      mode: "pmap", or "shard_map" over a one-axis mesh.
      num_devices: how many of the visible devices are used.
    """

    def __init__(self, mode: str = "pmap", num_devices: int = 0):
        """Args: mode: one of `MODES`. num_devices: 0 uses every visible device."""
        if mode not in MODES:
            raise ConfigError(f"parallel.mode must be one of {', '.join(MODES)}, got {mode!r}.")
        available = jax.local_device_count()
        if not 0 <= num_devices <= available:
            raise ConfigError(
                f"parallel.num_devices={num_devices}, but {available} device(s) are visible: set it to "
                f"1..{available}, or to 0 for all."
            )
        self.mode = mode
        self.num_devices = num_devices or available
        self.devices = jax.local_devices()[: self.num_devices]
        # Not `jax.make_mesh`: its axes are of another type than those of pmap's results, and a program
        # that is called with both is compiled twice.
        mesh = Mesh(np.array(self.devices), (_AXIS,))
        self._mesh = mesh
        self._sharding = NamedSharding(mesh, PartitionSpec(_AXIS) if mode == "pmap" else PartitionSpec())

    def check_batch_size(self, batch_size: int, accumulate: int = 1):
        """Raises ConfigError, naming the nearest good sizes, unless the global batch divides.

        Args:
          batch_size: of all devices together.
          accumulate: parts that each device takes its share in.
        """
        unit = self.num_devices * accumulate
        remainder = batch_size % unit
        if batch_size < 1 or remainder:
            below, above = batch_size - remainder, batch_size - remainder + unit
            sizes = f"{below} or {above}" if below > 0 else f"{max(above, unit)}"
            parts = f" in {accumulate} parts each" if accumulate > 1 else ""
            raise ConfigError(
                f"batch_size={batch_size} does not divide over {self.num_devices} device(s){parts}: "
                f"set config.batch_size to {sizes}."
            )

    def replicate(self, tree):
        """Copies a tree of host or one-device arrays to every device; donating the copies leaves it whole."""

        def put(x):
            x = jnp.array(x, copy=True)  # device_put alone shares the memory where it can
            if self.mode == "pmap":  # pmap wants the copies along a leading axis
                x = jnp.broadcast_to(x[None], (self.num_devices, *x.shape))
            return jax.device_put(x, self._sharding)

        return jax.tree.map(put, tree)

    def fetch(self, tree):
        """The first device's copy of a replicated tree, in buffers of its own that survive a donation."""
        if self.mode == "pmap":
            return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)
        return jax.tree.map(lambda x: jnp.copy(x.addressable_shards[0].data), tree)

    def shard(self, tree):
        """Splits host arrays along their first axis over the devices, for an argument that `map` calls so.

        The axis must be a multiple of the number of devices.
        """

        def put(x):
            if self.mode == "pmap":
                x = x.reshape(self.num_devices, -1, *x.shape[1:])
            return jax.device_put(x, NamedSharding(self._mesh, PartitionSpec(_AXIS)))

        return jax.tree.map(put, tree)

    def for_seeds(self, function, num_seeds: int):
        """`function(own, *shared)` of one seed, for trees `own` and results with a leading axis of seeds.

        A CPU takes one seed after another, since a convolution that is vmapped over kernels is slow there.
        One seed has no such axis.
        """
        if num_seeds == 1:
            return function
        over = lax.map if self.devices[0].platform == "cpu" else lambda one, own: jax.vmap(one)(own)
        return lambda own, *shared: over(lambda one: function(one, *shared), own)

    def map(self, function, donate_argnums=(), sharded_argnums=()):
        """Compiles `function` for all devices; replicated trees in, replicated trees out.

        The results must be equal on every device: join them with `mean` or `sum`. Arguments named by
        `donate_argnums` give their memory to the results and cannot be used again; of those named by
        `sharded_argnums` each device sees its own part, see `shard`.
        """
        if self.mode == "pmap":
            return jax.pmap(function, _AXIS, devices=self.devices, donate_argnums=donate_argnums)
        # Checking is off because it would sum the gradients of replicated parameters by itself, and so
        # give another meaning to `mean` than under pmap.

        def run(*arguments):
            specs = tuple(
                PartitionSpec(_AXIS) if index in sharded_argnums else PartitionSpec()
                for index in range(len(arguments))
            )
            mapped = jax.shard_map(
                function, mesh=self._mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
            )
            return mapped(*arguments)

        return functools.wraps(function)(jax.jit(run, donate_argnums=donate_argnums))
