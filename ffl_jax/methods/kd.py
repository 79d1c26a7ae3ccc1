"""Knowledge distillation from networks that were trained before: Hinton et al., 2015."""

from typing import ClassVar

import jax.numpy as jnp
from jax.lax import stop_gradient

from ffl_jax.errors import ConfigError
from ffl_jax.losses import cross_entropy, kl_divergence
from ffl_jax.methods.base import KNOWLEDGE, LABELS, METHODS, OfflineMethod, terms


@METHODS.register("kd")
class KD(OfflineMethod):
    """The student learns from the labels and from a trained teacher's softened outputs (arXiv 1503.02531).

    additive: loss = CE(z) + a KL(z; z_t)
    blend:    loss = (1 - a) CE(z) + a KL(z; z_t)

    with T**2 in the KL. The additive form, a = 1 and T = 3, is the baseline row of the papers on online
    distillation (OKDDip's released code); the blend is Hinton's and, with `weight=0.9` and `temperature=4`,
    the usual one in comparisons of offline methods (RepDistiller). Several teachers teach by the mean of
    their logits (our choice). The recipe for CIFAR is OKDDip's, but for its smoothing of 1e-7.

    Attributes:
      variant: "additive" or "blend".
      weight: a; below 1 in the blend.
      temperature: of both sides of the KL.
      smoothing: added to the target's probabilities.
    """

    variant: str = "additive"
    weight: float = 1.0
    temperature: float = 3.0
    smoothing: float = 0.0

    choices: ClassVar = {"variant": ("additive", "blend")}
    trains: ClassVar[dict[str, str]] = {"loss": "(?!teachers/).*"}

    @classmethod
    def recipe(cls, data):
        # The pairs of networks that published rows have, for the student that they have it with.
        if data == "imagenet":
            return {"teachers.network": "resnet34"}
        if data not in ("cifar10", "cifar100"):
            return {}
        recipe = {"optimizer.weight_decay": 5e-4, "data.pad_mode": "zero"}
        return recipe | {"teachers.network": "resnet110_bottleneck"}

    def check(self):
        super().check()
        if self.variant == "blend" and self.weight >= 1:
            raise ConfigError(
                "method.variant=blend leaves the labels a share of 1 - weight: set config.method.weight "
                f"below 1, commonly 0.9 with config.method.temperature=4, got {self.weight}."
            )

    def __call__(self, images, train):
        (student,) = self.subnetworks(images, train)
        teachers = self.teachers(images, train=False)
        return {
            "logits": student.logits[None],
            "teacher_logits": tuple(teacher.logits for teacher in teachers),
        }

    def objectives(self, outputs, labels, epoch):
        logits = outputs["logits"][0]
        target = stop_gradient(jnp.stack(outputs["teacher_logits"]).mean(axis=0))
        ce = cross_entropy(logits, labels).mean()
        kd = kl_divergence(logits, target, self.temperature, self.smoothing).mean()
        share = 1.0 if self.variant == "additive" else 1 - self.weight
        logs = terms("cross_entropy", ["student"], [ce], LABELS)
        logs |= terms("distillation", ["student"], [kd], KNOWLEDGE)
        return {"loss": share * ce + self.weight * kd}, logs
