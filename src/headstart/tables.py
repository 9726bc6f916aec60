"""Tables of pictures and labels (.csv, .tsv), as people export them: encodings, delimiters, names of columns."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headstart import archives
from headstart.config import DataConfig, did_you_mean
from headstart.data import SPLITS, TABLES, Found, is_hidden, natural_key, walk
from headstart.errors import DataError

# Column names, lower case, most telling first.
IMAGE_COLUMNS: tuple[str, ...] = ("image", "source", "path", "image_path", "filepath", "file_path", "file", "filename")
IMAGE_COLUMNS += (
    "file_name",
    "image_name",
    "img",
    "img_path",
    "picture",
    "photo",
    "image_id",
    "id",
    "name",
    "图片",
    "图像",
    "文件名",
    "路径",
)
SINGLE_COLUMNS = ("label", "class", "category", "target", "class_name", "breed", "species", "标签", "类别")
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
    resolve = _resolver(path, config)
    rows = read_rows(path, lambda cell: not resolve(cell)[1])
    if len(rows) < 2:
        raise DataError(path, "has no rows", "Give a table with a header line and a line for each picture.")
    columns = _find_columns(path, rows[0], config)
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


def read_rows(path: Path, is_name: Callable[[str], bool] = lambda cell: False) -> list[list[str]]:
    """The cells of a table in UTF-8, UTF-16 (with mark) or GB18030, with the delimiter `,` `;` `|` or a tab.

    Where bytes are no UTF-8, `is_name` tells names of files that are no text at all from GB18030.
    """
    try:
        text = _decode(path.read_bytes(), is_name).lstrip("\r\n")
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", "Allow reading it.") from error
    header = text.split("\n", 1)[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t|", key=header.count)
    try:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise DataError(path, f"is not a table ({error})", "Save it as CSV again.") from error


def _decode(content: bytes, is_name: Callable[[str], bool]) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    raw = content.decode("utf-8-sig", "surrogateescape")
    odd = _odd_cells(raw)
    # Not UTF-8: either names of files that are no text at all, or an encoding of Chinese.
    if not odd or any(is_name(cell) for cell in odd):
        return raw
    try:
        return content.decode("gb18030")
    except UnicodeDecodeError:
        return raw


def _odd_cells(text: str) -> list[str]:
    """The cells, of all lines but the first, that hold bytes which are not UTF-8; of the first line, the line."""
    if not any("\udc80" <= c <= "\udcff" for c in text):
        return []
    header, *lines = text.splitlines()
    cells = [cell.strip('"') for line in lines for cell in re.split("[,;\t]", line)]
    return [cell for cell in [header, *cells] if any("\udc80" <= c <= "\udcff" for c in cell) and "\0" not in cell]


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
        if not cell.strip() or "\0" in cell:
            return "", "names no picture"
        for name in (cell, cell.strip(" \t")):
            for folder in folders:
                if name and archives.is_file(folder / name):
                    return _relative(folder / name, root), ""
        cell = cell.strip(" \t")
        if not by_name:
            by_name[""] = []  # walked: the folder is searched once
            for folder in folders:
                for name in walk(folder):
                    place, last = _relative(folder / name, root), name.rsplit("/", 1)[-1]
                    for key in {last, os.path.splitext(last)[0]}:  # some tables name pictures without their ending
                        by_name.setdefault(key, []).append(place)
        matches = sorted(set(by_name.get(os.path.basename(cell.replace("\\", "/")), [])))
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
    source, why = resolve(row[columns.image])
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
