"""Whether the first row of a table is a header or an example: known by its names, told by --header, or asked for.

Alone: pytest tests/test_headers.py
"""

import pytest
from folders import checked, put, refused, write
from folders import read_examples as read
from helpers import fails, reviews, small_bert, works
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minift.data.labels import label_names

PRAISE = ("I loved it", "positive")
BLAME = ("I hated it", "negative")


def refuses(path, *pieces, **options):
    assert "\n" not in refused(read, path, *pieces, **options)


KNOWN = [
    "review,sentiment", "Text,Label", "text, label", "text,labels", " Sentence ,LABEL_ID", "comment,class",
    "Comments,Classes", "utterance,intent", "content,category", "message,Categories", "tweet_text,target",
    "Review Text,Sentiment Label", "\ufefftext,label", '"text","label"',
]  # fmt: skip


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
    path = write(tmp_path / "d.csv", "customer_feedback", "I loved it")
    words = "d.csv:1: found ['customer_feedback'], which may be a header or an example"
    refuses(path, words, "--header yes", "--header no", "--columns", need_label=False)


def test_two_columns_of_one_name(tmp_path):
    """csv.DictReader keeps the last, pandas renames: which one is meant has to be said."""
    path = write(tmp_path / "d.csv", "text,text,label", "a,b,x", "c,d,y")
    refuses(path, "d.csv:1", "['text', 'text', 'label']", "could each be the text", "--columns text=1,label=3")
    assert [e.text for e in read(path, "text=2,label=3", header="yes")] == ["b", "d"]
    refuses(write(tmp_path / "e.csv", "review,comment,label", "a,b,x"), "'review' and 'comment' could each be the text")
    refuses(write(tmp_path / "f.csv", "body,body,label", "a,b,x"), "'body' and 'body'", columns="text=body,label=label")


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
    refuses(path, f"d.csv:1: found {shown}, which may be a header or an example", "--header yes", "--header no")
    assert len(read(path, header="yes")) == len(rows)
    assert len(read(path, header="no")) == len(rows) + 1
    report, told = checked(path, "classify")
    assert report.faults == {"header or example": 1} and len(told) == 1


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
    refuses(path, *pieces, columns="text=review,label=sentiment", header="no")


def test_from_the_command_line(tmp_path):
    """train, eval, predict and check read the same table in the same way."""
    small_bert(tmp_path / "bert")
    body = reviews(tmp_path / "bare.tsv", 12).read_text()
    places = dict(data=put(tmp_path / "d.tsv", "phrase\tgold\n" + body), out=tmp_path / "run", f=tmp_path)
    line = "train --model {f}/bert --data {data} --out {out} --steps 1"
    fails(line, "d.tsv:1: found ['phrase', 'gold'], which may be a header", **places)
    assert not places["out"].exists()
    works(f"{line} --header yes", **places)
    assert works("eval --model {out} --data {data} --header yes --json", **places).last["examples"] == 12
    assert len(works("predict --model {out} --data {data} --header yes", **places).rows) == 12
    told = works("check --task classify --data {data} --header yes", **places).out
    assert "taken for a header: ['phrase', 'gold']" in " ".join(told.split())


def test_excels_own_first_line(tmp_path):
    """Excel writes and reads `sep=,` before everything else."""
    path = write(tmp_path / "d.csv", "sep=,", "text,label", "a b,x", "c d,y")
    assert [e.text for e in read(path)] == ["a b", "c d"] and read(path)[0].where == "d.csv:3"
    refuses(write(tmp_path / "e.csv", "sep=;", "text;label"), "e.csv:1: found 'sep=;'; expected cells between commas")


@pytest.mark.parametrize("name, row, what", [
    ("d.csv", "text;label", "semicolons"),
    ("d.csv", "I loved it;positive", "semicolons"),
    ("d.csv", "text\tlabel", "tabs"),
    ("d.csv", "text|label", "vertical bars"),
    ("d.tsv", "text,label", "commas"),
])  # fmt: skip
def test_other_separators_are_named(tmp_path, name, row, what):
    path = write(tmp_path / name, row, row)
    refuses(path, f"{name}:1: found one cell, {row!r}, with {what} in it; expected cells between commas in a .csv")


def test_one_column_of_texts_may_hold_separators(tmp_path):
    path = write(tmp_path / "d.tsv", "good; really, good", "bad|worse")
    assert len(read(path, need_label=False)) == 2
