"""What the contest's rows say: figures with intervals, differences, ranks."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from entrants import ARMS, CONTENDERS, CUT, FULL, OURS, OURSELVES, RIVALS, SEEDS, SETS, UNSEEN, VARIANTS
from headstart import metrics
from headstart.metrics import Comparison, Estimate

RESAMPLES = 1000

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Result:
    """An entrant's runs on a set, whole or cut: one for each seed, all on the same n test pictures."""

    name: str  # of the set
    truth: NDArray[np.int64]  # (n,)
    predicted: NDArray[np.int64]  # (seeds, n)
    right: NDArray[np.bool_]  # (seeds, n)
    accuracy: float  # mean over the seeds
    seconds: float  # mean over the seeds
    memory: int  # bytes, the most


class Standing(NamedTuple):
    """Where an entrant stands over several sets and cuts."""

    rank: float  # mean; those that tie share theirs
    error: float  # mean
    ratio: float  # geometric mean of its time over headstart's


Entrants = Mapping[str, Result]
Results = dict[tuple[str, str], dict[str, Result]]  # (set, cut) -> entrant -> result


# From rows to results


def keep_current(rows: Sequence[Row]) -> list[Row]:
    """The rows without those of headstart that were measured with another source than its last one."""
    sources = [row["source"] for row in rows if "source" in row]
    return [row for row in rows if row.get("source") in (None, *sources[-1:])]


def collect(rows: Sequence[Row]) -> Results:
    """The results by set and cut, in their order; an entrant is left out where a seed of its is missing.

    Raises:
        ValueError: where rows of a set, cut and seed are not of the same pictures.
    """
    seen: dict[tuple[Any, ...], str] = {}
    for row in rows:
        place = row["set"], row["cut"], row["seed"]
        if seen.setdefault(place, row["pictures"]) != row["pictures"]:
            raise ValueError(f"{place}: {row['entrant']} had other pictures than those before")
    by_run = {(row["set"], row["cut"], row["entrant"], row["seed"]): row for row in rows}
    results: Results = {(name, cut): {} for cut in SEEDS for name in SETS}
    for (name, cut), entrants in results.items():
        for entrant in (*OURS, *RIVALS):
            keys = [(name, cut, entrant, seed) for seed in SEEDS[cut]]
            if all(key in by_run for key in keys):
                entrants[entrant] = merge([by_run[key] for key in keys])
    return results


def merge(runs: Sequence[Row]) -> Result:
    name, truth, predicted = runs[0]["set"], np.array(runs[0]["true"]), np.array([row["predicted"] for row in runs])
    seconds, memory = float(np.mean([row["seconds"] for row in runs])), max(row["memory"] for row in runs)
    right = predicted == truth
    return Result(name, truth, predicted, right, float(right.mean()), seconds, memory)


# Which results are looked at


def get_rivals(entrants: Entrants) -> dict[str, Result]:
    """The rivals that have run; of variants, once the first has, the most accurate, and the fastest where they tie."""
    rivals = {name: entrants[name] for name in RIVALS if name in entrants}
    for name, variants in VARIANTS.items():
        found = [rivals.pop(variant) for variant in variants if variant in rivals]
        if name in entrants:
            rivals[name] = max(found, key=lambda result: (result.accuracy, -result.seconds))
    return rivals


def get_contenders(entrants: Entrants) -> dict[str, Result]:
    """The rivals that have run, by `get_rivals`, and after them headstart."""
    ours = {OURSELVES: entrants[OURSELVES]} if OURSELVES in entrants else {}
    return {**get_rivals(entrants), **ours}


def get_arms(entrants: Entrants) -> dict[str, Result]:
    """The single strategies that have run."""
    return {name: entrants[name] for name in ARMS if name in entrants}


def list_whole(results: Results, others: Sequence[str] = CONTENDERS) -> Results:
    """The sets and cuts on which headstart and all others have run."""
    return {place: found for place, found in results.items() if {OURSELVES, *others} <= set(found)}


def group(results: Results) -> dict[str, Results]:
    """The sets and cuts over which means are taken, by what they are called."""

    def take(wanted: Callable[[str, str], bool]) -> Results:
        return {place: found for place, found in results.items() if wanted(*place)}

    return {
        "all sets and cuts": results,
        f"{FULL} sets": take(lambda name, cut: cut == FULL),
        f"cuts to {CUT}": take(lambda name, cut: cut == CUT),
        f"{' and '.join(UNSEEN)}, {FULL} and cut": take(lambda name, cut: name in UNSEEN),
    }


# Figures


@functools.cache
def draw(name: str, truth: tuple[int, ...], seeds: int) -> NDArray[np.uint16]:
    """How often each seed's pictures are drawn, (resamples, seeds * n): pictures within classes, and seeds as well.

    What is drawn hangs on the set's name, so sets are drawn independently of each other; a set and its cuts have the
    same test pictures, and so the same draws of them.
    """
    of_pictures = metrics.draw_weights(np.array(truth), (), RESAMPLES, seed=zlib.crc32(f"{name} pictures".encode()))
    of_seeds = metrics.draw_weights(np.zeros(seeds, np.int64), (), RESAMPLES, seed=zlib.crc32(f"{name} cuts".encode()))
    return (of_seeds[:, :, None] * of_pictures[:, None, :]).reshape(RESAMPLES, -1)


def draw_for(result: Result) -> NDArray[np.uint16]:
    return draw(result.name, tuple(result.truth.tolist()), len(result.predicted))


def estimate(result: Result) -> tuple[Estimate, Estimate]:
    """Accuracy, by Wilson's interval, and balanced accuracy, by bootstrap; of several seeds the means, by bootstrap."""
    right, seeds, n = result.right.ravel(), len(result.predicted), len(result.truth)
    given = np.eye(max(result.truth.max(), result.predicted.max()) + 1)[result.predicted.ravel()]
    recalls = metrics.balanced_accuracy(given, np.tile(result.truth, seeds))
    balanced = metrics.bootstrap(recalls, draw_for(result), n, share=True)
    if seeds == 1:
        return metrics.wilson(right.sum(), n), balanced
    return metrics.bootstrap(share_of(right), draw_for(result), n, share=True), balanced


def share_of(right: NDArray[np.bool_]) -> metrics.Metric:
    return metrics.hit_share(right, np.ones_like(right))


def compare(first: Result, second: Result) -> Comparison:
    """The paired difference of accuracies, first minus second; of several seeds the mean, without a p-value."""
    if len(first.predicted) == 1:
        return metrics.compare(first.right[0], second.right[0])
    return metrics.compare_drawn(first.right.ravel(), second.right.ravel(), draw_for(first))


def is_behind(first: Result, second: Result) -> bool:
    """Whether the first is less accurate by more than the interval of the difference."""
    difference = compare(first, second).difference
    return difference.value < 0 and not difference.high >= 0


def list_ahead(ours: Result, others: Entrants) -> list[str]:
    """Those of the others that we are behind."""
    return [name for name, other in others.items() if is_behind(ours, other)]


def rank(results: Results) -> dict[str, Standing]:
    """The standings of headstart and its rivals over the sets and cuts on which all have run."""
    tables = [get_contenders(found) for found in list_whole(results).values()]
    if not tables:
        return {}
    names = list(tables[0])
    accuracies = np.array([[table[name].accuracy for name in names] for table in tables])
    better = (accuracies[:, None, :] > accuracies[:, :, None]).sum(2)
    even = (accuracies[:, None, :] == accuracies[:, :, None]).sum(2)
    ratios = np.log([[table[name].seconds / table[OURSELVES].seconds for name in names] for table in tables])
    columns = ((better + (even + 1) / 2).mean(0), (1 - accuracies).mean(0), np.exp(ratios.mean(0)))
    return {name: Standing(*map(float, figures)) for name, *figures in zip(names, *columns)}


def draw_errors(results: Results, name: str) -> NDArray[np.float64]:
    """The mean error of an entrant over sets in each resample of their pictures and cuts, (resamples,)."""
    errors = []
    for found in list_whole(results).values():
        result = get_contenders(found)[name]
        errors.append(1 - share_of(result.right.ravel())(draw_for(result).astype(np.float64)))
    mean: NDArray[np.float64] = np.mean(errors, 0)
    return mean
