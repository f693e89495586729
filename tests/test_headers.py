"""Whether the first row of a table is a header or an example: known by its names, told by --header, or asked for.

Alone: pytest tests/test_headers.py
"""

import json

import pytest
from helpers import check, reviews, small_bert
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minift.cli import main
from minift.data.examples import read_examples as read
from minift.data.labels import label_names
from minift.errors import InputError

PRAISE = ("I loved it", "positive")
BLAME = ("I hated it", "negative")


def write(path, *rows):
    path.write_text("".join(row + "\n" for row in rows))
    return path


def refused(path, *pieces, **options):
    with pytest.raises(InputError) as caught:
        read(path, **options)
    for piece in pieces:
        assert piece in str(caught.value), caught.value
    assert "\n" not in str(caught.value)


KNOWN = [
    "review,sentiment",
    "Text,Label",
    "text, label",
    "text,labels",
    " Sentence ,LABEL_ID",
    "comment,class",
    "Comments,Classes",
    "utterance,intent",
    "content,category",
    "message,Categories",
    "tweet_text,target",
    "Review Text,Sentiment Label",
    "\ufefftext,label",
    '"text","label"',
]


@pytest.mark.parametrize("header", KNOWN)
def test_a_header_of_usual_names_is_no_example(tmp_path, header):
    path = write(tmp_path / "d.csv", header, ",".join(PRAISE), ",".join(BLAME))
    examples = read(path)
    assert [(e.text, e.label) for e in examples] == [PRAISE, BLAME]
    assert label_names(examples) == ["negative", "positive"] and examples[0].where == "d.csv:2"


@pytest.mark.parametrize("header", ["label,text", "sentiment,review", "Category,Message", "class_id,Sentence"])
def test_where_the_label_is_first_texts_are_no_classes(tmp_path, header):
    path = write(tmp_path / "d.csv", header, "positive,I loved it", "negative,I hated it")
    assert label_names(read(path)) == ["negative", "positive"]


def test_tabs_numbers_and_other_columns(tmp_path):
    path = write(tmp_path / "a.tsv", "sentence\tlabel_id", "I loved it\t1", "I hated it\t0")
    assert [(e.text, e.label) for e in read(path)] == [("I loved it", "1"), ("I hated it", "0")]
    path = write(tmp_path / "b.csv", "id,Review,Rating", "7,I loved it,5", "8,I hated it,1")
    assert [(e.text, e.label) for e in read(path)] == [("I loved it", "5"), ("I hated it", "1")]
    path = write(tmp_path / "c.csv", "title,text,label", "A film,I loved it,5", "Another,I hated it,1")
    assert [e.text for e in read(path)] == ["I loved it", "I hated it"]  # exactly "text" before what is like it
    path = write(tmp_path / "d.tsv", "index\tsentence1\tsentence2\tlabel", "0\ta\tb\tx")
    assert [(e.text, e.pair, e.label) for e in read(path)] == [("a", "b", "x")]


def test_numbered_and_ordered_columns_over_a_header(tmp_path):
    path = write(tmp_path / "d.csv", "label,id,text", "positive,1,I loved it", "negative,2,I hated it")
    for columns in ("label=1,text=3", "label,_,text"):
        assert [(e.text, e.label) for e in read(path, columns)] == [PRAISE, BLAME]
    path = write(tmp_path / "e.csv", "gold,id,words", "positive,1,I loved it", "negative,2,I hated it")
    for columns in ("label=1,text=3", "label,_,text"):
        assert [(e.text, e.label) for e in read(path, columns, header="yes")] == [PRAISE, BLAME]


def test_predict_has_no_row_too_many(tmp_path):
    for header, row in (("review", "{}"), ("Text", "{}"), ("review,sentiment", "{},x"), ("id,review", "1,{}")):
        path = write(tmp_path / "d.csv", header, row.format("I loved it"), row.format("I hated it"))
        assert [e.text for e in read(path, need_label=False)] == ["I loved it", "I hated it"], header
    refused(
        write(tmp_path / "d.csv", "customer_feedback", "I loved it"),
        "d.csv:1: found ['customer_feedback'], which may be a header or an example",
        "--header yes",
        "--header no",
        "--columns",
        need_label=False,
    )


def test_two_columns_of_one_name(tmp_path):
    """csv.DictReader keeps the last, pandas renames: which one is meant has to be said."""
    path = write(tmp_path / "d.csv", "text,text,label", "a,b,x", "c,d,y")
    refused(path, "d.csv:1", "['text', 'text', 'label']", "could each be the text", "--columns text=1,label=3")
    assert [e.text for e in read(path, "text=2,label=3", header="yes")] == ["b", "d"]
    refused(write(tmp_path / "e.csv", "review,comment,label", "a,b,x"), "'review' and 'comment' could each be the text")
    refused(write(tmp_path / "f.csv", "body,body,label", "a,b,x"), "'body' and 'body'", columns="text=body,label=label")


DOUBTFUL = {
    "no usual name of a text": ("wording,label", [",".join(PRAISE), ",".join(BLAME)]),
    "numbers below": ("wording,gold", ["I loved it,1", "I hated it,0"]),
    "a text and something else": ("tweet,stuff", [",".join(PRAISE), ",".join(BLAME)]),
    "two words that never come again": ("wording,gold", [",".join(PRAISE), ",".join(BLAME)] * 5),
    "columns that were counted": ("v1,v2", ["ham,Go until", "spam,Free entry"]),
}


@pytest.mark.parametrize("header, rows", DOUBTFUL.values(), ids=DOUBTFUL)
def test_what_may_be_a_header_is_asked_about(tmp_path, header, rows):
    path = write(tmp_path / "d.csv", header, *rows)
    shown = str(header.split(","))
    refused(path, f"d.csv:1: found {shown}, which may be a header or an example", "--header yes", "--header no")
    assert len(read(path, header="yes")) == len(rows)
    assert len(read(path, header="no")) == len(rows) + 1
    told = []
    assert check(path, "classify", say=told.append).faults == {"header or example": 1} and len(told) == 1


GENUINE = [
    ["Great,positive", "Awful,negative"],
    ["Great,positive", "Awful,negative", "Bad,negative"],
    ["Great,positive", *["I loved it,positive", "I hated it,negative"] * 20],  # one word, but its class comes again
    ["Smith,English", *[f"{name},{who}" for name, who in zip("abcdefghijkl", "mnopqrstuvwx", strict=True)]],
    ["I want to talk about my intent,intent", "What is this,question"],
    ["text me when you are home,ham", "free entry,spam"],
    ["review,5", "fine,4"],
    ["1,0", "2,1"],
]


@pytest.mark.parametrize("rows", GENUINE, ids=lambda rows: rows[0])
def test_a_genuine_first_example_is_kept(tmp_path, rows):
    assert len(read(write(tmp_path / "d.csv", *rows))) == len(rows)


WORDS = st.text("abcdefghij ", min_size=3).filter(lambda t: " " in t.strip())
LABELS = st.sampled_from(["x", "y", "z"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(WORDS, LABELS), min_size=1, max_size=30))
def test_texts_of_several_words_are_never_a_header(tmp_path, rows):
    path = write(tmp_path / "d.tsv", *("\t".join(row) for row in rows))
    assert [(e.text, e.label) for e in read(path)] == rows


def test_header_no_with_names(tmp_path):
    path = write(tmp_path / "d.csv", "review,sentiment", ",".join(PRAISE))
    pieces = ("--header is no, but review, sentiment are names", "expected numbers")
    refused(path, *pieces, columns="text=review,label=sentiment", header="no")


def test_from_the_command_line(tmp_path, capsys):
    """train, eval, predict and check read the same table in the same way."""
    model, run = small_bert(tmp_path / "bert"), tmp_path / "run"
    body = reviews(tmp_path / "bare.tsv", 12).read_text()
    path = tmp_path / "d.tsv"
    path.write_text("phrase\tgold\n" + body)
    arguments = ["--model", str(model), "--data", str(path), "--out", str(run), "--steps", "1"]
    assert main(["train", *arguments]) == 1 and not run.exists()
    assert "d.tsv:1: found ['phrase', 'gold'], which may be a header" in capsys.readouterr().err
    assert main(["train", *arguments, "--header", "yes"]) == 0
    capsys.readouterr()
    assert main(["eval", "--model", str(run), "--data", str(path), "--header", "yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["examples"] == 12
    assert main(["predict", "--model", str(run), "--data", str(path), "--header", "yes"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 12
    assert main(["check", "--task", "classify", "--data", str(path), "--header", "yes"]) == 0
    assert "taken for a header: ['phrase', 'gold']" in " ".join(capsys.readouterr().out.split())


def test_excels_own_first_line(tmp_path):
    """Excel writes and reads `sep=,` before everything else."""
    path = write(tmp_path / "d.csv", "sep=,", "text,label", "a b,x", "c d,y")
    assert [e.text for e in read(path)] == ["a b", "c d"] and read(path)[0].where == "d.csv:3"
    refused(write(tmp_path / "e.csv", "sep=;", "text;label"), "e.csv:1: found 'sep=;'; expected cells between commas")


@pytest.mark.parametrize("name, row, what", [
    ("d.csv", "text;label", "semicolons"),
    ("d.csv", "I loved it;positive", "semicolons"),
    ("d.csv", "text\tlabel", "tabs"),
    ("d.csv", "text|label", "vertical bars"),
    ("d.tsv", "text,label", "commas"),
])  # fmt: skip
def test_other_separators_are_named(tmp_path, name, row, what):
    path = write(tmp_path / name, row, row)
    refused(path, f"{name}:1: found one cell, {row!r}, with {what} in it; expected cells between commas in a .csv")


def test_one_column_of_texts_may_hold_separators(tmp_path):
    path = write(tmp_path / "d.tsv", "good; really, good", "bad|worse")
    assert len(read(path, need_label=False)) == 2
