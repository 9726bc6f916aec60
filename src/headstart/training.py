"""The conductor: from pictures and settings to a finished run folder, and from a run folder to figures.

Modules that need torch are imported where they are used: pictures are decoded while torch is being imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import logging
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from headstart import (
    archives,
    checkpoints,
    compiled,
    embedders,
    loading,
    plan,
    processes,
    quality,
    reading,
    runs,
    splits,
    strategies,
    views,
)
from headstart import config as configs
from headstart.backbones import Backbone
from headstart.config import RunConfig
from headstart.data import Dataset, Sample, count_classes
from headstart.errors import ConfigError, DataError, RunError
from headstart.features import Survey, Track
from headstart.networks import Network, find_network
from headstart.plan import FitHead, Plan, Situation
from headstart.processes import World
from headstart.quality import Audit
from headstart.runs import Clock, RunFolder
from headstart.verdicts import LEAST_SELECT, list_fits
from headstart.views import View
from headstart.zoo import Spec

if TYPE_CHECKING:
    from headstart.bench import Bench
    from headstart.embedders import Workshop
    from headstart.evaluation import Evaluation
    from headstart.evidence import Sight
    from headstart.gallery import Purse
    from headstart.model import Classifier

log = logging.getLogger(__name__)

Data = str | os.PathLike[str] | Dataset
T = TypeVar("T")
SPARE = "cache"  # the folder in a run's for features that the default cache cannot take


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
    dry_run: bool = False,
    track: Track = lambda pictures, total: pictures,
    **settings: Any,
) -> Run | Plan | None:
    """Train a classifier, measure it, and leave everything in a run folder.

    Args:
        data: a folder of class folders, an archive of one, a table, or what `read` gave.
        out: the run folder; None takes the next free `runs/<data name>-<n>`.
        config: settings as a `RunConfig` or a TOML file.
        resume: whether a folder with this run, finished, is fine.
        dry_run: whether to stop when the plan is made; the same call without this goes on from it.
        track: wraps the pictures to show progress; called with them and their number.
        **settings: single settings, fields of `RunConfig`'s parts (`seed=1`); they win over `config`.

    Returns:
        The run; its plan with `dry_run`; None with `resume` where it was finished already.

    Raises:
        HeadstartError: for settings, data, weights or folders that cannot be used, before any long work but for what
            shows only when pictures are opened.
    """
    resolved = configs.resolve(config, settings)
    clock = runs.Clock(strategies.read_budget(resolved))
    if resolved.data.images:  # so that the run can be measured again from anywhere
        images = dataclasses.replace(resolved.data, images=os.path.abspath(resolved.data.images))
        resolved = dataclasses.replace(resolved, data=images)
    if resolved.engine.tensorboard:
        _check_tensorboard()
    dataset, path = _read(data, resolved)
    strategies.check(dataset.task, resolved)
    world = processes.find_world()
    if world.size > 1:
        processes.join(world, views.find_device(resolved, world))
    with _open(out, path, dataset, resolved, resume, world) as folder:
        if folder.finished:
            if folder.writes:
                _tidy(folder)  # where a run was killed after its last file
            return None
        network = find_network(resolved)
        try:
            shown = track if world.first else _quietly
            return _conduct(folder, dataset, network, resolved, shown, world, clock, dry_run)
        except KeyboardInterrupt:
            if world.first:
                command = ("headstart",) if world.size == 1 else _torchrun(world)
                words = ("train", path, "--out", folder.path, "--config", folder.path / "config.toml", "--resume")
                log.info("to go on: %s", shlex.join(str(word) for word in (*command, *words)))
            raise


def _conduct(
    folder: RunFolder,
    given: Dataset,
    network: Network,
    config: RunConfig,
    track: Track,
    world: World,
    clock: Clock,
    dry_run: bool,
) -> Run | Plan:
    """The run, from the first picture to the last file; `metrics.json` comes last and marks it as finished."""
    workshop = embedders.Workshop()
    look = _find_look(folder, network, config, track, world, workshop)
    if strategies.needs_features(config):
        view = look(given, network.spec, network.load)
    else:
        survey = views.survey(given, config, track, folder.path / SPARE, world)
        view = views.without_features(survey, config, world)
    clock.mark("pictures")
    from headstart import evaluation, gallery, phases
    from headstart.bench import embed

    audit, dataset = _deal(given, view.survey, config)
    clock.mark("audit")
    purse = gallery.Purse(clock.left, view.survey, world)
    sight = _weigh(folder, dataset, network, view, audit, config, look, purse, world)
    if strategies.may_train_further(config):
        workshop.made.clear()  # training needs the memory
    clock.mark("evidence")
    bench = _set_up(dataset, network, view, sight, config, world)
    situation = dataclasses.replace(_situate(dataset, audit, config, network, view), evidence=sight.evidence)
    chosen, head = phases.settle(folder, bench, situation, config, audit.groups, clock, purse.pace)
    folder.write_json("audit.json", audit.to_json())
    folder.write_text("split.csv", splits.to_csv(dataset))
    clock.mark("plan")
    if dry_run:
        return chosen
    classifier, chosen = phases.carry_out(folder, chosen, bench, audit.groups, track, head)
    clock.mark("training" if chosen.trains else "heads")
    report = dataset.of_role("report")
    if classifier.backbone is bench.backbone:
        rows = sight.rows(report).reshape(len(report), -1)
    else:
        album = bench.album(report)
        rows = embed(classifier.backbone, album, bench.device, bench.precision, world)
    assess = functools.partial(
        evaluation.assess, role="report", resamples=config.evaluate.resamples, seed=config.train.seed
    )
    result = assess(classifier, rows, report)
    clean = _without_duplicates(report, dataset, audit)
    unleaked = None
    if clean and len(clean) < len(report):
        unleaked = assess(classifier, rows[clean], [report[place] for place in clean])
    clock.mark("intervals")
    seconds = {**clock.seconds, **view.survey.seconds}
    run = Run(folder.path, classifier, result, len(report) - len(clean), unleaked, audit, chosen, seconds)
    if folder.writes:
        _write(folder, run, network.spec, view)
    return run


def _write(folder: RunFolder, run: Run, spec: Spec, view: View) -> None:
    run.classifier.save(folder.path / "model.safetensors")
    folder.write_text("predictions.csv", run.evaluation.to_csv())
    folder.write_json("environment.json", _environment(spec, view, run.seconds))
    measured = run.evaluation.to_json()
    if run.leaked:
        without = run.unleaked.to_json()["metrics"] if run.unleaked is not None else {}
        measured["without_leaks"] = {"n": len(run.evaluation.sources) - run.leaked, "metrics": without}
    if run.plan.trains:
        from headstart import history

        with history.may_fail("the curves"):
            history.draw(folder.path)
    folder.write_json("metrics.json", measured)
    _tidy(folder)


def _tidy(folder: RunFolder) -> None:
    """Take away what a run needs only to go on."""
    checkpoints.remove(folder.path)
    for file in (*folder.path.glob("activations-*.npy"), *folder.path.glob("trained-*.safetensors")):
        file.unlink()


def _torchrun(world: World) -> tuple[str, ...]:
    return ("torchrun", f"--nproc-per-node={world.size}", "-m", "headstart")


def audit(
    data: Data,
    *,
    track: Track = lambda pictures, total: pictures,
    **settings: Any,
) -> Audit:
    """What is wrong with a data set: every picture is opened, no network is needed.

    Args:
        data: a folder of class folders, an archive of one, a table, or what `read` gave.
        track: wraps the pictures to show progress; called with them and their number.
        **settings: single settings by name.
    """
    config = configs.resolve(None, settings)
    dataset, _ = _read(data, config)
    survey = views.survey(dataset, config, track)
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
    view = views.look(
        dataset, classifier.backbone.spec, lambda: classifier.backbone, config, track, limits=classifier.limits
    )
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


# The steps of a run


def _read(data: Data, config: RunConfig, classes: Sequence[str] | None = None) -> tuple[Dataset, Path]:
    if isinstance(data, Dataset):
        return data, data.root
    return reading.read(data, config.data, classes), Path(data)


@contextlib.contextmanager
def _open(
    out: str | os.PathLike[str] | None, path: Path, dataset: Dataset, config: RunConfig, resume: bool, world: World
) -> Iterator[RunFolder]:
    """The run's folder; of several processes the first opens it, and the others are told where it is."""
    if world.first:
        with runs.open_run(out, path, dataset, config, resume) as folder:
            world.tell([os.fspath(folder.path)])
            yield folder
    else:
        (name,) = world.tell([""])
        yield RunFolder(Path(name), writes=False)


def _check_tensorboard() -> None:
    if importlib.util.find_spec("tensorboard") is None:
        remedy = "Install it: pip install 'headstart[tensorboard]'"
        raise ConfigError("tensorboard", "needs a package that is not installed", remedy)


def _quietly(items: Iterable[T], total: int) -> Iterable[T]:
    return items


def _find_look(
    folder: RunFolder, network: Network, config: RunConfig, track: Track, world: World, workshop: Workshop
) -> Callable[[Dataset, Spec, Callable[[], Backbone]], View]:
    """How this run looks at pictures through the network, and about how often."""
    left = (config.model.fit == "auto" or not config.model.size) + (config.model.views == "auto")
    looks = 1 + (left if network.depths is not None else 0)
    look = functools.partial(views.look, config=config, track=track, spare_cache=folder.path / SPARE)
    return functools.partial(look, world=world, workshop=workshop, looks=looks)


def _deal(given: Dataset, survey: Survey, config: RunConfig) -> tuple[Audit, Dataset]:
    """The audit, and the readable pictures with their roles."""
    audit = quality.inspect(given, survey.digests, survey.facts, survey.unreadable)
    dataset = splits.assign_roles(audit.clean, audit.groups, config.train.report_share, config.train.seed)
    if strategies.may_train(config):
        whole = dataset
        few = 1 if strategies.trains(config) else config.train.folds  # else there would be fewer folds
        dataset = splits.assign_select(dataset, audit.groups, config.train.select_share, config.train.seed, few)
        if not strategies.trains(config) and not _can_choose(whole, dataset, audit, config):
            dataset = splits.give_select_to_fit(whole)
        elif not dataset.of_role("select"):
            why = "has too few pictures to keep any to choose by"
            raise DataError(given.root, why, "Add pictures, or give --strategy probe.")
    # What weights are chosen by is not learned from; heads alone are fitted on it too.
    idle = ("report", "select") if strategies.trains(config) else ("report",)
    trained = count_classes(sample for sample in dataset.samples if sample.role not in idle)
    for label in dataset.classes:
        if not trained[label]:
            why = f"has no picture of class {label!r} left for training"
            raise DataError(given.root, why, "Add some, or take the class away.")
    if not dataset.of_role("report"):
        what = "groups" if any(sample.group for sample in dataset.samples) else "pictures"
        why = f"has too few {what} to keep any for the report"
        raise DataError(given.root, why, f"Give a class two {what} or more.")
    return audit, dataset


def _can_choose(whole: Dataset, parted: Dataset, audit: Audit, config: RunConfig) -> bool:
    """Whether pictures that are kept to choose by are enough, and leave enough of each class to cross-validate on."""
    every, left = whole.of_role("fit", "select"), parted.of_role("fit")
    folds = [splits.count_folds(samples, audit.groups, config.train.folds) for samples in (every, left)]
    return len(parted.of_role("select")) >= LEAST_SELECT and folds[0] == folds[1]


def _weigh(
    folder: RunFolder,
    dataset: Dataset,
    network: Network,
    view: View,
    audit: Audit,
    config: RunConfig,
    look: Callable[[Dataset, Spec, Callable[[], Backbone]], View],
    purse: Purse,
    world: World,
) -> Sight:
    """The geometry, depths and views that heads are fitted on: chosen by evidence, or as the settings say."""
    from headstart import evidence

    if network.depths is None:
        seen = len(network.spec.views)
        stack = view.rows if seen == 1 else lambda samples: view.rows(samples).reshape(len(samples), seen, -1)
        return evidence.Sight(network.spec, None, stack)
    phase = plan.decide(_situate(dataset, audit, config, network, view), config).phases[0]
    assert isinstance(phase, FitHead)
    splits.demand_folds(dataset, phase.folds)
    fitted = dataset.of_role("fit", "select")
    table = evidence.Table(fitted, dataset, audit.groups, phase, config.train.seed)

    def look_again(spec: Spec, samples: Sequence[Sample]) -> View:
        backbone = Backbone(spec, network.load().state_dict())
        return look(dataset.with_samples(samples), spec, lambda: backbone)

    fits = list_fits(network.spec.preprocess.fit, view.survey.ratio) if config.model.fit == "auto" else ()
    larger = 0 if config.model.size else network.depths.larger
    choices = evidence.Choices(config.engine.symmetry, config.model.views, fits, larger)
    known = evidence.recall(world.tell((folder.read_json("plan.json") or {}).get("evidence")), network.depths)
    return evidence.gather(table, network.depths, network.spec, view.rows, look_again, choices, world, purse, known)


def _set_up(dataset: Dataset, network: Network, view: View, sight: Sight, config: RunConfig, world: World) -> Bench:
    import torch

    from headstart.bench import Bench

    room = config.engine.memory_mebibytes * 2**20
    return Bench(
        dataset,
        network.load() if sight.spec == network.spec else Backbone(sight.spec, network.load().state_dict()),
        torch.device(view.device),
        view.precision,
        views.limits_of(config),
        room,
        config.train.seed,
        world,
        sight.rows,
    )


def _situate(dataset: Dataset, audit: Audit, config: RunConfig, network: Network, view: View) -> Situation:
    """The facts that a plan is made from."""
    trains = strategies.trains(config)
    fitted = dataset.of_role("fit") if trains else dataset.of_role("fit", "select")
    return Situation(
        dataset.task,
        len(dataset.classes),
        len(fitted),
        len(dataset.of_role("select")),
        min((count for count in count_classes(fitted).values() if count > 1), default=1),
        splits.count_folds(fitted, audit.groups, config.train.folds),
        view.device,
        view.precision,
        report=len(dataset.of_role("report")),
        fit=network.spec.preprocess.fit,
        size=network.spec.preprocess.size,
    )


def _without_duplicates(report: Sequence[Sample], dataset: Dataset, audit: Audit) -> list[int]:
    """The places of the report pictures that have no duplicate among those fitted or chosen on."""
    trained = {sample.source for sample in dataset.samples if sample.role != "report"}
    leaked = {source for group in audit.duplicates if trained & set(group) for source in group}
    return [place for place, sample in enumerate(report) if sample.source not in leaked]


def _environment(spec: Spec, view: View, seconds: dict[str, float]) -> dict[str, Any]:
    packages = ("headstart", "torch", "torchvision", "timm", "pillow", "numpy", "safetensors")
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
            **({"openvino": compiled.find_version()} if compiled.find_version() else {}),
        },
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
    gone = [sample.source for sample in report if not archives.is_file(root / sample.source)]
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
    here = [path for path in paths if archives.is_file(path)]
    fitted = {archives.digest(path) for path in here}
    return sum(content in fitted for content in survey.digests) if here else None
