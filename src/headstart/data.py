"""The values that reading gives: pictures with labels, groups and roles; and what lies in a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from headstart import archives

Role = Literal["fit", "select", "report", ""]
Task = Literal["single", "multi"]

# What people call the parts of a data set; `validation` and `test` mean a role only together (see `assign_given`).
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
TABLES = {".csv", ".tsv"}
_SYSTEM_NAMES = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled picture."""

    source: str  # path relative to the data set's root, with /; in an archive: z.zip::a.jpg
    labels: tuple[str, ...]
    group: str = ""
    role: Role = ""


@dataclass(frozen=True)
class Dataset:
    """Labelled pictures; `ignored` names the files that are none, `notices` what a reader should know."""

    root: Path
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    task: Task
    fingerprint: str
    ignored: tuple[tuple[str, str], ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The samples' sources, in order."""
        return tuple(sample.source for sample in self.samples)

    @property
    def has_roles(self) -> bool:
        """Whether every sample has a role."""
        return all(sample.role for sample in self.samples)

    def path(self, source: str) -> Path:
        """Where a source lies; `images.open_image` reads from archives too."""
        return self.root / source

    def with_samples(self, samples: Iterable[Sample]) -> Dataset:
        """The same data set with other samples."""
        return dataclasses.replace(self, samples=tuple(samples))

    def of_role(self, *roles: Role) -> tuple[Sample, ...]:
        """The samples of one role or several, in order."""
        return tuple(sample for sample in self.samples if sample.role in roles)


def is_hidden(name: str) -> bool:
    """Whether a file or folder belongs to the system rather than to the data."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def natural_key(text: str) -> tuple[list[tuple[int, int, str]], str]:
    """A sort key that puts 2 before 10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text.casefold())
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts], text


def walk(folder: Path) -> Iterator[str]:
    """All visible files below a folder or in an archive, as relative paths with /, in natural order.

    A cycle of links is cut.
    """

    def visit(current: str, prefix: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in above:
            return
        above |= {(status.st_dev, status.st_ino)}
        with os.scandir(current) as entries:
            visible = sorted((e for e in entries if not is_hidden(e.name)), key=lambda e: natural_key(e.name))
        for entry in visible:
            if os.path.isdir(entry.path):  # unlike the entry's own, false for a link to itself
                yield from visit(entry.path, f"{prefix}{entry.name}/", above)
            else:
                yield prefix + entry.name

    if archives.is_archive(folder):
        names = [name.split("/") for name in archives.list_names(folder)]
        visible = [parts for parts in names if not any(map(is_hidden, parts))]
        return map("/".join, sorted(visible, key=lambda parts: [natural_key(part) for part in parts]))
    return visit(os.fspath(folder), "")


def fingerprint(root: Path, samples: Iterable[Sample]) -> str:
    """A SHA-256 of sources, labels, groups, roles and file sizes: changes when the data set does."""
    digest = hashlib.sha256()
    for sample in samples:
        try:
            size = archives.size(root / sample.source)
        except OSError:  # a broken link has no size; it is named when it cannot be opened
            size = -1
        row = repr((sample.source, sample.labels, sample.group, sample.role, size))
        digest.update(row.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@dataclass(frozen=True)
class Found:
    """What a reader found, before it is checked. Roles are still split names: train, val, test or ""."""

    root: Path
    rows: list[tuple[str, tuple[str, ...], str, str]]  # source, labels, group, split
    task: Task
    ignored: list[tuple[str, str]]
    notices: list[str]


def count_classes(samples: Iterable[Sample]) -> Counter[str]:
    """Pictures a class."""
    return Counter(label for sample in samples for label in sample.labels)
