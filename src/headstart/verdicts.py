"""What evidence says in words and numbers, and what follows from it: pure functions, and no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from headstart.errors import UsageError

if TYPE_CHECKING:
    from headstart.images import Fit, View

FINAL = "final"  # the network's own features, among those of several depths
# The cheaper of two variants is taken unless the other's log-loss is lower by more than this share.
WORTH_DEPTH, WORTH_VIEWS, WORTH_GEOMETRY = 0.01, 0.02, 0.02
LARGER = 1.3  # times a network's own side: what it does best at, mostly, without training (Touvron et al., 2019)
SQUARE = 1.02  # sides whose ratio is less count as equal
# No other geometries and views are tried, nor training further, where the error by cross-validation is at most this
# share of what always saying the most frequent class gives: half of a hundredth for two equal classes.
LITTLE = 0.02
# Training further: epochs over the last blocks, where others follow; the least, whatever is trained.
TUNED_EPOCHS, LEAST_EPOCHS = 6, 3
# Everything trained: so many pictures are shown in all, in this many epochs or fewer: few pictures are shown more often
# (in the spirit of BiT's rule, Kolesnikov et al., 2020).
WHOLE_PICTURES, WHOLE_EPOCHS = 20_000, 12
# From random weights: epochs at most and at least, on so many pictures and so far from the pretraining ones at least.
SCRATCH_EPOCHS, SCRATCH_LEAST, SCRATCH_PICTURES, FAR = 60, 20, 20_000, 0.3
NEAR = 1.25  # times the fitted head's log-loss: training whose end cannot come nearer is given up
VIEW_SETS: dict[str, tuple[View, ...]] = {  # by the names that settings give them
    "plain": ("plain",),
    "mirror": ("plain", "mirror"),
    "zoom": ("plain", "zoom"),
    "all": ("plain", "mirror", "zoom", "zoom-mirror"),
}
# Strengths of heads are tuned on about so many rows of features: more move the choice little and cost much.
TUNING_ROWS = 10_000
# Rows times classes, each fold by itself, beyond which logistic regression takes too long: on 10,000 pictures of 100
# classes, which are 6 million, two cores took 102 s, and 8 s for class means.
MOST_ANSWERS = 20_000_000
# Of what is left of a time budget, what looking at pictures in other ways may take: heads need the rest, and training.
LOOKING = 0.5
SPENT = "nothing is left of the budget"
LEAST_SELECT = 30  # pictures to choose by: with fewer, chance would choose


@dataclass(frozen=True)
class Variant:
    """A head on features of some depths and views, as cross-validation found it."""

    taps: tuple[str, ...]  # `final` is the network's own features
    views: tuple[View, ...]
    head: str
    log_loss: float
    accuracy: float  # with its 95 % interval
    low: float
    high: float
    pictures: int
    fit: Fit | Literal[""] = ""  # how pictures are brought into the network's square, of so many pixels a side; "" and
    size: int = 0  # 0: where that was not compared

    def __str__(self) -> str:
        where = "the final features" if self.taps == (FINAL,) else " + ".join(self.taps)
        return f"{self.head} on {where}{show_views(self.views)}: {self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Curve:
    """Errors by number of pictures, and what a power law through them foretells."""

    points: tuple[tuple[int, float], ...]  # pictures, error
    pictures: int  # that cross-validation fitted on
    measured: float  # error there
    foretold: float  # by the points alone: the curve's own check
    doubled: float  # error with twice as many


@dataclass(frozen=True)
class Evidence:
    """What features say before anything is trained."""

    variants: tuple[Variant, ...]  # by depth, best first
    views: tuple[Variant, ...]  # by views, the plain one first; none where no others were tried
    curve: Curve | None
    common: float = 0.0  # accuracy of always saying the most frequent class; 0 with several labels a picture
    geometries: tuple[Variant, ...] = ()  # by fit and size, the network's own first; none where no others were tried
    untried: tuple[str, ...] = ()  # what there was no time for, in words

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Evidence:
        """The evidence in a plan's JSON values."""

        def read(name: str) -> tuple[Variant, ...]:
            return tuple(
                Variant(**{**value, "taps": tuple(value["taps"]), "views": tuple(value["views"])})
                for value in values[name]
            )

        curve = values["curve"]
        if curve is not None:
            curve = Curve(**{**curve, "points": tuple((pictures, error) for pictures, error in curve["points"])})
        untried = tuple(values.get("untried", ()))  # a plan of before budgets held for evidence has none
        return Evidence(read("variants"), read("views"), curve, values["common"], read("geometries"), untried)

    @property
    def distance(self) -> float | None:
        """How far the data are from what the network was pretrained on; None where one depth was looked at only.

        It is the share of the final features' log-loss that all depths together take away: about 0 on photographs of
        what ImageNet shows, where the final features say all; 0.3 and more on X-rays and the like.
        """
        final = next((variant.log_loss for variant in self.variants if variant.taps == (FINAL,)), None)
        if final is None or len(self.variants) == 1:
            return None
        every = max(self.variants, key=lambda variant: len(variant.taps)).log_loss
        return max(0.0, 1.0 - every / final) if final > 0 else 0.0


def choose_variant(variants: Sequence[Variant]) -> Variant:
    """All depths together; the final features alone, where they are as good but for a hundredth.

    A block by itself is not taken: where few pictures favoured one, it was worse on others nearly every time.
    """
    every = max(variants, key=lambda variant: len(variant.taps))
    final = next((variant for variant in variants if variant.taps == (FINAL,)), every)
    return final if final.log_loss <= every.log_loss * (1 + WORTH_DEPTH) else every


def choose_geometry(found: Sequence[Variant]) -> Variant:
    """How pictures are brought into the network's square: its own way, the first, but for what others gain."""
    held = found[0]
    for size in sorted({variant.size for variant in found}):
        best = min((one for one in found if one.size == size), key=lambda variant: variant.log_loss)
        if best.log_loss < held.log_loss * (1 - WORTH_GEOMETRY):
            held = best
    return held


def list_fits(own: Fit, ratio: float) -> tuple[Fit, ...]:
    """How else pictures may be brought into a square: all of each is shown, pressed into it or laid on grey.

    Args:
        own: the network's own way.
        ratio: of the longer side to the shorter one, of the picture that is farthest from a square.
    """
    fits: tuple[Fit, ...] = ("squash",) if ratio < SQUARE else ("squash", "pad")
    return tuple(fit for fit in fits if fit != own)


def enlarge(size: int) -> int:
    """The larger side of a network's input that is tried, in pixels: a multiple of 32, as many networks need."""
    return round(LARGER * size / 32) * 32


def choose_views(found: Sequence[Variant], wanted: str) -> tuple[View, ...]:
    """The views of a picture that answers are averaged over: as set, or the cheapest but for what others gain.

    Args:
        found: the plain view, and others that were tried.
        wanted: the name of a set, or `auto`.
    """
    if wanted != "auto":
        return VIEW_SETS[wanted]
    if not found:
        return VIEW_SETS["plain"]
    return _hold_views(found).views


def _hold_views(found: Sequence[Variant]) -> Variant:
    """The cheapest of some sets of views, the plain one first, but for what others gain."""
    held, *others = found
    for passes in sorted({len(variant.views) for variant in others}):
        best = min((one for one in others if len(one.views) == passes), key=lambda variant: variant.log_loss)
        if best.log_loss < held.log_loss * (1 - WORTH_VIEWS):
            held = best
    return held


def promises_more(found: Sequence[Variant]) -> bool:
    """Whether all views together may be worth their passes: they gain what one does, and half of what the other does.

    On four sets of pictures where that foretold 0.02 to 0.10 of the log-loss they gained about as much, or less.

    Args:
        found: the plain view, and sets of one more view.
    """
    plain, *others = found
    best, *rest = sorted(variant.log_loss for variant in others)
    foretold = best - sum(plain.log_loss - loss for loss in rest) / 2
    return foretold < _hold_views(found).log_loss * (1 - WORTH_VIEWS)


def count_answers(pictures: int, views: int, classes: int, folds: int) -> int:
    """Rows times classes that a head of many classes is fitted on, in all folds and in the end on all pictures."""
    return views * classes * (folds * min(pictures, TUNING_ROWS // views) + pictures)


def name_views(views: Sequence[View]) -> str:
    """The name by which settings know views."""
    return next((name for name, known in VIEW_SETS.items() if known == tuple(views)), " + ".join(views))


def show_views(views: Sequence[View]) -> str:
    """Views in words, to be added to what they are views of."""
    name = name_views(views)
    return "" if name == "plain" else f", views {name}"


def describe_evidence(evidence: Evidence, brief: bool = False) -> list[str]:
    """What was found, in words and numbers; in brief of depths that one alone which is taken."""
    lines = []
    if evidence.geometries:
        tried = ", ".join(f"{one.fit} {one.size} {one.log_loss:.3f}" for one in evidence.geometries)
        geometry = choose_geometry(evidence.geometries)
        lines.append(f"log-loss by fit and size in pixels: {tried}: {geometry.fit} {geometry.size} is taken")
    variants = [choose_variant(evidence.variants)] if brief else evidence.variants
    lines += [f"{variant}, log-loss {variant.log_loss:.3f}" for variant in variants]
    best = min(evidence.variants, key=lambda variant: variant.log_loss)
    if choose_variant(evidence.variants).log_loss > best.log_loss and best.taps != (FINAL,) and len(best.taps) == 1:
        lines.append(f"{best.taps[0]} by itself is not taken: such a lead mostly is chance")
    if evidence.distance is not None:
        lines.append(
            f"distance from the pretraining pictures {evidence.distance:.2f}, of 0 to 1: {_name(evidence.distance)}"
        )
    if evidence.views:
        figures = (f"{name_views(variant.views)} {variant.log_loss:.3f}" for variant in evidence.views)
        taken = name_views(choose_views(evidence.views, "auto"))
        lines.append(f"log-loss by views: {', '.join(figures)}: {taken} is worth its passes")
    lines += evidence.untried
    curve = evidence.curve
    if curve is not None:
        lines.append(
            f"accuracy with {2 * curve.pictures} pictures for training: {1 - curve.doubled:.3f} foretold, "
            f"{1 - curve.measured:.3f} with {curve.pictures}, where the curve up to half of them foretold "
            f"{1 - curve.foretold:.3f}"
        )
    return lines


def _name(distance: float) -> str:
    """A distance in words."""
    if distance < 0.05:
        return "the final features say all"
    return "earlier features help" if distance < FAR else "the pictures are of another kind"


def is_little_left(best: Variant, common: float) -> bool:
    """Whether hardly an error is left of those that always saying the most frequent class makes."""
    return 1 - best.accuracy <= LITTLE * (1 - common) + 1e-9  # for what floats cannot tell apart


def list_views(best: Variant, symmetry: str, common: float, most: int) -> tuple[tuple[View, ...], ...]:
    """The views that are tried beside the plain one; none where there is little left to gain.

    Args:
        best: the best depth.
        symmetry: what leaves a picture's meaning alone; with `none`, no mirror images.
        common: the accuracy of always saying the most frequent class.
        most: views of each picture whose features there is room for.
    """
    if is_little_left(best, common):
        return ()
    fit = [views for views in VIEW_SETS.values() if 1 < len(views) <= most]
    return tuple(views for views in fit if symmetry != "none" or "mirror" not in views)


def weigh_look(what: str, seconds: float, left: float | None) -> str:
    """Why there is no time to look at pictures in another way; nothing where there is.

    Args:
        what: the way.
        seconds: that it would take.
        left: of the time budget; None: there is none.
    """
    if left is None or seconds <= LOOKING * max(0.0, left):
        return ""
    if left <= 0:
        return f"{what}: not tried, {SPENT}"
    return f"{what}: not tried, that would take about {show_time(seconds)} of the {show_time(left)} left"


@dataclass(frozen=True)
class Outlook:
    """What training further would take, and how much time there is for it."""

    epoch_seconds: float  # with its look at the select pictures; 0: not measured yet
    start_seconds: float  # of the look at them before training
    around_seconds: float  # of all else that comes before and after
    seconds_left: float  # of the time budget

    def take(self, epochs: int) -> float:
        """Seconds that so many epochs take, with all that is around them."""
        return self.around_seconds + self.start_seconds + epochs * self.epoch_seconds


def choose_epochs(outlook: Outlook, most: int, least: int = LEAST_EPOCHS) -> int:
    """As many epochs as the time allows, up to `most`; 0 where it allows fewer than the least."""
    epochs = most
    while epochs and outlook.take(epochs) > outlook.seconds_left:
        epochs -= 1
    return epochs if epochs >= least else 0


def can_gain(evidence: Evidence, select: int) -> tuple[bool, str]:
    """(whether training further may pay, where not: why)."""
    best = choose_variant(evidence.variants)
    if is_little_left(best, evidence.common):
        return False, f"not trained further: {best.head} are right on {best.accuracy:.1%} out of fold already"
    if not select:
        why = f"there are too few pictures, or of a class, to keep {LEAST_SELECT} to choose by"
        return False, f"not trained further: {why}"
    return True, ""


def find_boundary(evidence: Evidence, freeze: str) -> tuple[str, str]:
    """(the block up to which the network stays frozen while its last blocks are trained, where there is none: why).

    Args:
        evidence: what was found.
        freeze: the block that was asked for; none: the first of those that were looked at.
    """
    every = max((variant.taps for variant in evidence.variants), key=len)
    boundary = freeze or next((tap for tap in every if tap != FINAL), FINAL)
    if boundary == FINAL:
        return "", "the last blocks: not trained, no block is known up to which the network could be frozen"
    if choose_variant(evidence.variants).taps == (boundary,):
        return "", f"the last blocks: not trained, the features are those of {boundary}, up to which all is frozen"
    return boundary, ""


def choose_length(pictures: int) -> int:
    """Epochs over everything, as long as there is time: the more, the fewer pictures there are."""
    return max(LEAST_EPOCHS, min(WHOLE_EPOCHS, WHOLE_PICTURES // max(1, pictures)))


def is_scratch_worth_trying(evidence: Evidence, pictures: int) -> bool:
    """Whether the pictures are so many, and so unlike those of the pretraining, that random weights may do as well."""
    return pictures >= SCRATCH_PICTURES and evidence.distance is not None and evidence.distance >= FAR


def weigh_time(name: str, outlook: Outlook, most: int, least: int = LEAST_EPOCHS) -> tuple[int, str]:
    """(epochs of training something further, what is said of it); none where there is no time."""
    epochs = choose_epochs(outlook, most, least)
    if epochs:
        return epochs, f"then {epochs} epochs over {name}, of about {show_time(outlook.take(epochs))}"
    if outlook.seconds_left <= 0:
        return 0, f"{name}: not trained, {SPENT}"
    need, left = show_time(outlook.take(least)), show_time(outlook.seconds_left)
    return 0, f"{name}: not trained, {least} epochs would take about {need}, and {left} of the budget are left"


def can_win(losses: Sequence[float], epochs: int, target: float | None) -> bool:
    """Whether a log-loss can still come near a target; told from half-way on.

    It is taken to go on falling as in the best of its last three epochs. It need not come under the target itself: of
    what lies on the way from the start, some may be better than the end.

    Args:
        losses: after each epoch so far, the start's first.
        epochs: that there are at most.
        target: to come near; None: the start's.
    """
    done = len(losses) - 1
    if done < 1 or 2 * done < epochs:
        return True
    last = losses[-4:]
    fall = max(0.0, *(before - after for before, after in itertools.pairwise(last)))
    return losses[-1] - fall * (epochs - done) < NEAR * (losses[0] if target is None else target)


def read_time(text: str) -> float:
    """Seconds of a time such as `90s`, `5m` or `1.5h`; a number alone counts seconds.

    Raises:
        UsageError: for what is no time.
    """
    found = re.fullmatch(r"([0-9]+(?:[.][0-9]+)?)\s*([smh]?)", text.strip())
    if not found:
        raise UsageError("time_budget", f"{text!r} is no time", "Give one such as 90s, 5m or 2h.")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def show_time(seconds: float) -> str:
    """A time as people say it."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 120 else f"{round(minutes, 1 if minutes < 10 else None):g} min"
