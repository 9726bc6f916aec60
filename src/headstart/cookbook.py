"""The tutorials as recipes: each a short file that trains what its tutorial trains, done right.

What recipes share is here: a run that is made once, what it came to, two of them compared.
"""

from __future__ import annotations

import csv
import importlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from headstart import backbones, blocks, metrics, pictures, training, weights, zoo
from headstart import config as configs
from headstart.config import EvaluateConfig, cache_folder, did_you_mean
from headstart.errors import UsageError
from headstart.features import Track
from headstart.labels import find_names
from headstart.metrics import Estimate
from headstart.model import Prediction
from headstart.runs import RunFolder

log = logging.getLogger(__name__)

# Of ants and bees and of Imagewoof: the tutorials do not say it.
SUBSET = (
    "These pictures are a subset of ImageNet, which the network was pretrained on: the figures of pretrained weights "
    "flatter."
)
SHOWN = 24  # pictures in a grid of predictions
NAMES = ("ants-bees", "imagewoof", "dogs-cats", "scenes", "birds", "identify")


def recipe(
    name: str,
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    track: Track = lambda pictures, total: pictures,
    **settings: Any,
) -> str:
    """Run a recipe; what it came to, as text. Its runs and pictures are in `out`, and finished ones are kept.

    Args:
        name: ants-bees, imagewoof, dogs-cats, scenes, birds or identify.
        data: the pictures, as for `train`; for identify, picture files or folders.
        out: the folder.
        track: wraps the pictures to show progress; called with them and their number.
        **settings: single settings by name, of all the recipe's runs; they win over its own.

    Raises:
        UsageError: for an unknown name.
    """
    module = importlib.import_module(_module(name))
    original = getattr(module, "NETWORK", None)
    if original is not None and not settings.get("backbone") and not settings.get("weights"):
        settings = {**settings, "backbone": choose_network(original)}
    text: str = module.run(data, Path(out), track, settings)
    return text


def list_recipes() -> dict[str, str]:
    """Name of a recipe -> the first line of what it says of itself."""
    return {name: show(name).partition("\n")[0].strip('"') for name in NAMES}


def show(name: str) -> str:
    """A recipe's source: its command, machine, time and expected result, then what it does.

    Raises:
        UsageError: for an unknown name.
    """
    file = f"{_module(name).rpartition('.')[2]}.py"
    return resources.files("headstart").joinpath("recipes", file).read_text(encoding="utf-8")


def _module(name: str) -> str:
    if name not in NAMES:
        raise UsageError(name, f"is no recipe{did_you_mean(name, NAMES)}", f"Recipes: {', '.join(NAMES)}.")
    return f"headstart.recipes.{name.replace('-', '_')}"


def choose_network(original: str) -> str:
    """The tutorial's network where its weights are on this machine, else the default one; that is logged."""
    _, origin = zoo.describe(original)
    if weights.find(origin, cache_folder() / "weights") is not None:
        return original
    log.info("%s: its weights are not on this machine; %s is used (--backbone fetches others)", original, zoo.DEFAULT)
    return zoo.DEFAULT


# What recipes do


@dataclass(frozen=True, eq=False)
class Outcome:
    """A finished run of a recipe: its folder, its figures on the report, and what is needed to compare it."""

    label: str
    path: Path
    figures: Mapping[str, Estimate]
    hits: Mapping[str, bool]  # source -> whether the answer was right
    seconds: float  # of training, or of fitting heads
    groups: Mapping[str, str] = field(default_factory=dict)  # source -> group, where there are any

    def row(self) -> str:
        """The run as a row of the table that `tabulate` makes."""
        names = ("accuracy", "top_5_accuracy", "log_loss")
        shown = [_interval(self.figures[name]) if name in self.figures else "-" for name in names]
        return f"| {self.label} | {' | '.join(shown)} | {self.seconds:.0f} |"


def train(
    label: str,
    data: str | os.PathLike[str],
    folder: Path,
    track: Track,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Outcome:
    """A run in a folder, kept where it is finished already.

    Args:
        label: what to call it.
        data: the pictures.
        folder: of the run.
        track: as for `recipe`.
        options: the recipe's settings.
        settings: the user's, which win; where no weights are trained, those of the engine are left out.
    """
    fitted = options.get("strategy", "auto") in ("auto", "probe")
    engine = configs.settings("engine") if fitted else {}
    chosen = {**options, **{name: value for name, value in settings.items() if name not in engine}}
    log.info("%s:", label)
    training.train(data, folder, resume=True, track=track, **chosen)
    figures = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    with (folder / "predictions.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        hits = {row["source"]: row["target"] == row["label"] for row in csv.DictReader(file)}
    seconds = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["seconds"]
    estimates = {name: Estimate.from_json(values) for name, values in figures.items()}
    groups = {sample.source: sample.group for sample in RunFolder(folder).read_split()[2]}
    return Outcome(label, folder, estimates, hits, seconds.get("training", seconds.get("heads", 0.0)), groups)


def tabulate(outcomes: Sequence[Outcome]) -> str:
    """The runs of a recipe as a table."""
    head = "| run | accuracy | top-5 accuracy | log-loss | seconds of training |\n| --- | --- | --- | --- | --- |"
    return "\n".join((head, *(outcome.row() for outcome in outcomes)))


def compare(first: Outcome, second: Outcome) -> str:
    """How much more accurate the first is than the second on the pictures that both were measured on, in words.

    Where pictures have groups, these are drawn; see `metrics.compare_drawn`.
    """
    shared = [source for source in first.hits if source in second.hits]
    ours, theirs = (np.array([one.hits[source] for source in shared], bool) for one in (first, second))
    groups = [first.groups.get(source, "") for source in shared]
    if any(groups):
        weights = metrics.draw_weights(np.zeros(len(shared), np.int64), groups, EvaluateConfig().resamples, seed=0)
        found = metrics.compare_drawn(ours, theirs, weights)
    else:
        found = metrics.compare(ours, theirs)
    return f"{first.label} over {second.label}: accuracy {found}"


def draw_predictions(outcome: Outcome, file: Path) -> None:
    """Draw some of a run's report pictures, spread over all, with what they were taken for."""
    root, _, _ = RunFolder(outcome.path).read_split()
    with (outcome.path / "predictions.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as opened:
        rows = list(csv.DictReader(opened))
    known = find_names(tuple(row["target"] for row in rows), "en")  # of classes that are ids of WordNet
    entries: list[pictures.Entry] = []
    for row in (rows[place] for place in np.unique(np.linspace(0, len(rows) - 1, SHOWN).astype(int))):
        given = {name[2:]: float(value) for name, value in row.items() if name.startswith("p:")}
        ranked = dict(sorted(given.items(), key=lambda pair: -pair[1]))
        named = {known.get(str(label), str(label)): value for label, value in ranked.items()}
        prediction = Prediction(row["source"], (known.get(row["label"], row["label"]),), named)
        entries.append((root / row["source"], prediction, known.get(row["target"], row["target"])))
    pictures.draw_predictions(entries, file)


def middle_block(settings: Mapping[str, Any]) -> str:
    """The name of the block at two thirds of a network's depth: its features are more general than the last ones."""
    located = backbones.locate(str(settings.get("backbone", "auto")), str(settings.get("weights", "")))
    found = blocks.find_blocks(backbones.load(located).network, located.spec.preprocess.size)
    return found[len(found) * 2 // 3].name


def _interval(estimate: Estimate) -> str:
    return str(estimate).rpartition(" n=")[0]
