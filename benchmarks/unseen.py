"""Two sets for the contest that are close to unseen, clip art and stamps, of two packages of Debian.

make contest-data                           (downloads the packages, 290 MB, and makes the sets of them)
python benchmarks/unseen.py PACKAGE.deb...  (of packages that are there)

Writes `clipart` and `stamps` into `.contest/data`, where contest.py looks for sets too, on white and of 512 pixels at
most, as rivals take what lies behind a transparent pixel for what is seen. Needs `dpkg-deb`, and for the download
`apt-get`. The contest's pictures are of openclipart-png 1:0.18+dfsg-19 and tuxpaint-stamps-default 2022.06.04-1. No
rule of headstart was made by them; docs/contest.md says what was seen of them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / ".contest/data"
PACKAGES = {"openclipart-png": "1:0.18+dfsg-19", "tuxpaint-stamps-default": "2022.06.04-1"}  # and their versions
SIDE = 512  # pixels, at most
TRAIN, VAL = 60, 40  # pictures of a class, at most; where they are fewer, in these shares


class Source(NamedTuple):
    """Where a set's pictures lie in a package: a folder for each class, with other folders below."""

    folder: str
    classes: tuple[str, ...]  # all folders that say what a picture shows, and have 30 pictures or more


SOURCES = {
    "clipart": Source(
        "usr/share/openclipart/png",
        ("animals", "buildings", "food", "people", "plants", "tools", "transportation"),
    ),
    "stamps": Source(
        "usr/share/tuxpaint/stamps",
        ("animals", "food", "household", "plants", "seasonal", "symbols", "town", "vehicles"),
    ),
}


def main() -> None:
    packages = [Path(word) for word in sys.argv[1:]]
    need("dpkg-deb" if packages else "apt-get", "dpkg-deb")
    for package in packages or download():
        with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
            subprocess.run(("dpkg-deb", "-x", package, folder), check=True)
            for name, source in SOURCES.items():
                if Path(folder, source.folder).is_dir():
                    print(
                        name, package.name, *(f"{part} {count}" for part, count in write(name, source, folder).items())
                    )


def need(*tools: str) -> None:
    """Ends where a tool is missing."""
    missing = [tool for tool in dict.fromkeys(tools) if not shutil.which(tool)]
    if missing:
        sys.exit(f"{' and '.join(missing)} not found: the pictures are Debian's, make these sets on Debian or Ubuntu")


def download() -> Iterable[Path]:
    """The files of the packages, in the versions of which the contest's pictures are."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, version in PACKAGES.items():
        if subprocess.run(("apt-get", "download", f"{name}={version}"), cwd=FOLDER, check=False).returncode:
            remedy = "run `apt-get update`, or give a file of it, as snapshot.debian.org keeps them"
            sys.exit(f"{name} {version} could not be downloaded: {remedy}")
        yield from FOLDER.glob(f"{name}_{version.replace(':', '%3a')}_*.deb")


def write(name: str, source: Source, root: str) -> dict[str, int]:
    """One set, as `train` and `val`; how many pictures each has."""
    counts: dict[str, int] = defaultdict(int)
    for label in source.classes:
        found = list_pictures(Path(root, source.folder, label))
        last = min(VAL, round(len(found) * VAL / (TRAIN + VAL)))
        for number, file in enumerate(found[: last + TRAIN]):
            part = "val" if number < last else "train"
            target = FOLDER / name / part / label / f"{number:03}-{file.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            flatten(file).save(target)
            counts[part] += 1
    return counts


def flatten(file: Path) -> Image.Image:
    """A picture on white, and no larger than needed."""
    Image.MAX_IMAGE_PIXELS = None  # some are drawn on far more than others, and all are known
    with Image.open(file) as image:
        drawn = image.convert("RGBA")
    drawn.thumbnail((SIDE, SIDE))
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")


def list_pictures(folder: Path) -> list[Path]:
    """The pictures below a folder, each content once, in the order of their digests: as good as drawn."""
    files = (Path(top, name) for top, _, names in os.walk(folder) for name in names if name.endswith(".png"))
    known = {hashlib.sha256(file.read_bytes()).digest(): file for file in sorted(files) if not file.is_symlink()}
    return [known[digest] for digest in sorted(known)]


if __name__ == "__main__":
    main()
