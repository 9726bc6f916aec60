"""What features say before anything is trained: which depth and views tell the classes apart, what more would bring.

Everything here is measured by cross-validation on the `fit` pictures: neither `select` nor `report` is looked at.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headstart import evaluation, fitting, metrics, splits
from headstart.backbones import Backbone
from headstart.data import Dataset, Sample
from headstart.features import key_of
from headstart.files import write_whole
from headstart.heads import FittedHead
from headstart.images import View
from headstart.plan import FINAL, Curve, FitHead, Variant
from headstart.taps import find_depths
from headstart.zoo import Spec

Look = Callable[[Sequence[Sample]], NDArray[np.float32]]
log = logging.getLogger(__name__)

PICTURES = 2_000  # that variants are compared on: more move the choice little
MIRRORED = 400  # pictures that the mirrored view is tried on
SHARES = (1 / 8, 1 / 4, 1 / 2)  # of the pictures, for the learning curve
ENOUGH = 16  # pictures that the least share must have


@dataclass(frozen=True)
class Depths:
    """The taps of a feature matrix, side by side, and their widths."""

    taps: tuple[str, ...]
    widths: tuple[int, ...]

    def columns(self, taps: Sequence[str]) -> NDArray[np.int64]:
        """The columns of some taps, in the taps' own order."""
        starts = np.cumsum((0, *self.widths))
        places = [self.taps.index(tap) for tap in taps]
        return np.concatenate([np.arange(starts[place], starts[place + 1]) for place in places])


def recall_depths(spec: Spec, load: Callable[[], Backbone], folder: Path | None) -> Depths:
    """The depths of a network that are worth a look, from a file in `folder` where they are known already."""
    file = folder / f"depths-{key_of(spec)}.json" if folder is not None else None
    if file is not None and file.exists():
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            return Depths(tuple(known["taps"]), tuple(known["widths"]))
        except (ValueError, LookupError, TypeError) as error:
            log.info("%s cannot be read (%s): it is made again", file, error)
    depths = Depths(*find_depths(load().network, spec.preprocess.size))
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps({"taps": depths.taps, "widths": depths.widths}).encode())
        except OSError as error:
            log.info("%s cannot be written (%s): the depths will be found again", file, error.strerror)
    return depths


@dataclass(frozen=True, eq=False)
class Table:
    """Features of the `fit` pictures, and how their heads are fitted.

    Args:
        samples: the pictures.
        dataset: that they are of.
        groups: source -> group, of what must stay together.
        phase: kinds of heads and number of folds.
        seed: of folds and subsets.
    """

    samples: Sequence[Sample]
    dataset: Dataset
    groups: Mapping[str, str]
    phase: FitHead
    seed: int

    def fit(self, matrix: NDArray[np.float32], kinds: tuple[str, ...]) -> FittedHead:
        """The best head of some kinds on the samples' features, (n, dim) or (n, views, dim)."""
        phase = FitHead(kinds, self.phase.folds)
        return fitting.fit_heads(matrix, self.samples, self.dataset, self.groups, phase, self.seed)

    def part(self, share: float) -> tuple[Table, NDArray[np.int64]]:
        """(a stratified share of the samples, their places)."""
        if share >= 1:
            return self, np.arange(len(self.samples))
        chosen = splits.draw_part(self.samples, self.groups, share, self.seed)
        some = [sample for sample, is_chosen in zip(self.samples, chosen, strict=True) if is_chosen]
        places = np.flatnonzero(chosen)
        return Table(some, self.dataset, self.groups, self.phase, self.seed), places


def weigh_depths(table: Table, matrix: NDArray[np.float32], depths: Depths) -> tuple[Variant, ...]:
    """Each depth by itself, and all together, best first.

    Args:
        table: the pictures.
        matrix: their features at all depths, (n, sum of widths).
        depths: the depths.
    """
    some, places = table.part(PICTURES / len(table.samples))
    rows = matrix if len(places) == len(matrix) else matrix[places]
    several = tuple(kind for kind in table.phase.heads if kind != "knn")
    found = []
    for taps in (*((tap,) for tap in depths.taps), depths.taps):
        kinds = table.phase.heads if taps == (FINAL,) else several if len(taps) > 1 else several[:1]
        head = some.fit(np.ascontiguousarray(rows[:, depths.columns(taps)]), kinds)
        found.append(_describe(head, taps, ("plain",), len(some.samples)))
    return tuple(sorted(found, key=lambda variant: variant.log_loss))


def weigh_mirror(
    table: Table,
    plain: NDArray[np.float32],
    look: Look,
    taps: Sequence[str],
) -> tuple[Variant, Variant]:
    """(the plain view alone, both views) on a part of the pictures.

    Args:
        table: the pictures.
        plain: their features, (n, dim).
        look: gives the features of pictures' mirror images, (m, dim).
        taps: what the features are of.
    """
    some, places = table.part(MIRRORED / len(table.samples))
    kinds = tuple(kind for kind in table.phase.heads if kind != "knn")
    alone = some.fit(plain[places], kinds)
    both = some.fit(np.stack((plain[places], look(some.samples)), 1), kinds)
    return (
        _describe(alone, taps, ("plain",), len(places)),
        _describe(both, taps, ("plain", "mirror"), len(places)),
    )


def _describe(head: FittedHead, taps: Sequence[str], views: Sequence[View], pictures: int) -> Variant:
    best = head.candidates[0]
    right = metrics.wilson(round(best.accuracy * len(head.rows)), len(head.rows))
    return Variant(tuple(taps), tuple(views), best.kind, best.log_loss, right.value, right.low, right.high, pictures)


def draw_curve(table: Table, matrix: NDArray[np.float32], whole: FittedHead) -> Curve | None:
    """The learning curve of one kind of head, and what it foretells; None where there are too few pictures.

    Heads are fitted on an eighth, a quarter and half of the pictures and measured on the others. The error is taken
    to fall as a power of the number (Hestness et al., 2017). The curve of these three is held against what
    cross-validation gave with nearly all: that is its check.
    """
    n = len(table.samples)
    if table.dataset.task != "single" or n * SHARES[0] < max(ENOUGH, 2 * len(table.dataset.classes)):
        return None
    targets = evaluation.encode(table.samples, table.dataset.classes).argmax(1)
    points: list[tuple[int, float]] = []
    for share in SHARES:
        some, places = table.part(share)
        if len({sample.labels for sample in some.samples}) < len(table.dataset.classes):
            return None
        head = some.fit(matrix[places], (whole.kind,))
        others = np.setdiff1d(np.arange(n), places)
        points.append((len(places), _error(fitting.answer(head.module, matrix[others]).argmax(1) != targets[others])))
    measured = _error(whole.logits.argmax(1) != targets[whole.rows])
    trained = round(n * (1 - 1 / table.phase.folds))
    foretold = _follow(points, trained)
    doubled = _follow([*points, (trained, measured)], 2 * trained)
    return Curve(tuple(points), trained, measured, foretold, doubled)


def _error(wrong: NDArray[np.bool_]) -> float:
    """The share of wrong answers; with none, half a picture counts as wrong, as a power law has no zero."""
    return float((wrong.sum() + 0.5) / (len(wrong) + 1))


def _follow(points: Sequence[tuple[int, float]], pictures: int) -> float:
    """The error that a power law through (pictures, error) has at a number of pictures; it never rises."""
    x, y = np.log(np.array(points, float)).T
    slope = min(0.0, float(np.polyfit(x, y, 1)[0]))
    return float(min(1.0, math.exp(y.mean() + slope * (math.log(pictures) - x.mean()))))
