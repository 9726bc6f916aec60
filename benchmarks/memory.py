"""Peak resident memory: does it grow with the number of pictures, and what does fitting a head take?

python benchmarks/memory.py             (1,000 and 10,000 pictures: about 0.7 GB in the folder for temporary files)
python benchmarks/memory.py 4000 10000  (of so many)

Expected (2-core machine), from 1,000 to 10,000: audit 24 MiB more, training's reading 520 with OpenVINO (over the aim;
from 4,000 on it hardly grows), predict 100; heads 4.9 times their matrix. From 100 to 1,000 the reading takes more:
100 pictures do not fill the window of pictures decoded ahead.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from common import headstart, run, write_pictures

MIB = 2**20
MORE_MIB = 200  # aim for ten times the pictures
TIMES = 6  # aim for a head, in sizes of its feature matrix
ROWS, COLUMNS, CLASSES, FOLDS = 20_000, 1280, 10, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", type=int, default=[1000, 10_000], metavar="COUNT", help="few and many")
    parser.add_argument("--look", type=Path, help=argparse.SUPPRESS)  # what the child processes do
    parser.add_argument("--fit", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.look:
        look(given.look)
    elif given.fit:
        fit()
    else:
        measure(*given.pictures)


def measure(few: int, many: int) -> None:
    peaks: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="headstart-") as temporary:
        for count in (few, many):
            folder = Path(temporary, str(count))
            pictures, trained, cache = folder / "pictures", folder / "run", folder / "cache"
            used = sum(path.stat().st_size for path in write_pictures(pictures, count))
            print(f"{count} JPEGs of 500 x 375 take {used / MIB:.0f} MiB of disk", file=sys.stderr, flush=True)
            audited = headstart("audit", pictures, cache=folder / "other")[1]
            looked = run((sys.executable, __file__, "--look", pictures), cache)[1]
            # The first look's features are in the cache now: the rest is other looks and the evidence, then the head.
            fitted = headstart("train", pictures, "--out", trained, cache=cache)[1]
            predicted = headstart("predict", trained, pictures, "--format", "json", cache=cache)[1]
            names = ("audit", "train: reading and features", "train: all, the first features cached", "predict")
            for name, peak in zip(names, (audited, looked, fitted, predicted), strict=True):
                peaks.setdefault(name, []).append(peak / MIB)

    print(f"| peak resident memory, MiB | {few} pictures | {many} pictures | more | aim |")
    print("| --- | --- | --- | --- | --- |")
    for name, (small, large) in peaks.items():
        aim = "-" if name.startswith("train: all") else f"at most {MORE_MIB}"
        print(f"| {name} | {small:.0f} | {large:.0f} | {large - small:.0f} | {aim} |")

    own = to_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    child = subprocess.run((sys.executable, __file__, "--fit"), check=True, capture_output=True, text=True)
    fitted_head = json.loads(child.stdout)
    before, matrix, peak = (fitted_head[name] / MIB for name in ("before", "matrix", "peak"))
    times = (peak - before) / matrix
    print(f"\nHeads for {ROWS} x {COLUMNS} float32 ({matrix:.0f} MiB): {before:.0f} MiB before there is a matrix,")
    print(f"{peak:.0f} MiB at most: fitting takes {times:.1f} times the matrix, itself counted (aim: at most {TIMES}).")
    print(f"The best was {fitted_head['kind']}. No child's figure can be under this process's own {own / MIB:.0f} MiB.")


def look(pictures: Path) -> None:
    """The reading of `headstart train`: every picture's facts, and its features of all depths."""
    from headstart import config, networks, read, views

    settings = config.resolve(None, {})
    network = networks.find_network(settings)
    views.look(read(pictures), network.spec, network.load, settings, lambda items, total: items)


def fit() -> None:
    """Fit heads as training does for so many pictures: tuned on a part of them, in folds."""
    import numpy as np

    from headstart import heads

    def draw(rows: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        random = np.random.default_rng(0)
        targets = random.integers(0, CLASSES, rows)
        centres = random.standard_normal((CLASSES, COLUMNS), dtype=np.float32)
        matrix = random.standard_normal((rows, COLUMNS), dtype=np.float32)
        matrix *= 8  # the classes overlap a little
        for label, centre in enumerate(centres):
            matrix[targets == label] += centre
        tuned = min(rows, heads.TUNING_ROWS)
        return matrix, targets, [row % FOLDS if row < tuned else -1 for row in range(rows)]

    heads.fit_head(*draw(200), CLASSES)  # what is imported and allocated once is none of the matrix's doing
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    matrix, targets, folds = draw(ROWS)
    fitted = heads.fit_head(matrix, targets, folds, CLASSES)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {"before": to_bytes(before), "peak": to_bytes(peak), "matrix": matrix.nbytes, "kind": fitted.kind}
    print(json.dumps(figures))


def to_bytes(peak: int) -> int:
    return peak * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
