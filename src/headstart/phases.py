"""A plan carried out: a head fitted, weights trained, and the two held against each other on pictures kept for that.

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
from torch import nn

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

    def fit_head(samples: Sequence[Sample], phase: FitHead) -> FittedHead:
        return fitting.fit_heads(bench.rows(samples), samples, dataset, groups, phase, bench.seed)

    if not isinstance(first, FitHead):
        trained = fitting.train_phases(folder, chosen, bench, None, track)
        return fitting.finish(bench, trained.adapted, trained.describe(bench, None)), trained.plan
    head = start = fit_head(fit if chosen.trains else both, first)
    if not chosen.trains:
        return fitting.settle_head(bench, head, both), chosen
    if head.kind == "knn":  # has no weights to go on from
        start = fit_head(fit, dataclasses.replace(first, heads=tuple(kind for kind in first.heads if kind != "knn")))
    trained = fitting.train_phases(folder, chosen, bench, start, track)
    if not chosen.chooses:
        return fitting.finish(bench, trained.adapted, trained.describe(bench, head)), trained.plan
    arm, model, ended = decide(bench, trained, head, start, groups)
    folder.write_json("plan.json", ended.to_json())
    if arm.share:
        return fitting.finish(bench, model, trained.describe(bench, start), arm.views), ended
    return fitting.settle_head(bench, fit_head(both, first), both), ended


ERRORS, WORTH = 2.0, 0.01  # standard errors, and share of the log-loss, that a dearer arm must gain


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
    between, first, last = copy.deepcopy(end), start.state_dict(), end.state_dict()
    with torch.no_grad():
        for name, tensor in between.state_dict().items():
            if first[name].shape != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(first[name].shape)} here and {tuple(tensor.shape)} there")
            if tensor.is_floating_point() and share != 1.0:
                tensor.copy_(torch.lerp(first[name].to(tensor), last[name], share))
    return between


def weigh(bench: Bench, head: FittedHead, start: Adapted, trained: Adapted, phase: Choose) -> tuple[Arm, ...]:
    """The fitted head and all that it is held against, on the select pictures.

    Args:
        bench: what phases work on.
        head: the fitted head.
        start: what training began from: this head, or another where it has no weights.
        trained: what training made of that.
        phase: what is held against it.
    """
    samples = bench.dataset.of_role("select")
    rows, plain = bench.rows(samples), bench.backbone.spec
    arms = [_measure(bench, head.module, rows.reshape(len(rows), -1), samples, 0.0, plain.views)]
    every = max(phase.views, key=len)
    for share in phase.shares:
        model = interpolate(start, trained, share)
        seen = Backbone.of(plain.adapted(views=every), model.backbone)
        matrix = embed(seen, bench.album(samples), bench.device, bench.precision, bench.world)
        width, last = matrix.shape[1] // len(every), copy.deepcopy(model.head).cpu()
        arms += [
            _measure(bench, last, matrix[:, : width * len(views)], samples, share, views)
            for views in phase.views  # each is the first of all of them
        ]
    return tuple(arms)


def _measure(
    bench: Bench,
    head: nn.Module,
    matrix: NDArray[np.float32],
    samples: Sequence[Sample],
    share: float,
    views: tuple[View, ...],
) -> Arm:
    logits = answer(head, matrix, len(views))
    targets, multi = evaluation.encode(samples, bench.dataset.classes), bench.dataset.task == "multi"
    found = targets if multi else targets.argmax(1)
    temperature, _ = metrics.find_temperature(logits, found, multi)
    return Arm(share, views, metrics.losses_of(logits / temperature, found, multi))


def choose(arms: Sequence[Arm], groups: Sequence[str]) -> tuple[Arm, str]:
    """(the arm to take, why): the first, unless another's log-loss is surely lower, and worth it.

    Arms with as many views are equally dear, and the best of them stands for them; the dearer has to be surely better
    than what was held until then. Surely: by more than `ERRORS` standard errors of the mean difference over groups,
    and by more than a share of `WORTH` of the loss.

    Args:
        arms: the cheapest first.
        groups: of each picture; what is alike counts once.
    """
    held, lines = arms[0], []
    for count in sorted({len(arm.views) for arm in arms[1:]}):
        dearer = [arm for arm in arms[1:] if len(arm.views) == count]
        best = min(dearer, key=lambda arm: float(arm.losses.mean()))
        gain, error = _gain(held.losses - best.losses, groups)
        sure = gain > max(ERRORS * error, WORTH * float(held.losses.mean()))
        verdict = "surely lower" if sure else "not surely lower"
        lines.append(f"{best} against {held}: lower by {gain:.3f}, standard error {error:.3f}: {verdict}")
        held = best if sure else held
    return held, "; ".join((*lines, f"{str(held).partition(':')[0]} is taken, by {len(groups)} select pictures"))


def _gain(gains: NDArray[np.float64], groups: Sequence[str]) -> tuple[float, float]:
    """(the mean gain, its standard error, where pictures of a group stand for one another)."""
    _, numbers = np.unique(np.array(groups, object).astype(str), return_inverse=True)
    sums, mean = np.bincount(numbers, gains - gains.mean()), float(gains.mean())
    count = len(sums)
    error = math.sqrt(float((sums**2).sum()) * count / max(1, count - 1)) / len(gains) if count > 1 else math.inf
    return mean, error


def decide(
    bench: Bench, trained: Trained, head: FittedHead, start: FittedHead, groups: Mapping[str, str]
) -> tuple[Arm, Adapted, Plan]:
    """(the arm to take, its model, the plan with the reasons); the first process decides for all.

    Args:
        bench: what phases work on.
        trained: what training made of a fitted head.
        head: the fitted head.
        start: the one that training began from.
        groups: source -> group, of what must stay together.
    """
    *_, phase, last = trained.plan.phases
    assert isinstance(phase, Train) and isinstance(last, Choose)
    begun = bench.begin(phase, start)
    arms = weigh(bench, head, begun, trained.adapted, last)
    sources = [sample.source for sample in bench.dataset.of_role("select")]
    taken, why = choose(arms, [groups.get(source, source) for source in sources])
    (number,) = bench.world.tell([arms.index(taken)])
    arm = arms[number]
    reasons = [*trained.plan.reasons, *map(str, arms)]
    epochs = trained.facts[-1]["epochs"]
    if epochs < phase.settings.epochs:
        reasons.append(f"stopped after {epochs} of {phase.settings.epochs} epochs: another would have taken too long")
    strategy: Strategy = "lp-ft" if arm.share else "probe"
    ended = dataclasses.replace(trained.plan, strategy=strategy, reasons=(*reasons, why))
    return arm, interpolate(begun, trained.adapted, arm.share), ended
