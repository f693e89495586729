"""Running text as a file of tokens: the blocks of a list in memory, begun once, gone on with, found again.

python -m pytest tests/test_corpus.py
"""

import json
import os
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from folders import names_in, put, read_passages, refused
from helpers import fails, losses, python, small_bert, small_gpt2, works
from hypothesis import given, settings
from hypothesis import strategies as st

import minift
from minift import files
from minift.checkpoints.resume import fingerprint, latest
from minift.data import corpus, passages
from minift.data.examples import at
from minift.data.tokenizer import read_tokenizer
from minift.runs import prepare_run, set_aside
from minift.tasks import complete
from minift.training import loop

TEXT = "".join(f"line {n} of a text, {'long ' * (n % 7)}\n" for n in range(3000))  # seven pieces


@pytest.fixture(autouse=True, scope="module")
def small_groups():
    """Tokenised about a piece at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "CHARACTERS", 20_000)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """gpt2/, whose tokens are bytes, and bert/, whose tokenizer puts [CLS] in front."""
    folder = tmp_path_factory.mktemp("corpus")
    small_gpt2(folder / "gpt2")
    small_bert(folder / "bert")
    return folder


@pytest.fixture(scope="module")
def tokenizers(folder):
    return {name: read_tokenizer(folder / name) for name in ("gpt2", "bert")}


@pytest.fixture
def letters(tokenizers):
    return tokenizers["gpt2"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache folder of one test: where its texts are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/minift/text"


def same(one, other) -> bool:
    """Whether two sequences are alike in all they have."""
    arrays = all(
        np.array_equal(a, b) and a.dtype == b.dtype
        for a, b in ((one.ids, other.ids), (one.rows, other.rows), (one.targets, other.targets))
    )
    return arrays and (one.number, one.types, one.cut) == (other.number, other.types, other.cut)


def tokens_in(folder):
    """The content of the one text in a cache folder, apart from what names its source."""
    (kept,) = folder.iterdir()
    return [(kept / name).read_bytes() for name in (corpus.TOKENS, corpus.ENDS)]


def make(path, tokenizer) -> list[int]:
    """What `tokenise` yields for a file."""
    return list(corpus.tokenise(corpus.read_all(complete.stream(path))[0].text, tokenizer))


# the same blocks


LINES = st.lists(st.text(st.characters(codec="utf-8", min_codepoint=32), max_size=30), min_size=1, max_size=30)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["gpt2", "bert"]), LINES, st.integers(1, 40), st.integers(1, 30), st.data())
def test_blocks_are_those_of_a_list(tokenizers, tmp_path_factory, name, lines, piece, length, data):
    """Of all pieces of a text, and of some: special tokens in front, neighbours and gaps, pieces without any token."""
    folder = tmp_path_factory.mktemp("text")
    path = put(folder / "d.txt", "a" + "\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(passages, "PIECE", piece)
        whole = corpus.read_all(complete.stream(path))
        chosen = data.draw(st.lists(st.sampled_from(range(len(whole))), min_size=1, unique=True).map(sorted))
        encode = partial(complete.encode, model=None, tokenizer=tokenizers[name], max_length=length)
        try:
            expected = encode(list(at(read_passages(path), chosen)))
        except minift.InputError:
            refused(encode, [whole[i] for i in chosen], "nothing to learn from; expected two tokens or more")
            return
        found = encode([whole[i] for i in chosen])
    assert len(found) == len(expected) and all(map(same, found, expected))
    assert all(map(same, found[1::2], expected[1::2])) and same(found[-1], expected[-1])
    assert fingerprint(found) == fingerprint(expected)
    with pytest.raises(IndexError):
        found[len(expected)]


@pytest.mark.parametrize("length", [5, 10**6])
def test_blocks_without_an_overlap(length, letters, cache, tmp_path):
    """Every token is in one block, as a task wants it that puts tokens of its own around each."""
    pieces = corpus.read_all(complete.stream(put(tmp_path / "d.txt", TEXT)))

    def make(numbers: list, blocks: list) -> list:
        return [(number, tokens.tolist()) for number, tokens in zip(numbers, blocks, strict=True)]

    found = corpus.blocks(pieces, letters, length, 0, make)
    assert [i for _, ids in found for i in ids] == letters.encode([TEXT])[0].ids
    assert [number for number, _ in found] == list(range(len(found)))
    assert all(len(ids) == length for _, ids in found[:-1])


def test_large_ids(letters, cache, tmp_path, monkeypatch):
    """A vocabulary of more than 65,536 takes uint32."""
    path = put(tmp_path / "d.txt", "ab\n")
    monkeypatch.setattr(letters, "vocab_size", 65536)
    assert make(path, letters) == [0, 1] and [len(part) for part in tokens_in(cache)] == [6, 8]
    monkeypatch.setattr(letters, "vocab_size", 65537)
    monkeypatch.setattr(letters, "digest", lambda: "another")
    (piece,) = corpus.read_all(complete.stream(path))
    assert list(corpus.tokenise(piece.text, letters)) == [0, 1]
    found = corpus.find(piece.text, letters)
    assert found.kind == np.uint32 and found.read(0, 3).tolist() == letters.encode(["ab\n"])[0].ids


@pytest.mark.slow
def test_a_run_is_the_run_of_a_list(folder, cache, tmp_path):
    """--valid and --limit choose the same pieces: losses and the fingerprints of the data, to the bit."""
    path = put(tmp_path / "d.txt.gz", TEXT)
    options = dict(data=str(path), valid="0.3", limit=3, task="complete", steps=3, lr=1e-3, max_length=50)
    for name in ("list", "text"):
        config = minift.TrainConfig(out=str(tmp_path / name), kernels="reference", **options)
        model, tokenizer = minift.load(folder / "gpt2", task="complete")
        examples = set_aside(config, read_passages(path)) if name == "list" else None
        job, sequences, held_out = prepare_run(model, tokenizer, config, examples)
        loop(job, tokenizer, sequences, held_out)
    states = [json.loads((latest(tmp_path / name) / "state.json").read_text()) for name in ("list", "text")]
    assert losses(tmp_path / "list") == losses(tmp_path / "text")
    assert all(states[0][key] == states[1][key] for key in ("data", "valid", "best"))


# made once


def test_a_text_is_tokenised_once(folder, cache, tmp_path):
    """The second run says so, and does not; one byte more is another text."""
    path = put(tmp_path / "d.txt", TEXT)
    line = "train --model {f}/gpt2 --task complete --data {d} --out {out} --steps 1 --kernels reference"
    said = works(line, f=folder, d=path, out=tmp_path / "a")
    assert f"d.txt: {len(TEXT):,} tokens in {cache}/" in said.err and "piece 7/7" in said.err
    said = works(line, f=folder, d=path, out=tmp_path / "b")
    assert "from before" in said.err and "piece" not in said.err and len(names_in(cache)) == 1
    put(path, TEXT + "x")
    said = works(line, f=folder, d=path, out=tmp_path / "c")
    assert f"d.txt: {len(TEXT) + 1:,} tokens" in said.err and len(names_in(cache)) == 2


def test_the_key_is_of_all_that_tokens_depend_on(folder, tokenizers, tmp_path, monkeypatch):
    def key(content, name="d.txt", tokenizer=tokenizers["gpt2"]):
        return corpus.key_of(corpus.read_all(complete.stream(put(tmp_path / name, content)))[0].text, tokenizer)

    plain = key("ab\n")
    assert key("ab\n", "e.txt") == plain  # whatever the file is called
    more = read_tokenizer(folder / "gpt2")
    more.backend.add_tokens(["ab"])
    keys = [key("ac\n"), key("ab"), key("ab\n", tokenizer=more), key("ab\n", tokenizer=tokenizers["bert"])]
    monkeypatch.setattr(passages, "PIECE", 99)
    assert len({plain, key("ab\n"), *keys}) == 6


@pytest.mark.parametrize("name", [corpus.TOKENS, corpus.ENDS, corpus.STATE, files.MANIFEST])
def test_a_damaged_file_is_made_anew(name, letters, cache, tmp_path):
    path = put(tmp_path / "d.txt", TEXT)
    make(path, letters)
    whole = tokens_in(cache)
    (kept,) = cache.iterdir()
    (kept / name).write_bytes((kept / name).read_bytes()[:-3])
    assert make(path, letters)[-1] == 7 and tokens_in(cache) == whole and len(names_in(cache)) == 1
    kept.chmod(0o777)  # what others could have written
    assert make(path, letters)[-1] == 7


def test_faults_are_found_before_anything_is_made(folder, cache, tmp_path):
    path = put(tmp_path / "d.txt", TEXT.encode() + b"caf\xe9\n")
    line = "train --model {f}/gpt2 --task complete --data {d} --out {out} --kernels reference"
    fails(line, "d.txt:3001: byte offset 3", f=folder, d=path, out=tmp_path / "out")
    assert not cache.exists() and not (tmp_path / "out").exists()


def test_a_text_that_changes_leaves_nothing(letters, cache, tmp_path):
    path = put(tmp_path / "d.txt", TEXT)
    text = corpus.read_all(complete.stream(path))[0].text
    work = corpus.tokenise(text, letters)
    assert [next(work), next(work)][1] > 0
    put(path, TEXT + "more\n")
    refused(list, work, "d.txt: has changed while it was read")
    assert not names_in(cache)


# killed, and two at once

CODE = """
import os, signal, sys, time
from minift import files
from minift.data import corpus
from minift.data.tokenizer import read_tokenizer
from minift.tasks import complete
model, path, where, at = sys.argv[1:]
corpus.CHARACTERS = 20_000
owner = {"write_state": corpus, "seal": files, "rename": os}[where]
real, calls = getattr(owner, where), 0
def call(*arguments):
    global calls
    calls += 1
    time.sleep(0.05)
    if calls == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
setattr(owner, where, call)
print(*corpus.tokenise(corpus.read_all(complete.stream(path))[0].text, read_tokenizer(model)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, where, at, done", [
    ("d.txt", "write_state", 3, 4),
    ("d.txt.gz", "write_state", 2, 2),
    ("d.txt", "write_state", 1, 0),
    ("d.txt", "seal", 1, 7),
    ("d.txt", "rename", 1, 7),
])  # fmt: skip
def test_killed_it_goes_on_from_there(name, where, at, done, folder, letters, cache, tmp_path, monkeypatch):
    """To the same bytes; what was written beyond the state, when it was killed, is cut off."""
    path = put(tmp_path / name, TEXT)
    line = [sys.executable, "-c", CODE, folder / "gpt2", path, where, str(at)]
    killed = subprocess.run(line, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (partial,) = cache.glob("*.partial")
    (partial / ".minift-0123456789abcdef.tmp").write_text("what a killed process leaves")

    texts = []
    encode = letters.encode
    monkeypatch.setattr(letters, "encode", lambda words, **options: (texts.extend(words), encode(words, **options))[1])
    steps = make(path, letters)
    assert steps[0] == done and steps[-1] == 7
    assert texts == [p.parts[0][0] for p in read_passages(path)[done:]]  # none of them twice
    assert names_in(cache / names_in(cache)[0]) == sorted(corpus.FILES)

    found = tokens_in(cache)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "undisturbed"))
    assert make(path, letters)[0] == 0 and tokens_in(tmp_path / "undisturbed/minift/text") == found


@pytest.mark.slow
def test_two_processes_at_once(folder, letters, cache, tmp_path):
    """One of them makes it, the other waits for that one."""
    path = put(tmp_path / "d.txt", TEXT)
    line = [sys.executable, "-c", CODE, folder / "gpt2", path, "write_state", "0"]
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate()[0].split() for process in both)
    assert said[0] == [] and said[1][0] == "0" and said[1][-1] == "7" and [p.returncode for p in both] == [0, 0]
    assert not make(path, letters) and len(names_in(cache)) == 1
    assert np.frombuffer(tokens_in(cache)[0], np.uint16).tolist() == letters.encode([TEXT])[0].ids


@pytest.mark.slow
def test_processes_of_one_run(folder, cache, tmp_path):
    """The first of them makes the file for all."""
    path = put(tmp_path / "d.txt", TEXT)
    words = f"-m minift train --model {folder}/gpt2 --task complete --data {path} --steps 3 --kernels reference"
    words += " --precision fp32 --out"
    shared = "-m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0".split()
    for name, launcher in (("one", []), ("two", shared)):
        line = [sys.executable, *launcher, *words.split(), str(tmp_path / name)]
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / f"{name}-cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr.count("tokens in") == 1, done.stderr
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)


# where nothing can be written


def test_without_a_cache_it_is_kept_in_the_temporary_folder(folder, letters, cache, tmp_path, monkeypatch):
    path = put(tmp_path / "d.txt", TEXT)
    put(tmp_path / "cache", "a file where the folder should be")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    line = "train --model {f}/gpt2 --task complete --data {d} --out {out} --steps 1 --kernels reference"
    said = works(line, f=folder, d=path, out=tmp_path / "a")
    place = tmp_path / f"temporary/minift-{os.getuid()}"
    assert f"tokens in {place}/" in said.err and f"they are not in {cache}, which could not be written" in said.err
    assert not make(path, letters)  # it is found there

    place.chmod(0o777)  # as somebody else might have made it
    fails(line, f"cannot be written to {cache}", f"or {place} (others can write to it)", f=folder, d=path, out="b")
    assert not (tmp_path / "b").exists()


def test_a_full_disk(folder, cache, tmp_path, monkeypatch):
    """What was done by then stays, and that is said."""
    path = put(tmp_path / "d.txt", TEXT)
    line = "train --model {f}/gpt2 --task complete --data {d} --out {out} --steps 1 --kernels reference"
    real = corpus.write_state

    def full(folder, done, *rest):
        if done > 3:
            raise OSError(28, "No space left on device")
        real(folder, done, *rest)

    monkeypatch.setattr(corpus, "write_state", full)
    fails(
        line, "No space left on device", "pieces are tokenised; the next run goes on there", f=folder, d=path, out="b"
    )
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    assert "going on after piece 2 of 7" in works(line, f=folder, d=path, out=tmp_path / "b").err


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(folder, cache, tmp_path):
    """Reading, tokenising, counting, the fingerprint and every block, in fresh processes: four times the text."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc to measure memory")
    code = """
import re, sys
from minift.checkpoints.resume import fingerprint
from minift.data import corpus
from minift.data.tokenizer import read_tokenizer
from minift.tasks import complete
blocks = complete.encode(corpus.read_all(complete.stream(sys.argv[2])), None, read_tokenizer(sys.argv[1]), 128)
assert fingerprint(blocks) and sum(len(s.targets) for s in blocks) > 100_000
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""
    peaks = []
    for times in (15, 60):
        path = put(tmp_path / f"{times}.txt", TEXT * times)
        peaks.append(int(python(code, folder / "bert", path)))
    assert peaks[1] - peaks[0] < 20_000_000, peaks  # 4 million; 150 million where all are held
