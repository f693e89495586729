"""Files of the user's are never deleted, emptied or quietly changed: how everything is written.

    with replaced(path) as file: ...        one file, whole or not at all
    write_folder(folder, write)             several files in a folder, beside whatever else is there
    check_output_file(path, ...)            refuses before any work what must not be written over
    cache_folder(kind)                      what can be made again: kernels, the tokens of a text

Whatever is written is written aside first, under a name that nobody else has, flushed to the disk, and renamed. A
folder that minift wrote holds minift.json, which lists its files with their SHA-256. Only these are ever replaced or
removed, and only while they are what minift wrote.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from .errors import InputError

MANIFEST = "minift.json"
TEMPORARY = r"\.minift-[0-9a-f]{16}\.tmp"


def temporary_name() -> str:
    """A name for what is being written, which no other process and no user has."""
    return f".minift-{secrets.token_hex(8)}.tmp"


def real(path: str | Path) -> Path:
    """Where a path leads: a link stays a link, and what it points to is written."""
    return Path(os.path.realpath(path))


def flush(path: Path) -> None:
    """Makes the disk hold what was written to a file, or the names in a folder.

    Some file systems over a network know no such thing for folders: there the names are left to them.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def keep_mode(old: Path, new: Path) -> None:
    """Gives a file the permissions of the one that it will replace, where there is one and the file system has them."""
    with suppress(OSError):
        shutil.copymode(old, new)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives errors of the disk the path that they lack ("No space left on device" says none)."""
    try:
        yield
    except OSError as e:
        if e.filename is None and e.errno is not None:
            raise type(e)(e.errno, e.strerror, str(path)) from e
        raise


# one file


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write; written and flushed it takes the place of `path`, which stays as it was until then."""
    target = real(path)
    aside = target.with_name(temporary_name())
    try:
        with naming(path), open(aside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        keep_mode(target, aside)
        os.replace(aside, target)
    except BaseException:
        remove_leftover(aside)
        raise
    flush(target.parent)


def write_text(path: Path, text: str) -> None:
    """A small file, whole or not at all."""
    with replaced(path) as file:
        file.write(text.encode())


def is_special(path: Path) -> bool:
    """Whether a path is there and neither file nor folder: /dev/null, /dev/stdout, a pipe."""
    with suppress(OSError):
        mode = path.stat().st_mode
        return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
    return False


def check_output_file(option: str, path: Path, inputs: list[str], overwrite: bool) -> None:
    """Raises InputError where results must not, or could not, be written to `path`. Nothing is opened or changed.

    inputs: paths that the command reads. overwrite: whether the user allowed what is there to be replaced.
    """
    if is_special(path):
        return
    for other in inputs:
        if path.exists() and os.path.exists(other) and os.path.samefile(path, other):
            raise InputError(f"{option} {path}: is the input {other} itself; expected another file")
    if path.is_dir():
        raise InputError(f"{option} {path}: is a folder; expected a file")
    if path.exists() and path.stat().st_size and not overwrite:
        size = f"{path.stat().st_size:,} bytes"
        raise InputError(f"{option} {path}: is there already, with {size}; expected a new file, or --overwrite")
    folder = real(path).parent
    if not folder.is_dir():
        raise InputError(f"{option} {path}: there is no folder {folder}; expected one that is there")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{option} {path}: nothing can be written to the folder {folder}; expected another")


def write_lines(path: Path, lines: Iterator[str]) -> None:
    """Writes lines as they come, each flushed. Until the last has come they are in NAME.partial-..., which stays there
    if that never happens; the error says so.

    The first line is asked for before anything is opened: by then the input is read and judged.
    """
    lines = chain(list(islice(lines, 1)), lines)
    if is_special(path):
        with naming(path), open(path, "w", encoding="utf-8") as file:
            for line in lines:
                print(line, file=file, flush=True)
        return
    target = real(path)
    partial = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
    done = 0
    try:
        with naming(path), open(partial, "x", encoding="utf-8") as file:
            for line in lines:
                print(line, file=file, flush=True)
                done += 1
            os.fsync(file.fileno())
        keep_mode(target, partial)
        os.replace(partial, target)
    except BaseException as e:
        if done:
            e.add_note(f"the {done:,} lines written until then are in {partial}")
        else:
            partial.unlink(missing_ok=True)
        raise


# several files in a folder


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Puts the files that write(empty folder) makes into `folder`, and minift.json that lists them.

    A new folder appears whole. In one that is there its files are replaced one by one, those that an earlier
    minift.json lists and that are not written again are removed, and everything else stays.
    Raises OSError (disk full): all is written before the first file is replaced.
    """
    target = real(folder)
    is_new = not target.exists()
    if is_new:
        target.parent.mkdir(parents=True, exist_ok=True)
    # inside a folder that is there: it may be a mount point, or its parent another's
    aside = (target.parent if is_new else target) / temporary_name()
    try:
        with naming(folder):
            aside.mkdir()
            write(aside)
            seal(aside)
            if is_new:
                os.rename(aside, target)
            else:
                _move_into(aside, target)
    except BaseException:
        remove_leftover(aside)
        raise
    flush(target)
    flush(target.parent)


def seal(folder: Path) -> None:
    """Brings a folder's files to the disk, and writes minift.json: their names and their SHA-256."""
    paths = sorted(folder.iterdir())
    with ThreadPoolExecutor() as pool:  # to hash a file takes as long as the disk does: side by side
        digests = pool.map(digest, paths)
        for path in paths:
            flush(path)
    files = dict(zip([path.name for path in paths], digests, strict=True))
    text = json.dumps({"written_by": "minift", "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    flush(folder / MANIFEST)


def _move_into(aside: Path, target: Path) -> None:
    """Replaces the files of `target` by those of the same names in `aside`, minift.json last."""
    names = sorted(path.name for path in aside.iterdir())
    names.remove(MANIFEST)
    gone = unchanged(target, but=names)
    for name in [*names, MANIFEST]:
        os.replace(aside / name, target / name)
    for name in gone:
        (target / name).unlink()
    aside.rmdir()


def digest(path: Path) -> str:
    """The SHA-256 of a file, as sha256sum prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of what minift wrote into a folder, by its minift.json; empty where there is none.

    Raises InputError where that file is not as minift writes it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        names = {str(name): str(files[name]) for name in files.keys()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as e:
        raise InputError(f"{path}: cannot be read ({e}); expected the list of files that minift wrote") from e
    if any(Path(name).name != name for name in names):
        raise InputError(f"{path}: names files outside its folder; expected the list of files that minift wrote")
    return names


def unchanged(folder: Path, but: list[str] = ()) -> set[str]:
    """The names of a folder's files, `but` some, that minift wrote and nobody has changed since."""
    found = {name: wanted for name, wanted in listed(folder).items() if name not in but and _is_file(folder / name)}
    return {name for name, wanted in found.items() if digest(folder / name) == wanted}


def _is_file(path: Path) -> bool:
    """Whether a path is a regular file and no link to one."""
    return path.is_file() and not path.is_symlink()


def fault(folder: Path) -> str:
    """What is wrong with the files that minift wrote into a folder, or "" (also where an older minift listed none)."""
    for name, wanted in listed(folder).items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if digest(folder / name) != wanted:
            return f"{name} is not what was written: its SHA-256 is another than in {MANIFEST}"
    return ""


def check_folder(folder: Path, names: set[str]) -> None:
    """Raises InputError unless files called `names` can go into `folder` without replacing anything of the user's."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; expected a new folder, or one that minift wrote")
    if not folder.is_dir() or is_free(folder):
        return check_parent(folder)
    mine = unchanged(folder)
    found = {path.name for path in folder.iterdir()}
    if not mine:
        expected = "a new or empty folder, or a model that minift saved"
        raise InputError(f"{folder}: holds files that minift did not write ({shortened(found)}); expected {expected}")
    if others := (names - {MANIFEST}) & found - mine:
        why = "which minift did not write or which was changed since"
        raise InputError(f"{folder}: {shortened(others)} would be replaced, {why}; expected a new or empty folder")


def check_new_folder(option: str, folder: Path) -> None:
    """Raises InputError unless `folder` can be made, or is there and empty."""
    if folder.is_symlink() and not folder.exists():
        raise InputError(f"{option} {folder}: is a link to {os.readlink(folder)}, which is not there")
    if folder.exists() and not (folder.is_dir() and is_free(folder)):
        raise InputError(f"{option} {folder}: is there already; expected a new or empty folder")
    check_parent(folder)


def is_free(folder: Path) -> bool:
    """Whether nothing is in a folder but what a killed process had begun to write."""
    return all(re.fullmatch(TEMPORARY, path.name) for path in folder.iterdir())


def check_parent(folder: Path) -> None:
    """Raises InputError where `folder` could not be made or written to."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as e:  # safetensors cannot open such a path again
        raise InputError(f"{folder}: the name of the folder is not UTF-8; expected one that is") from e
    place = real(folder)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{folder}: {place} is a file; expected a folder")
    if not os.access(place, os.W_OK):
        raise InputError(f"{folder}: nothing can be written to the folder {place}; expected another")


def shortened(names: set[str]) -> str:
    """The first few of some names."""
    shown = ", ".join(sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown}, ... {len(names)} in all"


# what minift removes


def remove_files(folder: Path, names: set[str]) -> None:
    """Removes the files called `names` from a folder, and the folder if nothing else is in it."""
    for name in names:
        if _is_file(folder / name):
            (folder / name).unlink()
    with suppress(OSError):  # not empty: what is left is the user's
        folder.rmdir()


def remove_leftover(aside: Path) -> None:
    """Removes what was written aside and did not get its name."""
    with suppress(OSError):
        if aside.is_dir():
            remove_files(aside, {path.name for path in aside.iterdir()})
        else:
            aside.unlink()


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes had written aside in a folder of a run, by the names that minift gives."""
    if folder.is_dir():
        for path in folder.iterdir():
            if re.fullmatch(TEMPORARY, path.name):
                remove_leftover(path)


# the cache: what can be made again


def cache_folder(kind: str) -> Path:
    """Where files of a kind are kept between processes."""
    base = os.environ.get("XDG_CACHE_HOME")
    cache_home = Path(base) if base else Path(os.path.expanduser("~"), ".cache")
    return cache_home / "minift" / kind


def make_private(folder: Path) -> None:
    """Makes a folder of the cache. Raises OSError where it cannot be, or where others can write to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not private(folder):
        raise PermissionError(errno.EPERM, "others can write to it", str(folder))


def private(path: Path) -> bool:
    """Whether a file or folder is this user's and nobody else can write to it: what is loaded from there runs.

    Only files and folders can be: reading a pipe would wait for ever.
    """
    try:
        found = path.lstat()
    except OSError:
        return False
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        return False
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file alone: waits while another process holds it, and is free again however that one ends."""
    while True:
        # for writing: else NFS gives no such lock
        with open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file.fileno(), path):  # whoever held it has removed it; a new one may be there
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
