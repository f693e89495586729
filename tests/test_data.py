"""Alone: pytest tests/test_data.py   (MINIFT_ASSETS=FOLDER for the tests on real files)"""

import csv
import gzip
import json
import os
import random
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from folders import check, checked, jsonl, put, read_passages, refused
from folders import read_examples as read
from helpers import python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minift.config import LONGEST, TrainConfig
from minift.data import lines
from minift.data.examples import Example, sample, split
from minift.data.labels import label_ids, label_names
from minift.errors import InputError


def table(path):
    """(text, pair, label) of each example."""
    return [(e.text, e.pair, e.label) for e in read(path)]


def reader_of(name):
    """What reads a file of this name, and for which task."""
    return (read_passages, "complete") if name.endswith(".txt") else (read, "classify")


def labelled(*labels):
    return [Example("t", None, label, f"f.csv:{i}") for i, label in enumerate(labels, 1)]


# ---- what is read ----------------------------------------------------------------------------------------------------

ROWS = [("good film", None, "pos"), ("bad, really", None, "neg")]
FORMS = {
    "jsonl": jsonl(*({"text": t, "label": y} for t, _, y in ROWS)),
    "json": jsonl(*({"id": 1, "label": y, "text": t} for t, _, y in ROWS)),
    "csv": 'text,label\ngood film,pos\n"bad, really",neg\n',
    "tsv": "text\tlabel\ngood film\tpos\nbad, really\tneg\n",
}


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_examples(tmp_path, form, zipped):
    path = put(tmp_path / f"d.{form}{zipped}", FORMS[form])
    assert table(path) == ROWS
    assert read(path)[0].where == f"d.{form}{zipped}:{2 if form in ('csv', 'tsv') else 1}"


@pytest.mark.parametrize("form", FORMS)
def test_bom_crlf_upper_case_suffix_and_no_last_line_end(tmp_path, form):
    content = b"\xef\xbb\xbf" + FORMS[form].replace("\n", "\r\n").removesuffix("\r\n").encode()
    assert table(put(tmp_path / f"d.{form.upper()}", content)) == ROWS


def test_jsonl_skips_blank_lines_and_counts_them(tmp_path):
    path = put(tmp_path / "d.jsonl", '\n{"text": "a", "label": 1}\n \r\n{"text": "b", "label": "x"}\n\n')
    assert [(e.label, e.where) for e in read(path)] == [(1, "d.jsonl:2"), ("x", "d.jsonl:4")]


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv"])
def test_only_line_feeds_end_lines_and_nul_is_text(tmp_path, form):
    text = "a\x85b\u2028c\x0bd\x00e"
    raw = json.dumps({"text": text, "label": "x"}, ensure_ascii=False) if form == "jsonl" else f"{text},x"
    path = put(tmp_path / f"d.{form}", raw.replace(",", "\t") if form == "tsv" else raw)
    assert table(path) == [(text, None, "x")]


def test_pair_is_read_by_default_where_there_is_one(tmp_path):
    rows = [{"text": "a", "pair": "b", "label": 0}, {"text": "c", "label": 1}, {"text": "d", "pair": None, "label": 1}]
    assert table(put(tmp_path / "d.jsonl", jsonl(*rows))) == [("a", "b", 0), ("c", None, 1), ("d", None, 1)]
    assert table(put(tmp_path / "d.csv", "id,pair,label,text\n1,b,0,a\n")) == [("a", "b", "0")]


def test_columns_by_name(tmp_path):
    columns = "text=s1,pair=s2,label=gold"
    rows = put(tmp_path / "d.jsonl", jsonl({"s1": "a", "s2": "b", "gold": 3, "text": "no"}))
    for path in (rows, put(tmp_path / "d.tsv", "i\tgold\ts2\ts1\n0\t3\tb\ta\n")):
        (example,) = read(path, columns)
        assert (example.text, example.pair, str(example.label)) == ("a", "b", "3")


def test_columns_by_position(tmp_path):
    path = put(tmp_path / "d.tsv", 'ham\t1\tso "quoted\nspam\t2\twin\n')
    assert [(e.text, e.label) for e in read(path, "label, _, text")] == [('so "quoted', "ham"), ("win", "spam")]
    assert read(path, "label,_,text")[0].where == "d.tsv:1"


def test_columns_by_number(tmp_path):
    path = put(tmp_path / "d.tsv", "g\t1\t0.5\ta\tb\ng\t2\t0.7\tc\td\textra\n")
    found = [(e.text, e.pair, e.label) for e in read(path, "text=4,pair=5,label=3")]
    assert found == [("a", "b", "0.5"), ("c", "d", "0.7")]
    assert read(put(tmp_path / "p.csv", "a\n"), "text=1,label=2", need_label=False)[0].label is None


def test_csv_quotes_and_a_record_over_lines_counts_by_its_first(tmp_path):
    path = put(tmp_path / "d.csv", 'text,label\r\n"a ""b""\r\nc, d",x\r\ne,y\r\n')
    assert [(e.text, e.where) for e in read(path)] == [('a "b"\r\nc, d', "d.csv:2"), ("e", "d.csv:4")]


def test_csv_takes_texts_longer_than_the_csv_modules_limit(tmp_path):
    assert len(read(put(tmp_path / "d.csv", "a" * 200_000 + ",x\n"))[0].text) == 200_000


def test_labels_may_lack_where_they_are_not_needed(tmp_path):
    cases = {
        "none.jsonl": (jsonl({"text": "a"}, {"text": "b", "label": None}), [None, None]),
        "some.jsonl": (jsonl({"text": "a", "label": 1}, {"text": "b"}), [1, None]),
        "bare.csv": ("a\nb\n", [None, None]),
        "bare.tsv": ("a\tx\nb\ty\n", ["x", "y"]),
        "head.csv": ("text\na\nb\n", [None, None]),
        "cell.csv": ("text,label\na,\nb,y\n", [None, "y"]),
    }
    for name, (content, labels) in cases.items():
        found = read(put(tmp_path / name, content), need_label=False)
        assert [(e.text, e.label) for e in found] == list(zip("ab", labels, strict=True)), name


def test_folder_per_class(tmp_path):
    for name, content in {"pos/2.txt": "two\r\nlines\n", "pos/10.txt": "\ufeffe\u0301", "neg/1.txt": "no"}.items():
        (tmp_path / "reviews" / name).parent.mkdir(parents=True, exist_ok=True)
        put(tmp_path / "reviews" / name, content)
    put(tmp_path / "reviews" / "README", "not an example")
    put(tmp_path / "reviews" / "pos" / ".DS_Store", "nor this")
    assert read(tmp_path / "reviews") == [
        Example("no", None, "neg", "reviews/neg/1.txt"),
        Example("e\u0301", None, "pos", "reviews/pos/10.txt"),
        Example("two\nlines", None, "pos", "reviews/pos/2.txt"),
    ]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
PAIRS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(rows=PAIRS, ascii=st.booleans())
def test_what_json_writes_comes_back(tmp_path, rows, ascii):
    lines = [json.dumps({"text": t, "label": y}, ensure_ascii=ascii) + "\n" for t, y in rows]
    assert table(put(tmp_path / "d.jsonl", "".join(lines))) == [(t, None, y) for t, y in rows]


@quick
@given(rows=PAIRS, form=st.sampled_from([{}, {"lineterminator": "\n", "quoting": csv.QUOTE_ALL}]))
def test_what_csv_writes_comes_back(tmp_path, rows, form):
    with open(tmp_path / "d.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, **form).writerows([("text", "label"), *rows])
    assert table(tmp_path / "d.csv") == [(t, None, y) for t, y in rows]


@quick
@given(raw=st.binary(max_size=200), form=st.sampled_from(["jsonl", "csv", "tsv", "csv.gz"]))
def test_any_bytes_are_read_or_refused_with_the_name(tmp_path, raw, form):
    path = tmp_path / f"d.{form}"
    path.write_bytes(raw)
    try:
        assert all(e.text.strip() for e in read(path))
    except InputError as error:
        assert f"d.{form}" in str(error)


# ---- faults ----------------------------------------------------------------------------------------------------------

GOOD = '{"text": "a", "label": 1}\n'
JSONL_FAULTS = {
    '{"text": "a", "label": }': ("not JSON", "Expecting value at column 24", "found '{", "one JSON object"),
    '["a", 1]': ("['a', 1] (list)", "expected one JSON object per line"),
    "[" * 100_000: ("not JSON", "expected one JSON object"),
    '{"text": "a", "label": ' + "9" * 5000 + "}": ("not JSON", "expected one JSON object"),
    '{"txt": "a", "label": 1}': ("no field text", "['txt', 'label']", "expected text, label"),
    '{"id": 7}': ("no field text, label", "['id']"),
    '{"text": 12, "label": 1}': ("text is 12 (int)", "expected a string"),
    '{"text": null, "label": 1}': ("text is None (NoneType)", "expected a string"),
    '{"text": "a", "label": true}': ("label is True (bool)", "a string or an integer"),
    '{"text": "a", "label": 1.0}': ("label is 1.0 (float)", "a string or an integer"),
    '{"text": "a", "label": null}': ("label is None", "a string or an integer"),
    '{"text": "a", "label": ["' + "x" * 99 + '"]}': ("label is ['xxxx", "x... (list)"),
    '{"text": " \\n", "label": 1}': (r"text is empty, ' \n'", "expected some text"),
    '{"text": "a", "label": " "}': ("label is empty, ' '",),
    '{"text": "a", "pair": "", "label": 1}': ("pair is empty, ''",),
    '{"text": "a", "pair": 3, "label": 1}': ("pair is 3 (int)",),
    '{"text": "a \\ud83d", "label": 1}': (r"lone surrogate '\ud83d' at character 2",),
}


@pytest.mark.parametrize("line", JSONL_FAULTS, ids=lambda line: line[:40])
def test_a_jsonl_fault_names_file_line_found_and_expected(tmp_path, line):
    path = put(tmp_path / "bad.jsonl", GOOD + "\n" + line + "\n" + GOOD)
    message = refused(read, path, "bad.jsonl:3: ", *JSONL_FAULTS[line])
    assert "\n" not in message and len(message) < 300


TABLE_FAULTS = {
    "d.csv": {
        "a,x\nb\n": ("d.csv:2: found 1 cells, ['b']; expected 2: text, label",),
        "a,x\n\n": ("d.csv:2: found 0 cells", "expected 2"),
        "text,label\na,b,c\n": ("d.csv:2: found 3 cells, ['a', 'b', 'c']; expected 2, as in the header",),
        "text,label\n ,x\na,\n": ("d.csv:2: text is empty, ' '", "d.csv:3: label is empty, ''"),
        'a,x\n"b\nc,y\n': ("d.csv:2: not CSV", "unexpected end of data", "at line 3", "expected cells"),
        'a,x\n"b"c,y\n': ("d.csv:2: not CSV",),
        "tweet_words,label\na,x\n": ("d.csv:1: found ['tweet_words', 'label'], which may be a header", "--header no"),
        "": ("d.csv: found no rows; expected at least one",),
        "text,label\n": ("d.csv: found no rows",),
    },
    "d.tsv": {
        "a\tx\nb\ty\tz\n": ("d.tsv:2: found 3 cells, ['b', 'y', 'z']; expected 2: text, label",),
        "\tx\n": ("d.tsv:1: text is empty",),
        "a\tx\n\n": ("d.tsv:2: found 1 cells, ['']",),
    },
    "d.jsonl": {"": ("d.jsonl: found no rows",), "\n\n": ("d.jsonl: found no rows",)},
}


@pytest.mark.parametrize("name, content", [(name, content) for name in TABLE_FAULTS for content in TABLE_FAULTS[name]])
def test_a_table_fault_names_file_line_found_and_expected(tmp_path, name, content):
    refused(read, put(tmp_path / name, content), *TABLE_FAULTS[name][content])


def test_names_in_no_header(tmp_path):
    path = put(tmp_path / "d.csv", "id,sentence,gold\n1,a,x\n")
    words = ("d.csv:1", "['id', 'sentence', 'gold']", "expected one with review, gold")
    refused(read, path, *words, columns="text=review,label=gold")
    refused(read, path, "d.csv:1: found 3 cells", "expected 2: text, label")
    refused(read, path, "d.csv:1: found 3 cells", "expected 8 or more", columns="text=2,label=8")
    refused(read, path, "d.csv:1", "expected one with 2, gold", columns="text=2,label=gold")
    path = put(tmp_path / "e.csv", "body,label\n,x\n")
    refused(read, path, "text (column 'body') is empty", columns="text=body,label")


@pytest.mark.parametrize("columns", ["text", "label", "text,label,text", "text=,label", "body,label", "text;label"])
def test_columns_that_make_no_sense(tmp_path, columns):
    path = put(tmp_path / "d.csv", "a,b\n")
    refused(read, path, f"--columns {columns!r}", "expected", "text, pair, label", columns=columns)


def test_missing_file_and_unknown_kind(tmp_path):
    refused(read, tmp_path / "gone.csv", "gone.csv", "no such file")
    for name in ("d.parquet", "d.txt.gz", "data"):
        refused(read, put(tmp_path / name, "x"), name, "unknown kind", ".jsonl, .json, .csv, .tsv", ".gz", "sub-folder")


@pytest.mark.parametrize("name", ["d.jsonl", "d.tsv", "d.csv", "d.csv.gz"])
def test_latin_1_names_line_and_byte(tmp_path, name):
    bad = {"d.jsonl": '{"text": "caf\xe9", "label": 1}\n', "d.tsv": "caf\xe9\tx\n"}.get(name, "caf\xe9,x\n")
    good = bad.replace("\xe9", "e")
    at = bad.index("\xe9")
    path = put(tmp_path / name, (good + bad).encode("latin-1"))
    message = refused(read, path, f"{name}:2: byte offset {at} of the line holds 0xe9", "UTF-8", "latin-1")
    assert "\n" not in message


def test_five_faults_are_told_at_once(tmp_path):
    lines = [GOOD, "x\n"] * 5
    message = refused(read, put(tmp_path / "d.jsonl", "".join(lines)), "d.jsonl:2", "d.jsonl:10")
    assert message.count("\n") == 4 and "stopped" not in message
    message = refused(read, put(tmp_path / "d.jsonl", "".join(lines + lines)), "d.jsonl:2", "d.jsonl:10")
    assert message.splitlines()[5:] == ["... stopped after 5 faults"]


def test_a_fault_that_ends_the_reading_comes_after_those_before_it(tmp_path):
    message = refused(read, put(tmp_path / "d.csv", 'text,label\n,x\n"b\nc,y\n'))
    assert [line.split(": ")[0] for line in message.splitlines()] == ["d.csv:2", "d.csv:3"]


def test_truncated_and_corrupt_gz(tmp_path):
    raw = gzip.compress("".join(f"text {random.Random(i).random()}\tx\n" for i in range(5000)).encode())
    for content in (raw[:-2000], raw[:-4], raw[:5000] + b"\xff" * 500 + raw[5500:], b"not compressed\tx\n"):
        (tmp_path / "d.tsv.gz").write_bytes(content)
        refused(read, tmp_path / "d.tsv.gz", "d.tsv.gz:", "truncated or corrupt", "expected a whole gzip file")


def test_folder_faults(tmp_path):
    refused(read, tmp_path, "without sub-folders", "expected one sub-folder of .txt files per class")
    (tmp_path / "pos").mkdir()
    refused(read, tmp_path, "no rows")
    put(tmp_path / "pos" / "a.txt", b"one\ncaf\xe9")
    put(tmp_path / "pos" / "b.txt", " \n")
    put(tmp_path / "pos" / "c.pdf", "x")
    refused(read, tmp_path, "pos/a.txt:2: byte offset 3", "pos/b.txt: text is empty", "pos/c.pdf: not a .txt file")


# ---- what is no text -------------------------------------------------------------------------------------------------

RUSSIAN = "текст и слово\tметка\nещё\tдва\n"
LINES = '{"text": "a b", "label": "c"}\n'


@pytest.mark.parametrize("text", [RUSSIAN, LINES, "ab\tc\nde\tf\n", "שלום עולם\tא\n"], ids=["ru", "en", "short", "he"])
@pytest.mark.parametrize("encoding, advice", [
    ("utf-16", "utf-16"), ("utf-16-le", "utf-16le"), ("utf-16-be", "utf-16be"), ("utf-32", "utf-32"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["d.tsv", "d.jsonl", "d.txt", "d.csv.gz"])
def test_utf_16_is_told_with_the_command_that_converts_it(tmp_path, name, encoding, advice, text):
    """With a byte order mark, as Excel's "Unicode text" is saved, and without. It was called latin-1, or trained."""
    path = put(tmp_path / name, text.encode(encoding))
    call, task = reader_of(name)
    converts = f"(`iconv -f {advice} -t utf-8` converts it)"
    refused(call, path, f"{name}:1: is {advice.upper()}; expected UTF-8 {converts}")
    report, told = checked(path, task)
    assert report.faults == {"not UTF-8": 1} and len(told) == 1
    raw = subprocess.run(["iconv", "-f", advice, "-t", "utf-8"], input=text.encode(encoding), capture_output=True)
    assert raw.returncode == 0 and raw.stdout.decode().removeprefix("\ufeff") == text


@quick
@given(st.text(st.characters(min_codepoint=9, exclude_categories=["Cs"]), min_size=1))
def test_utf_8_is_never_taken_for_utf_16(text):
    assert lines._wide(text.encode()) == ""


@pytest.mark.parametrize("start, what", [
    (b"PK\x03\x04", "a zip archive, as .xlsx"),
    (b"\x1f\x8b\x08", "compressed by gzip"),
    (b"PAR1", "a Parquet file"),
    (b"%PDF-1.4", "a PDF"),
    (b"\xd0\xcf\x11\xe0", "an older Excel"),
])  # fmt: skip
def test_other_kinds_of_file_under_a_wrong_name(tmp_path, start, what):
    for name in ("d.csv", "d.tsv", "d.jsonl"):
        (tmp_path / name).write_bytes(start + b"\x00\xff\n" * 9)
        refused(read, tmp_path / name, f"{name}:1: the file is {what}", "expected text in UTF-8")


def special(tmp_path, kind):
    path = tmp_path / "d.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        path.symlink_to(kind)
    return path


@pytest.mark.parametrize("kind", ["pipe", "socket", "/dev/zero", "/dev/urandom", "/dev/null"])
@pytest.mark.parametrize("call", [read, read_passages, check])
def test_data_are_regular_files(tmp_path, kind, call):
    """Nothing is opened: a pipe without a writer would wait for ever, /dev/zero is one line without an end."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("no such things here")
    path = special(tmp_path, kind)
    what = "a pipe or a socket" if kind in ("pipe", "socket") else "a device"
    told, words = [], f"{path}: is {what}; expected a regular file"
    thread = threading.Thread(target=lambda: told.append(refused(call, path, words)), daemon=True)
    thread.start()
    thread.join(5)
    assert told


def test_a_pipe_in_a_folder_of_classes(tmp_path):
    (tmp_path / "d/pos").mkdir(parents=True)
    os.mkfifo(tmp_path / "d/pos/a.txt")
    refused(read, tmp_path / "d", "d/pos/a.txt: is a pipe or a socket; expected a regular file")
    refused(read_passages, tmp_path / "d", "is a folder; expected a regular file")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.tsv", "d.txt", "d.jsonl.gz"])
def test_a_line_of_more_than_4_mib(tmp_path, name):
    text = "ab " * 1_500_000
    rows = {"jsonl": jsonl({"text": text, "label": "x"}), "csv": f"{text},x\n", "tsv": f"{text}\tx\n", "txt": text}
    path = put(tmp_path / name, rows[name.split(".")[1]])
    call, task = reader_of(name)
    size = f"{len(rows[name.split('.')[1]]):,}"
    refused(call, path, f"{name}:1: found a line of {size} bytes; expected fewer than {LONGEST:,} (--max-line)")
    assert len(call(path, max_line=0)) == len(call(path, max_line=1 << 23)) == 1
    report, told = checked(path, task)
    assert report.faults["line too long"] == 1 and "(--max-line)" in told[0]


@pytest.mark.slow
def test_a_record_and_a_text_of_more_than_4_mib(tmp_path):
    """In lines that are short: a quote that is never closed makes one record of a whole CSV file."""
    path = put(tmp_path / "d.csv", 'text,label\n"' + "ab,x\n" * 900_000)
    refused(read, path, "d.csv:2: not CSV, field larger than field limit", "expected cells")
    (tmp_path / "f/pos").mkdir(parents=True)
    put(tmp_path / "f/pos/a.txt", "ab\n" * 1_500_000)
    refused(read, tmp_path / "f", "f/pos/a.txt: found a text of 4,500,000 bytes; expected fewer than 4,194,304")
    assert len(read(tmp_path / "f", max_line=0)) == 1


@pytest.mark.slow
def test_a_line_of_100_mb_is_never_held(tmp_path):
    """The peak of a fresh process that is refused it, beside one that is refused a short line."""
    code = """
import re, sys
from minift.data import examples
from minift.errors import InputError
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
try:
    list(examples.stream_examples(sys.argv[1]))
except InputError as error:
    assert "--max-line" in str(error)
    print(peak() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to measure memory")
    path = put(tmp_path / "d.jsonl", b'{"text": "' + b"x" * 100_000_000 + b'", "label": 1}\n')
    assert int(python(code, path)) < 20_000_000


def test_names_and_texts_are_shown_without_what_a_terminal_acts_on(tmp_path):
    rows = '{"te\\u001b[0mxt": 1}\n{"text": "\\u001b]0;", "label": 1.5}\nx\x1b\n'
    path = put(tmp_path / "a\x1b[31m\nb.jsonl", rows)
    message = refused(read, path, r"a\x1b[31m\nb.jsonl:1: no field text")
    assert all(line.isprintable() for line in message.split("\n"))
    refused(read, tmp_path / "c\x1b.csv", r"c\x1b.csv: no such file")
    _, told = checked(path, "classify")
    assert told and all(line.isprintable() for line in told)


def test_class_folders_whose_names_are_no_utf_8(tmp_path):
    """As a folder packed on an old Windows is: check ended in a traceback when it printed them."""
    folder = os.fsencode(tmp_path) + b"/d/caf\xe9"
    try:
        os.makedirs(folder)
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    for name in (b"one.txt", b"tw\xf6.txt"):
        with open(folder + b"/" + name, "w") as file:
            file.write("text")
    message = refused(read, tmp_path / "d", r"d/caf\udce9/one.txt: label has the lone surrogate '\udce9'")
    report, told = checked(tmp_path / "d", "classify")
    assert report.faults == {"lone surrogate": 2, "no examples": 1} or report.faults == {"lone surrogate": 2}
    assert all(text.encode() for text in (message, str(report), *told))


def test_keys_that_stand_twice(tmp_path):
    """json.loads keeps the last of them without a word."""
    path = put(tmp_path / "d.jsonl", '{"text": "a", "label": 1}\n{"text": "a", "text": "b", "label": 1}\n')
    refused(read, path, "d.jsonl:2: not JSON, the key 'text' is there twice")
    chat = '{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}\n'
    refused(read_passages, put(tmp_path / "c.jsonl", chat), "the key 'role' is there twice")


@pytest.mark.parametrize("content, what, command", [
    ('[{"text": "a", "label": 1}, {"text": "b", "label": 2}]\n', "a JSON array of objects", "jq -c '.[]'"),
    ('[\n  {"text": "a", "label": 1}\n]\n', "a JSON array over several lines", "jq -c '.[]'"),
    ('\n{\n  "text": "a",\n  "label": 1\n}\n', "a JSON object over several lines", "jq -c ."),
])  # fmt: skip
def test_json_that_is_not_one_object_a_line(tmp_path, content, what, command):
    path = put(tmp_path / "d.json", content)
    for call in (read, read_passages):
        message = refused(call, path, f"found {what}; expected one object per line (`{command}` converts it)")
        assert "\n" not in message


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "0", "1", "1.5", "-0.1", "NaN"])
def test_valid_is_a_file_or_a_fraction(value):
    with pytest.raises(ValueError, match=f"--valid is '{value}'; expected a file, or a fraction above 0 and below 1"):
        TrainConfig(valid=value).check()
    refused(split, list(range(10)), f"--valid {float(value)}", "of 10 examples", fraction=float(value), seed=0)
    TrainConfig(valid="0.2").check()
    TrainConfig(valid="1.jsonl").check()


def test_patience_needs_a_validation():
    with pytest.raises(ValueError, match="--patience is 3 without --valid; expected one"):
        TrainConfig(patience=3).check()
    TrainConfig(patience=3, valid="0.1").check()


def test_header_and_max_line_are_judged():
    with pytest.raises(ValueError, match="--header is 'maybe'; expected one of auto, yes, no"):
        TrainConfig(header="maybe").check()
    with pytest.raises(ValueError, match="--max-line is -1; expected at least 0"):
        TrainConfig(max_line=-1).check()
    refused(read_passages, "d.jsonl", "--header has no meaning here", header="no")


# ---- classes and parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels, names", [
    (["pos", "neg", "pos"], ["neg", "pos"]),
    ([1, 0, 1], ["0", "1"]),
    (["1", "0", "2"], ["0", "1", "2"]),
    (list(range(12)), [str(i) for i in range(12)]),
    (["10", "9"], ["9", "10"]),
    ([5, 1, 3], ["1", "3", "5"]),
    (["1", "x"], ["1", "x"]),
    ([0, "1"], ["0", "1"]),
])  # fmt: skip
def test_label_names(labels, names):
    assert label_names(labelled(*labels)) == names
    assert [names[i] for i in label_ids(labelled(*labels), names)] == [str(label) for label in labels]


def test_label_names_given_and_refused():
    assert label_names(labelled(0, 0), "negative, positive") == ["negative", "positive"]
    refused(label_names, labelled("ham", "ham"), "['ham']", "expected two or more")
    for given_names in ("one", "a,a", "a,,b"):
        refused(label_names, labelled(0, 1), f"--labels {given_names!r}", "expected two or more", given=given_names)


def test_label_ids_by_name_or_index():
    assert label_ids(labelled("pos", 0, "1", "neg"), ["neg", "pos"]) == [1, 0, 1, 0]
    words = ("f.csv:2: unknown label 'Pos'", "expected one of neg, pos", "f.csv:3: unknown label 2", "f.csv:4")
    refused(label_ids, labelled("pos", "Pos", 2, -1), *words, names=["neg", "pos"])
    refused(label_ids, labelled(*"abcdef"), "stopped after 5 faults", names=["neg", "pos"])
    refused(label_ids, labelled(1, 0), "unknown label 0", names=["1", "2", "3"])  # no other way to write "1"


def test_split_and_sample():
    train, valid = split(list(range(100)), 0.1, seed=1)
    assert len(valid) == 10 and sorted(train + valid) == list(range(100))
    assert train == sorted(train) and valid == sorted(valid)
    assert (train, valid) == split(list(range(100)), 0.1, seed=1) != split(list(range(100)), 0.1, seed=2)
    some = sample(list(range(100)), 7, seed=1)
    assert len(some) == 7 and some == sorted(some)
    assert some == sample(list(range(100)), 7, seed=1) != sample(list(range(100)), 7, seed=2)
    assert sample([1, 2, 3], 3, seed=0) == [1, 2, 3]
    for fraction in (0.0, 0.01, 1.0, 2.0, -0.5):
        refused(split, list(range(10)), f"--valid {fraction}", "of 10 examples", fraction=fraction, seed=0)
    refused(sample, list(range(10)), "--limit 11", "has 10 examples", n=11, seed=0)


# ---- real files ------------------------------------------------------------------------------------------------------


def test_sst2(assets):
    folder = assets / "data" / "sst2-sentences"
    parts = {name: read(folder / f"{name}.tsv") for name in ("train", "dev", "test")}
    assert [len(part) for part in parts.values()] == [6920, 872, 1821]
    assert label_names(parts["train"]) == ["0", "1"] and parts["train"][-1].where == "train.tsv:6920"
    assert sum(label_ids(parts["dev"], ["negative", "positive"])) == 444


def test_sms_spam(assets):
    path = assets / "data" / "sms-spam" / "SMSSpamCollection.tsv"
    examples = read(path, "label,text")
    assert len(examples) == 5574 and label_names(examples) == ["ham", "spam"]
    assert sum(label_ids(examples, ["ham", "spam"])) == 747


@pytest.mark.slow
def test_rte(assets):
    folder, columns = assets / "data" / "glue-rte", "text=sentence1,pair=sentence2,label=label"
    train = read(folder / "train.tsv", columns)
    assert len(train) == 2490 and train[0].where == "train.tsv:2" and train[0].pair.startswith("Weapons of Mass")
    assert label_names(train) == ["entailment", "not_entailment"]
    test = read(folder / "test.tsv", columns, need_label=False)
    assert len(test) == 3000 and {e.label for e in test} == {None}
    refused(read, folder / "test.tsv", "test.tsv:1", "expected one with sentence1, sentence2, label", columns=columns)


@pytest.mark.slow
def test_imdb(assets):
    examples = read(assets / "data" / "imdb" / "train.jsonl.gz")
    assert len(examples) == 25_000 and sum(label_ids(examples, ["neg", "pos"])) == 12_500
    assert examples[-1].where == "train.jsonl.gz:25000"


def test_rotten_tomatoes_as_latin_1_and_as_a_folder_per_class(assets, tmp_path):
    source = assets / "data" / "rt-polarity"
    refused(read, source / "rt-polarity.neg", "unknown kind of file '.neg'")
    for label in ("neg", "pos"):
        raw = (source / f"rt-polarity.{label}").read_bytes()
        path = put(tmp_path / "rt.tsv", raw)
        refused(read, path, "rt.tsv:", "byte offset", "latin-1", columns="text", need_label=False)
        (tmp_path / "rt" / label).mkdir(parents=True)
        for i, line in enumerate(raw.decode("latin-1").split("\n")[:300]):
            put(tmp_path / "rt" / label / f"{i:04}.txt", line)
    examples = read(tmp_path / "rt")
    assert len(examples) == 600 and sum(label_ids(examples, ["neg", "pos"])) == 300
    text = (source / "rt-polarity.neg").read_bytes().decode("latin-1")  # with U+0085, a line end to splitlines()
    assert len(read(put(tmp_path / "rt.tsv", text), "text", need_label=False)) == 5331 < len(text.splitlines())
