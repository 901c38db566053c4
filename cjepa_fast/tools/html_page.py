"""Pieces of one self-contained HTML page: sections, tables, figures.

Nothing is fetched, which a policy in the page forbids too. Colours follow the reader's light or
dark scheme.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from cjepa_fast.tools import html_charts

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
WARNED = ' class="warn"'  # a table's row that has a warning
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c1f23; --quiet: #667; --rule: #d8dbe0;
  --card: #f6f7f9; --accent: #1668b8; --warn: #b3540a; --good: #00704f; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --ink: #e4e7eb; --quiet: #98a1ad;
  --rule: #333941; --card: #1c2026; --accent: #6cb2f5; --warn: #f0a35e; --good: #4fd0a5; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.2rem; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
nav { position: sticky; top: 0; z-index: 3; background: var(--ground);
  border-bottom: 1px solid var(--rule); padding: .6rem 1rem;
  overflow-x: auto; white-space: nowrap; scrollbar-width: none; }
nav a { color: var(--quiet); text-decoration: none; margin-right: 1rem; }
nav a:hover { color: var(--accent); }
main { max-width: 1180px; margin: 0 auto; padding: 0 1rem 4rem; }
h1 { font-size: 1.5rem; margin: 1.2rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p, .quiet { color: var(--quiet); margin: .3rem 0; overflow-wrap: anywhere; }
.warn { color: var(--warn); }
.stories { display: grid; gap: .8rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.story { background: var(--card); border-radius: 8px; padding: .8rem 1.1rem;
  border-left: 5px solid var(--quiet); }
.story.good { border-color: var(--good); } .story.bad { border-color: var(--warn); }
.story strong { font-size: 1.2rem; display: block; }
.story p { color: var(--ink); max-width: 75ch; margin: .45rem 0; }
.facts { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); }
.facts div, .curves figure { background: var(--card); border-radius: 8px; padding: .6rem .8rem; }
.facts dt { color: var(--quiet); font-size: .82rem; } .facts dl, .facts dd { margin: 0; }
.facts dd { font-size: 1.02rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } .wide img { max-width: 100%; border-radius: 6px; background: #fff; }
table { border-collapse: collapse; margin: .2rem 0 1.2rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem 1.1rem .2rem 0; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top; }
th:first-child, td:first-child, .words th, .words td { text-align: left; } th { font-weight: 600; }
.words td { overflow-wrap: anywhere; } .words td:not(:last-child) { white-space: nowrap; }
.even td { white-space: normal !important; min-width: 8rem; }
pre { background: var(--card); border-radius: 8px; padding: .8rem; overflow-x: auto; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--quiet); }
@media (max-width: 640px) { .wide img { max-width: none; width: 640px; }
  .facts { grid-template-columns: 1fr 1fr; } }
@media print { nav { display: none; } }
"""


def document(title: str, sections: Sequence[tuple[str, str]], under: str = "") -> str:
    """The page: sections are (heading, HTML); under: a line of text below the title."""
    keys = [heading.split()[0].lower().strip(",") for heading, _ in sections]
    links = "".join(
        f'<a href="#{key}">{escape(heading)}</a>'
        for key, (heading, _) in zip(keys, sections, strict=True)
    )
    bodies = "".join(
        f'<section id="{key}"><h2>{escape(heading)}</h2>{body}</section>\n'
        for key, (heading, body) in zip(keys, sections, strict=True)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{html_charts.STYLE}</style></head>\n<body>"
        f"<nav>{links}</nav><main><h1>{escape(title)}</h1><p>{escape(under)}</p>\n{bodies}"
        f"</main><script>{html_charts.SCRIPT}</script></body></html>\n"
    )


def story(kind: str, headline: str, sentences: Iterable[str], name: str = "") -> str:
    """What happened, in words. kind: "good", "bad" or ""; name: whose, where there are several."""
    lines = "".join(f"<p>{_unbroken(escape(text))}</p>" for text in sentences)
    over = f'<span class="quiet">{escape(name)}</span>' if name else ""
    return f'<div class="story {kind}">{over}<strong>{escape(headline)}</strong>{lines}</div>'


def _unbroken(text: str) -> str:
    """A number, its interval and its unit stay on one line."""
    return text.replace(" ± ", "&nbsp;±&nbsp;").replace(" %", "&nbsp;%")


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    cells = "".join(
        f"<div><dl><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></dl></div>"
        for name, value in pairs
    )
    return f'<div class="facts">{cells}</div>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", kind: str = ""
) -> str:
    """Numbers stand to the right, but for the first column. kind: "words", all to the left and the
    last column the widest, or "words even"."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        f"<tr{WARNED * any(cell.startswith('WARNING') for cell in row)}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    over = f"<p>{escape(caption)}</p>" if caption else ""
    return (
        f'{over}<div class="wide {kind}"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def note(text: str, kind: str = "quiet") -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def configuration(text: str) -> str:
    return f"<details open><summary>all keys</summary><pre>{escape(text)}</pre></details>"


def figure_image(figure, alt: str) -> str:
    """A matplotlib figure, embedded as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<div class="wide"><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></div>'
