"""Ants and bees fine-tuned: the official tutorial's 25 epochs against `--strategy lp-ft`, by one process and by two.

python benchmarks/finetuning.py    (six minutes)

Expected (2-core machine): lp-ft takes a sixth to a seventh of the tutorial's time; accuracy on val 0.948, where the
tutorial's best epoch has 0.93. Two processes on the same two cores are no faster than one, whose threads use both.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

from common import run
from sets import DATA, show
from train import measure

EPOCHS = 25
BATCH = 4
ALONE = (sys.executable, "-m", "headstart")
TWO = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "headstart")


def main() -> None:
    data = DATA / "hymenoptera"
    if not data.is_dir():
        print("needs real pictures: set HEADSTART_TEST_DATA")
        return
    epochs = measure("tutorial", data, "efficientnet_lite0", BATCH)
    whole = statistics.mean(epochs) * EPOCHS
    print("| | seconds | tutorial / this | accuracy on val | seconds an epoch |")
    print("| --- | --- | --- | --- | --- |")
    counted = f"{len(epochs)} epochs timed, x {EPOCHS}/{len(epochs)}"
    print(f"| the tutorial's loop ({counted}) | {whole:.0f} | 1 | - | {statistics.mean(epochs):.1f} |", flush=True)
    for label, command in (("one process", ALONE), ("two processes", TWO)):
        with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
            out = Path(folder, "run")
            words = ("train", data, "--out", out, "--strategy", "lp-ft")
            seconds, _ = run((*command, *words), Path(folder, "cache"))
            accuracy = show(json.loads((out / "metrics.json").read_text())["metrics"]["accuracy"])
            rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
            each = statistics.median(row["seconds"] for row in rows if "step" not in row and row["epoch"])
        print(f"| lp-ft, {label} | {seconds:.0f} | {whole / seconds:.1f} | {accuracy} | {each:.1f} |", flush=True)


if __name__ == "__main__":
    main()
