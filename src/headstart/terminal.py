"""The terminal: lines on stderr, progress, and the places that results are written to."""

from __future__ import annotations

import codecs
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from headstart import display
from headstart.errors import RunError

T = TypeVar("T")


def say(text: str) -> None:
    """Write a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def check_place(path: Path | None) -> None:
    """Find out before the work that a file cannot be written after it."""
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise RunError(path, "cannot be written", "Give a file in a folder that you may write to.")


def write_json(path: Path, values: Any) -> None:
    """Write JSON for programs to a file that the user named."""
    try:
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(path, f"cannot be written ({error.strerror})", "Give a file that you may write to.")


@contextlib.contextmanager
def open_output(path: Path | None) -> Iterator[TextIO]:
    """The file that results go to, or stdout."""
    if path is None:
        yield sys.stdout
        return
    try:
        file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
    except OSError as error:
        raise _unwritable(path, error) from error
    with file:
        yield file


@contextlib.contextmanager
def show_progress(rows_to: Path | None = Path(), quiet: bool = False) -> Iterator[Any]:
    """A function that wraps pictures to show how far it is: a bar on a terminal, a line now and then elsewhere.

    Where rows go to the same terminal as they come (`rows_to` is None), they show it themselves.
    """
    if quiet or (rows_to is None and sys.stdout.isatty()):
        yield lambda items, total: items
        return
    if not sys.stderr.isatty():
        yield _lines
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:

        def track(items: Iterable[T], total: int) -> Iterator[T]:
            task = progress.add_task("pictures", total=total)
            for item in items:
                yield item
                text, lasting = display.progress(item)
                if lasting:
                    progress.console.print(text, markup=False, highlight=False)
                progress.update(task, advance=1, description=None if lasting else text or "pictures")
            progress.remove_task(task)

        yield track


def _lines(items: Iterable[T], total: int) -> Iterator[T]:
    last = start = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        text, lasting = display.progress(item)
        now = time.monotonic()
        if lasting:
            say(text)
        elif now - last > 5:
            left = (now - start) / number * (total - number)
            say(f"{text}, {left:.0f} s left" if text else f"pictures {number}/{total}")
            last = now


def encode_odd(error: UnicodeError) -> tuple[str | bytes, int]:
    """Names that are no text go out as they came in; what the terminal's encoding lacks is escaped."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


class Lines(logging.Handler):
    """What the modules log, as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        say(display.shown(record.getMessage()))
