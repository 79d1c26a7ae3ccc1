"""The interface of a method of online distillation."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from ffl_jax.errors import ConfigError
from ffl_jax.methods.subnetworks import Mixed
from ffl_jax.models import Network
from ffl_jax.registry import Registry, check_choice

METHODS = Registry("method")
# What a term says: how far a prediction is from the labels, or from what another one says.
LABELS, KNOWLEDGE = "labels", "knowledge"
# What a prediction is: of one plain network, of several by their mean, by a trained module, of a teacher.
NETWORK, ENSEMBLE, FUSED, TEACHER = "network", "ensemble", "fused", "teacher"


@flax.struct.dataclass
class Term:
    """A number of one step, for the log: curves and alarms are drawn from what it says it is.

    Attributes:
      value: scalar.
      kind: LABELS or KNOWLEDGE, in nats per example; empty for what is neither, such as a weight.
      learner: the prediction that learns by it; empty for none.
    """

    value: jax.Array
    kind: str = flax.struct.field(pytree_node=False, default="")
    learner: str = flax.struct.field(pytree_node=False, default="")


def terms(
    family: str, learners: Sequence[str], values: Sequence[jax.Array], kind: str = ""
) -> dict[str, Term]:
    """{"family/learner": its `Term`} of one loss that several predictions have: values are scalars."""
    pairs = zip(learners, values, strict=True)
    return {f"{family}/{learner}": Term(value, kind, learner) for learner, value in pairs}


def logged(terms: dict[str, Term | jax.Array]) -> dict[str, jax.Array]:
    """{name: scalar} of what `objectives` logs."""
    return {name: term.value if isinstance(term, Term) else term for name, term in terms.items()}


def parameter_mask(variables: dict, averages: Sequence[str] = ()) -> dict:
    """A tree like `variables` that says of each leaf whether it is a parameter, or an average of one.

    Args:
      variables: {"params": …, kind of model state: …}, of a method or a network.
      averages: of a method, see there.
    """
    return {
        kind: parameter_mask(tree)
        if kind in averages
        else jax.tree.map(lambda _, yes=kind == "params": yes, tree)
        for kind, tree in variables.items()
    }


@dataclasses.dataclass(frozen=True)
class Role:
    """What a prediction is.

    Attributes:
      kind: NETWORK, ENSEMBLE, FUSED or TEACHER.
      network: of a NETWORK, which of the K sub-networks has its form.
    """

    kind: str
    network: int | None = None


class Method(nn.Module):
    """Networks, modules and losses of one method.

    Fields beside these are its hyper-parameters, with the paper's defaults. Those that count epochs end in
    `_epochs`, for runs of 300, and are stretched with the run. A field `teachers`, None by default, asks for
    networks that are trained before: it is set to a `Mixed`, whose parameters no objective may train. A
    method never sees an optimiser, a device, a checkpoint or a loop, and none of these knows which method
    runs.

    Attributes:
      subnetworks: `Stacked` or `Mixed`, a method never asks which; calling it gives K `NetworkOutputs`.
      num_classes: C.
      trains: objective -> regex over "/"-joined parameter paths. Its gradient moves only the paths that it
        matches in full; a path that no objective matches is frozen.
      headline: the prediction that is reported first and shipped by default (`deploy` in `summary.json`).
      fuses: whether a trained module joins the sub-networks; its prediction is called `fused`.
      choices: hyper-parameter -> the values that it can take, for those that are names.
      views: whether every sub-network sees an augmentation of its own in training.
      averages: collections of the model state that hold averages of this method's variables, by their names.
      num: the least and the most sub-networks that it can do with; None knows no limit.
      shares_trunk: whether copies of one network share all but their last stage unless a configuration says
        otherwise.
      needs_trunk, refuses_trunk, refuses_mixed: the reason why it runs only on a shared trunk, never on one,
        or never with different networks; empty where it does not.
    """

    subnetworks: nn.Module
    num_classes: int

    trains: ClassVar[dict[str, str]] = {"loss": ".*"}
    headline: ClassVar[str] = "sub_0"
    fuses: ClassVar[bool] = False
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    views: ClassVar[bool] = False
    averages: ClassVar[tuple[str, ...]] = ()
    num: ClassVar[tuple[int, int | None]] = (2, None)
    shares_trunk: ClassVar[bool] = False
    needs_trunk: ClassVar[str] = ""
    refuses_trunk: ClassVar[str] = ""
    refuses_mixed: ClassVar[str] = ""

    @classmethod
    def recipe(cls, data: str) -> dict[str, Any]:
        """What its published recipe sets otherwise than `configs/common.py`: {configuration key: value}.

        Args:
          data: the configuration file's name: "cifar10", "cifar100", "imagenet", ….

        A comparison on equal terms leaves `epochs`, `batch_size`, `optimizer` and `data` of it out. What the
        method cannot do without (its number of sub-networks, `optimizer_rules`) always holds.
        """
        return {}

    def check(self) -> None:
        """Raises ConfigError where the sub-networks or a hyper-parameter do not suit the method."""
        least, most = self.num
        num, shared = self.subnetworks.num, self.subnetworks.shared_stages
        if isinstance(self.subnetworks, Mixed) and num > 1 and self.refuses_mixed:
            raise ConfigError(
                f"{type(self).__name__} does not mix different networks: {self.refuses_mixed}; name one "
                "after the colon, network=resnet32."
            )
        if num < least or (most is not None and num > most):
            bound = (
                f"at least {least}" if most is None else f"{least}" if least == most else f"{least}..{most}"
            )
            raise ConfigError(
                f"{type(self).__name__} takes {bound} sub-network(s), got {num}: set config.subnetworks.num."
            )
        if not shared and self.needs_trunk:
            raise ConfigError(
                f"{type(self).__name__} needs a shared trunk: {self.needs_trunk}; set "
                "config.subnetworks.shared_stages to 1 or more, got 0."
            )
        if shared and self.refuses_trunk:
            raise ConfigError(
                f"{type(self).__name__} shares no trunk: {self.refuses_trunk}; set "
                f"config.subnetworks.shared_stages=0, got {shared}."
            )
        for key, known in self.choices.items():
            check_choice(f"method.{key}", getattr(self, key), known)

    def __call__(self, images: jax.Array, train: bool) -> dict[str, jax.Array]:
        """Runs every network and module once; here, where there is no module, the sub-networks.

        Args:
          images: [B, H, W, 3], normalised; in training [K, B, H, W, 3] where the method asks for `views`.
          train: use and update batch statistics. Variables are created with False: run every module in both.

        Returns:
          Named arrays: `logits` [K, B, C]; `fused_logits` [B, C] if the method `fuses`; `ensemble_logits`
          [B, C] if the ensemble is not the mean of all `logits`; and whatever the functions below read.
        """
        return {"logits": jnp.stack([peer.logits for peer in self.subnetworks(images, train)])}

    def objectives(
        self, outputs: dict[str, jax.Array], labels: jax.Array, epoch: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Term | jax.Array]]:
        """Pure. Returns ({objective: scalar}, {name: `Term` or scalar}); objectives are the keys of `trains`.

        The second is for the log. What has no kind and no learner may be a bare scalar.

        Args:
          outputs: what `__call__` returned.
          labels: int [B], or `SoftLabels` where the recipe smooths, mixes or weighs them. `cross_entropy`
            takes both; what needs the class asks `losses.classes`.
          epoch: finished epochs, a float scalar: floor it where the source ramps by whole epochs.
        """
        raise NotImplementedError

    def predictions(self, outputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Pure. Returns {prediction: logits [B, C]}; evaluation scores each under its name."""
        logits = outputs["logits"]
        predictions = dict(zip(self.subnetwork_names(), logits, strict=True))
        if len(predictions) > 1:
            predictions["ensemble"] = outputs.get("ensemble_logits", logits.mean(axis=0))
        return predictions | ({"fused": outputs["fused_logits"]} if self.fuses else {})

    def roles(self) -> dict[str, Role]:
        """What each of `predictions` is, in the same order: {prediction: role}."""
        roles = {name: Role(NETWORK, k) for k, name in enumerate(self.subnetwork_names())}
        if len(roles) > 1:
            roles["ensemble"] = Role(ENSEMBLE)
        return roles | ({"fused": Role(FUSED)} if self.fuses else {})

    def subnetwork_names(self) -> tuple[str, ...]:
        """Names of the K sub-networks in order."""
        return tuple(f"sub_{k}" for k in range(self.subnetworks.num))

    def network_names(self) -> tuple[str, ...]:
        """The predictions that are one plain network, which `extract` takes out."""
        return tuple(name for name, role in self.roles().items() if role.kind == NETWORK)

    def extract(self, variables: dict, name: str) -> tuple[Network, dict]:
        """(network, its variables) of one of `network_names`, out of the variables of this method."""
        k = self.roles()[name].network
        joint = {kind: tree["subnetworks"] for kind, tree in variables.items() if "subnetworks" in tree}
        return self.subnetworks.member(k), self.subnetworks.extract(joint, k)

    def after_step(self, params: dict, model_state: dict, step: jax.Array) -> dict:
        """Pure. The model state to keep after a step: for averages of the parameters.

        Args:
          params: after the step.
          model_state: as `__call__` left it.
          step: int scalar, finished steps before this one.
        """
        return model_state

    @property
    def num_views(self) -> int:
        """Views of each image in training; 0 for one that all sub-networks see."""
        return self.subnetworks.num if self.views else 0

    @property
    def uses_validation(self) -> bool:
        """Whether the next two functions are called before every epoch, on the validation split."""
        return False

    def validation_sums(self, outputs: dict, labels: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
        """Pure. Sums over one batch in evaluation mode, to be added up over the validation split.

        Args:
          outputs: what `__call__` returned.
          labels: int [B].
          weights: 1 for an example that counts and 0 for padding, [B].
        """
        raise NotImplementedError

    def validation_state(self, sums: dict[str, jax.Array]) -> dict:
        """Pure. From the whole split's sums, the collections of the model state that it determines."""
        raise NotImplementedError


class OfflineMethod(Method):
    """One student of frozen teachers; `teacher_*` are scored beside it, and so is their mean, if several.

    Its `__call__` returns `teacher_logits`, N times [B, C]: not stacked, so that the cost of one teacher's
    prediction is not that of all.

    Attributes:
      teachers: a `Mixed` of N trained networks, always run with `train=False`.
    """

    teachers: nn.Module | None = None

    headline = "student"
    num = (1, 1)
    refuses_mixed = "it trains one student, and config.teachers.network names the teachers' networks"

    def predictions(self, outputs: dict) -> dict[str, jax.Array]:
        logits = outputs["teacher_logits"]
        teachers = dict(zip(self.teacher_names(), logits, strict=True))
        if len(logits) > 1:
            teachers["teacher_ensemble"] = jnp.stack(logits).mean(axis=0)
        return super().predictions(outputs) | teachers

    def roles(self) -> dict[str, Role]:
        names = self.teacher_names()
        teachers = names if len(names) == 1 else (*names, "teacher_ensemble")
        return super().roles() | dict.fromkeys(teachers, Role(TEACHER))

    def subnetwork_names(self) -> tuple[str, ...]:
        return ("student",)

    def teacher_names(self) -> tuple[str, ...]:
        """Names of the N teachers in order."""
        return tuple(f"teacher_{i}" for i in range(self.teachers.num))  # type: ignore[union-attr]  # set before
