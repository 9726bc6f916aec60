"""A plan settled and carried out: a head fitted, weights trained, the two held against each other on pictures kept.

Between the fitted head and what training made of it lie all models whose weights are some way from the one's to the
other's; they often are better than both (WiSE-FT, Wortsman et al., 2022).
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from headstart import evaluation, fitting, metrics, plan, splits
from headstart.backbones import Backbone
from headstart.bench import Bench, embed
from headstart.config import RunConfig
from headstart.data import Sample
from headstart.engine import Adapted
from headstart.errors import DivergedError
from headstart.fitting import Trained
from headstart.heads import FittedHead, answer
from headstart.images import View
from headstart.model import Classifier
from headstart.plan import Choose, FitHead, Phase, Plan, Situation, Train
from headstart.runs import Clock, RunFolder
from headstart.strategies import Strategy
from headstart.timing import Timing
from headstart.verdicts import can_win, show_views

log = logging.getLogger(__name__)


def settle(
    folder: RunFolder,
    bench: Bench,
    situation: Situation,
    config: RunConfig,
    groups: Mapping[str, str],
    clock: Clock,
    look_seconds: float = 0.0,
) -> tuple[Plan, FittedHead | None]:
    """(the plan, written; the head that it begins with, where that was fitted to know how long it takes).

    What takes time is measured once: an interrupted run's timing is kept, as another one would end with other bits.

    Args:
        folder: of the run.
        bench: what phases work on.
        situation: the facts.
        config: the settings.
        groups: source -> group, of what must stay together.
        clock: of the run.
        look_seconds: in which evidence opened a picture and saw it; 0: not known.
    """

    def agree(timing: Timing) -> Timing:
        return Timing.from_json(bench.world.tell(dataclasses.asdict(timing)))

    def make(timing: Timing) -> Plan:
        return plan.decide(dataclasses.replace(situation, timing=timing), config)

    before, head = bench.world.tell((folder.read_json("plan.json") or {}).get("timing")), None
    timing = agree(Timing.from_json(before) if before else Timing((), clock.left(), look_seconds=look_seconds))
    chosen = make(timing)
    fitting.check_settings(bench, chosen)
    if chosen.chooses and not before:
        start, first = time.perf_counter(), chosen.phases[0]
        assert isinstance(first, FitHead)
        splits.demand_folds(bench.dataset, first.folds)
        head = fit_head(bench, bench.dataset.of_role("fit"), groups, first)
        taken = time.perf_counter() - start
        timing = agree(dataclasses.replace(timing, seconds_left=clock.left(), head_seconds=taken))
        chosen = make(timing)
    while (phase := chosen.unmeasured) is not None:
        pace = fitting.measure_pace(bench, phase, config, folder.path)
        timing = agree(dataclasses.replace(timing, paces=(*timing.paces, pace), seconds_left=clock.left()))
        chosen = make(timing)
    for part in chosen.phases:
        if isinstance(part, FitHead):
            splits.demand_folds(bench.dataset, part.folds)
    folder.write_json("plan.json", chosen.to_json())
    return chosen, head if chosen.chooses else None  # where nothing is trained, it is fitted on `select` too


def fit_head(bench: Bench, samples: Sequence[Sample], groups: Mapping[str, str], phase: FitHead) -> FittedHead:
    """The head of a phase on some pictures."""
    return fitting.fit_heads(bench.rows(samples), samples, bench.dataset, groups, phase, bench.seed)


def carry_out(
    folder: RunFolder,
    chosen: Plan,
    bench: Bench,
    groups: Mapping[str, str],
    track: Any,
    head: FittedHead | None = None,
) -> tuple[Classifier, Plan]:
    """(the classifier that a plan's phases give, one after the other; the plan as it was carried out).

    Args:
        folder: of the run.
        chosen: the plan.
        bench: what phases work on.
        groups: source -> group, of what must stay together.
        track: wraps the steps and epochs of training to show progress; called with them and their number.
        head: on the `fit` pictures, where it was fitted already.
    """
    first, dataset = chosen.phases[0], bench.dataset
    fit, both = dataset.of_role("fit"), dataset.of_role("fit", "select")
    if not isinstance(first, FitHead):
        trained = fitting.train_phases(folder, chosen, bench, None, track)
        return fitting.finish(bench, trained.adapted, trained.describe(bench, None), last_of(chosen)), trained.plan
    head = start = head or fit_head(bench, fit if chosen.trains else both, groups, first)
    if not chosen.trains:
        return fitting.settle_head(bench, head, both), chosen
    if head.kind == "knn":  # has no weights to go on from
        linear = tuple(kind for kind in first.heads if kind != "knn")
        start = fit_head(bench, fit, groups, dataclasses.replace(first, heads=linear))
    if not chosen.chooses:
        trained = fitting.train_phases(folder, chosen, bench, start, track)
        return fitting.finish(bench, trained.adapted, trained.describe(bench, head), last_of(chosen)), trained.plan
    arms, trainings, chosen = compete(folder, chosen, bench, head, start, track)
    arm, ended = decide(bench, chosen, arms, trainings, groups)
    folder.write_json("plan.json", ended.to_json())
    if not arm.share:
        return fitting.settle_head(bench, fit_head(bench, both, groups, first), both), ended
    phase, trained = find_training(chosen, arm.number), trainings[arm.number]
    model = interpolate(bench.begin(phase, start), trained.adapted, arm.share) if arm.share < 1 else trained.adapted
    return fitting.finish(bench, model, trained.describe(bench, start), phase, arm.views), ended


def find_training(chosen: Plan, number: int) -> Train:
    """The training phase with a number."""
    phase = chosen.phases[number]
    assert isinstance(phase, Train)
    return phase


def last_of(chosen: Plan) -> Train:
    """A plan's last training phase."""
    return find_training(chosen, fitting.list_trainings(chosen)[-1])


ERRORS, WORTH = 2.0, 0.01  # standard errors, and share of the log-loss, that a dearer arm must gain


@dataclass(frozen=True, eq=False)
class Arm:
    """A model as some pictures found it.

    Args:
        number: of the phase that trained it.
        name: of what was trained.
        share: of the way from the fitted head's weights to the trained ones; 0: the fitted head.
        views: of pictures, that its answers are averaged over.
        losses: log-loss of each picture, calibrated, (n,).
    """

    number: int
    name: str
    share: float
    views: tuple[View, ...]
    losses: NDArray[np.float64]

    def __str__(self) -> str:
        name = f"{self.name} trained, {self.share:.0%} of the way" if self.share else self.name
        return f"{name}{show_views(self.views)}: log-loss {self.losses.mean():.3f}"


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


def compete(
    folder: RunFolder, chosen: Plan, bench: Bench, head: FittedHead, start: FittedHead, track: Any
) -> tuple[list[Arm], dict[int, Trained], Plan]:
    """(the fitted head and all that it is held against, on the select pictures; trainings by number; the plan).

    Args:
        folder: of the run.
        chosen: the plan.
        bench: what phases work on.
        head: the fitted head.
        start: what training begins from: this head, or another where it has no weights.
        track: wraps the steps and epochs of training to show progress; called with them and their number.
    """
    samples, views = bench.dataset.of_role("select"), bench.backbone.spec.views
    rows, trainings = bench.rows(samples).reshape(len(samples), -1), {}
    arms = [Arm(0, "the fitted head", 0.0, views, _losses(bench, head.module, rows, samples, views))]
    plain = _losses(bench, head.module, rows[:, : rows.shape[1] // len(views)], samples, ("plain",))
    (target,) = bench.world.tell([float(plain.mean())])
    chosen = dataclasses.replace(chosen, phases=tuple(_aim(phase, target) for phase in chosen.phases))
    spare = 0.0
    for number in fitting.list_trainings(chosen):
        chosen = _lend(chosen, number, spare)
        try:
            trainings[number] = fitting.train_arm(folder, chosen, number, bench, start, track)
        except DivergedError as error:  # what is left is still good
            why = f"{find_training(chosen, number).name}: given up, {error.subject}: {error.why}"
            log.warning(why)
            chosen = chosen.told(why)
            spare = 0.0
            continue
        arms += weigh(bench, chosen, number, start, trainings[number].adapted)
        (facts,) = trainings[number].facts
        spare = max(0.0, (find_training(chosen, number).seconds or 0.0) - facts["seconds"])
    return arms, trainings, chosen


def _lend(chosen: Plan, number: int, seconds: float) -> Plan:
    """A plan in which a training may take what the one before it did not."""
    phases = list(chosen.phases)
    phase = find_training(chosen, number)
    phases[number] = phase if phase.seconds is None else dataclasses.replace(phase, seconds=phase.seconds + seconds)
    return dataclasses.replace(chosen, phases=tuple(phases))


def _aim(phase: Phase, target: float) -> Phase:
    """A phase with the log-loss to come near, where that is not the one that it starts with."""
    if isinstance(phase, Train) and phase.start == "random":
        return dataclasses.replace(phase, target=target)
    return phase


def weigh(bench: Bench, chosen: Plan, number: int, start: FittedHead, trained: Adapted) -> list[Arm]:
    """What a training made and what lies between its start and that, on the select pictures.

    Args:
        bench: what phases work on.
        chosen: the plan.
        number: of the training phase.
        start: the head that training began from.
        trained: what training made of it.
    """
    phase, last, samples = find_training(chosen, number), chosen.phases[-1], bench.dataset.of_role("select")
    assert isinstance(last, Choose)
    every, arms = tuple(dict.fromkeys(view for views in last.views for view in views)), []
    between = phase.start == "pretrained"  # nothing lies between random weights and others
    begun = bench.begin(phase, start) if between else trained
    for share in last.shares if between else (1.0,):
        model = interpolate(begun, trained, share)
        seen = Backbone.of(bench.backbone.spec.adapted(views=every), model.backbone)
        matrix = embed(seen, bench.album(samples), bench.device, bench.precision, bench.world)
        rows, module = matrix.reshape(len(samples), len(every), -1), copy.deepcopy(model.head).cpu()
        for views in last.views:
            shown = rows[:, [every.index(view) for view in views]].reshape(len(samples), -1)
            losses = _losses(bench, module, shown, samples, views)
            arms.append(Arm(number, phase.name, share, views, losses))
    return arms


def _losses(
    bench: Bench, head: nn.Module, matrix: NDArray[np.float32], samples: Sequence[Sample], views: tuple[View, ...]
) -> NDArray[np.float64]:
    """The log-loss of each picture by a head on its features (n, views x dim), calibrated."""
    logits = answer(head, matrix, len(views))
    targets, multi = evaluation.encode(samples, bench.dataset.classes), bench.dataset.task == "multi"
    found = targets if multi else targets.argmax(1)
    temperature, _ = metrics.find_temperature(logits, found, multi)
    return metrics.losses_of(logits / temperature, found, multi)


def choose(arms: Sequence[Arm], groups: Sequence[str]) -> tuple[Arm, str]:
    """(the arm to take, why): the first, unless another's log-loss is clearly lower, and worth it.

    Arms with as many views are equally dear, and the best of them stands for them; the dearer has to be clearly better
    than what was held until then. Clearly: by more than `ERRORS` standard errors of the mean difference over groups,
    and by more than a share of `WORTH` of the loss. The best of several was in luck, too, so this is no test with a
    p-value.

    Args:
        arms: the cheapest first.
        groups: of each picture; what is alike counts once.
    """
    held, lines = arms[0], []
    for count in sorted({len(arm.views) for arm in arms[1:]}):
        dearer = [arm for arm in arms[1:] if len(arm.views) == count]
        best = min(dearer, key=lambda arm: float(arm.losses.mean()))
        gain, error = _gain(held.losses - best.losses, groups)
        clear = gain > max(ERRORS * error, WORTH * float(held.losses.mean()))
        verdict = "clearly lower" if clear else "not clearly lower"
        lines.append(f"{best} against {held}: lower by {gain:.3f}, standard error {error:.3f}: {verdict}")
        held = best if clear else held
    return held, "; ".join((*lines, f"{str(held).partition(':')[0]} is taken, by {len(groups)} select pictures"))


def _gain(gains: NDArray[np.float64], groups: Sequence[str]) -> tuple[float, float]:
    """(the mean gain, its standard error, where pictures of a group stand for one another)."""
    _, numbers = np.unique(np.array(groups, object).astype(str), return_inverse=True)
    sums, mean = np.bincount(numbers, gains - gains.mean()), float(gains.mean())
    count = len(sums)
    error = math.sqrt(float((sums**2).sum()) * count / max(1, count - 1)) / len(gains) if count > 1 else math.inf
    return mean, error


def decide(
    bench: Bench, chosen: Plan, arms: Sequence[Arm], trainings: Mapping[int, Trained], groups: Mapping[str, str]
) -> tuple[Arm, Plan]:
    """(the arm to take, the plan with the reasons); the first process decides for all.

    Args:
        bench: what phases work on.
        chosen: the plan.
        arms: the fitted head, and all that it is held against.
        trainings: what was trained, by the phase's number.
        groups: source -> group, of what must stay together.
    """
    sources = [sample.source for sample in bench.dataset.of_role("select")]
    taken, why = choose(arms, [groups.get(source, source) for source in sources])
    (place,) = bench.world.tell([arms.index(taken)])
    arm, told = arms[place], []
    for number, trained in trainings.items():
        phase, (facts,) = find_training(chosen, number), trained.facts
        epochs, most = facts["epochs"], phase.settings.epochs
        if epochs < most:
            cause = _find_cause(phase, facts["log_losses"], epochs - facts["best_epoch"])
            told.append(f"{phase.name}: stopped after {epochs} of {most} epochs, {cause}")
    strategy: Strategy = "probe"
    if arm.share:
        strategy = "lp-ft" if find_training(chosen, arm.number).start == "pretrained" else "scratch"
    chosen = dataclasses.replace(chosen, strategy=strategy, reasons=(*chosen.reasons, *map(str, arms)))
    return arm, chosen.told(*told, why)


def _find_cause(phase: Train, losses: Sequence[float], since: int) -> str:
    """Why a training ended before its last epoch.

    Args:
        phase: what was trained.
        losses: on the select pictures after each epoch, the start's first.
        since: epochs since the best one.
    """
    settings = phase.settings
    if 0 < settings.patience <= since:
        return f"none was better for {since}"
    if not can_win(losses, settings.epochs, phase.target):
        return "they could not win any more"
    return "another would have taken too long"
