"""How long the shortest commands take, from start to exit in a fresh process.

python benchmarks/start.py

Expected (2-core machine): --help 0.2 s; predict 2 s.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from common import headstart, write_pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="how often each is measured [default: 5]")
    runs = parser.parse_args().runs

    with tempfile.TemporaryDirectory(prefix="headstart-") as temporary:
        folder = Path(temporary)
        picture = write_pictures(folder / "pictures", 24)[0]
        headstart("train", folder / "pictures", "--out", folder / "run", cache=folder / "cache")
        helps, predictions = [], []
        for number in range(runs):
            helps.append(headstart("--help", cache=folder / "cache")[0])
            cache = folder / f"cache-{number}"
            predictions.append(headstart("predict", folder / "run", picture, cache=cache)[0])

    print(f"fresh processes, alternating, median of {runs}\n")
    print("| command | seconds | range | aim |")
    print("| --- | --- | --- | --- |")
    for name, seconds, aim in (("--help", helps, 0.4), ("predict RUN PICTURE", predictions, 5.0)):
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"| `headstart {name}` | {statistics.median(seconds):.2f} | {spread} | under {aim:g} |")
    print("\nCold means a new process and an empty cache of headstart's. The system's own cache of files cannot be")
    print("emptied from here: the libraries had been read before, and the first command after a boot takes longer.")


if __name__ == "__main__":
    main()
