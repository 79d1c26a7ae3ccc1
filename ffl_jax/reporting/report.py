"""The report: everything is made first and written then, so that a failure leaves nothing half done."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ffl_jax.errors import ConfigError
from ffl_jax.reporting import cells, comparability, figures, groups, page, results, runs, tables
from ffl_jax.workdir import outputs


@dataclass(frozen=True)
class Section:
    """One dataset: what to know, tables, and figures.

    Attributes:
      dataset: its name.
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
    warnings = [f"`{one.folder}`: {one.reason}; left out." for one in unusable if one not in placed]
    if damaged:
        first = [f"`{folder}` ({what})" for folder, what in list(damaged.items())[:5]]
        more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
        warnings.append(f"Curves lack something of {', '.join(first)}{more}.")
    sources = tables.Sources()
    sections = [_section(dataset, members, sources) for dataset, members in datasets.items()]
    files = {
        "report.md": page.markdown(sections, warnings, sources).encode(),
        "results.csv": results.text(datasets).encode(),
        "index.html": page.html(sections, warnings, sources).encode(),
    }
    files |= {f"{one.name}.png": one.light for section in sections for one in section.pictures}
    output.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        outputs.write_bytes(output / name, data)
    return [output / name for name in files]


def _section(dataset: str, members: list[groups.Group], sources: tables.Sources) -> Section:
    logging.info("drawing %s: %d rows …", dataset, len(members))
    warnings, notes = comparability.check(members)
    shown = [
        tables.accuracy(members, sources),
        tables.predictions(members),
        tables.cost(members),
        tables.beside_published(members, sources),
    ]
    pictures, missing = figures.draw(members, re.sub(r"[^A-Za-z0-9_-]", "_", dataset))
    return Section(
        dataset,
        _headline(members),
        comparability.common(members),
        warnings,
        notes,
        list(filter(None, shown)),
        pictures,
        missing,
    )


def _headline(members: list[groups.Group]) -> str:
    """How many runs there are, who is first, and whom the intervals set apart from independent training."""
    num_runs = sum(len(member.runs) for member in members)
    text = (
        f"{num_runs} run{'s' if num_runs > 1 else ''} in {len(members)} row{'s' if len(members) > 1 else ''}."
    )
    if len(members) > 1:
        first = max(members, key=lambda member: member.top1)
        shipped = cells.percent(first.spread(first.shipped, "top1")).text
        text += f" First by what it ships: {comparability.name(first, members)}, {shipped} %."
    above, below, unclear = [], [], []
    for member in members:
        reference = groups.baseline(member, members)
        one = groups.difference(member, reference) if reference else None
        if one and one.low is not None:
            place = above if one.low > 0 else below if one.high < 0 else unclear
            place.append(comparability.name(member, members))
    if above or below or unclear:
        text += (
            f" Against independent training, by the 95 % interval: above: {', '.join(above) or 'none'}; "
            f"below: {', '.join(below) or 'none'}; not told apart: {', '.join(unclear) or 'none'}."
        )
    return text
