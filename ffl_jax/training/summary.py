"""`summary.json`: what a run says of itself when it ends, and several seeds together."""

from ffl_jax.training import config as config_lib
from ffl_jax.training import confusion, cost, metrics
from ffl_jax.training.experiment import Experiment, versions


class Costs:
    """What the runs of one training cost, each seed the same; counted once, when it is asked for.

    Attributes:
      predictions: {prediction: {"parameters", "flops"}}.
    """

    def __init__(self, experiment: Experiment):
        self._experiment, self._step_flops = experiment, None
        variables = experiment.abstract_state().variables
        self.predictions = cost.prediction_costs(experiment.method, variables, experiment.image_shape)

    def step_flops(self) -> float | None:
        """Of one training step; to trace it takes a second or two."""
        self._step_flops = self._step_flops or cost.training_flops(self._experiment)
        return self._step_flops


def of_run(run, costs: Costs, status: str, step: int, speeds: dict, device: str) -> dict:
    """The summary of one seed.

    Args:
      run: a `runs.Run`.
      costs: of the training.
      status, step, device: as they are written.
      speeds: `images_per_second` of training, and `start_seconds` until its first step, where they are known.
    """
    experiment, config = run.experiment, run.experiment.config
    test = run.scores.get("test", {})
    scores, diversity = test.get("predictions", {}), test.get("diversity")
    names = config_lib.network_names(config)
    flops = costs.step_flops() if status == "completed" else None
    return {
        "status": status,
        "step": step,
        "epoch": step / experiment.steps_per_epoch,
        "seed": config.seed,
        "method": config.method.name,
        "networks": names,
        "dataset": config_lib.dataset_title(config),
        "predictors": {name: scores.get(name, {}) | one for name, one in costs.predictions.items()},
        "roles": {
            name: {"kind": role.kind, "network": None if role.network is None else names[role.network]}
            for name, role in experiment.method.roles().items()
        },
        "deploy": experiment.method.headline,
        "best": run.best,
        "balanced_accuracy": test.get("classes", {}).get("balanced_accuracy", {}),
        "per_class": _per_class(experiment, test.get("classes")),
        "reliability": test.get("reliability", {}),
        "diversity": {"pairs": diversity, **metrics.pair_means(diversity)} if diversity else {},
        "training": {
            "seconds": run.seconds,
            "flops": flops and step * flops,
            "start_seconds": speeds.get("start_seconds"),
        },
        "fingerprint": experiment.dataset.fingerprint,
        "images_per_second": speeds.get("images_per_second"),
        "device": device,
        "versions": versions(),
    }


def _per_class(experiment, classes):
    # A checkpoint of an earlier version has no counts.
    names, prediction = experiment.dataset.class_names, experiment.method.headline
    return confusion.per_class(classes, names, prediction) if classes else {}


def repeats(stored: dict, run, step: int) -> bool:
    """Whether `stored` is what `of_run` gave of a completed run, as far as the run's checkpoint tells."""
    test = run.scores.get("test", {})
    scores = test.get("predictions", {})
    known = {"status": "completed", "step": step, "seed": run.experiment.config.seed, "best": run.best}
    there = {*known, "predictors", "reliability", "diversity", "training", "images_per_second", "deploy"}
    there |= {"balanced_accuracy", "per_class"} if "classes" in test else set()
    predictors = stored.get("predictors")
    return (
        stored.keys() >= there
        and all(stored[key] == value for key, value in known.items())
        and isinstance(predictors, dict)
        and all(
            isinstance(one, dict) and {"parameters", "flops"} <= one.keys() for one in predictors.values()
        )
        and all(predictors.get(name, {}).items() >= one.items() for name, one in scores.items())
    )


def joint(summaries: list[dict]) -> dict:
    """One summary of several seeds: what differs between them, and every score, is a list over seeds."""
    first = summaries[0]
    if len(summaries) == 1:
        return first
    predictors = {
        name: {key: [one["predictors"][name].get(key) for one in summaries] for key in values}
        for name, values in first["predictors"].items()
    }
    differing = ("seed", "best", "balanced_accuracy", "per_class", "reliability", "diversity", "training")
    lists = {key: [one.get(key) for one in summaries] for key in differing if key in first}
    return {**first, **lists, "predictors": predictors}
