"""What settings ask for, and which of them contradict each other: pure functions of a config, and no torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from headstart.config import EngineConfig, RunConfig, TrainConfig
from headstart.data import Task
from headstart.errors import UsageError
from headstart.verdicts import FINAL, choose_views, read_time

if TYPE_CHECKING:
    from headstart.images import View

Strategy = Literal["probe", "finetune", "lp-ft", "two-stage", "scratch"]


def trains(config: RunConfig) -> bool:
    """Whether the settings ask for weights to be trained by gradient, which needs pictures to choose by."""
    return config.train.strategy not in ("auto", "probe") or config.engine.head != "linear"


def gathers_evidence(config: RunConfig) -> bool:
    """Whether depths and views are chosen by evidence: where the strategy is, and no head is asked for by name."""
    return config.train.strategy == "auto" and not trains(config)


def read_views(config: RunConfig) -> tuple[View, ...]:
    """The views that answers are averaged over, where no evidence is gathered."""
    return choose_views((), config.model.views)


def read_taps(config: RunConfig) -> tuple[str, ...]:
    """The depths that features are taken at, as set; none: the network's own features."""
    taps = tuple(dict.fromkeys(filter(None, (tap.strip() for tap in config.model.taps.split(",")))))
    return () if taps == (FINAL,) else taps


def may_train(config: RunConfig) -> bool:
    """Whether weights are trained, or may be where evidence is for it: pictures to choose by are needed."""
    return trains(config) or may_train_further(config)


def may_train_further(config: RunConfig) -> bool:
    """Whether there is a time budget in which what evidence chose may be trained further."""
    return read_budget(config) is not None


def read_budget(config: RunConfig) -> float | None:
    """Seconds that a run may take where weights may be trained in them; None where there is no budget."""
    budget = read_time(config.train.time_budget) if gathers_evidence(config) else 0.0
    return budget or None


def needs_features(config: RunConfig) -> bool:
    """Whether a phase works on the pretrained network's features."""
    strategy = config.train.strategy
    return strategy in ("auto", "probe", "lp-ft") or (strategy == "finetune" and is_still(config.engine))


def is_still(engine: EngineConfig) -> bool:
    """Whether every epoch sees the same features: nothing of the network is trained, and no picture is varied."""
    varied = engine.augment != "none" or engine.mixup or engine.cutmix
    return engine.freeze == "all" and not engine.unfreeze_epochs and not varied


def read_shares(text: str) -> tuple[float, ...]:
    """Shares of the way from a fitted head's network to a trained one, of percents such as `25,50,100`.

    Raises:
        UsageError: for anything else.
    """
    try:
        percents = [int(part) for part in text.split(",")]
    except ValueError:
        percents = []
    if not percents or not all(0 < percent <= 100 for percent in percents):
        why = f"{text!r} is no list of whole numbers from 1 to 100"
        raise UsageError("interpolation", why, "Give some such as 50,100.")
    return tuple(percent / 100 for percent in sorted(set(percents)))


def name_strategy(config: RunConfig) -> Strategy:
    """The strategy that is set; `auto` starts from a probe."""
    return "probe" if config.train.strategy == "auto" else config.train.strategy


def check(task: Task, config: RunConfig) -> None:
    """Nothing that is set contradicts anything else, or goes unheeded.

    Args:
        task: of the data.
        config: the settings.

    Raises:
        UsageError: with what to leave out or to give.
    """
    engine, strategy = config.engine, name_strategy(config)
    read_shares(config.train.interpolation)
    if config.train.time_budget != TrainConfig().time_budget and not gathers_evidence(config):
        why = f"has no effect with strategy {strategy}"
        raise UsageError("time_budget", why, "Leave it out, or give --strategy auto alone.")
    if config.train.interpolation != TrainConfig().interpolation and not may_train_further(config):
        raise UsageError("interpolation", "has no effect without --time-budget", "Leave it out, or give one.")
    if config.model.views in ("mirror", "all") and engine.symmetry == "none":
        why = f"{config.model.views} shows mirror images, and symmetry none says that they mean something else"
        raise UsageError("views", why, "Give plain or zoom, or leave --symmetry out.")
    if config.train.heads and trains(config) and strategy != "lp-ft":
        why = f"has no effect with strategy {strategy} and --head {engine.head}: no head is fitted on features"
        raise UsageError("heads", why, "Leave --head out." if strategy == "probe" else "Give --strategy probe.")
    if task == "multi" and engine.loss in ("cross-entropy", "nll"):
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
    """Weights are trained as the settings say, the last blocks on kept activations."""
    _check_company("lp-ft", dataclasses.replace(engine, cached_views=0))
    for name in ("unfreeze_epochs", "mixup", "cutmix", "find_lr"):
        if name in changed:
            why = "does not go with --time-budget, under which activations of frozen blocks are kept"
            raise UsageError(name, why, "Leave one of them out, or give --strategy lp-ft.")
