import dataclasses
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import headstart
from headstart import cli, processes

TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
SETTINGS = shlex.split("--optimizer sgd --epochs 2 --batch-size 5 --precision float32")


@pytest.fixture
def train(make_shapes, tiny_weights, tmp_path, monkeypatch):
    """A function that trains in one process or two, each with an empty cache."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = make_shapes(tmp_path / "data", 14)

    def run(out, launcher, *more, settings=SETTINGS, data=data):
        monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / f"cache of {out}"))
        words = ["train", data, "--out", tmp_path / out, "--weights", tiny_weights, *settings, *more]
        return subprocess.run(
            [*launcher, "-m", "headstart", *words], capture_output=True, text=True, check=False, timeout=120
        )

    return run


def rows_of(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "settings",
    [
        ("--strategy", "finetune", "--accumulate", "2", "--mixup", "0.3", "--learning-rate", "0.01"),
        pytest.param(
            ("--strategy", "lp-ft", "--freeze", "blocks.2", "--ema", "0.8", "--learning-rate", "1e-7"),
            marks=pytest.mark.slow,
        ),
        pytest.param(("--strategy", "finetune", "--taps", "blocks.1"), marks=pytest.mark.slow),
        pytest.param(("--strategy", "two-stage", "--unfreeze-epochs", "1", "--freeze", "all"), marks=pytest.mark.slow),
    ],
)
def test_two_processes_see_the_same_pictures_and_give_the_same_model_as_one(train, tmp_path, settings):
    # 27 pictures in windows of 10 or 5: neither they nor the last batch of two are even
    two = train("two", TWO, *settings)
    assert two.returncode == 0, two.stderr
    one = train("one", (sys.executable,), *settings)
    assert one.returncode == 0, one.stderr
    first, second = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row.get("pictures") for row in first] == [row.get("pictures") for row in second]
    for mine, theirs in zip(first, second, strict=True):
        if mine["epoch"]:
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["accuracy"] == theirs["accuracy"]
        for name, value in mine.get("select", {}).items():
            assert theirs["select"][name] == pytest.approx(value, rel=1e-2, abs=1e-4)
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    # The mistake: "module." in every key
    assert models[0].keys() == models[1].keys()
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=1e-4, atol=1e-5)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[0]["n"] == metrics[1]["n"]
    assert metrics[0]["metrics"]["accuracy"] == metrics[1]["metrics"]["accuracy"]
    # One process speaks: every epoch's line is there once.
    assert two.stderr.count("epoch 1: loss") == len([row for row in second if row["epoch"] == 1 and "step" not in row])
    assert two.stdout.count("written to") == 1


@pytest.mark.slow
def test_what_is_trained_further_in_two_processes_is_weighed_as_in_one(make_shapes, train, tmp_path):
    many = make_shapes(tmp_path / "many", 110)
    rows = [
        f"{path.relative_to(tmp_path)},{('square', path.parent.name)[number % 3 > 0]}"  # some labels are wrong
        for number, path in enumerate(sorted(many.rglob("*.png")))
    ]
    (tmp_path / "table.csv").write_text("\n".join(("image,label", *rows)))
    settings = shlex.split("--time-budget 1h --taps blocks.3,final --epochs 2 --precision float32")
    reasons = []
    for name, launcher in (("two", TWO), ("one", (sys.executable,))):
        done = train(name, launcher, settings=settings, data=tmp_path / "table.csv")
        assert done.returncode == 0, done.stderr
        reasons.append(json.loads((tmp_path / name / "plan.json").read_text())["reasons"])
    arms = ("the fitted head", "the last blocks trained", "all blocks trained")
    weighed = [[line for line in told if line.startswith(arms) and " against " not in line] for told in reasons]
    assert len(weighed[0]) == len(weighed[1]) == 17
    for first, second in zip(*weighed, strict=True):
        (name, mine), (same, its) = (reason.split(": log-loss ") for reason in (first, second))
        assert name == same and float(mine) == pytest.approx(float(its), abs=0.01)


@pytest.mark.slow
def test_features_are_shared_out_among_processes_and_the_heads_are_the_same(train, tmp_path):
    settings = ("--strategy", "probe", "--precision", "float32")
    for name, launcher in (("two", TWO), ("one", (sys.executable,))):
        done = train(name, launcher, settings=settings)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "one" / "split.csv").read_bytes() == (tmp_path / "two" / "split.csv").read_bytes()
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text())["metrics"] for name in ("one", "two")]
    assert metrics[0]["accuracy"] == metrics[1]["accuracy"]
    assert metrics[0]["log_loss"]["value"] == pytest.approx(metrics[1]["log_loss"]["value"], rel=1e-3)


FAILING = """
import os
from headstart import cli, engine
step = engine.Training.take_step
def fail(self, *arguments):
    if self.world.rank == {rank} and self.state.step == 2:
        raise ValueError("this one fails")
    return step(self, *arguments)
engine.Training.take_step = fail
cli.run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_all_with_one_message(train, tmp_path, monkeypatch, rank):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(rank=rank))
    words = ["train", tmp_path / "data", "--out", tmp_path / "run", "--strategy", "finetune", *SETTINGS]
    weights = ["--weights", next((tmp_path.parent).glob("weights*/tiny.safetensors"))]
    result = subprocess.run([*TWO, script, *words, *weights], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode != 0
    assert [line for line in result.stderr.splitlines() if line.startswith("error:")] == [
        "error: unexpected: ValueError: this one fails. Please report this, with --debug's output."
    ]


@pytest.mark.slow
def test_wrong_data_are_an_error_said_once(train, tmp_path):
    result = subprocess.run(
        [*TWO, "-m", "headstart", "train", tmp_path / "nothing", "--strategy", "finetune"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode != 0
    assert sum(line.startswith("error: data:") for line in result.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_wrong_data_are_said_once_whichever_process_finds_them_first(tmp_path, late):
    script = tmp_path / "late.py"
    wait = f"import os, time; time.sleep(1.5 * (os.environ['RANK'] == '{late}'))"
    script.write_text(f"{wait}\nfrom headstart import cli\ncli.run()\n")
    words = [*TWO, script, "train", tmp_path / "nothing", "--strategy", "finetune"]
    result = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode != 0
    assert sum(line.startswith("error: data:") for line in result.stderr.splitlines()) == 1


# Processes without torchrun: each one's exit status can be seen


def start_ranks(words, size=2, **more):
    """The processes of a job, each told its place as torchrun would tell it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            list(map(str, words)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            **more,
        )
        for rank in range(size)
    ]


def end_ranks(ranks, seconds=90):
    """(exit status, what it said on stderr) of each process."""
    try:
        return [(process.communicate(timeout=seconds)[1], process.returncode)[::-1] for process in ranks]
    finally:
        for process in ranks:
            if process.poll() is None:  # it waits for one that has gone
                process.kill()
                process.communicate()


# The engine in two processes


SIZE, CLASSES = 8, 3


def build_small():
    """A network with a batch norm, and a head."""
    from headstart.engine import Adapted

    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Adapted(body.eval(), nn.Linear(4, CLASSES))


def begin_small(world, validate, folder=None, **changes):
    """A phase of three epochs of three steps: 11 pictures in steps of 4, the last one of 3."""
    from headstart.blocks import find_blocks
    from headstart.config import EngineConfig
    from headstart.engine import Training
    from headstart.images import Preprocess
    from headstart.material import Material
    from headstart.timing import Layout

    plain = {"epochs": 3, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.05, "layer_decay": 1.0}
    plain |= {"schedule": "constant", "loss": "cross-entropy", "batch_norm": "train", "augment": "none"}
    labels = np.arange(11) % CLASSES
    pixels = np.random.default_rng(0).integers(0, 256, (11, SIZE, SIZE, 3)).astype(np.uint8)
    preprocess = Preprocess(SIZE, 1.0)
    targets = np.eye(CLASSES, dtype=bool)[labels]
    material = Material(lambda draw, _: pixels[draw.sample], preprocess.normalise, targets, "single")
    model, settings = build_small(), EngineConfig(**{**plain, **changes})
    blocks, layout = find_blocks(model.backbone, SIZE), Layout("float32", False)
    training = Training(model, blocks, settings, layout, material, validate, folder=folder, world=world)
    inputs = preprocess.normalise(torch.from_numpy(pixels)).contiguous()

    def measure(judged, check):
        check()
        with torch.no_grad():
            return {"log_loss": functional.cross_entropy(judged(inputs), torch.from_numpy(labels)).item()}

    training.validate = validate or measure
    return training


def numbers_of(model):
    return {name: tensor.double().flatten().tolist() for name, tensor in model.state_dict().items()}


def run_course(world, **changes):
    """What a whole course comes to."""
    from headstart.engine import Epoch

    training = begin_small(world, None, **changes)
    epochs, buffers = [], []
    for record in training.run():
        if isinstance(record, Epoch):
            epochs.append({**dataclasses.asdict(record), "seconds": 0})
            buffers.append(training.model.backbone[1].running_mean.tolist())
    return {"epochs": epochs, "buffers": buffers, "left": numbers_of(training.model)}


def run_patient(world):
    """The epochs of a course in which the processes measure other figures: only the first one's get no better."""
    figures = itertools.count(1.0) if world.first else itertools.count(0.0, -1.0)
    training = begin_small(world, lambda *_: {"log_loss": next(figures)}, patience=2, epochs=9)
    return [record.epoch for record in training.run() if not hasattr(record, "step")]


def run_signalled(world, folder, rank, where):
    """What becomes of a course in which a signal comes to one process, in its fifth pass or second measurement."""
    from headstart import checkpoints

    def act(*_):
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, act)
    folder.mkdir(exist_ok=True)
    passes, measurements, done = itertools.count(1), itertools.count(1), []

    def validate(judged, check):
        if next(measurements) == 2 and where == "validation" and world.rank == rank:
            signal.raise_signal(signal.SIGTERM)
            check()  # nobody leaves alone
        done.append("measured")
        return {"log_loss": 1.0}

    training = begin_small(world, validate, folder)

    def see(*_):
        if training.model.head.training and next(passes) == 5 and where == "step" and world.rank == rank:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)  # as torchrun does, right after the first

    training.model.head.register_forward_hook(see)
    try:
        done.extend((record.epoch, getattr(record, "step", 0)) for record in training.run())
        return {"stopped": False}
    except KeyboardInterrupt:
        kept = checkpoints.read(folder)  # whoever leaves first leaves after it was written
        return {"stopped": True, "done": done, "kept": (kept.facts["state"]["epoch"], kept.facts["state"]["step"])}


def check_in_ranks(folder):
    """All of the above in this process, one of several; what came of it is written down."""
    folder, world = Path(folder), processes.find_world()
    processes.join(world, torch.device("cpu"))
    found = {
        "course": run_course(world),
        "average": run_course(world, ema=0.5),
        "patient": run_patient(world),
        "signals": {
            f"{where} {rank}": run_signalled(world, folder / f"{where} {rank}", rank, where)
            for where in ("step", "validation")
            for rank in (0, 1)
        },
    }
    processes.leave()
    (folder / f"{world.rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes came to: the first one's, the other one's."""
    folder = tmp_path_factory.mktemp("ranks")
    code = f"import test_distributed; test_distributed.check_in_ranks({str(folder)!r})"
    ended = end_ranks(start_ranks([sys.executable, "-c", code], cwd=Path(__file__).parent))
    assert [status for status, _ in ended] == [0, 0], ended
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("course", ["course", "average"])
def test_before_a_measurement_all_processes_have_the_statistics_of_the_first(ranks, course):
    first, other = (found[course] for found in ranks)
    assert first["buffers"] == other["buffers"]
    assert len({tuple(row) for row in first["buffers"]}) == 4  # they move
    assert first["left"] == other["left"]


@pytest.mark.parametrize("course", ["course", "average"])
def test_all_processes_go_by_the_figures_of_the_first(ranks, course):
    first, other = (found[course]["epochs"] for found in ranks)
    assert repr(first) == repr(other)  # NaN is NaN
    assert len({epoch["select"]["log_loss"] for epoch in first}) == 4


def test_where_processes_would_measure_other_figures_the_first_ones_end_the_training(ranks):
    assert [found["patient"] for found in ranks] == [[0, 1, 2]] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_in_a_step_stops_all_after_it_and_is_saved_before_any_leaves(ranks, rank):
    found = [one["signals"][f"step {rank}"] for one in ranks]
    assert [one["stopped"] for one in found] == [True, True]
    assert found[0]["done"] == found[1]["done"] == ["measured", [0, 0], *([1, n] for n in (1, 2, 3)), "measured",
                                                    [1, 0], [2, 1], [2, 2]]  # fmt: skip
    assert [one["kept"] for one in found] == [[1, 2]] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_while_it_measures_stops_all_once_all_have_measured(ranks, rank):
    found = [one["signals"][f"validation {rank}"] for one in ranks]
    assert [one["stopped"] for one in found] == [True, True]
    assert found[0]["done"] == found[1]["done"] == ["measured", [0, 0], *([1, n] for n in (1, 2, 3)), "measured"]
    assert [one["kept"] for one in found] == [[0, 3]] * 2


# What several processes leave behind


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        "--strategy scratch",
        "--strategy finetune --batch-norm train",
        "--strategy finetune --head batch-norm --hidden 16 --patience 1",
        "--strategy scratch --ema 0.5 --patience 2 --cache none",
    ],
    ids=["scratch", "batch norms", "head", "average"],
)
def test_the_figures_of_a_run_are_those_of_the_model_that_it_saved(make_shapes, tiny_weights, tmp_path, settings):
    # Of a model whose batch norms learn, each process has statistics of its own; one of them is saved. 27 pictures are
    # learned from: the last step of an epoch shows other ones to each process, too.
    data, folder = make_shapes(tmp_path / "data", 14), tmp_path / "run"
    words = [sys.executable, "-m", "headstart", "train", data, "--out", folder, "--weights", tiny_weights]
    words += shlex.split(f"--batch-size 9 --epochs 4 --learning-rate 0.01 --precision float32 {settings}")
    ended = end_ranks(start_ranks(words))
    assert [status for status, _ in ended] == [0, 0], ended
    assert [row for row in rows_of(folder) if row.get("best")][-1]["epoch"] > 0  # what was trained was kept
    stored, again = json.loads((folder / "metrics.json").read_text()), headstart.evaluate(folder).to_json()
    assert again["n"] == stored["n"]
    for name, values in stored["metrics"].items():
        for key, value in values.items():
            assert again["metrics"][name][key] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("--strategy", "finetune"),
        ("--strategy", "lp-ft", "--batch-norm", "train"),
        ("--strategy", "probe", "--head", "batch-norm"),
    ],
    ids=["finetune", "lp-ft", "probe"],
)
def test_three_processes_may_have_so_few_pictures_that_some_get_none(make_shapes, tiny_weights, tmp_path, settings):
    # 7 pictures to fit, in steps of 4 and 3 and passes of 2 and 1; 2 to choose by; 2 to report.
    data = make_shapes(tmp_path / "few", 6, ("circle", "square"))
    words = [sys.executable, "-m", "headstart", "train", data, "--out", tmp_path / "run", "--weights", tiny_weights]
    words += ["--batch-size", "2", "--accumulate", "2", "--epochs", "2", "--precision", "float32", *settings]
    ended = end_ranks(start_ranks(words, 3))
    assert [status for status, _ in ended] == [0, 0, 0], ended
    roles = (tmp_path / "run" / "split.csv").read_text()
    assert roles.count(",select") < 3 or roles.count(",report") < 3  # else nothing is tested
    again = headstart.evaluate(tmp_path / "run").to_json()["metrics"]
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]
    assert again["log_loss"]["value"] == pytest.approx(stored["log_loss"]["value"], rel=1e-4)


@pytest.mark.slow
def test_without_a_cache_pictures_are_looked_at_by_all_and_the_folder_goes_when_all_are_done(train, tmp_path):
    settings = ("--strategy", "finetune", "--cache", "none")
    two = train("two", TWO, *settings)
    assert two.returncode == 0, two.stderr
    assert train("one", (sys.executable,), *settings).returncode == 0
    for name in ("split.csv", "audit.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert not (tmp_path / "cache of two" / "features").exists()


# Writes down what this process, if it is not the first, opens to write, renames, makes or removes.
WATCHING = """
import json, os, sys
seen = []
def look(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        mode, flags = str(arguments[1] or ""), arguments[2] or 0
        if set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen.append((event, os.fsdecode(arguments[0])))
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
        seen.append((event, os.fsdecode(arguments[0])))
sys.addaudithook(look)
from headstart import cli
status = cli.main(sys.argv[1:])
with open({log!r} + os.environ["RANK"], "w") as file:
    file.write(json.dumps(seen))
os._exit(status)
"""


@pytest.mark.slow
def test_only_the_first_process_writes_into_the_run_folder(make_shapes, tiny_weights, tmp_path):
    data, log = make_shapes(tmp_path / "data", 10), tmp_path / "log"
    script = tmp_path / "watching.py"
    script.write_text(WATCHING.format(log=str(log)))
    words = [sys.executable, script, "train", data, "--out", tmp_path / "run", "--weights", tiny_weights, *SETTINGS]
    words += ["--strategy", "two-stage", "--find-lr", "--checkpoint-minutes", "0", "--tensorboard"]
    ended = end_ranks(start_ranks(words))
    assert [status for status, _ in ended] == [0, 0], ended
    written = []
    for rank in range(2):
        events = json.loads(Path(f"{log}{rank}").read_text())
        written.append([event for event in events if Path(event[1]).is_relative_to(tmp_path / "run")])
    assert len(written[0]) > 20
    assert written[1] == []


# Stopping and going on


def wait_for(file, ranks):
    until = time.monotonic() + 90
    while not file.exists():
        assert all(process.poll() is None for process in ranks), [process.communicate()[1] for process in ranks]
        assert time.monotonic() < until
        time.sleep(0.05)


# Everything that has a state, and a checkpoint at every step.
STATEFUL = shlex.split(
    "--strategy finetune --batch-norm train --head batch-norm --hidden 16 --ema 0.9 --mixup 0.2 --patience 30"
    " --epochs 12 --batch-size 5 --optimizer adamw --precision float32 --checkpoint-minutes 0"
)

# The third measurement takes its time, and says that it has begun.
MEASURING = """
import pathlib, time
from headstart import cli, loading
plainly, calls = loading.Album.embed, []
def embed(*given, **named):
    calls.append(1)
    if len(calls) == 3:
        pathlib.Path({mark!r}).touch()
        time.sleep(2)
    return plainly(*given, **named)
loading.Album.embed = embed
cli.run()
"""


@pytest.fixture
def job(make_shapes, tiny_weights, tmp_path, monkeypatch):
    """A function that gives the words of a training command, after those that start Python."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = make_shapes(tmp_path / "data", 14)
    return lambda out: ["train", data, "--out", tmp_path / out, "--weights", tiny_weights, *STATEFUL]


@pytest.fixture
def undisturbed(job, tmp_path):
    """The folder of a run of two processes that nothing happened to."""
    ended = end_ranks(start_ranks([sys.executable, "-m", "headstart", *job("whole")]))
    assert [status for status, _ in ended] == [0, 0], ended
    return tmp_path / "whole"


def go_on(error):
    """Give the command that was logged, and wait for its end."""
    (again,) = re.findall(r"^to go on: torchrun --nproc-per-node=2 -m headstart (train .* --resume)$", error, re.M)
    words = [*TWO, "-m", "headstart", *shlex.split(again)]
    result = subprocess.run(words, capture_output=True, text=True, check=False, timeout=180)
    assert result.returncode == 0, result.stderr
    assert re.search(r"going on after epoch \d+, step \d+", result.stderr)


def assert_same_run(one, other):
    models = [load_file(folder / "model.safetensors") for folder in (one, other)]
    assert models[0].keys() == models[1].keys()
    assert [name for name in models[0] if not torch.equal(models[0][name], models[1][name])] == []
    courses = [
        [{name: row[name] for name in row if name not in ("speed", "seconds")} for row in rows_of(folder)]
        for folder in (one, other)
    ]
    assert courses[0] == courses[1]


@pytest.mark.parametrize(("error", "status"), [(cli._Terminated(), 143), (KeyboardInterrupt(), 130)])
def test_every_process_ends_with_the_status_of_its_signal(monkeypatch, error, status):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for first in (True, False):
        monkeypatch.setattr(processes, "speaks_first", lambda _, first=first: first)
        assert cli._report(error, []) == status


@pytest.mark.slow
@pytest.mark.usefixtures("heed_interrupts")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("where", ["steps", "validation"])
def test_a_signal_to_all_processes_saves_and_the_logged_command_goes_on_with_the_same_bits(
    job, undisturbed, tmp_path, where, number, status
):
    script, mark = tmp_path / "measuring.py", tmp_path / "measuring"
    script.write_text(MEASURING.format(mark=str(mark)))
    started = start_ranks([sys.executable, script, *job("stopped")])
    wait_for(mark if where == "validation" else tmp_path / "stopped" / "checkpoint-previous.safetensors", started)
    for process in started:
        process.send_signal(number)
    ended = end_ranks(started)
    assert status in [got for got, _ in ended] and all(got for got, _ in ended), ended
    assert not any("Traceback" in error for _, error in ended), ended
    assert sum("interrupted: what was done so far is kept" in error for _, error in ended) == 1
    assert (tmp_path / "stopped" / "checkpoint.safetensors").exists()
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    assert "to go on" not in ended[1][1]
    go_on(ended[0][1])
    assert_same_run(undisturbed, tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.usefixtures("heed_interrupts")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["steps", "validation"])
def test_a_signal_to_torchrun_and_its_processes_saves_and_goes_on_with_the_same_bits(
    job, undisturbed, tmp_path, where, number
):
    script, mark = tmp_path / "measuring.py", tmp_path / "measuring"
    script.write_text(MEASURING.format(mark=str(mark)))
    words = [*TWO, script, *map(str, job("stopped"))]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(mark if where == "validation" else tmp_path / "stopped" / "checkpoint-previous.safetensors", [process])
    os.killpg(process.pid, number)
    ((status, error),) = end_ranks([process])
    assert status != 0
    assert (tmp_path / "stopped" / "checkpoint.safetensors").exists()
    go_on(error)
    assert_same_run(undisturbed, tmp_path / "stopped")


@pytest.mark.slow
def test_a_job_that_was_killed_goes_on_with_the_same_bits(job, undisturbed, tmp_path):
    for _ in range(2):
        started = start_ranks([sys.executable, "-m", "headstart", *job("killed")])
        (tmp_path / "killed" / "checkpoint-previous.safetensors").unlink(missing_ok=True)
        wait_for(tmp_path / "killed" / "checkpoint-previous.safetensors", started)
        for process in started:
            process.kill()
        end_ranks(started)
    ended = end_ranks(start_ranks([sys.executable, "-m", "headstart", *job("killed")]))
    assert [status for status, _ in ended] == [0, 0], ended
    assert "going on after" in ended[0][1]
    assert_same_run(undisturbed, tmp_path / "killed")


@pytest.mark.slow
def test_going_on_with_one_process_instead_of_two_is_said(job, tmp_path):
    started = start_ranks([sys.executable, "-m", "headstart", *job("run")])
    wait_for(tmp_path / "run" / "checkpoint-previous.safetensors", started)
    for process in started:
        process.kill()
    end_ranks(started)
    words = [sys.executable, "-m", "headstart", *map(str, job("run"))]
    result = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    told = "going on with 1 processes of 1 threads instead of 2 processes of 1 threads: the last bits"
    assert told in result.stderr
