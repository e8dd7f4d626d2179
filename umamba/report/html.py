"""Pieces of HTML for the report; every text that comes from outside is escaped here."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def joined(*parts: Any) -> Markup:
    """Returns the parts one below the other, escaped unless they are markup."""
    return Markup("\n".join(p if isinstance(p, Markup) else escape(str(p)) for p in parts))


def element(name: str, *content: Any, css: str = "", style: str = "") -> Markup:
    """Returns <name class=css style=style>content</name>; content: text or markup."""
    attributes = (f' class="{css}"' if css else "") + (f' style="{style}"' if style else "")
    return Markup(f"<{name}{attributes}>{joined(*content)}</{name}>")


note = partial(element, "p", css="note")
missing = partial(element, "p", css="missing")  # a sentence in place of what is not there


def section(title: str, *content: Any) -> Markup:
    """Returns a card with a heading."""
    return element("section", element("h2", title), *content)


def details(title: str, *content: Any) -> Markup:
    """Returns content that opens on a click."""
    return element("details", element("summary", title), *content)


def dot(colour: str) -> Markup:
    """Returns a small square in the colour of a class."""
    return element("span", css="dot", style=f"background:{colour}")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markup:
    """Returns a table; all columns but the first are right-aligned figures.

    A cell may be a pair (text, share from 0 to 1), which is drawn with a bar behind it.
    """

    def line(tag: str, cells: Sequence[Any]) -> Markup:
        return element("tr", *(_cell(tag, column, cell) for column, cell in enumerate(cells)))

    body = element("tbody", *(line("td", row) for row in rows))
    return element("div", element("table", element("thead", line("th", head)), body), css="wide")


def _cell(tag: str, column: int, content: Any) -> Markup:
    css = "n" if column else ""
    if isinstance(content, tuple):
        shown, share = content
        return element(tag, shown, css=f"{css} bar", style=f"--v:{min(max(share, 0), 1):.3f}")
    return element(tag, content, css=css)


def facts(values: Mapping[str, Any]) -> Markup:
    """Returns a table of names and values, without what is undefined or empty."""
    shown = {name: _in_words(value) for name, value in values.items()}
    rows = [element("tr", element("td", n), element("td", v)) for n, v in shown.items() if v]
    return element("table", element("tbody", *rows), css="facts")


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in spaced(value).items())
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def spaced(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of a JSON file with words for keys: initial_lr -> initial lr."""
    return {key.replace("_", " "): value for key, value in values.items()}


def duration(seconds: float | None) -> str:
    """Returns a time in words: 48 s, 12.3 min, 5.1 h."""
    if seconds is None or seconds < 90:
        return "–" if seconds is None else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def rounded(value: float | None, digits: int = 3) -> str:
    """Returns the value with so many decimals, a dash for an undefined one."""
    return "–" if value is None else f"{value:.{digits}f}"


def by(values: Sequence[float] | None) -> str | None:
    """Returns a size in words: 40 × 56 × 40."""
    return None if values is None else " × ".join(f"{value:g}" for value in values)


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
