"""Three data sets, each by every strategy with its defaults: what it finds, how long it takes.

python benchmarks/strategies.py                          (an hour and a half; scratch takes most of it)
python benchmarks/strategies.py --strategies lp-ft       (ten minutes)

Expected (2-core machine): accuracies within the intervals of the table in docs/measurements.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from common import headstart
from sets import DATA, show

SETS = ("hymenoptera", "scenes", "chest_xray")
STRATEGIES = ("auto", "probe", "lp-ft", "finetune", "two-stage", "scratch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    given = parser.parse_args()
    if not DATA.is_dir():
        print("needs real pictures: set HEADSTART_TEST_DATA")
        return
    print("| data | strategy | epoch kept | accuracy | balanced accuracy | log-loss | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for strategy in given.strategies:
        for name in given.sets:
            with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
                out = Path(folder, "run")
                words = ("train", DATA / name, "--out", out, "--strategy", strategy)
                seconds, _ = headstart(*words, cache=Path(folder, "cache"))
                figures = json.loads((out / "metrics.json").read_text())["metrics"]
                shown = [show(figures[key]) for key in ("accuracy", "balanced_accuracy", "log_loss")]
                print(f"| {' | '.join((name, strategy, kept(out), *shown))} | {seconds:.0f} |", flush=True)


def kept(run_folder: Path) -> str:
    """The best epoch of the last phase, of how many."""
    history = run_folder / "history.jsonl"
    if not history.exists():
        return "-"
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    last = [row for row in rows if row["phase"] == rows[-1]["phase"] and "step" not in row]
    best = [row["epoch"] for row in last if row["best"]]
    return f"{best[-1]} of {last[-1]['epoch']}"


if __name__ == "__main__":
    main()
