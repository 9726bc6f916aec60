"""Files: written whole or not at all, and told apart by their content."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)

T = TypeVar("T")
UNSEALED = "0" * 64  # where a seal will stand


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever happens."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # a full disk does not say what it was full for
        raise
    finally:
        with contextlib.suppress(OSError):  # the error that matters is the one of writing
            partial.unlink(missing_ok=True)


def remember(file: Path, value: DataclassInstance, otherwise: str) -> None:
    """Keep what was found out as JSON, for the next time; where that cannot be written, what follows is logged."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(dataclasses.asdict(value)).encode())
    except OSError as error:
        log.info("%s cannot be written (%s): %s", file, error.strerror, otherwise)


def recall(file: Path, make: Callable[[dict[str, Any]], T], otherwise: str) -> T | None:
    """What `remember` kept; None where there is nothing, or nothing that can be read, and then what follows is logged.

    Args:
        file: where it lies.
        make: makes the value of its JSON values.
        otherwise: what follows where it cannot.
    """
    try:
        return make(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, OSError) as error:
        log.info("%s cannot be read (%s): %s", file, error, otherwise)
        return None


def mark_used(file: Path) -> None:
    """Note that a file of a cache was used: the least recently used are the first to go."""
    with contextlib.suppress(OSError):  # somebody else's, or deleted meanwhile: it is as good without a mark
        os.utime(file)


def sync(folder: Path) -> None:
    """Wait until a folder's entries are on the disk: a rename is only then safe from a power cut."""
    if os.name != "posix":
        return  # a folder cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def seal(content: bytes) -> bytes:
    """Content with its first 64 zeros (`UNSEALED`) replaced by its own SHA-256."""
    return content.replace(UNSEALED.encode(), hashlib.sha256(content).hexdigest().encode(), 1)


def holds_seal(content: bytes, sha256: str) -> bool:
    """Whether content is what `seal` made with this SHA-256: one changed bit is noticed."""
    unsealed = content.replace(sha256.encode(), UNSEALED.encode(), 1)
    return len(sha256) == len(UNSEALED) and hashlib.sha256(unsealed).hexdigest() == sha256


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(opened, "sha256").hexdigest()
        running = hashlib.sha256()
        while block := opened.read(2**20):
            running.update(block)
        return running.hexdigest()
