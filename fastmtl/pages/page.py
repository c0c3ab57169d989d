"""The HTML around the plots: sections, tables and the style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  --page: #fcfcfb; --panel: #ffffff; --ink: #1f2328; --soft: #59636e; --rule: #d9dde2; --accent: 0 105 170;
  --s0: #0069aa; --s1: #c2500a; --s2: #00845f; --s3: #9a4fb0; --s4: #a87900; --s5: #2a9bc9; --s6: #b5305a;
  --s7: #5b6770; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --panel: #1b1f24; --ink: #e3e7eb; --soft: #9aa4ae;
  --rule: #363d45; --accent: 88 166 226; --s0: #58a6e2; --s1: #f0883e; --s2: #3fbf94; --s3: #c792df; --s4: #e0b341;
  --s5: #76cdee; --s6: #f2789f; --s7: #a3aeb8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 var(--font); }
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .25rem; }
p { margin: .25rem 0 1rem; color: var(--soft); max-width: 46rem; }
.facts { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1.25rem 0 0; padding: 0; }
.facts div { min-width: 6rem; } .facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.grid { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.grid > hr { flex: 0 0 100%; height: 0; margin: 0; border: 0; }
figure { margin: 0; padding: .75rem .9rem; background: var(--panel); border: 1px solid var(--rule); border-radius: 8px;
  max-width: 100%; overflow-x: auto; }
figcaption, caption { color: var(--ink); font-size: .88rem; font-weight: 600; text-align: left; padding-bottom: .4rem; }
svg { display: block; max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
tr > :first-child { text-align: left; } th { font-weight: 600; } thead th { color: var(--soft); font-weight: 500; }
td.own { font-weight: 700; } tbody tr:last-child > * { border-bottom: 0; }
.matrix td, .matrix th { text-align: center; } .matrix th { border: 0; }
.matrix td { min-width: 3rem; border: 1px solid var(--panel); }
.matrix small { display: block; font-size: .72rem; opacity: .75; line-height: 1; padding-bottom: .15rem; }
.texts :is(td, th) { text-align: left; }
.texts td { white-space: normal; overflow-wrap: break-word; max-width: 28rem; vertical-align: top; }
.texts tbody th { max-width: 12rem; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.wide { overflow-x: auto; } details { margin-top: .75rem; } summary { cursor: pointer; font-weight: 600; }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: 1rem; overflow-x: auto;
  font: .82rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media print { figure { break-inside: avoid; } }
"""


NEW_LINE = "<hr>"  # in a section


def page(title: str, body: Sequence[str]) -> str:
    """Return a whole HTML document.

    body: the HTML of its parts, one below the other.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def facts(values: dict[str, str]) -> str:
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="facts">{items}</dl>'


def section(title: str, explanation: str, content: Sequence[str]) -> str:
    """Return the HTML of a section: a heading, a sentence, and tables and figures in a row.

    content: the HTML of each table or figure; NEW_LINE starts another row.
    Without content the result is ''.
    """
    if not content:
        return ""
    text = f"<p>{escape(explanation)}</p>" if explanation else ""
    return f'<section>\n<h2>{escape(title)}</h2>\n{text}\n<div class="grid">{"".join(content)}</div>\n</section>'


def figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


def table(
    caption: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    own: frozenset[tuple[int, int]],
    *,
    texts: bool = False,
) -> str:
    """Return the HTML of a table. The first cell of a row is the row's heading.

    own: (row, column) of the bold cells, counted from 0. texts: the cells are texts of
    several lines.
    """
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = []
    for number, (name, *cells) in enumerate(rows):
        values = "".join(
            f'<td class="own">{escape(cell)}</td>' if (number, column) in own else f"<td>{escape(cell)}</td>"
            for column, cell in enumerate(cells, start=1)
        )
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{values}</tr>')
    body = f"<thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody>"
    kind = ' class="texts"' if texts else ""
    return f"<figure><table{kind}><caption>{escape(caption)}</caption>{body}</table></figure>"


def matrix(caption: str, names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Return the HTML of a confusion matrix. Rows are true classes, columns predicted ones.

    names: of the classes. counts: rows of the matrix. A cell's shade is its share of the row.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    lines = []
    for name, row in zip(names, counts, strict=True):
        total = sum(row)
        cells = "".join(_cell(count, count / total if total else 0.0) for count in row)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    body = f'<thead><tr><th scope="col">true \\ predicted</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody>'
    return f'<figure><table class="matrix"><caption>{escape(caption)}</caption>{body}</table></figure>'


def _cell(count: int, share: float) -> str:
    shade = f"background: rgb(var(--accent) / {0.62 * share:.2f})"
    return f'<td style="{shade}">{count}<small>{share:.0%}</small></td>'


def folded(summary: str, html: str) -> str:
    """Return the HTML of a part that a click unfolds."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def details(summary: str, text: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
