"""What evidence says in words and numbers, and what follows from it: pure functions, and no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headstart.errors import UsageError

if TYPE_CHECKING:
    from headstart.images import View

FINAL = "final"  # the network's own features, among those of several depths
# The cheaper of two variants is taken unless the other's log-loss is lower by more than this share.
WORTH_DEPTH, WORTH_MIRROR = 0.01, 0.02
# Neither mirror images nor training further are tried where the error by cross-validation is less than this share of
# what always saying the most frequent class gives: half of a hundredth for two equal classes.
LITTLE = 0.02
# Training further: epochs over the last blocks, at most and at least; what else it takes, in epochs: the activations of
# the frozen blocks, and the measuring of what came out.
TUNED_EPOCHS, LEAST_EPOCHS, AROUND = 6, 3, 1.5
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

    def __str__(self) -> str:
        where = "the final features" if self.taps == (FINAL,) else " + ".join(self.taps)
        seen = " and their mirror images" if len(self.views) > 1 else ""
        return f"{self.head} on {where}{seen}: {self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}]"


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
    mirror: tuple[Variant, Variant] | None  # without and with mirror images, where that was tried
    curve: Curve | None
    common: float = 0.0  # accuracy of always saying the most frequent class; 0 with several labels a picture

    @property
    def distance(self) -> float:
        """How far the data are from what the network was pretrained on.

        It is the share of the final features' log-loss that all depths together take away: about 0 on photographs of
        what ImageNet shows, where the final features say all; 0.3 and more on X-rays and the like.
        """
        final = next(variant.log_loss for variant in self.variants if variant.taps == (FINAL,))
        every = max(self.variants, key=lambda variant: len(variant.taps)).log_loss
        return max(0.0, 1.0 - every / final) if final > 0 else 0.0


def choose_variant(variants: Sequence[Variant]) -> Variant:
    """The variant with the least log-loss; the final features alone, where they are as good but for a hundredth."""
    best = min(variants, key=lambda variant: variant.log_loss)
    final = next(variant for variant in variants if variant.taps == (FINAL,))
    return final if final.log_loss <= best.log_loss * (1 + WORTH_DEPTH) else best


def describe_evidence(evidence: Evidence) -> list[str]:
    """What was found, in words and numbers."""
    lines = [f"{variant}, log-loss {variant.log_loss:.3f}" for variant in evidence.variants]
    lines.append(
        f"distance from the pretraining pictures {evidence.distance:.2f}, of 0 to 1: {_name(evidence.distance)}"
    )
    if evidence.mirror is not None:
        alone, both = (variant.log_loss for variant in evidence.mirror)
        verdict = "taken" if is_mirror_worth(evidence.mirror) else "not worth a second pass"
        lines.append(f"mirror images: log-loss {alone:.3f} without, {both:.3f} with them: {verdict}")
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
    return "earlier features help" if distance < 0.3 else "the pictures are of another kind"


def is_little_left(best: Variant, common: float) -> bool:
    """Whether hardly an error is left of those that always saying the most frequent class makes."""
    return 1 - best.accuracy <= LITTLE * (1 - common) + 1e-9  # for what floats cannot tell apart


def is_mirror_worth_trying(best: Variant, symmetry: str, common: float) -> bool:
    """Whether mirror images of pictures mean the same, and there is something left to gain by them."""
    return symmetry != "none" and not is_little_left(best, common)


def is_mirror_worth(pair: tuple[Variant, Variant]) -> bool:
    """Whether mirror images, which cost a second pass, take away enough of the log-loss."""
    alone, both = pair
    return both.log_loss < alone.log_loss * (1 - WORTH_MIRROR)


@dataclass(frozen=True)
class Outlook:
    """What training further would be: of how many pictures, at which pace, in which time."""

    pictures: int  # to train on
    select: int  # to choose by
    step_seconds: float  # of training, for each picture; 0: not measured yet
    seconds_left: float  # of the time budget

    def take(self, epochs: float) -> float:
        """Seconds that so many epochs take, with all that is around them."""
        return (epochs + AROUND) * self.pictures * self.step_seconds


def choose_epochs(outlook: Outlook) -> int:
    """As many epochs as the time allows, up to `TUNED_EPOCHS`; 0 where it allows fewer than `LEAST_EPOCHS`."""
    epochs = TUNED_EPOCHS
    while epochs and outlook.take(epochs) > outlook.seconds_left:
        epochs -= 1
    return epochs if epochs >= LEAST_EPOCHS else 0


def weigh_tuning(evidence: Evidence, outlook: Outlook) -> tuple[int, str]:
    """(epochs of training the last blocks further, why); none where it cannot pay or there is no time."""
    best = choose_variant(evidence.variants)
    every = max((variant.taps for variant in evidence.variants), key=len)
    if every == (FINAL,):
        return 0, "not trained further: the network has no blocks of which the first could be frozen"
    if best.taps == every[:1]:
        return 0, f"not trained further: the features are those of {every[0]}, up to which everything is frozen"
    if is_little_left(best, evidence.common):
        return 0, f"not trained further: the fitted head is right on {best.accuracy:.1%}"
    if outlook.select < LEAST_SELECT:
        return 0, f"not trained further: {outlook.select} pictures to choose by are fewer than {LEAST_SELECT}"
    epochs = choose_epochs(outlook)
    if not epochs:
        need, left = show_time(outlook.take(LEAST_EPOCHS)), show_time(max(0.0, outlook.seconds_left))
        return (
            0,
            f"not trained further: {LEAST_EPOCHS} epochs would take about {need}, and {left} of the budget are left",
        )
    return epochs, f"then {epochs} epochs over the last blocks, of about {show_time(outlook.take(epochs))}"


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
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
