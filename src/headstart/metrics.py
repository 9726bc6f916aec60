"""What a metric is: a function of probabilities and targets of a whole split, with its interval and its n.

Proportions carry Wilson intervals, the rest percentile-bootstrap intervals: pictures are drawn again within their
class, or whole groups where groups exist. Every metric is a function of weights, one a picture: all ones give the
value, and how often each picture was drawn gives a resample, so all resamples are a few matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Metric = Callable[[Floats], Floats]  # weights (resamples, n) -> values (resamples,)

ECE_BINS = 15
TINY = 1e-12
_CHUNK_VALUES = 4_000_000  # weights that are worked on at a time


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval and how many pictures it is of; NaN where it is not defined."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"not defined, n={self.n}"
        if math.isnan(self.low):
            return f"{self.value:.3f} [too few pictures to tell] n={self.n}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] n={self.n}"

    def to_json(self) -> dict[str, float | int | None]:
        """The estimate as JSON values; null where it is not defined."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {**{name: None if math.isnan(x) else x for name, x in numbers.items()}, "n": self.n}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Estimate:
        """The estimate that `to_json` gave."""
        value, low, high = (math.nan if values[name] is None else values[name] for name in ("value", "low", "high"))
        return Estimate(value, low, high, values["n"])


def wilson(successes: float, n: int) -> Estimate:
    """A proportion with its Wilson score interval (Wilson, 1927)."""
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    z, p = 1.959963984540054, successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Estimate(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)


@dataclass(frozen=True)
class Comparison:
    """How much more often one of two is right on the same pictures: the difference of accuracies, and a p-value."""

    difference: Estimate
    p_value: float | None  # None where pictures, or whole runs, are drawn

    def __str__(self) -> str:
        d, told = self.difference, "" if self.p_value is None else f", p = {self.p_value:.2g}"
        if math.isnan(d.low):
            return f"{d.value:+.3f} [too few pictures to tell]"
        return f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]{told}"

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {"difference": self.difference.to_json(), "p_value": self.p_value}


def compare(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Comparison:
    """The paired difference of two accuracies, first minus second, on the same pictures.

    The interval is Newcombe's for paired proportions (1998, method 10), made of Wilson's two; the p-value is that of
    McNemar's exact test (1947).

    Args:
        first: (n,) whether one classifier is right.
        second: (n,) whether the other is, picture by picture.
    """
    n = len(first)
    if n == 0 or n != len(second):
        raise ValueError(f"two results of the same pictures are compared, not of {n} and {len(second)}")
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    one, other = wilson(both + only_first, n), wilson(both + only_second, n)
    association: float = both * neither - only_first * only_second
    if association > 0:
        association = max(association - n / 2, 0)
    scale = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    phi = association / math.sqrt(scale) if scale else 0.0

    def reach(towards: float, away: float) -> float:
        return math.sqrt(max(0.0, towards**2 - 2 * phi * towards * away + away**2))

    value = (only_first - only_second) / n
    low = value - reach(one.value - one.low, other.high - other.value)
    high = value + reach(one.high - one.value, other.value - other.low)
    odd = only_first + only_second
    tail = sum(math.comb(odd, k) for k in range(min(only_first, only_second) + 1)) / 2**odd
    return Comparison(Estimate(value, max(-1.0, low), min(1.0, high), n), min(1.0, 2 * tail))


def compare_drawn(first: NDArray[np.bool_], second: NDArray[np.bool_], weights: NDArray[Any]) -> Comparison:
    """The paired difference of two accuracies, first minus second, by bootstrap, and no p-value.

    Args:
        first: (n,) whether one classifier is right.
        second: (n,) whether the other is, picture by picture.
        weights: (resamples, n) how often each picture is drawn, with all of its group.
    """
    gain = first.astype(np.float32) - second

    def difference(weights: Floats) -> Floats:
        found: Floats = (weights @ gain) / weights.sum(1)
        return found

    return Comparison(bootstrap(difference, weights, len(gain)), None)


def draw_weights(strata: NDArray[np.int64], groups: Sequence[str], resamples: int, seed: int) -> NDArray[np.uint16]:
    """How often each picture is drawn in each resample, (resamples, n); of 16 bits, as there are many.

    Pictures are drawn within their stratum. Where groups are given (not all empty), whole groups are drawn instead;
    a picture without one is its own group.
    """
    random, n = np.random.default_rng(seed), len(strata)
    if any(groups):
        names: dict[str, int] = {}
        of_group = np.array([names.setdefault(g or f"\0{i}", len(names)) for i, g in enumerate(groups)])
        return _draw(random, resamples, len(names))[:, of_group]
    weights = np.zeros((resamples, n), np.uint16)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        weights[:, members] = _draw(random, resamples, len(members))
    return weights


def _draw(random: np.random.Generator, resamples: int, n: int) -> NDArray[np.uint16]:
    counts = np.empty((resamples, n), np.uint16)
    step = max(1, _CHUNK_VALUES // n)
    for start in range(0, resamples, step):
        some = min(step, resamples - start)
        drawn = random.integers(0, n, (some, n)) + n * np.arange(some)[:, None]
        counts[start : start + some] = np.bincount(drawn.ravel(), minlength=some * n).reshape(some, n)
    return counts


def proportion(
    hits: NDArray[np.bool_], weights: NDArray[Any], grouped: bool, among: NDArray[np.bool_] | None = None
) -> Estimate:
    """The share of hits (among some pictures), by Wilson's interval, or where groups are drawn, by bootstrap."""
    among = np.ones(len(hits), bool) if among is None else among
    n = int(among.sum())
    if grouped and n:
        return bootstrap(hit_share(hits, among), weights, n, share=True)
    return wilson(float((hits & among).sum()), n)


def bootstrap(metric: Metric, weights: NDArray[Any], n: int, share: bool = False) -> Estimate:
    """A metric's value, and its percentile interval over the resamples.

    Where all resamples agree, because no picture or every picture is wrong, they say nothing about what others would
    give: a metric that is a share of pictures at heart (`share`) then has Wilson's interval, another none.
    """
    value = float(metric(np.ones((1, weights.shape[1]), np.float32))[0])
    step = max(1, _CHUNK_VALUES // max(1, weights.shape[1]))
    chunks = (weights[i : i + step].astype(np.float32) for i in range(0, len(weights), step))
    values = np.concatenate([metric(chunk) for chunk in chunks])
    values = values[~np.isnan(values)]
    if math.isnan(value) or not len(values):
        return Estimate(value, math.nan, math.nan, n)
    low, high = np.quantile(values, (0.025, 0.975))
    if high - low < 1e-9:
        return wilson(value * n, n) if share else Estimate(value, math.nan, math.nan, n)
    return Estimate(value, float(low), float(high), n)


# Metrics of one label a picture: probabilities (n, classes), targets (n,)


def top_k_hits(probabilities: Floats, targets: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """(n,) whether each picture's class is among the k most probable; k = 1 is accuracy's numerator.

    Equal probabilities are ranked by class order, so exactly k classes are looked at.
    """
    own = np.take_along_axis(probabilities, targets[:, None], 1)
    earlier = np.arange(probabilities.shape[1]) < targets[:, None]
    rank = (probabilities > own).sum(1) + ((probabilities == own) & earlier).sum(1)
    hits: NDArray[np.bool_] = rank < k
    return hits


def balanced_accuracy(probabilities: Floats, targets: NDArray[np.int64]) -> Metric:
    """The mean of the classes' recalls; classes without pictures are left out."""
    counts = _counts_single(probabilities, targets)

    def metric(weights: Floats) -> Floats:
        true, _, support = counts(weights)
        return _nan_mean(_ratio(true, support))

    return metric


def macro_f1(probabilities: Floats, targets: NDArray[np.int64]) -> Metric:
    """The mean of the classes' F1; classes without pictures are left out."""
    counts = _counts_single(probabilities, targets)

    def metric(weights: Floats) -> Floats:
        true, predicted, support = counts(weights)
        f1 = _ratio(2 * true, predicted + support)
        return _nan_mean(np.where(support > 0, f1, np.nan))

    return metric


def log_loss(probabilities: Floats, targets: NDArray[np.int64]) -> Metric:
    """The mean of -log of the right class's probability, natural logarithm."""
    own = np.take_along_axis(probabilities, targets[:, None], 1)[:, 0]
    losses = -np.log(np.maximum(own.astype(np.float64), TINY))
    return lambda weights: _mean(weights, losses)


def expected_calibration_error(confidences: Floats, correct: NDArray[np.bool_]) -> Metric:
    """Mean gap between confidence and accuracy over 15 equal bins of confidence (Guo et al., 2017)."""
    bins = np.minimum((confidences * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    gaps = np.zeros((len(bins), ECE_BINS), np.float64)
    gaps[np.arange(len(bins)), bins] = correct.astype(np.float64) - confidences
    return lambda weights: np.abs(weights @ gaps).sum(1) / weights.sum(1)


# Metrics of several labels a picture: probabilities, decisions and targets (n, classes)


def mean_average_precision(probabilities: Floats, targets: NDArray[np.bool_]) -> Metric:
    """The mean over labels of average precision; a label needs a positive and a negative picture to count.

    Average precision is the sum over thresholds of precision times the step in recall, equal scores being one step.
    """
    defined = [label for label in range(targets.shape[1]) if 0 < targets[:, label].sum() < len(targets)]
    negative = (~targets[:, defined]).astype(np.float64)
    parts = [average_precision(probabilities[:, label], targets[:, label]) for label in defined]

    def metric(weights: Floats) -> Floats:
        if not parts:
            return np.full(len(weights), np.nan)
        values = np.stack([part(weights) for part in parts], 1)
        return _nan_mean(np.where(weights @ negative > 0, values, np.nan))

    return metric


def average_precision(scores: Floats, targets: NDArray[np.bool_]) -> Metric:
    """Average precision of one label; not defined without a positive."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # the last picture of each run of equal scores

    def metric(weights: Floats) -> Floats:
        ordered = weights[:, order].astype(np.float64)
        hits = np.cumsum(ordered * targets[order], 1)[:, last]
        seen = np.cumsum(ordered, 1)[:, last]
        steps = np.diff(hits, prepend=0.0)
        return _ratio((steps * _ratio(hits, seen, empty=0.0)).sum(1), hits[:, -1])

    return metric


def multi_label_f1(decisions: NDArray[np.bool_], targets: NDArray[np.bool_], average: str) -> Metric:
    """F1 of decisions: `micro` over all labels together, `macro` the mean of the labels that have a positive."""
    true_each = (decisions & targets).astype(np.float64)
    both_each = decisions.astype(np.float64) + targets
    positive = targets.astype(np.float64)

    def metric(weights: Floats) -> Floats:
        true, both = weights @ true_each, weights @ both_each
        if average == "micro":
            return _ratio(2 * true.sum(1), both.sum(1))
        return _nan_mean(np.where(weights @ positive > 0, _ratio(2 * true, both, empty=0.0), np.nan))

    return metric


def hit_share(hits: NDArray[np.bool_], among: NDArray[np.bool_]) -> Metric:
    """The share of `hits` among some pictures: precision among those given a label, recall among those that have it."""
    both, all_of = (hits & among).astype(np.float64), among.astype(np.float64)
    return lambda weights: _ratio(weights @ both, weights @ all_of)


# Calibration: the scalar that makes probabilities honest, and the thresholds of labels


def find_temperature(logits: Floats, targets: NDArray[Any], multi: bool) -> tuple[float, float]:
    """(the temperature by which logits are divided so that the log-loss is least, the log-loss) (Guo et al., 2017).

    Args:
        logits: (n, classes), of pictures that the head was not fitted on.
        targets: (n,) class numbers, or (n, classes) with several labels a picture.
        multi: whether pictures have several labels.
    """
    # Pictures that are all told apart would ask for a temperature of 0, and boundless confidence. In the spirit of
    # Platt's scaling (Platt, 1999) one picture more is counted, which is as likely of one class as of another.
    doubt = 1 / (len(logits) + 2)

    def loss(log_temperature: float) -> float:
        scaled: Floats = logits / math.exp(log_temperature)
        return float((1 - doubt) * mean_loss(scaled, targets, multi) + doubt * _doubtful_loss(scaled, multi))

    # Golden-section search; the log-loss has one minimum in 1/temperature.
    low, high, ratio = math.log(1e-3), math.log(1e3), (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    loss_left, loss_right = loss(left), loss(right)
    for _ in range(36):
        if loss_left <= loss_right:
            high, right, loss_right = right, left, loss_left
            left = high - ratio * (high - low)
            loss_left = loss(left)
        else:
            low, left, loss_left = left, right, loss_right
            right = low + ratio * (high - low)
            loss_right = loss(right)
    temperature = math.exp((low + high) / 2)
    return temperature, mean_loss(logits / temperature, targets, multi)


def _doubtful_loss(logits: Floats, multi: bool) -> float:
    """Mean log-loss where every class is as likely as another to be the right one."""
    if multi:
        return float(np.mean(np.logaddexp(0.0, logits.astype(np.float64)) - 0.5 * logits))
    shifted = (logits - logits.max(1, keepdims=True)).astype(np.float64)
    return float(np.mean(np.log(np.exp(shifted).sum(1)) - shifted.mean(1)))


def mean_loss(logits: Floats, targets: NDArray[Any], multi: bool) -> float:
    """Mean log-loss of logits over pictures (over pictures and labels with several labels a picture)."""
    return float(losses_of(logits, targets, multi).mean())


def losses_of(logits: Floats, targets: NDArray[Any], multi: bool) -> NDArray[np.float64]:
    """The log-loss of each picture, (n,), of logits (n, classes); with several labels a picture, its labels' mean."""
    if multi:
        signed = np.where(targets, -logits, logits).astype(np.float64)
        means: NDArray[np.float64] = np.logaddexp(0.0, signed).mean(1)
        return means
    shifted = (logits - logits.max(1, keepdims=True)).astype(np.float64)
    own = np.take_along_axis(shifted, targets[:, None], 1)[:, 0]
    losses: NDArray[np.float64] = np.log(np.exp(shifted).sum(1)) - own
    return losses


def find_thresholds(probabilities: Floats, targets: NDArray[np.bool_], fewest: int = 10) -> tuple[float, ...]:
    """For each label the probability from which it is given, so that its F1 is greatest.

    A label with fewer than `fewest` positive or negative pictures keeps 0.5: its best threshold would be luck.
    """
    thresholds = []
    for scores, truth in zip(probabilities.T, targets.T, strict=True):
        if min(truth.sum(), (~truth).sum()) < fewest:
            thresholds.append(0.5)
            continue
        order = np.argsort(-scores, kind="stable")
        last = np.append(np.diff(scores[order]) != 0, True)
        f1 = 2 * np.cumsum(truth[order]) / (np.arange(1, len(order) + 1) + truth.sum())
        best = int(np.argmax(np.where(last, f1, -1.0)))
        below = scores[order[best + 1]] if best + 1 < len(order) else 0.0
        above = float(scores[order[best]])
        middle = (above + float(below)) / 2
        thresholds.append(middle if middle > below else above)
    return tuple(thresholds)


def is_better(name: str, value: float, best: float) -> bool:
    """Whether a figure's value is better than the best so far (NaN: none yet); a value that is not finite never is."""
    if not math.isfinite(value):
        return False
    if math.isnan(best):
        return True
    return value < best if name in ("log_loss", "ece") else value > best


def _counts_single(
    probabilities: Floats, targets: NDArray[np.int64]
) -> Callable[[Floats], tuple[Floats, Floats, Floats]]:
    """A function from weights to (true positives, predicted, support), each (resamples, classes)."""
    classes, predicted = probabilities.shape[1], probabilities.argmax(1)
    right = predicted == targets

    def counts(weights: Floats) -> tuple[Floats, Floats, Floats]:
        return (
            _count_by(weights[:, right], targets[right], classes),
            _count_by(weights, predicted, classes),
            _count_by(weights, targets, classes),
        )

    return counts


def _count_by(weights: Floats, numbers: NDArray[np.int64], classes: int) -> Floats:
    """Sums of weights by class number, (resamples, classes)."""
    order = np.argsort(numbers, kind="stable")
    sums = np.zeros((len(weights), classes))
    if len(order):
        present, starts = np.unique(numbers[order], return_index=True)
        sums[:, present] = np.add.reduceat(weights[:, order], starts, axis=1, dtype=np.float64)
    return sums


def _mean(weights: Floats, values: Floats) -> Floats:
    mean: Floats = (weights @ values) / weights.sum(1)
    return mean


def _ratio(numerator: Floats, denominator: Floats, empty: float = math.nan) -> Floats:
    ratio: Floats = np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1.0), empty)
    return ratio


def _nan_mean(values: Floats) -> Floats:
    """Mean along the last axis of what is defined."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0.0).sum(-1), defined.sum(-1).astype(np.float64))
