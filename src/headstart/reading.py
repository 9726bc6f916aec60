"""Reading what people have: folders of class folders, or a table, as a `Dataset`."""

from __future__ import annotations

import dataclasses
import glob
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from headstart.config import DataConfig
from headstart.data import SPLITS, TABLES, Dataset, Found, Role, Sample, Task, fingerprint, natural_key, walk
from headstart.errors import DataError
from headstart.tables import find_table, read_table

ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"}
PICTURES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".ico", ".tga", ".jp2", ".j2k", ".heic", ".heif", ".psd", ".pcx", ".dds"),
}


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
    if not os.fspath(data):
        raise DataError("''", "names nothing", "Give an existing folder or table.")
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
    if len({row[1] for row in rows}) <= 1 or all(row[1][0].lower() in SPLITS for row in rows):
        table = find_table(path, config)
        if table is not None:
            return read_table(table, config)
        if len({row[1] for row in rows}) > 1:
            if any(row[0].count("/") > 1 for row in rows):
                raise DataError(path, "has no training split", "Name one split folder train.")
            why = "holds pictures in split folders, but no class folders below them"
            raise DataError(path, why, "Put each class in its own folder below each split.")
    if config.task == "multi" and rows:
        why = "is a folder, which gives each picture one label"
        raise DataError(path, why, "Give a table for several labels a picture.")
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
