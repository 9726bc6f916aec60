"""The data sets of the tutorials: where they are published, how the right file is told, and `fetch`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart import archives, downloads
from headstart.config import did_you_mean
from headstart.errors import DataError, UsageError

log = logging.getLogger(__name__)

Track = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class TutorialSet:
    """A data set as it is published: one archive."""

    name: str
    recipe: str  # the tutorial that it belongs to
    address: str
    file: str  # what the archive is called
    bytes: int
    folder: str  # in the archive, the one to train on
    contents: str
    terms: str
    sha256: str = ""
    md5: str = ""

    @property
    def checksum(self) -> str:
        """What the archive is known by."""
        return f"sha256:{self.sha256}" if self.sha256 else f"md5:{self.md5}"


# Where only an MD5 was published, it guards against damage, not against ill will: that is left to https.
SETS = (
    TutorialSet(
        name="hymenoptera",
        recipe="ants-bees",
        address="https://download.pytorch.org/tutorial/hymenoptera_data.zip",
        file="hymenoptera_data.zip",
        bytes=47_286_322,
        sha256="fbc41b31d544714d18dd1230b1e2b455e1557766e13e67f9f5a7a23af7c02209",
        folder="hymenoptera_data",
        contents="ants and bees, train and val",
        terms="none stated; photographs of ImageNet, which is for research and teaching that earn nothing",
    ),
    TutorialSet(
        name="imagewoof",
        recipe="imagewoof",
        address="https://s3.amazonaws.com/fast-ai-imageclas/imagewoof2-160.tgz",
        file="imagewoof2-160.tgz",
        bytes=92_612_825,
        # Of the archive as it has been since February 2021; before, it was fcd23cc7dfce8837c95a8f9d63a128b7.
        md5="3d200a7be99704a0d7509be2a9fbfe15",
        folder="imagewoof2-160",
        contents="ten breeds of dogs at 160 pixels, train and val",
        terms="photographs of ImageNet, which is for research and teaching that earn nothing",
    ),
    TutorialSet(
        name="dogs-cats",
        recipe="dogs-cats",
        address="https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/"
        "kagglecatsanddogs_5340.zip",
        file="kagglecatsanddogs_5340.zip",
        bytes=824_887_076,
        sha256="b7974bd00a84a99921f36ee4403f089853777b5ae8d151c76a86e64900334af9",
        folder="PetImages",
        contents="25,000 cats and dogs without a split, 1,738 of them counted as damaged",
        terms="Microsoft's for research, in the archive's .docx",
    ),
    TutorialSet(
        name="birds",
        recipe="birds",
        address="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
        file="CUB_200_2011.tgz",
        bytes=1_150_585_339,
        md5="97eceeb196236b17998738112f37df78",
        folder="CUB_200_2011/images",
        contents="11,788 photographs of 200 species of birds, without a split",
        terms="photographs from the web, whose rights are their makers'; for research and teaching that earn nothing",
    ),
)


def fetch(
    name: str,
    out: str | os.PathLike[str] | None = None,
    *,
    track: Track = lambda items, total: items,
) -> Path:
    """Fetch a tutorial's data set, check it and unpack it; the folder to train on.

    What is there already, complete, is left as it is. An archive that lies beside the folder under its published name,
    such as one that was downloaded by hand, is checked and unpacked without a connection, and stays.

    Args:
        name: `hymenoptera`, `imagewoof`, `dogs-cats`, `birds`, or the recipe that a set belongs to.
        out: the folder that the archive is unpacked to; None: `data/NAME` in the current folder.
        track: wraps what arrives, then what is unpacked, to show progress; called with the pieces and their number.

    Raises:
        UsageError: for a name that is not known.
        DataError: for a set that cannot be had; where the folder holds something else; without a connection, with the
            file to download by hand and where to put it.
    """
    chosen = _find(name)
    target = Path(out) if out is not None else Path("data", chosen.name)
    if target.name in ("", ".."):
        raise UsageError(str(out), "is no name for a new folder", "Give --out a folder that is not there yet.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with downloads.alone(target, wait=False):
            if not _is_complete(chosen, target):
                _make(chosen, target, track)
    except BlockingIOError as error:
        raise DataError(
            target, "another process is fetching it", "Wait for it, or give --out another folder."
        ) from error
    except OSError as error:
        why = f"cannot be made ({downloads.explain(error)})"
        raise DataError(target, why, "Give --out a folder that you may write to.") from error
    return target / chosen.folder


def _find(name: str) -> TutorialSet:
    if name.lower() in ("scenes", "places365", "ai-challenger"):
        why = "cannot be fetched: its AI Challenger scenes are no longer given out, and Places365 in its place is 30 GB"
        remedy = "Sort photographs of scenes into a folder a class, and give it as data; any set of scenes will do."
        raise DataError("scenes", why, remedy)
    for known in SETS:
        if name.lower() in (known.name, known.recipe):
            return known
    names = [known.name for known in SETS]
    raise UsageError(name, f"is no tutorial's data set{did_you_mean(name, names)}", f"Give one of {', '.join(names)}.")


def _is_complete(chosen: TutorialSet, target: Path) -> bool:
    """Whether the folder holds the set; one that holds anything else is not touched."""
    note = archives.read_note(target)
    if note.get("checksum") == chosen.checksum:
        count = sum(len(files) for _, _, files in os.walk(target)) - 1  # without the note
        if count < note.get("files", 0):
            log.warning("%s: %d of its %d files are there", target, count, note["files"])
        return True
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        why = f"is there already, and was not made by `headstart fetch {chosen.name}`"
        raise DataError(target, why, "Move it away, or give --out another folder.")
    return False


def _make(chosen: TutorialSet, target: Path, track: Track) -> None:
    archive = target.parent / chosen.file
    by_hand = archive.exists()
    log.info("%s: %s; terms: %s", chosen.name, chosen.contents, chosen.terms)
    if not by_hand:
        log.info("%s: fetching %.0f MB from %s", chosen.name, chosen.bytes / 1e6, chosen.address)
    try:
        downloads.download(
            chosen.address, archive, sha256=chosen.sha256, md5=chosen.md5, size=chosen.bytes, track=track
        )
    except OSError as error:
        if by_hand:
            raise DataError(archive, downloads.explain(error), "Delete it, and fetch again.") from error
        why = f"could not be fetched ({downloads.explain(error)})"
        remedy = f"Go online, or put {chosen.address} at {archive.absolute()}, and fetch again."
        raise DataError(chosen.name, why, remedy) from error
    if target.is_dir():
        target.rmdir()  # an empty one
    archives.unpack(archive, target, checksum=chosen.checksum, track=track)
    if not by_hand:
        archive.unlink()
