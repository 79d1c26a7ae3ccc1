"""The report: everything is made first and written then, so that a failure leaves nothing half done."""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ffl_jax.errors import ConfigError
from ffl_jax.reporting import (
    by_class,
    cells,
    comparability,
    confusion,
    figures,
    groups,
    page,
    results,
    runs,
    tables,
)
from ffl_jax.workdir import files


@dataclass(frozen=True)
class Section:
    """One dataset: what to know, tables, and figures.

    Attributes:
      headline: a sentence or two on what the tables say.
      common: settings that all runs share, or "".
      warnings, notes: of `comparability`.
      tables, pictures: in the order in which they are shown.
      missing: figures that could not be drawn, and why.
    """

    dataset: str
    headline: str
    common: str
    warnings: list[str]
    notes: list[str]
    tables: list[cells.Table]
    pictures: list[figures.Picture]
    missing: list[str]


def write(folders: Sequence[str], output: Path) -> list[Path]:
    """Compares the runs in some folders and writes `report.md`, `index.html`, `results.csv` and PNG figures.

    Args:
      folders: of runs, or folders that hold such; see `runs.read`.
      output: the folder to write to; it is made, and files of these names in it are replaced.

    Returns:
      The files.

    Raises:
      ConfigError: there is no finished run, two runs have one place, or `output` is no folder.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output={output} is a file: give a folder.")
    finished, unusable, damaged = runs.read(folders)
    logging.info("%d finished runs, %d that cannot be used.", len(finished), len(unusable))
    datasets = groups.group(finished, unusable)
    placed = [one for members in datasets.values() for member in members for one in member.unusable]
    warnings = [
        f"`{runs.shown(one.folder)}`: {one.reason}; left out." for one in unusable if one not in placed
    ]
    if damaged:
        first = [f"`{runs.shown(folder)}` ({what})" for folder, what in list(damaged.items())[:5]]
        more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
        warnings.append(f"Curves lack something of {', '.join(first)}{more}.")
    sources = tables.Sources()
    names = _file_names(datasets)
    sections = [_section(dataset, members, sources, names[dataset]) for dataset, members in datasets.items()]
    written = {
        "report.md": page.markdown(sections, warnings, sources).encode(),
        "results.csv": results.text(datasets).encode(),
        "index.html": page.html(sections, warnings, sources).encode(),
    }
    written |= {f"{one.name}.png": one.light for section in sections for one in section.pictures}
    output.mkdir(parents=True, exist_ok=True)
    for name, data in written.items():
        files.write_bytes(output / name, data)
    return [output / name for name in written]


def _file_names(datasets: Iterable[str]) -> dict[str, str]:
    """What the pictures of each dataset begin with: letters and digits, no two alike to any file system."""
    names = {}
    for dataset in datasets:
        name = re.sub(r"[^A-Za-z0-9_-]", "_", dataset)[:64]
        while name.lower() in (other.lower() for other in names.values()):
            name += "_"
        names[dataset] = name
    return names


def _section(dataset: str, members: list[groups.Group], sources: tables.Sources, prefix: str) -> Section:
    logging.info("drawing %s: %d rows …", dataset, len(members))
    warnings, notes = comparability.check(members)
    confusions = by_class.confusions(members)
    shown = [
        tables.accuracy(members, sources),
        tables.predictions(members),
        by_class.table(members, confusions),
        tables.cost(members),
        tables.beside_published(members, sources),
    ]
    pictures, missing = figures.draw(members, prefix)
    picture, lacking = confusion.draw(confusions, prefix)
    pictures, missing = [*pictures, *picture], [*missing, *lacking]
    headline, common = _headline(members), comparability.common(members)
    return Section(dataset, headline, common, warnings, notes, list(filter(None, shown)), pictures, missing)


def _headline(members: list[groups.Group]) -> str:
    """How many runs there are, who is first, and whom the intervals set apart from independent training."""
    num_runs, num_rows = sum(len(member.runs) for member in members), len(members)
    text = f"{num_runs} run{'s' if num_runs > 1 else ''} in {num_rows} row{'s' if num_rows > 1 else ''}."
    if len(members) > 1:
        first = max(members, key=lambda member: member.top1)
        shipped = cells.percent(first.spread(first.shipped, "top1")).text
        text += f" First by what it ships: {comparability.name(first, members)}, {shipped} %."
    found = {"above": [], "below": [], "not told apart": []}
    for member in members:
        reference = groups.baseline(member, members)
        one = reference and groups.difference(member, reference)
        if one and one.low is not None:
            place = "above" if one.low > 0 else "below" if one.high < 0 else "not told apart"
            found[place].append(comparability.name(member, members))
    if any(found.values()):
        parts = "; ".join(f"{place}: {', '.join(names) or 'none'}" for place, names in found.items())
        text += f" Against independent training, by the 95 % interval: {parts}."
    return text
