"""What is to be learned: folders and tables of labelled pictures, read as a `Dataset`.

Pictures are named here, not opened, and roles are only taken over where they are given; `splits` deals them out.
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import hashlib
import io
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from headstart.config import DataConfig, did_you_mean
from headstart.errors import DataError

Role = Literal["fit", "select", "report", ""]
Task = Literal["single", "multi"]

# What people call the parts of a data set; `validation` and `test` mean a role only together (see `assign_given`).
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
TABLES = {".csv", ".tsv"}
ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"}
PICTURES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".ico", ".tga", ".jp2", ".j2k", ".heic", ".heif", ".psd", ".pcx", ".dds"),
}
_SYSTEM_NAMES = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled picture."""

    source: str  # path relative to the data set's root, with /
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
        """Where a source lies."""
        return self.root / source

    def with_samples(self, samples: Iterable[Sample]) -> Dataset:
        """The same data set with other samples."""
        return dataclasses.replace(self, samples=tuple(samples))

    def of_role(self, role: Role) -> tuple[Sample, ...]:
        """The samples of one role, in order."""
        return tuple(sample for sample in self.samples if sample.role == role)


def read(
    data: str | os.PathLike[str], config: DataConfig | None = None, classes: Sequence[str] | None = None
) -> Dataset:
    """The data set in a folder of class folders (flat, or below train/val/test) or in a table (.csv, .tsv).

    Args:
        data: the folder or table.
        config: how to read it; the defaults suit most.
        classes: the classes of a classifier that is to be measured: labels are then of these, and need not be several.

    Raises:
        DataError: for a missing or empty folder, a single class, a table whose rows do not resolve.
    """
    config, path = config or DataConfig(), Path(data)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(path, f"cannot be opened ({error.strerror})", "Give an existing folder or table.") from error
    if stat.S_ISDIR(mode):
        try:
            found = _read_folder(path, config)
        except PermissionError as error:
            raise DataError(error.filename, "cannot be read (permission denied)", "Allow reading it.") from error
    elif path.suffix.lower() in TABLES:
        found = read_table(path, config)
    elif path.suffix.lower() in ARCHIVES:
        raise DataError(path, "is an archive, which is not read directly", "Unpack it and give the folder.")
    else:
        raise DataError(path, "is neither a folder nor a table", "Give a folder of class folders, or a .csv or .tsv.")
    return _checked(path, found, classes)


def is_hidden(name: str) -> bool:
    """Whether a file or folder belongs to the system rather than to the data."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def natural_key(text: str) -> tuple[list[tuple[int, int, str]], str]:
    """A sort key that puts 2 before 10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text.casefold())
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts], text


def walk(folder: Path) -> Iterator[str]:
    """All visible files below a folder, as relative paths with /, in natural order; a cycle of links is cut."""
    seen: set[tuple[int, int]] = set()

    def visit(current: str, prefix: str) -> Iterator[str]:
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(current) as entries:
            visible = sorted((e for e in entries if not is_hidden(e.name)), key=lambda e: natural_key(e.name))
        for entry in visible:
            if entry.is_dir():
                yield from visit(entry.path, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name

    return visit(os.fspath(folder), "")


def find_pictures(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Path], int]:
    """(the files that paths name: files, pictures in folders, matches of globs; how many other files folders hold).

    A file that is named stands in the result in any case, there or not.
    """
    found: list[Path] = []
    others = 0
    for given in (os.fspath(path) for path in paths):
        if os.path.isdir(given):
            below = [Path(given, name) for name in walk(Path(given))]
            pictures = [path for path in below if is_picture(path)[0]]
            others += len(below) - len(pictures)
            found += pictures
        elif glob.has_magic(given) and not os.path.lexists(given):
            matches = sorted(glob.glob(given, recursive=True), key=natural_key)
            found += [Path(match) for match in matches if os.path.isfile(match)] or [Path(given)]
        else:
            found.append(Path(given))
    return found, others


def is_picture(path: Path) -> tuple[bool, str]:
    """(whether a file claims to be a picture, by its ending or its first bytes; why not).

    A file with a picture's ending that holds none passes here and is reported as unreadable later.
    """
    if not path.is_file():
        broken = path.is_symlink() and path.suffix.lower() in PICTURES and not path.exists()
        return broken, "" if broken else "not a regular file"
    if path.suffix.lower() in PICTURES:
        return True, ""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path):
            return True, ""
    except UnidentifiedImageError:
        return False, "not a picture in a known format"
    except Exception as error:  # Pillow's readers raise whatever a broken header leads them to
        return False, f"not a picture ({' '.join(str(error).split()) or type(error).__name__})"


def fingerprint(root: Path, samples: Iterable[Sample]) -> str:
    """A SHA-256 of sources, labels, groups, roles and file sizes: changes when the data set does."""
    digest = hashlib.sha256()
    for sample in samples:
        try:
            size = os.stat(root / sample.source).st_size
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


def _read_folder(path: Path, config: DataConfig) -> Found:
    files = list(walk(path))
    splits = _split_folders(files)
    rows: list[tuple[str, tuple[str, ...], str, str]] = []
    ignored: list[tuple[str, str]] = []
    for source in files:
        label, split, why = _place(source, splits, config.classes)
        if not why:
            why = is_picture(path / source)[1]
        if why:
            ignored.append((source, why))
        else:
            rows.append((source, (label,), "", split))
    if len({row[1] for row in rows}) <= 1:
        table = find_table(path, config)
        if table is not None:
            return read_table(table, config)
    outside = sorted({source.split("/")[0] for source, why in ignored if why == _OUTSIDE})
    notices = [f"folder {name!r} lies beside the splits and was left out" for name in outside]
    return Found(path, rows, "single", ignored, notices)


_OUTSIDE = "outside the split folders"


def _split_folders(files: list[str]) -> dict[str, str]:
    """Folder name -> train, val or test; empty where the first level holds classes.

    A split folder holds folders; a folder `train` that holds pictures directly is a class, as for vehicles.
    """
    nested = {parts[0] for parts in (source.split("/") for source in files) if len(parts) > 2}
    splits = {name: SPLITS[name.lower()] for name in nested if name.lower() in SPLITS}
    return splits if "train" in splits.values() else {}


def _place(source: str, splits: dict[str, str], classes: str) -> tuple[str, str, str]:
    """(label, split, why it has none) of a file by its folders."""
    folders = source.split("/")[:-1]
    split = ""
    if splits:
        if not folders or folders[0] not in splits:
            return "", "", _OUTSIDE if folders else "outside the class folders"
        split = splits[folders.pop(0)]
    if not folders:
        return "", "", "outside the class folders"
    return ("/".join(folders) if classes == "leaf" else folders[0]), split, ""


def _checked(path: Path, found: Found, known: Sequence[str] | None) -> Dataset:
    if not found.rows:
        raise DataError(path, "holds no pictures in class folders", "Put the pictures of each class in its own folder.")
    task: Task = found.task
    samples = [Sample(source, labels, group) for source, labels, group, _ in found.rows]
    if known is not None:
        _check_known(path, samples, known)
        mark = fingerprint(found.root, samples)
        return Dataset(found.root, tuple(samples), tuple(known), task, mark, tuple(found.ignored), tuple(found.notices))
    given = [split for *_, split in found.rows]
    trained = [sample for sample, split in zip(samples, given, strict=True) if split in ("", "train")]
    classes = tuple(sorted({label for sample in trained for label in sample.labels}, key=natural_key))
    if len(classes) < 2:
        only = f"has only the class {classes[0]!r}" if classes else "has no labels for training"
        raise DataError(path, only, "Give pictures of at least two classes, each in its own folder.")
    unknown = sorted({label for sample in samples for label in sample.labels} - set(classes), key=natural_key)
    if unknown:
        names = ", ".join(map(repr, unknown[:5])) + (" and more" if len(unknown) > 5 else "")
        raise DataError(
            path, f"has classes outside training that training lacks: {names}", "Give the splits the same class names."
        )
    samples = assign_given(path, samples, given)
    mark = fingerprint(found.root, samples)
    return Dataset(found.root, tuple(samples), classes, task, mark, tuple(found.ignored), tuple(found.notices))


def _check_known(path: Path, samples: Iterable[Sample], known: Sequence[str]) -> None:
    unknown = sorted({label for sample in samples for label in sample.labels} - set(known), key=natural_key)
    if unknown:
        why = f"has classes that the classifier does not know: {', '.join(map(repr, unknown[:5]))}"
        raise DataError(path, why, f"It knows: {', '.join(map(repr, known[:10]))}.")


def assign_given(path: Path, samples: list[Sample], given: list[str]) -> list[Sample]:
    """Roles from given splits: with train, val and test they are fit, select and report; with two, fit and report."""
    names = set(given)
    if names == {""} or names == {"train"}:
        return samples
    if "" in names:
        raise DataError(path, "gives a split for some pictures only", "Give one for every picture, or for none.")
    if "train" not in names:
        raise DataError(path, "has no training split", "Name one split train.")
    roles: dict[str, Role] = {"train": "fit", "val": "report", "test": "report"}
    if names == {"train", "val", "test"}:
        roles["val"] = "select"
    return [dataclasses.replace(sample, role=roles[split]) for sample, split in zip(samples, given, strict=True)]


def count_classes(samples: Iterable[Sample]) -> Counter[str]:
    """Pictures a class."""
    return Counter(label for sample in samples for label in sample.labels)


# Column names, lower case, most telling first.
IMAGE_COLUMNS: tuple[str, ...] = ("image", "source", "path", "image_path", "filepath", "file_path", "file", "filename")
IMAGE_COLUMNS += ("file_name", "image_name", "img", "img_path", "picture", "photo", "image_id", "id", "name")
SINGLE_COLUMNS = ("label", "class", "category", "target", "class_name", "breed", "species")
MULTI_COLUMNS = ("labels", "tags", "classes", "categories")
SPLIT_COLUMNS = ("split", "subset", "set", "partition", "role", "fold_name")
GROUP_COLUMNS = ("group", "group_id", "patient", "patient_id", "subject", "subject_id")

# `split.csv` of a run folder can be given as data again: its roles are splits under other names.
_ROLE_NAMES = {"fit": "train", "select": "val", "report": "test"}


@dataclass(frozen=True)
class Columns:
    """Where in a row the picture and its labels stand; -1 where the table has no such column."""

    image: int
    label: int
    split: int
    group: int
    multi: bool


def find_table(folder: Path, config: DataConfig) -> Path | None:
    """The only table at the top of a folder, if it names pictures; else None."""
    tables = [entry for entry in folder.iterdir() if entry.suffix.lower() in TABLES and entry.is_file()]
    tables = [entry for entry in tables if not is_hidden(entry.name)]
    if len(tables) != 1:
        return None
    rows = read_rows(tables[0])
    names = [name.strip().lower() for name in rows[0]] if rows else []
    named = (config.image_column.lower(),) if config.image_column else IMAGE_COLUMNS
    labelled = (config.label_column.lower(),) if config.label_column else SINGLE_COLUMNS + MULTI_COLUMNS
    fits = any(name in named for name in names) and any(name in labelled for name in names)
    return tables[0] if fits else None


def read_table(path: Path, config: DataConfig) -> Found:
    """The pictures that a table names; the first row holds the column names.

    Raises:
        DataError: where a column is missing, a row's picture is not found, or labels contradict, by row number.
    """
    rows = read_rows(path)
    if len(rows) < 2:
        raise DataError(path, "has no rows", "Give a table with a header line and a line for each picture.")
    columns = _find_columns(path, rows[0], config)
    resolve = _resolver(path, config)
    pictures: dict[str, tuple[tuple[str, ...], str, str]] = {}
    wrong: list[str] = []
    repeated = 0
    for number, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        source, labels, group, split, why = _read_row(row, columns, config, resolve)
        if not why and source in pictures:
            repeated += 1
            labels, why = _merge(pictures[source], labels, group, split, columns.multi)
        if why:
            wrong.append(f"row {number}: {why}")
        else:
            pictures[source] = labels, group, split
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise DataError(path, "; ".join(wrong[:3]) + more, "Correct these rows, or give --images DIR.")
    notices = [f"{repeated} rows repeat a picture and were merged"] if repeated else []
    found = [(source, *rest) for source, rest in pictures.items()]
    return Found(path.parent, found, "multi" if columns.multi else "single", [], notices)


def read_rows(path: Path) -> list[list[str]]:
    """The cells of a table in UTF-8, UTF-16 (with mark) or GB18030, with the delimiter `,` `;` `|` or a tab."""
    try:
        text = _decode(path.read_bytes(), path.parent)
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", "Allow reading it.") from error
    header = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t|", key=header.count)
    try:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise DataError(path, f"is not a table ({error})", "Save it as CSV again.") from error


def _decode(content: bytes, folder: Path) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass  # not UTF-8: either an encoding of Chinese, or names of files that are no text at all
    raw = content.decode("utf-8-sig", "surrogateescape")
    if any(os.path.exists(folder / cell) for line in raw.splitlines()[1:] for cell in _odd_cells(line)):
        return raw
    try:
        return content.decode("gb18030")
    except UnicodeDecodeError:
        return raw


def _odd_cells(line: str) -> list[str]:
    cells = line.replace("\t", ",").replace(";", ",").split(",")
    return [cell.strip('"') for cell in cells if any("\udc80" <= c <= "\udcff" for c in cell) and "\0" not in cell]


def _find_columns(path: Path, header: list[str], config: DataConfig) -> Columns:
    names = [name.strip().lower() for name in header]

    def find(given: str, known: tuple[str, ...]) -> int:
        if given:
            if given.lower() not in names:
                hint = did_you_mean(given.lower(), names)
                raise DataError(path, f"has no column {given!r}{hint}", f"Its columns are: {', '.join(names)}.")
            return names.index(given.lower())
        return next((names.index(name) for name in known if name in names), -1)

    image = find(config.image_column, IMAGE_COLUMNS)
    label = find(config.label_column, SINGLE_COLUMNS + MULTI_COLUMNS)
    for index, wanted, flag in ((image, "pictures", "--image-column"), (label, "labels", "--label-column")):
        if index < 0:
            why = f"has no column of {wanted} that is known by name (it has: {', '.join(names)})"
            raise DataError(path, why, f"Name the column with {flag}.")
    multi = config.task == "multi" or (config.task == "auto" and names[label] in MULTI_COLUMNS)
    return Columns(
        image, label, find(config.split_column, SPLIT_COLUMNS), find(config.group_column, GROUP_COLUMNS), multi
    )


def _resolver(path: Path, config: DataConfig) -> Callable[[str], tuple[str, str]]:
    """A function from a table's cell to (source relative to the table's folder, what is wrong)."""
    root = path.parent
    folders = [root] + ([Path(config.images)] if config.images else [])
    if config.images and not Path(config.images).is_dir():
        raise DataError(config.images, "is no folder", "Give --images an existing folder.")
    by_name: dict[str, list[str]] = {}

    def resolve(cell: str) -> tuple[str, str]:
        if not cell or "\0" in cell:
            return "", "names no picture"
        for folder in folders:
            if (folder / cell).is_file():
                return _relative(folder / cell, root), ""
        if not by_name:
            by_name[""] = []  # walked: the folder is searched once
            for folder in folders:
                for name in walk(folder):
                    by_name.setdefault(name.rsplit("/", 1)[-1], []).append(_relative(folder / name, root))
        matches = sorted(set(by_name.get(os.path.basename(cell), [])))
        if len(matches) == 1:
            return matches[0], ""
        return "", f"{cell!r} is not found" if not matches else f"{cell!r} may be any of {len(matches)} files"

    return resolve


def _relative(path: Path, root: Path) -> str:
    """The path as a source: relative to the root where it lies below, else absolute."""
    text = os.path.normpath(path)
    below = os.path.relpath(text, root)
    return os.path.abspath(text) if below.startswith("..") else below.replace(os.sep, "/")


def _read_row(
    row: list[str], columns: Columns, config: DataConfig, resolve: Callable[[str], tuple[str, str]]
) -> tuple[str, tuple[str, ...], str, str, str]:
    """(source, labels, group, split, what is wrong) of one row."""
    if len(row) <= max(columns.image, columns.label, columns.split, columns.group):
        return "", (), "", "", f"has {len(row)} cells, fewer than the header"
    source, why = resolve(row[columns.image].strip(" \t"))
    labels = _split_labels(row[columns.label], config.separator) if columns.multi else (row[columns.label].strip(),)
    if not why and labels == ("",):
        why = "has no label"
    split = ""
    if columns.split >= 0 and not why:
        name = row[columns.split].strip().lower()
        split = SPLITS.get(_ROLE_NAMES.get(name, name), "")
        if name and not split:
            why = f"has the unknown split {name!r}"
    group = row[columns.group].strip() if columns.group >= 0 else ""
    return source, labels, group, split, why


def _split_labels(cell: str, separator: str) -> tuple[str, ...]:
    """The labels in one cell, each once, in natural order."""
    if not separator:
        separator = next((mark for mark in "|;," if mark in cell), "")
    parts = cell.split(separator) if separator else cell.split()
    return tuple(sorted({part.strip() for part in parts if part.strip()}, key=natural_key))


def _merge(
    known: tuple[tuple[str, ...], str, str], labels: tuple[str, ...], group: str, split: str, multi: bool
) -> tuple[tuple[str, ...], str]:
    """(labels of a picture that a second row names, what is wrong)."""
    if known[1:] != (group, split):
        return labels, "gives a picture a second group or split"
    if multi:
        return tuple(sorted({*known[0], *labels}, key=natural_key)), ""
    if known[0] != labels:
        return labels, f"gives a picture a second label, {labels[0]!r} beside {known[0][0]!r} (or is it --task multi?)"
    return labels, ""
