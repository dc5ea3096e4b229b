"""HTML pages in one file: no script, nothing loaded from outside, light and dark.

    summary = badge("finished", "good") + cards([("step", "600 of 600", "")])
    sections = {"Curves": figures([figure(svg, "svg+xml", "loss by step")])}
    text = page("my run", sections, summary)

Functions return HTML. Text, captions and cells are escaped; only arguments named `content`,
`sections` and `summary` are HTML already, as returned by these functions.
"""

import base64
import html
from collections.abc import Collection, Iterable, Mapping
from typing import Any

BADGES = ("good", "busy", "bad", "idle")  # green, blue, red, gray
# The browser enforces it: images from data: URLs and the page's own style, nothing else.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --back: #f6f8fa; --panel: #fff; --text: #1f2328; --soft: #59636e;
  --line: #d1d9e0; --mark: #fff8c5; --good: #1a7f37; --busy: #0969da; --bad: #cf222e;
  --idle: #59636e }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --panel: #161b22; --text: #e6edf3;
  --soft: #9198a1; --line: #30363d; --mark: #3a3014; --good: #3fb950; --busy: #58a6ff;
  --bad: #ff7b72; --idle: #9198a1 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; margin: 0 auto;
  max-width: 1280px; padding: 1.5em 1.25em 4em; background: var(--back); color: var(--text) }
h1 { font-size: 1.7em; line-height: 1.25; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.25em; margin: 2em 0 0.6em; padding-bottom: 0.25em;
  border-bottom: 1px solid var(--line) }
h3 { font-size: 1em; margin: 1.4em 0 0.5em; overflow-wrap: anywhere }
p { margin: 0.5em 0 }
.note { color: var(--soft); overflow-wrap: anywhere }
.badge { display: inline-block; border: 1px solid; border-radius: 1em; padding: 0.1em 0.75em;
  margin: 0.6em 0 0.2em; font-weight: 600; font-size: 0.9em }
.good { color: var(--good) } .busy { color: var(--busy) }
.bad { color: var(--bad) } .idle { color: var(--idle) }
.cards { display: grid; gap: 0.7em; margin: 1em 0;
  grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)) }
.card, figure, .table, pre { background: var(--panel); border: 1px solid var(--line);
  border-radius: 8px }
.card { padding: 0.6em 0.85em; overflow-wrap: anywhere }
.card b { display: block; font-size: 1.3em; font-weight: 600; line-height: 1.35;
  font-variant-numeric: tabular-nums }
.card span { display: block; color: var(--soft); font-size: 0.82em; line-height: 1.35 }
.figures { display: grid; gap: 0.8em; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 370px), 1fr)) }
figure { margin: 0 0 0.8em; padding: 0.5em }
.figures figure { margin: 0 }
figure img { max-width: 100%; max-height: 900px; vertical-align: middle }
.figures img { width: 100% }
figcaption { color: var(--soft); font-size: 0.85em; padding: 0.3em 0.3em 0;
  overflow-wrap: anywhere }
.table { display: inline-block; max-width: 100%; overflow-x: auto; margin: 0.2em 0 }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: 0.3em 0.8em; text-align: left; white-space: nowrap; vertical-align: top;
  border-top: 1px solid var(--line) }
tr:first-child th { border-top: 0; color: var(--soft); font-weight: 600 }
.n { text-align: right; font-variant-numeric: tabular-nums }
td.long { white-space: normal; min-width: 16em; overflow-wrap: anywhere }
tr.mark td { background: var(--mark) }
details { margin: 0.5em 0 } summary { cursor: pointer; font-weight: 600 }
details > :not(summary) { margin-top: 0.6em }
pre { padding: 0.8em; overflow-x: auto; font-size: 12px; line-height: 1.45 }
.swatch { display: inline-block; width: 1.6em; height: 0.25em; margin: 0 0.4em 0.25em 0;
  border-radius: 2px; background: var(--light) }
@media (prefers-color-scheme: dark) { .swatch { background: var(--dark) } }
.legend span { margin-right: 1.4em; white-space: nowrap }
@media print { body { max-width: none } figure, .card { break-inside: avoid } }
"""
MAX_SHORT = 60  # characters of a cell on one line


class Number(str):
    """A formatted number: its cell is right-aligned like those of floats and ints."""


def percent(value: float, digits: int = 1) -> str:
    """ "61.3 %" of 61.3, which a line break does not split."""
    return f"{value:.{digits}f}\u00a0%"


def note(text: str) -> str:
    """A paragraph in a faint color."""
    return f'<p class="note">{html.escape(text)}</p>'


def heading(text: str) -> str:
    """The heading of a part of a section."""
    return f"<h3>{html.escape(text)}</h3>"


def badge(text: str, kind: str) -> str:
    """A short colored text; kind: one of BADGES."""
    return f'<span class="badge {kind}">{html.escape(text)}</span>'


def cards(numbers: Iterable[tuple[str, str, str]]) -> str:
    """A grid of (label, value, comment)."""
    divs = (
        f'<div class="card"><span>{html.escape(label)}</span><b>{html.escape(value)}</b>'
        f"<span>{html.escape(comment)}</span></div>"
        for label, value, comment in numbers
    )
    return f'<div class="cards">{"".join(divs)}</div>'


def table(
    columns: Iterable[str], rows: Iterable[Iterable[Any]], marked: Collection[int] = ()
) -> str:
    """A table that scrolls sideways if it is too wide. Numbers are right-aligned, None is empty.

    marked: indices of rows with a background.
    """
    lines = []
    for i, row in enumerate(rows):
        mark = ' class="mark"' if i in marked else ""
        lines.append(f"<tr{mark}>{''.join(map(_cell, row))}</tr>")
    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in columns)
    body = "\n".join(lines)
    return f'<div class="table"><table><tr>{head}</tr>\n{body}</table></div>'


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
    kind = ' class="n"' if isinstance(value, (int, float, Number)) else ""
    kind = ' class="long"' if len(text) > MAX_SHORT else kind
    return f"<td{kind}>{html.escape(text)}</td>"


def image(data: bytes, kind: str, caption: str) -> str:
    """An <img> with its data; kind: subtype of its MIME type, "png" or "svg+xml".

    An SVG inside <img> runs no script and fetches nothing, and ids of several do not collide.
    """
    text, alt = base64.b64encode(data).decode(), html.escape(caption)
    return f'<img src="data:image/{kind};base64,{text}" alt="{alt}" title="{alt}">'


def figure(data: bytes, kind: str, caption: str, *, hide_caption: bool = False) -> str:
    """An image in a frame, with its caption below unless the image shows it."""
    below = "" if hide_caption else f"<figcaption>{html.escape(caption)}</figcaption>"
    return f"<figure>{image(data, kind, caption)}{below}</figure>"


def figures(content: Iterable[str]) -> str:
    """A grid of figures of equal width: as many columns as the window has room for."""
    return f'<div class="figures">{"".join(content)}</div>'


def legend(names: Iterable[str], colors: Iterable[tuple[str, str]]) -> str:
    """A line of names, each behind its (light, dark) color."""
    items = (
        f'<span><i class="swatch" style="--light: {light}; --dark: {dark}"></i>'
        f"{html.escape(name)}</span>"
        for name, (light, dark) in zip(names, colors, strict=True)
    )
    return f'<p class="legend">{"".join(items)}</p>'


def details(title: str, content: str, *, opened: bool = False) -> str:
    """Content that is folded away below its title."""
    attribute = " open" if opened else ""
    return f"<details{attribute}><summary>{html.escape(title)}</summary>{content}</details>"


def preformatted(text: str) -> str:
    """Text with its line breaks, in a monospaced font."""
    return f"<pre>{html.escape(text)}</pre>"


def page(title: str, sections: Mapping[str, str], summary: str = "", subtitle: str = "") -> str:
    """A page: title and subtitle (text), summary, and sections by heading (both HTML).

    Empty sections are left out.
    """
    name = html.escape(title)
    body = "\n".join(
        f"<section><h2>{html.escape(heading)}</h2>\n{content}</section>"
        for heading, content in sections.items()
        if content
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY, quote=False)}">'
        f"<title>{name}</title><style>{STYLE}</style></head>\n"
        f"<body><header><h1>{name}</h1>{note(subtitle) if subtitle else ''}{summary}</header>\n"
        f"{body}\n</body></html>\n"
    )
