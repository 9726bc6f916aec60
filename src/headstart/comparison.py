"""Networks compared on the same pictures: which of those at hand suits a data set."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart import backbones, embedders, evidence, metrics, quality, reading, splits, views
from headstart import config as configs
from headstart.backbones import Located
from headstart.config import ModelConfig, RunConfig
from headstart.data import Dataset
from headstart.errors import BackboneError, HeadstartError
from headstart.features import Track
from headstart.loading import BATCH_SIZE, count_cpus
from headstart.metrics import Comparison, Estimate
from headstart.plan import FitHead
from headstart.training import Data
from headstart.verdicts import SPENT, read_time, show_time
from headstart.zoo import Spec

log = logging.getLogger(__name__)

KIND = ("logistic",)  # the head by which networks are compared
PICTURES = 1_000  # that networks are compared on; more are left out by lot, each class keeping its share
TIMED = 6  # batches
EQUAL = 0.05  # p-value from which two networks count as equally accurate


@dataclass(frozen=True)
class Ranked:
    """A network as cross-validation found it on some pictures."""

    name: str
    accuracy: Estimate
    log_loss: float
    milliseconds: float  # a picture, forward pass alone, on one core or the device
    megabytes: float  # of its weights
    behind: Comparison | None  # how much more accurate the first one is; None for that one
    file: str = ""  # of the user's weights

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        behind = None if self.behind is None else self.behind.to_json()
        return {**dataclasses.asdict(self), "accuracy": self.accuracy.to_json(), "behind": behind}


def rank(data: Data, *, track: Track = lambda pictures, total: pictures, **settings: Any) -> tuple[Ranked, ...]:
    """The networks whose weights are on this machine, the best for some pictures first.

    Each is judged by a logistic regression on its final features, cross-validated on the training pictures; those of
    the report stay closed. Of more than 1,000 pictures a stratified part is looked at. Networks that the user named
    come first, then the others, the smallest first; with a `time_budget` those are left out for which there is no time,
    and the first one is always measured. All pictures are opened once before that, as near-duplicates must not part.

    Args:
        data: a folder of class folders, an archive, a table, or what `read` gave.
        track: wraps the pictures to show progress; called with them and their number.
        **settings: single settings by name; `backbone` and `weights` add networks of the user's, of several files by
            commas; `size` and `fit` change how pictures are shown to all.

    Raises:
        HeadstartError: for networks that the user named and that cannot be used; of others it is logged.
    """
    config, start = configs.resolve(None, settings), time.perf_counter()
    budget = read_time(config.train.time_budget) or math.inf
    dataset = data if isinstance(data, Dataset) else reading.read(data, config.data)
    survey = views.survey(dataset, config, track)
    audit = quality.inspect(dataset, survey.digests, survey.facts, survey.unreadable)
    dataset = splits.assign_roles(audit.clean, audit.groups, config.train.report_share, config.train.seed)
    fitted = tuple(sample for sample in dataset.samples if sample.role != "report")
    chosen = splits.draw_enough(fitted, audit.groups, PICTURES, config.train.seed)
    fitted = tuple(sample for sample, is_chosen in zip(fitted, chosen, strict=True) if is_chosen)
    dataset = dataset.with_samples(fitted)
    folds = splits.count_folds(fitted, audit.groups, config.train.folds)
    splits.demand_folds(dataset, folds)
    found: list[tuple[Ranked, NDArray[np.bool_], NDArray[np.uint16]]] = []
    for located, named in find_at_hand(config):
        log.info("%s:", located.spec.name)
        left = budget - (time.perf_counter() - start) if found else math.inf
        if left <= 0:
            log.info("%s: not measured, %s", located.spec.name, SPENT)
            continue
        try:
            judged = _judge(located, dataset, audit.groups, folds, config, track, left)
        except HeadstartError as error:
            if named:
                raise
            log.warning("%s: not measured: %s", located.spec.name, error)
            continue
        if judged is not None:
            own = str(located.file) if named and config.model.weights else ""
            found.append((dataclasses.replace(judged[0], file=own), *judged[1:]))
    if not found:
        raise BackboneError("networks", "of those on this machine none can be used", "Name one with --backbone.")
    found.sort(key=lambda entry: entry[0].log_loss)
    best = found[0][1]

    def compare(hits: NDArray[np.bool_], weights: NDArray[np.uint16]) -> Comparison:
        return metrics.compare_drawn(best, hits, weights) if len(weights) else metrics.compare(best, hits)

    return tuple(
        dataclasses.replace(ranked, behind=None if hits is best else compare(hits, weights))
        for ranked, hits, weights in found
    )


def recommend(ranked: Sequence[Ranked]) -> Ranked:
    """The fastest of the networks that are as accurate as the first one, or more, for all that can be told."""
    equal = [entry for entry in ranked if entry.behind is None or not _is_clear(entry.behind)]
    return min(equal, key=lambda entry: entry.milliseconds)


def _is_clear(behind: Comparison) -> bool:
    """Whether the first one is more accurate for all that can be told; by the interval where there is no p-value."""
    if behind.p_value is None:
        return behind.difference.low > 0
    return behind.p_value <= EQUAL and behind.difference.value >= 0


def find_at_hand(config: RunConfig) -> list[tuple[Located, bool]]:
    """(a network, whether the user named it): those of the settings, then those that are here, the smallest first."""
    here = []
    for entry in backbones.list_models(detailed=0):
        try:
            here += [backbones.locate(entry.name, fetch=False)] if entry.here else []
        except HeadstartError as error:  # a damaged package, perhaps
            log.warning("%s: not measured: %s", entry.name, error)
    here.sort(key=lambda network: network.file.stat().st_size)
    named, given = [], config.model.weights
    if given or config.model.backbone != ModelConfig().backbone:
        files = [given] if os.path.exists(given) else given.split(",")
        named = [backbones.locate(config.model.backbone, file.strip()) for file in files]
    known = {located.file for located in named}
    adapt = functools.partial(Spec.adapted, size=config.model.size, fit=config.model.fit)
    found = [(located, True) for located in named] + [(located, False) for located in here if located.file not in known]
    return [(dataclasses.replace(located, spec=adapt(located.spec)), is_named) for located, is_named in found]


def _judge(
    located: Located,
    dataset: Dataset,
    groups: Mapping[str, str],
    folds: int,
    config: RunConfig,
    track: Track,
    seconds_left: float,
) -> tuple[Ranked, NDArray[np.bool_], NDArray[np.uint16]] | None:
    """(a network, (n,) which pictures it was right on, out of fold, how often each is drawn where groups are).

    None where its way through all pictures would take longer than there is time for.
    """
    backbone = backbones.load(located)
    milliseconds = _time(backbone, config)
    at_once = count_cpus() if embedders.resolve_device(config.model.device).type == "cpu" else 1
    needed = milliseconds / 1e3 * len(dataset.samples) / at_once
    if needed > seconds_left:
        log.info("%s: not measured, it would take about %s", located.spec.name, show_time(needed))
        return None
    view = views.look(dataset, located.spec, lambda: backbone, config, track)
    table = evidence.Table(dataset.samples, dataset, groups, FitHead(KIND, folds), config.train.seed)
    head = table.fit(view.rows(dataset.samples), KIND)
    hits = table.are_right(head)
    best = head.candidates[0]
    weights, grouped = table.draw(head)
    accuracy = metrics.proportion(hits, weights, grouped)
    size = sum(tensor.numel() * tensor.element_size() for tensor in backbone.state_dict().values())
    return Ranked(located.spec.name, accuracy, best.log_loss, milliseconds, size / 1e6, None), hits, weights


def _time(backbone: backbones.Backbone, config: RunConfig) -> float:
    """Milliseconds a picture of the forward pass alone, the median of several batches."""
    device = embedders.resolve_device(config.model.device)
    embedder = embedders.prepare(backbone, device, embedders.resolve_precision(config.model.precision, device))
    side = backbone.spec.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, side, side, 3), np.uint8)
    seconds = []
    for _ in range(TIMED):
        start = time.perf_counter()
        embedder(pixels)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]) / BATCH_SIZE * 1e3)
