"""The pictures of a report, by matplotlib, as inline SVG: text stays text, and nothing outside is referred to.

matplotlib is the extra `plots`; nothing here is called without it. Colours are those of Okabe & Ito, told apart with
any kind of colour vision (https://jfly.uni-koeln.de/color/); lines also differ in their dashes, segments of bars in
their numbers.
"""

import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from ..errors import printable

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES = ("", "7 2.5", "1.5 2", "7 2 1.5 2", "3 2 1 2")  # as SVG writes them; 35 pairs with seven colours
GREY = "#595959"
FILLS = (*((colour, "") for colour in COLOURS), ("#B8B8B8", ""), ("#E6E6E6", ""), ("#FFFFFF", "////"))
PANEL = (4.7, 2.9)  # inches of a picture; the page lays two side by side where there is room
WIDE = 9.7  # inches of one that takes the whole page
DEEPEST = 14  # levels of a flame graph
NARROW = 0.0015  # share of the width below which a node is not drawn
LETTER = 0.62  # width of a letter, at most on average, of its size


@dataclass
class Curve:
    """A line: y over x, and what is drawn pale behind it."""

    x: list[float]
    y: list[float]  # nan where nothing is known
    pale: list[float] | None = None
    marked: bool = False  # a mark at each point: they are few


@dataclass
class Panel:
    """A picture of curves, one for each thing that is compared, None for one that has nothing to show."""

    title: str
    x: str  # what is along the axis, with its unit
    y: str
    curves: list[Curve | None]
    log: bool = False  # the y axis
    whole: bool = False  # the x axis has whole numbers alone
    reach: float = 0.0  # the x axis goes from 0 to this; 0: as far as the curves


def style(i: int) -> tuple[str, str]:
    """Colour and dashes of the i-th thing that is compared."""
    return COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]


def line_sample(i: int) -> str:
    """A short line as the i-th thing is drawn, as HTML for a legend beside its name."""
    colour, dashes = style(i)
    stroke = f'stroke="{colour}" stroke-width="2.2" stroke-dasharray="{dashes or "none"}"'
    return f'<svg class="sample" width="36" height="10" aria-hidden="true"><path d="M1 5H35" {stroke}/></svg>'


def new_figure(width: float, height: float):
    """A figure of this size in inches, which no window and no state of pyplot knows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


# matplotlib's, for all pictures, whatever the user's own are
SETTINGS = {
    "svg.fonttype": "none",  # text stays text; DejaVu is the widest of these fonts: in others there is more room
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial", "sans-serif"],
    "font.size": 9,
    "text.parse_math": False,  # a dollar sign in a name is one
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "xtick.color": "#222222",
    "ytick.color": "#222222",
}


def draw(make, *arguments) -> Any:
    """The figure that make(*arguments) draws, in the settings of a report."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        return make(*arguments)


def as_svg(name: str, make, *arguments) -> str:
    """What make(*arguments) draws, as an <svg> element. name: of the picture, unique in the page."""
    import matplotlib

    figure = draw(make, *arguments)
    file = io.StringIO()
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": name}), warnings.catch_warnings():
        # the salt: the same picture has the same text; signs that this font lacks are in one of the browser's
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()

    # what HTML does not want of an SVG file: its preamble, and the addresses that name what is written here
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)

    # several pictures share a page: an id is unique in it
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    for mark, words in getattr(figure, "told", {}).items():  # what a browser shows where the mouse rests
        text = text.replace(f'id="{name}-{mark}">', f'id="{name}-{mark}"><title>{escape(words)}</title>')
    return text.replace("<svg ", '<svg role="img" ', 1)


# ---- curves


def curves(panel: Panel) -> Any:
    """The figure of a panel."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    figure = new_figure(*PANEL)
    axes = figure.add_subplot()
    axes.set_title(printable(panel.title))
    axes.set_xlabel(panel.x)
    axes.set_ylabel(printable(panel.y))
    for i, curve in enumerate(panel.curves):
        if curve is None:
            continue
        colour, dashes = style(i)
        lengths = [float(n) for n in dashes.split()]
        if curve.pale:
            axes.plot(curve.x, curve.pale, color=colour, alpha=0.25, linewidth=0.7)
        marker = "os^Dv"[i % 5] if curve.marked or len(curve.x) == 1 else ""
        # matplotlib measures dashes in widths of the line
        shape = (0, [n / 1.6 for n in lengths]) if lengths else "-"
        axes.plot(curve.x, curve.y, color=colour, linewidth=1.6, linestyle=shape, marker=marker, markersize=4)
    steps = [1, 2, 2.5, 5, 10]
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(short_number))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=steps, integer=panel.whole))
    axes.xaxis.set_major_formatter(FuncFormatter(short_number))
    axes.margins(x=0.02)
    if panel.reach:
        axes.set_xlim(0, 1.02 * panel.reach)
    return figure


def short_number(value: float, _=None) -> str:
    """A number at an axis: 12,000, 0.25, 5e-05."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


# ---- memory as stacked bars


def stacked_bars(rows: list[tuple[str, list[float]]], places: list[int]) -> Any:
    """Bars that lie, each of segments in megabytes; a number in a segment says which kind it is, from 1.

    rows: (what the bar is, its segments), all of them with each kind, 0 for none; places: of the kinds in FILLS.
    """
    figure = new_figure(WIDE, 0.75 + 0.38 * len(rows))
    axes = figure.add_subplot()
    axes.set_xlabel("memory at the peak, MB")
    longest = max(sum(segments) for _, segments in rows) or 1.0
    for row, (_, segments) in enumerate(rows):
        left = 0.0
        for kind, place in enumerate(places):
            size = segments[kind]
            colour, hatch = fill_of(place)
            edge = GREY if hatch else "white"  # in which the hatching is drawn, too
            axes.barh(row, size, left=left, height=0.7, color=colour, hatch=hatch, edgecolor=edge, linewidth=0.6)
            if size / longest > 0.03:
                dark = colour in ("#000000", "#0072B2")
                box = {"boxstyle": "round,pad=0.12", "facecolor": colour, "edgecolor": "none"}
                axes.text(
                    left + size / 2, row, str(kind + 1), ha="center", va="center", fontsize=8,
                    color="white" if dark else "black", bbox=box,
                )  # fmt: skip
            left += size
        axes.text(left + 0.008 * longest, row, f"{left:,.0f} MB", va="center", fontsize=8.5)
    axes.set_yticks(range(len(rows)), [shortened(name, 44) for name, _ in rows])
    axes.set_xlim(0, 1.1 * longest)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure


def fill_of(kind: int) -> tuple[str, str]:
    """Colour and hatching of the segments of a kind."""
    return FILLS[kind % len(FILLS)]


def shortened(name: str, most: int) -> str:
    """A name in at most so many signs, its middle left out: the ends of paths tell runs apart."""
    name = printable(name)
    if len(name) <= most:
        return name
    half = (most - 1) // 2
    return f"{name[:half]}…{name[-(most - 1 - half) :]}"


# ---- a trace as a flame graph

KINDS = {
    "step": "#D9D9D9",
    "phase": "#BDD7E7",
    "module": "#F3C98B",
    "operator": "#9BD3BF",
    "kernel": "#E8B7D0",
    "other": "#FFFFFF",
}  # pale, so that dark text is read on each


def flame_graph(root: dict) -> Any:
    """The trace as an icicle: a node's width is its time, those below it are within. root: a checked node."""
    from matplotlib.patches import Rectangle

    total = root["ms"]
    boxes = list(boxes_of(root, "", 0.0, 0, total))
    levels = 1 + max(level for *_, level in boxes)
    figure = new_figure(WIDE, 0.7 + 0.25 * levels)
    figure.told = {}
    axes = figure.add_subplot()
    axes.set_xlabel("time within the step, ms")
    axes.set_xlim(0, total)
    axes.set_ylim(levels, 0)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    inches = WIDE - 0.3  # of the axes
    for number, (node, name, start, level) in enumerate(boxes):
        width = node["ms"]
        colour = KINDS.get(node["kind"], KINDS["other"])
        patch = Rectangle((start, level), width, 1, facecolor=colour, edgecolor=GREY, linewidth=0.4)
        patch.set_gid(f"node{number}")
        axes.add_patch(patch)
        figure.told[f"node{number}"] = f"{node['name']} ({node['kind']}), {width:.3g} ms, {width / total:.1%}"
        letters = int(inches * width / total * 72 / (7.5 * LETTER)) - 1
        if letters >= 4:
            name = printable(name)
            words = name if len(name) <= letters else name[: letters - 1] + "…"
            axes.text(start + width / 2, level + 0.52, words, ha="center", va="center", fontsize=7.5, clip_on=True)
    return figure


def boxes_of(node: dict, around: str, start: float, level: int, total: float) -> Iterator[tuple]:
    """(node, its name, where it begins in ms, level) of all that are wide enough to be seen.

    Children come one after another. around: the name of the node above, which is left out where a name begins with it.
    """
    yield node, node["name"].removeprefix(f"{around}."), start, level
    if level + 1 == DEEPEST:
        return
    for child in node["children"]:
        if child["ms"] >= NARROW * total:
            yield from boxes_of(child, node["name"], start, level + 1, total)
        start += child["ms"]
