"""Seven data sets, `headstart train DATA` and nothing else given: what it finds, how long it takes.

python benchmarks/sets.py

Each has an empty cache. Expected (2-core machine): accuracies within the intervals of the table in README;
seven minutes in all.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from common import headstart

DATA = Path(os.environ.get("HEADSTART_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared/data")
SETS = ("hymenoptera", "dogscats", "imagewoof", "scenes", "flowers", "chest_xray", "blood_cells")


def main() -> None:
    if not DATA.is_dir():
        print("needs real pictures: set HEADSTART_TEST_DATA")
        return
    print("| data | training | report | head | accuracy | balanced accuracy | log-loss | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    several = []
    for name in SETS:
        with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
            out = Path(folder, name)
            seconds, _ = headstart("train", DATA / name, "--out", out, cache=Path(folder, "cache"))
            measured = json.loads((out / "metrics.json").read_text())
            figures = {key: show(value) for key, value in measured["metrics"].items()}
            roles = [line.rsplit(",", 1)[-1] for line in (out / "split.csv").read_text().splitlines()[1:]]
            counts = f"{name} | {len(roles) - measured['n']} | {measured['n']}"
            if "map" in figures:
                text = ", ".join(f"{key} {value}" for key, value in figures.items())
                several.append(f"{counts}: {text}; {seconds:.0f} s")
                continue
            head = head_of(out)
            columns = (counts, head, figures["accuracy"], figures["balanced_accuracy"], figures["log_loss"])
            print(f"| {' | '.join(columns)} | {seconds:.0f} |", flush=True)
    for line in several:
        print(f"\nSeveral labels a picture, {line}")


def show(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def head_of(run_folder: Path) -> str:
    content = (run_folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    described = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["headstart"])
    return str(described["provenance"]["heads"][0]["kind"])


if __name__ == "__main__":
    main()
