"""The document of the contest, made of its rows: tables, verdicts and the plot.

contest.py makes the rows and calls `write_report`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import more_sets
from claims import count, judge, say
from drawings import draw_plot, draw_summary
from entrants import ARMS, BROUGHT, CONTENDERS, CUT, FULL, OURS, OURSELVES, RIVALS, SEEDS, SETS, WITHOUT, takes_part
from headstart.files import write_whole
from headstart.metrics import Estimate
from results import (
    Entrants,
    Result,
    Results,
    Row,
    collect,
    compare,
    estimate,
    get_arms,
    get_contenders,
    group,
    is_behind,
    keep_current,
    list_ahead,
    list_whole,
    rank,
)
from rivals import DESCRIPTIONS

WHY = {  # headstart loses on a set or a cut, as far as was found out
    f"imagewoof, {FULL}": "by one picture of 200: no more than chance is to be made out",
    f"hymenoptera, {CUT}": "by five answers of 459, in three cuts, which is within the noise; 20 pictures are little "
    "evidence to choose by: without a choice of geometry it would be 0.932, without one of depths 0.935",
    f"imagewoof, {CUT}": "by one answer of 600, in three cuts: no more than chance is to be made out",
}
UNKNOWN = "not found out yet"

INTRODUCTION = """\
headstart was developed while looking at results on the first eight sets, their test pictures included, though no rule
was made for one of them alone. So its figures on these sets are optimistic. fashion was not looked at, in any way,
before the rules were what they are.

headstart and its rivals classify the same pictures, with the same splits, on the same cores and from the same weights
(EfficientNet-Lite0). `make contest` makes this page. Every figure of a run, every mean and every verdict is computed
from [the rows of all runs](../benchmarks/contest.jsonl). What the sets and entrants are, and why headstart loses where
it does, was written by hand, the figures in those sentences included.

* **Rivals** use the settings of their own documentation. Of the variants of fastai and of scikit-learn the most
  accurate counts on each set, and *seconds / ours* are of that variant. Deep rivals: all but scikit-learn. fastai's
  `lr_find` tries a hundred batches, which takes longer than the training that follows: with about three hours for
  each rival, `fastai-lr-find` has run on few full sets.
* **Intervals** are of 95 %. Accuracy has Wilson's, balanced accuracy one by bootstrap. *headstart - this* is the paired
  difference of accuracies: Newcombe's interval and, as p, McNemar's exact test, for each pair by itself. Interval and
  test are different methods and may disagree at the border. A loss whose interval holds 0 is *within the noise*: n
  pictures cannot tell. Among about a hundred comparisons a few would look like losses by chance.
* **Seeds**: on full sets each entrant was trained once, so there an interval says what other pictures would give, not
  what another seed would. With ten pictures a class all figures are means over three cuts, and all intervals are
  bootstrapped over pictures and cuts; but three cuts say little about how much cuts differ.
* **Claims**: in claims, ranks and means only sets and cuts count on which headstart and all rivals have run. But where
  headstart is behind on one set, that refutes a claim about every set, whatever else is missing.
* **Time and memory**: seconds are those of one whole process each, headstart's with an empty cache, while no other
  heavy process ran. On full sets headstart and `tutorial-frozen`, nearly everywhere the fastest deep rival, were timed
  on one machine on one day; other rivals' rows may be of another, and their seconds are no more than a guide.
  (headstart without one part takes the features that headstart has computed; its time is not shown.) Peak memory is
  that of a run's largest process: the workers with which the rivals load pictures come on top. headstart computes
  features in bfloat16 where the processor does, the rivals in float32, as each does by itself.
* **Source**: headstart's rows are of the source with the digest below."""

REPEATS = {  # what is known of later sources, by the digest of the source that was measured
    "c090686c1d2b": """\
  What was mended since changes nothing that is measured: its 36 runs, repeated with the digest dc09ffc42111, had the
  same plans and, but for two of 12,420, the same answers.""",
}

REPEATED = f"""\
To repeat it, let `HEADSTART_TEST_DATA` name a folder that holds the first six sets as `SET/train/CLASS` and
`SET/val/CLASS`. They are cuts of public sets: hymenoptera of the official PyTorch tutorial's, dogscats of Kaggle's,
imagewoof of fast.ai's with 320 pixels, scenes of the 15 scene categories, flowers of a set of five flowers, chest_xray
of that of Kermany et al. `make contest-data` makes the others of packages of Debian and npm:
{", ".join(f"{name} {version}" for name, version in {**more_sets.PACKAGES, **more_sets.CLOTHES}.items())}.
Then `make contest` runs what has no row yet."""

SUMMARY = "Accuracy and seconds on each set; of the variants of fastai and of scikit-learn those of the most accurate:"

PLOTS = """\
![Accuracy of each entrant on each set](contest-summary.svg)

![Accuracy with its interval against seconds, a panel for each set](contest.svg)"""

PARTS = """\
What a part brings is the accuracy of the first of two entrants less that of the second, on the same pictures. Without
the blend, logistic regression is the only head: on full sets other heads that compete with the blend are left out, too.
Geometry is how a picture is brought into the network's square: cropped, squashed or padded, and how large.
"""

SINGLE = """\
`probe-alone` fits a head on the final features of plain pictures. It still has headstart's blend of heads, shrunk
variances and calibration. *`auto` not worse*: headstart is behind no single strategy by more than the interval."""


# Words and tables


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


def show_summary(results: Results) -> list[str]:
    """Accuracy and time on each set, whole and cut; of a rival's variants the best."""
    rows = []
    for place, entrants in results.items():
        found = get_contenders(entrants)
        cells = [show_briefly(found.get(name)) for name in (OURSELVES, *CONTENDERS)]
        rows.append((", ".join(place), *cells))
    return tabulate(("set", OURSELVES, *CONTENDERS), rows)


def show_standings(results: Results) -> list[str]:
    rows = []
    for name, places in group(results).items():
        for entrant, found in sorted(rank(places).items(), key=lambda item: item[1]):
            figures = (f"{found.rank:.2f}", f"{found.error:.4f}", f"{found.ratio:.2f}")
            rows.append((name, str(len(list_whole(places))), entrant, *figures))
    header = ("over", "sets and cuts", "entrant", "mean rank", "mean error", "seconds / ours")
    return tabulate(header, rows or [["-"] * len(header)])


def show_sets(rows: Sequence[Row]) -> list[str]:
    """What each set is, and of how many pictures."""
    counted = {(row["set"], row["cut"]): (row["trained"], row["n"], len(set(row["true"]))) for row in rows}
    lines = []
    for name, told in SETS.items():
        trained, tested, classes = map(str, counted.get((name, FULL), ("-", "-", "-")))
        few = str(counted.get((name, CUT), ("-",))[0])
        lines.append((name, told, classes, trained, few, tested))
    return tabulate(("set", "what", "classes", "training", "of the cut", "test"), lines)


def show_parts(results: Results) -> list[str]:
    """The accuracy of headstart, and what each of its parts brings."""
    rows = []
    for place, entrants in results.items():
        gains = [show_gain(entrants.get(name), entrants.get(other)) for name, other in BROUGHT.values()]
        ours = entrants.get(OURSELVES)
        rows.append((*place, f"{ours.accuracy:.3f}" if ours else "-", *gains))
    return tabulate(("set", "cut", OURSELVES, *BROUGHT), rows)


def show_arms(results: Results) -> list[str]:
    """Accuracy and time of headstart and of single strategies, and whether one of these beats it."""
    shown, rows = (OURSELVES, "headstart-5m", *ARMS), []
    for place, entrants in results.items():
        arms = get_arms(entrants)
        best = max(arms, key=lambda name: arms[name].accuracy, default="-")
        rows.append((*place, *(show_briefly(entrants.get(name)) for name in shown), best, show_verdict(entrants)))
    return tabulate(("set", "cut", *shown, "best single strategy", "`auto` not worse"), rows)


def show_briefly(result: Result | None) -> str:
    return f"{result.accuracy:.3f}, {result.seconds:.0f} s" if result else "-"


def show_verdict(entrants: Entrants) -> str:
    """Whether headstart is behind no single strategy, once all have run or one is ahead."""
    ours, arms = entrants.get(OURSELVES), get_arms(entrants)
    behind = bool(ours and list_ahead(ours, arms))
    told = behind or (ours and len(arms) == len(ARMS))
    return say(not behind, told=True) if told else "-"


def show_gain(first: Result | None, second: Result | None) -> str:
    """The paired difference of two entrants' accuracies."""
    return show(compare(first, second).difference, "+") if first and second else "-"


def show_facts(rows: Sequence[Row]) -> list[str]:
    versions = sorted({f"{name} {version}" for row in rows for name, version in row["versions"].items()})
    facts = {
        "Machine": "; ".join(sorted({row["machine"] for row in rows})),
        "Versions": ", ".join(versions),
        "Digest of headstart's source": ", ".join(sorted({row["source"] for row in rows if "source" in row})),
        "Time": ", ".join(filter(None, (show_hours(rows, name) for name in (*OURS, *RIVALS) if name not in WITHOUT))),
    }
    return [f"* {name}: {text or '-'}" for name, text in facts.items()]


def show_repeats(rows: Sequence[Row]) -> list[str]:
    """What is known of sources later than the one that the rows are of."""
    sources = {row["source"] for row in rows if "source" in row}
    return [text for digest, text in REPEATS.items() if digest in sources]


def show_hours(rows: Sequence[Row], entrant: str) -> str:
    """The hours of an entrant's runs, and how many there are, of how many where some are missing; empty without any."""
    spent = [row["seconds"] for row in rows if row["entrant"] == entrant]
    wanted = len(SETS) * sum(len(seeds) for cut, seeds in SEEDS.items() if takes_part(entrant, cut))
    runs = count(wanted, "run") if len(spent) == wanted else f"{len(spent)} of {count(wanted, 'run')}"
    return f"{entrant} {sum(spent) / 3600:.2f} h in {runs}" if spent else ""


def explain(losses: Sequence[str]) -> list[str]:
    """Why headstart loses where it does: a line for each set or cut that the losses, rows of a table, begin with."""
    places = dict.fromkeys(line.split(" | ")[0].removeprefix("| ") for line in losses)
    return [f"* {place}: {WHY.get(place, UNKNOWN)}" for place in places]


def write_report(rows: Sequence[Row], file: Path) -> None:
    """The document, made of the rows alone, and the plot beside it."""
    rows = keep_current(rows)
    results = collect(rows)
    draw_plot(results, file)
    draw_summary(results, file.with_stem(f"{file.stem}-summary"))
    claims = tabulate(("claim", "found", "holds"), judge(results))
    summary = [SUMMARY, "", *show_summary(results), "", PLOTS]
    full, cuts = show_runs(results, FULL), show_runs(results, CUT)
    losses = [line for line in (*full, *cuts) if "headstart loses" in line]
    ours = {name: f"`{' '.join(('headstart train DATA', *flags))}`" for name, flags in OURS.items()}
    told = [f"* {name}: {text}" for name, text in {**ours, **DESCRIPTIONS}.items()]
    brought = [f"* {part}: {first} - {second}" for part, (first, second) in BROUGHT.items()]
    parts = {
        "# The contest": [INTRODUCTION, *show_repeats(rows), "", *show_sets(rows), "", REPEATED],
        "## Entrants and runs": [*told, "", *show_facts(rows)],
        "## What came of it": [*claims, "", *show_standings(results), "", *summary],
        "## Where headstart loses": [*full[:2], *losses, "", *explain(losses)] if losses else ["In no row."],
        "## Full sets": full,
        "## Ten pictures a class": cuts,
        "## One part left out": [PARTS, *brought, "", *show_parts(results)],
        "## Each strategy by itself": [SINGLE, "", *show_arms(results)],
    }
    text = "\n\n".join("\n".join((title, "", *lines)) for title, lines in parts.items())
    write_whole(file, f"{text}\n".encode())
