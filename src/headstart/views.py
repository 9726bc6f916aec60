"""Every picture of a data set opened once: its facts, and its features by a network, but for what the cache has."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headstart import archives, embedders, features, loading
from headstart import config as configs
from headstart.backbones import Backbone
from headstart.config import RunConfig
from headstart.data import Dataset, Sample
from headstart.errors import DataError
from headstart.features import Survey, Track
from headstart.images import Limits
from headstart.processes import World
from headstart.zoo import Spec

if TYPE_CHECKING:
    import torch


SAMPLED = 32  # pictures by which it is told how many are in the cache


@dataclass(frozen=True, eq=False)
class View:
    """The facts of a data set's pictures, and their features where they were wanted."""

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
    world: World = World(),
    workshop: embedders.Workshop | None = None,
    looks: int = 1,
) -> View:
    """Open every picture of a data set once and compute its features, but for what the cache has.

    Several processes compute a share each; what they put into the cache, all of them then read. The `workshop` makes
    the network ready to run; `looks` is about how many there will be, this one and others in other ways.
    """
    chosen: dict[str, Any] = {}
    sources, allowed = dataset.sources, limits or limits_of(config)
    made = workshop or embedders.Workshop()

    @functools.cache  # its answer hangs on what the cache holds, and must not change on the way
    def find_format() -> str:
        device = chosen["device"] = find_device(config, world)
        precision = chosen["precision"] = embedders.resolve_precision(config.model.precision, device)
        forms = {"torch": f"{precision}-{device.type}", "openvino": f"{precision}-openvino"}

        def count_missing(engine: embedders.Engine) -> int:
            held = features.Store(cache / f"{features.key_of(spec)}-{forms[engine]}").index()
            return _count_missing([dataset.path(source) for source in sources], held) if held else len(sources)

        find = functools.partial(embedders.find_engine, spec, load, device, precision, cache / embedders.GRAPHS)
        chosen["engine"] = world.tell(find(count_missing, looks, made) if world.first else "torch")
        return forms[chosen["engine"]]

    def make_embedder() -> loading.Compute:
        embedder = made.prepare(load(), **chosen, folder=cache / embedders.GRAPHS)
        chosen["precision"] = str(embedder.dtype).removeprefix("torch.")  # float32 where the trial failed
        return embedder

    def extract(some: Sequence[str], shown: Track) -> tuple[features.Features, Survey]:
        paths = [dataset.path(source) for source in some]
        return features.extract(paths, some, spec, find_format, make_embedder, cache, allowed, shown)

    with _shared_cache(config, spare_cache, world) as cache:
        if world.size > 1:
            own = extract(world.share(sources), track)[1]
            world.wait()
        extracted, survey = extract(sources, track if world.size == 1 else lambda items, _: items)
        if world.size > 1:  # by now the cache has all of them
            survey = dataclasses.replace(survey, computed=own.computed, pace=own.pace / world.size)
        world.wait()
    return View(extracted.matrix, survey, extracted.key, str(chosen["device"]), chosen["precision"])


def _count_missing(paths: Sequence[Path], held: Container[str]) -> int:
    """About how many pictures' features are not held, told from the content of a few of them."""

    def is_missing(path: Path) -> bool:
        try:
            return archives.digest(path) not in held
        except (OSError, DataError):  # nothing will be computed of it; it is named when it is to be opened
            return False

    some = paths[:: max(1, len(paths) // SAMPLED)]
    return len(paths) * sum(map(is_missing, some)) // max(1, len(some))


def survey(
    dataset: Dataset,
    config: RunConfig,
    track: Track,
    spare_cache: Path | None = None,
    world: World = World(),
) -> Survey:
    """The facts of a data set's pictures, without a network."""

    def describe(some: Sequence[str], cache: Path, shown: Track) -> Survey:
        return features.survey([dataset.path(source) for source in some], some, cache, limits_of(config), shown)

    sources = dataset.sources
    with _shared_cache(config, spare_cache, world) as cache:
        if world.size > 1:
            describe(world.share(sources), cache, track)
            world.wait()
        found = describe(sources, cache, track if world.size == 1 else lambda items, _: items)
        world.wait()  # nobody takes a temporary cache away while others read it
    return found


def without_features(found: Survey, config: RunConfig, world: World) -> View:
    """What a network that has yet to be trained sees of pictures: their facts alone."""
    device = find_device(config, world)
    precision = embedders.resolve_precision(config.model.precision, device)
    return View(np.empty((0, 0), np.float32), found, "", str(device), precision)


def find_device(config: RunConfig, world: World) -> torch.device:
    """The device of the settings; of several processes on GPUs, each has its own."""
    import torch

    device = embedders.resolve_device(config.model.device)
    return torch.device("cuda", world.local) if device.type == "cuda" and world.size > 1 else device


def limits_of(config: RunConfig) -> Limits:
    """What pictures are too large to be opened."""
    return Limits(int(config.data.limit_megapixels * 1e6), int(config.data.limit_mebibytes * 2**20))


@contextlib.contextmanager
def _shared_cache(config: RunConfig, spare: Path | None, world: World) -> Any:
    """The cache's folder, the same for all processes."""
    with features.open_cache(config.train.cache, configs.cache_folder() / "features", spare) as cache:
        yield Path(world.tell(str(cache)))
