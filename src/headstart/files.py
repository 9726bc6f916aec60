"""Files: written whole or not at all, and told apart by their content."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from pathlib import Path


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


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(opened, "sha256").hexdigest()
        running = hashlib.sha256()
        while block := opened.read(2**20):
            running.update(block)
        return running.hexdigest()
