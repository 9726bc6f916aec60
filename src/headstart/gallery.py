"""Pictures seen by a network in several geometries and views, as far as there is time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.data import Sample
from headstart.features import Survey
from headstart.processes import World
from headstart.verdicts import weigh_look
from headstart.views import View
from headstart.zoo import Spec

Look = Callable[[Sequence[Sample]], NDArray[np.float32]]
TIMED = 16  # pictures that are looked at to know how long it takes


class Purse:
    """What is left of a time budget, and how much of it a look at pictures takes.

    Args:
        left: gives the seconds that are left; None where there is no budget.
        first: the look at all pictures in the network's own geometry; None: there was none.
        world: this process among others, which have to decide alike.
    """

    def __init__(
        self, left: Callable[[], float | None] = lambda: None, first: Survey | None = None, world: World = World()
    ) -> None:
        self._left, self._world = left, world
        self.pace, self._computed = 0.0, 0  # seconds that a picture takes at the network's own size; of how many
        if first is not None:
            self.note(first, 1.0)
        self.refused: list[str] = []  # what there was no time for, in words

    @property
    def is_blind(self) -> bool:
        """Whether it is asked how long a look takes, and that is not known."""
        blind: bool = self._world.tell(self._left() is not None and not self.pace)
        return blind

    def pays(self, what: str, pictures: float) -> bool:
        """Whether there is time to look at so many pictures; where there is not, that is kept in words."""
        why: str = self._world.tell(weigh_look(what, pictures * self.pace, self._left()))
        self.refused += filter(None, (why,))
        return not why

    def note(self, look: Survey, enlargement: float) -> None:
        """Take note of how long a picture took: the look for which most were computed counts."""
        if look.computed and look.computed >= self._computed:
            self.pace, self._computed = look.pace / enlargement, look.computed


class Gallery:
    """Features of pictures in several geometries and views, looked at where somebody asks for one that was not yet.

    Args:
        spec: the network.
        own: pictures -> their features by that, (n, dim).
        look: (the network in another geometry or with another view, pictures) -> its view of them.
        purse: what there is time for; it takes note of how long each look takes.
    """

    def __init__(self, spec: Spec, own: Look, look: Callable[[Spec, Sequence[Sample]], View], purse: Purse) -> None:
        self.spec, self.purse = spec, purse
        self._own, self._look = own, look
        self._columns: NDArray[np.int64] | slice = slice(None)
        self._seen: defaultdict[tuple[Any, ...], dict[str, NDArray[np.float32]]] = defaultdict(dict)  # source -> row

    def rows(self, spec: Spec, samples: Sequence[Sample]) -> NDArray[np.float32]:
        """The features (n, dim) of some pictures in the network's own geometry and view, or in others."""
        if spec == self.spec:
            return np.ascontiguousarray(self._own(samples)[:, self._columns])
        self.look(spec, samples)
        seen = self._seen[_key(spec)]
        return np.stack([seen[sample.source] for sample in samples])

    def look(self, spec: Spec, samples: Sequence[Sample]) -> None:
        """See to it that the features of some pictures are there, all of them by the same engine."""
        seen = self._seen[_key(spec)]
        if spec != self.spec and not {sample.source for sample in samples} <= seen.keys():
            view = self._look(spec, samples)
            self.purse.note(view.survey, self.enlargement(spec))
            found = np.ascontiguousarray(view.rows(samples)[:, self._columns])
            seen.update(zip([sample.source for sample in samples], found))

    def narrow(self, spec: Spec, columns: NDArray[np.int64] | slice) -> None:
        """From now on rows are of some columns alone, and of one geometry: the others are forgotten."""
        self._columns = columns
        for key in list(self._seen):
            kept = {source: row[columns].copy() for source, row in self._seen.pop(key).items()}
            if key[:2] == _key(spec)[:2]:
                self._seen[key] = kept

    def pays(self, what: str, spec: Spec, pictures: float, some: Sequence[Sample]) -> bool:
        """Whether there is time to see so many pictures in a way; where nobody knows, a few of some are seen so.

        What the cache holds tells nothing, and is free.
        """
        if self.purse.is_blind and some:
            self.look(spec, some[:: max(1, len(some) // TIMED)][:TIMED])
        return self.purse.pays(what, pictures * self.enlargement(spec))

    def enlargement(self, spec: Spec) -> float:
        """How many times as many pixels as in the network's own square are in another's."""
        return (spec.preprocess.size / self.spec.preprocess.size) ** 2


def _key(spec: Spec) -> tuple[Any, ...]:
    return spec.preprocess.fit, spec.preprocess.size, spec.views
