"""What features say before anything is trained: which geometry, depth and views tell the classes apart.

Geometry is how a picture is brought into the network's square. What more pictures would bring is said, too.

Everything here is measured by cross-validation on the pictures that heads are fitted on; `report` is not looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from headstart import evaluation, files, fitting, metrics, splits
from headstart.backbones import Backbone
from headstart.blocks import blank, run
from headstart.data import Dataset, Sample
from headstart.errors import BackboneError
from headstart.features import key_of
from headstart.gallery import Gallery, Look, Purse
from headstart.heads import FittedHead, answer
from headstart.images import Fit
from headstart.images import View as ViewName
from headstart.plan import FitHead
from headstart.processes import World
from headstart.taps import find_depths
from headstart.verdicts import (
    FINAL,
    VIEW_SETS,
    Curve,
    Evidence,
    Variant,
    choose_geometry,
    choose_variant,
    choose_views,
    enlarge,
    is_little_left,
    list_views,
    name_views,
    promises_more,
)
from headstart.views import View
from headstart.zoo import Spec

log = logging.getLogger(__name__)

# The head that depths and views are compared by. On six sets of six it ranked final and all depths as logistic
# regression does, in a fraction of the time, which hardly grows with the number of classes.
KIND = ("means",)
PICTURES = 2_000  # that variants are compared on: more move the choice little
VIEWED = 1_000  # pictures that other views are tried on: 400 misled on X-rays
ROOM_BYTES = 2**30  # that features of several views, and a head's answers to them, may take
LARGEST_SET = max(map(len, VIEW_SETS.values()))
RESAMPLES = 1000  # for intervals where pictures are in groups
SHARES = (1 / 8, 1 / 4, 1 / 2)  # of the pictures, for the learning curve
ENOUGH = 16  # pictures that the least share must have


@dataclass(frozen=True)
class Depths:
    """The taps of a feature matrix, side by side, and their widths; no widths where there is nothing to choose."""

    taps: tuple[str, ...]
    widths: tuple[int, ...] = ()
    larger: int = 0  # side in pixels of a larger input that the network takes; 0: none

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Depths:
        """The depths in JSON values."""
        return Depths(tuple(values["taps"]), tuple(values["widths"]), int(values["larger"]))

    @property
    def choices(self) -> tuple[tuple[str, ...], ...]:
        """What a head may be fitted on: each depth by itself, or all of them."""
        alone = [(tap,) for tap in self.taps] if self.widths else []
        return tuple(dict.fromkeys((*alone, self.taps)))

    def columns(self, taps: Sequence[str]) -> NDArray[np.int64] | slice:
        """The columns of some taps, in the taps' own order."""
        if tuple(taps) == self.taps:
            return slice(None)
        starts = np.cumsum((0, *self.widths))
        places = [self.taps.index(tap) for tap in taps]
        return np.concatenate([np.arange(starts[place], starts[place + 1]) for place in places])


def recall_depths(spec: Spec, load: Callable[[], Backbone], folder: Path | None) -> Depths:
    """The depths of a network that are worth a look, from a file in `folder` where they are known already."""
    file = folder / f"depths-{key_of(spec)}.json" if folder is not None else None
    known = None
    if file is not None:
        known = files.recall(file, Depths.from_json, "it is made again")
    if known is not None:
        return known
    network, size = load().network, spec.preprocess.size
    depths = Depths(*find_depths(network, size), find_larger(network, size))
    if file is not None:
        files.remember(file, depths, "the depths will be found again")
    return depths


def find_larger(network: nn.Module, size: int) -> int:
    """A larger side of its input, in pixels, that a network takes; 0 where it takes none, as many transformers do."""
    larger = enlarge(size)
    expected = run(network, blank(network, size))
    try:
        found = run(network, blank(network, larger))
    except BackboneError as error:
        log.info("no input of %d pixels is tried: %s", larger, error.why)
        return 0
    return larger if found.shape == expected.shape and larger > size else 0


@dataclass(frozen=True)
class Choices:
    """What is left to be chosen by evidence, beside depths.

    Args:
        symmetry: what leaves a picture's meaning alone.
        views: as they are set; auto: those that are found to be best.
        fits: ways to bring a picture into the network's square, beside its own.
        larger: side of a larger input in pixels; 0: none.
    """

    symmetry: str = "mirror"
    views: str = "auto"
    fits: tuple[Fit, ...] = ()
    larger: int = 0


@dataclass(frozen=True, eq=False)
class Sight:
    """What heads are fitted on.

    Args:
        spec: the network, with the geometry, depths and views that were chosen.
        evidence: why; None where nothing was to be chosen.
        rows: pictures -> their features, (n, dim), or of several views (n, views, dim).
    """

    spec: Spec
    evidence: Evidence | None
    rows: Look


def gather(
    table: Table,
    depths: Depths,
    spec: Spec,
    rows: Look,
    look: Callable[[Spec, Sequence[Sample]], View],
    choices: Choices = Choices(),
    world: World = World(),
    purse: Purse | None = None,
    known: Evidence | None = None,
) -> Sight:
    """The geometry, depths and views that tell the classes of some pictures apart best, as far as there is time.

    Of several processes each one measures, as all are needed to look at pictures, and the first one's figures count.

    Args:
        table: the pictures.
        depths: what the features are of.
        spec: the network with all these taps.
        rows: pictures -> their features at all depths, (n, sum of widths).
        look: (network with a single view, pictures) -> that view of them.
        choices: what is to be chosen beside depths.
        world: this process among others.
        purse: what there is time for; None: everything.
        known: what was found before the run was interrupted, which it goes on with.
    """
    gallery = Gallery(spec, rows, look, purse or Purse())
    found = known or world.tell(_find(table, depths, gallery, choices, world))
    placed, chosen = _place(spec, found.geometries), choose_variant(found.variants)
    if known:
        gallery.narrow(placed, depths.columns(chosen.taps))
    views = choose_views(found.views, choices.views)
    for view in views:  # those of the report at once with the others
        gallery.look(placed.adapted(views=(view,)), table.dataset.samples)

    def see(samples: Sequence[Sample]) -> NDArray[np.float32]:
        seen = [gallery.rows(placed.adapted(views=(view,)), samples) for view in views]
        return np.stack(seen, 1) if len(views) > 1 else seen[0]

    taps = () if chosen.taps == (FINAL,) else chosen.taps
    return Sight(dataclasses.replace(placed, taps=taps, views=views), found, see)


def recall(values: Mapping[str, Any] | None, depths: Depths) -> Evidence | None:
    """What an interrupted run had found, from its plan's JSON values; None where that is of no use."""
    try:
        known = Evidence.from_json(values) if values else None
    except (LookupError, TypeError, ValueError) as error:
        log.info("the plan holds no evidence that can be read (%s): it is gathered again", error)
        return None
    if known and {variant.taps for variant in known.variants} != set(depths.choices):
        log.info("the plan's evidence is of other depths than the network has now, and gathered anew")
        return None
    return known


def _place(spec: Spec, geometries: Sequence[Variant]) -> Spec:
    """The network in the best of some geometries."""
    if not geometries:
        return spec
    best = choose_geometry(geometries)
    return spec.adapted(size=best.size, fit=best.fit)


def _find(table: Table, depths: Depths, gallery: Gallery, choices: Choices, world: World) -> Evidence:
    """What there is to be found about geometries, then in the best one about depths, then about views of these."""
    geometries = weigh_geometries(table, depths.taps, gallery, choices, world)
    spec = _place(gallery.spec, geometries)
    gallery.look(spec, table.dataset.samples)
    variants = world.tell(weigh_depths(table, gallery.rows(spec, table.samples), depths))
    chosen = choose_variant(variants)
    gallery.narrow(spec, depths.columns(chosen.taps))
    matrix, common = gallery.rows(spec, table.samples), table.common()
    most = ROOM_BYTES // (matrix.itemsize * len(matrix) * (matrix.shape[1] + len(table.dataset.classes)))
    if most < LARGEST_SET and choices.views == "auto":
        log.info("views: there is memory for the features of %d at most", max(1, most))
    sets = list_views(chosen, choices.symmetry, common, most) if choices.views == "auto" else ()
    weighed = weigh_views(table, gallery, spec, sets, chosen.taps, world)
    curve = draw_curve(table, matrix, chosen)
    return Evidence(variants, weighed, curve, common, geometries, tuple(gallery.purse.refused))


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

    @property
    def judge(self) -> tuple[str, ...]:
        """The kind of head that features are compared by: class means need one label a picture."""
        return KIND if self.dataset.task == "single" else ("logistic",)

    def fit(self, matrix: NDArray[np.float32], kinds: tuple[str, ...]) -> FittedHead:
        """The best head of some kinds on the samples' features, (n, dim) or (n, views, dim)."""
        phase = FitHead(kinds, self.phase.folds)
        return fitting.fit_heads(matrix, self.samples, self.dataset, self.groups, phase, self.seed)

    def are_right(self, head: FittedHead) -> NDArray[np.bool_]:
        """Whether each answer out of fold was right, with several labels a picture in all of them."""
        targets = evaluation.encode(self.samples, self.dataset.classes)[head.rows]
        if self.dataset.task == "multi":
            hits: NDArray[np.bool_] = ((head.logits > 0) == targets).all(1)
        else:
            hits = head.logits.argmax(1) == targets.argmax(1)
        return hits

    def draw(self, head: FittedHead) -> tuple[NDArray[np.uint16], bool]:
        """(how often each answer out of fold is drawn, (resamples, n), whether groups are)."""
        groups = [self.samples[row].group for row in head.rows]
        resamples = RESAMPLES if any(groups) else 0
        return metrics.draw_weights(np.zeros(len(groups), np.int64), groups, resamples, self.seed), any(groups)

    def describe(self, head: FittedHead, taps: Sequence[str], views: Sequence[ViewName]) -> Variant:
        """A fitted head as its answers out of fold show it."""
        right = metrics.proportion(self.are_right(head), *self.draw(head))
        loss, shown = head.candidates[0].log_loss, (right.value, right.low, right.high)
        return Variant(tuple(taps), tuple(views), head.kind, loss, *shown, len(self.samples))

    def common(self) -> float:
        """The accuracy of always saying the most frequent class; 0 with several labels a picture."""
        if self.dataset.task == "multi":
            return 0.0
        return max(Counter(sample.labels for sample in self.samples).values()) / len(self.samples)

    def part(self, pictures: int) -> tuple[Table, NDArray[np.int64]]:
        """(about so many of the samples, or more where classes are many or groups large; their places)."""
        return self.take(splits.draw_enough(self.samples, self.groups, pictures, self.seed))

    def share(self, share: float) -> tuple[Table, NDArray[np.int64]]:
        """(a stratified share of the samples, their places)."""
        return self.take(splits.draw_part(self.samples, self.groups, share, self.seed))

    def beside(self, part: Table) -> list[Sample]:
        """The data set's pictures that are not a part's, those of the report among them."""
        taken = {sample.source for sample in part.samples}
        return [sample for sample in self.dataset.samples if sample.source not in taken]

    def take(self, chosen: Sequence[bool]) -> tuple[Table, NDArray[np.int64]]:
        """(the samples that are chosen, their places)."""
        some = [sample for sample, is_chosen in zip(self.samples, chosen, strict=True) if is_chosen]
        return dataclasses.replace(self, samples=some), np.flatnonzero(chosen)


def weigh_geometries(
    table: Table, taps: Sequence[str], gallery: Gallery, choices: Choices, world: World = World()
) -> tuple[Variant, ...]:
    """The network's own geometry and others, on a part of the pictures; nothing where no others are tried.

    Fits are compared at the network's own size, and the best one at a larger size: each only where there is time to see
    all pictures by it. All of a picture laid on grey is tried only where pressed into the square it was no worse than
    the network's own way.

    Args:
        table: the pictures.
        taps: what features are of.
        gallery: their features.
        choices: the geometries to try.
        world: this process among others, which have to try the same.
    """
    some, _ = table.part(VIEWED)
    own, every = gallery.spec, len(table.dataset.samples)

    def judge(spec: Spec) -> Variant:
        found = some.describe(some.fit(gallery.rows(spec, some.samples), some.judge), taps, ("plain",))
        return dataclasses.replace(found, fit=spec.preprocess.fit, size=spec.preprocess.size)

    def add(found: list[Variant], spec: Spec, what: str) -> list[Variant]:
        pays = gallery.pays(what, spec, every, some.samples)
        told: list[Variant] = world.tell([*found, judge(spec)]) if pays else found
        return told

    if not choices.fits and not choices.larger:
        return ()
    found: list[Variant] = world.tell([judge(own)])
    if is_little_left(found[0], table.common()):
        return ()
    for fit in choices.fits:
        if fit == "pad" and found[-1].fit == "squash" and found[-1].log_loss > found[0].log_loss:
            continue  # what lies beyond the middle is of no use in another shape either
        found = add(found, own.adapted(fit=fit), f"fit {fit}")
    if choices.larger:
        larger = _place(own, found).adapted(size=choices.larger)
        found = add(found, larger, f"a square of {choices.larger} pixels")
    # The trials may have taken longer than was foreseen.
    rest = table.beside(some)
    while (best := _place(own, found)) != own:
        fit, size = best.preprocess.fit, best.preprocess.size
        if gallery.pays(f"{fit} {size} on all pictures", best, len(rest), rest):
            break
        found = [one for one in found if (one.fit, one.size) != (fit, size)]
    return tuple(found) if len(found) > 1 else ()


def weigh_depths(table: Table, matrix: NDArray[np.float32], depths: Depths) -> tuple[Variant, ...]:
    """Each depth by itself, and all together, best first.

    Args:
        table: the pictures.
        matrix: their features at all depths, (n, sum of widths).
        depths: the depths.
    """
    some, places = table.part(PICTURES)
    found = []
    for taps in depths.choices:
        head = some.fit(matrix[places][:, depths.columns(taps)], some.judge)
        found.append(some.describe(head, taps, ("plain",)))
    return tuple(sorted(found, key=lambda variant: variant.log_loss))


def weigh_views(
    table: Table,
    gallery: Gallery,
    spec: Spec,
    sets: Sequence[tuple[ViewName, ...]],
    taps: Sequence[str],
    world: World = World(),
) -> tuple[Variant, ...]:
    """The plain view and sets of views on a part of the pictures; nothing where no sets are tried.

    A larger set is tried only where the smaller ones together promise that it is worth its passes, and each only where
    there is time to see all pictures by it.

    Args:
        table: the pictures.
        gallery: their features.
        spec: the network, with the plain view.
        sets: the views to try, the smaller sets first.
        taps: what the features are of.
        world: this process among others, which have to try the same.
    """
    some, _ = table.part(VIEWED)
    rest, seen = table.beside(some), {"plain"}

    @functools.cache
    def look(view: ViewName) -> NDArray[np.float32]:
        return gallery.rows(spec.adapted(views=(view,)), some.samples)

    def judge(views: tuple[ViewName, ...]) -> Variant:
        rows = look("plain") if len(views) == 1 else np.stack([look(view) for view in views], 1)
        return some.describe(some.fit(rows, some.judge), taps, views)

    found: list[Variant] = world.tell([judge(("plain",))]) if sets else []
    for size, equal in itertools.groupby(sets, key=len):
        tried = tuple(equal)
        fresh = {view for views in tried for view in views} - seen
        if len(found) > 1 and not promises_more(found):
            break
        what, other = f"views {', '.join(map(name_views, tried))}", spec.adapted(views=tried[0][1:2])
        if not gallery.pays(what, other, len(fresh) * len(some.samples) + (size - 1) * len(rest), some.samples):
            break
        seen |= fresh
        found = world.tell([*found, *map(judge, tried)])
    # The trials may have taken longer than was foreseen.
    while len(best := choose_views(found, "auto")) > 1:
        what, other = f"views {name_views(best)} on all pictures", spec.adapted(views=best[1:2])
        if gallery.pays(what, other, (len(best) - 1) * len(rest), rest):
            break
        found = [one for one in found if one.views != best]
    return tuple(found) if len(found) > 1 else ()


def draw_curve(table: Table, matrix: NDArray[np.float32], whole: Variant) -> Curve | None:
    """The learning curve of the features, and what it foretells; None where there are too few pictures.

    Heads are fitted on an eighth, a quarter and half of the pictures and measured on the others. The error is taken
    to fall as a power of the number (Hestness et al., 2017). The curve of these three is held against what
    cross-validation gave with nearly all: that is its check.

    Args:
        table: the pictures.
        matrix: their features, (n, dim).
        whole: what cross-validation gave for these features.
    """
    table, chosen = table.part(PICTURES)
    matrix, n, classes = matrix[chosen], len(table.samples), table.dataset.classes
    if table.dataset.task != "single" or n * SHARES[0] < max(ENOUGH, 2 * len(classes)):
        return None
    targets = evaluation.encode(table.samples, classes).argmax(1)
    points: list[tuple[int, float]] = []
    for share in SHARES:
        some, places = table.share(share)
        every = len({sample.labels for sample in some.samples}) == len(classes)
        if not every or not all(splits.can_be_held_out(some.samples, table.groups)):
            return None
        head = some.fit(matrix[places], some.judge)
        others = np.setdiff1d(np.arange(n), places)
        wrong = answer(head.module, matrix[others]).argmax(1) != targets[others]
        points.append((len(places), _error(int(wrong.sum()), len(others))))
    trained = round(n * (1 - 1 / table.phase.folds))
    measured = _error(round((1 - whole.accuracy) * n), n)
    foretold = _follow(points, trained)
    doubled = _follow([*points, (trained, measured)], 2 * trained)
    return Curve(tuple(points), trained, measured, foretold, doubled)


def _error(wrong: int, pictures: int) -> float:
    """The share of wrong answers; with none, half a picture counts as wrong, as a power law has no zero."""
    return (wrong + 0.5) / (pictures + 1)


def _follow(points: Sequence[tuple[int, float]], pictures: int) -> float:
    """The error that a power law through (pictures, error) has at a number of pictures; it never rises."""
    x, y = np.log(np.array(points, float)).T
    slope = min(0.0, float(np.polyfit(x, y, 1)[0]))
    return float(min(1.0, math.exp(y.mean() + slope * (math.log(pictures) - x.mean()))))
