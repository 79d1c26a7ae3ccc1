"""The report as Markdown with figures beside it, and as one HTML page that holds them."""

import base64
import re
from importlib import resources

import jinja2
from markupsafe import Markup, escape

from ffl_jax import __version__
from ffl_jax.reporting import cells, tables


def markdown(sections, warnings: list[str], sources: tables.Sources) -> str:
    """`report.md`: figures are linked by their file names."""
    environment = _environment(autoescape=False)
    environment.filters |= {"table": cells.markdown, "prose": _prose, "plain": cells.escape}
    return _render(environment, "report.md.jinja", sections, warnings, sources)


def html(sections, warnings: list[str], sources: tables.Sources) -> str:
    """`index.html`: it asks for no other file, and nothing of the network."""
    environment = _environment(autoescape=True)
    environment.filters |= {"data_uri": _data_uri, "code": _code}
    return _render(environment, "page.html.jinja", sections, warnings, sources)


def _environment(autoescape):
    return jinja2.Environment(
        autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )


def _render(environment, name, sections, warnings, sources):
    template = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    quoted = sorted(sources.numbers, key=sources.numbers.get)
    return environment.from_string(template).render(
        sections=sections, warnings=warnings, sources=quoted, version=__version__
    )


def _prose(text: str) -> str:
    """Text in which backticks mark code, for Markdown."""
    parts = text.split("`")
    return "`".join(part if i % 2 else cells.escape(part) for i, part in enumerate(parts))


def _code(text: str) -> Markup:
    """Text in which backticks mark code, for HTML."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _data_uri(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"
