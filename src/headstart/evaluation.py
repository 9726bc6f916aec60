"""A classifier's figures on labelled pictures: every one with its interval and its n."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart import metrics
from headstart.data import Sample, Task
from headstart.metrics import Estimate
from headstart.model import Classifier, to_probabilities

TOP_K = 5


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Probabilities, decisions and targets of pictures, in order, and the metrics of them."""

    role: str
    task: Task
    classes: tuple[str, ...]
    sources: tuple[str, ...]
    probabilities: NDArray[np.float64]  # (n, classes)
    decisions: NDArray[np.bool_]  # (n, classes)
    targets: NDArray[np.bool_]  # (n, classes)
    metrics: Mapping[str, Estimate]
    by_class: Mapping[str, Mapping[str, Any]]  # precision, recall, f1 as estimates, support as a number
    unreadable: Mapping[str, str] = field(default_factory=dict)  # source -> reason; these are not in n
    fitted_on: int | None = 0  # how many of the pictures the classifier was fitted on; None where that is unknown

    @property
    def undefined(self) -> tuple[str, ...]:
        """Labels without a positive or without a negative picture; they are left out of means."""
        return tuple(label for label, row in self.by_class.items() if math.isnan(row["f1"].value))

    def to_json(self) -> dict[str, Any]:
        """What stands in `metrics.json`."""
        classes = {
            label: {name: value.to_json() if isinstance(value, Estimate) else value for name, value in row.items()}
            for label, row in self.by_class.items()
        }
        figures = {name: estimate.to_json() for name, estimate in self.metrics.items()}
        return {"role": self.role, "n": len(self.sources), "metrics": figures, "classes": classes}

    def to_csv(self) -> str:
        """What stands in `predictions.csv`: source, target, label, confidence, then a column for each class."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(("source", "target", "label", "confidence", *(f"p:{label}" for label in self.classes)))
        for i, source in enumerate(self.sources):
            row, given = self.probabilities[i], self.decisions[i]
            target = "|".join(self.classes[c] for c in np.flatnonzero(self.targets[i]))
            label = "|".join(self.classes[c] for c in np.flatnonzero(given))
            confidence = "|".join(f"{value:.6g}" for value in row[given])
            writer.writerow((source, target, label, confidence, *(f"{value:.6g}" for value in row)))
        return text.getvalue()


def encode(samples: Sequence[Sample], classes: Sequence[str]) -> NDArray[np.bool_]:
    """The samples' labels as booleans (n, classes)."""
    number = {label: i for i, label in enumerate(classes)}
    targets = np.zeros((len(samples), len(classes)), bool)
    for row, sample in enumerate(samples):
        targets[row, [number[label] for label in sample.labels]] = True
    return targets


def score(
    logits: NDArray[np.float32], samples: Sequence[Sample], classes: Sequence[str], task: Task
) -> dict[str, float]:
    """The metrics of logits (n, classes) after the best temperature, without intervals: to compare epochs by.

    All are NaN where a logit is not finite.
    """
    targets, multi = encode(samples, classes), task == "multi"
    if not np.isfinite(logits).all():
        return dict.fromkeys(score(np.zeros_like(logits), samples, classes, task), math.nan)
    temperature, loss = metrics.find_temperature(logits, targets if multi else targets.argmax(1), multi)
    probabilities = to_probabilities(logits, temperature, task)
    chosen, once = _multi if multi else _single, np.ones((1, len(samples)), np.uint16)
    figures = chosen(probabilities, probabilities >= 0.5, targets, once, grouped=False)
    return {"log_loss": loss, **{name: estimate.value for name, estimate in figures.items() if name != "log_loss"}}


def assess(
    classifier: Classifier,
    features: NDArray[np.float32],
    samples: Sequence[Sample],
    role: str = "report",
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """The evaluation of a classifier on pictures' features.

    Args:
        classifier: the classifier.
        features: (n, dim), in the samples' order.
        samples: the pictures; their labels are classes of the classifier.
        role: what to call these pictures.
        resamples: bootstrap resamples for the intervals.
        seed: seed of the resamples.
    """
    targets = encode(samples, classifier.classes)
    probabilities = classifier.classify(features)
    decisions = classifier.decide(probabilities)
    groups = [sample.group for sample in samples]
    # Several labels have no one class to draw within: pictures are then drawn from all.
    strata = targets.argmax(1) if classifier.task == "single" else np.zeros(len(samples), np.int64)
    weights = metrics.draw_weights(strata, groups, resamples, seed)
    chosen = _single if classifier.task == "single" else _multi
    figures = chosen(probabilities, decisions, targets, weights, grouped=any(groups))
    by_class = _by_class(classifier.task, classifier.classes, decisions, targets, weights, grouped=any(groups))
    sources = tuple(sample.source for sample in samples)
    return Evaluation(
        role, classifier.task, classifier.classes, sources, probabilities, decisions, targets, figures, by_class
    )


def _single(
    probabilities: NDArray[np.float64],
    decisions: NDArray[np.bool_],
    targets: NDArray[np.bool_],
    weights: NDArray[np.uint16],
    grouped: bool,
) -> dict[str, Estimate]:
    truth, n = targets.argmax(1), len(targets)
    correct = metrics.top_k_hits(probabilities, truth, 1)
    found = {"accuracy": metrics.proportion(correct, weights, grouped)}
    found["balanced_accuracy"] = metrics.bootstrap(
        metrics.balanced_accuracy(probabilities, truth), weights, n, share=True
    )
    found["macro_f1"] = metrics.bootstrap(metrics.macro_f1(probabilities, truth), weights, n, share=True)
    if targets.shape[1] > TOP_K:
        found["top_5_accuracy"] = metrics.proportion(metrics.top_k_hits(probabilities, truth, TOP_K), weights, grouped)
    found["log_loss"] = metrics.bootstrap(metrics.log_loss(probabilities, truth), weights, n)
    ece = metrics.expected_calibration_error(probabilities.max(1), correct)
    found["ece"] = metrics.bootstrap(ece, weights, n)
    return found


def _multi(
    probabilities: NDArray[np.float64],
    decisions: NDArray[np.bool_],
    targets: NDArray[np.bool_],
    weights: NDArray[np.uint16],
    grouped: bool,
) -> dict[str, Estimate]:
    n, defined = len(targets), _defined(targets)
    micro = metrics.multi_label_f1(decisions, targets, "micro")
    macro = metrics.multi_label_f1(decisions[:, defined], targets[:, defined], "macro")
    return {
        "map": metrics.bootstrap(metrics.mean_average_precision(probabilities, targets), weights, n, share=True),
        "micro_f1": metrics.bootstrap(micro, weights, n, share=True),
        "macro_f1": metrics.bootstrap(macro, weights, n, share=True),
        "subset_accuracy": metrics.proportion((decisions == targets).all(1), weights, grouped),
    }


def _defined(targets: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(classes,) whether a label has a positive and a negative picture, without which its figures mean nothing."""
    positive = targets.sum(0)
    defined: NDArray[np.bool_] = (positive > 0) & (positive < len(targets))
    return defined


def _by_class(
    task: Task,
    classes: Sequence[str],
    decisions: NDArray[np.bool_],
    targets: NDArray[np.bool_],
    weights: NDArray[np.uint16],
    grouped: bool,
) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    defined = _defined(targets) if task == "multi" else np.ones(len(classes), bool)
    for number, label in enumerate(classes):
        given, true = decisions[:, number], targets[:, number]
        support = int(true.sum())
        if defined[number]:
            f1 = metrics.multi_label_f1(given[:, None], true[:, None], "macro")
            figures = (
                metrics.proportion(true, weights, grouped, among=given),
                metrics.proportion(given, weights, grouped, among=true),
                metrics.bootstrap(f1, weights, len(true), share=True),
            )
        else:
            figures = (Estimate(math.nan, math.nan, math.nan, len(true)),) * 3
        rows[label] = {**dict(zip(("precision", "recall", "f1"), figures, strict=True)), "support": support}
    return rows
