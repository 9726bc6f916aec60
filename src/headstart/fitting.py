"""What each phase of a plan does, heads fitted and weights trained, and the classifier that it gives."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headstart import (
    augmentation,
    checkpoints,
    embedders,
    evaluation,
    heads,
    metrics,
    model,
    optimisation,
    pictures,
    splits,
    trials,
    weights,
)
from headstart import config as configs
from headstart.backbones import Backbone
from headstart.bench import Bench, embed
from headstart.blocks import count_frozen
from headstart.checkpoints import Checkpoint
from headstart.config import RunConfig
from headstart.data import Dataset, Sample
from headstart.engine import Adapted
from headstart.errors import DataError, DivergedError, UsageError
from headstart.heads import FittedHead, answer
from headstart.history import may_fail, open_history, summarise
from headstart.images import Limits, View
from headstart.material import draw_windows, make_window
from headstart.model import Classifier
from headstart.plan import FitHead, Plan, Train
from headstart.runs import RunFolder
from headstart.taps import untap
from headstart.timing import Pace

log = logging.getLogger(__name__)

BATCH, TRAINED = "batch.png", "trained-{}.safetensors"


def fit_heads(
    matrix: NDArray[np.float32],
    fitted: Sequence[Sample],
    dataset: Dataset,
    groups: Mapping[str, str],
    phase: FitHead,
    seed: int,
) -> FittedHead:
    """The best head on the features (n, dim) or (n, views, dim) of some pictures, chosen by cross-validation.

    Raises:
        DataError: where a picture has features that are no numbers.
    """
    odd = np.flatnonzero(~np.isfinite(matrix).reshape(len(matrix), -1).all(1))
    if odd.size:
        why = f"the features of {odd.size} pictures are no finite numbers, of {fitted[odd[0]].source!r} first"
        raise DataError(dataset.root, why, "Give --precision float32, or take these pictures out.")
    views = matrix.shape[1] if matrix.ndim == 3 else 1
    chosen = splits.draw_enough(fitted, groups, heads.TUNING_ROWS // views, seed + 1)
    drawn = [sample for sample, is_chosen in zip(fitted, chosen, strict=True) if is_chosen]
    held_out = splits.can_be_held_out(drawn, groups)
    tuned = [sample for sample, can_be in zip(drawn, held_out, strict=True) if can_be]
    numbers = splits.assign_folds(tuned, groups, phase.folds, seed)
    fold_of = dict(zip((sample.source for sample in tuned), numbers, strict=True))
    folds = [fold_of.get(sample.source, -1) for sample in fitted]
    targets = evaluation.encode(fitted, dataset.classes)
    single = dataset.task == "single"
    return heads.fit_head(matrix, targets.argmax(1) if single else targets, folds, len(dataset.classes), phase.heads)


def settle_head(bench: Bench, head: FittedHead, fitted: Sequence[Sample]) -> Classifier:
    """The classifier of a head that was fitted on the features of some pictures, and is not trained further."""
    targets = evaluation.encode(fitted, bench.dataset.classes)[head.rows]
    facts = {"pictures": len(fitted), "heads": list_candidates(head)}
    return assemble(
        bench.dataset, bench.backbone, head.module, head.temperature, head.logits, targets, bench.limits, facts
    )


def list_candidates(head: FittedHead | None) -> list[dict[str, Any]]:
    """The kinds of heads that were tried, as cross-validation found them; the first was taken."""
    return [dataclasses.asdict(candidate) for candidate in head.candidates] if head is not None else []


def finish(
    bench: Bench, adapted: Adapted, provenance: Mapping[str, Any], phase: Train, views: tuple[View, ...] = ()
) -> Classifier:
    """The classifier of a trained model, its temperature and thresholds found on the `select` pictures.

    Args:
        bench: what phases work on.
        adapted: the model.
        provenance: where it comes from, as JSON values.
        phase: that trained it.
        views: of pictures, that its answers are averaged over; none: the phase's.
    """
    backbone, views = bench.backbone, views or phase.views
    if not isinstance(adapted.backbone, nn.Identity):
        trained = untap(adapted.backbone).state_dict()
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}
        origin = f"{backbone.spec.weights}, trained further"
        origin = origin if phase.start == "pretrained" else "trained from random weights"
        spec = dataclasses.replace(backbone.spec, weights=origin, digest=_digest(state), views=views)
        backbone = Backbone(spec, state)
    elif views != backbone.spec.views:
        backbone = Backbone(dataclasses.replace(backbone.spec, views=views), backbone.state_dict())
    head = adapted.head.cpu().eval().requires_grad_(False)
    samples = bench.dataset.of_role("select")
    if backbone is bench.backbone:
        matrix = bench.rows(samples)
    else:
        matrix = embed(backbone, bench.album(samples), bench.device, bench.precision, bench.world)
    logits = answer(head, matrix, len(views))
    targets = evaluation.encode(samples, bench.dataset.classes)
    multi = bench.dataset.task == "multi"
    temperature, _ = metrics.find_temperature(logits, targets if multi else targets.argmax(1), multi)
    return assemble(bench.dataset, backbone, head, temperature, logits, targets, bench.limits, provenance)


def assemble(
    dataset: Dataset,
    backbone: Backbone,
    head: nn.Module,
    temperature: float,
    logits: NDArray[np.float32],
    targets: NDArray[np.bool_],
    limits: Limits,
    provenance: Mapping[str, Any],
) -> Classifier:
    """A classifier; with several labels a picture, its thresholds are found on logits it was not fitted to."""
    facts = {"headstart": metadata.version("headstart"), "data": dataset.root.name, **provenance}
    classifier = model.Classifier(backbone, head, dataset.classes, dataset.task, temperature, (), limits, facts)
    if dataset.task == "single":
        return classifier
    thresholds = metrics.find_thresholds(classifier.probabilities(logits), targets)
    return dataclasses.replace(classifier, thresholds=thresholds)


def _digest(state: Mapping[str, Tensor]) -> str:
    """A SHA-256 of weights, by which their features are told from others'."""
    running = hashlib.sha256()
    for name in sorted(state):
        running.update(name.encode() + state[name].numpy().tobytes())
    return running.hexdigest()


def check_settings(bench: Bench, chosen: Plan) -> None:
    """Find out before long work whether a plan's settings fit the network and the task.

    Raises:
        UsageError: where they do not.
    """
    dataset, preprocess = bench.dataset, bench.backbone.spec.preprocess
    zeros = np.zeros((len(dataset.samples), len(dataset.classes)), np.float32)
    for phase in chosen.phases:
        if not isinstance(phase, Train):
            continue
        settings = phase.settings
        select = dataset.of_role("select")
        known = evaluation.score(zeros[: len(select)], select, dataset.classes, dataset.task)
        if settings.best_by not in known:
            remedy = f"Give one of {', '.join(known)}."
            raise UsageError("best_by", f"{settings.best_by!r} is no figure of this task", remedy)
        if math.isnan(known[settings.best_by]):
            why = f"{settings.best_by!r} is not defined on the {len(select)} select pictures"
            raise UsageError("best_by", why, "Give log_loss, or more pictures of each class.")
        augmentation.parse(settings.augment, settings.symmetry, preprocess.size)
        blocks = () if phase.on == "features" else bench.blocks
        adapted = bench.begin(phase, None)
        parts = optimisation.divide(adapted, blocks, settings)
        if not any(parts.trained(0, settings.unfreeze_epochs)):
            raise UsageError("rates", "nothing is trained in the first epoch", "Freeze less, or give the head a rate.")
        if phase.start == "random" and not all(parts.rates):
            raise UsageError("rates", "0 freezes random weights", "Give them a rate, or another --strategy.")
        optimisation.group_parameters(adapted, parts, settings)
        for name, rate in zip(parts.names, parts.rates, strict=True):
            if rate > parts.rates[-1] > 0:
                log.info("rates: %s learns faster (%g) than the new head (%g)", name, rate, parts.rates[-1])
                break


def measure_pace(bench: Bench, phase: Train, config: RunConfig, folder: Path) -> Pace:
    """The layout in which a phase is fastest on this machine, and its pace; the first process measures.

    Args:
        bench: what phases work on.
        phase: the phase.
        config: the settings.
        folder: of the run, on whose disk activations would be kept.
    """
    if not bench.world.first:  # the others are told
        return Pace(phase.layout, 0.0, phase.name)
    spec, adapted, blocks, settings = bench.backbone.spec, bench.begin(phase, None), bench.blocks, phase.settings
    name, parts, activations = f"{spec.library}/{spec.architecture}", bench.cut(phase, adapted), None
    if parts is not None:
        example = torch.zeros(1, 3, spec.preprocess.size, spec.preprocess.size, device=bench.device)
        given = parts.prefix(example)[0].cpu().numpy()
        if bench.can_keep(phase, given, folder):
            name += f" after {blocks[count_frozen(blocks, settings.freeze) - 1].name}"
            adapted, activations = Adapted(parts.suffix, adapted.head), given.astype(np.float16)
            blocks, settings = optimisation.leave_out_frozen(blocks, settings)
    chosen_cache = config.train.cache
    cache = configs.cache_folder() if chosen_cache == "auto" else Path(chosen_cache)
    pace = trials.find_pace(
        adapted,
        blocks,
        settings,
        spec.preprocess,
        bench.dataset.task,
        config.model.precision,
        f"{name} {' '.join(spec.taps)}".strip(),
        None if chosen_cache == "none" else cache / "layouts",
        activations,
        embedders.resolve_precision("auto", bench.device),
    )
    if not phase.name:
        return pace
    supply = bench.time_supply(phase)
    if bench.device.type != "cpu":  # pictures are made ready while the device computes
        supply = max(0.0, supply - pace.seconds)
    keeps, look = activations is not None or not settings.cached_views, bench.look_seconds
    return dataclasses.replace(pace, name=phase.name, look_seconds=look, supply_seconds=supply, keeps=keeps)


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model, the plan as it was carried out, and what training came to."""

    adapted: Adapted
    plan: Plan
    facts: list[dict[str, Any]]  # JSON values, of each phase

    def describe(self, bench: Bench, head: FittedHead | None) -> dict[str, Any]:
        """Where the model comes from, as JSON values."""
        pictures = len(bench.dataset.of_role("fit"))
        return {"pictures": pictures, "heads": list_candidates(head), "training": self.facts}


def list_trainings(chosen: Plan) -> list[int]:
    """The numbers of a plan's training phases."""
    return [number for number, phase in enumerate(chosen.phases) if isinstance(phase, Train)]


def train_arm(
    folder: RunFolder, chosen: Plan, number: int, bench: Bench, head: FittedHead | None, track: Any
) -> Trained:
    """One training phase among several that are held against each other; what it gave is kept for a run that goes on.

    Args:
        folder: of the run.
        chosen: the plan.
        number: of the phase.
        bench: what phases work on.
        head: that training starts from, but where it starts from random weights.
        track: as for `train_phases`.

    Raises:
        DivergedError: where its loss is not finite any more, or was not before the run was interrupted.
    """
    phase, file = chosen.phases[number], folder.path / TRAINED.format(number)
    assert isinstance(phase, Train)
    head = head if phase.start == "pretrained" else None
    bench.world.wait()  # until the first process has written what came before
    known, described = checkpoints.recall(file), json.loads(json.dumps(dataclasses.asdict(phase)))
    if known is not None and known.facts["phase"] == described:
        if "diverged" in known.facts:
            raise DivergedError(*known.facts["diverged"])
        adapted = bench.begin(phase, head)
        weights.put(adapted, known.tensors)
        return Trained(adapted, chosen, known.facts["training"])
    try:
        trained = train_phases(folder, chosen, bench, head, track, [number])
    except DivergedError as error:  # what comes next writes its checkpoints over this one's
        why = [str(error.subject), error.why, error.remedy]
        _keep_arm(folder, bench, number, Checkpoint({}, {"phase": described, "diverged": why}))
        raise
    facts = [facts for facts in trained.facts if facts["phase"] == number]
    _keep_arm(folder, bench, number, Checkpoint(trained.adapted.state_dict(), {"phase": described, "training": facts}))
    return dataclasses.replace(trained, facts=facts)


def _keep_arm(folder: RunFolder, bench: Bench, number: int, ended: Checkpoint) -> None:
    """Keep what a training phase came to."""
    bench.world.wait()  # until all have what they read of the folder
    if not folder.writes:
        return
    checkpoints.keep(folder.path / TRAINED.format(number), ended)
    for activations in folder.path.glob(f"activations-{number}-*.npy"):
        activations.unlink()  # up to gigabytes, and of no use any more


def train_phases(
    folder: RunFolder,
    chosen: Plan,
    bench: Bench,
    head: FittedHead | None,
    track: Any,
    numbers: Sequence[int] = (),
) -> Trained:
    """Training phases of a plan, from the folder's checkpoint where there is one.

    Args:
        folder: of the run.
        chosen: the plan.
        bench: what phases work on.
        head: that a fitted phase gave; None: a new one.
        track: wraps the steps and epochs to show progress; called with them and their number.
        numbers: of the phases; none: all.
    """
    numbers = numbers or list_trainings(chosen)
    checkpoint = checkpoints.read(folder.path)
    done = (numbers[0] - 1, sys.maxsize, 0)  # phase, epochs and steps: all that came before
    if checkpoint is not None and checkpoint.facts["phase"] <= numbers[-1]:
        done = checkpoint.facts["phase"], checkpoint.facts["state"]["epoch"], checkpoint.facts["state"]["step"]
        if done[0] in numbers:
            log.info("going on after epoch %d, step %d", max(0, done[1]), done[2])
    del checkpoint  # several times the model's size
    adapted: Adapted | None = None
    with open_history(folder, done, chosen) as history:
        for number in (number for number in numbers if number >= done[0]):
            phase = chosen.phases[number]
            assert isinstance(phase, Train)
            adapted = bench.begin(phase, head) if adapted is None else adapted
            if phase.settings.find_lr:
                chosen = _find_rate(folder, bench, chosen, number, adapted)
                phase = chosen.phases[number]
                assert isinstance(phase, Train)
            if folder.writes and phase.on == "pictures" and not (folder.path / BATCH).exists():
                with may_fail("the batch"):  # before the phase begins, whose time is counted
                    draw_batch(bench, phase, folder.path / BATCH)
            training = bench.start(phase, number, adapted, folder.path, resumed=done[0] == number)
            log.info("training %s of %s parameters", *map("{:,}".format, (training.trainable, count_all(adapted))))
            for record in track(training.run(), training.count_left()):
                history.add(record)
    assert adapted is not None
    return Trained(adapted, chosen, _summarise(folder, adapted))


def _summarise(folder: RunFolder, adapted: Adapted) -> list[dict[str, Any]]:
    """What phases came to, from the history: what was trained before a kill counts too."""
    return [{**facts, "parameters": count_all(adapted)} for facts in summarise(folder.path)]


def count_all(model: nn.Module) -> int:
    """How many numbers a model's parameters hold."""
    return sum(parameter.numel() for parameter in model.parameters())


def draw_batch(bench: Bench, phase: Train, file: Path) -> None:
    """Draw the first batch of a phase as the network sees it: varied, mixed, normalised and back."""
    material, settings = bench.show_pictures(bench.dataset.of_role("fit"), phase), phase.settings
    windows = draw_windows(material, settings, bench.seed, 0)
    batch = make_window(material, settings, bench.seed, 0, 0, windows).batches[0]
    seen = material.normalise(torch.from_numpy(batch.pixels))
    names = np.array(bench.dataset.classes, object)
    labels = ["|".join(names[row > 0.5]) for row in batch.truth.numpy()]
    if settings.mixup or settings.cutmix:
        shown = [sorted(zip(row.tolist(), names, strict=True), reverse=True)[:2] for row in batch.targets]
        labels = [" + ".join(f"{name} {share:.0%}" for share, name in row) for row in shown]
    pictures.draw_batch(pictures.denormalise(seen, bench.backbone.spec.preprocess), labels, file)


def _find_rate(folder: RunFolder, bench: Bench, chosen: Plan, number: int, adapted: Adapted) -> Plan:
    """The plan with the learning rate that a range test suggests; a run that goes on takes the one it had."""
    phase = chosen.phases[number]
    assert isinstance(phase, Train)
    found = folder.read_json("learning_rate.json")
    if found is None:
        settings = dataclasses.replace(phase.settings, learning_rate=1.0, least_rate=0.0, schedule="constant")
        trial = dataclasses.replace(phase, settings=settings)
        found = trials.find_rate(bench.start(trial, number, copy.deepcopy(adapted), None)).to_json()
        folder.write_json("learning_rate.json", found)
    rate = found["suggested"]
    log.info("learning rate found: %.3g", rate)
    phase = dataclasses.replace(phase, settings=dataclasses.replace(phase.settings, learning_rate=rate))
    phases = (*chosen.phases[:number], phase, *chosen.phases[number + 1 :])
    reasons = (*chosen.reasons, f"learning rate {rate:.3g}: by a range test")
    chosen = dataclasses.replace(chosen, phases=phases, reasons=reasons)
    folder.write_json("plan.json", chosen.to_json())
    return chosen
