"""Which pictures an epoch shows, in which order, and which are mixed.

All of it is a function of (seed, epoch), so that a run can go on anywhere in an epoch, with any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# What a random generator is for, so that no two uses of (seed, epoch) draw the same numbers.
ORDER, AUGMENT, MIX = range(3)


@dataclass(frozen=True)
class Draw:
    """One picture of an epoch: `turn` counts how often it came before in this epoch."""

    sample: int
    turn: int = 0


@dataclass(frozen=True)
class Mix:
    """How two pictures are mixed: `share` is what remains of the first.

    `box` (left, top, right, bottom, in parts of the side) is what cutmix takes from the second; None: mixup blends.
    """

    share: float
    box: tuple[float, float, float, float] | None = None


def draw_epoch(
    labels: NDArray[np.int64] | NDArray[np.bool_],
    kind: Literal["plain", "weighted", "over", "under"],
    seed: int,
    epoch: int,
) -> list[Draw]:
    """The pictures of an epoch in their order.

    Args:
        labels: class numbers (n,), or booleans (n, classes) with several labels a picture.
        kind: `plain`: each once; `weighted`: n drawn with replacement, each class equally likely (with several labels,
            a picture as likely as its rarest label); `over`: small classes repeated up to the largest; `under`: large
            classes cut down to the smallest.
        seed: of the run.
        epoch: which one.
    """
    random = np.random.default_rng([ORDER, seed, epoch])
    count = len(labels)
    if kind == "plain":
        chosen = random.permutation(count)
    elif kind == "weighted":
        rarity = 1.0 / _commonness(labels)
        chosen = random.choice(count, count, p=rarity / rarity.sum())
    else:
        numbers = labels if labels.ndim == 1 else _rarest_label(labels.astype(bool))
        members = [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
        wanted = (max if kind == "over" else min)(len(own) for own in members)
        chosen = random.permutation(np.concatenate([_resized(random, own, wanted) for own in members]))
    turns: dict[int, int] = {}
    draws = []
    for sample in chosen.tolist():
        draws.append(Draw(sample, turns.get(sample, 0)))
        turns[sample] = turns.get(sample, 0) + 1
    return draws


def _resized(random: np.random.Generator, members: NDArray[np.int64], wanted: int) -> NDArray[np.int64]:
    """`wanted` of the members: as many whole rounds as there are, then some by lot."""
    rounds, rest = divmod(wanted, len(members))
    return np.concatenate([np.repeat(members, rounds), random.permutation(members)[:rest]])


def _commonness(labels: NDArray[np.int64] | NDArray[np.bool_]) -> NDArray[np.float64]:
    """For each picture the number of pictures with its label, or with its rarest one."""
    if labels.ndim == 1:
        counts: NDArray[np.int64] = np.bincount(labels)[labels]
    else:
        counts = np.where(labels, labels.sum(0), len(labels)).min(1)
    return counts.astype(np.float64)


def _rarest_label(labels: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each picture the number of its rarest label; one more than there are for a picture without labels."""
    counts = np.where(labels, labels.sum(0), len(labels) + 1)
    numbers: NDArray[np.int64] = np.where(labels.any(1), counts.argmin(1), labels.shape[1])
    return numbers


def draw_mixes(
    count: int, mixup: float, cutmix: float, seed: int, epoch: int, step: int
) -> tuple[list[int], list[Mix]] | None:
    """For each of a step's pictures the place of its partner and how they are mixed; None where nothing is mixed.

    Shares are drawn from Beta(alpha, alpha) (Zhang et al., 2018; Yun et al., 2019); with both, each has half the steps.
    """
    if not (mixup or cutmix):
        return None
    random = np.random.default_rng([MIX, seed, epoch, step])
    cut = bool(cutmix) and (not mixup or random.random() < 0.5)
    alpha = cutmix if cut else mixup
    partners = random.permutation(count).tolist()
    return partners, [_draw_mix(random, alpha, cut) for _ in range(count)]


def _draw_mix(random: np.random.Generator, alpha: float, cut: bool) -> Mix:
    share = float(random.beta(alpha, alpha))
    if not cut:
        return Mix(share)
    side, (x, y) = np.sqrt(1.0 - share), random.random(2)
    left, right = np.clip((x - side / 2, x + side / 2), 0.0, 1.0).tolist()
    top, bottom = np.clip((y - side / 2, y + side / 2), 0.0, 1.0).tolist()
    return Mix(share, (left, top, right, bottom))


def windows(draws: Sequence[Draw], size: int) -> list[Sequence[Draw]]:
    """The pictures of each optimiser step: `size` of them, the last step fewer."""
    return [draws[start : start + size] for start in range(0, len(draws), size)]
