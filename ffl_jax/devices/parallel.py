"""Devices and processes: the only file that names them, meshes, mapped axes, `pmap` and `shard_map`.

Every program is written for one device. `Parallel.map` runs it on all of them: inside it `share` picks this
device's part of a batch, `mean` and `sum` join what the shares of the batch gave, and `to_subnetworks`,
`own_subnetworks` and `from_subnetworks` stand around sub-networks that lie on different devices. Outside a
mapped program these do nothing, so that the same code runs alone.

The devices form a mesh: data x seed x sub-network. Along "data" each has a share of every batch, along "seed"
some of the runs of a program, along "subnetwork" some of the stacked sub-networks of every run. `pmap` knows
the first axis alone.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ffl_jax.devices import backend
from ffl_jax.errors import ConfigError
from ffl_jax.registry import check_choice

_DATA, _SEED, _SUBNETWORK = "data", "seed", "subnetwork"
STACKED = "branches"  # the name that `subnetworks.Stacked` gives to variables with a leading axis K
MODES = ("pmap", "shard_map")
# What the arrays of an argument or a result are.
OWN = "own"  # of each run: with a leading axis of seeds where they are several
SHARED = "shared"  # the same on all devices
BATCH = "batch"  # split along the first axis over the shares of a batch


def _size(axis: str) -> int:
    # JAX has no question for "is this axis mapped?" but the error.
    try:
        return lax.axis_size(axis)
    except NameError:  # not mapped
        return 1


def axis_name() -> str | None:
    """The mapped axis over the shares of a batch where the caller is traced inside one, else None."""
    try:
        lax.axis_index(_DATA)
    except NameError:
        return None
    return _DATA


def mean(tree):
    """Mean of every leaf over the shares of a batch."""
    return lax.pmean(tree, _DATA) if axis_name() else tree


def sum(tree):
    """Sum of every leaf over the shares of a batch."""
    return lax.psum(tree, _DATA) if axis_name() else tree


def first(tree):
    """The first share's copy of every leaf, bit for bit, where a mean of equal copies would be rounded."""
    if not axis_name():
        return tree
    # A sum of one copy and zeros is that copy to the bit.
    here = lax.axis_index(_DATA) == 0
    return lax.psum(jax.tree.map(lambda x: jnp.where(here, x, jnp.zeros_like(x)), tree), _DATA)


def norm(tree, counted) -> jax.Array:
    """Euclidean norm of the leaves, like parameters, that `counted` says yes to; on whatever devices."""
    squares = {True: jnp.float32(0), False: jnp.float32(0)}  # by whether they lie on different devices
    for (path, leaf), yes in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(counted), strict=True
    ):
        if yes:
            squares[is_stacked(path)] += jnp.square(leaf).sum()
    here = squares[True]
    return jnp.sqrt(squares[False] + (lax.psum(here, _SUBNETWORK) if _size(_SUBNETWORK) > 1 else here))


def is_stacked(path) -> bool:
    """Whether a leaf at this path, of a tree like the parameters, has a leading axis of sub-networks."""
    return any(getattr(key, "key", None) == STACKED for key in path)


def share(batch: jax.Array) -> jax.Array:
    """This device's contiguous part of a replicated batch [B, ...] -> [B / shares, ...]."""
    if not axis_name():
        return batch
    size = batch.shape[0] // lax.axis_size(_DATA)
    return lax.dynamic_slice_in_dim(batch, lax.axis_index(_DATA) * size, size)


def own_keys(key: jax.Array, num: int) -> jax.Array:
    """One key for each of this device's `num` examples, by their places in the batch of all devices."""
    return share(jax.random.split(key, num * _size(_DATA)))


def spread(num: int) -> bool:
    """Whether `num` stacked sub-networks lie on different devices here."""
    return _size(_SUBNETWORK) > 1 and num % _size(_SUBNETWORK) == 0


def own_subnetworks(x: jax.Array) -> jax.Array:
    """Of [K, ...], the part of the sub-networks that are on this device."""
    size = x.shape[0] // _size(_SUBNETWORK)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(_SUBNETWORK) * size, size)


@jax.custom_vjp
def to_subnetworks(tree):
    """Gives to the sub-networks on every device what all devices have; the gradient is summed over them."""
    return tree


# Every device computes the whole loss from what `from_subnetworks` gives. So the cotangent that comes back to
# it is whole already, and each device takes its part; the transpose that JAX would take sums equal copies.
@jax.custom_vjp
def from_subnetworks(tree):
    """[sub-networks here, ...] -> [K, ...], on all devices."""
    return jax.tree.map(lambda x: lax.all_gather(x, _SUBNETWORK, tiled=True), tree)


to_subnetworks.defvjp(lambda tree: (tree, None), lambda _, cotangent: (lax.psum(cotangent, _SUBNETWORK),))
from_subnetworks.defvjp(
    lambda tree: (from_subnetworks(tree), None),
    lambda _, cotangent: (jax.tree.map(own_subnetworks, cotangent),),
)


class Parallel:
    """Runs one-device programs on several devices, with equal results in both modes.

    Attributes:
      mode: "pmap", or "shard_map" over a mesh.
      num_devices: how many devices are used, those of other processes included.
      devices: those of them that this process has.
      shares: how many parts a batch is split into.
      num_seeds: how many runs a program holds.
      seeds: over how many devices they are spread.
    """

    def __init__(
        self,
        mode: str = "pmap",
        num_devices: int = 0,
        subnetworks: int = 1,
        seeds: int = 1,
        num_seeds: int = 1,
        devices: Sequence | None = None,
    ):
        """Raises ConfigError where the devices do not divide so.

        Args:
          mode: one of `MODES`.
          num_devices: 0 uses every visible device.
          subnetworks, seeds: over how many devices the sub-networks of a run, and the runs, are spread.
          num_seeds: how many runs a program holds.
          devices: in place of the visible ones, such as those of a machine that is only compiled for.
        """
        check_choice("parallel.mode", mode, MODES)
        devices = jax.devices() if devices is None else devices
        available, processes = len(devices), jax.process_count()
        if not 0 <= num_devices <= available or (processes > 1 and num_devices not in (0, available)):
            wanted = f"1..{available}, or to 0 for all" if processes == 1 else "0: several processes use all"
            raise ConfigError(
                f"parallel.num_devices={num_devices}, but {available} device(s) are visible: set it to "
                f"{wanted}."
            )
        self.mode, self.num_seeds = mode, num_seeds
        self.num_devices = num_devices or available
        if mode == "pmap" and max(subnetworks, seeds) > 1:
            raise ConfigError(
                f"parallel.subnetworks={subnetworks} and parallel.seeds={seeds} need a mesh: set "
                "config.parallel.mode=shard_map, or both to 1."
            )
        # Only so does each process have whole runs, and whole shares of a batch.
        here, columns = self.num_devices // processes, subnetworks * seeds
        if min(subnetworks, seeds) < 1 or here % columns:
            raise ConfigError(
                f"parallel.subnetworks={subnetworks} times parallel.seeds={seeds} does not divide the {here} "
                "device(s) of a process: choose others, from 1 on."
            )
        if num_seeds % seeds:
            raise ConfigError(
                f"parallel.seeds={seeds} does not divide num_seeds={num_seeds}: choose another."
            )
        self.shares = self.num_devices // columns
        # Sorted by process, so that each has a contiguous part of the mesh, and of every batch.
        self.seeds, self._subnetworks = seeds, subnetworks
        devices = sorted(devices, key=lambda device: device.process_index)[: self.num_devices]
        self._all_devices = devices
        self.devices = [device for device in devices if device.process_index == jax.process_index()]
        # Not `jax.make_mesh`: its axes are of another type than those of pmap's results, and a program
        # that is called with both is compiled twice.
        axes = (_DATA,) if mode == "pmap" else (_DATA, _SEED, _SUBNETWORK)
        shape = (-1,) if mode == "pmap" else (-1, seeds, subnetworks)
        self._mesh, self._local_mesh = (
            Mesh(np.array(some).reshape(shape), axes) for some in (devices, self.devices)
        )

    def check_batch_size(self, batch_size: int, accumulate: int = 1):
        """Raises ConfigError, naming the nearest good sizes, unless the global batch divides.

        Args:
          batch_size: of all devices together.
          accumulate: parts that each share is taken in.
        """
        unit = self.shares * accumulate
        remainder = batch_size % unit
        if batch_size < 1 or remainder:
            below, above = batch_size - remainder, batch_size - remainder + unit
            sizes = f"{below} or {above}" if below > 0 else f"{max(above, unit)}"
            parts = f" in {accumulate} parts each" if accumulate > 1 else ""
            over = "device(s)" if self.shares == self.num_devices else "share(s)"
            raise ConfigError(
                f"batch_size={batch_size} does not divide over {self.shares} {over}{parts}: "
                f"set config.batch_size to {sizes}."
            )

    def check_networks(self, networks):
        """Raises ConfigError unless the sub-networks of a method can be spread as `subnetworks` says."""
        if self._subnetworks > 1 and (not networks.are_copies or networks.num % self._subnetworks):
            raise ConfigError(
                f"parallel.subnetworks={self._subnetworks} spreads copies of one network evenly: their "
                f"number, now {networks.num}, must be a multiple of it, and the networks the same."
            )

    def place(self, tree, kind: str = SHARED):
        """Puts host or one-device arrays on the devices, for an argument of that kind; donating them is safe.

        Of a `BATCH`, each process gives its own contiguous part, a multiple of its shares; of all else every
        process gives the same.
        """
        # Donated memory must be nobody else's, and `device_put` shares it where it can.
        given = tree if kind == BATCH else _own(tree, self.mode == "pmap")
        return jax.tree.map(functools.partial(self._put, kind), given, self._specs(tree, kind))

    def fetch(self, tree):
        """What `place` was given, or a program gave, as arrays of their own on one device of this process."""
        return _first(self._local(tree)) if self.mode == "pmap" else _copies(self._local(tree))

    def _local(self, tree):
        """Its arrays on one device of this process; under pmap they have an axis of one device."""

        def get(x):
            if self.mode == "pmap":
                return x.addressable_shards[0].data
            # An array over several processes cannot be fetched: of this one's shards another array is made,
            # which is whole, for each process has whole runs.
            sharding = NamedSharding(self._local_mesh, x.sharding.spec)
            shards = [shard.data for shard in x.addressable_shards]
            here = jax.make_array_from_single_device_arrays(x.shape, sharding, shards)
            return jax.device_put(here, self.devices[0])

        return jax.tree.map(get, tree)

    def place_runs(self, trees):
        """Puts one tree for each run on the devices, as an `OWN` argument."""
        trees = list(trees)
        assert len(trees) == self.num_seeds, f"{len(trees)} trees for {self.num_seeds} runs"
        return self.place(trees[0] if self.num_seeds == 1 else _stacked(trees), OWN)

    def repeat(self, tree):
        """Puts the same tree on the devices for every run, as an `OWN` argument."""
        return self.place_runs([tree] * self.num_seeds)

    def fetch_runs(self, tree) -> list:
        """`fetch` of what is `OWN`: one tree for each run."""
        fetched = self.fetch(tree)
        return [fetched] if self.num_seeds == 1 else _apart(fetched, self.num_seeds)

    def map(
        self,
        function,
        arguments: tuple,
        results=OWN,
        donate: tuple[int, ...] = (),
        seldom: bool = False,
    ):
        """Compiles a function of one run on one device, for all runs and all devices.

        Results are `OWN` of each run. They must be equal along the data axis: join them with `mean` or `sum`.

        Args:
          function: see above.
          arguments: for each argument what it is, a kind or a tree of kinds.
          results: `OWN`, or, where stacked sub-networks are among them, the number of an argument of the same
            form; of several results, a tuple of these.
          donate: numbers of arguments that give their memory to the results, and cannot be used again.
          seldom: it runs a few times, always with the same shapes: it is compiled quickly, not well.
        """
        function = self._over_seeds(function, arguments)
        options = backend.seldom_options() if seldom else None
        if self.mode == "pmap":
            program = jax.pmap(function, _DATA, devices=self._all_devices, donate_argnums=donate)
            # It takes no options, and what it compiles ahead does not know of other processes.
            return _compiled_with(options, program) if options and jax.process_count() == 1 else program

        def run(*given):
            specs = jax.tree.map(lambda kind, tree: self._specs(tree, kind), arguments, given)
            out_specs = jax.tree.map(
                lambda kind: specs[kind] if isinstance(kind, int) else self._specs(None, kind), results
            )
            # Checking is off because it would sum the gradients of replicated parameters by itself, and so
            # give another meaning to `mean` than under pmap.
            mapped = jax.shard_map(
                function, mesh=self._mesh, in_specs=specs, out_specs=out_specs, check_vma=False
            )
            return mapped(*given)

        return functools.wraps(function)(jax.jit(run, donate_argnums=donate, compiler_options=options))

    @property
    def compiles_ahead(self) -> bool:
        """Whether `compile_ahead` may be called.

        Not on accelerators, where XLA times kernels as it compiles, which whatever runs beside it disturbs;
        not for "shard_map", which compiles anew for arrays that it is given; nor for several processes.
        """
        return backend.is_cpu() and self.mode == "pmap" and jax.process_count() == 1

    def compile_ahead(self, program, tree, *placed) -> Callable[[], object]:
        """Begins to compile a program of `map` in a thread; returns what waits for that, before it is called.

        Args:
          program: its first argument is `OWN`.
          tree: shapes of that, of one run.
          *placed: its other arguments.
        """
        leading = (len(self.devices),) if self.num_seeds == 1 else (len(self.devices), self.num_seeds)
        sharding = NamedSharding(self._local_mesh, PartitionSpec(_DATA))

        def placed_like(leaf):
            return jax.ShapeDtypeStruct((*leading, *leaf.shape), leaf.dtype, sharding=sharding)

        lowered = program.lower(jax.tree.map(placed_like, tree), *placed)
        threads = futures.ThreadPoolExecutor(1, thread_name_prefix="compile")
        compiling = threads.submit(lowered.compile)
        threads.shutdown(wait=False)
        return lambda: futures.wait([compiling])  # where it failed, the call itself says so

    def _over_seeds(self, function, arguments):
        """The same for all runs that are on this device, where they are several: `OWN` trees have an axis."""
        if self.num_seeds == 1:
            return function

        def split(given, own):
            return jax.tree.map(lambda kind, x: x if (kind == OWN) == own else None, arguments, given)

        def runs(*given):
            if not backend.is_cpu():
                return jax.vmap(function, jax.tree.map(lambda kind: 0 if kind == OWN else None, arguments))(
                    *given
                )
            # A convolution that is vmapped over kernels is slow on a CPU, so it takes one run after another.
            common = split(given, False)

            def one(own):
                return function(
                    *jax.tree.map(lambda kind, a, b: a if kind == OWN else b, arguments, own, common)
                )

            return lax.map(one, split(given, True))

        return functools.wraps(function)(runs)

    def _specs(self, tree, kind):
        """How each leaf of a tree lies on the mesh; without a tree, how one without sub-networks does."""
        if kind != OWN or self.mode == "pmap":
            spec = PartitionSpec(_DATA) if kind == BATCH or self.mode == "pmap" else PartitionSpec()
            return spec if tree is None else jax.tree.map(lambda _: spec, tree)
        leading = (_SEED,) if self.num_seeds > 1 else ()

        # Parameters, momenta and averages of stacked sub-networks all lie under the same name in their trees.
        def spec(path, leaf):
            if is_stacked(path) and leaf.shape[len(leading)] % self._subnetworks == 0:
                return PartitionSpec(*leading, _SUBNETWORK)
            return PartitionSpec(*leading)

        return PartitionSpec(*leading) if tree is None else jax.tree_util.tree_map_with_path(spec, tree)

    def _put(self, kind, x, spec):
        pmap = self.mode == "pmap"  # each process has its own arrays then
        sharding = NamedSharding(self._local_mesh if pmap else self._mesh, spec)
        if kind == BATCH:
            x = x.reshape(len(self.devices), -1, *x.shape[1:]) if pmap else x
            return jax.make_array_from_process_local_data(sharding, x)
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = self._put(kind, jax.random.key_data(x), spec)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        if pmap:  # which wants the copies along a leading axis
            copies = [jax.device_put(x, device) for device in self.devices]
            shape = (len(copies), *x.shape[1:])
            return jax.make_array_from_single_device_arrays(shape, sharding, copies)
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        # Every process gives all of it, and JAX takes what its devices hold.
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: np.array(x[index]))


def _compiled_with(options: dict, program):
    """The program, compiled with these options of XLA when it is called first."""
    compiled = None

    @functools.wraps(program)
    def run(*given):
        nonlocal compiled
        compiled = compiled or program.lower(*given).compile(compiler_options=options)
        return compiled(*given)

    return run


def _own(tree, with_axis: bool):
    """Its arrays in memory of their own, on one device, if so with a leading axis of one."""
    leaves, structure = jax.tree.flatten(tree)
    copies = iter(_copies([x for x in leaves if isinstance(x, jax.Array)], with_axis))

    def host(x):  # `jnp.array` would compile a program for each shape
        return jax.device_put(x[None] if with_axis else x, may_alias=False)

    return structure.unflatten([next(copies) if isinstance(x, jax.Array) else host(x) for x in leaves])


# Of whole trees: leaf by leaf they would be a program for each shape.
@jax.jit
def _first(tree):
    return jax.tree.map(lambda x: x[0], tree)


@functools.partial(jax.jit, static_argnums=1)
def _copies(tree, with_axis=False):
    return jax.tree.map(lambda x: jnp.copy(x)[None] if with_axis else jnp.copy(x), tree)


@jax.jit
def _stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.partial(jax.jit, static_argnums=1)
def _apart(tree, num):
    return [jax.tree.map(lambda leaf, k=k: leaf[k], tree) for k in range(num)]
