"""The plots of the contest."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from claims import count
from entrants import OURSELVES, RIVALS, SEEDS, SETS
from headstart.files import write_whole
from results import Results, estimate, get_contenders

# Colours that the colour-blind tell apart (Okabe and Ito, 2008).
COLOURS = ("#000000", "#999999", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#D55E00")
LOOKS = dict(zip((*RIVALS, OURSELVES), zip(COLOURS, "sD^vPX*o", strict=True), strict=True))

COLUMNS = 3  # of the large plot


def draw_summary(results: Results, file: Path) -> None:
    """Accuracy on each set, whole and cut; of a rival's variants the best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    handles: dict[str, Any] = {}
    for axis, cut in zip(figure.subplots(1, len(SEEDS), sharey=True), SEEDS, strict=True):
        for place, name in enumerate(SETS):
            for entrant, result in get_contenders(results[name, cut]).items():
                colour, marker = LOOKS[entrant]
                (handles[entrant],) = axis.plot(result.accuracy, place, marker, color=colour, markersize=7)
        axis.set(title=f"{cut}, {count(len(SEEDS[cut]), 'seed')}", xlabel="accuracy")
        axis.set_yticks(range(len(SETS)), SETS)
        tidy(axis)
    axis.invert_yaxis()  # for both: they share it
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles) or 1, frameon=False)
    save(figure, file)


def draw_plot(results: Results, file: Path) -> None:
    """Accuracy with its interval against wall time, a panel for each set, whole and cut."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator

    rows = -(-len(results) // COLUMNS)
    figure = Figure(figsize=(13, 3.25 * rows), layout="constrained")
    handles: dict[str, Any] = {}
    for axis, ((name, cut), entrants) in zip(figure.subplots(rows, COLUMNS).flat, results.items()):
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
        tidy(axis)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    save(figure, file)


def tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def save(figure: Any, file: Path) -> None:
    """The figure as SVG with text, and as PNG: for the same figure always the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "headstart"}):
        for ending, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 100})):
            content = io.BytesIO()
            figure.savefig(content, format=ending[1:], **options)
            write_whole(file.with_suffix(ending), content.getvalue())
