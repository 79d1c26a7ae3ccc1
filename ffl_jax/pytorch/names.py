"""What variables of ours are called in PyTorch's state dicts, by rules, and how a state dict becomes ours.

What names and shapes a file must have follows from our own networks: each variable has one PyTorch name.
"""

import functools
import logging
import math
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ffl_jax.errors import CheckpointError
from ffl_jax.models.convnext import ConvNeXt
from ffl_jax.models.densenet import DenseNet
from ffl_jax.models.googlenet import GoogLeNet
from ffl_jax.models.mobilenet import MobileNetV2
from ffl_jax.models.resnet import ResNet
from ffl_jax.models.resnet_cifar import ResNetCifar
from ffl_jax.models.shufflenet import ShuffleNetV2
from ffl_jax.models.vit import ViT
from ffl_jax.models.wide_resnet import WideResNet

_LISTED = 5
LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def _place(pattern: str, template: str) -> tuple[str, Callable]:
    """The rule that puts a stage's and a block's numbers, from 0, into a template.

    They are `stage`, `block`, `index`, the block's number in the whole network, and `even` and `odd`, twice
    the stage's number and the next one.
    """

    def replace(network, found):
        stage, block = int(found[1]) - 1, int(found[2]) - 1 if len(found.groups()) > 1 else 0
        numbers = {"stage": stage, "block": block, "index": sum(network.blocks[:stage]) + block}
        return template.format(even=2 * stage, odd=2 * stage + 1, **numbers)

    return pattern, replace


def _googlenet(network, found):
    stage, block, branch, layer, number = found.groups()
    # Convolution, norm and ReLU follow one another in a branch, in the last one after the max pool.
    position = 3 * (int(number) - 1) + (layer == "norm") + (branch == "4")
    branch = ("branch1x1", "branch3x3", "branch5x5", "branch_pool")[int(branch) - 1]
    return f"inception_{'abcde'[int(block) - 1]}{int(stage) + 2}.{branch}.{position}"


def _mobilenet(network, found):
    stage, block, layer, kind = found.groups()
    index = sum(network.blocks[: int(stage) - 1]) + int(block)
    # The first block has no convolution that expands.
    position = ("expand", "depthwise", "project").index(layer) - (index == 1)
    if layer == "project":
        return f"features.{index}.conv.{position + (kind == 'norm')}"
    return f"features.{index}.conv.{position}.{int(kind == 'norm')}"


_BLOCK = r"stage(\d)_block(\d+)/"
_RESNET = (
    *(("^head", "fc"), ("stem_conv", "conv1"), ("stem_norm", "bn1")),
    (_BLOCK, lambda network, found: f"layer{found[1]}.{int(found[2]) - 1}."),
    *(("shortcut_conv", "downsample.0"), ("shortcut_norm", "downsample.1"), ("norm", "bn")),
)
_TORCHVISION_VIT = (
    *(("stem_conv", "conv_proj"), ("stem_class_token", "class_token")),
    *(("stem_positions", "encoder.pos_embedding"), ("^head", "heads.head"), (r"stage\d_norm", "encoder.ln")),
    *(_place(_BLOCK, "encoder.layers.encoder_layer_{index}."), (r"norm(\d)", r"ln_\1")),
    *(
        ("attention/query_key_value/", "self_attention.in_proj_"),
        ("attention/project", "self_attention.out_proj"),
    ),
)
# Family -> {who calls them so: what to replace, one after another, in the path of a variable of ours}.
RULES = {
    ResNetCifar: {"released code": _RESNET},
    ResNet: {"torchvision and timm": _RESNET},
    WideResNet: {
        "released code": (
            *(("^head", "linear"), ("stem_conv", "conv1"), ("stage3_norm", "bn1"), _RESNET[3]),
            *(("shortcut_conv", "shortcut.0"), ("norm", "bn")),
        )
    },
    DenseNet: {
        "released code": (
            *(("^head", "fc"), ("stem_conv", "conv1"), ("stage3_norm", "bn"), ("norm", "bn")),
            (r"stage(\d)_layer(\d+)/", lambda _, found: f"dense{found[1]}.{int(found[2]) - 1}."),
            *((r"stage2_transition_(\w+)", r"trans1.\g<1>1"), (r"stage3_transition_(\w+)", r"trans2.\g<1>1")),
        )
    },
    GoogLeNet: {
        "released code": (
            *(("^head", "linear"), ("stem_conv", "pre_layers.0"), ("stem_norm", "pre_layers.1")),
            (r"stage(\d)_block(\d)/branch(\d)_(conv|norm)(\d)", _googlenet),
        )
    },
    MobileNetV2: {
        "torchvision": (
            *(("^head", "classifier.1"), ("stem_conv", "features.0.0"), ("stem_norm", "features.0.1")),
            *((_BLOCK + r"(\w+)_(conv|norm)", _mobilenet), (r"stage\d_conv", "features.18.0")),
            (r"stage\d_norm", "features.18.1"),
        )
    },
    ShuffleNetV2: {
        "torchvision": (
            *(("^head", "fc"), ("stem_conv", "conv1.0"), ("stem_norm", "conv1.1")),
            (_BLOCK, lambda _, found: f"stage{int(found[1]) + 1}.{int(found[2]) - 1}."),
            *((r"stage\d_conv", "conv5.0"), (r"stage\d_norm", "conv5.1")),
            *(("shortcut_depthwise_conv", "branch1.0"), ("shortcut_depthwise_norm", "branch1.1")),
            *(("shortcut_pointwise_conv", "branch1.2"), ("shortcut_pointwise_norm", "branch1.3")),
            *(("pointwise1_conv", "branch2.0"), ("pointwise1_norm", "branch2.1")),
            *(("depthwise_conv", "branch2.3"), ("depthwise_norm", "branch2.4")),
            *(("pointwise2_conv", "branch2.5"), ("pointwise2_norm", "branch2.6")),
        )
    },
    ViT: {
        "timm": (
            *(("stem_conv", "patch_embed.proj"), ("stem_class_token", "cls_token")),
            *(("stem_positions", "pos_embed"), (r"stage\d_norm", "norm"), _place(_BLOCK, "blocks.{index}.")),
            *(("attention/query_key_value", "attn.qkv"), ("attention/project", "attn.proj")),
            *(("mlp_expand", "mlp.fc1"), ("mlp_project", "mlp.fc2")),
        ),
        "torchvision": (*_TORCHVISION_VIT, ("mlp_expand", "mlp.0"), ("mlp_project", "mlp.3")),
        # The file that it offers is still of that time.
        "torchvision before 0.13": (
            *(*_TORCHVISION_VIT, ("mlp_expand", "mlp.linear_1"), ("mlp_project", "mlp.linear_2")),
        ),
    },
    ConvNeXt: {
        "timm": (
            *(
                ("^head", "head.fc"),
                ("norm_head", "head.norm"),
                ("stem_conv", "stem.0"),
                ("stem_norm", "stem.1"),
            ),
            _place(r"stage(\d)_halving_norm", "stages.{stage}.downsample.0"),
            _place(r"stage(\d)_halving_conv", "stages.{stage}.downsample.1"),
            *(_place(_BLOCK, "stages.{stage}.blocks.{block}."), ("depthwise_conv", "conv_dw")),
            *(("mlp_expand", "mlp.fc1"), ("mlp_project", "mlp.fc2"), ("layer_scale", "gamma")),
        ),
        "torchvision": (
            *(("^head", "classifier.2"), ("norm_head", "classifier.0")),
            *(("stem_conv", "features.0.0"), ("stem_norm", "features.0.1")),
            _place(r"stage(\d)_halving_norm", "features.{even}.0"),
            _place(r"stage(\d)_halving_conv", "features.{even}.1"),
            *(_place(_BLOCK, "features.{odd}.{block}."), ("depthwise_conv", "block.0"), ("norm", "block.2")),
            *(("mlp_expand", "block.3"), ("mlp_project", "block.5")),
        ),
    },
}


def torch_name(network, path: Sequence[str], source: str = "") -> str:
    """PyTorch's name of a variable of ours.

    Args:
      network: whose variable it is.
      path: of the variable in it.
      source: one of `RULES[type(network)]`; empty takes the first.
    """
    rules = RULES[type(network)]
    *layers, leaf = path
    name = "/".join((*layers, LEAVES.get(leaf, leaf)))
    for pattern, replacement in rules[source] if source else next(iter(rules.values())):
        if callable(replacement):
            replacement = functools.partial(replacement, network)
        name = re.sub(pattern, replacement, name)
    return name.replace("/", ".")


def resized_positions(positions: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[1, 1 + n * n, D], a class token's first, for another grid of patches: [1, 1 + height * width, D].

    Bicubic with antialiasing, as in timm.
    """
    token, patches = positions[:, :1], positions[:, 1:].astype(np.float32)
    side, width = math.isqrt(patches.shape[1]), positions.shape[-1]
    patches = patches.reshape(1, side, side, width)
    patches = jax.image.resize(patches, (1, *grid, width), "cubic", antialias=True)
    return np.concatenate([token, np.asarray(patches).reshape(1, -1, width)], axis=1)


class Entries:
    """A state dict whose entries are taken one after another, for arrays of ours.

    Attributes:
      problems: what did not fit so far.
    """

    def __init__(self, entries: dict[str, np.ndarray], own: bool = False):
        """Args: own: the arrays are laid out as ours, not as PyTorch's."""
        self._entries, self._own, self._used, self.problems = dict(entries), own, set(), []

    def leave(self, name: str):
        """Of this entry nothing is wanted."""
        self._used.add(name)

    def resize_positions(self, name: str, grid: tuple[int, int]):
        """Interpolates the positions of this entry to a grid, see `resized_positions`."""
        value = self._entries.get(name)
        if value is None or value.ndim != 3:
            return
        count = value.shape[1] - 1
        side = math.isqrt(count)
        fits = count == grid[0] * grid[1] and (self._own or grid[0] == grid[1])
        if side**2 == count and not fits:
            self._entries[name] = resized_positions(value, grid)
            logging.info("Positions of %dx%d patches are interpolated to %dx%d.", side, side, *grid)

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The entry as float32 in our layout and shape; zeros, and a problem, where it cannot be."""
        self._used.add(name)
        # OIHW -> HWIO, [out, in] -> [in, out].
        same = tuple(range(len(shape)))
        axes = same if self._own else {4: (2, 3, 1, 0), 2: (1, 0)}.get(len(shape), same)
        wanted = tuple(shape[axis] for axis in np.argsort(axes))
        value = self._entries.get(name)
        if value is None:
            self.problems.append(f"{name} is missing")
            return np.zeros(shape, np.float32)
        # A scale of channels [D, 1, 1], or a 1x1 convolution in place of a linear layer.
        seen = value.shape[: len(wanted)] if set(value.shape[len(wanted) :]) == {1} else value.shape
        if seen != wanted or value.dtype.kind != "f":
            self.problems.append(f"{name} is {value.dtype}{list(value.shape)}, not float32{list(wanted)}")
        else:
            with np.errstate(over="ignore"):
                value = value.reshape(wanted).astype(np.float32)
            if np.isfinite(value).all():
                return value.transpose(axes)
            self.problems.append(f"{name} has values that are infinite or not a number")
        return np.zeros(shape, np.float32)

    def check(self, what: str, advice: str):
        """Raises CheckpointError if anything did not fit, or was not taken; `what` has these entries."""
        problems = self.problems + [
            f"{name} is unexpected" for name in sorted(self._entries.keys() - self._used)
        ]
        if problems:
            rest = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
            raise CheckpointError(f"{what} does not fit: {'; '.join(problems[:_LISTED])}{rest}. {advice}")
