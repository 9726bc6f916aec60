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


def test_a_run_that_was_killed_within_an_epoch_ends_with_the_same_bits(command, tmp_path):
    finish(command("whole", "--epochs", "4"))
    process = start(command("killed", "--epochs", "4"))
    wait_for(tmp_path / "killed" / "checkpoint-previous.safetensors", process)
    process.kill()
    process.communicate()
    finish(command("killed", "--epochs", "4"))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


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
