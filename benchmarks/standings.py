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
# Of a rival's variants the better one counts.
VARIANTS = {"fastai": ("fastai", "fastai-lr-find"), "sklearn": ("sklearn", "sklearn-tuned")}
DEEP = tuple(name for name in RIVALS if name not in VARIANTS["sklearn"])
# Colours that the colour-blind tell apart (Okabe and Ito, 2008).
COLOURS = ("#000000", "#999999", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#D55E00")
LOOKS = dict(zip((*RIVALS, OURSELVES), zip(COLOURS, "sD^vPXo")))

SETS = {  # and what has to be known of them
    "hymenoptera": "ants and bees; a subset of ImageNet",
    "dogscats": "dogs and cats, of which ImageNet has many breeds",
    "imagewoof": "ten breeds of dogs; a subset of ImageNet",
    "scenes": "15 kinds of scenes, grey",
    "flowers": "five flowers, 128 pixels, blurred; at most 100 a class for training, of 3,227 in all",
    "chest_xray": "normal or pneumonia; some patients, and one file, are in both parts",
    "clipart": "seven kinds of things, drawn; no rule of headstart was made by it",
    "stamps": "eight kinds of things on white; no rule of headstart was made by it",
}
UNSEEN = ("clipart", "stamps")
WHY = {  # headstart loses on a set, as far as was found out
    "imagewoof": "the network was pretrained on the pictures that train here, but not on those of the test. "
    "Cross-validated on the former, the head on final features has a log-loss of 0.175, which four views make 0.172; "
    "on the test it is 0.228 and 0.251. So views are taken that help in training alone; without them headstart does "
    "not lose that picture.",
}
LARGEST = {"flowers": 100}  # pictures a class that a set's training is cut to
FULL, CUT, SHOTS = "full", "10 a class", 10
SEEDS = {FULL: (0,), CUT: (0, 1, 2)}
EPOCHS = {"hymenoptera": 25}  # of the tutorial's loop; 10 elsewhere
RESAMPLES = 1000

INTRODUCTION = """\
headstart and its rivals on the same pictures, splits and cores, all from the same weights (EfficientNet-Lite0). This
page is made by `make contest` from [the rows of all runs](../benchmarks/contest.jsonl); no figure was typed in.

* Accuracy has Wilson's interval, balanced accuracy one by bootstrap. *headstart - this* is the paired difference of
  accuracies: Newcombe's interval and, as p, McNemar's exact test, for each pair by itself. With ten pictures a class
  all figures are means over three cuts, and all intervals are bootstrapped over pictures and cuts. All intervals are of
  95 %, and a loss whose interval holds 0 is *within the noise*: n pictures cannot tell. On whole sets each entrant was
  trained once, so there an interval says what other pictures would give, not what another seed would.
* Seconds are those of one whole process each, headstart's with an empty cache, while the machine did nothing else. Peak
  memory is that of a run's largest process: the workers with which the rivals load pictures come on top. headstart
  computes features in bfloat16 where the processor does, the rivals in float32, as each does by itself.
* In claims, ranks and means the more accurate variant of fastai and of scikit-learn counts on each set, and only sets
  count on which everybody has run. Deep rivals: all but scikit-learn.
* Rivals have their documentation's settings. headstart's rules (by which head depths are compared, which views are
  tried, what a gain has to be, how variances are shrunk, which head is preferred) were made while looking at the first
  six sets, their test pictures included, though for none of them alone. clipart and stamps took no part in that; but a
  round of rows on all sets had been seen before variances were shrunk and heads were blended."""

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
    """The rivals; of a rival's variants the more accurate counts, and the faster one where they tie."""
    rivals = {name: entrants[name] for name in RIVALS}
    for name, variants in VARIANTS.items():
        best = max((rivals.pop(variant) for variant in variants), key=lambda found: (found.accuracy, -found.seconds))
        rivals[name] = best
    return rivals


def get_arms(entrants: Entrants) -> dict[str, Result]:
    return {name: entrants[name] for name in ARMS}


def list_whole(results: Results, others: Sequence[str] = RIVALS) -> Results:
    """The sets and cuts on which headstart and all others have run."""
    return {place: found for place, found in results.items() if {OURSELVES, *others} <= set(found)}


def rank(results: Results) -> dict[str, tuple[float, float, float]]:
    """(mean rank, where ties share theirs, mean error and geometric mean of time / ours) by entrant."""
    tables = [{OURSELVES: found[OURSELVES], **get_rivals(found)} for found in list_whole(results).values()]
    if not tables:
        return {}
    names = list(tables[0])
    accuracies = np.array([[table[name].accuracy for name in names] for table in tables])
    better = (accuracies[:, None, :] > accuracies[:, :, None]).sum(2)
    even = (accuracies[:, None, :] == accuracies[:, :, None]).sum(2)
    ratios = np.log([[table[name].seconds / table[OURSELVES].seconds for name in names] for table in tables])
    columns = ((better + (even + 1) / 2).mean(0), (1 - accuracies).mean(0), np.exp(ratios.mean(0)))
    return dict(zip(names, zip(*(column.tolist() for column in columns))))


def draw_errors(results: Results, name: str) -> NDArray[np.float32]:
    """The mean error of an entrant over sets in each resample of their pictures and cuts, (resamples,)."""
    errors = []
    for found in list_whole(results).values():
        result = {OURSELVES: found[OURSELVES], **get_rivals(found)}[name]
        right, weights = result.right.ravel(), draw(tuple(result.truth.tolist()), len(result.predicted))
        errors.append(1 - metrics.hit_share(right, np.ones_like(right))(weights.astype(np.float32)))
    return np.mean(errors, 0)


# What is claimed, and whether it holds

Found = tuple[str, bool | None]  # in words and figures; None where not everybody has run everywhere


def judge_places(results: Results, others: Sequence[str], choose: Callable[[Entrants], Entrants]) -> Found:
    """On how many sets and cuts headstart is behind none of the others."""
    whole, behind, first = list_whole(results, others), [], 0
    for place, entrants in whole.items():
        ours, chosen = entrants[OURSELVES], choose(entrants)
        first += ours.accuracy >= max(other.accuracy for other in chosen.values())
        behind += [f"{', '.join(place)} ({name})" for name, other in chosen.items() if is_behind(ours, other)]
    found = f"the most accurate on {first} of {len(whole)}, behind by more than the noise on "
    return found + ("; ".join(behind) or "none"), not behind if len(whole) == len(results) else None


def judge_mean(results: Results, figure: int, least: float) -> Found:
    """By how much a mean (0: rank, 1: error) of headstart is lower than that of the rival with the lowest."""
    standings, whole = rank(results), list_whole(results)
    if not whole:
        return "-", None
    best, name = min((figures[figure], name) for name, figures in standings.items() if name != OURSELVES)
    ours = standings[OURSELVES][figure]
    lower = 1 - ours / best if best else 0.0
    found = f"{ours:.4f} against {best:.4f} ({name}): {-lower:+.1%}"
    if figure == 1:
        low, high = np.quantile(draw_errors(results, OURSELVES) - draw_errors(results, name), (0.025, 0.975))
        found += f", a difference of {ours - best:+.4f} [{low:+.4f}, {high:+.4f}]"
    holds = (lower > 0 and lower >= least) if len(whole) == len(results) else None
    return f"{found}, over {len(whole)} of {len(results)} sets and cuts", holds


def judge_time(results: Results) -> Found:
    """On which full set headstart takes the largest share of the fastest deep rival's time."""
    full = {name: found for (name, cut), found in list_whole(results, DEEP).items() if cut == FULL}
    shares = []
    for name, entrants in full.items():
        (fastest, rival), ours = min((entrants[rival].seconds, rival) for rival in DEEP), entrants[OURSELVES].seconds
        shares.append((ours / fastest, f"{name} ({ours:.0f} s against {fastest:.0f} s, {rival})"))
    if not shares:
        return "-", None
    share, where = max(shares)
    holds = share <= 1 / 3 if len(full) == sum(cut == FULL for _, cut in results) else None
    return f"on {len(shares)} full sets at most {share:.3f} of it: {where}", holds


def judge(results: Results) -> list[str]:
    """The claims, what was found, and whether they hold, as lines of a table."""
    claims = {
        "the most accurate, or within the noise of it, on every set": judge_places(results, RIVALS, get_rivals),
        "the best mean rank": judge_mean(results, 0, 0.0),
        "a mean error at least 10 % below the best rival's": judge_mean(results, 1, 0.1),
        "full sets: at most a third of the fastest deep rival's time": judge_time(results),
        "`auto` never worse than the best single arm by more than the interval": judge_places(results, ARMS, get_arms),
    }
    words = {True: "yes", False: "**no**", None: "not told: not everybody has run everywhere"}
    found = [(claim, text, words[holds]) for claim, (text, holds) in claims.items()]
    return tabulate(("claim", "found", "holds"), found)


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
    for (name, _), entrants in (entry for entry in results.items() if entry[0][1] == cut):
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
    groups = {
        FULL: [place for place in results if place[1] == FULL],
        CUT: [place for place in results if place[1] == CUT],
        "all": list(results),
        f"all of {' and '.join(UNSEEN)}": [place for place in results if place[0] in UNSEEN],
    }
    for group, places in groups.items():
        some = list_whole({place: results[place] for place in places})
        for name, (place, error, ratio) in sorted(rank(some).items(), key=lambda item: item[1]):
            rows.append((group, str(len(some)), name, f"{place:.2f}", f"{error:.4f}", f"{ratio:.2f}"))
    return tabulate(("over", "sets", "entrant", "mean rank", "mean error", "seconds / ours"), rows or [["-"] * 6])


def show_sets(rows: Sequence[Row]) -> list[str]:
    """What each set is, and of how many pictures."""
    counted = {(row["set"], row["cut"]): (row["trained"], row["n"], len(set(row["true"]))) for row in rows}
    lines = []
    for name, told in SETS.items():
        trained, tested, classes = map(str, counted.get((name, FULL), ("-", "-", "-")))
        few = str(counted.get((name, CUT), ("-",))[0])
        lines.append((name, told, classes, trained, few, tested))
    return tabulate(("set", "what", "classes", "training", "of the cut", "test"), lines)


def show_arms(results: Results) -> list[str]:
    """The accuracy of headstart, what each of its parts brings, and whether the best single arm beats it."""
    rows = []
    for place, entrants in results.items():
        ours, arms = entrants.get(OURSELVES), {name: entrants[name] for name in ARMS if name in entrants}
        best = max(arms, key=lambda name: arms[name].accuracy, default="-")
        verdict = ("**no**" if is_behind(ours, arms[best]) else "yes") if ours and len(arms) == len(ARMS) else "-"
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
    runs = {name: [row["seconds"] for row in rows if row["entrant"] == name] for name in (*OURS, *RIVALS)}
    hours = [f"{name} {sum(spent) / 3600:.2f} of {len(spent)}" for name, spent in runs.items() if spent]
    facts = {
        "Machine": "; ".join(sorted({row["machine"] for row in rows})),
        "Versions": ", ".join(versions),
        "Digest of headstart's source": ", ".join(sorted({row["source"] for row in rows if "source" in row})),
        "Hours of runs": ", ".join(hours),
    }
    return [f"* {name}: {text or '-'}" for name, text in facts.items()]


def draw_plot(results: Results, file: Path) -> None:
    """Accuracy with its interval against wall time, a panel for each set, whole and cut."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator

    figure = Figure(figsize=(13, 13), layout="constrained")
    handles: dict[str, Any] = {}
    for axis, ((name, cut), entrants) in zip(figure.subplots(4, 4).flat, results.items(), strict=True):
        for entrant, (colour, marker) in LOOKS.items():
            if entrant in entrants:
                found, seconds = estimate(entrants[entrant])[0], entrants[entrant].seconds
                reach = [[found.value - found.low], [found.high - found.value]]
                look = {"fmt": marker, "color": colour, "markersize": 6, "capsize": 2}
                handles[entrant] = axis.errorbar(seconds, found.value, reach, **look)
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]))
        axis.margins(x=0.08)
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
    rows = keep_current(rows)
    results = collect(rows)
    draw_plot(results, file)
    full, cuts = show_runs(results, FULL), show_runs(results, CUT)
    losses = [line for line in (*full, *cuts) if "headstart loses" in line]
    why = [f"* {name}: {text}" for name, text in WHY.items() if any(line.startswith(f"| {name}") for line in losses)]
    ours = {name: f"`{' '.join(('headstart train DATA', *flags))}`" for name, flags in OURS.items()}
    told = [f"* {name}: {text}" for name, text in {**ours, **DESCRIPTIONS}.items()]
    parts = {
        "# The contest": [INTRODUCTION, "", *show_sets(rows)],
        "## Entrants and runs": [*told, "", *show_facts(rows)],
        "## What came of it": [*judge(results), "", *show_standings(results), "", "![Plot](contest.svg)"],
        "## Where headstart loses": [*full[:2], *losses, "", *why] if losses else ["In no row."],
        "## Full sets": full,
        "## Ten pictures a class": cuts,
        "## One part left out": show_arms(results),
    }
    text = "\n\n".join("\n".join((title, "", *lines)) for title, lines in parts.items())
    write_whole(file, f"{text}\n".encode())
