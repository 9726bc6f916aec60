"""The conductor: from pictures and settings to a finished run folder, and from a run folder to figures.

Modules that need torch are imported where they are used: pictures are decoded while torch is being imported.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headstart import backbones, embedders, features, loading, plan, quality, reading, runs, splits
from headstart import config as configs
from headstart.backbones import Backbone, Spec
from headstart.config import RunConfig
from headstart.data import Dataset, Sample, count_classes
from headstart.errors import DataError, RunError
from headstart.features import Survey, Track
from headstart.files import digest
from headstart.images import Limits
from headstart.plan import Plan, Situation
from headstart.quality import Audit
from headstart.runs import RunFolder

if TYPE_CHECKING:
    from headstart.evaluation import Evaluation
    from headstart.heads import FittedHead
    from headstart.model import Classifier

log = logging.getLogger(__name__)

Data = str | os.PathLike[str] | Dataset


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: what was measured on the `report` pictures, and what it rests on."""

    path: Path
    classifier: Classifier
    evaluation: Evaluation
    leaked: int  # report pictures that have a duplicate in training
    unleaked: Evaluation | None  # of the others, where some leak and some do not
    audit: Audit
    plan: Plan
    seconds: dict[str, float]  # by part; decode and forward are summed over threads


def train(
    data: Data,
    out: str | os.PathLike[str] | None = None,
    *,
    config: RunConfig | str | Path | None = None,
    resume: bool = False,
    track: Track = lambda pictures, total: pictures,
    **settings: Any,
) -> Run | None:
    """Train a classifier, measure it, and leave everything in a run folder.

    Args:
        data: a folder of class folders, a table, or what `read` gave.
        out: the run folder; None takes the next free `runs/<data name>-<n>`.
        config: settings as a `RunConfig` or a TOML file.
        resume: whether a folder with this run, finished, is fine; None is returned then.
        track: wraps the pictures to show progress; called with them and their number.
        **settings: single settings by name (`backbone="resnet18"`, `seed=1`); they win over `config`.

    Raises:
        HeadstartError: for settings, data, weights or folders that cannot be used, before any long work.
    """
    resolved = configs.resolve(config, settings)
    if resolved.data.images:  # so that the run can be measured again from anywhere
        images = dataclasses.replace(resolved.data, images=os.path.abspath(resolved.data.images))
        resolved = dataclasses.replace(resolved, data=images)
    dataset, path = _read(data, resolved)
    with runs.open_run(out, path, dataset, resolved, resume) as folder:
        if folder.finished:
            return None
        located = backbones.locate(resolved.model.backbone, resolved.model.weights)
        for note in located.notes:
            log.info("weights: %s", note)
        load = functools.cache(lambda: backbones.load(located))
        if not located.packaged:
            load()  # weights that do not fit are found before long work
        return _conduct(folder, dataset, located.spec, load, resolved, track)


def _conduct(
    folder: RunFolder, given: Dataset, spec: Spec, load: Callable[[], Backbone], config: RunConfig, track: Track
) -> Run:
    """The run, from the first picture to the last file; `metrics.json` comes last and marks it as finished."""
    clock = _Clock()
    view = look(given, spec, load, config, track, spare_cache=folder.path / "cache")
    clock.mark("pictures")
    from headstart import evaluation

    audit, dataset = _deal(given, view.survey, config)
    fitted, report = (*dataset.of_role("fit"), *dataset.of_role("select")), dataset.of_role("report")
    chosen = plan.decide(_situation(dataset, fitted, audit, config, view), config)
    if not chosen.phases[0].folds:
        why = "has no class with two pictures or groups for training: none can be held out to choose by"
        raise DataError(given.root, why, "Add pictures, or give smaller groups.")
    folder.write_json("audit.json", audit.to_json())
    folder.write_json("plan.json", chosen.to_json())
    splits.write_split(dataset, folder.path / "split.csv")
    clock.mark("audit")
    head = _fit(view.rows(fitted), fitted, dataset, audit, chosen, config)
    clock.mark("heads")
    classifier = _assemble(load(), head, fitted, dataset, config)
    result = evaluation.assess(
        classifier, view.rows(report), report, "report", config.evaluate.resamples, config.train.seed
    )
    clean = _without_duplicates(report, fitted, audit)
    unleaked = None
    if clean and len(clean) < len(report):
        unleaked = evaluation.assess(
            classifier, view.rows(clean), clean, "report", config.evaluate.resamples, config.train.seed
        )
    clock.mark("intervals")
    classifier.save(folder.path / "model.safetensors")
    folder.write_text("predictions.csv", result.to_csv())
    clock.mark("writing")
    seconds = {**clock.seconds, **view.survey.seconds}
    folder.write_json("environment.json", _environment(spec, view, seconds))
    measured = result.to_json()
    if len(clean) < len(report):
        without = unleaked.to_json()["metrics"] if unleaked is not None else {}
        measured["without_leaks"] = {"n": len(clean), "metrics": without}
    folder.write_json("metrics.json", measured)
    return Run(folder.path, classifier, result, len(report) - len(clean), unleaked, audit, chosen, seconds)


def audit(
    data: Data,
    *,
    track: Track = lambda pictures, total: pictures,
    **settings: Any,
) -> Audit:
    """What is wrong with a data set: every picture is opened, no network is needed.

    Args:
        data: a folder of class folders, a table, or what `read` gave.
        track: wraps the pictures to show progress; called with them and their number.
        **settings: single settings by name.
    """
    config = configs.resolve(None, settings)
    dataset, _ = _read(data, config)
    with features.open_cache(config.train.cache, _cache_folder()) as cache:
        paths = [dataset.path(source) for source in dataset.sources]
        survey = features.survey(paths, dataset.sources, cache, _limits(config), track)
    return quality.inspect(dataset, survey.digests, survey.facts, survey.unreadable, strict=False)


def evaluate(
    run: str | os.PathLike[str],
    data: Data | None = None,
    *,
    track: Track = lambda pictures, total: pictures,
    **settings: Any,
) -> Evaluation:
    """The figures of a trained classifier; nothing is written.

    Args:
        run: a run folder or `model.safetensors`.
        data: labelled pictures, all of which count; None takes the run's own `report` pictures.
        track: wraps the pictures to show progress; called with them and their number.
        **settings: single settings by name.

    Raises:
        DataError: where the data have classes that the classifier does not know, or no picture can be read.
    """
    from headstart import evaluation, model

    classifier, folder = model.load(run), RunFolder(Path(run))
    stored = folder.path / "config.toml"
    config = configs.resolve(stored if stored.is_file() else None, settings)
    if data is None:
        dataset = _stored_report(folder, classifier.classes)
    else:
        config = configs.resolve(None, settings)  # the run's settings say how its own data are read, not these
        dataset, _ = _read(data, config, classifier.classes)
        odd = [sample for sample in dataset.samples if classifier.task == "single" and len(sample.labels) != 1]
        if odd:
            why = f"{odd[0].source!r} has {len(odd[0].labels)} labels, and the classifier gives one"
            raise DataError(dataset.root, why, "Give a column `label`, or --task single.")
    view = look(dataset, classifier.backbone.spec, lambda: classifier.backbone, config, track, limits=classifier.limits)
    samples = [sample for sample in dataset.samples if sample.source not in view.survey.unreadable]
    if not samples:
        source, why = next(iter(view.survey.unreadable.items()))
        raise DataError(dataset.path(source), why, "Check the data's path.")
    role = "report" if data is None else "all"
    result = evaluation.assess(
        classifier, view.rows(samples), samples, role, config.evaluate.resamples, config.train.seed
    )
    seen = 0 if data is None else _count_seen(folder, view.survey)
    return dataclasses.replace(result, unreadable=view.survey.unreadable, fitted_on=seen)


@dataclass(frozen=True, eq=False)
class View:
    """The features and facts of a data set's pictures, and what they were made with."""

    matrix: NDArray[np.float32]
    survey: Survey
    key: str
    device: str
    precision: str

    def rows(self, samples: Sequence[Sample]) -> NDArray[np.float32]:
        """The features of some pictures, (n, dim), in their order."""
        place = {source: row for row, source in enumerate(self.survey.sources)}
        wanted = [place[sample.source] for sample in samples]
        return self.matrix if wanted == list(range(len(self.matrix))) else self.matrix[wanted]


def look(
    dataset: Dataset,
    spec: Spec,
    load: Callable[[], Backbone],
    config: RunConfig,
    track: Track,
    spare_cache: Path | None = None,
    limits: Limits | None = None,
) -> View:
    """Open every picture of a data set once and compute its features, but for what the cache has."""
    chosen: dict[str, Any] = {}

    def find_format() -> str:
        chosen["device"] = embedders.resolve_device(config.model.device)
        chosen["precision"] = embedders.resolve_precision(config.model.precision, chosen["device"])
        return f"{chosen['precision']}-{chosen['device'].type}"

    def make_embedder() -> loading.Compute:
        embedder = embedders.prepare(load(), chosen["device"], chosen["precision"])
        chosen["precision"] = str(embedder.dtype).removeprefix("torch.")  # float32 where the trial failed
        return embedder

    with features.open_cache(config.train.cache, _cache_folder(), spare_cache) as cache:
        paths = [dataset.path(source) for source in dataset.sources]
        extracted, survey = features.extract(
            paths, dataset.sources, spec, find_format, make_embedder, cache, limits or _limits(config), track
        )
    return View(extracted.matrix, survey, extracted.key, str(chosen["device"]), chosen["precision"])


# The steps of a run


def _read(data: Data, config: RunConfig, classes: Sequence[str] | None = None) -> tuple[Dataset, Path]:
    if isinstance(data, Dataset):
        return data, data.root
    return reading.read(data, config.data, classes), Path(data)


def _cache_folder() -> Path:
    return configs.cache_folder() / "features"


def _limits(config: RunConfig) -> Limits:
    return Limits(int(config.data.limit_megapixels * 1e6), int(config.data.limit_mebibytes * 2**20))


def _deal(given: Dataset, survey: Survey, config: RunConfig) -> tuple[Audit, Dataset]:
    """The audit, and the readable pictures with their roles."""
    audit = quality.inspect(given, survey.digests, survey.facts, survey.unreadable)
    dataset = splits.assign_roles(audit.clean, audit.groups, config.train.report_share, config.train.seed)
    trained = count_classes(sample for sample in dataset.samples if sample.role != "report")
    for label in dataset.classes:
        if not trained[label]:
            why = f"has no picture of class {label!r} left for training"
            raise DataError(given.root, why, "Add some, or take the class away.")
    if not dataset.of_role("report"):
        what = "groups" if any(sample.group for sample in dataset.samples) else "pictures"
        raise DataError(
            given.root, f"has too few {what} to keep any for the report", f"Give a class two {what} or more."
        )
    return audit, dataset


def _situation(dataset: Dataset, fitted: Sequence[Sample], audit: Audit, config: RunConfig, view: View) -> Situation:
    return Situation(
        dataset.task,
        len(dataset.classes),
        len(fitted),
        len(dataset.of_role("select")),
        min(count_classes(fitted).values()),
        splits.count_folds(fitted, audit.groups, config.train.folds),
        view.device,
        view.precision,
    )


def _fit(
    matrix: NDArray[np.float32],
    fitted: Sequence[Sample],
    dataset: Dataset,
    audit: Audit,
    chosen: Plan,
    config: RunConfig,
) -> FittedHead:
    from headstart import evaluation, heads

    phase = chosen.phases[0]
    held_out = splits.can_be_held_out(fitted, audit.groups)
    tuned = [sample for sample, can_be in zip(fitted, held_out, strict=True) if can_be]
    if len(tuned) > heads.TUNING_PICTURES:
        parts = -(-len(tuned) // heads.TUNING_PICTURES)
        slices = splits.assign_folds(tuned, audit.groups, parts, config.train.seed + 1)
        tuned = [sample for sample, part in zip(tuned, slices, strict=True) if part == 0]
    fold_of = dict(
        zip(
            (sample.source for sample in tuned),
            splits.assign_folds(tuned, audit.groups, phase.folds, config.train.seed),
            strict=True,
        )
    )
    folds = [fold_of.get(sample.source, -1) for sample in fitted]
    targets = evaluation.encode(fitted, dataset.classes)
    single = dataset.task == "single"
    return heads.fit_head(matrix, targets.argmax(1) if single else targets, folds, len(dataset.classes), phase.heads)


def _assemble(
    backbone: Backbone, head: FittedHead, fitted: Sequence[Sample], dataset: Dataset, config: RunConfig
) -> Classifier:
    from headstart import evaluation, metrics, model

    provenance = {
        "headstart": metadata.version("headstart"),
        "data": dataset.root.name,
        "pictures": len(fitted),
        "heads": [dataclasses.asdict(candidate) for candidate in head.candidates],  # out of fold; the first was taken
    }
    classifier = model.Classifier(
        backbone, head.module, dataset.classes, dataset.task, head.temperature, (), _limits(config), provenance
    )
    if dataset.task == "single":
        return classifier
    targets = evaluation.encode(fitted, dataset.classes)[head.rows]
    thresholds = metrics.find_thresholds(classifier.probabilities(head.logits), targets)
    return dataclasses.replace(classifier, thresholds=thresholds)


def _without_duplicates(report: Sequence[Sample], fitted: Sequence[Sample], audit: Audit) -> list[Sample]:
    """The report pictures that have no duplicate among those fitted on."""
    trained = {sample.source for sample in fitted}
    leaked = {source for group in audit.duplicates if trained & set(group) for source in group}
    return [sample for sample in report if sample.source not in leaked]


def _environment(spec: Spec, view: View, seconds: dict[str, float]) -> dict[str, Any]:
    packages = ("headstart", "torch", "torchvision", "timm", "pillow", "numpy", "safetensors")
    return {
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "platform": platform.platform(),
        "processors": loading.count_cpus(),
        "device": view.device,
        "precision": view.precision,
        "backbone": {"name": spec.name, "weights": spec.weights, "sha256": spec.digest},
        "features": view.key,
        "command": sys.argv,
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def _stored_report(folder: RunFolder, classes: tuple[str, ...]) -> Dataset:
    """The `report` pictures of a run, from where its data lay."""
    root, task, samples = folder.read_split()
    report = tuple(sample for sample in samples if sample.role == "report")
    gone = [sample.source for sample in report if not (root / sample.source).exists()]
    if gone:
        why = f"{len(gone)} of the run's {len(report)} report pictures are gone, {gone[0]!r} for one"
        raise DataError(root, why, "Restore them, or give --data.")
    return Dataset(root, report, classes, task, "")


def _count_seen(folder: RunFolder, survey: Survey) -> int | None:
    """How many pictures the run was fitted on, told by content; None where its own data are not to be found."""
    try:
        root, _, samples = folder.read_split()
    except (OSError, RunError):  # a model file alone
        return None
    paths = [root / sample.source for sample in samples if sample.role != "report"]
    here = [path for path in paths if path.is_file()]
    fitted = {digest(path) for path in here}
    return sum(content in fitted for content in survey.digests) if here else None


class _Clock:
    """Seconds by part of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, part: str) -> None:
        """Book the time since the last mark on a part."""
        now = time.perf_counter()
        self.seconds[part], self._last = now - self._last, now
