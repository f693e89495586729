"""HTML in pieces: tables, legends, figures, and the document around them, which refers to nothing and runs nothing.

Cells and paragraphs are HTML already; every text from outside comes through `shown`.
"""

import importlib.util
import math
from collections.abc import Iterable
from html import escape

from ..errors import printable
from . import pictures
from .pictures import Panel

NO_PLOTS = 'no pictures: matplotlib is not installed; `pip install "minift[plots]"` installs it'
TITLE = 200  # signs of the title


def shown(text: object) -> str:
    """A text from outside as HTML: nothing in it is markup, and what is not printable stands as its escape."""
    lines = [printable(line) for line in str(text).split("\n")]
    return escape("\n".join(lines))


def cut(text: str, most: int) -> str:
    """The beginning of a long text."""
    if len(text) <= most:
        return text
    return text[:most].rstrip() + " …"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], sides: str, name: str = "") -> str:
    """A table of cells that are HTML already; sides: < or > for each column, ? for one of running text."""
    kinds = {"<": "", ">": ' class="number"', "?": ' class="text"'}
    lines = [f'<div class="scroll"><table class="{name}"><thead><tr>']
    lines += [f'<th scope="col"{kinds[side]}>{cell}</th>' for cell, side in zip(head, sides, strict=True)]
    lines.append("</tr></thead><tbody>")
    for first, *others in rows:
        lines.append(f'<tr><th scope="row"{kinds[sides[0]]}>{first}</th>')
        lines += [f"<td{kinds[side]}>{cell}</td>" for cell, side in zip(others, sides[1:], strict=True)]
        lines.append("</tr>")
    lines.append("</tbody></table></div>")
    return "".join(lines)


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of HTML."""
    if not kind:
        return f"<p>{text}</p>"
    return f'<p class="{kind}">{text}</p>'


def legend(names: list[str]) -> str:
    """Which line is whose."""
    items = [f"<li>{pictures.line_sample(i)}<span>{shown(name)}</span></li>" for i, name in enumerate(names)]
    return f'<ul class="legend">{"".join(items)}</ul>'


def figure(svg: str, what: str, wide: bool = False) -> str:
    """A picture. what: said of it to those who do not see it."""
    kind = ""
    if wide:
        kind = ' class="wide"'
    labelled = svg.replace('role="img"', f'role="img" aria-label="{shown(what)}"', 1)
    return f"<figure{kind}>{labelled}</figure>"


def panels(section: str, found: list[Panel]) -> str:
    """Pictures side by side, those that have anything to show."""
    told = []
    for panel in found:
        if can_draw() and any(curve and not all(map(math.isnan, curve.y)) for curve in panel.curves):
            svg = pictures.as_svg(f"{section}{len(told)}", pictures.curves, panel)
            told.append(figure(svg, panel.title))
    if not told:
        return ""
    return f'<div class="panels">{"".join(told)}</div>'


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def document(title: str, header: str, warning: str, sections: list[tuple[str, str, str]]) -> str:
    """The whole page. sections: (name, heading, content) of each; title: a text; the rest is HTML."""
    contents = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{heading}</h2>{content}</section>' for name, heading, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # a browser is told not to fetch anything, whatever might have slipped in
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{shown(cut(title, TITLE))}</title><style>{STYLE}</style></head><body>"
        f"<header>{header}</header>{warning}"
        f'<nav aria-label="contents"><ol>{contents}</ol></nav><main>{body}</main></body></html>\n'
    )


STYLE = """
:root{color:#1a1a1a;background:#fff;font:16px/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",Arial,sans-serif}
body{max-width:62rem;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .5rem}
h2{font-size:1.3rem;margin:2.5rem 0 .75rem;padding-top:.75rem;border-top:2px solid #1a1a1a}
h3{font-size:1.05rem;margin:1.5rem 0 .5rem}
h1,h3,header p,.facts th,.facts td,.missing,.numbers{overflow-wrap:anywhere}
th,td{overflow-wrap:break-word}
p{margin:.5rem 0;max-width:45rem}
.note{color:#4a4a4a;font-size:.875rem}
summary{cursor:pointer;max-width:45rem}
.numbers{font-size:.8125rem;font-variant-numeric:tabular-nums}
.missing{border-left:4px solid #D55E00;padding:.25rem .75rem;background:#fbf3ee;font-size:.9375rem}
nav ol{columns:2 16rem;padding-left:1.5rem;margin:1rem 0;font-size:.9375rem}
a{color:#00508a}
.scroll{overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .9rem .3rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #ddd;min-width:3rem}
thead th{border-bottom:2px solid #777;vertical-align:bottom}
tbody th{font-weight:400}
table.facts tbody th{font-weight:600;min-width:9rem}
table.facts td{min-width:8.5rem}
table.sums tbody th{white-space:nowrap}
table.sums tbody tr:nth-last-child(-n+2)>*{font-weight:700;border-top:2px solid #777}
table.layers th,table.layers td,table.hard b{white-space:nowrap}
table.sums thead th,table.hard td{max-width:14rem}
td.number,th.number{text-align:right}
table.hard td.text{min-width:18rem;max-width:none}
th.number+td:not(.number){padding-left:.5rem}
figure{margin:0}
figure svg{display:block;width:100%;height:auto}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:1rem 1.5rem;margin:.5rem 0}
.panels figure{max-width:31rem}
figure.wide{overflow-x:auto}
figure.wide svg{min-width:44rem}
ul.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.5rem;margin:.5rem 0;padding:0;font-size:.875rem}
ul.legend li{display:flex;align-items:baseline;gap:.5rem;overflow-wrap:anywhere}
.sample{flex:none}
.swatch{display:inline-block;flex:none;width:.8rem;height:.8rem;margin-right:.4rem;border:1px solid #555}
article{border:1px solid #ccc;border-radius:4px;padding:.6rem .9rem;margin:.75rem 0;max-width:48rem}
.quote{white-space:pre-wrap;overflow-wrap:anywhere;margin:0 0 .5rem}
dl{display:grid;grid-template-columns:fit-content(13rem) 1fr;gap:.15rem 1rem;margin:0;font-size:.9375rem}
dt{color:#4a4a4a;overflow-wrap:anywhere}
@media(max-width:30rem){dl{grid-template-columns:1fr}dd{margin-bottom:.35rem!important}}
dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
@media print{
@page{margin:14mm}
:root{font-size:11px}
body{max-width:none;padding:0}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
a{color:inherit;text-decoration:none}
h2,h3,ul.legend{break-after:avoid}
figure,article,tr,ul.legend{break-inside:avoid}
.scroll,figure.wide{overflow:visible}
figure.wide svg{min-width:0}
.panels{grid-template-columns:1fr 1fr}
table.layers th,table.layers td{white-space:normal}
td.text{min-width:0}
}
"""
