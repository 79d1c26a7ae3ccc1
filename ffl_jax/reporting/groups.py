"""Rows of the tables: the runs of one method with the same networks on the same dataset, over their seeds."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ffl_jax.methods.base import ENSEMBLE, FUSED, NETWORK, TEACHER
from ffl_jax.reporting.runs import FinishedRun, Unusable
from ffl_jax.reporting.statistics import Difference, Spread, paired_difference, spread
from ffl_jax.workdir.log import over_stretches

BASELINE = "independent"
_RANKS = {NETWORK: 0, ENSEMBLE: 1, FUSED: 1, TEACHER: 2}


@dataclass(frozen=True, eq=False)  # a group is one only with itself, and can be a key
class Group:
    """Runs that differ in their seeds.

    Attributes:
      dataset, method, networks: what they share.
      runs: in the order of the seeds, at least one.
      unusable: those of the same group that did not finish.
    """

    dataset: str
    method: str
    networks: tuple[str, ...]
    runs: tuple[FinishedRun, ...]
    unusable: tuple[Unusable, ...] = ()

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def shipped(self) -> str:
        return self.runs[0].shipped

    @property
    def shipped_network(self) -> str:
        """The form of the network that is shipped; of what several make together, the first of them."""
        return self.runs[0].roles[self.shipped]["network"] or self.networks[0]

    @property
    def predictions(self) -> list[str]:
        """Those that all runs have: the shipped one, plain networks, what several make together, teachers."""
        names = [name for name in self.runs[0].predictors if all(name in run.predictors for run in self.runs)]
        return sorted(names, key=lambda name: (name != self.shipped, _RANKS[self.kind(name)]))

    def kind(self, prediction: str) -> str:
        """NETWORK, ENSEMBLE, FUSED or TEACHER of `methods.base`."""
        return self.runs[0].roles[prediction]["kind"]

    def of_kind(self, kind: str) -> list[str]:
        """The `predictions` of a kind, the one that stands for them first."""
        names = self.predictions
        return [name for name in self.runs[0].roles if name in names and self.kind(name) == kind]

    def scores(self, prediction: str, key: str) -> list[float | None]:
        """One score (`top1`, …) or cost of every run at the last epoch; None where it is missing."""
        return [_number(run.predictors.get(prediction, {}).get(key)) for run in self.runs]

    def best_scores(self, prediction: str, key: str = "top1") -> list[float | None]:
        """The same at the epoch that the validation split chose; None without one."""
        return self.value("best", "predictors", prediction, key)

    def value(self, *keys: str) -> list[float | None]:
        """One number of every run's summary, as `value("training", "flops")`; None where it is missing."""
        values = [run.summary for run in self.runs]
        for key in keys:
            values = [value.get(key) if isinstance(value, dict) else None for value in values]
        return [_number(value) for value in values]

    def spread(self, prediction: str, key: str) -> Spread | None:
        return spread(self.scores(prediction, key))

    @property
    def top1(self) -> float:
        """Mean test top-1 of what is shipped at the last epoch, 0..1."""
        return self.spread(self.shipped, "top1").mean

    def curve(self, split: str, key: str, factor=1.0) -> tuple[np.ndarray, np.ndarray] | None:
        """How a scalar of `metrics.jsonl`, times `factor`, went over the epochs that all runs have.

        Returns:
          (epochs [N], values [runs, N]), or None where a run lacks it or no epoch is common.
        """
        lines = [
            {
                row["epoch"]: factor * row[key]
                for row in over_stretches(run.metrics)
                if row["split"] == split and _number(row.get(key)) is not None
            }
            for run in self.runs
        ]
        epochs = sorted(set.intersection(*(set(line) for line in lines)))
        if not epochs:
            return None
        return np.array(epochs), np.array([[line[epoch] for epoch in epochs] for line in lines])


def group(runs: Sequence[FinishedRun], unusable: Sequence[Unusable]) -> dict[str, list[Group]]:
    """Dataset -> its groups: by shipped network, the best mean top-1 first.

    Datasets that have one name, but are not the same, are told apart by their fingerprints.
    """
    prints = defaultdict(set)
    for run in runs:  # a fingerprint is of the carving too
        prints[run.dataset, _carved(run)].add(run.summary.get("fingerprint"))
    mixed = {dataset for (dataset, _), found in prints.items() if len(found - {None}) > 1}
    members, lost = defaultdict(list), defaultdict(list)
    for run in runs:
        told = f" ({run.summary.get('fingerprint', 'unknown')[:12]})" if run.dataset in mixed else ""
        members[run.dataset + told, run.method, run.networks].append(run)
    for one in unusable:
        if one.identity:
            lost[one.identity[:3]].append(one)
    groups = defaultdict(list)
    for key, together in members.items():
        ordered = tuple(sorted(together, key=lambda run: run.seed))
        groups[key[0]].append(Group(*key, ordered, tuple(lost[key])))
    return {
        dataset: sorted(groups[dataset], key=lambda one: (one.shipped_network, -one.top1))
        for dataset in sorted(groups)
    }


def baseline(one: Group, groups: Sequence[Group]) -> Group | None:
    """The independent training that a group is measured against.

    Networks that are trained alone do not know of one another, so that any independent group will do that
    ships the same network; one of the very same networks is preferred.
    """
    if one.method == BASELINE:
        return None
    fitting = [
        other
        for other in groups
        if other.method == BASELINE
        and other.shipped_network == one.shipped_network
        and other.shipped in other.predictions
    ]
    return min(fitting, key=lambda other: (other.networks != one.networks, other.networks), default=None)


def difference(one: Group, other: Group) -> Difference | None:
    """Top-1 of what a group ships less that of independent training, 0..1, seed by seed."""
    ours, theirs = (dict(zip(x.seeds, x.scores(x.shipped, "top1"), strict=True)) for x in (one, other))
    return paired_difference(ours, theirs)


def _carved(run: FinishedRun) -> str:
    data = run.config.get("data")
    if not isinstance(data, dict):
        return "None"
    # A run of an earlier version does not have the second.
    return str((data.get("validation_examples"), data.get("validation_fraction") or 0.0))


def _number(value) -> float | None:
    return value if isinstance(value, int | float) else None
