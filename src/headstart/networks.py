"""The network that a run starts from, as its settings say."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headstart import backbones, strategies
from headstart import config as configs
from headstart.backbones import Backbone, Located
from headstart.config import RunConfig
from headstart.verdicts import FINAL
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
    taps = strategies.read_taps(config)
    views = () if strategies.trains(config) or strategies.gathers_evidence(config) else strategies.read_views(config)
    wanted = functools.partial(Spec.adapted, size=config.model.size, fit=config.model.fit, taps=taps, views=views)
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
    if not strategies.gathers_evidence(config):
        return Network(located.spec, load)
    depths = _find_depths(located, load, config)
    spec = located.spec.adapted(taps=() if depths.taps == (FINAL,) else depths.taps)
    return Network(spec, functools.cache(lambda: Backbone(spec, load().state_dict())), depths)


def _find_depths(located: Located, load: Callable[[], Backbone], config: RunConfig) -> Depths:
    from headstart import evidence

    if config.model.taps.strip():
        larger = evidence.find_larger(load().network, located.spec.preprocess.size)
        return evidence.Depths(strategies.read_taps(config) or (FINAL,), larger=larger)
    chosen = config.train.cache
    folder = configs.cache_folder() if chosen == "auto" else Path(chosen)
    return evidence.recall_depths(located.spec, load, None if chosen == "none" else folder / "depths")
