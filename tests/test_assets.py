"""benchmarks/assets.py: every file that tests and benchmarks want is known, fetched whole or not at all, and checked.

python -m pytest tests/test_assets.py      (MINIFT_ASSETS=FOLDER to check the real files too)
"""

import gzip
import hashlib
import io
import json
import re
import sys
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import assets as known  # noqa: E402

pytestmark = pytest.mark.slow

PATHS = {f"{group.folder}/{name}": group for group in known.GROUPS for name in group.files}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def published(tmp_path):
    """(folder, address): what is put into the folder is served at the address."""
    folder = tmp_path / "published"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    known.download.cache_clear()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def facts(content: bytes) -> tuple[int, str]:
    return len(content), hashlib.sha256(content).hexdigest()


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"top/{name}", content)
    return buffer.getvalue()


def tarred(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()))
    return buffer.getvalue()


def groups(address: str) -> list[known.Group]:
    """A file as it is, one of an archive, and one without an address."""
    return [
        known.Group("data/plain", f"{address}/{{name}}", "MIT", {"a.txt": facts(b"plain")}),
        known.Group("data/zip", f"{address}/all.zip", "MIT", {"b.txt": facts(b"inside")}, known.unzipped("top/{name}")),
        known.Group("data/none", "", "unknown", {"c.txt": facts(b"nowhere")}),
    ]


@pytest.fixture
def run(published, tmp_path, monkeypatch, capsys):
    """run(options) -> (exit code, lines of standard output, the folder), for `groups`."""
    folder, address = published
    (folder / "a.txt").write_bytes(b"plain")
    (folder / "all.zip").write_bytes(zipped(**{"b.txt": b"inside"}))
    monkeypatch.setattr(known, "GROUPS", groups(address))

    def call(*options: str):
        code = known.main(["--to", str(tmp_path / "to"), *options])
        return code, capsys.readouterr().out.splitlines(), tmp_path / "to"

    return call


def test_what_is_missing_is_fetched(run):
    code, lines, folder = run()
    assert code == 0 and lines[0].startswith("data/none/c.txt is missing: no public address")
    assert (folder / "data/plain/a.txt").read_bytes() == b"plain"
    assert (folder / "data/zip/b.txt").read_bytes() == b"inside"
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["a.txt", "b.txt"]


def test_check_fetches_nothing(run):
    code, lines, folder = run("--check")
    assert code == 1 and not folder.exists() and lines[-1] == "2 files are missing or differ"
    assert re.fullmatch(r"data/plain/a.txt is missing: http://.*/a.txt \(licence: MIT\)", lines[0])


def test_only_a_part(run):
    code, lines, folder = run("--only", "data/zip")
    assert code == 0 and [p.name for p in folder.rglob("*.txt")] == ["b.txt"] and len(lines) == 1


def test_a_file_that_differs_is_told_and_left_alone(run):
    _, _, folder = run()
    (folder / "data/plain/a.txt").write_bytes(b"plaiN")
    code, lines, _ = run()
    assert code == 1 and "data/plain/a.txt has SHA-256 " in lines[0]
    assert (folder / "data/plain/a.txt").read_bytes() == b"plaiN"
    (folder / "data/plain/a.txt").write_bytes(b"plai")
    assert run()[1][0] == "data/plain/a.txt has 4 bytes, expected 5"


@pytest.mark.parametrize("spoiled", ["other", "gone", "no archive", "another archive"])
def test_what_arrives_wrong_is_not_kept(run, published, spoiled):
    folder, _ = published
    if spoiled == "other":
        (folder / "a.txt").write_bytes(b"plain, improved")
    elif spoiled == "gone":
        (folder / "a.txt").unlink()
    else:
        (folder / "all.zip").write_bytes(b"<html>" if spoiled == "no archive" else zipped(other=b""))
    code, lines, to = run()
    assert code == 1 and lines[-1] == "1 files are missing or differ"
    told = {
        "other": "has 15 bytes, expected 5",
        "gone": "404",
        "no archive": "BadZipFile",
        "another archive": "KeyError",
    }
    assert told[spoiled] in lines[0]
    assert sum(path.is_file() for path in to.rglob("*")) == 1


def test_a_gz_is_known_by_what_is_in_it():
    facts_inside = facts(b"text" * 100)
    for level in (1, 9):
        assert known.fault(gzip.compress(b"text" * 100, level), "x.gz", *facts_inside) == ""
    assert "no whole gzip file" in known.fault(gzip.compress(b"text" * 100)[:-9], "x.gz", *facts_inside)


# ---- files that are made of others


def test_reviews_become_lines_in_the_order_of_their_numbers():
    files = {
        f"aclImdb/{path}.txt": path for path in ("test/neg/0_2", "train/pos/2_7", "train/pos/10_9", "train/neg/1_1")
    }
    made = gzip.decompress(known.imdb_lines(tarred(files), "train.jsonl.gz"))
    rows = [json.loads(line) for line in made.decode().splitlines()]
    assert [(row["id"], row["label"]) for row in rows] == [
        ("train/neg/1_1", 0),
        ("train/pos/2_7", 1),
        ("train/pos/10_9", 1),
    ]
    assert all(row["text"] == row["id"] for row in rows)


def test_triples_become_prompts():
    entry = """<benchmark><entries><entry>
      <modifiedtripleset><mtriple>A_B | c | "d"</mtriple><mtriple>A_B | e | F</mtriple></modifiedtripleset>
      <lex><text> A B is. </text></lex><lex><text></text></lex><lex><text>It is.</text></lex>
      </entry></entries></benchmark>"""
    files = {"x-1/data/v1.6/en/dev/2triples/a.xml": entry, "x-1/data/v1.6/de/dev/2triples/a.xml": entry}
    rows = [json.loads(line) for line in known.webnlg_lines(tarred(files), "dev.jsonl").splitlines()]
    assert {row["prompt"] for row in rows} == {'A B | c | "d" ; A B | e | F ->'}
    assert [row["completion"] for row in rows] == [" A B is.", " It is."]


def test_the_sorting_model_is_made_of_the_published_numbers(assets):
    folder = assets / "weights/gpt-nano-sort"
    published = (folder / "gpt-nano-sort-model.json").read_bytes()
    assert known.nano_weights(published, "") == (folder / "hf/model.safetensors").read_bytes()
    assert known.nano_config(published, "") == (folder / "hf/config.json").read_bytes()
    assert len(load(known.nano_weights(published, ""))) == 41


def test_instructions_become_chats():
    rows = [
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {"instruction": "Hi.", "input": "", "output": "Ho."},
    ]
    made = [json.loads(line)["messages"] for line in known.chat_lines(json.dumps(rows).encode(), "").splitlines()]
    assert [m["content"] for chat in made for m in chat[1:]] == ["Add.\n\n1 1", "2", "Hi.", "Ho."]


# ---- the list


@pytest.mark.slow
def test_the_real_files_are_those(assets, capsys):
    assert known.main(["--to", str(assets), "--check"]) == 0, capsys.readouterr().out


def test_every_file_that_is_opened_is_known():
    """Paths as they stand in the sources, whole or up to a folder."""
    found = set()
    for path in [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        found |= set(re.findall(r"""assets / f?["']((?:data|weights)/[^"'{]+)["'/{]""", path.read_text()))
        found |= {f"data/{name}" for name in re.findall(r'assets / "data" / "([\w-]+)"', path.read_text())}
    assert len(found) > 10
    unknown = {path for path in found if not any(name.startswith(path) for name in PATHS)}
    assert not unknown, f"benchmarks/assets.py does not know {sorted(unknown)}"


def test_addresses_are_public_and_fixed():
    for group in known.GROUPS:
        assert group.licence and re.match(r"https://[\w.-]+\.\w+/|$", group.address)
        if "github" in group.address:
            assert re.search("/[0-9a-f]{40}", group.address), group.address
