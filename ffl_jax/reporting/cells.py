"""Cells of text with the number to sort by, tables of them, and how numbers are written."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ffl_jax.reporting.statistics import Spread

NONE = "–"
_LONGEST = 200  # letters of a name


@dataclass(frozen=True)
class Cell:
    """What stands in a table, and what the column is sorted by (the text where None)."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head.

    Attributes:
      title, caption: above it, and what its columns mean.
      columns: the names; those of `numeric` stand to the right.
      left_out: columns in which no row has anything.
    """

    title: str
    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    left_out: list[str] = field(default_factory=list)

    @property
    def numeric(self) -> list[bool]:
        return [any(row[i].value is not None for row in self.rows) for i in range(len(self.columns))]


def without_empty(title: str, caption: str, rows: list[dict[str, Cell]]) -> Table:
    """A table of rows {column: cell}, without the columns in which no row has anything."""
    empty = [column for column in rows[0] if all(row[column].text == NONE for row in rows)]
    columns = [column for column in rows[0] if column not in empty]
    return Table(title, caption, columns, [[row[column] for column in columns] for row in rows], empty)


def percent(one: Spread | None) -> Cell:
    """0..1 as percent, two digits: "58.13 ± 0.95"; without a deviation for one run."""
    return plain(one, 2, 100)


def plain(one: Spread | None, digits: int, factor: float = 1) -> Cell:
    """Mean and deviation times `factor`, so many digits after the point."""
    if one is None:
        return Cell(NONE)
    std = f" ± {factor * one.std:.{digits}f}" if one.std is not None else ""
    return Cell(f"{factor * one.mean:.{digits}f}{std}", factor * one.mean)


def amount(value: float | None, form: Callable[[float], str]) -> Cell:
    """A number as `form` writes it."""
    if value is None:
        return Cell(NONE)
    return Cell(form(value) if math.isfinite(value) else str(value), value)


def scaled(value: float) -> str:
    """23514410 -> "23.5 M"."""
    power = min(max(int(math.log10(value)) // 3, 0), 7) if 0 < value < math.inf else 0
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z')[power]}".strip()


def duration(seconds: float) -> str:
    """5025 -> "1 h 24 min"; days are hours too."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def line(text: str) -> str:
    """Text as it can stand in a line of a table."""
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown."""
    lines = [table.columns, ["---:" if numeric else "---" for numeric in table.numeric]]
    lines += [[escape(cell.text) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape(text: str) -> str:
    """Text that Markdown shows as it is; underscores inside words need nothing."""
    for character in "\\|*<`":
        text = text.replace(character, f"\\{character}")
    return text
