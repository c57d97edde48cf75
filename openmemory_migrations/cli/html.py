"""One self-contained HTML file: no script, no link to anywhere, readable on a telephone and on paper. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ..finding import Finding

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #d0d0d0; }
table { border-collapse: collapse; font-size: .9rem; } .wide { overflow-x: auto; }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ececec; }
td:first-child { white-space: pre-wrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.verdict { display: inline-block; padding: .3rem .8rem; border-radius: .3rem; color: #fff; font-weight: 600; }
.fine { background: #1a7f37; } .wrong { background: #b3261e; }
.finding { border-left: .3rem solid #b0b0b0; padding: .2rem .8rem; margin: .8rem 0; }
.finding.error { border-color: #b3261e; } .finding.warning { border-color: #b58900; }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; } svg { max-width: 100%; height: auto; }
@media print { body { margin: 0; } .wide { overflow: visible; } }
"""


def page(title: str, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def verdict(fine: bool, text: str) -> str:
    return f'<p><span class="verdict {"fine" if fine else "wrong"}">{escape(text)}</span></p>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: int = 0) -> str:
    """The last `numbers` columns are numbers, to be read from the right."""
    first = len(head) - numbers

    def cells(row: Sequence[object], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if place >= first else ''}>{escape(str(cell))}</{tag}>"
            for place, cell in enumerate(row)
        )

    top = f"<thead><tr>{cells(head, 'th')}</tr></thead>" if any(head) else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def finding(found: Finding) -> str:
    lines = [f"<strong>{found.severity.upper()}</strong>: {escape(found.message)}"]
    lines += [escape(found.detail)] if found.detail else []
    lines += [f"<code>{escape(found.hint)}</code>"] if found.hint else []
    return f'<div class="finding {found.severity}">{"<br>".join(lines)}</div>'


def figure(svg: str, caption: str) -> str:
    """A picture made by us: its text is not escaped."""
    return f'<figure role="img" aria-label="{escape(caption)}">{svg}<figcaption>{escape(caption)}</figcaption></figure>'
