"""Reading what people have: class folders, in a folder or an archive, or a table, as a `Dataset`."""

from __future__ import annotations

import dataclasses
import glob
import io
import os
import stat
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from headstart import archives
from headstart.config import DataConfig
from headstart.data import SPLITS, TABLES, Dataset, Found, Role, Sample, Task, fingerprint, natural_key, walk
from headstart.errors import DataError, UnreadableImage
from headstart.tables import find_table, read_table

OTHER_ARCHIVES = {".7z", ".rar", ".gz", ".bz2", ".xz", ".zst", ".lzma"}
PICTURES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".ico", ".tga", ".jp2", ".j2k", ".heic", ".heif", ".psd", ".pcx", ".dds"),
}


def read(
    data: str | os.PathLike[str], config: DataConfig | None = None, classes: Sequence[str] | None = None
) -> Dataset:
    """The data set in class folders (flat, or below train/val/test) or in a table (.csv, .tsv).

    Class folders lie in a folder or in an archive (.zip, .tar, .tar.gz and the like), whose pictures are read in place.
    One folder that alone holds all of them is looked through.

    Args:
        data: the folder, archive or table.
        config: how to read it; the defaults suit most.
        classes: the classes of a classifier that is to be measured: labels are then of these, and need not be several.

    Raises:
        DataError: for a missing or empty folder, a single class, a table whose rows do not resolve, a damaged archive.
    """
    if not os.fspath(data):
        raise DataError("''", "names nothing", "Give an existing folder, archive or table.")
    config, path = config or DataConfig(), Path(data)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        remedy = "Give an existing folder, archive or table."
        raise DataError(path, f"cannot be opened ({error.strerror})", remedy) from error
    if stat.S_ISDIR(mode) or archives.is_archive(path):
        try:
            found = _read_folders(path, config, classes or ())
        except PermissionError as error:
            raise DataError(error.filename, "cannot be read (permission denied)", "Allow reading it.") from error
    elif path.suffix.lower() in TABLES:
        found = read_table(path, config)
    elif path.suffix.lower() in OTHER_ARCHIVES:
        raise DataError(path, "is an archive of a kind that is not read", "Unpack it and give the folder.")
    else:
        remedy = "Give a folder of class folders, a .zip or .tar of them, or a .csv or .tsv."
        raise DataError(path, "is neither a folder nor a table", remedy)
    return _checked(path, found, classes)


def _read_folders(path: Path, config: DataConfig, known: Sequence[str]) -> Found:
    """The pictures in the class folders of a folder or archive; where it has none but a table, what the table names."""
    packed = archives.is_archive(path)
    root, prefix = (path.parent, path.name + archives.MARK) if packed else (path, "")
    faults = {name: is_picture(root / (prefix + name))[1] for name in walk(path)}
    top = _find_top([name for name, fault in faults.items() if not fault], known)
    splits = _split_folders([name[len(top) :] for name in faults if name.startswith(top)])
    rows: list[tuple[str, tuple[str, ...], str, str]] = []
    ignored = [(prefix + name, why) for name, why in archives.list_ignored(path)] if packed else []
    for name, fault in faults.items():
        label, split, why = _place(name, top, splits, config.classes)
        if why or fault:
            ignored.append((prefix + name, why or fault))
        else:
            rows.append((prefix + name, (label,), "", split))
    labels = {row[1][0] for row in rows}
    if top or len(labels) <= 1 or all(label.lower() in SPLITS for label in labels):
        table = _find_table_beside(path, top, labels, config)
        if table is not None:
            return read_table(table, config)
    _check_labels(path, labels, max((row[0].count("/") for row in rows), default=0) - top.count("/"), config)
    outside = sorted({source[len(prefix + top) :].split("/")[0] for source, why in ignored if why == _OUTSIDE})
    notices = [f"folder {name!r} lies beside the splits and was left out" for name in outside]
    if top:
        notices.append(f"all pictures lie in {top[:-1]!r}: what lies there was taken for the classes or splits")
    return Found(root, rows, "single", ignored, notices)


_OUTSIDE = "outside the split folders"


def _find_top(pictures: Sequence[str], known: Sequence[str]) -> str:
    """The folder, with its /, that holds all pictures, and each of them in a folder of its own; or an empty text.

    It is no class, unless a classifier knows it as one.
    """
    top = ""
    while True:
        below = [name[len(top) :].split("/") for name in pictures]
        first = below[0][0] if below else ""
        if not below or any(parts[0] != first or len(parts) < 3 for parts in below):
            return top
        if any(f"{label}/".startswith(f"{top}{first}/") for label in known):
            return top
        top += first + "/"


def _find_table_beside(path: Path, top: str, labels: Collection[str], config: DataConfig) -> Path | None:
    """The table that says what the pictures in a folder show, where there is one."""
    if not archives.is_archive(path):
        return find_table(path, config) or (find_table(path / top, config) if top else None)
    beside = [name for name in walk(path) if "/" not in name.removeprefix(top)]
    tables = [name for name in beside if Path(name).suffix.lower() in TABLES]
    if tables and len(labels) <= 1:
        why = f"has no class folders but the table {tables[0]!r}, which is not read from an archive"
        raise DataError(path, why, "Unpack it and give the folder.")
    return None


def _check_labels(path: Path, labels: Collection[str], depth: int, config: DataConfig) -> None:
    if len(labels) > 1 and all(label.lower() in SPLITS for label in labels):
        if depth > 1:
            raise DataError(path, "has no training split", "Name one split folder train.")
        why = "holds pictures in split folders, but no class folders below them"
        raise DataError(path, why, "Put each class in its own folder below each split.")
    if config.task == "multi" and labels:
        why = "holds its pictures in folders, which gives each picture one label"
        raise DataError(path, why, "Give a table for several labels a picture.")


def _split_folders(files: list[str]) -> dict[str, str]:
    """Folder name -> train, val or test; empty where the first level holds classes.

    A split folder holds folders; a folder `train` that holds pictures directly is a class, as for vehicles.
    """
    nested = {parts[0] for parts in (source.split("/") for source in files) if len(parts) > 2}
    splits = {name: SPLITS[name.lower()] for name in nested if name.lower() in SPLITS}
    return splits if "train" in splits.values() else {}


def _place(name: str, top: str, splits: dict[str, str], classes: str) -> tuple[str, str, str]:
    """(label, split, why it has none) of a file by its folders below the top."""
    folders = name[len(top) :].split("/")[:-1] if name.startswith(top) else []
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
        (source, reason), others = found.ignored[0] if found.ignored else ("", ""), len(found.ignored)
        more = f" ({others} other files; {source!r} {reason})" if others else ""
        why = f"holds no pictures in class folders{more}"
        raise DataError(path, why, "Put the pictures of each class in its own folder.")
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
    """(files that paths name, pictures in folders and archives, matches of globs; how many other files those hold).

    A file that is named stands in the result in any case, there or not.
    """
    found: list[Path] = []
    others = 0
    for given in (os.fspath(path) for path in paths):
        below = _list_below(given)
        if below is not None:
            pictures = [path for path in below if is_picture(path)[0]]
            others += len(below) - len(pictures)
            found += pictures
        elif glob.has_magic(given) and not os.path.lexists(given):
            matches = sorted(glob.glob(given, recursive=True), key=natural_key)
            found += [Path(match) for match in matches if os.path.isfile(match)] or [Path(given)]
        else:
            found.append(Path(given))
    return found, others


def _list_below(given: str) -> list[Path] | None:
    """The files in a folder, an archive, or a folder of an archive; None for anything else."""
    if os.path.isdir(given):
        return [Path(given, name) for name in walk(Path(given))]
    archive, folder = (Path(given), "") if archives.is_archive(given) else archives.split(given) or (None, "")
    if archive is None:
        return None
    inside = f"{folder.strip('/')}/" if folder else ""
    below = [name for name in walk(archive) if name.startswith(inside)]
    return [Path(f"{archive}{archives.MARK}{name}") for name in below] if below or not folder else None


def is_picture(path: Path) -> tuple[bool, str]:
    """(whether a file claims to be a picture, by its ending or its first bytes; why not).

    A file with a picture's ending that holds none passes here and is reported as unreadable later.
    """
    inside = archives.split(path)
    if inside is None and not path.is_file():
        broken = path.is_symlink() and path.suffix.lower() in PICTURES and not path.exists()
        return broken, "" if broken else "not a regular file"
    if path.suffix.lower() in PICTURES:
        return True, ""
    from PIL import Image, UnidentifiedImageError

    from headstart.images import read_bytes

    try:
        with Image.open(path if inside is None else io.BytesIO(read_bytes(path))):
            return True, ""
    except UnreadableImage as error:
        return False, f"not a picture ({error.why})"
    except UnidentifiedImageError:
        return False, "not a picture in a known format"
    except Exception as error:  # Pillow's readers raise whatever a broken header leads them to
        return False, f"not a picture ({' '.join(str(error).split()) or type(error).__name__})"
