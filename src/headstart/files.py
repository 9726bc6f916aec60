"""Files: written whole or not at all, and told apart by their content."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from pathlib import Path

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
