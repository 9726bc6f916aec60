"""Whether `--time-budget` is kept: whole processes with an empty cache, beside the time that they were given.

python benchmarks/budgets.py                                   (eight minutes)
python benchmarks/budgets.py hymenoptera=90s scenes=10m

Expected (2-core machine): never over the budget by more than a tenth, and 80 % of it used, unless the last column says
why: little was left to gain, three epochs did not fit, or what was trained could not win any more.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from common import headstart
from sets import DATA, show

BUDGETS = ("hymenoptera=2m", "scenes=3m", "chest_xray=4m")


def main() -> None:
    if not DATA.is_dir():
        print("needs real pictures: set HEADSTART_TEST_DATA")
        return
    print("| data | budget | seconds | accuracy | log-loss | trained, epochs | taken | not trained, or stopped |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for entry in sys.argv[1:] or BUDGETS:
        name, _, budget = entry.partition("=")
        with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
            out = Path(folder, "run")
            words = ("train", DATA / name, "--out", out, "--time-budget", budget)
            seconds, _ = headstart(*words, cache=Path(folder, "cache"))
            figures, plan = (json.loads((out / f"{name}.json").read_text()) for name in ("metrics", "plan"))
            shown = [show(figures["metrics"][key]) for key in ("accuracy", "log_loss")]
            arms = [f"{phase['name']} {phase['settings']['epochs']}" for phase in plan["phases"] if "settings" in phase]
            taken = plan["reasons"][-1].split("; ")[-1] if arms else "the fitted head"
            stopped = "; ".join(reason for reason in plan["reasons"] if "not trained" in reason or "stopped" in reason)
            cells = (name, budget, f"{seconds:.0f}", *shown, ", ".join(arms) or "-", taken, stopped or "-")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
