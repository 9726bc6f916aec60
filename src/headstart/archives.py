"""Archives (.zip, .tar, .tar.gz, .tar.bz2, .tar.xz): members read one by one as files are, or unpacked with care.

A member is named by its archive's path, two colons and its name inside: `flowers.zip::tulip/1.jpg`. Functions that take
a path take both, files and members, so that whoever reads pictures need not know where they lie.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from headstart import files
from headstart.config import cache_folder
from headstart.errors import DataError
from headstart.members import Bounds, Contents, Decompress, Member, expand, explain, open_archive

log = logging.getLogger(__name__)

MARK = "::"
NOTE = ".headstart.json"  # in a folder that was unpacked: what from
BOUNDS = Bounds()
CACHE_BYTES = 10 * 10**9  # for tars that were unpacked once; as much as features may take
_ENDING = re.compile(r"\.(zip|tar|tar\.gz|tgz|tar\.bz2|tbz2?|tar\.xz|txz)$", re.IGNORECASE)

AnyPath = str | os.PathLike[str]
Track = Callable[[Iterable[Any], int], Iterable[Any]]


def is_archive(path: AnyPath) -> bool:
    """Whether a path is that of a file whose name ends as an archive's that can be read."""
    return _ENDING.search(os.fspath(path)) is not None and os.path.isfile(path)


def strip_ending(name: str) -> str:
    """An archive's name without its ending: `flowers` of `flowers.tar.gz`."""
    return _ENDING.sub("", name)


def split(path: AnyPath) -> tuple[Path, str] | None:
    """(archive, name inside) of a member's path; None for any other path, and where a file has that very name."""
    text = os.fspath(path)
    if MARK not in text or os.path.isfile(text):
        return None
    for found in re.finditer(MARK, text):
        if is_archive(text[: found.start()]):
            return Path(text[: found.start()]), text[found.end() :].replace(os.sep, "/")
    return None


def list_names(archive: Path) -> list[str]:
    """The names of an archive's files, in no particular order.

    Raises:
        DataError: for an archive that is missing, damaged, or over the bounds.
    """
    return list(_open(archive).members)


def list_ignored(archive: Path) -> tuple[tuple[str, str], ...]:
    """(name, why) of what an archive holds and what is not read: links, devices, names that lead elsewhere."""
    return _open(archive).ignored


def is_file(path: AnyPath) -> bool:
    """Whether a path is that of a regular file, or of a member."""
    inside = split(path)
    return os.path.isfile(path) if inside is None else inside[1] in _open(inside[0]).members


def size(path: AnyPath) -> int:
    """The bytes of a file or member.

    Raises:
        OSError: where there is none.
    """
    inside = split(path)
    return os.stat(path).st_size if inside is None else _find(*inside)[1].size


def read(path: AnyPath) -> bytes:
    """The content of a file or member.

    Raises:
        OSError: where there is none, or it cannot be read; a member's reason is in words.
        DataError: for an archive that is damaged as a whole.
    """
    inside = split(path)
    if inside is None:
        return Path(path).read_bytes()
    contents, member = _find(*inside)
    return b"".join(contents.read(member))


def digest(path: AnyPath) -> str:
    """The SHA-256 of a file or member, in hexadecimal."""
    return files.digest(Path(path)) if split(path) is None else hashlib.sha256(read(path)).hexdigest()


def _find(archive: Path, name: str) -> tuple[Contents, Member]:
    contents = _open(archive)
    if name not in contents.members:
        raise FileNotFoundError(errno.ENOENT, "no such file in the archive", f"{archive}{MARK}{name}")
    return contents, contents.members[name]


_opening = threading.Lock()


def _open(archive: Path) -> Contents:
    """What an archive holds; remembered as long as the file stays the same."""
    try:
        status = os.stat(archive)
    except OSError as error:
        raise DataError(archive, f"cannot be opened ({error.strerror})", "Give an existing archive.") from error
    with _opening:
        return _opened(os.fspath(archive), status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _opened(name: str, inode: int, packed: int, modified: int) -> Contents:
    archive = Path(name)
    identity = b"\0".join((os.fsencode(archive.absolute()), b"%d" % packed, b"%d" % modified))
    key = hashlib.sha256(identity).hexdigest()[:32]
    return open_archive(archive, BOUNDS, lambda decompress: _expand_once(archive, decompress, key))


def _expand_once(archive: Path, decompress: Decompress, key: str) -> Path:
    """A compressed tar's plain form in the cache; of several processes, one makes it."""
    from filelock import FileLock

    folder = cache_folder() / "archives"
    tar = folder / f"{key}.tar"
    remedy = "Free some space, set HEADSTART_CACHE to another folder, or unpack it and give the folder."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(tar.with_suffix(".lock")):
            if not tar.exists():
                log.info("archive: %s can only be read from its beginning: it is unpacked once, into %s", archive, tar)
                _tidy(folder, expand(archive, decompress, tar, BOUNDS, remedy))
            files.mark_used(tar)
    except OSError as error:
        raise DataError(archive, f"cannot be unpacked into {folder} ({explain(error)})", remedy) from error
    return tar


def _tidy(folder: Path, kept: Path) -> None:
    """Delete the least recently used tars of a cache that is over its limit, and what killed processes left behind."""
    entries = []
    for file in (*folder.glob("*.tar"), *folder.glob("*.partial")):
        with contextlib.suppress(FileNotFoundError):  # other processes tidy too
            status = file.stat()
            if file.suffix == ".tar":
                entries.append((status.st_mtime, status.st_size, file))
            elif time.time() - status.st_mtime > 3600:
                file.unlink()
    excess = sum(count for _, count, _ in entries) - CACHE_BYTES
    for _, count, file in sorted(entries):
        if excess > 0 and file != kept:
            file.unlink(missing_ok=True)
            excess -= count


# Unpacking


def unpack(
    archive: Path,
    target: Path,
    *,
    checksum: str = "",
    bounds: Bounds = BOUNDS,
    track: Track = lambda members, total: members,
) -> int:
    """Unpack an archive into a new folder, which appears whole or not at all; the number of its files.

    Every member is looked at before anything is written: one that is no plain file below the folder, or stands there
    twice, and the archive is refused. Permissions and owners are not taken over. One process at a time.

    Args:
        archive: a .zip or .tar file, compressed or not.
        target: the folder, not there yet. A hidden note in it says what it was unpacked from (`read_note`).
        checksum: for that note.
        bounds: what is too much.
        track: wraps the members to show progress; called with them and their number.

    Raises:
        DataError: for an archive that is damaged, unsafe or over the bounds, and where the folder cannot be written.
    """
    if os.path.lexists(target):
        raise DataError(target, "is there already", "Move it away, or name another folder.")
    partial = target.with_name(f".{target.name}.partial")
    folder = partial / target.name
    try:
        shutil.rmtree(partial, ignore_errors=True)  # a killed one's
        folder.mkdir(parents=True)
        count = _fill(folder, archive, bounds, track)
        note = {"archive": archive.name, "checksum": checksum, "files": count}
        (folder / NOTE).write_text(json.dumps(note) + "\n", encoding="utf-8")
        if hasattr(os, "sync"):
            os.sync()  # once: waiting for each of thousands of files takes minutes
        folder.rename(target)
        files.sync(target.parent)
    except OSError as error:
        why = f"cannot be unpacked into {target.parent} ({explain(error)})"
        raise DataError(archive, why, "Check the archive and the folder, or name another one.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count


def read_note(folder: Path) -> dict[str, Any]:
    """What a folder was unpacked from: `archive`, `checksum` and the number of `files`; nothing where it was not."""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _fill(folder: Path, archive: Path, bounds: Bounds, track: Track) -> int:
    tar, remedy = folder.with_name("tar"), "Free some space, or name another folder."
    contents = open_archive(archive, bounds, lambda decompress: expand(archive, decompress, tar, bounds, remedy))
    members = list(contents.members.values())
    for name, wrong in (*contents.ignored, *((member.name, member.why) for member in members if member.why)):
        raise DataError(archive, f"is refused: {name!r} {wrong}", "If you trust it, unpack it yourself.")
    total, free = sum(member.size for member in members), shutil.disk_usage(folder).free
    if total > free:
        why = f"unpacks to {total / 2**20:,.0f} MiB, and {folder} has {free / 2**20:,.0f} MiB free"
        raise DataError(archive, why, remedy)
    for member in track(members, len(members)):
        place = folder.joinpath(*member.name.split("/"))
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("xb") as file:
            file.writelines(contents.read(member))
    return len(members)
