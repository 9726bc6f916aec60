"""The contest: rivals and headstart on the same pictures, splits, weights and cores.

make contest                           (everything; it sets up the rivals' environment: a night)
python benchmarks/contest.py --sets dogscats --entrants headstart sklearn
python benchmarks/contest.py --report  (no run; only docs/contest.md and its plot, from the rows that are there)

Each run is a whole process and leaves one line of JSON; the same command goes on where it was interrupted, and runs
nothing twice, but for headstart where its source has changed since: the later row counts. A run that fails is said and
leaves no line. entrants.py says who takes part on which sets, rivals.py how each rival is set up, more_sets.py gets
three of the sets (`make contest-data`), and standings.py makes the document.

Expected (2-core machine): the tables in docs/contest.md.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import more_sets
from common import Failed, run
from entrants import CUT, EPOCHS, LARGEST, MADE, OURS, OURSELVES, RIVALS, SEEDS, SETS, SHOTS, WITHOUT, takes_part
from results import Row
from sets import DATA
from standings import write_report

ROOT = Path(__file__).resolve().parents[1]
EXPORT = (
    "import sys, torch; from headstart import backbones; "
    "torch.save(backbones.load(backbones.locate('efficientnet_lite0')).state_dict(), sys.argv[1])"
)

Case = tuple[str, str, int]  # set, cut, seed
Pictures = list[tuple[str, str, str]]  # image, label, split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = (*OURS, *RIVALS)
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--entrants", nargs="+", default=known, choices=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--rivals", type=Path, default=ROOT / ".contest/bin/python", help="the rivals' Python")
    parser.add_argument("--rows", type=Path, default=ROOT / "benchmarks/contest.jsonl", help="file of the runs")
    parser.add_argument("--report", action="store_true", help="run nothing, only write docs/contest.md from the rows")
    given = parser.parse_args()
    if not given.report:
        there = list_there(given.sets)
        if set(given.entrants) & set(RIVALS) and not given.rivals.exists():
            sys.exit(f"{given.rivals} is not there: `make contest` sets up the rivals, or give --rivals")
        cases = [(name, cut, seed) for cut, seeds in SEEDS.items() for name in there for seed in seeds]
        whole = hold(cases, given.entrants, given.rivals, given.rows)
    write_report(read_rows(given.rows), ROOT / "docs/contest.md")
    sys.exit(0 if given.report or whole else 1)


def list_there(names: Sequence[str]) -> list[str]:
    """The sets whose pictures are there; the others are said, with how to get them, and none is no contest."""
    there = [name for name in names if find_images(name).is_dir()]
    for made, remedy in ((False, "set HEADSTART_TEST_DATA"), (True, "`make contest-data` gets them")):
        missing = [name for name in names if name not in there and (name in MADE) == made]
        if missing:
            print(f"not there: {', '.join(missing)} ({remedy})", flush=True)
    if not there:
        sys.exit("needs real pictures")
    return there


# The runs


def hold(cases: Sequence[Case], entrants: Sequence[str], python: Path, file: Path) -> bool:
    """Every run that has no row yet, one after the other; each row is written as soon as its run is over.

    Returns:
        Whether none failed.
    """
    rows, whole = read_rows(file), True
    if file.exists():
        os.truncate(file, len(whole_lines(file.read_bytes())))
    code = digest_source()
    done = {key_of(row) for row in rows if row["entrant"] in RIVALS or row.get("source") == code}
    with tempfile.TemporaryDirectory(prefix="headstart-") as folder, file.open("ab") as lines:
        weights = Path(folder, "weights.pth")
        # In a process of its own: what this one holds would count as the memory of those it starts.
        subprocess.run((sys.executable, "-c", EXPORT, weights), check=True)
        for case in cases:
            cache = Path(folder, "cache")
            shutil.rmtree(cache, ignore_errors=True)
            for entrant in entrants:
                if (*case, entrant) in done or not takes_part(entrant, case[1]):
                    continue
                try:
                    row = measure(case, entrant, python, weights, cache)
                except Failed as failure:  # the others are still worth their time
                    print(*case, entrant, failure, file=sys.stderr, flush=True)
                    whole = False
                    continue
                row |= {} if entrant in RIVALS else {"source": code}
                lines.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")
                lines.flush()
                print(*case, entrant, f"accuracy {row['accuracy']:.3f}, {row['seconds']:.0f} s", flush=True)
    return whole


def whole_lines(content: bytes) -> bytes:
    """The content without a last line that was cut off while it was written."""
    return content[: content.rfind(b"\n") + 1]


def read_rows(file: Path) -> list[Row]:
    """The rows of a file, of each run the last."""
    lines = whole_lines(file.read_bytes()).splitlines() if file.exists() else []
    rows: dict[tuple[Any, ...], Row] = {}
    for row in map(json.loads, lines):
        rows.pop(key_of(row), None)  # a later one has the later place, too
        rows[key_of(row)] = row
    return list(rows.values())


def key_of(row: Row) -> tuple[Any, ...]:
    """What tells a run from others."""
    return tuple(row[name] for name in ("set", "cut", "seed", "entrant"))


def digest_source() -> str:
    """A digest of what headstart's modules do, by which it is told what a row was measured with."""
    found = importlib.util.find_spec("headstart")
    assert found is not None and found.submodule_search_locations
    (folder,) = found.submodule_search_locations
    running = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.py")):
        running.update(file.name.encode() + strip(file.read_text(encoding="utf-8")).encode())
    return running.hexdigest()[:12]


def strip(source: str) -> str:
    """A module without comments and docstrings, which change nothing of what is measured."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def measure(case: Case, entrant: str, python: Path, weights: Path, cache: Path) -> Row:
    """An entrant's run in a fresh process, as a row.

    Args:
        case: set, cut and seed.
        entrant: its name.
        python: the rivals' Python.
        weights: the network's, in a file.
        cache: features of the case: headstart computes all of them, those without a part add what is missing, and all
            others have an empty cache of their own.
    """
    if entrant == OURSELVES:
        shutil.rmtree(cache, ignore_errors=True)
    images = find_images(case[0]).absolute()
    pictures = list_pictures(images, case)
    with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
        table, out = write_table(Path(folder), images, pictures), Path(folder, "run")
        command = make_command(entrant, case, python, (table, images, weights, out))
        shares = entrant in (OURSELVES, *WITHOUT)
        seconds, memory = run(command, cache=cache if shares else Path(folder, "cache"))
        labels = read_labels(out / "predictions.csv")
        plan, environment = (json.loads((out / f"{name}.json").read_text()) for name in ("plan", "environment"))
    classes = sorted({label for _, label, _ in pictures})
    numbers = {label: number for number, label in enumerate(classes)}
    # A picture without an answer counts as wrong: as of a class that there is not.
    test = [
        (numbers[label], numbers.get(labels.get(image, ""), len(classes)))
        for image, label, split in pictures
        if split == "test"
    ]
    return {
        **dict(zip(("set", "cut", "seed"), case)),
        "entrant": entrant,
        "seconds": round(seconds, 2),
        "memory": memory,
        "pictures": digest_pictures(images, pictures),
        "trained": sum(split == "train" for *_, split in pictures),
        "n": len(test),
        "accuracy": sum(true == predicted for true, predicted in test) / len(test),
        "true": [true for true, _ in test],
        "predicted": [predicted for _, predicted in test],
        "plan": {"strategy": plan["strategy"], "phases": plan["phases"]},
        "versions": environment["versions"],
        "machine": describe_machine(),
    }


def write_table(folder: Path, images: Path, pictures: Pictures) -> Path:
    """A table of the pictures, and beside it links to what it names: as if the set's own folder were given."""
    for part in ("train", "val"):
        (folder / part).symlink_to(images / part, target_is_directory=True)
    table = folder / "table.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "label", "split"), *pictures])
    return table


def find_images(name: str) -> Path:
    """The folder of a set: beside the others, or where more_sets.py writes."""
    return DATA / name if name not in MADE else more_sets.FOLDER / name


def digest_pictures(images: Path, pictures: Pictures) -> str:
    """A digest of pictures, labels and splits, by which it is told whether two rows are of the same."""
    running = hashlib.sha256()
    for image, label, split in pictures:
        running.update(f"{image}\0{label}\0{split}\0".encode() + hashlib.sha256((images / image).read_bytes()).digest())
    return running.hexdigest()[:12]


def list_pictures(images: Path, case: Case) -> Pictures:
    """The pictures of a set: `train`, cut where the case is, and the whole of `val`, which is the test."""
    (name, cut, seed), pictures = case, []
    for part, split in (("train", "train"), ("val", "test")):
        for folder in sorted(path for path in (images / part).iterdir() if path.is_dir()):
            names = [f"{part}/{folder.name}/{file.name}" for file in folder.iterdir() if not file.name.startswith(".")]
            if split == "train" and name in LARGEST:
                names = draw_names(names, LARGEST[name], 0)
            if split == "train" and cut == CUT:
                names = draw_names(names, SHOTS, seed)
            pictures += [(image, folder.name, split) for image in sorted(names)]
    return pictures


def draw_names(names: Iterable[str], count: int, seed: int) -> list[str]:
    """So many of the names, or all where they are fewer: for a seed the same on any machine and in any version."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{count} {seed} {name}".encode()).digest())[:count]


def make_command(entrant: str, case: Case, python: Path, paths: tuple[Path, Path, Path, Path]) -> list[str | Path]:
    table, _, _, out = paths
    if entrant in OURS:
        return [sys.executable, "-m", "headstart", "train", table, "--out", out, *OURS[entrant]]
    options = ("--epochs", str(EPOCHS.get(case[0], 10)), "--seed", str(case[2]))
    return [python, ROOT / "benchmarks/rivals.py", entrant, *paths, *options]


def read_labels(predictions: Path) -> dict[str, str]:
    """The class given to each picture, by the name that the table has for it."""
    with predictions.open(encoding="utf-8", newline="") as file:
        return {row["source"]: row["label"] for row in csv.DictReader(file)}


def describe_machine() -> str:
    facts = Path("/proc/cpuinfo")
    told = facts.read_text() if facts.exists() else ""
    models = re.findall(r"model name\s*: (.+)", told)
    halves = "" if not told else ", bfloat16" if re.search("avx512_bf16|amx_bf16", told) else ", no bfloat16"
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores{halves}, {platform.system()}"


if __name__ == "__main__":
    main()
