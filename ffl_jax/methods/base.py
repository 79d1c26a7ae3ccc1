"""The interface of a method of online distillation."""

from typing import ClassVar

import flax.linen as nn
import jax

from ffl_jax.registry import Registry

METHODS = Registry("method")


class Method(nn.Module):
    """Networks, modules and losses of one method.

    Fields beside these are its hyper-parameters, with the paper's defaults. A method never sees an optimiser,
    a device, a checkpoint or a loop, and none of these knows which method runs.

    Attributes:
      subnetworks: `Stacked` or `Mixed`, a method never asks which; calling it gives K `NetworkOutputs`.
      num_classes: C.
      trains: objective -> regex over "/"-joined parameter paths. Its gradient moves only the paths that it
        matches in full; a path that no objective matches is frozen.
      headline: the prediction that is reported first and shipped by default (`deploy` in `summary.json`).
    """

    subnetworks: nn.Module
    num_classes: int

    trains: ClassVar[dict[str, str]] = {"loss": ".*"}
    headline: ClassVar[str] = "sub_0"

    def __call__(self, images: jax.Array, train: bool) -> dict[str, jax.Array]:
        """Runs every network and module once.

        Args:
          images: [B, H, W, 3], normalised.
          train: use and update batch statistics. Variables are created with False: run every module in both.

        Returns:
          Named arrays: `logits` [K, B, C] and whatever the functions below read.
        """
        raise NotImplementedError

    def objectives(
        self, outputs: dict[str, jax.Array], labels: jax.Array, epoch: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Pure. Returns ({objective: scalar}, {term: scalar to log}); objectives are the keys of `trains`.

        Args:
          outputs: what `__call__` returned.
          labels: int [B].
          epoch: finished epochs, a float scalar: floor it where the source ramps by whole epochs.
        """
        raise NotImplementedError

    def predictions(self, outputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Pure. Returns {prediction: logits [B, C]}; evaluation scores each under its name."""
        logits = outputs["logits"]
        return dict(zip(self.subnetwork_names(), logits, strict=True)) | {"ensemble": logits.mean(axis=0)}

    def subnetwork_names(self) -> tuple[str, ...]:
        """Names of the K sub-networks in order; each can be taken out as a plain network."""
        return tuple(f"sub_{k}" for k in range(self.subnetworks.num))
