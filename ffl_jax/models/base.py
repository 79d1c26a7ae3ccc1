"""What every network gives, and the layers that all families build with."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers

from ffl_jax.devices import parallel
from ffl_jax.errors import ConfigError
from ffl_jax.models import convolutions
from ffl_jax.models.normalization import BatchNorm
from ffl_jax.registry import Registry

NETWORKS = Registry("network")

# What convolutions start from: Normal(0, sqrt(2 / (kernel**2 * features))), for their outputs, …
FAN_OUT = initializers.variance_scaling(2.0, "fan_out", "normal")
# … the same for their inputs, …
FAN_IN = initializers.variance_scaling(2.0, "fan_in", "normal")
# … or U(-1 / sqrt(n), 1 / sqrt(n)) of n inputs, PyTorch's default.
UNIFORM = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# What the weights of transformers and ConvNeXts start from; timm cuts it off at 100 deviations.
SMALL_NORMAL = initializers.normal(0.02)
# `train` of a network that is trained by the batch statistics that it has: true, but not for `batch_norm`.
KEPT = "kept"


@flax.struct.dataclass
class NetworkOutputs:
    """What one network computes for a batch.

    Attributes:
      logits: [B, C].
      features: [B, D], what the head gets: the last feature map averaged over space, or a class token.
      feature_maps: one [B, H, W, D] for each stage that the network ran, its output: after the stage's last
        ReLU, but for the earlier stages of pre-activation networks, which end in a sum or a concatenation,
        and of MobileNetV2, which end in linear bottlenecks.
        What narrows or pools the map between two stages belongs to the later one.
      trunk_map: [B, H, W, D], the output of the trunk that the sub-networks share; None without one.
    """

    logits: jax.Array
    features: jax.Array
    feature_maps: tuple[jax.Array, ...]
    trunk_map: jax.Array | None = None

    @property
    def feature_map(self) -> jax.Array:
        """The last feature map, [B, H, W, D]."""
        return self.feature_maps[-1]


class Network(nn.Module):
    """A classifier that runs its stages [start, stop), so that trunk and branch are cuts of the same class.

    Run from 0 to the end, it maps images to `NetworkOutputs`. With `stop` before the end it returns the
    feature map there; with `start` > 0 it takes that map in place of images. Names of parameters do not
    depend on the cut: trunk and branch together hold the names of the whole network.

    A family defines `num_stages`, `stem` and `stage`, and `classify` where one linear layer is not all. Where
    more than a map goes from stage to stage, it also defines `feature_map` and `pool`.

    Attributes:
      num_classes: C.
      start, stop: the first stage to run and the one to stop before; `stop` None runs to the logits.
      dropout: share of the numbers that are left out in training, where the family's layers say.
      drop_path: share of the examples that pass a residual block by in training, for the last block; it
        rises from 0 at the first one. Stochastic depth: Huang et al., 2016, arXiv 1603.09382.
      drops: which of these two the family has; the others stay 0.
    """

    num_classes: int
    start: int = 0
    stop: int | None = None
    dropout: float = 0.0
    drop_path: float = 0.0

    num_stages = 3
    drops: ClassVar[tuple[str, ...]] = ()

    def stem(self, x: jax.Array, train: bool) -> jax.Array:
        """What comes before the first stage: images [B, H, W, 3] -> map."""
        raise NotImplementedError

    def stage(self, index: int, x: jax.Array, train: bool) -> jax.Array:
        """Stage `index`, 0-based: map -> map."""
        raise NotImplementedError

    def feature_map(self, x: Any) -> jax.Array:
        """[B, H, W, D] of what a stage gives."""
        return x

    def pool(self, x: Any) -> jax.Array:
        """What the last stage gives -> features [B, D]."""
        return x.mean(axis=(1, 2))

    def classify(self, features: jax.Array) -> jax.Array:
        """What comes after the last stage: pooled [B, D] -> logits [B, C]. Layers' names end in "head"."""
        return dense(self.num_classes, features.shape[-1], name="head")(features)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> NetworkOutputs | jax.Array:
        """[B, H, W, 3] images, or the map before stage `start`; `train` uses and updates batch statistics."""
        if self.start == 0:
            x = self.stem(x, train)
        feature_maps = []
        for index in range(self.start, self.num_stages if self.stop is None else self.stop):
            x = self.stage(index, x, train)
            feature_maps.append(self.feature_map(x))
        if self.stop is not None:
            return x
        features = self.pool(x)
        return NetworkOutputs(self.classify(features), features, tuple(feature_maps))


class BasicBlock(nn.Module):
    """conv3x3 - norm - ReLU - conv3x3 - norm, added to a shortcut, then ReLU: He et al., 2016, fig. 2.

    The shortcut is the identity, or a 1x1 convolution and norm (option B) where width or resolution change.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, D] -> [B, H / stride, W / stride, features]."""
        y = conv_norm(x, train, self.features, 3, self.stride, name="*1")
        y = conv_norm(y, train, self.features, 3, name="*2", activation=None)
        return nn.relu(_shortcut(x, y, self.stride, train) + y)


class Bottleneck(nn.Module):
    """conv1x1 - norm - ReLU - conv3x3 - norm - ReLU - conv1x1 - norm, added to a shortcut, then ReLU.

    He et al., 2016, fig. 5; the stride is in the 3x3 convolution, as in PyTorch's torchvision and in the
    code of ONE and OKDDip, where the paper has it in the first. The shortcut is that of `BasicBlock`.

    Attributes:
      features: channels of the output.
      width: channels of the 3x3 convolution; a quarter of `features` in the paper.
      stride: of the 3x3 convolution and of the shortcut.
    """

    features: int
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, D] -> [B, H / stride, W / stride, features]."""
        y = conv_norm(x, train, self.width, 1, name="*1")
        y = conv_norm(y, train, self.width, 3, self.stride, name="*2")
        y = conv_norm(y, train, self.features, 1, name="*3", activation=None)
        return nn.relu(_shortcut(x, y, self.stride, train) + y)


def _shortcut(x: jax.Array, y: jax.Array, stride: int, train: bool) -> jax.Array:
    """What a block's input `x` is added to `y` as: itself, or brought to the shape of `y`."""
    if y.shape == x.shape:
        return x
    return conv_norm(x, train, y.shape[-1], 1, stride, name="shortcut_*", activation=None)


def residual_stage(x: jax.Array, train: bool, index: int, blocks: int, block: Callable) -> jax.Array:
    """Stage `index`, 0-based, of `blocks` blocks: the first has stride 2, but not in the first stage.

    Args: block: (stride=, name=) -> a block.
    """
    for number in range(blocks):
        stride = 2 if index > 0 and number == 0 else 1
        x = block(stride=stride, name=f"stage{index + 1}_block{number + 1}")(x, train)
    return x


def conv_norm(
    x: jax.Array,
    train: bool,
    features: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    *,
    name: str,
    activation: Callable | None = lambda x: nn.relu(x),  # looked up then, since a test puts its own there
    kernel_init: initializers.Initializer = FAN_OUT,
) -> jax.Array:
    """`conv`, then `batch_norm`, then `activation` if any: [B, H, W, D] -> [B, H, W, features].

    Args: name: of both layers, with "conv" and "norm" in place of its "*".
    """
    x = conv(features, kernel, stride, groups, name.replace("*", "conv"), kernel_init=kernel_init)(x)
    x = batch_norm(train, name=name.replace("*", "norm"))(x)
    return activation(x) if activation else x


def conv(
    features: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    name: str | None = None,
    bias_init: initializers.Initializer | None = None,
    kernel_init: initializers.Initializer = FAN_OUT,
) -> nn.Conv:
    """Square convolution, padded by (kernel - 1) / 2 on every side; with a bias where `bias_init` is given.

    The padding is explicit: "SAME" pads (0, 1) at stride 2 on even inputs and is not what the papers' code
    computes.
    """
    return convolutions.Conv(
        features,
        (kernel, kernel),
        stride,
        padding=(kernel - 1) // 2,
        feature_group_count=groups,
        use_bias=bias_init is not None,
        kernel_init=kernel_init,
        bias_init=bias_init or initializers.zeros,
        name=name,
    )


def biased_conv(
    x: jax.Array, features: int, kernel: int, stride: int = 1, name: str | None = None
) -> jax.Array:
    """`conv` of x [B, H, W, D] with a bias, which starts as PyTorch's does, by the D * kernel**2 inputs."""
    return conv(features, kernel, stride, name=name, bias_init=uniform(kernel**2 * x.shape[-1]))(x)


def batch_norm(train: bool | str, name: str | None = None, momentum: float = 0.9) -> BatchNorm:
    """Batch normalisation with PyTorch's defaults, its statistics taken over the batches of all devices.

    The running variance is the biased one, as always in Flax; PyTorch's is larger by M / (M - 1). `momentum`
    is the weight of the old statistics; PyTorch's is that of the new ones. Where `train` is `KEPT`, the
    running ones are used and stay.
    """
    return BatchNorm(
        use_running_average=not train or train == KEPT,
        momentum=momentum,
        epsilon=1e-5,
        axis_name=parallel.axis_name(),
        # E[x^2] - E[x]^2 in one pass loses digits where the mean is large against the spread.
        use_fast_variance=False,
        name=name,
    )


def dense(
    features: int, fan_in: int, name: str | None = None, bias_init: initializers.Initializer | None = None
) -> nn.Dense:
    """Linear layer of `fan_in` inputs; weights and bias start from `uniform(fan_in)`, as in PyTorch."""
    bias_init = bias_init or uniform(fan_in)
    return nn.Dense(features, kernel_init=uniform(fan_in), bias_init=bias_init, name=name)


def layer_norm(name: str) -> nn.LayerNorm:
    """Normalises over the channels, with the epsilon of the published ViTs and ConvNeXts."""
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)


def mlp(x: jax.Array, train: bool, dropout: float = 0.0) -> jax.Array:
    """Linear to four times the channels, exact GELU, linear back, within a compact module."""
    hidden = nn.Dense(4 * x.shape[-1], kernel_init=SMALL_NORMAL, name="mlp_expand")(x)
    hidden = Dropout(dropout)(nn.gelu(hidden, approximate=False), train)
    x = nn.Dense(x.shape[-1], kernel_init=SMALL_NORMAL, name="mlp_project")(hidden)
    return Dropout(dropout)(x, train)


def patch_conv(x: jax.Array, features: int, size: int, name: str) -> jax.Array:
    """Convolution, with a bias, of patches of `size` x `size` pixels that do not overlap, unpadded.

    Rows and columns beyond the last whole patch are not seen.
    """
    if min(x.shape[1:3]) < size:
        raise ConfigError(
            f"config.subnetworks.network: a layer takes patches of {size}x{size} pixels of a map that is "
            f"{x.shape[1]}x{x.shape[2]}: take larger images, or a network of smaller patches."
        )
    layer = convolutions.Conv(features, (size, size), size, padding=0, kernel_init=SMALL_NORMAL, name=name)
    return layer(x)


def drop_path_rates(rate: float, blocks: Sequence[int]) -> list[list[float]]:
    """The share that each block is passed by, stage by stage: 0 for the first one, `rate` for the last."""
    last = max(sum(blocks) - 1, 1)
    return [
        [rate * (sum(blocks[:stage]) + block) / last for block in range(num)]
        for stage, num in enumerate(blocks)
    ]


class Dropout(nn.Module):
    """Sets numbers, or all of an example, to 0 in training, and divides the others by the share that stays.

    What is drawn hangs on the key "dropout" and the example's place in the batch of all devices, so that a
    step is the same on any number of them.

    Attributes:
      rate: the share that is set to 0.
      examples: whether all of an example is, or none.
    """

    rate: float
    examples: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, ...] -> the same shape."""
        if not train or not self.rate:
            return x
        keys = parallel.own_keys(self.make_rng("dropout"), len(x))
        shape = (1,) * (x.ndim - 1) if self.examples else x.shape[1:]
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, shape))(keys)
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros((), x.dtype))


def small_dense(features: int, name: str | None = None) -> nn.Dense:
    """Linear layer that starts from Normal(0, 0.01), its bias from 0: that of VGG and MobileNetV2."""
    return nn.Dense(features, kernel_init=initializers.normal(0.01), name=name)


def uniform(fan_in: int) -> initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for linear layers and for every bias."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


def early_stride(x: jax.Array) -> int:
    """Stride of an early layer: 1 on a map [B, H, W, D] of less than 64 pixels a side, else 2.

    It asks the map, not the image, so that a branch, which never sees the image, decides like the whole.
    """
    return 2 if min(x.shape[1:3]) >= 64 else 1
