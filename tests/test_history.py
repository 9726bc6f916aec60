"""The course of training: rows that are written as they come, taken back where a run is, and drawn."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from xml.etree import ElementTree

import pytest
from PIL import Image

from headstart import history
from headstart.config import EngineConfig
from headstart.engine import Epoch, Step
from headstart.errors import TrainingError
from headstart.history import History, draw, open_history, read
from headstart.plan import FitHead, Plan, Train
from headstart.runs import RunFolder
from headstart.timing import Layout

SVG = "{http://www.w3.org/2000/svg}"
START = (-1, -1, 0)


def a_plan(**settings):
    phase = Train(EngineConfig(**settings), Layout("float32"))
    return Plan("lp-ft", "cpu", "float32", (FitHead(("logistic",), 5), phase), ())


def epoch_of(phase, epoch, steps=3, loss=0.5, accuracy=0.75, select=None, best=False):
    select = {"log_loss": 0.6 / (epoch + 1), "accuracy": 0.7} if select is None else select
    return Epoch(phase, epoch, loss, accuracy, select, best, 100, 1.5)


def course(epochs, steps=3, phase=0, until=None):
    """The records of a phase in their order: the state before it, then each epoch's steps and its end."""
    records = [epoch_of(phase, 0, loss=math.nan, accuracy=math.nan, best=True)]
    for epoch in range(1, epochs + 1):
        records += [
            Step(phase, epoch, step, steps, 0.01 / (epoch * step), 1 / step, 0.5, 4 * step, 100.0)
            for step in range(1, steps + 1)
        ]
        records.append(epoch_of(phase, epoch, steps, best=epoch != 2))
    return records[:until]


def write_course(folder, records):
    with open_history(RunFolder(folder), START, a_plan()) as written:
        for record in records:
            written.add(record)
    return folder / history.NAME


def lines_of(file):
    return file.read_text(encoding="utf-8").splitlines()


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


# Rows


def test_every_record_is_a_line_of_json_with_its_own_names_and_values(tmp_path):
    records = course(2)
    rows = [json.loads(line) for line in lines_of(write_course(tmp_path, records))]
    assert len(rows) == len(records)
    for row, record in zip(rows[1:], records[1:], strict=True):
        assert row == dataclasses.asdict(record)
    assert read(tmp_path / history.NAME) == rows


def test_what_is_no_number_is_null_wherever_it_stands(tmp_path):
    select = {"log_loss": math.inf, "accuracy": 0.5, "ece": -math.inf}
    file = write_course(tmp_path, [epoch_of(0, 0, loss=math.nan, accuracy=math.nan, select=select)])
    (row,) = [json.loads(line, parse_constant=no_constant) for line in lines_of(file)]
    assert row["loss"] is None and row["accuracy"] is None
    assert row["select"] == {"log_loss": None, "accuracy": 0.5, "ece": None}


def test_a_row_can_be_read_as_soon_as_it_was_added(tmp_path):
    with open_history(RunFolder(tmp_path), START, a_plan()) as written:
        for count, record in enumerate(course(1), 1):
            written.add(record)
            assert len(read(tmp_path / history.NAME)) == count


def test_the_file_is_closed_at_the_end_and_after_an_error(tmp_path):
    with pytest.raises(KeyError), open_history(RunFolder(tmp_path), START, a_plan()) as written:
        written.add(course(1)[0])
        raise KeyError
    with pytest.raises(ValueError, match="closed"):
        written.add(course(1)[0])
    assert len(read(tmp_path / history.NAME)) == 1


@pytest.fixture
def small_files():
    """A function that lets no file grow beyond so many bytes: as a disk that is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_with_the_file_and_what_to_do(tmp_path, small_files):
    written = History(tmp_path / history.NAME, [], None)
    small_files(600)
    with pytest.raises(TrainingError, match=r"cannot be written \(.*\)\. Free some space and give the same") as caught:
        for record in course(3):
            written.add(record)
    assert caught.value.subject == str(tmp_path / history.NAME) and caught.value.exit_status == 1
    assert 1 <= len(read(tmp_path / history.NAME)) < len(course(3))  # what was written before can be read
    small_files(10**6)
    written.close()


def test_a_full_disk_is_told_also_where_the_file_is_closed_after_it(tmp_path, small_files):
    with pytest.raises(TrainingError, match="cannot be written"):  # noqa: SIM117
        with open_history(RunFolder(tmp_path), START, a_plan()) as written:
            small_files(600)
            for record in course(3):
                written.add(record)


def test_a_process_that_does_not_write_leaves_no_file(tmp_path):
    with open_history(RunFolder(tmp_path, writes=False), START, a_plan(tensorboard=True)) as written:
        for record in course(1):
            written.add(record)
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


def test_there_are_no_rows_where_there_is_no_file(tmp_path):
    assert read(tmp_path / history.NAME) == []


def test_of_a_file_that_was_cut_anywhere_the_whole_lines_are_read(tmp_path):
    content = write_course(tmp_path, course(1, steps=1)).read_bytes()
    ends = [place for place, byte in enumerate(content) if byte == ord("\n")]
    rows, torn = read(tmp_path / history.NAME), tmp_path / "torn.jsonl"
    for kept in range(len(content) + 1):
        torn.write_bytes(content[:kept])
        assert read(torn) == rows[: sum(end <= kept for end in ends)], kept


# Going on


def place_after(records):
    """Where a checkpoint is that was made after these records: phase, finished epochs, steps of the next one."""
    if not records:
        return START
    last = records[-1]
    return (last.phase, last.epoch - 1, last.step) if isinstance(last, Step) else (last.phase, last.epoch, 0)


TWO_PHASES = [*course(2, steps=2, phase=0), *course(1, steps=3, phase=2)]


@pytest.mark.parametrize("saved", range(len(TWO_PHASES) + 1))
def test_a_run_that_goes_on_from_its_checkpoint_has_the_history_of_one_that_was_not_stopped(tmp_path, saved):
    whole = lines_of(write_course(tmp_path, TWO_PHASES))
    for written in {saved, min(saved + 1, len(TWO_PHASES)), len(TWO_PHASES)}:  # rows that came after the checkpoint
        write_course(tmp_path, TWO_PHASES[:written])
        with open_history(RunFolder(tmp_path), place_after(TWO_PHASES[:saved]), a_plan()) as again:
            assert lines_of(tmp_path / history.NAME) == whole[:saved]
            for record in TWO_PHASES[saved:]:
                again.add(record)
        assert lines_of(tmp_path / history.NAME) == whole


def test_what_is_added_after_a_torn_line_begins_a_line_of_its_own(tmp_path):
    records = course(2)
    file = write_course(tmp_path, records)
    whole = lines_of(file)
    file.write_bytes(file.read_bytes()[:-9])
    with open_history(RunFolder(tmp_path), place_after(records[:-1]), a_plan()) as again:
        again.add(records[-1])
    assert lines_of(file) == whole


# Curves


def texts_of(file):
    """What is written in a drawing, as text that can be found and read aloud."""
    return ["".join(text.itertext()).strip() for text in ElementTree.parse(file).getroot().iter(f"{SVG}text")]


NOTHING_KNOWN = [
    epoch_of(0, epoch, loss=math.nan, accuracy=math.nan, select={"log_loss": math.nan, "accuracy": math.nan})
    for epoch in range(3)
]
SEVERAL_LABELS = [
    dataclasses.replace(record, select={"log_loss": 0.4, "map": 0.6}) if isinstance(record, Epoch) else record
    for record in course(2)
]


@pytest.mark.parametrize(
    "records",
    [
        pytest.param(course(3), id="one phase"),
        pytest.param(TWO_PHASES, id="two phases"),
        pytest.param(course(1, until=1), id="the start alone"),
        pytest.param(course(1, until=3), id="no finished epoch"),
        pytest.param(course(1)[1:3], id="steps alone"),
        pytest.param([], id="nothing"),
        pytest.param(NOTHING_KNOWN, id="no figure is a number"),
        pytest.param(SEVERAL_LABELS, id="several labels"),
    ],
)
def test_curves_are_drawn_readably_of_any_course(tmp_path, records):
    write_course(tmp_path, records)
    draw(tmp_path)
    texts = texts_of(tmp_path / "curves.svg")
    assert {"loss", "accuracy", "learning rate", "epoch", "training"} <= set(texts) and texts.count("epoch") == 3
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000 and picture.height > 300
        assert len(picture.convert("RGB").getcolors(2**24)) > 10


def test_curves_are_drawn_where_there_is_no_history(tmp_path):
    draw(tmp_path)
    assert "loss" in texts_of(tmp_path / "curves.svg") and (tmp_path / "curves.png").stat().st_size


def test_the_same_course_is_drawn_with_the_same_bytes(tmp_path):
    write_course(tmp_path, TWO_PHASES)
    draw(tmp_path)
    first = (tmp_path / "curves.svg").read_bytes()
    draw(tmp_path)
    assert (tmp_path / "curves.svg").read_bytes() == first


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A function that draws records and gives the points of each curve: (axis label, curve label) -> points."""

    def points(records):
        figures = []
        monkeypatch.setattr(history, "_save", lambda figure, file: figures.append(figure))
        write_course(tmp_path, records)
        draw(tmp_path)
        return {
            (axis.get_ylabel(), line.get_label() if axis.get_ylabel() != "learning rate" else ""): [
                (float(x), float(y)) for x, y in line.get_xydata()
            ]
            for axis in figures[0].axes
            for line in axis.lines
        }

    return points


def nearly(points):
    return [pytest.approx(point) for point in points]


def test_curves_go_through_the_figures_of_the_epochs_and_the_rates_of_the_steps(drawn):
    found = drawn(course(2, steps=2))
    assert found["loss", "training"] == [(1, 0.5), (2, 0.5)]  # before the first step there is no loss of training
    assert found["accuracy", "training"] == [(1, 0.75), (2, 0.75)]
    assert found["loss", "select"] == nearly([(0, 0.6), (1, 0.3), (2, 0.2)])
    assert found["accuracy", "select"] == [(0, 0.7), (1, 0.7), (2, 0.7)]
    assert found["learning rate", ""] == nearly([(0.5, 0.01), (1, 0.005), (1.5, 0.005), (2, 0.0025)])
    assert [x for x, _ in found["loss", "kept"]] == [1, 1]  # the second epoch was no better


def test_the_epochs_of_a_second_phase_follow_those_of_the_first(drawn):
    found = drawn(TWO_PHASES)
    assert [x for x, _ in found["loss", "select"]] == [0, 1, 2, 2, 3]
    assert [x for x, _ in found["learning rate", ""]] == pytest.approx([0.5, 1, 1.5, 2, 2 + 1 / 3, 2 + 2 / 3, 3])


def test_without_accuracy_among_the_figures_that_curve_is_left_out(drawn):
    found = drawn(SEVERAL_LABELS)
    assert ("loss", "select") in found and ("accuracy", "select") not in found


def test_a_figure_that_is_no_number_leaves_a_gap(drawn):
    records = [epoch_of(0, n, select={"log_loss": math.nan if n == 1 else 0.5, "accuracy": 0.5}) for n in range(3)]
    values = [y for _, y in drawn(records)["loss", "select"]]
    assert values[0] == values[2] == 0.5 and math.isnan(values[1])


def test_a_range_test_is_drawn_beside_the_curves_with_what_it_suggests(tmp_path):
    test = {"rates": [1e-5, 1e-3, 1e-1], "losses": [0.7, 0.5, 2.0], "suggested": 1e-4}
    (tmp_path / "learning_rate.json").write_text(json.dumps(test))
    write_course(tmp_path, course(1))
    draw(tmp_path)
    texts = texts_of(tmp_path / "learning_rate.svg")
    assert {"learning rate", "loss, smoothed", "suggested: 0.0001"} <= set(texts)
    with Image.open(tmp_path / "learning_rate.png") as picture:
        assert picture.width > 300
    assert (tmp_path / "curves.svg").exists()


@pytest.mark.slow
def test_drawing_long_courses_takes_little_longer_than_short_ones(tmp_path):
    seconds = []
    for steps in (200, 1600):
        write_course(tmp_path, course(5, steps=steps))
        start = time.perf_counter()
        draw(tmp_path)
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < 2 * seconds[0] + 1


# TensorBoard


@pytest.fixture
def scalars():
    """A function that reads a folder of TensorBoard's: name -> [(step, value)]."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    def get(folder):
        found = {}
        for file in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
            for event in EventFileLoader(str(file)).Load():
                for value in event.summary.value:
                    found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
        return found

    return get


def test_tensorboard_gets_the_rates_of_steps_and_the_figures_of_epochs(tmp_path, scalars):
    records = course(2, steps=2)
    with open_history(RunFolder(tmp_path), START, a_plan(tensorboard=True)) as written:
        for record in records:
            written.add(record)
    found = scalars(tmp_path / "tensorboard")
    assert set(found) == {"learning rate", "train/loss", "train/accuracy", "select/log_loss", "select/accuracy"}
    rates = [record.rate for record in records if isinstance(record, Step)]
    assert found["learning rate"] == [(number, pytest.approx(rate)) for number, rate in enumerate(rates, 1)]
    assert found["select/log_loss"] == [(n, pytest.approx(0.6 / (n + 1))) for n in range(3)]
    assert found["train/loss"] == [(1, 0.5), (2, 0.5)]  # before the first step there is none
    assert len(read(tmp_path / history.NAME)) == len(records)


def test_tensorboards_steps_are_counted_on_where_a_run_goes_on(tmp_path, scalars):
    records = course(2, steps=2)
    for part, done in ((records[:4], START), (records[4:], place_after(records[:4]))):
        with open_history(RunFolder(tmp_path), done, a_plan(tensorboard=True)) as written:
            for record in part:
                written.add(record)
    assert [step for step, _ in scalars(tmp_path / "tensorboard")["learning rate"]] == [1, 2, 3, 4]


def test_tensorboard_has_every_step_and_epoch_once_where_a_run_was_killed_and_goes_on(tmp_path, scalars):
    whole = tmp_path / "whole"
    whole.mkdir()
    with open_history(RunFolder(whole), START, a_plan(tensorboard=True)) as written:
        for record in TWO_PHASES:
            written.add(record)
    expected = scalars(whole / "tensorboard")
    # Rows that came after the checkpoint are written again, and a kill cuts TensorBoard's file short anywhere.
    for saved, written_until in ((0, 2), (4, 6), (7, 7), (9, 11)):
        killed = tmp_path / f"killed {saved}"
        killed.mkdir()
        with open_history(RunFolder(killed), START, a_plan(tensorboard=True)) as written:
            for record in TWO_PHASES[:written_until]:
                written.add(record)
        (file,) = (killed / "tensorboard").iterdir()
        file.write_bytes(file.read_bytes()[:-5])
        with open_history(RunFolder(killed), place_after(TWO_PHASES[:saved]), a_plan(tensorboard=True)) as again:
            for record in TWO_PHASES[saved:]:
                again.add(record)
        assert scalars(killed / "tensorboard") == expected
    assert [step for step, _ in expected["learning rate"]] == list(range(1, 8))
    assert [step for step, _ in expected["select/log_loss"]] == [0, 1, 2, 2, 3]


def test_other_files_beside_tensorboards_stay(tmp_path, scalars):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "notes.txt").write_text("kept")
    with open_history(RunFolder(tmp_path), START, a_plan(tensorboard=True)) as written:
        written.add(course(1)[0])
    assert (tmp_path / "tensorboard" / "notes.txt").read_text() == "kept"


class Noted:
    """A writer that notes what is asked of it."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *given: self.calls.append((name, *given))


def test_tensorboard_can_be_watched_while_it_is_trained(tmp_path, monkeypatch):
    noted = Noted()
    monkeypatch.setattr(history, "_open_tensorboard", lambda folder: noted)
    with open_history(RunFolder(tmp_path), START, a_plan(tensorboard=True)) as written:
        for record in course(2, steps=2):
            written.add(record)
            assert (noted.calls[-1] == ("flush",)) == isinstance(record, Epoch)
    assert noted.calls[-1] == ("close",)


def test_tensorboards_epochs_of_a_second_phase_follow_those_of_the_first(tmp_path, scalars):
    with open_history(RunFolder(tmp_path), START, a_plan(tensorboard=True)) as written:
        for record in TWO_PHASES:
            written.add(record)
    steps = [step for step, _ in scalars(tmp_path / "tensorboard")["select/log_loss"]]
    assert all(earlier <= later for earlier, later in itertools.pairwise(steps)) and steps[-1] == 3


def test_without_the_setting_tensorboard_gets_nothing(tmp_path):
    write_course(tmp_path, course(1))
    assert not (tmp_path / "tensorboard").exists()
