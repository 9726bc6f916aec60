import json
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
SETTINGS = shlex.split("--optimizer sgd --epochs 2 --batch-size 5 --precision float32")


@pytest.fixture
def train(make_shapes, tiny_weights, tmp_path, monkeypatch):
    """A function that trains in one process or two, each with an empty cache."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = make_shapes(tmp_path / "data", 14)

    def run(out, launcher, *more):
        monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / f"cache of {out}"))
        words = ["train", data, "--out", tmp_path / out, "--weights", tiny_weights, *SETTINGS, *more]
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
def test_features_are_shared_out_among_processes_and_the_heads_are_the_same(train, tmp_path):
    assert train("two", TWO, "--strategy", "probe").returncode == 0
    assert train("one", (sys.executable,), "--strategy", "probe").returncode == 0
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
