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
import transformers
from helpers import peer, reviews, small_bert
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import minift
from minift import evaluation, files
from minift.checkpoints import loading, saving
from minift.checkpoints import resume as checkpoint
from minift.cli import main
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
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    files.write_text(path, "new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


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
    assert sorted(p.name for p in out.iterdir()) == ["a", "c", "mine", "minift.json"]
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
    with pytest.raises(InputError, match="minift.json.*the list of files that minift wrote"):
        files.listed(tmp_path)


def test_leftovers_go_and_nothing_that_looks_nearly_so(tmp_path):
    (tmp_path / files.temporary_name()).write_text("half")
    (tmp_path / files.temporary_name()).mkdir()
    kept = [".minift-1.tmp", "minift-0123456789abcdef.tmp", ".minift-0123456789abcdef.tmp.bak"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    files.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)


# ---- commands: a trained classifier with LoRA, a language model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """model/, run/ (a LoRA run of it), gpt2/, train.tsv, prompts.jsonl. Kernels are loaded before files are watched."""
    folder = tmp_path_factory.mktemp("made")
    small_bert(folder / "model")
    reviews(folder / "train.tsv", 16)
    (folder / "prompts.jsonl").write_text('{"prompt": "the film"}\n{"prompt": "a plot"}\n')
    peer(transformers.GPT2LMHeadModel, folder / "gpt2", vocab_size=64)
    vocabulary = {c: i for i, c in enumerate(["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", "\u0120"])}
    (folder / "gpt2/vocab.json").write_text(json.dumps(vocabulary))
    (folder / "gpt2/merges.txt").write_text("")
    assert main(train(folder, folder / "run")) == 0
    assert main(predict(folder, os.devnull)) == 0
    return folder


def train(made, out, *more):
    """A LoRA run of two steps."""
    data = str(made / "train.tsv")
    return ["train", "--model", str(made / "model"), "--data", data, "--valid", "0.25", "--out", str(out),
            "--method", "lora", "--steps", "2", "--save-every", "1", "--kernels", "reference", *more]  # fmt: skip


def predict(made, out, *more):
    return ["predict", "--model", str(made / "run"), "--data", str(made / "train.tsv"), "--out", str(out), *more]


def generate(made, out, *more):
    return ["generate", "--model", str(made / "gpt2"), "--data", str(made / "prompts.jsonl"), "--out", str(out),
            "--max-tokens", "2", *more]  # fmt: skip


def merge(made, out, *more):
    return ["merge", "--model", str(made / "run"), "--out", str(out), *more]


@pytest.mark.parametrize("lr", ["1e3", "1e30"])
def test_a_loss_beyond_all_bounds(made, tmp_path, lr, capsys):
    """Its perplexity is infinite, which JSON has no word for; if the loss is finite the run is none the worse."""
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "the film", "completion": "was good"}\n' * 8)
    arguments = ["train", "--task", "complete", "--model", str(made / "gpt2"), "--data", str(data), "--valid", "0.25"]
    code = main([*arguments, "--steps", "1", "--lr", lr, "--clip", "0", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert code in (0, 1) and "fault of minift" not in said
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        assert "Infinity" not in line and "NaN" not in line


def test_folders_beside_the_output(made, tmp_path):
    """model.old and model.new were the names of what is written aside, and were removed."""
    for name in ("model.old", "model.new", "step-2.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("mine")
    before = snapshot(tmp_path)
    assert main(merge(made, tmp_path / "model")) == 0
    assert minift.load(tmp_path / "model", task="classify")[0].labels == ["blame", "praise"]
    check_kept(before, tmp_path)


@pytest.mark.parametrize("command", [train, merge])
def test_an_output_folder_that_is_somebodys(made, tmp_path, command, capsys):
    out = tmp_path / "project"
    (out / "src").mkdir(parents=True)
    (out / "config.json").write_text("{}")
    before = snapshot(tmp_path)
    assert main(command(made, out)) == 1
    assert "is there already; expected a new or empty folder" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", [train, merge])
def test_a_link_as_the_output(made, tmp_path, command, capsys):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert main(command(made, tmp_path / "link")) == 0
    assert os.readlink(tmp_path / "link") == "real"
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"] and len(list((tmp_path / "real").iterdir())) > 2
    )
    (tmp_path / "dangling").symlink_to("nowhere")
    assert main(command(made, tmp_path / "dangling")) == 1
    assert "is a link to nowhere, which is not there" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command", [train, merge])
def test_a_mount_point_as_the_output(made, tmp_path, command):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no permission to mount a small tmpfs")
    try:
        assert main(command(made, disk)) == 0
        assert sorted(p.name for p in tmp_path.iterdir()) == ["disk"] and not list(disk.rglob(".minift-*"))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_a_run_within_its_own_class_folders(made, tmp_path, capsys):
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_text(name)
    arguments = train(made, tmp_path / "run")
    arguments[arguments.index("--data") + 1] = str(tmp_path)
    assert main(arguments) == 1
    assert "lies in the folder of --data" in capsys.readouterr().err


@pytest.mark.parametrize("command, source", [(predict, "train.tsv"), (generate, "prompts.jsonl")])
def test_results_over_their_own_input(made, tmp_path, command, source, capsys):
    """Also by another name: a hard link, a symbolic one."""
    shutil.copy(made / source, tmp_path / source)
    os.link(tmp_path / source, tmp_path / f"hard-{source}")
    (tmp_path / f"soft-{source}").symlink_to(source)
    before = snapshot(tmp_path)
    for name in (source, f"hard-{source}", f"soft-{source}"):
        arguments = command(made, tmp_path / name, "--overwrite")
        arguments[arguments.index("--data") + 1] = str(tmp_path / source)
        assert main(arguments) == 1
        assert "is the input" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", [predict, generate])
def test_earlier_results_stay_unless_told_otherwise(made, tmp_path, command, capsys):
    out = tmp_path / "earlier.jsonl"
    out.write_text("earlier\n")
    before = snapshot(tmp_path)
    assert main(command(made, out)) == 1
    assert "is there already, with 8 bytes; expected a new file, or --overwrite" in capsys.readouterr().err
    missing = command(made, out, "--overwrite")
    missing[missing.index("--data") + 1] = str(tmp_path / "missing.jsonl")
    assert main(missing) == 1
    assert main(command(made, tmp_path)) == 1
    assert "is a folder; expected a file" in capsys.readouterr().err
    assert main(command(made, tmp_path / "no/such/folder.jsonl")) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert snapshot(tmp_path) == before
    assert main(command(made, out, "--overwrite")) == 0
    assert len(out.read_text().splitlines()) == (16 if command is predict else 2)
    assert list(tmp_path.iterdir()) == [out]


def test_results_to_a_device_and_to_a_pipe(made, tmp_path):
    assert main(predict(made, os.devnull)) == 0
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    assert main(predict(made, tmp_path / "pipe")) == 0
    assert len(reader.communicate(timeout=30)[0].splitlines()) == 16


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop, code", [(KeyboardInterrupt, 130), (OSError(errno.ENOSPC, "No space left on device"), 1)]
)
def test_interrupted_predictions_are_kept(made, tmp_path, stop, code, monkeypatch, capsys):
    """Under a name that says so, and the command says it too; what was in --out is still there."""
    out, written = tmp_path / "p.jsonl", json.dumps

    def dumps(row, **options):
        if row == 5:
            raise stop
        return written(row, **options)

    (tmp_path / "p.jsonl").write_text("before\n")
    monkeypatch.setattr(evaluation, "predict", lambda *_: iter(range(9)))
    monkeypatch.setattr(json, "dumps", dumps)
    assert main(predict(made, out, "--overwrite")) == code
    monkeypatch.undo()
    (partial,) = tmp_path.glob("p.jsonl.partial-*")
    assert partial.read_text() == "0\n1\n2\n3\n4\n" and out.read_text() == "before\n"
    assert f"the 5 lines written until then are in {partial}" in capsys.readouterr().err


# ---- anything, anywhere, and whatever goes wrong


class Killed(BaseException):
    """Stands for SIGKILL: after it no call of the file system is answered, so nothing can be cleaned up."""


@contextmanager
def going_wrong(how: str, at: int):
    """From the at-th call of the file system on that changes something: "kill", or "full", when nothing can be written.

    `safetensors` writes by itself: its save_file is one such call, and leaves half a file.
    """
    calls, kept = [0], {}

    def wrong(writes: bool, path=None) -> None:
        calls[0] += 1
        if calls[0] >= at and how == "kill":
            raise Killed
        if calls[0] >= at and how == "full" and writes:
            raise OSError(errno.ENOSPC, "No space left on device")

    def watch(owner, name, writes):
        before = kept[owner, name] = getattr(owner, name)

        def call(*args, **kwargs):
            wrong(writes)
            if name != "fsync":  # which takes a while, and shows nothing here
                return before(*args, **kwargs)

        setattr(owner, name, call)

    def watch_open(owner):
        before = kept[owner, "open"] = owner.open

        def call(file, mode="r", *args, **kwargs):
            if isinstance(mode, str) and set(mode) & set("wax+"):
                wrong(True)
            return before(file, mode, *args, **kwargs)

        owner.open = call

    def watch_save_file(owner):
        before = kept[owner, "save_file"] = owner.save_file

        def call(tensors, path, *args, **kwargs):
            Path(path).write_bytes(b"half")
            wrong(True)
            return before(tensors, path, *args, **kwargs)

        owner.save_file = call

    try:
        for name in ("replace", "rename", "unlink", "rmdir"):
            watch(os, name, False)
        for name in ("fsync", "mkdir"):
            watch(os, name, True)
        for owner in (builtins, io):
            watch_open(owner)
        for owner in (saving, checkpoint):
            watch_save_file(owner)
        yield
    finally:
        for (owner, name), before in kept.items():
            setattr(owner, name, before)


NAMES = ["out", "link", "out.new", "out.old", "out/config.json", "out/model.safetensors", "out/notes.md"]
NAMES += [
    "out/vocab.txt",
    "out/src/a.py",
    "out/checkpoints/step-1/notes.md",
    "out/best/mine",
    "out/metrics.jsonl",
    "out/minift.json",
]
NAMES += ["out/metrics.jsonl", "other/config.json", "a.partial-00", ".minift-1.tmp", "step-1"]


@st.composite
def trees(draw):
    """Names of what the user has: name -> "file", "folder", or a link to something."""
    tree = {}
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=5, unique=True)):
        tree[name] = draw(
            st.sampled_from(["file", "folder", "link to other", "link to out/notes.md", "link to nowhere"])
        )
    return tree


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
    "train": lambda made, out: main(train(made, out)),
    "merge": lambda made, out: main(merge(made, out)),
    "predict": lambda made, out: main(predict(made, out, "--overwrite")),
    "generate": lambda made, out: main(generate(made, out)),
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
