"""What the contest's rows say: figures with intervals, places, claims and whether they hold, and the document of it.

contest.py makes the rows and calls `write_report`.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart import metrics
from headstart.files import write_whole
from headstart.metrics import Comparison, Estimate
from rivals import DESCRIPTIONS, ENTRANTS

# Entrants of ours and what they add to `headstart train TABLE`.
BUDGET = ("--time-budget", "5m")
OURS: dict[str, tuple[str, ...]] = {
    "headstart": (),
    "headstart-without-depths": ("--taps", "final"),
    "headstart-without-views": ("--views", "plain"),
    "headstart-5m": BUDGET,
    "headstart-5m-without-interpolation": (*BUDGET, "--interpolation", "100"),
    "probe-alone": ("--strategy", "probe"),
    "lp-ft": ("--strategy", "lp-ft"),
    "finetune": ("--strategy", "finetune"),
}
OURSELVES = "headstart"
ARMS = tuple(name for name in OURS if not name.startswith(OURSELVES))
# What is told by two entrants, the one with it first.
BROUGHT = {
    "depths": ("headstart", "headstart-without-depths"),
    "views": ("headstart", "headstart-without-views"),
    "training further": ("headstart-5m", "headstart"),
    "interpolation": ("headstart-5m", "headstart-5m-without-interpolation"),
}
FULL_ONLY = tuple(name for name in OURS if BUDGET[0] in OURS[name])  # of few pictures none are kept to choose by
RIVALS = tuple(ENTRANTS)
FASTAI = ("fastai", "fastai-lr-find")  # of which the better one counts
# Colours that the colour-blind tell apart (Okabe and Ito, 2008).
COLOURS = ("#000000", "#999999", "#0072B2", "#56B4E9", "#009E73", "#D55E00")
LOOKS = dict(zip((*RIVALS, OURSELVES), zip(COLOURS, "sD^vPo")))

SETS = ("hymenoptera", "dogscats", "imagewoof", "scenes", "flowers", "chest_xray")
LARGEST = {"flowers": 100}  # pictures a class that a set's training is cut to
FULL, CUT, SHOTS = "full", "10 a class", 10
SEEDS = {FULL: (0,), CUT: (0, 1, 2)}
EPOCHS = {"hymenoptera": 25}  # of the tutorial's loop; 10 elsewhere
RESAMPLES = 1000

INTRODUCTION = """\
headstart and its rivals on the same pictures, splits and cores, all from the same weights (EfficientNet-Lite0). This
page is made by `make contest` from [the rows of all runs](../benchmarks/contest.jsonl); no figure was typed in.

* Accuracy has Wilson's interval, balanced accuracy one by bootstrap. *headstart - this* is the paired difference of
  accuracies: Newcombe's interval and, as p, McNemar's exact test. With ten pictures a class all figures are means over
  three cuts, and all intervals are bootstrapped over pictures and cuts. All intervals are of 95 %, and a loss whose
  interval holds 0 is *within the noise*: n pictures cannot tell.
* Seconds are of whole processes, headstart's with an empty cache. Peak memory is that of a run's largest process: the
  workers with which the rivals load pictures come on top.
* In claims, ranks and means the more accurate of fastai's two rates counts on each set. Deep rivals: all but sklearn.
* hymenoptera and imagewoof are subsets of ImageNet, which the weights were trained on: that flatters everybody."""

Row = dict[str, Any]


# What the rows say


@dataclass(frozen=True, eq=False)
class Result:
    """An entrant's runs on a set, whole or cut: one for each seed, all on the same n test pictures."""

    truth: NDArray[np.int64]  # (n,)
    predicted: NDArray[np.int64]  # (seeds, n)
    right: NDArray[np.bool_]  # (seeds, n)
    accuracy: float  # mean over the seeds
    seconds: float  # mean over the seeds
    memory: int  # bytes, the most


Entrants = Mapping[str, Result]
Results = dict[tuple[str, str], dict[str, Result]]  # (set, cut) -> entrant -> result


def collect(rows: Sequence[Row]) -> Results:
    """The results by set and cut, in their order; an entrant is left out where a seed of its is missing."""
    by_run = {(row["set"], row["cut"], row["entrant"], row["seed"]): row for row in rows}
    results: Results = {(name, cut): {} for cut in SEEDS for name in SETS}
    for (name, cut), entrants in results.items():
        for entrant in (*OURS, *RIVALS):
            runs = [by_run.get((name, cut, entrant, seed)) for seed in SEEDS[cut]]
            if all(runs):
                entrants[entrant] = merge(runs)
    return results


def merge(runs: Sequence[Row]) -> Result:
    truth, predicted = np.array(runs[0]["true"]), np.array([row["predicted"] for row in runs])
    seconds, memory = float(np.mean([row["seconds"] for row in runs])), max(row["memory"] for row in runs)
    return Result(truth, predicted, predicted == truth, float(np.mean(predicted == truth)), seconds, memory)


@functools.cache
def draw(truth: tuple[int, ...], seeds: int) -> NDArray[np.uint16]:
    """How often each seed's pictures are drawn, (resamples, seeds * n): pictures within classes, and seeds as well."""
    of_pictures = metrics.draw_weights(np.array(truth), (), RESAMPLES, seed=0)
    of_seeds = metrics.draw_weights(np.zeros(seeds, np.int64), (), RESAMPLES, seed=1)
    return (of_seeds[:, :, None] * of_pictures[:, None, :]).reshape(RESAMPLES, -1)


def bootstrap(result: Result, metric: metrics.Metric) -> Estimate:
    weights = draw(tuple(result.truth.tolist()), len(result.predicted))
    return metrics.bootstrap(metric, weights, len(result.truth), share=True)


def estimate(result: Result) -> tuple[Estimate, Estimate]:
    """Accuracy, by Wilson's interval, and balanced accuracy, by bootstrap; of several seeds the means, by bootstrap."""
    right, seeds = result.right.ravel(), len(result.predicted)
    given = np.eye(max(result.truth.max(), result.predicted.max()) + 1)[result.predicted.ravel()]
    balanced = bootstrap(result, metrics.balanced_accuracy(given, np.tile(result.truth, seeds)))
    if seeds == 1:
        return metrics.wilson(right.sum(), len(right)), balanced
    return bootstrap(result, metrics.hit_share(right, np.ones_like(right))), balanced


def compare(first: Result, second: Result) -> Comparison:
    """The paired difference of accuracies, first minus second; of several seeds the mean, without a p-value."""
    if len(first.predicted) == 1:
        return metrics.compare(first.right[0], second.right[0])
    weights = draw(tuple(first.truth.tolist()), len(first.predicted))
    return metrics.compare_drawn(first.right.ravel(), second.right.ravel(), weights)


def is_behind(first: Result, second: Result) -> bool:
    """Whether the first is less accurate by more than the interval of the difference."""
    difference = compare(first, second).difference
    return difference.value < 0 and not difference.high >= 0


def get_rivals(entrants: Entrants) -> dict[str, Result]:
    """The rivals; of fastai's two rates the more accurate counts, and the faster one where they tie."""
    variants = [entrants[name] for name in FASTAI if name in entrants]
    rivals = {name: entrants[name] for name in RIVALS if name in entrants and name not in FASTAI}
    best = max(variants, key=lambda result: (result.accuracy, -result.seconds), default=None)
    return {**rivals, "fastai": best} if best else rivals


def get_arms(entrants: Entrants) -> dict[str, Result]:
    return {name: entrants[name] for name in ARMS if name in entrants}


def rank(results: Iterable[Entrants]) -> tuple[dict[str, tuple[float, float, float]], int]:
    """(mean rank, where ties share theirs, mean error and geometric mean of time / ours by entrant; of how many sets).

    The sets are those where headstart and every rival that has rows at all have theirs.
    """
    tables = [{OURSELVES: found[OURSELVES], **get_rivals(found)} for found in results if OURSELVES in found]
    names = sorted({name for table in tables for name in table})
    tables = [table for table in tables if set(names) <= set(table)]
    if not tables:
        return {}, 0
    accuracies = np.array([[table[name].accuracy for name in names] for table in tables])
    better = (accuracies[:, None, :] > accuracies[:, :, None]).sum(2)
    even = (accuracies[:, None, :] == accuracies[:, :, None]).sum(2)
    ratios = np.log([[table[name].seconds / table[OURSELVES].seconds for name in names] for table in tables])
    columns = ((better + (even + 1) / 2).mean(0), (1 - accuracies).mean(0), np.exp(ratios.mean(0)))
    return dict(zip(names, zip(*(column.tolist() for column in columns)))), len(tables)


# What is claimed, and whether it holds

Found = tuple[str, bool] | None  # in words and figures; None where there are no rows


def judge_places(results: Results, choose: Callable[[Entrants], Entrants]) -> Found:
    """On how many sets headstart is not behind the best of those chosen."""
    behind, count = [], 0
    for place, entrants in results.items():
        others, ours = choose(entrants), entrants.get(OURSELVES)
        if ours and others:
            best, count = max(others, key=lambda name: others[name].accuracy), count + 1
            if is_behind(ours, others[best]):
                behind.append(f"{', '.join(place)} ({best})")
    found = f"on {count - len(behind)} of {count} sets and cuts" + (f"; not on {'; '.join(behind)}" if behind else "")
    return (found, not behind) if count else None


def judge_mean(results: Results, figure: int, least: float) -> Found:
    """By how much a mean (0: rank, 1: error) of headstart is lower than that of the rival with the lowest."""
    standings, count = rank(results.values())
    rivals = [(figures[figure], name) for name, figures in standings.items() if name != OURSELVES]
    if not rivals:
        return None
    (best, name), ours = min(rivals), standings[OURSELVES][figure]
    lower = 1 - ours / best if best else 0.0
    found = f"{ours:.4f} against {best:.4f} ({name}): {-lower:+.1%}, over {count} sets and cuts"
    return found, lower > 0 and lower >= least


def judge_time(results: Results) -> Found:
    """On which full set headstart takes the largest share of the fastest deep rival's time."""
    shares = []
    for (name, cut), entrants in results.items():
        deep = [(entrants[rival].seconds, rival) for rival in RIVALS if rival in entrants and rival != "sklearn"]
        if cut == FULL and deep and OURSELVES in entrants:
            (fastest, rival), ours = min(deep), entrants[OURSELVES].seconds
            shares.append((ours / fastest, f"{name} ({ours:.0f} s against {fastest:.0f} s, {rival})"))
    if not shares:
        return None
    share, where = max(shares)
    return f"on {len(shares)} full sets at most {share:.3f} of it: {where}", share <= 1 / 3


def judge(results: Results) -> list[str]:
    """The claims, what was found, and whether they hold, as lines of a table."""
    claims = {
        "the most accurate, or within the noise of it, on every set": judge_places(results, get_rivals),
        "the best mean rank": judge_mean(results, 0, 0.0),
        "a mean error at least 10 % below the best rival's": judge_mean(results, 1, 0.1),
        "full sets: at most a third of the fastest deep rival's time": judge_time(results),
        "`auto` never worse than the best single arm by more than the interval": judge_places(results, get_arms),
    }
    words = {True: "yes", False: "**no**", None: "-"}
    found = [(claim, *(found or ("-", None))) for claim, found in claims.items()]
    return tabulate(("claim", "found", "holds"), [(claim, text, words[holds]) for claim, text, holds in found])


# The document


def tabulate(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def show(estimate: Estimate, sign: str = "") -> str:
    interval = "too few pictures to tell"
    if not math.isnan(estimate.low):
        interval = f"{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}"
    return f"{estimate.value:{sign}.3f} [{interval}]"


def show_difference(ours: Result | None, other: Result | None) -> str:
    """Headstart minus another, with the p-value where there is one; in words too where headstart loses."""
    if not ours or not other or ours is other:
        return "-"
    found = compare(ours, other)
    text = show(found.difference, "+") + ("" if found.p_value is None else f", p = {found.p_value:.2g}")
    if found.difference.value < 0:
        text += ", **headstart loses**" if is_behind(ours, other) else ", headstart loses, within the noise"
    return text


def show_runs(results: Results, cut: str) -> list[str]:
    header = ("set", "entrant", "accuracy", "balanced accuracy", "headstart - this", "seconds", "/ ours", "peak MB")
    rows = []
    for name in SETS:
        entrants = results[name, cut]
        ours = entrants.get(OURSELVES)
        for entrant in (OURSELVES, *RIVALS):
            cells = show_result(entrants[entrant], ours) if entrant in entrants else ["-"] * (len(header) - 2)
            rows.append((f"{name}, {cut}", entrant, *cells))
    return tabulate(header, rows)


def show_result(result: Result, ours: Result | None) -> list[str]:
    ratio = f"{result.seconds / ours.seconds:.2f}" if ours else "-"
    figures = [*map(show, estimate(result)), show_difference(ours, result)]
    return [*figures, f"{result.seconds:.0f}", ratio, f"{result.memory / 1e6:.0f}"]


def show_standings(results: Results) -> list[str]:
    rows = []
    for group, cuts in {FULL: (FULL,), CUT: (CUT,), "both": (FULL, CUT)}.items():
        standings, count = rank(entrants for (_, cut), entrants in results.items() if cut in cuts)
        for name, (place, error, ratio) in sorted(standings.items(), key=lambda item: item[1]):
            rows.append((group, str(count), name, f"{place:.2f}", f"{error:.4f}", f"{ratio:.2f}"))
    return tabulate(("over", "sets", "entrant", "mean rank", "mean error", "seconds / ours"), rows or [["-"] * 6])


def show_arms(results: Results) -> list[str]:
    """The accuracy of headstart, what each of its parts brings, and whether the best single arm beats it."""
    rows = []
    for place, entrants in results.items():
        ours, arms = entrants.get(OURSELVES), get_arms(entrants)
        best = max(arms, key=lambda name: arms[name].accuracy, default="-")
        verdict = ("**no**" if is_behind(ours, arms[best]) else "yes") if ours and arms else "-"
        gains = [show_gain(entrants.get(name), entrants.get(other)) for name, other in BROUGHT.values()]
        single = [f"{arms[name].accuracy:.3f}" if name in arms else "-" for name in ARMS]
        rows.append((*place, f"{ours.accuracy:.3f}" if ours else "-", *gains, *single, best, verdict))
    brought = [f"{what} ({name} - {other})" for what, (name, other) in BROUGHT.items()]
    header = ("set", "cut", OURSELVES, *brought, *ARMS, "best single arm", "`auto` not worse")
    return tabulate(header, rows)


def show_gain(first: Result | None, second: Result | None) -> str:
    """The paired difference of two entrants' accuracies."""
    return show(compare(first, second).difference, "+") if first and second else "-"


def show_facts(rows: Sequence[Row]) -> list[str]:
    versions = sorted({f"{name} {version}" for row in rows for name, version in row["versions"].items()})
    hours = {name: sum(row["seconds"] for row in rows if row["entrant"] == name) / 3600 for name in (*OURS, *RIVALS)}
    sources = sorted({row["source"] for row in rows if "source" in row})
    mixed = ": **these differ, and are not to be compared**" if len(sources) > 1 else ""
    facts = {
        "Machine": "; ".join(sorted({row["machine"] for row in rows})),
        "Versions": ", ".join(versions),
        "Digest of headstart's source": ", ".join(sources) + mixed,
        "Hours of all runs": ", ".join(f"{name} {spent:.2f}" for name, spent in hours.items() if spent),
    }
    return [f"* {name}: {text or '-'}" for name, text in facts.items()]


def draw_plot(results: Results, file: Path) -> None:
    """Accuracy with its interval against wall time, a panel for each set, whole and cut."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(10, 13), layout="constrained")
    handles: dict[str, Any] = {}
    for axis, ((name, cut), entrants) in zip(figure.subplots(4, 3).flat, results.items(), strict=True):
        for entrant, (colour, marker) in LOOKS.items():
            if entrant in entrants:
                found, seconds = estimate(entrants[entrant])[0], entrants[entrant].seconds
                reach = [[found.value - found.low], [found.high - found.value]]
                look = {"fmt": marker, "color": colour, "markersize": 6, "capsize": 2}
                handles[entrant] = axis.errorbar(seconds, found.value, reach, **look)
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(title=f"{name}, {cut}", xlabel="seconds", ylabel="accuracy")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, frameon=False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "headstart"}):
        for ending, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 100})):
            content = io.BytesIO()
            figure.savefig(content, format=ending[1:], **options)
            write_whole(file.with_suffix(ending), content.getvalue())


def write_report(rows: Sequence[Row], file: Path) -> None:
    """The document, made of the rows alone, and the plot beside it."""
    results = collect(rows)
    draw_plot(results, file)
    full, cuts = show_runs(results, FULL), show_runs(results, CUT)
    losses = [line for line in (*full, *cuts) if "headstart loses" in line]
    ours = {name: f"`{' '.join(('headstart train DATA', *flags))}`" for name, flags in OURS.items()}
    told = [f"* {name}: {text}" for name, text in {**ours, **DESCRIPTIONS}.items()]
    parts = {
        "# The contest": [INTRODUCTION, "", "Entrants:", "", *told, "", "Runs:", "", *show_facts(rows)],
        "## What came of it": [*judge(results), "", *show_standings(results), "", "![Plot](contest.svg)"],
        "## Where headstart loses": [*full[:2], *losses] if losses else ["In no row."],
        "## Full sets": full,
        "## Ten pictures a class": cuts,
        "## One part left out": show_arms(results),
    }
    text = "\n\n".join("\n".join((title, "", *lines)) for title, lines in parts.items())
    write_whole(file, f"{text}\n".encode())
