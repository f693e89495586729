"""Nothing of the user's is deleted, emptied or changed: whatever is there, whatever is asked for, whatever goes wrong.

python -m pytest tests/test_files.py
"""

import builtins
import errno
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from folders import names_in, put, refused, small_disk, write
from helpers import Said, cli, model_and_data, small_gpt2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import minift
from minift import evaluation, files
from minift.checkpoints import loading, saving
from minift.checkpoints import resume as checkpoint
from minift.errors import InputError


def snapshot(folder: Path) -> dict[str, str]:
    """Path -> what is there, of every file, folder and link below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def check_kept(before: dict[str, str], folder: Path) -> None:
    """Everything that was there is there, to the byte."""
    after = snapshot(folder)
    changed = {name: (what, after.get(name, "gone")) for name, what in before.items() if after.get(name) != what}
    assert not changed


# ---- one file


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    path.chmod(0o640)
    with pytest.raises(KeyError), files.replaced(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == "old" and names_in(tmp_path) == ["a.json"]
    files.write_text(path, "new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names_in(tmp_path) == ["a.json"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "a.json").write_text("old")
    (tmp_path / "link").symlink_to("a.json")
    files.write_text(tmp_path / "link", "new")
    assert os.readlink(tmp_path / "link") == "a.json" and (tmp_path / "a.json").read_text() == "new"


def test_an_error_of_the_disk_says_where(tmp_path):
    with pytest.raises(OSError, match="metrics.jsonl"), files.naming(tmp_path / "metrics.jsonl"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("code, passes", [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_flushes_no_folders(tmp_path, code, passes, monkeypatch):
    """Files are flushed there, and folders are left to it; every other error counts."""
    flushed = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        flushed(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    if passes:
        files.write_text(tmp_path / "a", "new")
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            files.write_text(tmp_path / "a", "new")


def test_a_file_system_without_permissions(tmp_path, monkeypatch):
    def chmod(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "chmod", chmod)
    files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"


def test_a_folder_keeps_what_is_not_minifts(tmp_path):
    def put(*names):
        return lambda aside: [(aside / name).write_text(name) for name in names]

    out = tmp_path / "out"
    files.write_folder(out, put("a", "b"))
    (out / "mine").write_text("mine")
    files.write_folder(out, put("a", "c"))  # b is of the first and not of the second
    assert names_in(out) == ["a", "c", "mine", "minift.json"]
    (out / "c").write_text("changed by hand")
    files.write_folder(out, put("a"))
    assert (out / "c").read_text() == "changed by hand"
    assert files.fault(out) == ""
    (out / "a").write_text("x")
    assert files.fault(out).startswith("a is not what was written")
    (out / "a").unlink()
    assert files.fault(out) == "a is missing"


@pytest.mark.parametrize("text", ["{", "[]", '{"files": 3}', '{"files": {"../a": "0"}}', "[" * 100_000])
def test_a_list_of_files_that_is_none(tmp_path, text):
    (tmp_path / "minift.json").write_text(text)
    refused(files.listed, tmp_path, "minift.json", "the list of files that minift wrote")


def test_leftovers_go_and_nothing_that_looks_nearly_so(tmp_path):
    (tmp_path / files.temporary_name()).write_text("half")
    (tmp_path / files.temporary_name()).mkdir()
    kept = [".minift-1.tmp", "minift-0123456789abcdef.tmp", ".minift-0123456789abcdef.tmp.bak"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    files.remove_leftovers(tmp_path)
    assert names_in(tmp_path) == sorted(kept)


# ---- commands: a trained classifier with LoRA, a language model


TRAIN = (  # a LoRA run of two steps
    "train --model {made}/model --data {data} --valid 0.25 --out {out} --method lora --steps 2 --save-every 1"
    " --kernels reference"
)
PREDICT = "predict --model {made}/run --data {data} --out {out}"
GENERATE = "generate --model {made}/gpt2 --data {data} --out {out} --max-tokens 2"
MERGE = "merge --model {made}/run --out {out}"
DATA = {TRAIN: "train.tsv", PREDICT: "train.tsv", GENERATE: "prompts.jsonl"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """model/, run/ (a LoRA run of it), gpt2/, train.tsv, prompts.jsonl. Kernels are loaded before files are watched."""
    folder = model_and_data(tmp_path_factory.mktemp("made"), 16)
    write(folder / "prompts.jsonl", {"prompt": "the film"}, {"prompt": "a plot"})
    small_gpt2(folder / "gpt2")
    assert run(TRAIN, folder, folder / "run").code == 0
    assert run(PREDICT, folder, os.devnull).code == 0
    return folder


def run(line, made, out, data=None) -> Said:
    """One of the commands; `data` where it shall be another file than the command's own."""
    data = data or made / DATA.get(line.removesuffix(" --overwrite"), "")
    return cli(line, made=made, data=data, out=out)


@pytest.mark.parametrize("lr", ["1e3", "1e30"])
def test_a_loss_beyond_all_bounds(made, tmp_path, lr):
    """Its perplexity is infinite, which JSON has no word for; if the loss is finite the run is none the worse."""
    data = write(tmp_path / "d.jsonl", *[{"prompt": "the film", "completion": "was good"}] * 8)
    line = "train --task complete --model {made}/gpt2 --data {data} --valid 0.25 --steps 1 --clip 0 --out {out}"
    said = cli(f"{line} --lr {lr}", made=made, data=data, out=tmp_path / "run")
    assert said.code in (0, 1) and "fault of minift" not in said.err
    text = (tmp_path / "run/metrics.jsonl").read_text()
    assert "Infinity" not in text and "NaN" not in text


def test_folders_beside_the_output(made, tmp_path):
    """model.old and model.new were the names of what is written aside, and were removed."""
    for name in ("model.old", "model.new", "step-2.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("mine")
    before = snapshot(tmp_path)
    assert run(MERGE, made, tmp_path / "model").code == 0
    assert minift.load(tmp_path / "model", task="classify")[0].labels == ["blame", "praise"]
    check_kept(before, tmp_path)


INTO_A_FOLDER = pytest.mark.parametrize("line", [TRAIN, MERGE], ids=["train", "merge"])
INTO_A_FILE = pytest.mark.parametrize("line", [PREDICT, GENERATE], ids=["predict", "generate"])


def check_refused(said: Said, words: str) -> None:
    assert said.code == 1 and words in said.err, said.err


@INTO_A_FOLDER
def test_an_output_folder_that_is_somebodys(made, tmp_path, line):
    out = tmp_path / "project"
    (out / "src").mkdir(parents=True)
    put(out / "config.json", "{}")
    before = snapshot(tmp_path)
    check_refused(run(line, made, out), "is there already; expected a new or empty folder")
    assert snapshot(tmp_path) == before


@INTO_A_FOLDER
def test_a_link_as_the_output(made, tmp_path, line):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert run(line, made, tmp_path / "link").code == 0
    assert os.readlink(tmp_path / "link") == "real"
    assert names_in(tmp_path) == ["link", "real"] and len(names_in(tmp_path / "real")) > 2
    (tmp_path / "dangling").symlink_to("nowhere")
    check_refused(run(line, made, tmp_path / "dangling"), "is a link to nowhere, which is not there")


@pytest.mark.slow
@INTO_A_FOLDER
def test_a_mount_point_as_the_output(made, tmp_path, line):
    disk = tmp_path / "disk"
    with small_disk(disk, "9m"):
        assert run(line, made, disk).code == 0
        assert names_in(tmp_path) == ["disk"] and not list(disk.rglob(".minift-*"))


@pytest.mark.slow
def test_a_run_within_its_own_class_folders(made, tmp_path):
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        put(tmp_path / name / "1.txt", name)
    check_refused(run(TRAIN, made, tmp_path / "run", tmp_path), "lies in the folder of --data")


@INTO_A_FILE
def test_results_over_their_own_input(made, tmp_path, line):
    """Also by another name: a hard link, a symbolic one."""
    data = tmp_path / DATA[line]
    shutil.copy(made / data.name, data)
    os.link(data, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(data.name)
    before = snapshot(tmp_path)
    for name in (data.name, "hard", "soft"):
        check_refused(run(f"{line} --overwrite", made, tmp_path / name, data), "is the input")
    assert snapshot(tmp_path) == before


@INTO_A_FILE
def test_earlier_results_stay_unless_told_otherwise(made, tmp_path, line):
    out = put(tmp_path / "earlier.jsonl", "earlier\n")
    before = snapshot(tmp_path)
    check_refused(run(line, made, out), "is there already, with 8 bytes; expected a new file, or --overwrite")
    check_refused(run(f"{line} --overwrite", made, out, tmp_path / "missing.jsonl"), "missing.jsonl")
    check_refused(run(line, made, tmp_path), "is a folder; expected a file")
    check_refused(run(line, made, tmp_path / "no/such/folder.jsonl"), "there is no folder")
    assert snapshot(tmp_path) == before
    assert run(f"{line} --overwrite", made, out).code == 0
    assert len(out.read_text().splitlines()) == {PREDICT: 16, GENERATE: 2}[line]
    assert list(tmp_path.iterdir()) == [out]


def test_results_to_a_device_and_to_a_pipe(made, tmp_path):
    assert run(PREDICT, made, os.devnull).code == 0
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    assert run(PREDICT, made, tmp_path / "pipe").code == 0
    assert len(reader.communicate(timeout=30)[0].splitlines()) == 16


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
@pytest.mark.parametrize("stop, code", [(KeyboardInterrupt, 130), (FULL, 1)])
def test_interrupted_predictions_are_kept(made, tmp_path, stop, code, monkeypatch):
    """Under a name that says so, and the command says it too; what was in --out is still there."""
    out, written = tmp_path / "p.jsonl", json.dumps

    def dumps(row, **options):
        if row == 5:
            raise stop
        return written(row, **options)

    put(out, "before\n")
    monkeypatch.setattr(evaluation, "predict", lambda *_: iter(range(9)))
    monkeypatch.setattr(json, "dumps", dumps)
    said = run(f"{PREDICT} --overwrite", made, out)
    monkeypatch.undo()
    (partial,) = tmp_path.glob("p.jsonl.partial-*")
    assert partial.read_text() == "0\n1\n2\n3\n4\n" and out.read_text() == "before\n"
    assert said.code == code and f"the 5 lines written until then are in {partial}" in said.err


# ---- anything, anywhere, and whatever goes wrong


class Killed(BaseException):
    """Stands for SIGKILL: after it no call of the file system is answered, so nothing can be cleaned up."""


class Trouble:
    """From the at-th call of the file system on that changes something: "kill", or "full", when nothing can be written.

    `safetensors` writes by itself: its save_file is one such call, and leaves half a file.
    """

    def __init__(self, how: str, at: int):
        self.how, self.at, self.calls = how, at, 0

    def strike(self, writes: bool) -> None:
        """One more call; it goes wrong if its turn has come."""
        self.calls += 1
        if self.calls >= self.at and self.how == "kill":
            raise Killed
        if self.calls >= self.at and self.how == "full" and writes:
            raise OSError(errno.ENOSPC, "No space left on device")

    def watched(self, before, writes: bool):
        passes = before is not os.fsync  # which takes a while, and shows nothing here

        def call(*args, **kwargs):
            self.strike(writes)
            return before(*args, **kwargs) if passes else None

        return call

    def watched_open(self, before):
        def call(file, mode="r", *args, **kwargs):
            if isinstance(mode, str) and set(mode) & set("wax+"):
                self.strike(True)
            return before(file, mode, *args, **kwargs)

        return call

    def watched_save_file(self, before):
        def call(tensors, path, *args, **kwargs):
            Path(path).write_bytes(b"half")
            self.strike(True)
            return before(tensors, path, *args, **kwargs)

        return call


@contextmanager
def going_wrong(how: str, at: int):
    """Trouble for all that changes files."""
    trouble = Trouble(how, at)
    with pytest.MonkeyPatch.context() as patch:
        for name, writes in dict(replace=0, rename=0, unlink=0, rmdir=0, fsync=1, mkdir=1).items():
            patch.setattr(os, name, trouble.watched(getattr(os, name), bool(writes)))
        for owner in (builtins, io):
            patch.setattr(owner, "open", trouble.watched_open(owner.open))
        for owner in (saving, checkpoint):
            patch.setattr(owner, "save_file", trouble.watched_save_file(owner.save_file))
        yield


NAMES = (
    "out link out.new out.old out/config.json out/model.safetensors out/notes.md out/vocab.txt out/src/a.py"
    " out/checkpoints/step-1/notes.md out/best/mine out/metrics.jsonl out/minift.json out/metrics.jsonl"
    " other/config.json a.partial-00 .minift-1.tmp step-1"
).split()
KINDS = ["file", "folder", "link to other", "link to out/notes.md", "link to nowhere"]


@st.composite
def trees(draw):
    """Names of what the user has: name -> "file", "folder", or a link to something."""
    names = draw(st.lists(st.sampled_from(NAMES), max_size=5, unique=True))
    return {name: draw(st.sampled_from(KINDS)) for name in names}


def plant(tree: dict[str, str], folder: Path) -> None:
    """Puts a tree into a folder; what does not fit (a file where a folder is needed) is left out."""
    for name, what in tree.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if what == "file":
                with open(path, "x") as file:
                    file.write(f"mine: {name}")
            elif what == "folder":
                path.mkdir()
            else:
                path.symlink_to(folder / what.removeprefix("link to "))
        except OSError:
            continue


def save(made, out):
    """minift.save from Python."""
    model, tokenizer = minift.load(made / "model", task="classify")
    minift.save(model, tokenizer, out)
    return 0


COMMANDS = {
    "train": lambda made, out: run(TRAIN, made, out).code,
    "merge": lambda made, out: run(MERGE, made, out).code,
    "predict": lambda made, out: run(f"{PREDICT} --overwrite", made, out).code,
    "generate": lambda made, out: run(GENERATE, made, out).code,
    "save": save,
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tree=trees(),
    name=st.sampled_from(["out", "out/best", "link", "new", "a/b/new"]),
    how=st.sampled_from(["nothing", "kill", "full"]),
    at=st.integers(1, 40),
)
def test_what_the_user_has_stays(made, tmp_path_factory, command, tree, name, how, at):
    folder = tmp_path_factory.mktemp("tree")
    plant(tree, folder)
    before = snapshot(folder)
    if command == "predict":  # --overwrite: the user gave this one file away
        given_away = files.real(folder / name)
        before = {n: what for n, what in before.items() if files.real(folder / n) != given_away}
    sources = snapshot(made)
    code = None
    try:
        with going_wrong(how, at):
            code = COMMANDS[command](made, folder / name)
    except (Killed, InputError, OSError):
        pass
    check_kept(before, folder)
    assert snapshot(made) == sources
    if how == "nothing":
        assert code in (0, 1, None) and not list(folder.rglob(".minift-" + "[0-9a-f]" * 16 + ".tmp"))
    if code == 0 and command in ("train", "merge", "save"):
        assert loading.load(folder / name, "classify")[0].labels
    shutil.rmtree(folder)
