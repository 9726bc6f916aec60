import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

HEADSTART = (sys.executable, "-m", "headstart")
# Whatever has a state: momenta, an average, dropout, mixing, statistics of batches; and a checkpoint at every step.
SETTINGS = shlex.split(
    "--strategy finetune --batch-size 4 --optimizer adamw --ema 0.9 --batch-norm train --mixup 0.2 --head batch-norm"
    " --checkpoint-minutes 0"
)


@pytest.fixture
def command(make_shapes, tiny_weights, tmp_path, monkeypatch):
    """A function that gives the words of a training command."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = make_shapes(tmp_path / "data", 14)

    def words(out, *more):
        return [*HEADSTART, "train", data, "--out", tmp_path / out, "--weights", tiny_weights, *SETTINGS, *more]

    return words


def start(words):
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(words):
    subprocess.run(words, check=True, capture_output=True)


def wait_for(file, process):
    until = time.monotonic() + 60
    while not file.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)


def assert_same_run(one, other):
    """The same bits of the model, and the same course but for the time it took."""
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    courses = []
    for folder in (one, other):
        rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        courses.append([{name: row[name] for name in row if name not in ("speed", "seconds")} for row in rows])
    assert courses[0] == courses[1]


def kill_at_random(words, kills, seed):
    moments = random.Random(seed)
    for _ in range(kills):
        process = start(words)
        time.sleep(moments.uniform(1.0, 6.0))
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_run_that_was_killed_twenty_times_ends_with_the_same_bits(command, tmp_path):
    # The mistake: optimiser state lost, the last stage begun again from its file
    finish(command("whole", "--epochs", "120"))
    kill_at_random(command("killed", "--epochs", "120"), 20, seed=0)
    assert not (tmp_path / "killed" / "metrics.json").exists()  # it was killed in the middle, to the last
    finish(command("killed", "--epochs", "120", "--resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_within_an_epoch_ends_with_the_same_bits(command, tmp_path, monkeypatch, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    finish(command("whole", "--epochs", "4"))
    process = start(command("killed", "--epochs", "4"))
    wait_for(tmp_path / "killed" / "checkpoint-previous.safetensors", process)
    process.kill()
    process.communicate()
    finish(command("killed", "--epochs", "4"))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


# Kills the process where a function is called for the so-many-th time under a condition on what it is given.
KILLED = """
import os, signal
from headstart import checkpoints, cli, engine, fitting, history, loading, prefix, runs
plainly, calls = {function}, []
def kill(*given, **named):
    if {condition}:
        calls.append(1)
        if len(calls) == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
    return plainly(*given, **named)
{function} = kill
cli.run()
"""
QUICK = "--epochs 2 --batch-size 8 --checkpoint-minutes 0 --learning-rate 0.01"
FINDING = "--epochs 2 --batch-size 8 --checkpoint-minutes 0 --find-lr"
SEARCHES = ("engine.Training.take_step", "len(given) > 3")  # a step of the range test is given its rate
WRITES = "runs.RunFolder.write_text"

# settings; the function, the condition and the call at which the process is killed
KEEPING = "--strategy lp-ft --taps blocks.1,blocks.2,final --freeze blocks.1 --cached-views 2"
PLACES = {
    "after the head was fitted": (f"--strategy lp-ft {QUICK}", ("fitting.train_phases", "True"), 1),
    "before the first measurement of lp-ft": (f"--strategy lp-ft {QUICK}", ("loading.Album.embed", "True"), 1),
    "after the start of lp-ft was measured": (f"--strategy lp-ft {QUICK}", ("checkpoints.write", "True"), 1),
    "between the activations that are kept": (f"{KEEPING} {QUICK}", ("prefix.keep", "True"), 2),
    "within training on kept activations": (f"{KEEPING} {QUICK}", ("checkpoints.write", "True"), 4),
    "between the stages": (f"--strategy two-stage {QUICK}", ("engine.Training.run", "True"), 2),
    "at the last checkpoint of the first stage": (
        f"--strategy two-stage {QUICK}",
        ("checkpoints.write", "given[1].facts['state']['epoch'] == 1 and not given[1].facts['state']['step']"),
        1,
    ),
    "at the first record of the second stage": (
        f"--strategy two-stage {QUICK}",
        ("history.History.add", "given[1].phase == 1"),
        1,
    ),
    "within the second stage": (
        f"--strategy two-stage {QUICK}",
        ("checkpoints.write", "given[1].facts['phase'] == 1 and given[1].facts['state']['step'] == 2"),
        2,
    ),
    "at the start of a range test": (f"--strategy finetune {FINDING}", SEARCHES, 1),
    "within a range test": (f"--strategy lp-ft {FINDING}", SEARCHES, 30),
    "within a range test between the stages": (f"--strategy two-stage {FINDING}", SEARCHES, 30),
    "after a range test, before the plan says its rate": (
        f"--strategy two-stage {FINDING}",
        (WRITES, "given[1] == 'plan.json'"),
        2,
    ),
    "after a range test, before the first checkpoint": (
        f"--strategy finetune {FINDING}",
        ("checkpoints.write", "True"),
        1,
    ),
    "after the model, before the predictions": (f"--strategy finetune {QUICK}", (WRITES, "'.csv' in given[1]"), 2),
    "after the curves, before the figures": (
        f"--strategy finetune {QUICK}",
        (WRITES, "given[1] == 'metrics.json'"),
        1,
    ),
    "after an early stop": (
        "--strategy finetune --epochs 40 --batch-size 8 --patience 2 --learning-rate 0.05",
        (WRITES, "'.csv' in given[1]"),
        2,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_run_is_killed_it_goes_on_and_ends_with_the_same_bits(
    make_shapes, tiny_weights, tmp_path, monkeypatch, place
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings, (function, condition), call = PLACES[place]
    data, script = make_shapes(tmp_path / "data", 14), tmp_path / "killed.py"
    script.write_text(KILLED.format(function=function, condition=condition, call=call))
    whole, killed = (
        ["train", data, "--out", tmp_path / name, "--weights", tiny_weights, *shlex.split(settings)]
        for name in ("whole", "killed")
    )
    finish([*HEADSTART, *whole])
    result = subprocess.run([sys.executable, script, *killed], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (tmp_path / "killed" / "metrics.json").exists()
    finish([*HEADSTART, *killed])
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    same = ("metrics.json", "predictions.csv", "split.csv", "plan.json", "learning_rate.json")
    for name in same if "--find-lr" in settings else same[:-1]:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "killed")]
    assert names[0] == names[1]  # no checkpoint is left, nor half a file
    finish([*HEADSTART, *killed, "--resume"])  # it is finished
    if "--patience" in settings:
        rows = [json.loads(line) for line in (tmp_path / "killed" / "history.jsonl").read_text().splitlines()]
        assert any(row.get("best") for row in rows[1:]) and 2 < rows[-1]["epoch"] < 40


@pytest.mark.slow
def test_a_run_that_is_killed_after_it_stopped_early_trains_no_further(make_shapes, tiny_weights, tmp_path):
    settings, (function, condition), call = PLACES["after an early stop"]
    data, script = make_shapes(tmp_path / "data", 14), tmp_path / "killed.py"
    script.write_text(KILLED.format(function=function, condition=condition, call=call))
    words = ["train", data, "--out", tmp_path / "run", "--weights", tiny_weights, *shlex.split(settings)]
    subprocess.run([sys.executable, script, *words], capture_output=True, check=False, timeout=120)
    before = (tmp_path / "run" / "history.jsonl").read_bytes()
    result = subprocess.run([*HEADSTART, *words], capture_output=True, text=True, check=True)
    assert (tmp_path / "run" / "history.jsonl").read_bytes() == before
    assert "going on after epoch" in result.stderr and "epoch 1: loss" not in result.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("heed_interrupts")
def test_a_signal_saves_and_prints_the_command_that_goes_on(command, tmp_path, number, status):
    words = command("run", "--epochs", "1000")
    process = start(words)
    wait_for(tmp_path / "run" / "checkpoint-previous.safetensors", process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in error
    (again,) = re.findall(r"^to go on: headstart (train .* --resume)$", error, re.M)
    process = start([*HEADSTART, *shlex.split(again)])
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("epoch"):
            break
    process.kill()
    process.communicate()
    assert any(re.match(r"going on after epoch \d+, step \d+", line) for line in lines)


@pytest.mark.skipif(os.name != "posix", reason="limits of file sizes are POSIX")
def test_a_checkpoint_that_cannot_be_written_says_what_is_needed_and_keeps_the_one_before(command, tmp_path):
    words = command("run", "--epochs", "1000")
    process = start(words)
    wait_for(tmp_path / "run" / "checkpoint-previous.safetensors", process)
    process.kill()
    process.communicate()
    # No file may grow beyond 100 KB: as a disk that is full for a checkpoint, but not for a line of history.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
    code = f"{limit} import sys; from headstart import cli; sys.exit(cli.main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", code, *words[3:]], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 1
    assert re.search(r"error: training: .*checkpoint.safetensors: cannot be written .* MiB are needed, ", result.stderr)
    assert "the last good checkpoint is kept" in result.stderr
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
    process = start(words)
    for line in process.stderr:
        if line.startswith("going on after"):
            break
    process.kill()
    process.communicate()
    assert line.startswith("going on after")
