"""A plan carried out: a head fitted, weights trained, and the two held against each other on pictures new to both.

Between the fitted head and what training made of it lie all models whose weights are some way from the one's to the
other's; they often are better than both (WiSE-FT, Wortsman et al., 2022).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headstart import evaluation, fitting, metrics
from headstart.backbones import Backbone
from headstart.bench import Bench, answer, embed
from headstart.data import Sample
from headstart.engine import Adapted
from headstart.fitting import Trained
from headstart.heads import FittedHead
from headstart.images import View
from headstart.model import Classifier
from headstart.plan import Choose, FitHead, Plan, Strategy, Train
from headstart.runs import RunFolder


def carry_out(
    folder: RunFolder, chosen: Plan, bench: Bench, groups: Mapping[str, str], track: Any
) -> tuple[Classifier, Plan]:
    """(the classifier that a plan's phases give, one after the other; the plan as it was carried out).

    Args:
        folder: of the run.
        chosen: the plan.
        bench: what phases work on.
        groups: source -> group, of what must stay together.
        track: wraps the steps and epochs of training to show progress; called with them and their number.
    """
    first, dataset = chosen.phases[0], bench.dataset
    fit, both = dataset.of_role("fit"), dataset.of_role("fit", "select")

    def fit_head(samples: Sequence[Sample]) -> FittedHead | None:
        if not isinstance(first, FitHead):
            return None
        return fitting.fit_heads(bench.rows(samples), samples, dataset, groups, first, bench.seed)

    head = fit_head(fit if chosen.trains else both)
    if head is not None and not chosen.trains:
        return fitting.settle_head(bench, head, both), chosen
    trained = fitting.train_phases(folder, chosen, bench, head, track)
    if head is None or not chosen.chooses:
        return fitting.finish(bench, trained.adapted, trained.describe(bench, head)), trained.plan
    arm, model, ended = decide(bench, trained, head)
    folder.write_json("plan.json", ended.to_json())
    if arm.share:
        return fitting.finish(bench, model, trained.describe(bench, head), arm.views), ended
    refitted = fit_head(both)
    assert refitted is not None  # as the first was
    return fitting.settle_head(bench, refitted, both), ended


@dataclass(frozen=True, eq=False)
class Arm:
    """A model as some pictures found it.

    Args:
        share: of the way from the fitted head's weights to the trained ones; 0: the fitted head.
        views: of pictures, that its answers are averaged over.
        losses: log-loss of each picture, calibrated, (n,).
    """

    share: float
    views: tuple[View, ...]
    losses: NDArray[np.float64]

    def __str__(self) -> str:
        name = "the fitted head" if not self.share else f"trained further, {self.share:.0%} of the way"
        return f"{name}{', and mirror images' if len(self.views) > 1 else ''}: log-loss {self.losses.mean():.3f}"


def interpolate(start: Adapted, end: Adapted, share: float) -> Adapted:
    """A model whose weights lie some way from one's to the other's; what is no number of a line is the end's.

    Args:
        start: a model.
        end: one of the same architecture.
        share: of the way; 1 is the end.
    """
    between = copy.deepcopy(end)
    with torch.no_grad():
        for (name, tensor), first in zip(between.state_dict().items(), start.state_dict().values(), strict=True):
            if first.shape != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(first.shape)} here and {tuple(tensor.shape)} there")
            if tensor.is_floating_point() and share != 1.0:
                tensor.copy_(torch.lerp(first.to(tensor), tensor, share))
    return between


def weigh(bench: Bench, start: Adapted, trained: Adapted, phase: Choose) -> tuple[Arm, ...]:
    """The fitted head and all that it is held against, on the select pictures.

    Args:
        bench: what phases work on.
        start: the fitted head on the backbone, as training began.
        trained: what training made of it.
        phase: what is held against it.
    """
    samples = bench.dataset.of_role("select")
    rows = bench.rows(samples)
    arms = [_measure(bench, start, rows.reshape(len(rows), -1), samples, 0.0, bench.backbone.spec.views)]
    every = max(phase.views, key=len)
    for share in phase.shares:
        model = interpolate(start, trained, share)
        seen = Backbone.of(bench.backbone.spec.adapted(views=every), model.backbone)
        matrix = embed(seen, bench.album(samples), bench.device, bench.precision, bench.world)
        width = matrix.shape[1] // len(every)
        arms += [
            _measure(bench, model, matrix[:, : width * len(views)], samples, share, views)
            for views in phase.views  # each is the first of all of them
        ]
    return tuple(arms)


def _measure(
    bench: Bench,
    model: Adapted,
    matrix: NDArray[np.float32],
    samples: Sequence[Sample],
    share: float,
    views: tuple[View, ...],
) -> Arm:
    logits = answer(copy.deepcopy(model.head).cpu(), matrix, len(views))
    targets, multi = evaluation.encode(samples, bench.dataset.classes), bench.dataset.task == "multi"
    found = targets if multi else targets.argmax(1)
    temperature, _ = metrics.find_temperature(logits, found, multi)
    return Arm(share, views, metrics.losses_of(logits / temperature, found, multi))


def choose(arms: Sequence[Arm]) -> tuple[Arm, str]:
    """(the arm to take, why): the first, which is the cheapest, unless another's log-loss is surely lower.

    Surely: by more than the standard error of the mean difference, picture by picture.
    """
    first, best = arms[0], min(arms, key=lambda arm: float(arm.losses.mean()))
    if best is first:
        return first, f"{first} on {len(first.losses)} select pictures, and no higher than all others: taken"
    gains = first.losses - best.losses
    error = float(gains.std(ddof=1)) / math.sqrt(len(gains))
    found = f"{best} on {len(gains)} select pictures; {first}; lower by {gains.mean():.3f}, standard error {error:.3f}"
    return (best, f"{found}: taken") if gains.mean() > error else (first, f"{found}: too little, the cheaper is taken")


def decide(bench: Bench, trained: Trained, head: FittedHead) -> tuple[Arm, Adapted, Plan]:
    """(the arm to take, its model, the plan with the reasons).

    Args:
        bench: what phases work on.
        trained: what training made of the fitted head.
        head: the fitted head.
    """
    *_, phase, last = trained.plan.phases
    assert isinstance(phase, Train) and isinstance(last, Choose)
    start = bench.begin(phase, head)
    arms = weigh(bench, start, trained.adapted, last)
    arm, why = choose(arms)
    reasons = (*trained.plan.reasons, *(str(other) for other in arms if other is not arm), why)
    strategy: Strategy = "lp-ft" if arm.share else "probe"
    ended = dataclasses.replace(trained.plan, strategy=strategy, reasons=reasons)
    return arm, interpolate(start, trained.adapted, arm.share), ended
