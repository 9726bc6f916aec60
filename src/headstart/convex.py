"""Linear models of convex losses under an L2 penalty, minimised for all folds of a cross-validation at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

HISTORY, MOST_STEPS, MOST_HALVINGS, TOLERANCE = 10, 300, 12, 1e-7  # of L-BFGS
QUIET_STEPS = 2  # after so many steps without a gain a fold stands still
NOISE = 1e-7  # of a mean of losses in float32, whose logits have seven digits

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # logits (n, f, classes), y -> losses (n, f), gradient


def cross_entropy(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of class numbers (n,)."""
    probabilities = logits.softmax(2)
    own = y[:, None, None].expand(-1, logits.shape[1], 1)
    losses = logits.logsumexp(2) - logits.gather(2, own)[..., 0]
    return losses, probabilities.scatter_add(2, own, torch.full(own.shape, -1.0))


def squared_hinge(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of class numbers (n,), each class against the others."""
    sign = nn.functional.one_hot(y, logits.shape[2]).mul(2).sub(1)[:, None, :]
    slack = (1 - sign * logits).clamp_min(0)
    return slack.square().sum(2), -2 * sign * slack


def binary_cross_entropy(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of labels (n, classes), 0 or 1."""
    truth = y[:, None, :].float()
    return (nn.functional.softplus(logits) - truth * logits).sum(2), logits.sigmoid() - truth


def minimise(
    x: Tensor, y: Tensor, trained: Tensor, classes: int, loss: Loss, strength: float, start: Tensor | None = None
) -> Tensor:
    """Weights (dim + 1, folds, classes), bias last, that minimise mean loss + strength / 2 x squared weights.

    L-BFGS (Nocedal and Wright, 2006, algorithm 7.5) on all folds at once, each with its own curvature and step length.
    scipy's takes as long to import as this takes to run.

    Args:
        x: features, (n, dim).
        y: targets, as the loss takes them.
        trained: whether a fold is fitted on a picture, (n, folds).
        classes: the number of classes.
        loss: of logits and targets.
        strength: of the penalty, which leaves the bias alone.
        start: weights to start from, (dim + 1, folds or 1, classes); none: zeros.
    """
    share = trained.float()
    share /= share.sum(0)

    def evaluate(weights: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.addmm(weights[-1].flatten(), x, weights[:-1].flatten(1)).view(-1, *weights.shape[1:])
        losses, slopes = loss(logits, y)
        slopes = (slopes * share[:, :, None]).flatten(1)
        gradient = torch.cat((x.T @ slopes, slopes.sum(0)[None])).view_as(weights)
        gradient[:-1].add_(weights[:-1], alpha=strength)
        penalty = weights[:-1].square().sum((0, 2)) * (strength / 2)
        return (losses * share).sum(0, dtype=torch.float64) + penalty, gradient

    shape = (x.shape[1] + 1, share.shape[1], classes)
    weights = torch.zeros(shape) if start is None else start.expand(shape).clone()
    value, gradient = evaluate(weights)
    history: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=HISTORY)
    quiet = torch.zeros(shape[1])  # steps without a gain, by fold
    for _ in range(MOST_STEPS):
        active = quiet < QUIET_STEPS
        direction = _direction(gradient, history)
        slope = _dot(direction, gradient)
        length = torch.ones(shape[1]) if history else 1 / _dot(gradient, gradient).sqrt().clamp_min(1)
        length = length * active
        for _ in range(MOST_HALVINGS):
            moved = weights + length[:, None] * direction
            new_value, new_gradient = evaluate(moved)
            # What float32 cannot tell apart counts as no rise.
            risen = new_value > value + 1e-4 * length * slope + NOISE * (1 + value.abs())
            if not risen.any():
                break
            length = torch.where(risen, length / 2, length)
        change, bend = moved - weights, new_gradient - gradient
        curvature = _dot(change, bend)
        history.append((change, bend, torch.where(curvature > 1e-12, 1 / curvature, 0.0)))
        quiet = torch.where(value - new_value <= TOLERANCE * (0.1 + new_value.abs()), quiet + 1, quiet * ~active)
        weights, value, gradient = moved, new_value, new_gradient
        if bool((quiet >= QUIET_STEPS).all()):
            break
    return weights


def _direction(gradient: Tensor, history: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Where to go down: the gradient through the curvature that the last steps have met."""
    direction, kept = -gradient, []
    for change, bend, inverse in reversed(history):
        part = inverse * _dot(change, direction)
        direction = direction - part[:, None] * bend
        kept.append(part)
    if history:
        change, bend, _ = history[-1]
        scale = _dot(change, bend) / _dot(bend, bend).clamp_min(1e-30)
        direction = direction * torch.where(scale > 0, scale, 1.0)[:, None]
    for (change, bend, inverse), part in zip(history, reversed(kept), strict=True):
        direction = direction + (part - inverse * _dot(bend, direction))[:, None] * change
    return direction


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar products by fold, (folds,)."""
    return (a * b).sum((0, 2))
