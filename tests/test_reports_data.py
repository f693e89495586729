"""Twenty circumstances of public bug reports about data files, labels and prompts, each as a small input.

Those that went wrong here too are mended; the others are kept because they went wrong elsewhere. The report stands in
the docstring as REPOSITORY#NUMBER.

Alone: pytest tests/test_reports_data.py
"""

import pytest
import torch
from folders import check, checked, jsonl, put, read_passages, refused
from folders import read_examples as read
from helpers import fails, peer, reviews, small_bert, works
from transformers import BertForSequenceClassification

import minift
from minift.data.labels import label_names


def both_refuse(path, task, *pieces):
    """Training and check, in the same words."""
    refused({"classify": read, "complete": read_passages}[task], path, *pieces)
    report, told = checked(path, task)
    assert not report.ok
    for piece in pieces:
        assert piece in "\n".join(told), told


@pytest.mark.parametrize("name, content", [
    ("d.csv", "text,label\rI loved it,p\rI hated it,n\r"),
    ("d.tsv", "I loved it\tp\rI hated it\tn\r"),
    ("d.jsonl", '{"text": "a", "label": 1}\r{"text": "b", "label": 2}\r'),
])  # fmt: skip
def test_lines_that_end_in_cr_alone(tmp_path, name, content):
    """huggingface/datasets#622: it was told as too many cells, Extra data, or Python's universal-newline mode."""
    both_refuse(put(tmp_path / name, content), "classify", f"{name}:1: the lines end in CR alone", "`tr '\\r' '\\n'")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_what_unicode_calls_a_line_end(tmp_path, separator):
    """huggingface/datasets#3729: 12 rows too many. Only LF ends a line here."""
    text = f"one{separator}two"
    assert read(put(tmp_path / "d.tsv", f"{text}\tx\n"))[0].text == text
    assert read_passages(put(tmp_path / "d.txt", text))[0].parts == ((text, True),)


def test_words_that_mean_nothing_to_pandas(tmp_path):
    """huggingface/datasets#4467: the word "null" became None. A cell is what stands in it."""
    words = ["null", "None", "NA", "nan", "N/A", "NULL", "#N/A", "-"]
    path = put(tmp_path / "d.csv", "text,label\n" + "".join(f"{word},{word}\n" for word in words))
    assert [(e.text, e.label) for e in read(path)] == [(word, word) for word in words]


def test_scores_are_no_classes(tmp_path):
    """yahoojapan/JGLUE#3, huggingface/transformers#9393: a regression's 26 scores were 26 classes, here too."""
    path = put(tmp_path / "d.tsv", "a b\t4.75\nc d\t0.5\ne f\t3.000\n")
    refused(label_names, read(path), "['0.5', '3.000', '4.75'], scores and not classes; expected whole")
    small_bert(tmp_path / "bert")
    line = "train --model {f}/bert --data {f}/d.tsv --out {f}/run --steps 1"
    fails(line, "scores and not classes", f=tmp_path)
    assert not (tmp_path / "run").exists()
    works(f"{line} --labels 0.5,3.000,4.75", f=tmp_path)
    whole = put(tmp_path / "e.csv", "text,label\na b,1.0\nc d,0.0\n")  # pandas, of a column with a gap
    assert label_names(read(whole)) == ["0.0", "1.0"]


def test_minus_one_that_stands_for_no_label(tmp_path):
    """huggingface/datasets#296, #1452, #1963, #2275: SNLI's -1 was learned as a class of its own, here too."""
    path = put(tmp_path / "d.jsonl", jsonl(*({"text": f"a {i}", "label": i} for i in (-1, 0, 1, 2))))
    words = "-1 may stand for no label, as in SNLI; expected labelled examples alone, or --labels=-1,0,1,2"
    refused(label_names, read(path), words)
    assert label_names(read(path), "-1,0,1,2") == ["-1", "0", "1", "2"]
    for scale in ((-1, 0, 1), (-1, 1), (-2, -1, 0, 1, 2)):  # scales about 0 are classes
        path = put(tmp_path / "e.jsonl", jsonl(*({"text": f"a {i}", "label": i} for i in scale)))
        assert sorted(map(int, label_names(read(path)))) == list(scale)


def test_files_that_were_joined_with_their_headers(tmp_path):
    """wireservice/csvkit#197, whitfin/s3-concat#3: the second header was an example of the class "label"."""
    one = "text,label\nI loved it,p\nI hated it,n\n"
    path = put(tmp_path / "d.csv", one + one)
    both_refuse(path, "classify", "d.csv:4: found the header once more, ['text', 'label']")


def test_an_empty_folder_of_a_class(tmp_path):
    """pytorch/vision#4925: a class less, without a word. Hidden folders (#2831, #109) are no classes."""
    for name in ("neg", "pos", "so-so", ".ipynb_checkpoints"):
        (tmp_path / "d" / name).mkdir(parents=True)
    for name in ("neg/1.txt", "pos/1.txt", ".ipynb_checkpoints/1.txt", "pos/.DS_Store"):
        put(tmp_path / "d" / name, "text")
    both_refuse(tmp_path / "d", "classify", "d/so-so: a class without examples; expected at least one .txt file")
    (tmp_path / "d/so-so").rmdir()
    assert label_names(read(tmp_path / "d")) == ["neg", "pos"]


def test_nulls_where_other_rows_have_a_key(tmp_path):
    """huggingface/datasets#7222, #8027: a column that only some rows have is written as null in the others."""
    user = {"role": "user", "content": "Hi.", "weight": None, "name": None, "tool_calls": None}
    assistant = {"role": "assistant", "content": "Hello.", "weight": None, "tool_calls": None, "refusal": None}
    path = put(tmp_path / "d.jsonl", jsonl({"messages": [user, assistant], "tools": None}))
    assert read_passages(path)[0].parts[-1] == ("Hello.", True) and check(path, say=print).ok
    path = put(tmp_path / "e.jsonl", jsonl({"text": "a", "pair": None, "label": 1, "idx": None}))
    assert read(path)[0].pair is None


@pytest.mark.parametrize("row, words", [
    ([[{"from": "human", "value": "a"}]], "found [[{'from': 'human', 'value': 'a'}]] (list); expected one JSON object"),
    ({"messages": "[]"}, "messages is '[]'"),
    ({"data": []}, "found ['data']"),
])  # fmt: skip
def test_containers_of_other_shapes(tmp_path, row, words):
    """unslothai/unsloth#321: a list of lists; 'list' object has no attribute 'keys'."""
    both_refuse(put(tmp_path / "d.jsonl", jsonl(row)), "complete", "d.jsonl:1: ", words)


@pytest.mark.parametrize("line, words", [
    ('{"text": "a", "label": 1,}', "not JSON"),
    ("{'text': 'a', 'label': 1}", "Expecting property name enclosed in double quotes at column 2"),
    ('{"text": "a", "label": 1}{"text": "b", "label": 1}', "Extra data at column 26"),
    ('{"text": "a\tb", "label": 1}', "Invalid control character"),
    ('{"text": NaN, "label": 1}', "text is nan (float)"),
])  # fmt: skip
def test_what_is_almost_json(tmp_path, line, words):
    """zai-org/GLM-4#591, wandb/rai-toolkit#82: the row was that of a chunk, and not of the file."""
    good = '{"text": "a", "label": 1}\n'
    both_refuse(put(tmp_path / "d.jsonl", good + "\n" + line + "\n" + good), "classify", "d.jsonl:3: ", words)


def test_tabs_in_a_csv(tmp_path):
    """huggingface/transformers#13178: Expected 1 fields in line 10, saw 2."""
    path = put(tmp_path / "d.csv", "sentence\tlabel\ngood, really\t1\n")
    both_refuse(path, "classify", "d.csv:1: found one cell, 'sentence\\tlabel', with tabs in it")


def test_quotes_in_a_tsv_are_letters(tmp_path):
    """pytorch/text#349, #612, pytorch/audio#2838: a quote at the start of a line swallowed the lines after it."""
    path = put(tmp_path / "d.tsv", 'a " c\tb\n" b c\ta\n"Second\tsecond\n')
    assert [(e.text, e.label) for e in read(path)] == [('a " c', "b"), ('" b c', "a"), ('"Second', "second")]


def test_apostrophes_in_a_csv_are_letters(tmp_path):
    """ludwig-ai/ludwig#201: Expected 83 fields in line 40, saw 92."""
    path = put(tmp_path / "d.csv", "category,name\nfashion,Men 'S Shoes\nfashion,Boys' Recycolor T-Shirt\n")
    assert [e.text for e in read(path, "text=name,label=category")] == ["Men 'S Shoes", "Boys' Recycolor T-Shirt"]


def test_texts_without_a_header(tmp_path):
    """dotnet/machinelearning-modelbuilder#933, ayrna/skordinal#149: the first example was taken for a header."""
    path = put(tmp_path / "d.tsv", "Wow... Loved this place.\t1\nCrust is not good.\t0\n")
    assert len(read(path)) == 2
    path = put(tmp_path / "e.csv", "1,0\n2,1\n3,0\n")
    assert len(read(path)) == 3


def test_labels_that_differ_from_the_checkpoints_in_case(tmp_path):
    """huggingface/optimum#197: MNLI's entailment is 0 in the dataset, and ENTAILMENT 2 in roberta-large-mnli."""
    names = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
    peer(BertForSequenceClassification, tmp_path, num_labels=3, id2label=names)
    wanted = ["contradiction", "entailment", "neutral"]
    own, _ = minift.load(tmp_path, task="classify")
    found, _ = minift.load(tmp_path, task="classify", labels=wanted, ordered=False)
    assert found.labels == ["contradiction", "neutral", "entailment"] and not found.report.relabelled
    assert torch.equal(found.head.out.weight, own.head.out.weight)
    given, _ = minift.load(tmp_path, task="classify", labels=wanted)
    assert given.labels == wanted and torch.equal(given.head.out.weight, own.head.out.weight[[0, 2, 1]])


def test_scores_stand_beside_their_own_labels(tmp_path):
    """huggingface/setfit#462, #587: probabilities in sorted order beside labels in another."""
    model, tokenizer = minift.load(small_bert(tmp_path / "bert"), task="classify", labels=["zeta", "alpha", "mid"])
    path = reviews(tmp_path / "d.tsv", 10)
    for row in minift.predict(model, tokenizer, minift.PredictConfig(data=str(path))):
        assert list(row["scores"]) == ["zeta", "alpha", "mid"]
        assert row["label"] == max(row["scores"], key=row["scores"].get)


def test_a_prompt_that_ends_in_a_space(tmp_path):
    """karpathy/llama2.c#180, allenai/allennlp#4484: the space belongs to the word after it, so what follows is odd."""
    rows = [{"prompt": "2 + 2 = ", "completion": "4"}, {"prompt": "2 + 2 =", "completion": " 4"}]
    report = check(put(tmp_path / "d.jsonl", jsonl(*rows)), say=print)
    words = "prompt ends in a space, which belongs before the first word of the completion: 1 (line 1)"
    assert report.ok and words in report.warnings


@pytest.mark.parametrize("message, words", [
    ({"role": "model", "content": "b"}, "message 2: role is 'model'; expected one of system, developer, user, assist"),
    ({"role": "Assistant", "content": "b"}, "message 2: role is 'Assistant'"),
    ({"role": "assistant", "content": [{"type": "text", "text": "b"}]}, "message 2: content is [{'type'"),
    ({"role": "assistant", "content": ""}, "message 2: content is "),
])  # fmt: skip
def test_messages_of_other_shapes(tmp_path, message, words):
    """huggingface/trl#2083, unslothai/unsloth#2095: all labels were -100. One fault is told, not two."""
    path = put(tmp_path / "d.jsonl", jsonl({"messages": [{"role": "user", "content": "a"}, message]}))
    assert "\n" not in refused(read_passages, path, f"d.jsonl:1: {words}")
    assert not check(path, say=print).ok


def test_a_text_alone_to_be_learned(tmp_path):
    """huggingface/trl#4110: which part is the prompt? A text alone is the completion of an empty one, which is said."""
    path = put(tmp_path / "d.jsonl", jsonl({"text": "all of it"}))
    both_refuse(path, "complete", "d.jsonl:1: ", "found ['text']", "`jq -c '{prompt: \"\", completion: .text}'`")


def test_a_file_that_is_empty(tmp_path):
    """karpathy/nanoGPT#440: nothing was written into train.bin, without a word."""
    for name in ("d.txt", "d.jsonl", "d.jsonl.gz"):
        path = put(tmp_path / name, "\n" if name.endswith(".gz") else "")
        refused(read_passages, path, f"{name}: found nothing to read; expected at least one example")
        assert check(path, say=print).faults == {"no examples": 1}
