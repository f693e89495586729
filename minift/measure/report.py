"""The page of a report, a section after the other, from what reporting.py has gathered.

Every text from outside is escaped by `shown`; what a run lacks is said in a line where it would stand.
"""

import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..adapters.learned import Learned
from . import html, pictures
from .html import NO_PLOTS, can_draw, cut, figure, legend, panels, paragraph, shown, table
from .ledger import KINDS
from .pictures import Curve, Panel

POINTS = 1000  # of a curve; of longer ones every n-th is drawn
LAYERS = 24  # rows of the table of what layers learned, where there is one run
FEW = 8  # where there are several
LONG = 600  # signs of a text that are shown
SHORT = 200  # of one in a table
LABELS = 6  # that the summary names
HALF = math.log(2)  # the loss of a target that has half of the probability


@dataclass
class Asked:
    """An example that was held out, and what was said of it."""

    question: str
    right: str
    before: str | None  # None: nothing that means anything
    after: str


@dataclass
class Hard:
    """A training example, of those that were hardest to learn, and its losses when it was trained on: of the model of
    that moment, with dropout.

    Swayamdipta et al. (https://arxiv.org/abs/2009.10795) read such curves as easy, hard or in doubt.
    """

    number: int  # in the training data, from 0
    losses: list[float]  # of each epoch
    question: str = ""
    right: str = ""

    @property
    def mean(self) -> float:
        """Its loss over all epochs."""
        return sum(self.losses) / len(self.losses)

    @property
    def never_learned(self) -> bool:
        """Whether in no epoch after the first, where there are others, its label was the likelier half.

        Among these are the wrong labels, and what is in doubt.
        """
        return all(loss > HALF for loss in self.losses[1:] or self.losses)


@dataclass
class Seen:
    """A run as a report sees it: what its folder holds, and what its models say."""

    name: str
    folder: Path
    config: dict = field(default_factory=dict)
    changed: dict = field(default_factory=dict)  # the options that are not the defaults
    steps: list[dict] = field(default_factory=list)  # metrics.jsonl
    ledger: dict = field(default_factory=dict)  # ledger.json
    finished: bool = True
    best: tuple[str, Callable] | None = None  # the metric that picks the best model, and how
    labels: list[str] = field(default_factory=list)
    weights: tuple[int, int] | None = None  # those that learn, all
    learned: list[Learned] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    asked_of: str = ""  # where these examples are from
    hard: list[Hard] = field(default_factory=list)
    trained_on: int = 0  # examples whose losses are known
    never_learned: list[int] = field(default_factory=list)  # their numbers, that with the largest mean loss first
    missing: dict[str, list[str]] = field(default_factory=dict)  # section -> what it lacks, a sentence each

    def lacks(self, section: str, sentence: str) -> None:
        """Notes what a section has to do without."""
        self.missing.setdefault(section, []).append(sentence)

    def values(self, name: str) -> list[float]:
        """A metric at each step, nan where it is not known."""
        values = [step.get(name) for step in self.steps]
        return [float(v) if isinstance(v, int | float) and math.isfinite(v) else math.nan for v in values]


def lacking(section: str, runs: list[Seen]) -> str:
    """What the runs lack in a section, a line for each lack."""
    names: dict[str, list[str]] = {}
    for run in runs:
        for sentence in run.missing.get(section, []):
            names.setdefault(sentence, []).append(f"<b>{shown(run.name)}</b>")
    lines = []
    for sentence, whose in names.items():
        said = shown(sentence)
        if len(runs) > 1:
            said = f"{', '.join(whose)}: {said}"
        lines.append(paragraph(said, "missing"))
    return "".join(lines)


def page(runs: list[Seen], trace: dict | None, written: str) -> str:
    """The report of some runs. trace: a step as `minift trace` writes it, checked; written: when and by what."""
    sections = [
        ("summary", "Summary", summary(runs)),
        ("curves", "Loss and metrics", curves(runs)),
        ("speed", "Throughput and memory over time", speed(runs)),
        ("ledger", "Where the memory goes", ledger(runs)),
    ]
    if trace:
        sections.append(("trace", "One step, traced", traced(trace)))
    sections += [
        ("learned", "What each layer learned", learned(runs)),
        ("asked", "Before and after", asked(runs)),
        ("hard", "The hardest training examples", hard(runs)),
        ("options", "Options", options(runs)),
    ]
    sections = [(name, title, lacking(name, runs) + content) for name, title, content in sections]
    title = f"minift report: {', '.join(run.name for run in runs)}"
    heading = "What this run did"
    if len(runs) > 1:
        heading = "What these runs did"
    names = ", ".join(f"<b>{shown(run.name)}</b>" for run in runs)
    first = f"<h1>{heading}</h1><p>{names}</p>" + paragraph(shown(written), "note")
    warning = ""
    if not can_draw():
        warning = paragraph(shown(NO_PLOTS), "missing")
    return html.document(title, first, warning, sections)


# ---- the sections


def summary(runs: list[Seen]) -> str:
    """What was learned, how well, how fast, in how much memory: a column for each run."""
    rows = {
        "model": [shown(run.config.get("model", "")) for run in runs],
        "task": [shown(task_words(run)) for run in runs],
        "method": [shown(run.config.get("method", "")) for run in runs],
        "weights that learn": [weights_words(run) for run in runs],
        "steps": [steps_words(run) for run in runs],
        "best on held-out examples": [shown(best_words(run)) for run in runs],
        "training loss, first to last": [loss_words(run) for run in runs],
        "throughput, median": [
            numbers_words(run, "train/tokens_per_second", statistics.median, 1, "tokens/s") for run in runs
        ],
        "time in steps": [time_words(run) for run in runs],
        "memory of the process, peak": [numbers_words(run, "train/peak_memory", max, 1e6, "MB") for run in runs],
        "memory, forecast / measured": [pair_words(run, "memory", 1e6, "MB") for run in runs],
        "time a step, forecast / measured": [pair_words(run, "seconds", 1e-3, "ms") for run in runs],
    }
    told = [(what, *(cell or "–" for cell in cells)) for what, cells in rows.items() if any(cells)]
    head = ["", *(shown(run.name) for run in runs)]
    return table(head, told, "<" + "<" * len(runs), "facts")


def task_words(run: Seen) -> str:
    """The task and its labels."""
    task = run.config.get("task", "")
    if not run.labels:
        return f"{task}"
    names = ", ".join(run.labels[:LABELS])
    if len(run.labels) > LABELS:
        names += f", {len(run.labels)} in all"
    return f"{task}: {names}"


def weights_words(run: Seen) -> str:
    """How many weights learn."""
    if not run.weights:
        return ""
    some, whole = run.weights
    return f"{some:,} of {whole:,} ({some / whole:.2%})"


def steps_words(run: Seen) -> str:
    """How many steps were made."""
    if not run.steps:
        return ""
    words = f"{run.steps[-1]['step']:,}"
    epochs = [e for e in run.values("train/epoch") if not math.isnan(e)]
    if epochs:
        words += f", {epochs[-1]:.3g} epochs"
    if not run.finished:
        words += "; interrupted"
    return words


def best_words(run: Seen) -> str:
    """The task's own measure, of the best validation."""
    if not run.best:
        return ""
    name, better = run.best
    found = [(v, step["step"]) for v, step in zip(run.values(f"eval/{name}"), run.steps, strict=True) if v == v]
    if not found:
        return ""
    value = better(v for v, _ in found)
    after = min(step for v, step in found if v == value)
    return f"{name.replace('_', ' ')} {value:.4g}, after step {after:,}"


def loss_words(run: Seen) -> str:
    """How the training loss went: means of some steps, for a single one is noise."""
    values = [v for v in run.values("train/loss") if v == v]
    if not values:
        return ""
    few = max(1, min(10, len(values) // 2))
    return f"{statistics.mean(values[:few]):.3f} to {statistics.mean(values[-few:]):.3f}"


def numbers_words(run: Seen, name: str, make: Callable, unit: float, what: str) -> str:
    """One number of all steps, with its unit."""
    values = [v for v in run.values(name) if v == v]
    if not values:
        return ""
    return f"{make(values) / unit:,.0f} {what}"


def time_words(run: Seen) -> str:
    """How long all steps took together."""
    times = seconds_until(run)
    if not times or not times[-1]:
        return ""
    return duration(times[-1])


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def pair_words(run: Seen, name: str, unit: float, what: str) -> str:
    """A forecast, what was measured, and how far off the first was."""
    forecast = run.ledger.get("forecast", {}).get(name)
    found = run.ledger.get("measured", {}).get(name)
    if not forecast or not found:
        return ""
    return f"{forecast / unit:,.0f} / {found / unit:,.0f} {what} ({forecast / found - 1:+.1%})"


def seconds_until(run: Seen) -> list[float]:
    """The time that all steps up to each took; a step whose speed is not known counts nothing."""
    total = 0.0
    found = []
    for tokens, rate in zip(run.values("train/tokens"), run.values("train/tokens_per_second"), strict=True):
        if tokens == tokens and rate > 0:
            total += tokens / rate
        found.append(total)
    return found


def smoothed(values: list[float]) -> list[float]:
    """A running mean over about ten values, of those before too; it begins at the first, and leaves nan as it is."""
    mean = 0.0
    weight = 0.0
    found = []
    for value in values:
        if math.isnan(value):
            found.append(value)
            continue
        mean = 0.9 * mean + 0.1 * value
        weight = 0.9 * weight + 0.1
        found.append(mean / weight)
    return found


def thinned(curve: Curve) -> Curve:
    """The curve with POINTS points at most."""
    n = math.ceil(len(curve.x) / POINTS)
    pale = curve.pale and curve.pale[::n]
    return Curve(curve.x[::n], curve.y[::n], pale, curve.marked)


def curve_of(run: Seen, name: str, smooth: bool = False, unit: float = 1.0, x: list[float] | None = None):
    """The curve of a metric over steps or over `x`, or None where the run has none."""
    values = [value / unit for value in run.values(name)]
    if all(map(math.isnan, values)):
        return None
    if x is None:
        x = [step["step"] for step in run.steps]
    if name.startswith("eval/"):  # at a few steps: a line from one to the next
        known = [(a, v) for a, v in zip(x, values, strict=True) if v == v]
        curve = Curve([a for a, _ in known], [v for _, v in known], marked=len(known) < 50)
    elif smooth:
        curve = Curve(x, smoothed(values), values)
    else:
        curve = Curve(x, values)
    return thinned(curve)


UNITS = {
    "loss": "nats a target",
    "accuracy": "share, of 1",
    "macro_f1": "F1, of 1",
    "grad_norm": "L2 norm before clipping",
    "learning_rate": "learning rate",
    "loss_scale": "factor",
}  # of metrics; of others the name is all that is known
FIRST = ("train/loss", "eval/loss")
LAST = ("train/learning_rate", "train/grad_norm", "train/loss_scale")
EXACT = ("train/learning_rate", "train/loss_scale")  # no noise in them
WORDS = {"grad_norm": "gradient norm", "macro_f1": "macro F1"}
ELSEWHERE = {"train/epoch", "train/global_step", "train/tokens", "train/tokens_per_second", "train/peak_memory"}
ELSEWHERE |= {"step"}


def curves(runs: list[Seen]) -> str:
    """Every metric over the steps."""
    names = dict.fromkeys(name for run in runs for step in run.steps for name in step if name not in ELSEWHERE)
    others = [name for name in names if name not in FIRST and name not in LAST and not counts(runs, name)]
    last = max((run.steps[-1]["step"] for run in runs if run.steps), default=0)
    found = []
    for name in (*FIRST, *others, *LAST):
        short = name.partition("/")[2]
        what = WORDS.get(short, short.replace("_", " "))
        unit = UNITS.get(short, what)
        title = what
        if name.startswith("eval/"):
            title = f"{what}, held out"
        elif name not in LAST:
            title = f"{what}, training"
        smooth = name.startswith("train/") and name not in EXACT
        drawn = [curve_of(run, name, smooth) for run in runs]
        found.append(Panel(title[0].upper() + title[1:], "optimizer step", unit, drawn, whole=True, reach=last))
    drawn = panels("curves", found)
    if not drawn:
        return ""
    words = "Thick: a running mean over about ten steps; pale: each step. Held out: after each validation."
    return legend([run.name for run in runs]) + drawn + paragraph(words, "note")


def counts(runs: list[Seen], name: str) -> bool:
    """Whether a metric of a validation is how many there were, the same each time: JSON has it as a whole number."""
    return name.startswith("eval/") and all(isinstance(step.get(name, 0), int) for run in runs for step in run.steps)


def speed(runs: list[Seen]) -> str:
    """Tokens a second and memory, over the time that the steps took."""
    times = [seconds_until(run) for run in runs]
    longest = max((time[-1] for time in times if time), default=0.0)
    scale = 1.0
    x = "time in steps, s"
    if longest > 600:
        scale = 60.0
        x = "time in steps, min"
    rates = []
    peaks = []
    for run, time in zip(runs, times, strict=True):
        at = [t / scale for t in time]
        rates.append(curve_of(run, "train/tokens_per_second", smooth=True, x=at))
        peaks.append(curve_of(run, "train/peak_memory", unit=1e6, x=at))
    drawn = panels(
        "speed",
        [
            Panel("Throughput", x, "tokens/s", rates, reach=longest / scale),
            Panel("Largest memory so far", x, "resident, MB", peaks, reach=longest / scale),
        ],
    )
    if not drawn:
        return ""
    words = (
        "Memory is that of the process that wrote metrics.jsonl: of several, the first; on a GPU, what lies beside it."
    )
    return legend([run.name for run in runs]) + drawn + paragraph(words, "note")


def ledger(runs: list[Seen]) -> str:
    """What holds the memory, as it was forecast, beside what was measured."""
    parts = [(run, which, segments) for run in runs for which, segments in bars_of(run)]
    if not parts:
        return ""
    found = dict.fromkeys(kind for _, _, segments in parts for kind in segments)
    # a kind has one look in every report, whatever others are there
    others = [kind for kind in found if kind not in ORDER]
    kinds = [kind for kind in (*KINDS, *others, PROCESS, REST, WHOLE) if kind in found]
    places = [ORDER.index(kind) if kind in ORDER else i for i, kind in enumerate(kinds)]
    bars = []
    columns = []
    for run, which, segments in parts:
        name = of_run(which, run, runs)
        sizes = [segments.get(kind, 0) / 1e6 for kind in kinds]
        bars.append((name, sizes))
        if WHOLE not in segments:
            columns.append((run, name, sizes))
    drawn = ""
    if can_draw():
        svg = pictures.as_svg("ledger", pictures.stacked_bars, bars, places)
        drawn = figure(svg, "memory by kind, forecast and measured", wide=True)
    words = "The numbers in the bars are those of the table. A run measures the whole at its peak, not its parts."
    numbers = ""
    if columns:
        numbers = ledger_table(kinds, places, columns)
    return drawn + numbers + paragraph(words, "note")


def of_run(what: str, run: Seen, runs: list[Seen]) -> str:
    """What stands for one of several runs, with its name; for the only run, as it is."""
    if len(runs) == 1:
        return what
    return f"{pictures.shortened(run.name, 30)}, {what}"


def ledger_table(kinds: list[str], places: list[int], columns: list[tuple[Seen, str, list[float]]]) -> str:
    """The sizes in the bars of `ledger` that have parts, each (run, what the bar is, its sizes in MB)."""
    names = [f'<span class="swatch" style="{swatch(*pictures.fill_of(place))}"></span>' for place in places]
    names = [f"{name}{i + 1}. {shown(kind)}" for i, (name, kind) in enumerate(zip(names, kinds, strict=True))]
    rows = [(name, [sizes[i] for _, _, sizes in columns]) for i, name in enumerate(names) if kinds[i] != WHOLE]
    rows.append(("all of these", [sum(sizes) for _, _, sizes in columns]))
    if WHOLE in kinds:
        measured = [run.ledger["measured"].get("memory", 0) / 1e6 for run, _, _ in columns]
        rows.append((names[kinds.index(WHOLE)], measured))
    cells = [(name, *(f"{size:,.1f}" if size else "" for size in sizes)) for name, sizes in rows]
    return table(["kind, MB", *(shown(name) for _, name, _ in columns)], cells, "<" + ">" * len(columns), "sums")


PROCESS = "Python, torch, data"
REST = "holes in the heap, loading"
WHOLE = "measured, as a whole"
ORDER = (*KINDS, PROCESS, REST, WHOLE)


def bars_of(run: Seen) -> list[tuple[str, dict[str, float]]]:
    """The forecast and what was measured, each as bytes by kind; what is left of the whole is a kind too."""
    found = []
    for which in ("forecast", "measured"):
        part = run.ledger.get(which, {})
        whole = part.get("memory")
        if not whole:
            continue
        segments = {kind: size for kind, size in part.get("kinds", {}).items() if size > 0}
        if "process" in part:
            segments[PROCESS] = part["process"]
        rest = whole - sum(segments.values())
        if not segments:
            segments = {WHOLE: whole}
        elif rest > 0.001 * whole:
            segments[REST] = rest
        found.append((which, segments))
    return found


def swatch(colour: str, hatch: str) -> str:
    """The style of a small box that is filled as a segment."""
    if not hatch:
        return f"background:{colour}"
    return f"background:repeating-linear-gradient(135deg,{colour} 0 3px,{pictures.GREY} 3px 4px)"


def traced(root: dict) -> str:
    """A step as a flame graph, and the parts that take most of it by themselves."""
    drawn = ""
    if can_draw():
        svg = pictures.as_svg("trace", pictures.flame_graph, root)
        samples = [
            f'<li><span class="swatch" style="background:{colour}"></span><span>{kind}</span></li>'
            for kind, colour in pictures.KINDS.items()
        ]
        drawn = f'<ul class="legend">{"".join(samples)}</ul>' + figure(svg, "flame graph of a step", wide=True)
    rows = []
    for (name, where), (own, calls, saved) in costly(root)[:12]:
        share = f"{own / root['ms']:.1%}"
        rows.append((shown(cut(name, 60)), shown(where), f"{calls:,}", f"{own:,.2f}", share, f"{saved / 1e6:,.2f}"))
    head = ("what takes most by itself", "where", "calls", "ms", "share", "saved, MB")
    words = (
        "A box is as wide as its time; those below it are parts of it. The mouse over a box tells its name and time. "
        f"The step took {root['ms']:,.1f} ms in all."
    )
    return drawn + paragraph(words, "note") + table(head, rows, "<<>>>>")


def costly(root: dict) -> list[tuple[tuple[str, str], tuple[float, int, int]]]:
    """(name, where) -> (ms that are not of those below, calls, bytes saved for backward), the most costly first."""
    sums: dict[tuple[str, str], tuple[float, int, int]] = {}
    todo = [root]
    while todo:
        node = todo.pop()
        todo += node["children"]
        own = max(0.0, node["ms"] - sum(child["ms"] for child in node["children"]))
        where = f"{node['file']}:{node['line']}" if node["file"] else ""
        ms, calls, saved = sums.get((node["name"], where), (0.0, 0, 0))
        mine = node["saved"] - sum(child["saved"] for child in node["children"])
        sums[node["name"], where] = ms + own, calls + 1, saved + max(0, mine)
    return sorted(sums.items(), key=lambda item: -item[1][0])


def learned(runs: list[Seen]) -> str:
    """The size and rank of each layer's update."""
    told = []
    for number, run in enumerate(runs):
        if not run.learned:
            continue
        if len(runs) > 1:
            told.append(f"<h3>{shown(run.name)}</h3>")
        kinds, found = learned_panels(run.learned)
        drawn = panels(f"learned{number}-", found)
        if drawn:
            told += [legend(kinds), drawn]
        rows_at_most = LAYERS
        if len(runs) > 1:
            rows_at_most = FEW
        most = sorted(run.learned, key=lambda update: -update.norm)[:rows_at_most]
        rows = []
        for update in most:
            values = " ".join(f"{s:.2g}" for s in update.singular[:6])
            size = f"{update.norm:.2e}"
            rows.append((shown(update.layer), f"{update.rank}", f"{update.effective_rank:.2f}", size, values))
        head = ("layer", "rank", "effective rank", "|update| / |W|", "largest singular values")
        told.append(table(head, rows, "<>>><", "layers"))
        if len(most) < len(run.learned):
            told.append(paragraph(f"The {len(most)} layers that changed most, of {len(run.learned)}.", "note"))
    words = (
        "|update| / |W|: Frobenius norm of what was added to a weight over that of the weight before. Effective rank: "
        "exp of the entropy of the singular values’ shares, 1 where one direction is all."
    )
    if any(run.learned for run in runs):
        told.append(paragraph(words, "note"))
    return "".join(told)


def learned_panels(updates: list[Learned]) -> tuple[list[str], list[Panel]]:
    """(kinds of layers, the panels in which each is a curve over depth)."""
    by_kind: dict[str, list[tuple[int, Learned]]] = {}
    for update in updates:
        found = re.search(r"(?:^|\.)(\d+)\.(.+)$", update.layer)
        if found:
            by_kind.setdefault(found[2], []).append((int(found[1]), update))
    norms = []
    ranks = []
    spectra = []
    for pairs in by_kind.values():
        depth = [float(number) for number, _ in pairs]
        norms.append(Curve(depth, [update.norm or math.nan for _, update in pairs], marked=True))
        ranks.append(Curve(depth, [update.effective_rank for _, update in pairs], marked=True))
        _, most = max(pairs, key=lambda pair: pair[1].norm)
        values = [value if value > 0 else math.nan for value in most.singular]
        spectra.append(Curve([float(i + 1) for i in range(len(values))], values, marked=len(values) < 50))
    layer = "transformer layer, from 0"
    largest = "number of the singular value"
    return list(by_kind), [
        Panel("Size of the update", layer, "|update| / |W|", norms, whole=True),
        Panel("Effective rank", layer, "directions", ranks, whole=True),
        Panel("Spectrum of the most changed layers", largest, "singular value", spectra, log=True, whole=True),
    ]


def asked(runs: list[Seen]) -> str:
    """A few examples, and what the models said of them before and after: runs on the same data in one place."""
    told = []
    cards: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for run in runs:
        for one in run.asked:
            lines = cards.setdefault((one.question, one.right), [])
            whose = ""
            if len(runs) > 1:
                whose = f", {pictures.shortened(run.name, 30)}"
            if one.before is not None:
                lines.append((f"before{whose}", one.before))
            lines.append((f"after{whose}", one.after))
    for where in dict.fromkeys(run.asked_of for run in runs if run.asked):
        told.append(paragraph(shown(where), "note"))
    for (question, right), lines in cards.items():
        said = "".join(
            f"<dt>{shown(what)}</dt><dd>{shown(cut(text.strip(), LONG)) or '<i>nothing</i>'}</dd>"
            for what, text in [("right", right), *lines]
        )
        told.append(f'<article><p class="quote">{shown(cut(question.strip(), LONG))}</p><dl>{said}</dl></article>')
    return "".join(told)


def hard(runs: list[Seen]) -> str:
    """The examples whose loss stayed high: wrong labels are often among them."""
    told = []
    for run in runs:
        if not run.hard:
            continue
        if len(runs) > 1:
            told.append(f"<h3>{shown(run.name)}</h3>")
        rows = []
        for one in run.hard:
            when = "learned late"
            if one.never_learned:
                when = "<b>never learned</b>"
            losses = (f"{one.losses[0]:.3f}", f"{one.losses[-1]:.3f}")
            right = shown(cut(one.right.strip(), 60))
            rows.append((f"{one.number}", when, *losses, right, shown(cut(one.question, SHORT))))
        head = ("example", "", "loss, first epoch", "last epoch", "right", "text")
        told.append(table(head, rows, "><>><?", "hard"))
        told.append(all_never_learned(run))
    words = (
        "Numbers count the training examples from 0; losses are those of the passes that trained on them, in nats a "
        "target. Never learned: in no epoch after the first below 0.693, as if its answer had half of the probability. "
        "Wrong labels are often here."
    )
    if any(run.hard for run in runs):
        told.append(paragraph(words, "note"))
    return "".join(told)


def all_never_learned(run: Seen) -> str:
    """How many examples were never learned and, unfolded, all of them, for whoever looks for wrong labels."""
    said = f"Never learned: {len(run.never_learned):,} of {run.trained_on:,} examples"
    if not run.never_learned or len(run.never_learned) > run.trained_on / 2:  # as most texts of a language are not
        return paragraph(f"{said}.")
    numbers = ",".join(map(str, run.never_learned))
    summary = f"<summary>{said}; their numbers, the hardest first, as --without takes them</summary>"
    return f"<details>{summary}{paragraph(numbers, 'numbers')}</details>"


def options(runs: list[Seen]) -> str:
    """The options that are not the defaults, of each run."""
    names = dict.fromkeys(name for run in runs for name in run.changed)
    rows = []
    for name in names:
        cells = [shown(run.config.get(name, "–")) for run in runs]
        what = shown(f"--{name.replace('_', '-')}")
        if len(set(cells)) > 1:
            what = f"<b>{what}</b>"
        rows.append((what, *cells))
    if not rows:
        return ""
    head = ["", *(shown(run.name) for run in runs)]
    words = "What is not here has its default; the run’s config.json has all of it."
    if len(runs) > 1:
        words = "What is not here has its default. In bold: what differs between the runs."
    return table(head, rows, "<" * len(head), "facts") + paragraph(words, "note")
