"""What is to be done, decided from facts about the data and the settings: pure functions, and no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from headstart.config import AUTOMATIC_AUGMENT, EngineConfig, RunConfig
from headstart.data import Task
from headstart.errors import UsageError
from headstart.strategies import (
    Strategy,
    check,
    is_still,
    may_train_further,
    name_strategy,
    read_shares,
    read_taps,
    read_views,
    trains,
)
from headstart.timing import Layout, Pace, Timing
from headstart.verdicts import (
    FINAL,
    LEAST_EPOCHS,
    MOST_ANSWERS,
    SCRATCH_EPOCHS,
    SCRATCH_LEAST,
    TUNED_EPOCHS,
    VIEW_SETS,
    Evidence,
    Outlook,
    can_gain,
    choose_epochs,
    choose_geometry,
    choose_length,
    choose_variant,
    choose_views,
    count_answers,
    describe_evidence,
    find_boundary,
    is_scratch_worth_trying,
    show_time,
    weigh_time,
)

if TYPE_CHECKING:
    from headstart.images import Fit, View

HEADS = ("logistic", "svm", "means", "blend", "knn")
LINEAR_HEADS = tuple(kind for kind in HEADS if kind != "knn")
# On features of several depths; the others take long there and were never the best.
DEEP_HEADS = ("logistic", "means", "blend")
# With fewer pictures cross-validation cannot tell heads apart: on 36 draws of 20 to 150 pictures the head that it
# preferred to the blend was worse on others on average, above all where it took itself for certain.
COMPARABLE = 200  # pictures
KNN_VECTORS = 20_000  # of features, one for each view of a picture: a model that holds more is no longer small


@dataclass(frozen=True)
class Situation:
    """The facts that a plan is made from."""

    task: Task
    classes: int
    pictures: int  # that heads are fitted on, or weights trained; under `auto` with those of `select`
    select: int  # of the role `select`
    smallest_class: int  # pictures of it; a class of one, which cannot be held out, is not counted
    folds: int  # that the smallest class and the groups allow
    device: str
    precision: str  # of features and predictions
    timing: Timing = Timing()
    evidence: Evidence | None = None  # where it was gathered
    report: int = 0  # of the role `report`
    fit: Fit = "crop"  # how pictures are brought into the network's square, unless evidence finds better
    size: int = 224  # of that square's side, in pixels


@dataclass(frozen=True)
class FitHead:
    """A phase: heads fitted on cached features, the best one chosen by cross-validation."""

    heads: tuple[str, ...]
    folds: int
    taps: tuple[str, ...] = (FINAL,)  # depths that the features are of
    views: tuple[View, ...] = ("plain",)
    fit: Fit = "crop"  # how pictures are brought into the network's square
    size: int = 224  # of that square's side, in pixels
    phase: Literal["fit_head"] = "fit_head"


@dataclass(frozen=True)
class Train:
    """A phase: weights trained by gradient. Its settings are all decided: no `auto`, no 0 for "by strategy"."""

    settings: EngineConfig
    layout: Layout
    start: Literal["pretrained", "random"] = "pretrained"
    on: Literal["pictures", "features"] = "pictures"  # features: those of the cache, for a head alone
    seconds: float | None = None  # that epochs may take together: none is begun that would take longer
    # Where no epoch is better. Else the best epoch is kept, to be held against the start later, and none is begun that
    # cannot come near the target: a log-loss on select, None for that of the start.
    keeps_start: bool = True
    target: float | None = None
    views: tuple[View, ...] = ("plain",)  # of pictures, that predictions are averaged over
    name: str = ""  # of what is trained, where several things are and one is taken
    phase: Literal["train"] = "train"


@dataclass(frozen=True)
class Choose:
    """A phase: of the fitted head, what each training made and what lies between, the best on the select pictures."""

    shares: tuple[float, ...]  # of the way from the fitted head's weights to the trained ones; 1: all of it
    views: tuple[tuple[View, ...], ...]  # of pictures, that predictions are averaged over
    phase: Literal["choose"] = "choose"


Phase = FitHead | Train | Choose


@dataclass(frozen=True)
class Plan:
    """The phases of a run, with reasons in words and numbers. Nothing in it is left to be decided."""

    strategy: Strategy
    device: str
    precision: str
    phases: tuple[Phase, ...]
    reasons: tuple[str, ...]
    timing: Timing = Timing()
    evidence: Evidence | None = None  # that it was made from
    further: tuple[str, ...] = ()  # the reasons, of these, for what is trained further and what is not

    @property
    def unmeasured(self) -> Train | None:
        """The first phase whose pace is not known yet, of several of one name the last."""
        phases = {phase.name: phase for phase in self.phases if isinstance(phase, Train) and phase.on == "pictures"}
        return next((phase for name, phase in phases.items() if self.timing.pace(name) is None), None)

    @property
    def trains(self) -> bool:
        """Whether weights are trained by gradient."""
        return any(isinstance(phase, Train) for phase in self.phases)

    @property
    def chooses(self) -> bool:
        """Whether what was trained is held against the fitted head."""
        return isinstance(self.phases[-1], Choose)

    def told(self, *why: str) -> Plan:
        """The plan with more that is said of training further."""
        return dataclasses.replace(self, reasons=(*self.reasons, *why), further=(*self.further, *why))

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)


def decide(situation: Situation, config: RunConfig) -> Plan:
    """The plan for a situation.

    Raises:
        UsageError: where settings contradict each other.
    """
    s, auto = situation, config.train.strategy == "auto"
    reasons: list[str] = []
    strategy = name_strategy(config)
    check(s.task, config)
    phases: list[Phase] = []
    further: list[str] = []
    if strategy == "lp-ft" or not trains(config):
        phases.append(_plan_head(s, config, linear=strategy == "lp-ft", reasons=reasons))
    if trains(config):
        phases += _plan_training(s, strategy, config, reasons)
    elif s.evidence is not None:
        phases += _plan_further(s, s.evidence, config, phases[0], further)
        reasons += further
    trained = any(isinstance(phase, Train) for phase in phases)
    if s.select and not trained:
        reasons.append(f"nothing is left to choose on the {s.select} select pictures: heads are fitted on them too")
    found = (
        "probe, which trains no weight of the network" if not trained else "probe, and training further held against it"
    )
    reasons.insert(0, f"strategy auto: {found}" if auto else f"strategy {strategy}: as set")
    why = "the fastest format that this processor computes in" if config.model.precision == "auto" else "as set"
    reasons.append(f"{s.precision} on {s.device}: {why}")
    if config.model.views != "auto":
        reasons.append(f"views {config.model.views}: as set")
    return Plan(strategy, s.device, s.precision, tuple(phases), tuple(reasons), s.timing, s.evidence, tuple(further))


def _plan_head(s: Situation, config: RunConfig, linear: bool, reasons: list[str]) -> FitHead:
    taps, views = read_taps(config) or (FINAL,), ("plain",) if trains(config) else read_views(config)
    fit, size = s.fit, s.size
    said: list[str] = []
    if s.evidence is not None:
        if s.evidence.geometries:
            best = choose_geometry(s.evidence.geometries)
            fit, size = best.fit or fit, best.size
        taps = choose_variant(s.evidence.variants).taps
        views = choose_views(s.evidence.views, config.model.views)
        said = describe_evidence(s.evidence)
    deep = s.evidence is not None and taps != (FINAL,)
    heads, why = _choose_heads(s, config, linear, deep, len(views))
    reasons += why
    if s.folds < config.train.folds:
        cause = f"the smallest class has {s.smallest_class}" if s.smallest_class == s.folds else "groups allow no more"
        reasons.append(f"{s.folds} folds instead of {config.train.folds}: {cause}")
    reasons += said
    return FitHead(heads, s.folds, taps, views, fit, size)


def _choose_heads(
    s: Situation, config: RunConfig, linear: bool, deep: bool, views: int
) -> tuple[tuple[str, ...], list[str]]:
    """(the kinds of heads that compete, why where that is not all of them).

    Args:
        s: the facts.
        config: the settings.
        linear: whether weights are trained on from the head.
        deep: whether evidence chose features of other depths than the network's own.
        views: of each picture.
    """
    if config.train.heads:
        heads = _read_heads(config.train.heads, s.task, linear)
        return heads, [f"heads {', '.join(heads)}: as set"]
    if s.task == "multi":
        return HEADS[:1], ["several labels a picture: one logistic regression for each label"]
    if count_answers(s.pictures, views, s.classes, s.folds) > MOST_ANSWERS:
        why = f"of {s.pictures} pictures and {s.classes} classes the others would take long"
        return ("means",), [f"heads means: {why}"]
    if s.pictures < COMPARABLE:
        why = f"{s.pictures} pictures for training, fewer than {COMPARABLE}, are too few to compare heads by"
        return ("blend",), [f"heads blend, of logistic regression and class means: {why}"]
    if linear:
        return LINEAR_HEADS, []
    if deep:
        why = "on features of other depths the others take long, and were never the best"
        return DEEP_HEADS, [f"heads {', '.join(DEEP_HEADS)}: {why}"]
    if s.pictures * views > KNN_VECTORS:
        what = f"{s.pictures} pictures for training" + (f" in {views} views" if views > 1 else "")
        return LINEAR_HEADS, [f"{what}, over {KNN_VECTORS}: no kNN, its model would hold them all"]
    return HEADS, []


def _read_heads(text: str, task: Task, linear: bool) -> tuple[str, ...]:
    heads = tuple(dict.fromkeys(filter(None, (head.strip() for head in text.split(",")))))
    allowed = HEADS[:1] if task == "multi" else LINEAR_HEADS if linear else HEADS
    for head in heads or ("",):
        if head not in allowed:
            why = f"{head!r} is no kind of head" if head not in HEADS else f"{head!r} does not go with this plan"
            raise UsageError("heads", why, f"Choose from {', '.join(allowed)}.")
    return heads


def _plan_training(s: Situation, strategy: Strategy, config: RunConfig, reasons: list[str]) -> list[Phase]:
    pace, views = s.timing.pace(""), read_views(config)
    layout = pace.layout if pace is not None else UNMEASURED
    settings = settle(s, strategy, config.engine)
    reasons.append(f"the best of {settings.epochs} epochs by {settings.best_by} on {s.select} select pictures")
    reasons.append(f"{settings.optimizer}, learning rate {settings.learning_rate:g}, {settings.batch_size} a batch")
    start: Literal["pretrained", "random"] = "random" if strategy == "scratch" else "pretrained"
    if strategy == "probe" or (strategy in ("finetune", "lp-ft") and is_still(settings)):
        reasons.append("only the head is trained, and pictures are not varied: on features, computed once")
        return [Train(settings, layout, start, "features", views=views)]
    reasons.append(f"training in {layout}")
    if pace is not None:
        took = show_time(settings.epochs * s.pictures * pace.seconds)
        reasons.append(f"{settings.epochs} epochs of {s.pictures} pictures: about {took}")
    last = Train(settings, layout, start, views=views)
    if strategy != "two-stage":
        return [last]
    first = dataclasses.replace(
        settings,
        epochs=settings.head_epochs,
        optimizer="adam",
        learning_rate=settings.head_rate,
        schedule="constant",
        freeze="all",
        unfreeze_epochs=0,
        rates="",
        find_lr=False,
        weight_decay=0.0,
    )
    reasons.append(f"first the head alone: {first.epochs} epochs by adam at {first.learning_rate:g}")
    return [Train(first, layout, start), last]


def _plan_further(s: Situation, evidence: Evidence, config: RunConfig, first: Phase, reasons: list[str]) -> list[Phase]:
    """What follows the fitted head under `auto`, cheap things first, as far as it may pay and there is time."""
    if not may_train_further(config):
        reasons.append("not trained further: that is tried where a --time-budget is given, such as 5m")
        return []
    possible, why = can_gain(evidence, s.select)
    if isinstance(first, FitHead) and first.heads == ("knn",):
        possible, why = False, "not trained further: kNN has no weights"
    if not possible:
        reasons.append(why)
        return []
    learned = dataclasses.replace(s, pictures=s.pictures - s.select)
    last = Choose(read_shares(config.train.interpolation), _list_views(config, first))
    offers = _list_trainings(learned, evidence, config.engine, reasons)
    phases = _allot(learned, offers, last, reasons, longer=not config.engine.epochs)
    return [*phases, last] if phases else []


def _allot(
    s: Situation, offers: Sequence[tuple[Train, int]], last: Choose, reasons: list[str], longer: bool
) -> list[Train]:
    """The trainings that there is time for, with their epochs and the time that they may take.

    Args:
        s: the facts; of the pictures those that weights learn from.
        offers: (a training with the epochs that it should have, how many it has to have at least), the cheapest first.
        last: how what they made is weighed.
        reasons: to be added to.
        longer: whether the last of them may have more epochs.
    """
    left = math.inf if s.timing.seconds_left is None else s.timing.seconds_left
    least = LEAST_STEP * s.timing.look_seconds
    guess = Pace(UNMEASURED, least / DEARER, look_seconds=least)
    pace, outlook = next(iter(s.timing.paces), guess), Outlook(0.0, 0.0, 0.0, left)
    left -= s.timing.head_seconds  # the head is fitted once more in the end, and what is taken looks at the report
    left -= s.report * (pace.supply_seconds + max(map(len, last.views)) * pace.look_seconds)
    phases: list[Train] = []
    for phase, fewest in offers:
        # What was not measured yet is taken to be dearer, and is measured where there may be time for it. Random
        # weights are trained as all blocks are.
        dearer = pace.seconds * (DEARER if phase.start == "pretrained" else 1.0)
        pace = s.timing.pace(phase.name) or dataclasses.replace(pace, seconds=dearer, layout=UNMEASURED)
        found = _foresee(s, phase, last, pace, left)
        epochs, why = weigh_time(phase.name, found, phase.settings.epochs, fewest)
        reasons.append(why)
        if epochs:
            outlook, left = found, left - found.take(epochs)
            phases.append(_time(dataclasses.replace(phase, layout=pace.layout), epochs, found))
    if phases and longer and not math.isinf(left):
        epochs = choose_epochs(outlook, LONGER * phases[-1].settings.epochs)
        if epochs > phases[-1].settings.epochs:
            phases[-1], left = _time(phases[-1], epochs, outlook), outlook.seconds_left - outlook.take(epochs)
            reasons.append(f"{phases[-1].name}: {epochs} epochs, of about {show_time(outlook.take(epochs))}, instead")
    return [_give(phase, left / len(phases)) for phase in phases]


def _foresee(s: Situation, phase: Train, last: Choose, pace: Pace, left: float) -> Outlook:
    """What a training would take; where activations are kept, pictures are opened and looked at once for each view."""
    views, shares = {view for views in last.views for view in views}, len(last.shares)
    kept, step = phase.settings.cached_views if pace.keeps else 0, pace.seconds
    look, supply = pace.look_seconds, pace.supply_seconds
    supply_each = 0.0 if kept else supply
    judged = s.select * (look + supply_each)
    weighed = s.select * (shares if phase.start == "pretrained" else 1) * (supply + len(views) * look)
    around = AROUND * s.pictures * step + s.pictures * kept * (supply + look) + weighed
    return Outlook(s.pictures * (step + supply_each) + judged, judged, around, left)


def _time(phase: Train, epochs: int, outlook: Outlook) -> Train:
    """A phase of so many epochs, and the time that they may take."""
    seconds = None if math.isinf(outlook.seconds_left) else outlook.take(epochs) - outlook.around_seconds
    return dataclasses.replace(phase, settings=dataclasses.replace(phase.settings, epochs=epochs), seconds=seconds)


def _list_views(config: RunConfig, first: Phase) -> tuple[tuple[View, ...], ...]:
    """The views that trained models are tried with: as set, or plain, mirrored, and those of the fitted head."""
    if config.model.views != "auto":
        return (read_views(config),)
    mirrored = () if config.engine.symmetry == "none" else (VIEW_SETS["mirror"],)
    held = (first.views,) if isinstance(first, FitHead) else ()
    return tuple(sorted(dict.fromkeys((VIEW_SETS["plain"], *mirrored, *held)), key=len))


def _give(phase: Train, seconds: float) -> Train:
    """A phase with its share of the time that nobody needs; it may be a little slower than foreseen anyway."""
    if phase.seconds is None:
        return phase
    return dataclasses.replace(phase, seconds=max(SLOWER * phase.seconds, phase.seconds + seconds))


def _list_trainings(
    s: Situation, evidence: Evidence, engine: EngineConfig, reasons: list[str]
) -> list[tuple[Train, int]]:
    """(a phase with as many epochs as it should have, how many it needs at least), the cheapest first."""
    freeze = engine.freeze if engine.freeze != "0" else ""
    boundary, why = find_boundary(evidence, freeze)
    found = []
    if boundary:
        tuned = dataclasses.replace(
            engine,
            epochs=engine.epochs or TUNED_EPOCHS,
            learning_rate=engine.learning_rate or _scale_rate(TUNED_RATE, engine),
            freeze=boundary,
            cached_views=engine.cached_views or TUNED_VIEWS,
        )
        found.append(_offer(s, "the last blocks", "lp-ft", tuned))
    else:
        reasons.append(why + (": no views are kept" if engine.cached_views else ""))
    if freeze:
        return found
    whole = dataclasses.replace(engine, epochs=engine.epochs or choose_length(s.pictures), cached_views=0)
    found.append(_offer(s, "all blocks", "lp-ft", whole))
    if is_scratch_worth_trying(evidence, s.pictures) and not engine.rates:  # which may keep parts as they are
        found.append(
            _offer(s, "all blocks from random weights", "scratch", dataclasses.replace(engine, cached_views=0))
        )
    return found


def _offer(s: Situation, name: str, strategy: Strategy, engine: EngineConfig) -> tuple[Train, int]:
    start: Literal["pretrained", "random"] = "random" if strategy == "scratch" else "pretrained"
    settings, least = settle(s, strategy, engine), SCRATCH_LEAST if strategy == "scratch" else LEAST_EPOCHS
    return Train(settings, UNMEASURED, start, keeps_start=False, name=name), min(least, settings.epochs)


def settle(s: Situation, strategy: Strategy, engine: EngineConfig) -> EngineConfig:
    """The engine's settings with everything decided that was left open."""
    return dataclasses.replace(
        engine,
        epochs=engine.epochs or EPOCHS[strategy],
        batch_size=engine.batch_size or choose_batch_size(s.pictures),
        learning_rate=engine.learning_rate or _scale_rate(RATES[strategy], engine),
        layer_decay=engine.layer_decay or (1.0 if strategy == "scratch" else LAYER_DECAY),
        loss=("bce-with-logits" if s.task == "multi" else "cross-entropy") if engine.loss == "auto" else engine.loss,
        batch_norm=("train" if strategy == "scratch" else "frozen")
        if engine.batch_norm == "auto"
        else engine.batch_norm,
        augment=_settle_augment(strategy, engine),
    )


def _scale_rate(rate: float, engine: EngineConfig) -> float:
    """A learning rate that suits AdamW, for the optimiser that is set."""
    return rate * (SGD_OVER_ADAM if engine.optimizer == "sgd" else 1.0)


def _settle_augment(strategy: Strategy, engine: EngineConfig) -> str:
    if engine.augment != "auto":
        return engine.augment
    return "none" if strategy == "probe" else AUTOMATIC_AUGMENT[engine.symmetry]


# Rates for AdamW: the largest of 3e-5, 1e-4, 3e-4 and 1e-3 with which the log-loss on select pictures still fell from
# epoch to epoch, on photographs and X-rays. A fitted head needs less than a new one: it is right already, and large
# steps of the body only take it apart (Kumar et al., 2022).
EPOCHS: dict[Strategy, int] = {"probe": 100, "finetune": 10, "lp-ft": 6, "two-stage": 8, "scratch": SCRATCH_EPOCHS}
RATES: dict[Strategy, float] = {"probe": 1e-3, "finetune": 3e-4, "lp-ft": 1e-4, "two-stage": 3e-4, "scratch": 2e-3}
SGD_OVER_ADAM = 10.0
AROUND = 0.5  # of an epoch's steps: what a training takes beside all that is counted
TUNED_RATE, TUNED_VIEWS = 3e-4, 4  # of the last blocks alone, and the views of each picture that they are shown
SLOWER = 1.1  # times its foreseen time a training may take: the last epochs of a schedule are the best
LONGER = 2  # times as many epochs, at most, the last training has where there is time left
LEAST_STEP = 0.5  # of the time in which a picture was opened and seen: less is not expected of any step
DEARER = 2.5  # a step of what is not measured yet, over that of what is: all blocks over the last ones
UNMEASURED = Layout("float32", False)
LAYER_DECAY = 0.75  # of the next block's rate; the first of nine blocks learns at a tenth of the head's


def choose_batch_size(pictures: int) -> int:
    """32 pictures, fewer where an epoch would have less than eight steps, but at least 4."""
    size = 32
    while size > 4 and pictures < 8 * size:
        size //= 2
    return size
