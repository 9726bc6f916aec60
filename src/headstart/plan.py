"""What is to be done, decided from facts about the data and the settings: pure functions, and no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from headstart.config import AUTOMATIC_AUGMENT, EngineConfig, RunConfig, TrainConfig
from headstart.data import Task
from headstart.errors import UsageError
from headstart.verdicts import (
    FINAL,
    Evidence,
    Outlook,
    choose_variant,
    describe_evidence,
    is_mirror_worth,
    read_time,
    weigh_tuning,
)

if TYPE_CHECKING:
    from headstart.images import View

HEADS = ("logistic", "svm", "means", "knn")
DEEP_HEADS = ("logistic", "means")  # on features of several depths: the others take long and were never the best
KNN_PICTURES = 20_000  # with more, a model that holds all training features is no longer small
Strategy = Literal["probe", "finetune", "lp-ft", "two-stage", "scratch"]


@dataclass(frozen=True)
class Layout:
    """The number format, and the layout in memory, that forward and backward passes are computed in."""

    precision: str  # float32, bfloat16 or float16
    channels_last: bool = True

    def __str__(self) -> str:
        return f"{self.precision}, channels {'last' if self.channels_last else 'first'}"


@dataclass(frozen=True)
class Timing:
    """How fast weights are trained here; measured once, so that an interrupted run goes on as it began."""

    layout: Layout  # the fastest
    step_seconds: float  # of a training step in it, for each picture
    seconds_left: float | None = None  # of the time budget, when it was measured

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Timing:
        """The timing in a plan's JSON values."""
        return Timing(**{**values, "layout": Layout(**values["layout"])})


@dataclass(frozen=True)
class Situation:
    """The facts that a plan is made from."""

    task: Task
    classes: int
    pictures: int  # that heads are fitted on, or weights trained; under `auto` with those of `select`
    select: int  # of the role `select`
    smallest_class: int
    folds: int  # that the smallest class and the groups allow
    device: str
    precision: str  # of features and predictions
    timing: Timing | None = None  # where weights are trained
    evidence: Evidence | None = None  # where it was gathered


@dataclass(frozen=True)
class FitHead:
    """A phase: heads fitted on cached features, the best one chosen by cross-validation."""

    heads: tuple[str, ...]
    folds: int
    taps: tuple[str, ...] = (FINAL,)  # depths that the features are of
    views: tuple[View, ...] = ("plain",)
    phase: Literal["fit_head"] = "fit_head"


@dataclass(frozen=True)
class Train:
    """A phase: weights trained by gradient. Its settings are all decided: no `auto`, no 0 for "by strategy"."""

    settings: EngineConfig
    layout: Layout
    start: Literal["pretrained", "random"] = "pretrained"
    on: Literal["pictures", "features"] = "pictures"  # features: those of the cache, for a head alone
    seconds: float | None = None  # that epochs may take together: none is begun that would take longer
    keeps_start: bool = (
        True  # where no epoch is better; else the best epoch is kept, to be held against the start later
    )
    phase: Literal["train"] = "train"


@dataclass(frozen=True)
class Choose:
    """A phase: of the fitted head, what training made of it and what lies between, the best on the select pictures."""

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
    timing: Timing | None = None

    @property
    def trains(self) -> bool:
        """Whether weights are trained by gradient."""
        return any(isinstance(phase, Train) for phase in self.phases)

    @property
    def chooses(self) -> bool:
        """Whether what was trained is held against the fitted head."""
        return isinstance(self.phases[-1], Choose)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)


def trains(config: RunConfig) -> bool:
    """Whether the settings ask for weights to be trained by gradient, which needs pictures to choose by."""
    return config.train.strategy not in ("auto", "probe") or config.engine.head != "linear"


def gathers_evidence(config: RunConfig) -> bool:
    """Whether depths and views are chosen by evidence: where the strategy is, and no head is asked for by name."""
    return config.train.strategy == "auto" and not trains(config) and not config.model.taps


def may_train(config: RunConfig) -> bool:
    """Whether weights are trained, or may be where evidence is for it: pictures to choose by are needed."""
    return trains(config) or (gathers_evidence(config) and read_time(config.train.time_budget) > 0)


def needs_features(config: RunConfig) -> bool:
    """Whether a phase works on the pretrained network's features."""
    strategy = config.train.strategy
    return strategy in ("auto", "probe", "lp-ft") or (strategy == "finetune" and _is_still(config.engine))


def _is_still(engine: EngineConfig) -> bool:
    """Whether every epoch sees the same features: nothing of the network is trained, and no picture is varied."""
    varied = engine.augment != "none" or engine.mixup or engine.cutmix
    return engine.freeze == "all" and not engine.unfreeze_epochs and not varied


def decide(situation: Situation, config: RunConfig) -> Plan:
    """The plan for a situation.

    Raises:
        UsageError: where settings contradict each other.
    """
    s, auto = situation, config.train.strategy == "auto"
    reasons: list[str] = []
    strategy: Strategy = "probe" if config.train.strategy == "auto" else config.train.strategy
    _check(s, strategy, config)
    phases: list[Phase] = []
    if strategy == "lp-ft" or not trains(config):
        phases.append(_plan_head(s, config, linear=strategy == "lp-ft", reasons=reasons))
    if trains(config):
        phases += _plan_training(s, strategy, config.engine, reasons)
    elif s.evidence is not None:
        phases = _plan_tuning(s, s.evidence, config, phases, reasons)
    trained = any(isinstance(phase, Train) for phase in phases)
    if s.select and not trained:
        reasons.append(f"nothing is left to choose on the {s.select} select pictures: heads are fitted on them too")
    found = "probe, which trains no weight of the network" if not trained else "probe, and lp-ft held against it"
    reasons.insert(0, f"strategy auto: {found}" if auto else f"strategy {strategy}: as set")
    why = "the fastest format that this processor computes in" if config.model.precision == "auto" else "as set"
    reasons.append(f"{s.precision} on {s.device}: {why}")
    timing = s.timing if trained or (s.timing is not None and s.timing.seconds_left is not None) else None
    return Plan(strategy, s.device, s.precision, tuple(phases), tuple(reasons), timing)


def _check(situation: Situation, strategy: Strategy, config: RunConfig) -> None:
    engine = config.engine
    if config.train.time_budget != TrainConfig().time_budget and not gathers_evidence(config):
        why = f"has no effect with strategy {strategy}" + (" and --taps" if config.model.taps else "")
        raise UsageError("time_budget", why, "Leave it out, or give --strategy auto alone.")
    if config.train.heads and trains(config) and strategy != "lp-ft":
        why = f"has no effect with strategy {strategy} and --head {engine.head}: no head is fitted on features"
        raise UsageError("heads", why, "Leave --head out." if strategy == "probe" else "Give --strategy probe.")
    if situation.task == "multi" and engine.loss in ("cross-entropy", "nll"):
        raise UsageError("loss", f"{engine.loss} is for one label a picture", "Give bce-with-logits or focal.")
    if strategy == "lp-ft" and engine.head != "linear":
        why = f"lp-ft fits a linear head first, and --head is {engine.head}"
        raise UsageError("strategy", why, "Give --strategy two-stage, which trains any head first.")
    if strategy == "probe":
        _check_probe(config)
    if strategy == "scratch" and engine.freeze:
        raise UsageError("freeze", "freezes random weights", "Leave it out, or give another --strategy.")
    if trains(config):
        _check_company(strategy, engine)


# Settings that have an effect beside certain others only.
_COMPANY = {
    "momentum": ("optimizer", ("sgd",)),
    "warmup_epochs": ("schedule", ("cosine",)),
    "step_epochs": ("schedule", ("step",)),
    "step_factor": ("schedule", ("step",)),
    "focal_gamma": ("loss", ("focal",)),
    "hidden": ("head", ("mlp", "batch-norm")),
    "dropout": ("head", ("mlp", "batch-norm")),
}


def _check_company(strategy: Strategy, engine: EngineConfig) -> None:
    """Nothing that is set goes unheeded."""
    default = EngineConfig()
    changed = {f.name for f in dataclasses.fields(engine) if getattr(engine, f.name) != getattr(default, f.name)}
    for name, (other, values) in _COMPANY.items():
        if name in changed and getattr(engine, other) not in values:
            why = f"has no effect with {other} {getattr(engine, other)}"
            raise UsageError(name, why, f"Leave it out, or give --{other} {' or '.join(values)}.")
    for name in ("head_epochs", "head_rate"):
        if name in changed and strategy != "two-stage":
            raise UsageError(name, f"has no effect with strategy {strategy}", "Give --strategy two-stage.")
    if engine.cached_views and (not engine.freeze or engine.unfreeze_epochs or engine.mixup or engine.cutmix):
        why = "keeps what frozen blocks give, and needs --freeze without unfreezing, mixup or cutmix"
        raise UsageError("cached_views", why, "Give --freeze, a number of blocks or a name, or leave it out.")
    if engine.unfreeze_epochs and not engine.freeze:
        raise UsageError("unfreeze_epochs", "has no effect where nothing is frozen", "Give --freeze all, or a block.")
    rates = [entry.partition("=")[2].strip() for entry in engine.rates.split(",") if entry.strip()]
    if engine.find_lr and (engine.learning_rate or any(rate.lower().strip("0.e-+") for rate in rates)):
        why = "finds the rate that all others follow, and rates are given"
        raise UsageError("find_lr", why, "Leave one of them out; rates of 0, which freeze, may stay.")


def _check_probe(config: RunConfig) -> None:
    """Nothing that is set goes unheeded: a fitted head has no use for the engine's settings, a trained one for some."""
    engine, default = config.engine, EngineConfig()
    changed = [f.name for f in dataclasses.fields(engine) if getattr(engine, f.name) != getattr(default, f.name)]
    if gathers_evidence(config):
        changed = [name for name in changed if name != "symmetry"]
        if read_time(config.train.time_budget):
            _check_tuning(engine, changed)
            return
    of_pictures = ("augment", "symmetry", "mixup", "cutmix", "freeze", "rates", "unfreeze_epochs", "batch_norm")
    of_stages = ("head_epochs", "head_rate", "layer_decay")
    idle = changed if engine.head == "linear" else [name for name in changed if name in of_pictures + of_stages]
    if idle and not (idle == ["augment"] and engine.augment == "none"):
        why = "has no effect with strategy probe, which leaves the network as it is"
        raise UsageError(", ".join(idle), why, "Give --strategy finetune, lp-ft, two-stage or scratch.")


def _check_tuning(engine: EngineConfig, changed: list[str]) -> None:
    """The last blocks are trained as the settings say, on kept activations."""
    _check_company("lp-ft", engine)
    for name in ("unfreeze_epochs", "mixup", "cutmix", "find_lr"):
        if name in changed:
            why = "does not go with --time-budget, under which activations of frozen blocks are kept"
            raise UsageError(name, why, "Leave one of them out, or give --strategy lp-ft.")


def _plan_head(s: Situation, config: RunConfig, linear: bool, reasons: list[str]) -> FitHead:
    heads: tuple[str, ...] = HEADS
    if config.train.heads:
        heads = _read_heads(config.train.heads, s.task, linear)
        reasons.append(f"heads {', '.join(heads)}: as set")
    elif s.task == "multi":
        heads = ("logistic",)
        reasons.append("several labels a picture: one logistic regression for each label")
    elif linear:
        heads = ("logistic", "svm", "means")
    elif s.pictures > KNN_PICTURES:
        heads = ("logistic", "svm", "means")
        reasons.append(
            f"{s.pictures} pictures for training, over {KNN_PICTURES}: no kNN, its model would hold them all"
        )
    if s.folds < config.train.folds:
        cause = f"the smallest class has {s.smallest_class}" if s.smallest_class <= s.folds else "groups allow no more"
        reasons.append(f"{s.folds} folds instead of {config.train.folds}: {cause}")
    if s.evidence is None:
        return FitHead(heads, s.folds)
    variant = choose_variant(s.evidence.variants)
    mirrored = s.evidence.mirror is not None and is_mirror_worth(s.evidence.mirror)
    reasons += describe_evidence(s.evidence)
    if variant.taps != (FINAL,):
        heads = tuple(head for head in heads if head in DEEP_HEADS) or heads
    return FitHead(heads, s.folds, variant.taps, ("plain", "mirror") if mirrored else ("plain",))


def _read_heads(text: str, task: Task, linear: bool) -> tuple[str, ...]:
    heads = tuple(dict.fromkeys(filter(None, (head.strip() for head in text.split(",")))))
    allowed = HEADS[:1] if task == "multi" else HEADS[:3] if linear else HEADS
    for head in heads or ("",):
        if head not in allowed:
            why = f"{head!r} is no kind of head" if head not in HEADS else f"{head!r} does not go with this plan"
            raise UsageError("heads", why, f"Choose from {', '.join(allowed)}.")
    return heads


def _plan_training(s: Situation, strategy: Strategy, engine: EngineConfig, reasons: list[str]) -> list[Phase]:
    layout = s.timing.layout if s.timing is not None else UNMEASURED
    settings = settle(s, strategy, engine)
    reasons.append(f"the best of {settings.epochs} epochs by {settings.best_by} on {s.select} select pictures")
    reasons.append(f"{settings.optimizer}, learning rate {settings.learning_rate:g}, {settings.batch_size} a batch")
    start: Literal["pretrained", "random"] = "random" if strategy == "scratch" else "pretrained"
    if strategy == "probe" or (strategy in ("finetune", "lp-ft") and _is_still(settings)):
        reasons.append("only the head is trained, and pictures are not varied: on features, computed once")
        return [Train(settings, layout, start, "features")]
    reasons.append(f"training in {layout}")
    last = Train(settings, layout, start)
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


def _plan_tuning(
    s: Situation, evidence: Evidence, config: RunConfig, phases: list[Phase], reasons: list[str]
) -> list[Phase]:
    """What follows the fitted head under `auto`: the last blocks trained on kept activations, where that may pay."""
    budget = read_time(config.train.time_budget)
    if not budget:
        reasons.append("not trained further: that is tried where a --time-budget is given, such as 5m")
        return phases
    timing = s.timing or Timing(UNMEASURED, 0.0, budget)
    (head,) = phases
    assert isinstance(head, FitHead)
    left = math.inf if timing.seconds_left is None else timing.seconds_left
    outlook = Outlook(s.pictures - s.select, s.select, timing.step_seconds, left)
    epochs, why = weigh_tuning(evidence, outlook)
    if head.heads == ("knn",):
        epochs, why = 0, "not trained further: kNN has no weights"
    reasons.append(why)
    if not epochs:
        return phases
    engine = config.engine
    every = max((variant.taps for variant in evidence.variants), key=len)
    engine = dataclasses.replace(
        engine,
        epochs=min(epochs, engine.epochs or epochs),
        learning_rate=engine.learning_rate or TUNED_RATE,
        freeze=engine.freeze or every[0],
        cached_views=engine.cached_views or TUNED_VIEWS,
    )
    settings = settle(dataclasses.replace(s, pictures=outlook.pictures), "lp-ft", engine)
    seconds = None if timing.seconds_left is None else max(0.0, timing.seconds_left - outlook.take(0))
    views: tuple[tuple[View, ...], ...] = (("plain",),)
    if engine.symmetry != "none":
        views += (("plain", "mirror"),)
    return [head, Train(settings, timing.layout, seconds=seconds, keeps_start=False), Choose(SHARES, views)]


def settle(s: Situation, strategy: Strategy, engine: EngineConfig) -> EngineConfig:
    """The engine's settings with everything decided that was left open."""
    return dataclasses.replace(
        engine,
        epochs=engine.epochs or EPOCHS[strategy],
        batch_size=engine.batch_size or choose_batch_size(s.pictures),
        learning_rate=engine.learning_rate or RATES[strategy] * (SGD_OVER_ADAM if engine.optimizer == "sgd" else 1.0),
        layer_decay=engine.layer_decay or (1.0 if strategy == "scratch" else LAYER_DECAY),
        loss=("bce-with-logits" if s.task == "multi" else "cross-entropy") if engine.loss == "auto" else engine.loss,
        batch_norm=("train" if strategy == "scratch" else "frozen")
        if engine.batch_norm == "auto"
        else engine.batch_norm,
        augment=_settle_augment(strategy, engine),
    )


def _settle_augment(strategy: Strategy, engine: EngineConfig) -> str:
    if engine.augment != "auto":
        return engine.augment
    return "none" if strategy == "probe" else AUTOMATIC_AUGMENT[engine.symmetry]


# Rates for AdamW: the largest of 3e-5, 1e-4, 3e-4 and 1e-3 with which the log-loss on select pictures still fell from
# epoch to epoch, on photographs and X-rays. A fitted head needs less than a new one: it is right already, and large
# steps of the body only take it apart (Kumar et al., 2022).
EPOCHS: dict[Strategy, int] = {"probe": 100, "finetune": 10, "lp-ft": 6, "two-stage": 8, "scratch": 60}
RATES: dict[Strategy, float] = {"probe": 1e-3, "finetune": 3e-4, "lp-ft": 1e-4, "two-stage": 3e-4, "scratch": 2e-3}
SGD_OVER_ADAM = 10.0
TUNED_RATE, TUNED_VIEWS = 3e-4, 4  # of the last blocks alone, and the views of each picture that they are shown
SHARES = (0.25, 0.5, 0.75, 1.0)
UNMEASURED = Layout("float32", False)
LAYER_DECAY = 0.75  # of the next block's rate; the first of nine blocks learns at a tenth of the head's


def choose_batch_size(pictures: int) -> int:
    """32 pictures, fewer where an epoch would have less than eight steps, but at least 4."""
    size = 32
    while size > 4 and pictures < 8 * size:
        size //= 2
    return size
