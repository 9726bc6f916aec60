"""What a training phase is shown: the batches of every optimiser step, as functions of (seed, epoch, step)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headstart import losses, sampling
from headstart.config import EngineConfig
from headstart.data import Task
from headstart.loading import mix
from headstart.processes import World
from headstart.sampling import Draw, Mix

Mixes = tuple[list[int], list[Mix]]


@dataclass(frozen=True, eq=False)
class Material:
    """What a phase learns from.

    Args:
        show: (draw, epoch) -> what is seen of one picture in an epoch, an array.
        normalise: a stack of these -> the network's input.
        targets: (n, classes).
        task: one label a picture, or several.
    """

    show: Callable[[Draw, int], NDArray[Any]]
    normalise: Callable[[Tensor], Tensor]
    targets: NDArray[np.bool_]
    task: Task

    @property
    def labels(self) -> NDArray[Any]:
        """Class numbers (n,), or the targets where there are several labels a picture."""
        return self.targets.argmax(1) if self.task == "single" else self.targets

    def encode(self, draws: Sequence[Draw]) -> Tensor:
        """The targets (n, classes) of drawn pictures, as numbers."""
        return torch.from_numpy(self.targets[[draw.sample for draw in draws]].astype(np.float32))


@dataclass(frozen=True, eq=False)
class Batch:
    """What one forward pass sees; padding has the weight 0."""

    pixels: NDArray[Any]  # (n, size, size, 3)
    targets: Tensor  # (n, classes)
    truth: Tensor  # (n, classes), before mixing and smoothing
    weights: Tensor  # (n,)


@dataclass(frozen=True, eq=False)
class Window:
    """What one optimiser step sees: this process's batches, and how many pictures all processes have together."""

    batches: list[Batch]
    count: int


def draw_windows(material: Material, settings: EngineConfig, seed: int, epoch: int) -> list[Sequence[Draw]]:
    """The pictures of each optimiser step of an epoch; there are as many steps in every epoch."""
    draws = sampling.draw_epoch(material.labels, settings.sampling, seed, epoch)
    return sampling.windows(draws, settings.batch_size * settings.accumulate)


def make_window(
    material: Material,
    settings: EngineConfig,
    seed: int,
    epoch: int,
    step: int,
    windows: Sequence[Sequence[Draw]],
    world: World = World(),
) -> Window:
    """One process's share of an optimiser step.

    Every batch is dealt out among the processes; one that gets no picture of a short batch shows one that does not
    count, as all must take part. So does one with a lone picture where batch norms are trained: they need two that
    differ. The company comes from the same step, or where that has no other picture, from the one before.

    Args:
        material: what is learned from.
        settings: of the engine.
        seed: of order and mixing.
        epoch: from 0.
        step: of the epoch, from 0.
        windows: the epoch's pictures, as `draw_windows` gives them.
        world: this process among others.
    """
    draws = windows[step]
    fewest = 2 if settings.batch_norm == "train" or settings.head == "batch-norm" else 1
    mixes = sampling.draw_mixes(len(draws), settings.mixup, settings.cutmix, seed, epoch, step)
    batches = []
    for start in range(0, len(draws), settings.batch_size):
        own = list(world.share(range(start, min(start + settings.batch_size, len(draws)))))
        company = _find_company(draws, windows[step - 1], own, start, fewest)
        shown = [(draws[place], place) for place in own] + [(draw, 0) for draw in company]
        weights = torch.cat((torch.ones(len(own)), torch.zeros(len(company))))
        batches.append(_make_batch(material, settings, epoch, draws, shown, weights, mixes))
    return Window(batches, len(draws))


def _find_company(
    draws: Sequence[Draw], before: Sequence[Draw], own: Sequence[int], start: int, fewest: int
) -> list[Draw]:
    """Pictures that do not count, for a process with fewer of its own than a forward pass needs."""
    missing = max(0, fewest - len(own))
    pictures = {draws[place].sample for place in own}
    turned = [*draws[start:], *draws[:start], *before]
    others = [draw for draw in turned if draw.sample not in pictures] or turned
    return [others[number % len(others)] for number in range(missing)]


def _make_batch(
    material: Material,
    settings: EngineConfig,
    epoch: int,
    draws: Sequence[Draw],
    shown: Sequence[tuple[Draw, int]],
    weights: Tensor,
    mixes: Mixes | None,
) -> Batch:
    """A batch of drawn pictures with their places in the window, by which they are mixed."""
    own, places = [draw for draw, _ in shown], [place for _, place in shown]
    pixels, truth = np.stack([material.show(draw, epoch) for draw in own]), material.encode(own)
    targets = truth
    if mixes is not None:
        others = [draws[mixes[0][place]] for place in places]
        theirs = np.stack([material.show(draw, epoch) for draw in others])
        pixels, shares = mix(pixels, theirs, [mixes[1][place] for place in places])
        share = torch.from_numpy(shares)[:, None]
        targets = share * truth + (1 - share) * material.encode(others)
    if settings.label_smoothing:
        targets = losses.smooth(targets, settings.label_smoothing, material.task == "multi")
    return Batch(pixels, targets, truth, weights)
