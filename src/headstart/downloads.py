"""Downloads: continued where they broke off, checked before a file gets its name."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 10.0
_BLOCK_BYTES = 2**18

Track = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class Block:
    """A piece of a file as it arrives, and how far that brings the file: `received` of `size` bytes."""

    content: bytes
    received: int
    size: int


def download(
    address: str,
    target: Path,
    *,
    sha256: str = "",
    md5: str = "",
    size: int | None = None,
    track: Track = lambda blocks, total: blocks,
) -> Path:
    """Download a file, with one retry; the target. The arguments are those of `attempt`.

    Raises:
        OSError: where it cannot be had; the reason is in words.
    """
    try:
        return attempt(address, target, sha256=sha256, md5=md5, size=size, track=track)
    except OSError as error:
        log.info("download: %s: %s; trying once more", address, explain(error))
    return attempt(address, target, sha256=sha256, md5=md5, size=size, track=track)


def attempt(
    address: str,
    target: Path,
    *,
    sha256: str = "",
    md5: str = "",
    size: int | None = None,
    track: Track = lambda blocks, total: blocks,
) -> Path:
    """Download a file in one attempt; the target. A file that is there already is checked and not downloaded.

    What arrived before a connection broke is kept beside the target and continued by the next attempt, where a checksum
    can tell whether the parts fit; two processes do not write one file at once.

    Args:
        address: http or https; an address that starts with https may not lead away from it.
        target: where the file is put, once it is whole and right.
        sha256: its SHA-256 in hexadecimal, or the first digits of it.
        md5: its MD5, where nothing better was published.
        size: its size in bytes.
        track: wraps the blocks to show progress; called with them and their number.

    Raises:
        OSError: where the file cannot be had, or is not the right one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with alone(target):
        if target.exists():
            _check(target, sha256, md5, size)
            return target
        partial = target.with_name(f".{target.name}.partial")
        can_be_continued = bool(sha256 or md5)
        if not can_be_continued or (size is not None and _count(partial) > size):
            partial.unlink(missing_ok=True)
        if size is None or _count(partial) < size:
            with _discarded_on_error(partial, not can_be_continued):
                _receive(address, partial, size, track)
        with _discarded_on_error(partial):
            _check(partial, sha256, md5, size)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    return target


def explain(error: Exception) -> str:
    """Why a download failed, on one line and never nothing."""
    reason = getattr(error, "reason", "") or error
    reason = getattr(reason, "strerror", "") or reason
    return " ".join(str(reason).split())[:150] or type(error).__name__


@contextlib.contextmanager
def alone(target: Path, wait: bool = True) -> Iterator[None]:
    """Only one process at a time makes a target; the others wait, or get a `BlockingIOError`."""
    from filelock import FileLock, Timeout

    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise BlockingIOError(f"another process is making {target}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not delete what is open
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def _discarded_on_error(partial: Path, discarded: bool = True) -> Iterator[None]:
    try:
        yield
    except OSError:
        if discarded:
            partial.unlink(missing_ok=True)
        raise


def _count(file: Path) -> int:
    """The bytes of a file, 0 where it is not there."""
    return file.stat().st_size if file.exists() else 0


def _receive(address: str, partial: Path, size: int | None, track: Track) -> None:
    """Append to a part what it lacks; where the server cannot continue, begin again."""
    start = _count(partial)
    try:
        with _connect(address, partial) as answer:
            begin, whole = _find_range(answer, start)
            if size is not None and whole not in (None, size):
                raise OSError(f"the file there has {whole:,} bytes instead of {size:,}: it is another one")
            whole = size if whole is None else whole
            with partial.open("ab" if begin else "wb") as file:
                _write(_blocks(answer, begin, whole), file, begin, whole, track)
    except HTTPException as error:
        raise OSError(explain(error)) from error
    if whole is not None and _count(partial) != whole:
        raise OSError(f"broke off after {_count(partial):,} of {whole:,} bytes")


def _connect(address: str, partial: Path) -> Any:
    """The server's answer, from where the part ends if the server can do that."""
    import urllib.error
    import urllib.request

    _check_scheme(address, address)
    start = {"Range": f"bytes={_count(partial)}-"}
    request = urllib.request.Request(address, headers=start) if _count(partial) else address  # noqa: S310
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)  # noqa: S310
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # what is there has no such range: the part is none of it
            partial.unlink(missing_ok=True)
        raise OSError(f"the server says {error.code} {error.reason}") from error
    try:
        _check_scheme(address, getattr(answer, "url", None) or address)
    except OSError:
        answer.close()
        raise
    return answer


def _check_scheme(address: str, final: str) -> None:
    """Refuse what is not fetched by HTTP, and a redirection from a connection that is secured to one that is not."""
    asked, got = urlsplit(address).scheme, urlsplit(final).scheme
    if got not in ("http", "https") or (asked, got) == ("https", "http"):
        raise OSError(f"{final} is refused: it is not {'https' if asked == 'https' else 'http or https'}")


def _find_range(answer: Any, start: int) -> tuple[int, int | None]:
    """(where in the file the answer begins, the size of the whole file where that is told)."""
    headers = getattr(answer, "headers", None) or {}
    given = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range") or "")
    if getattr(answer, "status", 200) == 206 and given is not None:
        if int(given[1]) != start:
            raise OSError(f"the server continued at byte {given[1]} instead of {start}")
        return start, None if given[2] == "*" else int(given[2])
    length = headers.get("Content-Length") or ""
    return 0, int(length) if length.isdecimal() else None


def _blocks(answer: Any, begin: int, whole: int | None) -> Iterator[Block]:
    received = begin
    while content := answer.read(_BLOCK_BYTES):
        received += len(content)
        if whole is not None and received > whole:
            raise OSError(f"the server sent more than {whole:,} bytes")
        yield Block(content, received, whole or 0)


def _write(blocks: Iterator[Block], file: Any, begin: int, whole: int | None, track: Track) -> None:
    """Write the blocks as they come; where their number is not known, none is shown."""
    shown = blocks if whole is None else track(blocks, -(-(whole - begin) // _BLOCK_BYTES))
    for block in shown:
        file.write(block.content)


def _check(file: Path, sha256: str, md5: str, size: int | None) -> None:
    if size is not None and file.stat().st_size != size:
        raise OSError(f"{file} has {file.stat().st_size:,} bytes instead of {size:,}")
    for name, wanted in (("sha256", sha256), ("md5", md5)):
        if wanted and not _digest(file, name).startswith(wanted.lower()):
            raise OSError(f"the checksum of {file} is wrong: it is damaged, or another file")


def _digest(file: Path, name: str) -> str:
    running = hashlib.new(name, usedforsecurity=False)
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            running.update(block)
    return running.hexdigest()
