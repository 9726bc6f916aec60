"""How fast weights are trained on this machine, and in which format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layout:
    """The number format, and the layout in memory, that forward and backward passes are computed in."""

    precision: str  # float32, bfloat16 or float16
    channels_last: bool = True

    def __str__(self) -> str:
        return f"{self.precision}, channels {'last' if self.channels_last else 'first'}"


@dataclass(frozen=True)
class Pace:
    """The layout in which something is trained fastest here, and how fast."""

    layout: Layout
    seconds: float  # of a training step, for each of its pictures
    name: str = ""  # of what is trained
    look_seconds: float = 0.0  # of a picture's way through the network when a model is measured; 0: not needed
    supply_seconds: float = 0.0  # in which a picture is opened, where memory does not keep it, and varied
    keeps: bool = True  # whether there is room for activations, where a frozen prefix is to run once


@dataclass(frozen=True)
class Timing:
    """How fast weights are trained here; measured once, so that an interrupted run goes on as it began."""

    paces: tuple[Pace, ...] = ()
    seconds_left: float | None = None  # of the time budget, after they were measured
    head_seconds: float = 0.0  # in which a head is fitted
    look_seconds: float = 0.0  # in which evidence opened a picture and saw it; 0: not known

    def pace(self, name: str) -> Pace | None:
        """How fast something is trained; None where that was not measured."""
        return next((pace for pace in self.paces if pace.name == name), None)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Timing:
        """The timing in a plan's JSON values."""
        paces = (Pace(**{**pace, "layout": Layout(**pace["layout"])}) for pace in values["paces"])
        look_seconds = values.get("look_seconds", 0.0)  # a plan of before it was kept has none
        return Timing(tuple(paces), values["seconds_left"], values["head_seconds"], look_seconds)
