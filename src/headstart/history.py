"""The course of training: `history.jsonl`, a line for each step and epoch, and the curves drawn from it."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headstart.engine import Epoch, Step
from headstart.errors import TrainingError
from headstart.files import write_whole
from headstart.plan import Plan, Train
from headstart.runs import RunFolder

log = logging.getLogger(__name__)

Row = dict[str, Any]
NAME = "history.jsonl"


class History:
    """The rows of a run, written as they come; to TensorBoard too where that is wanted."""

    def __init__(self, file: Path | None, kept: Sequence[Row], tensorboard: Path | None) -> None:
        self._file = file.open("a", encoding="utf-8") if file is not None else None
        self._writer = _open_tensorboard(tensorboard) if tensorboard is not None else None
        self._steps, self._last = 0, 0
        self._begun: dict[int, int] = {}
        for row in kept:
            self._show(row)

    def add(self, record: Step | Epoch) -> None:
        """Add a row."""
        if self._file is None:
            return
        row = {name: _json_value(value) for name, value in asdict(record).items()}
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            name, why = self._file.name, f"cannot be written ({error.strerror})"
            with contextlib.suppress(OSError):  # it would fail for the same reason
                self._file.close()
            self._file = None
            remedy = "Free some space and give the same command: the last good checkpoint is kept."
            raise TrainingError(name, why, remedy) from error
        self._show(row)

    def _show(self, row: Row) -> None:
        """Count a row in, and give TensorBoard its figures."""
        self._steps += "step" in row
        begun = self._begun.setdefault(row["phase"], self._last)
        self._last = begun + row["epoch"]
        if self._writer is None:
            return
        if "step" in row:
            self._writer.add_scalar("learning rate", row["rate"], self._steps)
            return
        figures = {"train/loss": row["loss"], "train/accuracy": row["accuracy"]}
        figures |= {f"select/{name}": value for name, value in row["select"].items()}
        for name, value in figures.items():
            if value is not None:
                self._writer.add_scalar(name, value, self._last)
        self._writer.flush()

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
    """What each phase of a run came to: its best epoch and the figures there, the log-loss on select after each epoch,
    the start's first, how many numbers were trained, and seconds.
    """
    epochs = [row for row in read(folder / NAME) if "step" not in row]
    phases = [[row for row in epochs if row["phase"] == phase] for phase in sorted({row["phase"] for row in epochs})]
    summaries = []
    for rows in phases:
        best = next((row for row in reversed(rows) if row["best"]), rows[0])
        summaries.append(
            {
                "phase": rows[0]["phase"],
                "best_epoch": best["epoch"],
                "select": best["select"],
                "epochs": rows[-1]["epoch"],
                "log_losses": [row["select"]["log_loss"] for row in rows],
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
    """A writer into an empty folder: what a killed run wrote may be cut short, and all rows are written again."""
    from torch.utils.tensorboard import SummaryWriter

    for file in folder.glob("events.out.tfevents.*"):
        file.unlink()
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


@contextlib.contextmanager
def may_fail(what: str) -> Iterator[None]:
    """Whatever a drawing fails for, the model is worth more: work goes on, and the reason is said."""
    try:
        yield
    except Exception as error:
        log.warning("%s could not be drawn: %s: %s", what, type(error).__name__, error)


def draw_together(folders: Mapping[str, Path], file: Path) -> None:
    """Draw the log-loss and accuracy of several runs on their select pictures, by seconds of training.

    Args:
        folders: run folders by what to call them.
        file: without an ending; `.svg` and `.png` are written.
    """
    figure, axes = _figure(2)
    for label, folder in folders.items():
        epochs = [row for row in read(folder / NAME) if "step" not in row]
        seconds = list(itertools.accumulate(row["seconds"] for row in epochs))
        for axis, name in zip(axes, ("log_loss", "accuracy"), strict=True):
            values = [row["select"].get(name) for row in epochs]
            axis.plot(seconds, values, marker="o", markersize=3, label=label)
    for axis, name in zip(axes, ("log-loss", "accuracy"), strict=True):
        axis.set_xlabel("seconds of training")
        axis.set_ylabel(f"{name} on select pictures")
        axis.legend(frameon=False)
    _save(figure, file)


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
        for ending, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 144})):
            content = io.BytesIO()
            figure.savefig(content, format=ending[1:], **options)
            write_whole(file.with_suffix(ending), content.getvalue())
