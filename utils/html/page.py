"""The frame of a page: elements with everything escaped, tables, style and script inside."""

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

# What a page may use: its own style, script and pictures, nothing from elsewhere.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
_FIGURE = re.compile(r"-?\d|n/a|$")
_VOID = ("meta", "img", "br", "hr", "col")


class Markup(str):
    """Text that is HTML already; all other text is escaped."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | int | float | bool | None) -> Markup:
    """Return an element; `class_` is class, `_` is `-`, None and False leave an attribute out."""
    written = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        text = key if value is True else str(value)
        written += f' {key.rstrip("_").replace("_", "-")}="{html.escape(_clean(text))}"'
    if name in _VOID:
        return Markup(f"<{name}{written} />")
    return Markup(f"<{name}{written}>{joined(children)}</{name}>")


def joined(parts: Iterable[str]) -> Markup:
    """Put parts one after the other, escaped where they are plain text."""
    return Markup("".join(p if isinstance(p, Markup) else html.escape(_clean(p)) for p in parts))


def table(
    head: Sequence[str],
    body: Sequence[Sequence[str]],
    foot: Sequence[Sequence[str]] = (),
    *,
    caption: str,
) -> Markup:
    """Lay out rows whose first cell names them; `foot` stays below whatever the order.

    Columns of words stand on the left, those of figures on the right.
    """
    styles = [
        "text" if any(not _FIGURE.match(row[column]) for row in body) else None
        for column in range(len(head))
    ]
    titles = [
        element("th", text, scope="col", class_=style)
        for text, style in zip(head, styles, strict=True)
    ]
    inner = element(
        "table",
        element("thead", element("tr", *titles)),
        element("tbody", *(_row(cells, styles) for cells in body)),
        element("tfoot", *(_row(cells, styles) for cells in foot)) if foot else "",
        class_="sortable",
    )
    box = element("div", inner, class_="wide", tabindex=0, role="region", aria_label=caption)
    return element("div", element("p", caption, class_="caption"), box)  # does not scroll with it


def facts(pairs: Iterable[tuple[str, str]]) -> Markup:
    """List names and values."""
    rows = [element("div", element("dt", k), element("dd", v)) for k, v in pairs]
    return element("dl", *rows, class_="facts")


def folded(title: str, *content: str, unfolded: bool = False, **attributes: str) -> Markup:
    """Return a part that unfolds on a click."""
    inner = element("div", *content)
    return element("details", element("summary", title), inner, open=unfolded, **attributes)


def slug(text: str) -> str:
    """Return a text as an id without blanks or signs; distinct names of a report stay distinct."""
    return re.sub(r"[^\w]+", lambda found: "-" + "-".join(f"{ord(c):x}" for c in found[0]), text)


def page(title: str, *body: str, script: bool = True) -> str:
    """Return the whole document."""
    here = Path(__file__)
    style = here.with_name("style.css").read_text(encoding="utf-8")
    code = here.with_name("script.js").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup("\n" + style)),
    )
    main = element("main", *body)
    end = element("script", Markup("\n" + code)) if script else ""
    return f"<!DOCTYPE html>\n{element('html', head, element('body', main, end), lang='en')}\n"


def _row(cells: Sequence[str], styles: Sequence[str | None]) -> Markup:
    named = element("th", cells[0], scope="row")
    rest = zip(cells[1:], styles[1:], strict=True)
    return element("tr", named, *(element("td", cell, class_=style) for cell, style in rest))


def _clean(text: str) -> str:
    """Replace what no document may hold: control characters, halves of surrogate pairs."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
