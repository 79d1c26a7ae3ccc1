"""Feature-level ensemble knowledge distillation: Park and Kwak, ECAI 2020, arXiv 1909.10754."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from ffl_jax.errors import ConfigError
from ffl_jax.losses import at_least_float32, cross_entropy, unit
from ffl_jax.methods.base import KNOWLEDGE, LABELS, METHODS, OfflineMethod, terms
from ffl_jax.methods.modules import pool_to_smallest
from ffl_jax.models.base import uniform
from ffl_jax.models.convolutions import Conv


@METHODS.register("feed")
class FEED(OfflineMethod):
    """The student's last feature map is translated into that of every trained teacher, by a module for each.

    loss = CE(z) + weight sum_i |phi(T_i(F)) - phi(F_i)|

    with phi dividing a map by its L2 norm, and F and F_i the maps of the student and of teacher i, which see
    the same images. The sum over the N teachers is the paper's. Several teachers are its parallel form; one
    teacher that was itself such a student (`config.teachers.generations`) is its sequential form; and one
    with `target="factor"` is factor transfer (Kim et al., 2018, arXiv 1802.04977).

    No code of FEED was released. The paper has translators of three 3x3 convolutions; their slopes and
    biases, the weight with its reduction, and the factors are those of factor transfer's released code, the
    rest of the recipe is ours. Factor transfer's own recipe is `epochs=164` after the colon, with
    `--config.optimizer.weight_decay=5e-4 --config.optimizer.nesterov=False --config.data.pad_mode=zero`.

    With `target="factor"`, the earlier form of the paper, teacher i's map is replaced by what the encoder of
    a paraphraser P_i makes of it, an autoencoder of the map. A second objective trains it:

    paraphraser = sum_i mean |P_i(F_i) - F_i|

    It runs beside the student's, with the same settings, where factor transfer trains paraphrasers for a few
    epochs before and freezes them: a deviation, for the sake of one run.

    Attributes:
      weight: of each teacher's term, which the log shows multiplied by it. 500 goes with the mean over
        elements; as a sum over them the same is 500 / (height * width * channels) of the teacher's map.
      reduction: "mean" or "sum" of the absolute differences over height, width and channels (the paper's
        formula has the sum, without its weight).
      target: "map" or "factor".
      factor_rate: channels of a factor over those of the map.
      reconstruction: "l1" as in the code of factor transfer, or "l2", squared differences as in its paper.
      shared_translator: one translator for all teachers, whose maps must be equally wide: an ablation.
    """

    weight: float = 500.0
    reduction: str = "mean"
    target: str = "map"
    factor_rate: float = 0.5
    reconstruction: str = "l1"
    shared_translator: bool = False

    choices: ClassVar = {
        "target": ("map", "factor"),
        "reduction": ("mean", "sum"),
        "reconstruction": ("l1", "l2"),
    }

    @property
    def trains(self):
        trains = {"loss": "subnetworks/.*|translators_.*"}
        return trains | ({"paraphraser": "paraphrasers_.*"} if self.target == "factor" else {})

    @classmethod
    def recipe(cls, data):
        return {"teachers.num": 3}

    def check(self):
        super().check()
        if not 0 < self.factor_rate <= 1:
            raise ConfigError(f"method.factor_rate must be above 0 and at most 1, got {self.factor_rate}.")

    def setup(self):
        num = self.teachers.num
        self.translators = [Translator() for _ in range(1 if self.shared_translator else num)]
        if self.target == "factor":
            self.paraphrasers = [Paraphraser(self.factor_rate) for _ in range(num)]

    def __call__(self, images, train):
        (student,) = self.subnetworks(images, train)
        teachers = self.teachers(images, train=False)
        teacher_maps = tuple(stop_gradient(teacher.feature_map) for teacher in teachers)
        outputs = {
            "logits": student.logits[None],
            "teacher_logits": tuple(teacher.logits for teacher in teachers),
            "teacher_maps": teacher_maps,
        }
        targets = teacher_maps
        if self.target == "factor":
            pairs = [paraphraser(x) for paraphraser, x in zip(self.paraphrasers, teacher_maps, strict=True)]
            targets, outputs["reconstructions"] = zip(*pairs, strict=True)
        widths = sorted({x.shape[-1] for x in targets})
        if self.shared_translator and len(widths) > 1:
            raise ConfigError(
                f"method.shared_translator needs teachers with equally wide maps, got {widths} channels: "
                "choose such a config.teachers.network."
            )
        translators = self.translators * (self.teachers.num if self.shared_translator else 1)
        translated = [
            translator(student.feature_map, x.shape[-1])
            for translator, x in zip(translators, targets, strict=True)
        ]
        return outputs | {"translated": tuple(translated), "targets": tuple(targets)}

    def objectives(self, outputs, labels, epoch):
        # Stopped for the factors: the student must not pull the paraphrasers towards what is easy.
        targets = stop_gradient(outputs["targets"])
        feed = [
            self.weight * feature_distance(translated, target, self.reduction).mean()
            for translated, target in zip(outputs["translated"], targets, strict=True)
        ]
        ce = cross_entropy(outputs["logits"][0], labels).mean()
        objectives, names = {"loss": ce + sum(feed)}, self.teacher_names()
        logs = terms("cross_entropy", ["student"], [ce], LABELS)
        logs |= terms("distillation", names, feed, KNOWLEDGE)
        if self.target == "factor":
            power = {"l1": 1, "l2": 2}[self.reconstruction]
            errors = [
                (_abs_difference(x, target) ** power).mean()
                for x, target in zip(outputs["reconstructions"], outputs["teacher_maps"], strict=True)
            ]
            objectives["paraphraser"] = sum(errors)
            logs |= terms("reconstruction", names, errors)
        return objectives, logs


class Translator(nn.Module):
    """Three conv3x3 with leaky ReLU: the non-linear transformation layer of one teacher."""

    @nn.compact
    def __call__(self, x: jax.Array, features: int) -> jax.Array:
        """[B, H, W, D] -> [B, H, W, features]."""
        x = _layer(x, x.shape[-1], "conv1")
        x = _layer(x, features, "conv2")
        # The teacher's map has no negative values; the last slope lets the gradient reach such outputs.
        return _layer(x, features, "conv3")


class Paraphraser(nn.Module):
    """Autoencoder of a teacher's feature map; the code, with fewer channels, is the teacher's factor.

    Attributes:
      rate: channels of the factor over those of the map.
    """

    rate: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, H, W, D] -> (factor [B, H, W, round(rate * D)], reconstruction [B, H, W, D])."""
        width = x.shape[-1]
        features = max(1, round(self.rate * width))
        x = _layer(x, width, "encoder1")
        x = _layer(x, features, "encoder2")
        factor = _layer(x, features, "encoder3")
        # The released code has transposed convolutions here, which at stride 1 are convolutions as well.
        x = _layer(factor, features, "decoder1")
        x = _layer(x, width, "decoder2")
        return factor, _layer(x, width, "decoder3")


def feature_distance(x: jax.Array, target: jax.Array, reduction: str = "mean") -> jax.Array:
    """L1 distance of two maps after each was divided by its L2 norm: [B, H, W, D], [B, H', W', D] -> [B].

    The larger map is first average-pooled to the smaller one (our choice: the paper does not meet the case).

    Args:
      x, target: the maps.
      reduction: "mean" or "sum" over height, width and channels.
    """
    x, target = pool_to_smallest([x, target])
    difference = _abs_difference(unit(x), unit(target))
    return getattr(difference, reduction)(axis=(1, 2, 3))


def _abs_difference(x, target):
    return jnp.abs(at_least_float32(x) - target)


def _layer(x, features, name):
    """conv3x3 with a bias, both drawn as PyTorch's default is, then leaky ReLU of slope 0.1."""
    init = uniform(9 * x.shape[-1])
    x = Conv(features, (3, 3), padding=1, kernel_init=init, bias_init=init, name=name)(x)
    return nn.leaky_relu(x, 0.1)
