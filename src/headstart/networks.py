"""The network that a run starts from, as its settings say."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headstart import backbones, plan
from headstart import config as configs
from headstart.backbones import Backbone, Located
from headstart.config import RunConfig
from headstart.zoo import Spec

if TYPE_CHECKING:
    from headstart.evidence import Depths

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Network:
    """What a run starts from."""

    spec: Spec
    load: Callable[[], Backbone]
    depths: Depths | None = None  # that evidence is gathered at


def find_network(config: RunConfig) -> Network:
    """The network of the settings; weights that do not fit are found before long work."""
    name, file = config.model.backbone, config.model.weights
    taps = tuple(filter(None, (tap.strip() for tap in config.model.taps.split(","))))
    wanted = functools.partial(Spec.adapted, size=config.model.size, fit=config.model.fit, taps=taps)
    if config.train.strategy == "scratch":
        untrained = backbones.untrained(name, config.train.seed, file)
        untrained = Backbone.of(wanted(untrained.spec), untrained.network)
        return Network(untrained.spec, lambda: untrained)
    located = backbones.locate(name, file)
    for note in located.notes:
        log.info("weights: %s", note)
    located = dataclasses.replace(located, spec=wanted(located.spec))
    load = functools.cache(lambda: backbones.load(located))
    if taps:
        _ = load().network
    elif not located.packaged:
        load()
    if taps or not plan.gathers_evidence(config):
        return Network(located.spec, load)
    depths = _recall_depths(located, load, config)
    spec = located.spec.adapted(taps=depths.taps)
    return Network(spec, functools.cache(lambda: Backbone(spec, load().state_dict())), depths)


def _recall_depths(located: Located, load: Callable[[], Backbone], config: RunConfig) -> Depths:
    from headstart import evidence

    chosen = config.train.cache
    folder = configs.cache_folder() if chosen == "auto" else Path(chosen)
    return evidence.recall_depths(located.spec, load, None if chosen == "none" else folder / "depths")
