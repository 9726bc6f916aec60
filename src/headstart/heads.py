"""Heads: the small last layers fitted on cached features, and how they are fitted.

A fitted head is always an `nn.Module` from features (n, dim) to logits (n, classes). Logistic regression, linear SVM,
class means and the blend, which is the average of the first and the last one's calibrated logits, fold into one
`nn.Linear`, their scaling included; kNN is a module with buffers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headstart import convex
from headstart.metrics import find_temperature
from headstart.verdicts import TUNING_ROWS as TUNING_ROWS

KINDS = ("logistic", "svm", "means", "blend", "knn")
BLENDED = ("logistic", "means")
LEAD = 0.02  # share by which another head's log-loss must be lower than the blend's, which hangs less on chance
PRIOR_PICTURES = 30  # that the variance of the features beside a feature counts as
WINDOW = 65  # features beside a feature, itself among them
QUERIES = 1024  # that are compared with all training features at once


def answer(head: nn.Module, features: NDArray[np.float32], views: int = 1) -> NDArray[np.float32]:
    """A head's logits (n, classes) for features (n, views x dim), the mean over the views."""
    with torch.inference_mode():
        logits = head(torch.from_numpy(features).reshape(len(features) * views, -1))
        means: NDArray[np.float32] = logits.view(len(features), views, -1).mean(1).numpy()
    return means


class NearestNeighbours(nn.Module):
    """k nearest neighbours by cosine: the logits are logarithms of Laplace-smoothed votes.

    Args:
        vectors: training features, (m, dim), scaled and of unit length.
        labels: their classes, (m,).
        mean: what is taken from features before comparing, (dim,).
        scale: what they are then divided by, (dim,).
        classes: the number of classes.
        k: how many neighbours vote.
    """

    vectors: Tensor
    labels: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, vectors: Tensor, labels: Tensor, mean: Tensor, scale: Tensor, classes: int, k: int) -> None:
        super().__init__()
        self.classes, self.k = classes, k
        for name, value in (("vectors", vectors), ("labels", labels), ("mean", mean), ("scale", scale)):
            self.register_buffer(name, value)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (n, classes) of features (n, dim)."""
        queries = nn.functional.normalize((features - self.mean) / self.scale, dim=1)
        found = [(part @ self.vectors.T).topk(self.k, dim=1).indices for part in torch.split(queries, QUERIES)]
        return _vote(self.labels[torch.cat(found)], self.classes, [self.k])[0]


def make_head(kind: str, dim: int, classes: int, hidden: int = 512, dropout: float = 0.5) -> nn.Module:
    """A head that is to be trained: features (n, dim) -> logits (n, classes), with torch's random weights.

    Args:
        kind: `linear`; `mlp`: with a hidden layer; `batch-norm`: BN-Dropout-Linear-BN-ELU-Dropout-Linear.
        dim: of the features.
        classes: the number of classes.
        hidden: width of the hidden layer.
        dropout: share of values dropped before each linear layer; of `mlp`, before its last.
    """
    if kind == "linear":
        return nn.Linear(dim, classes)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, classes))
    return nn.Sequential(
        nn.BatchNorm1d(dim),
        nn.Dropout(dropout),
        nn.Linear(dim, hidden),
        nn.BatchNorm1d(hidden),
        nn.ELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, classes),
    )


@dataclass(frozen=True)
class Candidate:
    """A head with one hyper-parameter, as cross-validation found it."""

    kind: str
    strength: float  # regularisation (logistic, svm), shrinkage (means), share (blend), number of neighbours (knn)
    log_loss: float  # out of fold, after the temperature
    accuracy: float  # out of fold; with several labels a picture, over pictures and labels


@dataclass(frozen=True, eq=False)
class FittedHead:
    """The best head, fitted on all pictures, and what cross-validation gave for it."""

    module: nn.Module
    kind: str
    strength: float
    logits: NDArray[np.float32]  # out of fold, (m, classes)
    rows: NDArray[np.int64]  # the m pictures they are of
    temperature: float
    candidates: tuple[Candidate, ...]  # the best of each kind: the one that was taken, then the others by log-loss,
    # a blend's parts among them, even where they did not compete


@dataclass(frozen=True, eq=False)
class _Moments:
    """Classes as some pictures show them."""

    counts: Tensor  # (classes,) pictures
    means: Tensor  # (classes, dim), 0 without pictures
    covariance: Tensor  # (dim, dim), within classes


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over pictures, from which moments follow: those of a part can be taken away again."""

    counts: Tensor  # (classes,)
    sums: Tensor  # (classes, dim)
    squares: Tensor  # (dim, dim)

    @staticmethod
    def of(x: Tensor, y: Tensor, classes: int) -> _Sums:
        """The sums of features (n, dim) and class numbers (n,)."""
        sums = torch.zeros(classes, x.shape[1]).index_add_(0, y, x)
        return _Sums(torch.bincount(y, minlength=classes), sums, x.T @ x)

    def plus(self, other: _Sums, sign: int = 1) -> _Sums:
        """These sums with others', or without them where the sign is -1."""
        squares = self.squares.add(other.squares, alpha=sign)
        return _Sums(self.counts + sign * other.counts, self.sums.add(other.sums, alpha=sign), squares)

    def moments(self) -> _Moments:
        means = self.sums / self.counts.clamp_min(1)[:, None]
        covariance = (self.squares - means.T @ self.sums) / self.counts.sum()
        return _Moments(self.counts, means, covariance)


@dataclass(frozen=True, eq=False)
class _Problem:
    """Scaled features, targets and folds.

    All folds are solved as one problem, and one more beside them that holds nothing out: its solution is the head on
    all pictures, and one matrix product serves them all.
    """

    x: Tensor  # (n, dim)
    y: Tensor  # (n,) class numbers, or (n, classes) of 0 and 1
    fold: Tensor  # (n,), -1 where a picture is never held out
    classes: int
    dim: int = 0  # of the features before a rotation; 0 without one
    views: int = 1  # rows of each picture, one after the other

    @property
    def multi(self) -> bool:
        return self.y.ndim == 2

    @property
    def folds(self) -> int:
        return int(self.fold.max()) + 1

    def trains(self) -> Tensor:
        """(n, folds + 1): True where a picture is fitted on."""
        return self.fold[:, None] != torch.arange(self.folds + 1)

    @functools.cached_property
    def moments(self) -> list[_Moments]:
        """What class means are made of: for the training pictures of each fold, and for all pictures."""
        held_out = [
            _Sums.of(self.x[rows], self.y[rows], self.classes)
            for rows in self.fold == torch.arange(self.folds)[:, None]
        ]
        never = self.fold < 0
        total = _Sums.of(self.x[never], self.y[never], self.classes)
        for part in held_out:
            total = total.plus(part)
        return [*(total.plus(part, -1).moments() for part in held_out), total.moments()]

    def held_out(self, logits: Tensor) -> NDArray[np.float32]:
        """Of logits (n, folds + 1, classes), each picture's from the fold that has not seen it, mean over its views."""
        picked = logits[torch.arange(len(logits)), self.fold]
        means: NDArray[np.float32] = self.average(picked).numpy()
        return means

    def average(self, logits: Tensor) -> Tensor:
        """Logits (n, classes) of rows as those of pictures, the mean over each one's views."""
        return logits if self.views == 1 else logits.view(-1, self.views, logits.shape[1]).mean(1)

    @property
    def truth(self) -> NDArray[Any]:
        """The targets of pictures."""
        targets: NDArray[Any] = self.y[:: self.views].numpy()
        return targets


@dataclass(frozen=True, eq=False)
class _Trial:
    """One head with one strength: what it gave out of fold, and its weights (dim + 1, classes) on all pictures."""

    candidate: Candidate
    logits: NDArray[np.float32]
    temperature: float
    weights: Tensor | None
    parts: tuple[_Trial, ...] = ()  # of a blend


def fit_head(
    features: NDArray[np.float32],
    targets: NDArray[np.int64] | NDArray[np.bool_],
    folds: Sequence[int],
    classes: int,
    kinds: Sequence[str] = KINDS,
) -> FittedHead:
    """The best head by its cross-validated log-loss after its temperature, fitted on all pictures.

    The blend is taken where no other's log-loss is lower by more than `LEAD`.

    Args:
        features: (n, dim), or (n, views, dim): the head is then fitted on all views of a picture, and what it gives
            for them is averaged.
        targets: class numbers (n,), or with several labels a picture, booleans (n, classes).
        folds: each picture's fold of the cross-validation, from 0; -1 leaves a picture out of the tuning.
        classes: the number of classes.
        kinds: which heads compete, of `KINDS`; with several labels a picture, logistic regression alone.
    """
    views = features.shape[1] if features.ndim == 3 else 1
    features = features.reshape(-1, features.shape[-1])
    mean, scale = _moments(features, len(features) // views)
    fold = torch.tensor(folds).repeat_interleave(views)
    y = torch.from_numpy(np.asarray(targets)).repeat_interleave(views, 0)
    tuned = (fold >= 0).nonzero()[:, 0]
    x = _scaled(features, tuned, mean, scale)
    problem, basis = _rotate(_Problem(x, y[tuned], fold[tuned], classes, views=views))
    kinds = ("logistic",) if problem.multi else kinds
    trials = _tune(problem, kinds)
    kind = min(kinds, key=lambda name: trials[name].candidate.log_loss * (1 - LEAD * (name == "blend")))
    best, strength = trials[kind], trials[kind].candidate.strength
    module: nn.Module
    if kind == "knn":
        vectors = nn.functional.normalize(_scaled(features, torch.arange(len(y)), mean, scale), dim=1)
        module = NearestNeighbours(vectors, y, torch.from_numpy(mean), torch.from_numpy(scale), classes, int(strength))
    else:
        whole = None
        if len(tuned) < len(y):
            x = _scaled(features, torch.arange(len(y)), mean, scale)
            whole = _rotate(_Problem(x, y, torch.full_like(fold, -1), classes))
        module = _fold_scaling(_complete(best, basis, whole), mean, scale)
    ranked = sorted(trials.values(), key=lambda trial: (trial is not best, trial.candidate.log_loss))
    candidates = tuple(trial.candidate for trial in ranked)
    rows = tuned[::views].numpy() // views
    return FittedHead(module.eval(), kind, strength, best.logits, rows, best.temperature, candidates)


def _moments(features: NDArray[np.float32], pictures: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean of each feature, and what it is divided by: its standard deviation, but for few pictures.

    On few pictures some features hardly vary, by chance. Divided by that little, they would drown all others on the
    next picture. So variances are shrunk towards the median of those beside them, mostly of the same depth, as if
    `PRIOR_PICTURES` more had shown it (after Opgen-Rhein and Strimmer, 2007). 1 for a feature that does not vary.
    """
    mean = features.mean(0, dtype=np.float64)
    square = np.einsum("nd,nd->d", features, features, dtype=np.float64) / len(features)
    variance = np.maximum(square - mean**2, 0.0)
    varies, scale = np.sqrt(variance) >= 1e-6 * (np.abs(mean) + 1e-6), np.ones(len(mean), np.float32)
    if varies.any():
        found = variance[varies]
        width = min(WINDOW, len(found) | 1)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(found, width // 2, "symmetric"), width)
        shrunk = (pictures * found + PRIOR_PICTURES * np.median(windows, 1)) / (pictures + PRIOR_PICTURES)
        scale[varies] = np.sqrt(shrunk)
    return mean.astype(np.float32), scale


def _scaled(
    features: NDArray[np.float32], rows: Tensor, mean: NDArray[np.float32], scale: NDArray[np.float32]
) -> Tensor:
    whole = torch.from_numpy(features)
    part = whole if len(rows) == len(whole) else whole[rows]
    return (part - torch.from_numpy(mean)).div_(torch.from_numpy(scale))


def _rotate(problem: _Problem) -> tuple[_Problem, Tensor | None]:
    """With fewer pictures than features, the same problem in the pictures' own span, and the basis to come back.

    Nothing is lost: an L2-penalised solution lies in that span (the representer theorem).
    """
    n, dim = problem.x.shape
    if n >= dim:
        return problem, None
    left, size, basis = torch.linalg.svd(problem.x, full_matrices=False)
    return _Problem(left * size, problem.y, problem.fold, problem.classes, dim, problem.views), basis.T


def _complete(trial: _Trial, basis: Tensor | None, whole: tuple[_Problem, Tensor | None] | None) -> Tensor:
    """The weights (dim + 1, classes) of a linear trial, on scaled features and on all pictures.

    Args:
        trial: what was found on the pictures that strengths are tuned on.
        basis: in which it was solved, as `_rotate` gives it.
        whole: the problem of all pictures and its basis, where there are others.
    """
    if trial.parts:
        return _mix(trial.parts, [_complete(part, basis, whole) for part in trial.parts])
    assert trial.weights is not None
    weights = _turn(trial.weights, basis)
    if whole is None:
        return weights
    problem, own = whole
    start = _turn(weights, own.T if own is not None else None)[:, None]
    return _turn(_SOLVERS[trial.candidate.kind](problem, trial.candidate.strength, start)[:, -1], own)


def _turn(weights: Tensor, basis: Tensor | None) -> Tensor:
    """Weights (dim + 1, classes), bias last, in another basis."""
    return weights if basis is None else torch.cat((basis @ weights[:-1], weights[-1:]))


def _fold_scaling(weights: Tensor, mean: NDArray[np.float32], scale: NDArray[np.float32]) -> nn.Linear:
    """Weights (dim + 1, classes) on scaled features as a linear layer on features."""
    matrix = (weights[:-1] / torch.from_numpy(scale)[:, None]).T.contiguous()
    module = nn.Linear(matrix.shape[1], matrix.shape[0])
    module.weight = nn.Parameter(matrix, requires_grad=False)
    module.bias = nn.Parameter(weights[-1] - matrix @ torch.from_numpy(mean), requires_grad=False)
    return module


# Linear heads


def _solve_logistic(problem: _Problem, strength: float, start: Tensor | None = None) -> Tensor:
    return _minimise(problem, convex.binary_cross_entropy if problem.multi else convex.cross_entropy, strength, start)


def _solve_svm(problem: _Problem, strength: float, start: Tensor | None = None) -> Tensor:
    return _minimise(problem, convex.squared_hinge, strength, start)


def _minimise(problem: _Problem, loss: convex.Loss, strength: float, start: Tensor | None) -> Tensor:
    return convex.minimise(problem.x, problem.y, problem.trains(), problem.classes, loss, strength, start)


def _solve_means(problem: _Problem, strength: float, start: Tensor | None = None) -> Tensor:
    """Class means compared under the covariance within classes, shrunk by `strength` towards a multiple of one.

    Strength 1 is the nearest class mean; near 0, linear discriminant analysis (Friedman, 1989). Classes are as likely
    as they were frequent: no temperature could mend equal priors where one class is rare.
    """
    weights = torch.zeros(problem.x.shape[1] + 1, problem.folds + 1, problem.classes)
    for part, moments in enumerate(problem.moments):
        level = moments.covariance.diagonal().sum() / (problem.dim or problem.x.shape[1])
        if level < 1e-6:  # one picture a class: nothing is known of how classes vary
            level = torch.ones(())
        covariance = moments.covariance * (1 - strength)
        covariance.diagonal().add_(strength * level)
        solved = torch.linalg.solve(covariance, moments.means.T)
        weights[:-1, part] = solved
        bias = -0.5 * (moments.means.T * solved).sum(0) + (moments.counts / moments.counts.sum()).log()
        known = moments.counts > 0
        weights[-1, part] = torch.where(known, bias, bias[known].min())  # as far off as the farthest
    return weights


_SOLVERS = {"logistic": _solve_logistic, "svm": _solve_svm, "means": _solve_means}


def _tune_linear(kind: str, grid: Sequence[float], first: int) -> Callable[[_Problem], _Trial]:
    """A function that walks downhill on a grid of strengths, each solution starting where its neighbour ended."""

    def tune(problem: _Problem) -> _Trial:
        trials: dict[int, _Trial] = {}
        solutions: dict[int, Tensor] = {}

        def loss_at(place: int) -> float:
            if not 0 <= place < len(grid):
                return math.inf
            if place not in trials:
                start = solutions[min(solutions, key=lambda known: abs(known - place))] if solutions else None
                solutions[place] = _SOLVERS[kind](problem, grid[place], start)
                logits = torch.tensordot(problem.x, solutions[place][:-1], 1) + solutions[place][-1]
                trials[place] = _judge(problem, kind, grid[place], problem.held_out(logits), solutions[place][:, -1])
            return trials[place].candidate.log_loss

        here = first
        step = -1 if loss_at(here - 1) < loss_at(here) else 1
        while loss_at(here + step) < loss_at(here):
            here += step
        return trials[here]

    return tune


def _tune(problem: _Problem, kinds: Sequence[str]) -> dict[str, _Trial]:
    """The best of each kind, and of what a blend is made of."""
    needed = dict.fromkeys((*kinds, *(BLENDED if "blend" in kinds else ())))
    trials = {kind: _TUNERS[kind](problem) for kind in needed if kind != "blend"}
    if "blend" in kinds:
        trials["blend"] = _blend(problem, tuple(trials[kind] for kind in BLENDED))
    return trials


def _blend(problem: _Problem, parts: tuple[_Trial, ...]) -> _Trial:
    """The mean of what heads say once each is as sure as its answers out of fold allow; linear, as they are."""
    logits = _mix(parts, [torch.from_numpy(part.logits) for part in parts]).numpy()
    return _judge(problem, "blend", 1 / len(parts), logits, None, parts)


def _mix(parts: Sequence[_Trial], values: Sequence[Tensor]) -> Tensor:
    """The mean of logits or weights of heads, each divided by its temperature."""
    return torch.stack([value / part.temperature for part, value in zip(parts, values, strict=True)]).mean(0)


def _judge(
    problem: _Problem,
    kind: str,
    strength: float,
    logits: NDArray[np.float32],
    weights: Tensor | None,
    parts: tuple[_Trial, ...] = (),
) -> _Trial:
    y = problem.truth
    temperature, log_loss = find_temperature(logits, y, problem.multi)
    right = (logits > 0) == y if problem.multi else logits.argmax(1) == y
    return _Trial(Candidate(kind, strength, log_loss, float(right.mean())), logits, temperature, weights, parts)


def _tune_knn(problem: _Problem) -> _Trial:
    """The number of neighbours: all of them from one search."""
    smallest = int(problem.trains().sum(0).min())
    numbers = [k for k in (1, 3, 5, 9, 15, 25, 51) if k <= smallest]
    x = nn.functional.normalize(problem.x, dim=1)
    votes: list[list[Tensor]] = []
    for rows in torch.split(torch.arange(len(x)), QUERIES):
        likeness = x[rows] @ x.T
        likeness[problem.fold[rows][:, None] == problem.fold] = -math.inf
        nearest = likeness.topk(numbers[-1], dim=1).indices
        votes.append(_vote(problem.y[nearest], problem.classes, numbers))
    logits = [problem.average(torch.cat(chunks)).numpy() for chunks in zip(*votes, strict=True)]
    trials = [_judge(problem, "knn", k, found, None) for k, found in zip(numbers, logits, strict=True)]
    return min(trials, key=lambda trial: trial.candidate.log_loss)


def _vote(labels: Tensor, classes: int, numbers: Sequence[int]) -> list[Tensor]:
    """For each k, log((votes of the k nearest + 1) / (k + classes)), (n, classes), of neighbours' labels (n, most)."""
    results, counts, seen = [], torch.zeros(len(labels), classes), 0
    for k in numbers:
        more = labels[:, seen:k]
        counts = counts.scatter_add(1, more, torch.ones(more.shape))
        results.append(torch.log((counts + 1) / (k + classes)))
        seen = k
    return results


_HALF_DECADES = [10 ** (exponent / 2) for exponent in range(-10, 7)]  # 1e-5 to 1e3
_TUNERS: dict[str, Callable[[_Problem], _Trial]] = {
    "logistic": _tune_linear("logistic", _HALF_DECADES, 9),
    "svm": _tune_linear("svm", _HALF_DECADES, 11),
    "means": _tune_linear("means", [0.01, 0.03, 0.1, 0.3, 0.6, 0.8, 0.9, 0.97, 1.0], 6),
    "knn": _tune_knn,
}
