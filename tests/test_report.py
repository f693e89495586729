"""`minift report`: the page is whole, safe and says what is missing; no text in a picture lies on another.

python -m pytest tests/test_report.py
"""

import itertools
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from folders import write
from helpers import fails, model_and_data, small_gpt2, works

from minift import reporting
from minift.measure import pictures, report
from minift.measure.pictures import Curve, Panel

pytest.importorskip("matplotlib")

FORECASTS = True  # conftest.py
FULL = "train --model {t}/model --data {t}/train.tsv --valid {t}/valid.tsv --out {t}/full --epochs 2"
LORA = FULL.replace("/full", "/lora") + " --method lora --rank 2"
GPT2 = "train --model {t}/gpt2 --task complete --data {t}/facts.jsonl --out {t}/gpt --method lora --rank 2 --epochs 1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a full run, a LoRA run, and one of a language model; read only."""
    folder = model_and_data(tmp_path_factory.mktemp("runs"), 24, 8)
    small_gpt2(folder / "gpt2")
    fact = {"prompt": "A <b>bold</b> question & its", "completion": " answer."}
    write(folder / "facts.jsonl", *[fact] * 8)
    for line in (FULL, LORA, GPT2):
        works(line, t=folder)
    losses = [{"epoch": e, "example": i, "loss": 3.0 if i == 5 else 1 - 0.4 * e} for e in range(2) for i in range(24)]
    write(folder / "full/examples.jsonl", *losses)
    return folder


@pytest.fixture
def full(runs, tmp_path) -> Path:
    """A copy of the full run, to be changed."""
    return shutil.copytree(runs / "full", tmp_path / "full")


class Page(HTMLParser):
    """A page as a browser reads it: its elements, its text, what each refers to. Fails where tags are crossed."""

    EMPTY = {"meta", "br"}

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.text, self.drawn, self.rows = [], [], []
        self.tags: set[str] = set()
        self.names: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name == "id":
                self.names.append(value)
            if name in ("href", "src", "action", "data"):
                self.links.append(value)
            self.links += re.findall(r"url\(([^)]*)\)", value or "")
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            (self.drawn if "svg" in self.open else self.text).append(data)

    @property
    def words(self) -> str:
        return "\n".join(self.text)


def page_of(*folders: Path, options: str = "") -> Page:
    """The report of some runs, as it is read."""
    out = folders[0].parent / "report.html"
    out.unlink(missing_ok=True)
    places = {f"r{i}": folder for i, folder in enumerate(folders)}
    names = " ".join(f"{{{name}}}" for name in places)
    said = works(f"report {names} --out {{out}} {options}", out=out, **places)
    assert said.out.strip() == str(out)
    text = out.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w|@import|javascript:", text)
    page = Page(text)
    assert all(link.startswith("#") and link[1:] in page.names for link in page.links), page.links
    assert len(set(page.names)) == len(page.names)
    assert not page.tags & {"script", "img", "link", "iframe", "object", "base", "form"}
    return page


@pytest.mark.slow
def test_a_full_run_and_a_lora_run(runs):
    page = page_of(runs / "full", runs / "lora", runs / "gpt")
    for name in ("Loss, training", "Accuracy, held out", "Throughput", "Effective rank", "optimizer step", "tokens/s"):
        assert name in page.drawn, name
    for words in (
        "full",
        "lora",
        "blame, praise",
        "bert.encoder.layer.1.attention.self.query",
        "never learned",
        "--rank",
    ):
        assert words in page.words, words
    assert (
        "there is no “before”: classifier.weight, classifier.bias were drawn at random" in page.words
    )  # the head is new
    assert "before, gpt" in page.words and "A <b>bold</b> question & its" in page.words


@pytest.mark.slow
def test_the_example_that_was_never_learned(runs):
    """The one whose loss stayed at 3 comes first, with its text and its label."""
    page = page_of(runs / "full", options="--examples 0")
    assert page.words.count("never learned") == 1
    text, label = (runs / "train.tsv").read_text().splitlines()[5].split("\t")
    at = page.text.index("never learned")
    assert page.text[at - 1 : at + 5] == ["5", "never learned", "3.000", "3.000", label, text]
    at = page.text.index("Never learned: 1 of 24 examples; their numbers, the hardest first, as --without takes them")
    assert page.text[at + 1] == "5"


@pytest.mark.slow
def test_one_run_says_what_the_others_would(runs):
    """Its weights, steps and best validation are those of its files."""
    page = page_of(runs / "lora")
    steps = [json.loads(line) for line in (runs / "lora/metrics.jsonl").read_text().splitlines()]
    best = max(step["eval/accuracy"] for step in steps if "eval/accuracy" in step)
    assert f"accuracy {best:.4g}" in page.words and "6, 2 epochs" in page.words
    ledger = json.loads((runs / "lora/ledger.json").read_text())
    for size in (ledger["forecast"]["kinds"]["frozen weights"], ledger["measured"]["memory"]):
        assert f"{size / 1e6:,.1f}" in page.text


@pytest.mark.slow
def test_masked_words_and_running_text(runs, tmp_path):
    """A masked word is asked about before and after; of running text nothing is."""
    write(tmp_path / "texts.jsonl", *[{"text": "the film was great and the plot is fine"}] * 8)
    write(tmp_path / "book.txt", *["the film was great and the plot is fine"] * 40)
    works("train --model {r}/model --task fill --data {t}/texts.jsonl --steps 2 --out {t}/fill", r=runs, t=tmp_path)
    works("train --model {r}/gpt2 --task complete --data {t}/book.txt --steps 2 --out {t}/book", r=runs, t=tmp_path)
    page = page_of(tmp_path / "fill", options="--examples 1")
    assert "the film was great [MASK] the plot is fine" in page.text and "and" in page.text
    assert "none held out" in page.words and "nothing was held out" in page.words
    page = page_of(tmp_path / "book")
    assert "of running text nothing is asked" in page.words


@pytest.mark.slow
def test_names_and_texts_are_not_markup(runs, tmp_path):
    """What stands in a run's name, options, data and trace is shown as it is."""
    name = "<img src=x onerror=alert(1)>&\"'$x_1$\n\x1b日本"
    folder = shutil.copytree(runs / "full", tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    config["columns"] = "</td><script>alert(1)</script>"
    config["targets"] = "\u202e\x1b[31m"
    (folder / "config.json").write_text(json.dumps(config))
    write(folder / "metrics.jsonl", {"train/<script>alert(2)</script>": 1.0, "train/global_step": 1})
    node = {"name": "<script>alert(3)</script>", "kind": "step", "ms": 1.0, "children": []}
    write(tmp_path / "trace.json", node)
    page = page_of(folder, runs / "lora", options=f"--trace {tmp_path}/trace.json --examples 0")
    assert (
        name.replace("\n", "").replace("\x1b", r"\x1b") in page.words.replace("\n", "")
        and "</td><script>alert(1)</script>" in page.text
    )
    assert r"\u202e\x1b[31m" in page.text
    assert "<script>alert(3)</script>" in page.words and "<script>alert(3)</script>" in page.drawn
    assert any("<script>alert(2)" in text for text in page.drawn)


def without(name):
    return lambda run: (run / name).unlink()


def killed(run):
    for name in ("best", "last"):
        shutil.rmtree(run / name)


def half_a_line(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"train/loss": 0.')


def odd_values(run):
    """What an older or a foreign writer might leave: no number, several processes, a step twice, steps missing."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[1]["train/loss"] = None
    rows[2]["train/grad_norm"] = "large"
    rows[3]["train/tokens_per_second"] = math.nan
    write(run / "metrics.jsonl", *rows[:4], rows[3], rows[-1])


def empty(run):
    (run / "metrics.jsonl").write_text("")
    (run / "ledger.json").write_text("[]")
    (run / "examples.jsonl").write_text('{"epoch": 0}\n')


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("metrics.jsonl"), ["results.csv has less"]),
        (without("config.json"), ["there is no config.json"]),
        (without("ledger.json"), ["there is no ledger.json"]),
        (without("examples.jsonl"), ["there is no examples.jsonl"]),
        (killed, ["the run is not finished", "the model cannot be loaded"]),
        (half_a_line, ["1 line of metrics.jsonl cannot be read"]),
        (odd_values, ["steps are missing in 1 places"]),
        (empty, ["ledger.json: found list", "examples.jsonl has no losses"]),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_is_missing_is_said(change, said, full):
    change(full)
    page = page_of(full)
    for words in said:
        assert words in page.words, page.words
    assert page.drawn or change is empty


@pytest.mark.slow
def test_data_that_are_gone(runs, full):
    """The examples cannot be asked about; everything else is there."""
    config = json.loads((full / "config.json").read_text())
    (full / "config.json").write_text(json.dumps(config | {"data": "nowhere.tsv"}))
    page = page_of(full)
    assert "the examples cannot be read: nowhere.tsv" in page.words and "Effective rank" in page.drawn


def test_without_matplotlib(runs, monkeypatch):
    """One line says what would install it, and the tables stay."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = page_of(runs / "lora")
    assert page.words.count('pip install "minift[plots]"') == 1 and not page.drawn
    assert "bert.encoder.layer.1.attention.self.query" in page.words


def test_what_is_no_run_or_no_trace(runs, tmp_path):
    write(tmp_path / "trace.json", {"name": "step"})
    (tmp_path / "empty").mkdir()
    fails("report {t}/nothing --out {t}/r.html", "nothing: no such folder", t=tmp_path)
    fails("report {t}/empty --out {t}/r.html", "found no config.json", t=tmp_path)
    fails("report {r}/full --trace {t}/trace.json --out {t}/r.html", "--trace", "expected", r=runs, t=tmp_path)
    fails("report --out {t}/r.html", "RUN is missing", code=2, t=tmp_path)
    fails("report {r}/full", "--out is missing", code=2, r=runs)
    write(tmp_path / "r.html", "mine")
    fails("report {r}/full --out {t}/r.html", "is there already", r=runs, t=tmp_path)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/run", "b/run"], ["a/run", "b/run"]),
        (["a/x", "a/y"], ["x", "y"]),
        (["a", "a"], ["a (1)", "a (2)"]),
    ],
)
def test_names_tell_runs_apart(paths, names):
    assert reporting.names_of([Path(path) for path in paths]) == names


def test_a_running_mean_begins_at_the_first_value_and_passes_over_gaps():
    assert report.smoothed([2.0, math.nan, 2.0])[::2] == pytest.approx([2, 2])
    assert report.smoothed([0.0] * 100 + [1.0])[-1] == pytest.approx(0.1, rel=1e-3)


# ---- pictures

LONG = "a-very-long-name-of-a-run-with-everything-that-was-chosen-in-it-lr-1e-4-batch-8-seed-"


def texts_of(figure) -> list[tuple[str, object]]:
    """(text, its box) of everything that is written in a figure: matplotlib keeps labels that it does not draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # settles the layout
    drawn = []

    def note(text, renderer):
        drawn.append(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", note)
        canvas.draw()
    found = [text for text in drawn if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in found]


def check_texts(figure) -> list[str]:
    """No text lies on another or leaves the figure."""
    found = texts_of(figure)
    whole = figure.bbox
    for text, box in found:
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1, text
    for (one, a), (other, b) in itertools.combinations(found, 2):
        apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0
        assert apart, f"{one!r} lies on {other!r}"
    return [text for text, _ in found]


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-7, 1, 12345])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("steps", [1, 40, 1_000_000])
def test_no_text_lies_on_another_in_curves(scale, log, steps):
    x = [steps * i / 20 for i in range(1, 21)]
    curves = [Curve(x, [scale * (1 + 0.1 * i + 1 / (1 + k)) for k in range(20)]) for i in range(5)]
    panel = Panel("Spectrum of the most changed layers", "optimizer step", "nats a target", curves, log, whole=True)
    texts = check_texts(pictures.draw(pictures.curves, panel))
    assert {"optimizer step", "nats a target"} <= set(texts) and len(texts) >= 5


@pytest.mark.parametrize("n", [1, 5])
def test_no_text_lies_on_another_in_bars(n):
    rows = []
    for i in range(n):
        rows.append((f"{LONG}{i}, forecast", [3.0, 0.1, 5, 5, 0, 80, 6, 4, 5, 0]))
        rows.append((f"{LONG}{i}, measured", [0.0] * 9 + [100]))
    texts = check_texts(pictures.draw(pictures.stacked_bars, rows, list(range(10))))
    assert "memory at the peak, MB" in texts and "100 MB" in texts


def tree(depth: int, width: int, ms: float, name: str = "a.module.with.a.long.name") -> dict:
    """A trace of so many levels below the root, each node with so many parts."""
    children = [tree(depth - 1, width, 0.9 * ms / width, f"{name}.{i}") for i in range(width)] if depth else []
    return {"name": name, "kind": "module", "file": "", "line": "", "ms": ms, "saved": 0, "children": children}


def test_no_text_lies_on_another_in_a_flame_graph():
    texts = check_texts(pictures.draw(pictures.flame_graph, tree(5, 4, 23.4)))
    assert "time within the step, ms" in texts and "a.module.with.a.long.name" in texts


def test_the_same_picture_has_the_same_text():
    panel = Panel("A", "step", "nats", [Curve([0, 1], [1, 2]), None, Curve([0], [1])])
    assert pictures.as_svg("a", pictures.curves, panel) == pictures.as_svg("a", pictures.curves, panel)


def test_thirty_five_lines_are_told_apart():
    assert len({pictures.style(i) for i in range(35)}) == 35


def test_what_takes_most_by_itself():
    """The time of a node's parts is theirs."""
    leaf = {"name": "slow", "kind": "kernel", "file": "k.cpp", "line": "7", "ms": 6.0, "saved": 8, "children": []}
    root = tree(0, 0, 10.0, "root") | {"saved": 10, "children": [leaf, leaf | {"ms": 1.0}]}
    found = report.costly(root)
    assert found == [(("slow", "k.cpp:7"), (7.0, 2, 16)), (("root", ""), (3.0, 1, 0))]
