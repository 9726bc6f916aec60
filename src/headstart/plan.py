"""What is to be done, decided from facts about the data and the settings: pure functions, and no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from headstart.config import RunConfig
from headstart.data import Task

KNN_PICTURES = 20_000  # with more, a model that holds all training features is no longer small


@dataclass(frozen=True)
class Situation:
    """The facts that a plan is made from."""

    task: Task
    classes: int
    pictures: int  # that heads are fitted on: of the roles `fit` and `select`
    select: int  # of them, of the role `select`
    smallest_class: int
    folds: int  # that the smallest class and the groups allow
    device: str
    precision: str


@dataclass(frozen=True)
class FitHead:
    """A phase: heads fitted on cached features, the best one chosen by cross-validation."""

    heads: tuple[str, ...]
    folds: int
    phase: Literal["fit_head"] = "fit_head"


@dataclass(frozen=True)
class Plan:
    """The phases of a run, with reasons in words and numbers. Nothing in it is left to be decided."""

    strategy: Literal["probe"]
    device: str
    precision: str
    phases: tuple[FitHead, ...]
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)


def decide(situation: Situation, config: RunConfig) -> Plan:
    """The plan for a situation."""
    s, reasons = situation, []
    if config.train.strategy == "auto":
        reasons.append("strategy auto: probe, which trains no weight of the network")
    else:
        reasons.append(f"strategy {config.train.strategy}: as set")
    heads: tuple[str, ...] = ("logistic", "svm", "means", "knn")
    if s.task == "multi":
        heads = ("logistic",)
        reasons.append("several labels a picture: one logistic regression for each label")
    elif s.pictures > KNN_PICTURES:
        heads = ("logistic", "svm", "means")
        reasons.append(
            f"{s.pictures} pictures for training, over {KNN_PICTURES}: no kNN, its model would hold them all"
        )
    if s.select:
        reasons.append(f"nothing is left to choose on the {s.select} select pictures: heads are fitted on them too")
    if s.folds < config.train.folds:
        cause = f"the smallest class has {s.smallest_class}" if s.smallest_class <= s.folds else "groups allow no more"
        reasons.append(f"{s.folds} folds instead of {config.train.folds}: {cause}")
    why = "the fastest format that this processor computes in" if config.model.precision == "auto" else "as set"
    reasons.append(f"{s.precision} on {s.device}: {why}")
    return Plan("probe", s.device, s.precision, (FitHead(heads, s.folds),), tuple(reasons))
