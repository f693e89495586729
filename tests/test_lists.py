"""Lists instead of files: the same examples, the same checks, the same messages but for the place.

python -m pytest tests/test_lists.py
"""

import json

import pytest
from folders import read_examples, read_passages
from helpers import small_bert
from hypothesis import given, settings
from hypothesis import strategies as st

import minift
from minift.data.examples import Example, examples_from
from minift.data.passages import passages_from
from minift.errors import InputError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(0, 1) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
TEXT_ROWS = st.fixed_dictionaries({}, optional={key: JSON for key in ("text", "pair", "label")})
MESSAGES = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", "bot"]), "content": JSON, "weight": JSON}
)
DIALOGUE_ROWS = st.fixed_dictionaries({}, optional={"prompt": JSON, "completion": JSON}) | st.fixed_dictionaries(
    {"messages": st.lists(MESSAGES, max_size=3) | JSON}
)


def outcome(read, *args, **options):
    """What is read, or what is said against it, without the places."""
    try:
        found = read(*args, **options)
    except InputError as error:
        return [line.partition(": ")[2] or line for line in str(error).split("\n")]
    return [tuple(getattr(e, name) for name in e.__slots__ if name != "where") for e in found]


@pytest.mark.parametrize("need_label", [True, False])
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_labelled_texts_are_judged_as_in_a_file(tmp_path_factory, need_label, data):
    assert_as_a_file(
        tmp_path_factory, examples_from, read_examples, need_label, data.draw(st.lists(TEXT_ROWS, min_size=1))
    )


@pytest.mark.parametrize("need_label", [True, False])
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_dialogues_are_judged_as_in_a_file(tmp_path_factory, need_label, data):
    rows = data.draw(st.lists(DIALOGUE_ROWS, min_size=1))
    assert_as_a_file(tmp_path_factory, passages_from, read_passages, need_label, rows)


def assert_as_a_file(folders, from_list, from_file, need_label, rows):
    path = folders.mktemp("data") / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = outcome(from_file, path, need_label=need_label)
    assert outcome(from_list, rows, labelled=need_label) == expected


def test_texts_and_pairs_need_no_dictionary():
    rows = ["a text", ("a", "pair"), ["b", None], {"text": "c", "pair": "d", "more": 1}, {"text": "e", "label": 3}]
    assert [(e.text, e.pair, e.label) for e in examples_from(rows, labelled=False)] == [
        ("a text", None, None),
        ("a", "pair", None),
        ("b", None, None),
        ("c", "d", None),
        ("e", None, 3),
    ]
    assert examples_from(iter([{"text": "a", "label": "x"}])) == [Example("a", None, "x", "example 1")]


def test_prompts_may_be_strings_and_chats_dictionaries():
    chat = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
    prompts = passages_from(["Once", {"prompt": "upon"}, chat], labelled=False)
    assert [p.parts for p in prompts] == [
        (("Once", False),),
        (("upon", False),),
        (("<|user|>\nHi.\n<|assistant|>\n", False),),
    ]
    (trained,) = passages_from([chat])
    assert trained.parts[-1] == ("Hello.", True) and trained.where == "example 1" and not trained.plain


@pytest.mark.parametrize(
    "rows, words",
    [
        (["a", {"text": "b", "label": 1}], "example 1: no field label; found ['text'], expected text, label"),
        ([{"text": "b", "label": 1}, 3], "example 2: found 3 (int); expected a text, a pair of texts, or text, label"),
        ([("a", "b", "c")], "example 1: found ('a', 'b', 'c') (tuple); expected a text, a pair of texts"),
        ([{"text": " ", "label": 1}], "example 1: text is empty, ' '; expected some text"),
        ([{"text": "b", "label": 1.5}], "example 1: label is 1.5 (float); expected a string or an integer"),
        ([{"text": "\ud83d", "label": 1}], "example 1: text has the lone surrogate"),
        ([], "found an empty list; expected at least one example"),
        ("a text", "found 'a text' (str); expected a list of examples"),
        ({"text": "a", "label": 1}, "(dict); expected a list of examples"),
        ([{}] * 7, "... stopped after 5 faults"),
    ],
)
def test_what_is_wrong_names_the_example(rows, words):
    with pytest.raises(InputError) as error:
        examples_from(rows)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "rows, words",
    [
        (["a"], "example 1: found 'a' (str); expected a dictionary with prompt and completion, or messages"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "example 2: no field completion; found ['prompt']"),
        ([{"messages": []}], "example 1: messages is []; expected a list of at least one message"),
        ([{"messages": [{"role": "bot", "content": "a"}]}], "example 1: message 1: role is 'bot'; expected one of"),
        ([], "found an empty list; expected at least one example"),
    ],
)
def test_what_is_wrong_names_the_passage(rows, words):
    with pytest.raises(InputError) as error:
        passages_from(rows)
    assert words in str(error.value)


def test_a_model_without_the_right_head_says_so(tmp_path):
    body, tokenizer = minift.load(small_bert(tmp_path))
    with pytest.raises(minift.InputError, match="the model has no head, so nothing can be asked of it"):
        minift.predict(body, tokenizer, ["good"])
    with pytest.raises(minift.InputError, match="the model has no head"):
        minift.prepare(body)
    classifier, tokenizer = minift.load(tmp_path, task="classify", labels=["no", "yes"])
    with pytest.raises(minift.InputError, match="the model has a head for classify; expected one that generates text"):
        minift.generate(classifier, tokenizer, ["good"])
