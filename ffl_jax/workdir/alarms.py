"""What looks wrong in a run that still trains: told in a line of the log, for a person to judge."""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ffl_jax.workdir.log import over_stretches

_RISES = 3  # epochs in a row


def identical(names: tuple[str, ...], diversity: dict[str, list]) -> dict[str, str]:
    """Pairs of sub-networks that have become one, so that neither can teach the other: {key: sentence}.

    Args: names: of the K sub-networks. diversity: `metrics.diversity_scores` over a split, or {}.
    """
    found = {}
    scores = {name: np.asarray(matrix) for name, matrix in diversity.items()}
    for i in range(len(names) if scores else 0):
        for j in range(i + 1, len(names)):
            disagreement, kl, cka = (scores[name][i, j] for name in ("disagreement", "kl", "cka"))
            if disagreement == 0 and kl < 1e-6 and cka > 1 - 1e-4:
                found[f"identical {names[i]} {names[j]}"] = (
                    f"{names[i]} and {names[j]} have become identical: they name the same class for every "
                    f"test image, and KL is {kl:.1e} nats; do they start from the same parameters and see "
                    "the same views?"
                )
    return found


def growing(rows: Sequence[dict], num_classes: int, knowledge: Sequence[str]) -> dict[str, str]:
    """Divergences that have risen for three epochs and passed all reason: {key: sentence}.

    The reason ends at 3 ln C nats: a network that knows nothing of C classes is at most ln C away from its
    teacher. Looked at are the training's terms of distillation and the divergence between sub-networks.

    Args:
      rows: of `metrics.jsonl`.
      num_classes: C.
      knowledge: the training's terms that say how far a network is from its teachers.
    """
    found, bound = {}, 3 * math.log(num_classes)
    for split, name in (*(("train", name) for name in knowledge), ("test", "diversity/kl")):
        by_epoch = defaultdict(list)
        for row in over_stretches(rows):
            if row["split"] == split and name in row:
                by_epoch[math.ceil(row["epoch"])].append(row[name])
        means = [float(np.mean(by_epoch[epoch])) for epoch in sorted(by_epoch)][-_RISES - 1 :]
        if len(means) > _RISES and means == sorted(set(means)) and means[-1] > bound:
            found[f"growing {name}"] = (
                f"{name} grows without bound, in the last epochs {', '.join(f'{x:.2f}' for x in means)}: "
                "lower the weight of distillation, or the learning rate, or lengthen the ramp."
            )
    return found
