"""Pieces of HTML for the report; every text that comes from outside is escaped here."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: Any) -> Markup:
    """Returns the value as HTML, escaped unless it is markup."""
    return value if isinstance(value, Markup) else Markup(escape(str(value)))


def element(name: str, content: Any, css: str = "", style: str = "") -> Markup:
    """Returns <name class=css style=style>content</name>."""
    attributes = f' class="{escape(css)}"' if css else ""
    attributes += f' style="{escape(style)}"' if style else ""
    return Markup(f"<{name}{attributes}>{text(content)}</{name}>")


def joined(parts: Iterable[Any]) -> Markup:
    """Returns the parts one after the other."""
    return Markup("\n".join(text(part) for part in parts))


def section(title: str, *content: Any) -> Markup:
    """Returns a card with a heading."""
    return element("section", joined([element("h2", title), *content]))


def details(title: str, *content: Any) -> Markup:
    """Returns content that opens on a click."""
    return element("details", joined([element("summary", title), *content]))


def note(content: Any) -> Markup:
    """Returns a small explanation."""
    return element("p", content, "note")


def missing(content: Any) -> Markup:
    """Returns a sentence in place of what is not there."""
    return element("p", content, "missing")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], first_number: int = 1) -> Markup:
    """Returns a table; columns from `first_number` on are right-aligned figures.

    A cell may be a pair (text, share from 0 to 1), which is drawn with a bar behind it.
    """
    body = []
    for row in rows:
        cells = []
        for column, cell in enumerate(row):
            css = "n" if column >= first_number else ""
            if isinstance(cell, tuple):
                share = min(max(float(cell[1]), 0.0), 1.0)
                cells.append(element("td", cell[0], f"{css} bar", f"--v:{share:.3f}"))
            else:
                cells.append(element("td", cell, css))
        body.append(element("tr", joined(cells)))
    titles = [element("th", h, "n" if i >= first_number else "") for i, h in enumerate(head)]
    inner = joined(
        [element("thead", element("tr", joined(titles))), element("tbody", joined(body))]
    )
    return element("div", element("table", inner), "wide")


def facts(values: Mapping[str, Any]) -> Markup:
    """Returns a table of names and values, without what is None or empty."""
    rows = [
        element("tr", joined([element("td", name), element("td", value)]))
        for name, value in values.items()
        if value is not None and value != ""
    ]
    return element("table", element("tbody", joined(rows)), "facts")


def tile(name: str, value: str, more: str = "") -> Markup:
    """Returns a large figure with its name."""
    parts = [element("span", value, "value"), element("span", name, "name")]
    return element(
        "div", joined([*parts, *([element("span", more, "more")] if more else [])]), "tile"
    )


def dot(colour: str) -> Markup:
    """Returns a small square in the colour of a class."""
    return element("span", "", "dot", f"background:{colour}")


def png(content: bytes, description: str) -> Markup:
    """Returns an image that carries its content."""
    data = base64.b64encode(content).decode("ascii")
    return Markup(f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">')


def document(title: str, body: Markup) -> str:
    """Returns the whole page with its style; nothing in it is loaded from elsewhere."""
    style = (Path(__file__).parent / "static" / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
