"""Figures that others published, to stand beside ours: `published.csv`, and who says so: `sources.csv`."""

import csv
import functools
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Source:
    """Where figures come from: a short name, the full citation, an address, and how they were quoted."""

    key: str
    name: str
    citation: str
    url: str
    remark: str


@dataclass(frozen=True)
class Figure:
    """One published test accuracy.

    Attributes:
      dataset, network, method: by our names.
      same_network: whether the source's network has as many parameters as ours of that name; None where its
        code is not known. Only what is True compares.
      prediction: `network` (one plain network), `ensemble`, or `unknown`.
      top1, std: in percent; std is None where none was given.
      runs, epochs: None where unknown.
      selection: `last` or `best` epoch (by the test split), or `unknown`.
      source: of `sources()`.
      second_hand: it was read in another place than where it was first published.
      note: what differs from our network or recipe, or was not said.
    """

    dataset: str
    network: str
    same_network: bool | None
    method: str
    prediction: str
    top1: float
    std: float | None
    runs: int | None
    epochs: int | None
    selection: str
    source: Source
    second_hand: bool
    note: str

    @property
    def text(self) -> str:
        """ "72.18 ± 0.11", in percent."""
        return f"{self.top1:.2f}" + (f" ± {self.std:.2f}" if self.std is not None else "")


def lookup(dataset: str, network: str, method: str) -> list[Figure]:
    """The figures of a method with a network on a dataset, last those whose network may be another one."""
    key = (dataset, network, method)
    found = [one for one in _figures() if (one.dataset, one.network, one.method) == key]
    return sorted(found, key=lambda one: not one.same_network)


@functools.cache
def sources() -> dict[str, Source]:
    """Key -> source."""
    return {row["key"]: Source(**row) for row in _rows("sources.csv")}


# What is known of a source's network -> (whether it is ours, what to say).
_NETWORKS = {
    "yes": (True, ""),
    "no": (False, "another network of this name"),
    "": (None, "not known to be this very network"),
}


@functools.cache
def _figures() -> list[Figure]:
    return [
        Figure(
            *(row["dataset"], row["network"], _NETWORKS[row["same_network"]][0]),
            *(row["method"], row["predictor"]),
            float(row["top1"]),
            float(row["std"]) if row["std"] else None,
            int(row["runs"]) if row["runs"] else None,
            int(row["epochs"]) if row["epochs"] else None,
            row["selection"],
            sources()[row["source"]],
            row["second_hand"] == "yes",
            "; ".join(filter(None, (_NETWORKS[row["same_network"]][1], row["note"]))),
        )
        for row in _rows("published.csv")
    ]


def _rows(name):
    with resources.files(__package__).joinpath(name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
