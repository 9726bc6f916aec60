"""The course of training: `history.jsonl`, a line for each step and epoch, and the curves drawn from it."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headstart.engine import Epoch, Step
from headstart.plan import Plan, Train
from headstart.runs import RunFolder

Row = dict[str, Any]
NAME = "history.jsonl"


class History:
    """The rows of a run, written as they come; to TensorBoard too where that is wanted."""

    def __init__(self, file: Path | None, kept: Sequence[Row], tensorboard: Path | None) -> None:
        self._file = file.open("a", encoding="utf-8") if file is not None else None
        self._writer = _open_tensorboard(tensorboard) if tensorboard is not None else None
        self._steps = sum("step" in row for row in kept)
        self._begun = _find_begins(kept)
        self._last = max((self._begun[row["phase"]] + row["epoch"] for row in kept), default=0)

    def add(self, record: Step | Epoch) -> None:
        """Add a row."""
        if self._file is None:
            return
        row = {name: _json_value(value) for name, value in asdict(record).items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._steps += isinstance(record, Step)
        if record.phase not in self._begun:
            self._begun[record.phase] = self._last
        self._last = self._begun[record.phase] + record.epoch
        if self._writer is not None:
            self._write_scalars(record, self._writer)

    def _write_scalars(self, record: Step | Epoch, writer: Any) -> None:
        if isinstance(record, Step):
            writer.add_scalar("learning rate", record.rate, self._steps)
            return
        figures = {"train/loss": record.loss, "train/accuracy": record.accuracy}
        figures |= {f"select/{name}": value for name, value in record.select.items()}
        for name, value in figures.items():
            writer.add_scalar(name, value, self._begun.get(record.phase, 0) + record.epoch)

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


@contextlib.contextmanager
def open_history(folder: RunFolder, done: tuple[int, int, int], chosen: Plan) -> Iterator[History]:
    """The history of a run, to be added to; what a killed run wrote after its last checkpoint is taken out.

    Args:
        folder: of the run.
        done: phase, finished epochs (-1: not even the start was measured) and steps at the last checkpoint.
        chosen: the plan.
    """
    file = folder.path / NAME
    kept = [row for row in read(file) if _position(row) <= done]
    wanted = any(isinstance(phase, Train) and phase.settings.tensorboard for phase in chosen.phases)
    folder.write_text(NAME, "".join(json.dumps(row) + "\n" for row in kept))
    writes = folder.writes
    history = History(file if writes else None, kept, folder.path / "tensorboard" if wanted and writes else None)
    try:
        yield history
    finally:
        history.close()


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json_value(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(file: Path) -> list[Row]:
    """The rows of a history; a last line that a kill cut short is left out."""
    if not file.exists():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def summarise(folder: Path) -> list[Row]:
    """What each phase of a run came to: its best epoch and the figures there, its epochs, parameters and seconds."""
    epochs = [row for row in read(folder / NAME) if "step" not in row]
    phases = [[row for row in epochs if row["phase"] == phase] for phase in sorted({row["phase"] for row in epochs})]
    summaries = []
    for rows in phases:
        best = next((row for row in reversed(rows) if row["best"]), rows[0])
        summaries.append(
            {
                "best_epoch": best["epoch"],
                "select": best["select"],
                "epochs": rows[-1]["epoch"],
                "trainable": rows[-1]["trainable"],
                "seconds": round(sum(row["seconds"] for row in rows), 1),
            }
        )
    return summaries


def _position(row: Row) -> tuple[int, int, int]:
    """Where a row stands, to be compared with (phase, finished epochs, steps of the next one)."""
    if "step" in row:
        return row["phase"], row["epoch"] - 1, row["step"]
    return row["phase"], row["epoch"], 0


def _open_tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def draw(folder: Path) -> None:
    """Draw a run's loss, accuracy and learning rate as `curves.svg` and `.png`, and its range test where it has one."""
    rows = read(folder / NAME)
    test = folder / "learning_rate.json"
    if test.exists():
        _draw_range_test(json.loads(test.read_text(encoding="utf-8")), folder / "learning_rate")
    epochs = [row for row in rows if "step" not in row]
    steps = [row for row in rows if "step" in row]
    begun = _find_begins(rows)
    places = [_place(row, begun) for row in epochs]
    figure, axes = _figure(3)
    loss, accuracy, rate = axes
    for axis, name in ((loss, "loss"), (accuracy, "accuracy")):
        known = [(place, row[name]) for place, row in zip(places, epochs, strict=True) if row[name] is not None]
        axis.plot(*zip(*known, strict=True) if known else ((), ()), marker="o", markersize=3, label="training")
        axis.set_ylabel(name)
    figures = [row["select"] for row in epochs]
    for axis, name in ((loss, "log_loss"), (accuracy, "accuracy")):
        if figures and name in figures[0]:
            values = [one[name] for one in figures]
            axis.plot(places, values, marker="o", markersize=3, label="select")
    best = [place for place, row in zip(places, epochs, strict=True) if row["best"]]
    for axis in (loss, accuracy):
        if best:
            axis.axvline(best[-1], color="grey", linewidth=0.8, linestyle=":", label="kept")
        axis.legend(frameon=False)
    rate.plot([_place(row, begun) for row in steps], [row["rate"] for row in steps])
    rate.set_ylabel("learning rate")
    for axis in axes:
        axis.set_xlabel("epoch")
    _save(figure, folder / "curves")


def _draw_range_test(test: dict[str, Any], file: Path) -> None:
    figure, (axis,) = _figure(1)
    axis.plot(test["rates"], test["losses"])
    axis.axvline(
        test["suggested"], color="grey", linewidth=0.8, linestyle=":", label=f"suggested: {test['suggested']:.2g}"
    )
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("loss, smoothed")
    axis.legend(frameon=False)
    _save(figure, file)


def _place(row: Row, begun: dict[int, int]) -> float:
    """Epochs since the first phase began."""
    within = row["epoch"] - 1 + row["step"] / row["steps"] if "step" in row else row["epoch"]
    return float(begun[row["phase"]] + within)


def _find_begins(rows: Sequence[Row]) -> dict[int, int]:
    """The epochs of all phases before each phase."""
    lengths: dict[int, int] = {}
    for row in rows:
        lengths[row["phase"]] = max(lengths.get(row["phase"], 0), row["epoch"])
    begins = itertools.accumulate((lengths[phase] for phase in sorted(lengths)), initial=0)
    return dict(zip(sorted(lengths), begins, strict=False))


def _figure(columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 3.2), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _save(figure: Any, file: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "headstart"}):
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(file.with_suffix(".png"), dpi=144)
