"""Losses: functions of logits and targets that give one number a picture, so that sums over pictures are exact.

Targets are always (n, classes): a one for the class, several ones for several labels, shares after mixing or smoothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor], Tensor]  # logits (n, classes), targets (n, classes) -> losses (n,)

SURE = 1e-7  # a doubt no smaller than this: a power of it has a gradient
EFFECTIVE_BETA = 0.999  # Cui et al. (2019) try 0.9 to 0.9999


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy (n,) of the softmax of logits; it is also the negative log-likelihood (`nll`) of one class."""
    terms = -targets * functional.log_softmax(logits, 1)
    return (terms if weights is None else terms * weights).sum(1)


def binary_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy (n,) of the sigmoid of each logit, mean over classes; weights are those of a class's positives."""
    return functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none").mean(1)


def focal(
    logits: Tensor, targets: Tensor, weights: Tensor | None = None, gamma: float = 2.0, multi: bool = False
) -> Tensor:
    """Focal loss (n,), which plays down what is already right (Lin et al., 2017); with gamma 0 plain cross-entropy.

    One label a picture: of the softmax, summed over classes. Several: of each logit's sigmoid, mean over classes.
    """
    if multi:
        terms = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
        right = logits.sigmoid() * targets + (1 - logits.sigmoid()) * (1 - targets)
        return (terms * (1 - right).clamp(min=SURE) ** gamma).mean(1)
    log_probabilities = functional.log_softmax(logits, 1)
    terms = -targets * (1 - log_probabilities.exp()).clamp(min=SURE) ** gamma * log_probabilities
    return (terms if weights is None else terms * weights).sum(1)


def make_loss(name: str, multi: bool, weights: Tensor | None = None, gamma: float = 2.0) -> Loss:
    """The loss of a name; all take raw logits.

    Args:
        name: `cross-entropy`, `nll` (the same on logits), `bce`, `bce-with-logits` (the same on logits) or `focal`.
        multi: several labels a picture.
        weights: (classes,), or None.
        gamma: of the focal loss.
    """
    if name == "focal":
        return functools.partial(focal, weights=weights, gamma=gamma, multi=multi)
    if name in ("bce", "bce-with-logits"):
        return functools.partial(binary_cross_entropy, weights=weights)
    return functools.partial(cross_entropy, weights=weights)


def smooth(targets: Tensor, share: float, multi: bool) -> Tensor:
    """Targets (n, classes) of which a share is spread evenly: over all classes, or for each label over yes and no."""
    return targets * (1 - share) + share / (2 if multi else targets.shape[1])


def weigh_classes(kind: str, counts: Sequence[int]) -> Tensor | None:
    """Weights (classes,) of a class's pictures in a loss, with a mean over all of 1; None for kind `none`.

    Losses of a sigmoid weigh a class's positives by it, as torch's `pos_weight` does: its negatives are the others'.

    Args:
        kind: `counts`: one over a class's number of pictures; `effective`: one over its effective number,
            (1 - beta^count) / (1 - beta) (Cui et al., 2019).
        counts: pictures a class; a class without any gets the weight 1.
    """
    if kind == "none":
        return None
    numbers = torch.tensor(counts, dtype=torch.float64)
    effective = numbers if kind == "counts" else (1 - EFFECTIVE_BETA**numbers) / (1 - EFFECTIVE_BETA)
    weights = torch.where(numbers > 0, 1 / effective.clamp(min=1e-9), 0.0)
    weights = weights * (numbers.sum() / (weights * numbers).sum())
    return torch.where(numbers > 0, weights, 1.0).float()
