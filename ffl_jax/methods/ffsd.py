"""Feature Fusion and Self-Distillation: "Distilling a Powerful Student Model …", Li et al., 2021."""

import math
from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from ffl_jax.errors import ConfigError
from ffl_jax.losses import at_least_float32, cross_entropy, kl_divergence, l2_norm, sigmoid_rampup, unit
from ffl_jax.methods.base import KNOWLEDGE, LABELS, METHODS, Method, terms
from ffl_jax.methods.modules import FusionModule, separable_conv
from ffl_jax.models.base import batch_norm, uniform
from ffl_jax.models.convolutions import ConvTranspose


@METHODS.register("ffsd")
class FFSD(Method):
    """Students that look at different places are fused, and teach a leader (arXiv 2103.14473).

    The last of the K sub-networks is the leader l, the one to ship; those before it are students, whose mean
    logits are the prediction `ensemble`. The loss is the sum of

      student k:  CE(z_k) + mean_{j != k} KL(z_k; z_j), and for all students but the first
                  + 1e-5 w [mean((unit(A_k) - S_{k-1})**2) + I_k]
      fused:      CE(z_f) + KL(z_f; mean_k z_k)
      leader:     CE(z_l) + KL(z_l; z_f) + 10 w [N(A_l, A_f) + N(A(U), A(X)) + I_l]
      decoders:   1000 w sum [N(G, F) + N(A(G), A(F))], over the earlier stages of their networks

    where A is the attention of the last stage's map, or of the map in brackets (`attention`), N the distance
    of two maps (`distance`), S shifted attention (`shift`), X the students' maps side by side, and U the
    leader's, widened to as many channels by a head that only training needs. w(epoch) is a warm-up.

    All networks but the first student have a decoder (`Decoder`), which makes maps of the earlier stages
    from one of the last: G, which shall be like the network's own maps F, from its own. I sums N of the
    attentions of F and of what the decoder, in inference mode, makes from another map: for a student the
    previous student's with shifted attention, for the leader the fused map.

    All second arguments are constants, and so are the inputs of the fusion module and the decoders. Then no
    term moves the parameters of two networks, and one gradient of the sum is what the released code
    (github.com/SJLeo/FFSD) computes for network after network. The values are that code's; the paper's
    figure does not show the term of U.

    Terms are logged without their weights. `attention_cosine/sub_k` compares a student's attention with that
    of the one before: the released shift may draw them together, see `shift`.

    Attributes:
      temperature: of both sides of every KL.
      logit_weight: of the KL between students.
      ensemble_weight: of the other two KL.
      diversity_weight, student_imitation_weight: of the terms with S and I_k.
      fusion_weight, trans_fusion_weight, leader_imitation_weight: of the leader's last three terms.
      decoder_feature_weight, decoder_attention_weight: of the decoders' two terms.
      shift_ref: "code", "unit" or "max", see `shift`.
      trans_fusion: whether there is the term of U.
      warmup_epochs: w rises over these many epochs, counted from 1; 0 holds it at 1.
      warmup_kd: whether w multiplies every KL too, as in the first public revision of the code.
    """

    temperature: float = 2.0
    logit_weight: float = 1.0
    ensemble_weight: float = 1.0
    diversity_weight: float = 1e-5
    student_imitation_weight: float = 1e-5
    fusion_weight: float = 10.0
    trans_fusion_weight: float = 10.0
    leader_imitation_weight: float = 10.0
    decoder_feature_weight: float = 1000.0
    decoder_attention_weight: float = 1000.0
    shift_ref: str = "code"
    trans_fusion: bool = True
    warmup_epochs: float = 5.0
    warmup_kd: bool = False

    fuses = True
    choices: ClassVar = {"shift_ref": ("code", "unit", "max")}
    headline = "leader"
    num = (3, None)
    refuses_trunk = "its leader and students are separate networks"
    refuses_mixed = "its leader and students have one architecture"

    @classmethod
    def recipe(cls, data):
        # 1e-3 is PyTorch's default for Adam: the released code does not hand its own rate on.
        decoder = {"name": "adam", "learning_rate": 1e-3, "weight_decay": 1e-4}
        recipe = {}
        if data == "cifar10":  # only the first public revision of the code has it
            recipe = {
                "data.pad_mode": "zero",
                "data.mean": (0.4914, 0.4822, 0.4465),
                "data.std": (0.2023, 0.1994, 0.2010),
            }
        if data == "imagenet":
            decoder["warmup_epochs"] = 0.0
            recipe = {
                "epochs": 90,
                "optimizer.decay_epochs": (30, 60, 80),
                "optimizer.warmup_epochs": 5.0,
                "method.warmup_epochs": 5.0,
            }
        rules = (("loss/fusion/.*", {"weight_decay": 1e-5}), ("loss/decoders_.*", decoder))
        return recipe | {"optimizer_rules": rules}

    def subnetwork_names(self):
        return (*super().subnetwork_names()[:-1], "leader")

    def setup(self):
        self.fusion = FusionModule(self.num_classes)
        self.decoders = {name: Decoder() for name in self.subnetwork_names()[1:]}
        if self.trans_fusion:
            self.trans_fusion_head = TransFusionHead(self.subnetworks.num - 1)

    def __call__(self, images, train):
        networks = self.subnetworks(images, train)
        *students, leader = networks
        # Unlike FFL's: the fused classifier's losses do not reach the students.
        student_maps = [stop_gradient(student.feature_map) for student in students]
        fused_logits, fused_map = self.fusion(student_maps, train)
        shifted = [shift(x, self.shift_ref) for x in student_maps[:-1]]

        decoded, imitated = [], []
        sources = [*(x for _, x in shifted), fused_map]
        for name, network, source in zip(self.subnetwork_names()[1:], networks[1:], sources, strict=True):
            decoder, shapes = self.decoders[name], [x.shape for x in network.feature_maps[:-1]]
            # First, for the second run updates the statistics that this one uses.
            imitated.append(decoder(source, shapes, train=False))
            decoded.append(decoder(stop_gradient(network.feature_map), shapes, train))

        outputs = {
            "logits": jnp.stack([network.logits for network in networks]),
            # Not taken from `logits`: it costs nothing of the leader.
            "ensemble_logits": sum(student.logits for student in students) / len(students),
            "fused_logits": fused_logits,
            "feature_maps": [network.feature_maps for network in networks],
            "fused_map": fused_map,
            # Of the second student on; the leader has the last two.
            "shifted": [x for x, _ in shifted],
            "imitated": imitated,
            "decoded": decoded,
        }
        if self.trans_fusion:
            outputs["widened_map"] = self.trans_fusion_head(leader.feature_map, train)
        return outputs

    def objectives(self, outputs, labels, epoch):
        warmup = sigmoid_rampup(jnp.floor(epoch) + 1, self.warmup_epochs)
        loss, logs = 0, {}
        for losses in (self._logit_losses(outputs, labels, warmup), self._map_losses(outputs, warmup)):
            for kind, family, learner, values, weight in losses:
                mean = values.mean()
                loss += weight * mean
                logs |= terms(family, [learner], [mean], kind)
        *students, _ = (unit(attention(maps[-1])) for maps in outputs["feature_maps"])
        pairs = zip(students[1:], students[:-1], strict=True)
        cosines = [(x * previous).sum(axis=(1, 2)).mean() for x, previous in pairs]
        logs |= terms("attention_cosine", self.subnetwork_names()[1:-1], cosines)
        return {"loss": loss}, logs | {"warmup": warmup}

    def _logit_losses(self, outputs, labels, warmup):
        """Yields (kind, name, learner, values of the examples [B], weight) of each loss on logits."""
        *students, leader = outputs["logits"]
        fused, names = outputs["fused_logits"], self.subnetwork_names()
        kd = warmup if self.warmup_kd else 1.0

        def distill(learner, teacher):
            return kl_divergence(learner, stop_gradient(teacher), self.temperature)

        for name, logits in zip((*names, "fused"), (*students, leader, fused), strict=True):
            yield LABELS, "cross_entropy", name, cross_entropy(logits, labels), 1.0
        for k, (name, student) in enumerate(zip(names[:-1], students, strict=True)):
            others = [distill(student, other) for j, other in enumerate(students) if j != k]
            yield KNOWLEDGE, "distillation", name, sum(others) / len(others), kd * self.logit_weight
        by_ensemble = {"leader": distill(leader, fused), "fused": distill(fused, outputs["ensemble_logits"])}
        for name, values in by_ensemble.items():
            yield KNOWLEDGE, "distillation", name, values, kd * self.ensemble_weight

    def _map_losses(self, outputs, warmup):
        """Yields the same of each loss on feature maps."""
        names, maps = self.subnetwork_names(), outputs["feature_maps"]
        for name, own, target in zip(names[1:-1], maps[1:-1], outputs["shifted"], strict=True):
            diversity = jnp.square(unit(attention(own[-1])) - target).mean(axis=(1, 2))
            yield "", "diversity", name, diversity, warmup * self.diversity_weight

        def compare(ours, theirs):
            return sum(distance(x, stop_gradient(y)) for x, y in zip(ours, theirs, strict=True))

        for name, (*own, _), *made in zip(
            names[1:], maps[1:], outputs["imitated"], outputs["decoded"], strict=True
        ):
            attentions, imitated, decoded = ([attention(x) for x in stages] for stages in (own, *made))
            weight = self.leader_imitation_weight if name == "leader" else self.student_imitation_weight
            yield "", "imitation", name, compare(attentions, imitated), warmup * weight
            features, weight = compare(made[1], own), warmup * self.decoder_feature_weight
            yield "", "decoder_feature", name, features, weight
            weight = warmup * self.decoder_attention_weight
            yield "", "decoder_attention", name, compare(decoded, attentions), weight

        *student_maps, leader_map = (stages[-1] for stages in maps)
        fused = compare([attention(leader_map)], [attention(outputs["fused_map"])])
        yield "", "fusion", "leader", fused, warmup * self.fusion_weight
        if self.trans_fusion:
            joint_map = jnp.concatenate(student_maps, axis=-1)
            widened = compare([attention(outputs["widened_map"])], [attention(joint_map)])
            yield "", "trans_fusion", "leader", widened, warmup * self.trans_fusion_weight


class TransFusionHead(nn.Module):
    """The fusion module's convolutions, here from one network's channels to those of several side by side.

    Attributes:
      num: of networks.
    """

    num: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, D] -> [B, H, W, num * D]."""
        return separable_conv(x, self.num * x.shape[-1], train)


class Decoder(nn.Module):
    """Maps of the earlier stages from one of the last: transposed conv3x3, norm and ReLU for each of them.

    The released code, which calls it self-distillation model, doubles the sides in every step. Here a stage
    that keeps the sides is met by stride 1, and one that halves odd sides, rounding up, by a pixel less.
    """

    @nn.compact
    def __call__(self, x: jax.Array, shapes: Sequence[tuple[int, ...]], train: bool) -> tuple[jax.Array, ...]:
        """[B, h, w, d] -> maps of the given `shapes`, each (B, H, W, D), in the order of the stages."""
        maps = []
        for stage in reversed(range(len(shapes))):
            _, *sides, features = shapes[stage]
            small = np.array(x.shape[1:3])
            strides = np.where(sides == small, 1, 2)
            # PyTorch's padding of 1 and output padding of 0 or 1; "SAME" is another alignment.
            ends = sides - strides * (small - 1)
            if np.any((ends < 1) | (ends > strides)):
                raise ConfigError(
                    f"FFSD's decoders keep or double a map's sides, but stage {stage + 1} of the network "
                    f"gives {sides[0]}x{sides[1]} and the next {small[0]}x{small[1]}: take images whose "
                    "sides are multiples of 32, or another config.subnetworks.network."
                )
            x = ConvTranspose(
                features,
                (3, 3),
                strides.tolist(),
                [(1, end) for end in ends.tolist()],
                # PyTorch's default, which takes a transposed kernel's outputs for its inputs.
                kernel_init=uniform(9 * features),
                name=f"stage{stage + 1}_conv",
            )(x)
            x = nn.relu(batch_norm(train, name=f"stage{stage + 1}_norm")(x))
            maps.insert(0, x)
        return tuple(maps)


def attention(feature_map: jax.Array) -> jax.Array:
    """Mean square over the channels, in at least float32: [B, H, W, D] -> [B, H, W]."""
    return jnp.square(at_least_float32(feature_map)).mean(axis=-1)


def distance(x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean squared difference of the two maps, each scaled to norm 1: [B, ...] -> [B]."""
    return jnp.square(unit(x) - unit(y)).mean(axis=range(1, x.ndim))


def shift(feature_map: jax.Array, shift_ref: str = "code") -> tuple[jax.Array, jax.Array]:
    """The attention S that the next student shall have, and the map changed towards it; as in the code.

    Of a = unit(A), what is above the smallest third is turned over, S = r - a; below, S = a, and at the
    largest value of that third, S = r / 2. All channels of the map are raised by (S - a) ||A|| / D.

    The released code's r = ||A||, near 20 for a new network, is in other units than a <= 1: S is nearly r
    where a is large, and a student's attention is drawn there, to where the previous student looks.

    Args:
      feature_map: [B, H, W, D].
      shift_ref: r is ||A|| for "code", 1 for "unit" and max(a) for "max". The last two are ours; their terms
        are hundreds of times smaller, so that the weights need tuning.

    Returns:
      (S [B, H, W], the map [B, H, W, D]).
    """
    full = attention(feature_map)
    norm, scaled = l2_norm(full), unit(full)
    count = math.prod(full.shape[1:])
    # One at least: the code does not meet maps of less than three pixels.
    threshold = jnp.sort(scaled.reshape(-1, count))[:, max(1, count // 3) - 1, None, None]
    reference = {"code": norm, "unit": 1.0, "max": scaled.max(axis=(1, 2), keepdims=True)}[shift_ref]
    # The code's (r / 2 - a) * sign(a - threshold) + r / 2 would round the small a off against r.
    target = jnp.where(scaled < threshold, scaled, reference - scaled)
    target = jnp.where(scaled == threshold, reference / 2, target)
    change = (target - scaled) * norm / feature_map.shape[-1]
    return target, feature_map + change[..., None].astype(feature_map.dtype)
