import csv
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headstart import cli, demonstration, display, training
from headstart.quality import Finding
from headstart.verdicts import Evidence, Variant

GOLDEN = Path(__file__).parent / "golden"
ODD_NAMES = [
    "two words.png",
    "蚂蚁.png",
    "🐜.png",
    "quote\"s'.png",
    "line\nbreak.png",
    os.fsdecode(b"bytes\xff\xfe.png"),
]


@pytest.fixture(scope="module")
def run(shapes, tiny_weights, tmp_path_factory):
    """A finished run of the drawn pictures; tests must not change it."""
    folder = tmp_path_factory.mktemp("runs") / "shapes"
    training.train(shapes, folder, weights=str(tiny_weights), cache=str(tmp_path_factory.mktemp("cache")))
    return folder


def call(capsys, *words: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command line."""
    status = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def last_line(text: str) -> str:
    return text.rstrip("\n").rsplit("\n", 1)[-1]


# Help and errors, as they are printed


@pytest.mark.parametrize(
    "verb", ["", "train", "evaluate", "predict", "audit", "models", "rank", "recipe", "fetch", "demo"]
)
def test_help_is_what_it_was(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, _ = call(capsys, *([verb] if verb else []), "--help")
    golden = GOLDEN / f"help_{verb or 'headstart'}.txt"
    if "UPDATE_GOLDEN" in os.environ:
        golden.write_text(out)
    assert status == 0
    assert out == golden.read_text()


BAD_CALLS = {
    "no such folder": ("train", "nowhere"),
    "empty folder": ("train", "empty"),
    "no pictures": ("train", "texts"),
    "one class": ("train", "lonely"),
    "another class in val": ("train", "unlike"),
    "missing picture in a table": ("train", "table.csv"),
    "a file where the output folder should be": ("train", "shapes", "--out", "table.csv"),
    "another run's folder": ("train", "shapes", "--out", "run", "--seed", "7"),
    "a finished run": ("train", "shapes", "--out", "run"),
    "a folder with other files": ("train", "shapes", "--out", "texts"),
    "unknown backbone": ("train", "shapes", "--backbone", "efficientnet_lite00"),
    "unknown device": ("train", "shapes", "--device", "tpu9"),
    "missing weights file": ("train", "shapes", "--weights", "none.pth"),
    "all mistakes in a settings file": ("train", "shapes", "--config", "wrong.toml"),
    "unknown flag": ("train", "shapes", "--sead", "1"),
    "a flag out of range": ("train", "shapes", "--folds", "1"),
    "a word where a number belongs": ("train", "shapes", "--seed", "one"),
    "no such run": ("predict", "nowhere", "run/config.toml"),
    "a foreign model": ("predict", "table.csv", "shapes"),
    "no pictures to predict": ("predict", "run", "texts"),
    "top 0": ("predict", "run", "shapes", "--top", "0"),
    "evaluation on other classes": ("evaluate", "run", "--data", "strange"),
    "no network of that name": ("models", "no_such_network"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_gives_one_line_and_its_status(
    case, capsys, monkeypatch, tmp_path, make_shapes, run, shapes, tiny_weights
):
    monkeypatch.chdir(tmp_path)
    Path("shapes").symlink_to(shapes)
    training.train("shapes", "run", weights=str(tiny_weights)) if "run" in BAD_CALLS[case] else None
    Path("empty").mkdir()
    Path("texts/notes").mkdir(parents=True)
    Path("texts/notes/a.txt").write_text("words")
    make_shapes(Path("lonely"), 2, ("circle",))
    make_shapes(Path("unlike/train"), 2, ("circle", "square"))
    make_shapes(Path("unlike/val"), 2, ("circle", "triangle"))
    make_shapes(Path("strange"), 2, ("circle", "square"))
    Path("strange/square").rename("strange/star")
    Path("table.csv").write_text("image,label\nshapes/circle/0.png,round\nmissing.png,flat\n")
    Path("wrong.toml").write_text('[train]\nseeed = 1\nfolds = "five"\n[model]\nseed = 2\nprecision = "int8"\n')
    flags = ("--weights", tiny_weights) if case in ("a finished run", "another run's folder") else ()
    status, _, err = call(capsys, *BAD_CALLS[case], *flags)
    line = last_line(err).replace(str(tmp_path), "TMP")
    golden = GOLDEN / "errors.json"
    known = json.loads(golden.read_text()) if golden.exists() else {}
    if "UPDATE_GOLDEN" in os.environ:
        golden.write_text(json.dumps({**known, case: [status, line]}, indent=1, ensure_ascii=False) + "\n")
    assert [line_ for line_ in err.splitlines() if line_.startswith("error: ")] == [last_line(err)]
    assert [status, line] == known[case]


def test_debug_shows_the_traceback_and_keeps_the_status(capsys):
    status, _, err = call(capsys, "train", "nowhere", "--debug")
    assert status == 2
    assert "Traceback" in err
    assert last_line(err).startswith("error: data: nowhere")


# Training


def test_train_leaves_the_files_of_the_contract(run):
    names = {path.name for path in run.iterdir()} - {".lock"}
    assert names == {
        *("config.toml", "plan.json", "split.csv", "audit.json", "environment.json"),
        *("model.safetensors", "predictions.csv", "metrics.json"),
    }


def test_the_default_folder_counts_up_and_an_unfinished_run_goes_on(
    capsys, monkeypatch, tmp_path, shapes, tiny_weights
):
    monkeypatch.chdir(tmp_path)
    words = ("train", shapes, "--weights", tiny_weights)
    assert call(capsys, *words)[0] == 0
    first = next(Path("runs").iterdir())
    assert first.name == f"{shapes.name}-1"
    (first / "metrics.json").unlink()
    assert call(capsys, *words)[0] == 0
    assert [path.name for path in Path("runs").iterdir()] == [f"{shapes.name}-1"]
    assert call(capsys, *words)[0] == 0
    assert len(list(Path("runs").iterdir())) == 2


def test_resume_keeps_a_finished_run_unchanged(capsys, run, shapes, tiny_weights):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name != ".lock"}
    config = training.configs.flatten(training.configs.resolve(run / "config.toml"))
    words = ("train", shapes, "--out", run, "--resume", "--weights", tiny_weights, "--cache", config["cache"])
    status, out, _ = call(capsys, *words)
    assert status == 0
    assert "nothing was changed" in out
    assert before == {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name != ".lock"}


def test_two_runs_in_one_folder_at_once_are_refused(capsys, tmp_path, shapes, tiny_weights):
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        status, _, err = call(capsys, "train", shapes, "--out", tmp_path / "run", "--weights", tiny_weights)
    assert status == 2
    assert "another process is running in it" in err


def test_a_summary_says_figure_interval_and_what_next(capsys, tmp_path, shapes, tiny_weights):
    status, out, _ = call(capsys, "train", shapes, "--out", tmp_path / "run", "--weights", tiny_weights)
    assert status == 0
    assert re.search(r"^accuracy +\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\] n=6$", out, re.M)
    assert f"headstart predict {tmp_path / 'run'} PICTURE..." in out


@pytest.fixture(scope="module")
def trained(shapes, tiny_weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("summary")
    return training.train(shapes, folder / "run", weights=str(tiny_weights), cache=str(folder / "cache"))


@pytest.mark.parametrize(
    ("competed", "losses", "said"),
    [
        (("logistic", "means", "blend"), {"blend": 0.3, "logistic": 0.297, "means": 0.4}, True),
        (("blend", "means"), {"blend": 0.3, "logistic": 0.297, "means": 0.4}, False),  # a part that did not compete
        (("blend",), {"blend": 0.3, "logistic": 0.2, "means": 0.4}, False),
        (("logistic", "means", "blend"), {"blend": 0.3, "logistic": 0.31, "means": 0.4}, False),
        (("logistic", "means", "blend"), {"logistic": 0.2, "blend": 0.3, "means": 0.4}, False),
    ],
)
def test_a_summary_says_why_the_blend_was_taken_where_another_that_competed_was_better(trained, competed, losses, said):
    heads = [{"kind": kind, "log_loss": loss} for kind, loss in losses.items()]
    classifier = dataclasses.replace(trained.classifier, provenance={**trained.classifier.provenance, "heads": heads})
    (phase,) = trained.plan.phases
    plan = dataclasses.replace(trained.plan, phases=(dataclasses.replace(phase, heads=competed),))
    told = display.summary(dataclasses.replace(trained, classifier=classifier, plan=plan), "pictures")
    assert ", ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items()) in told
    assert ("the blend is taken unless another clearly leads" in told) == said


def test_a_summary_says_why_its_geometry_depths_and_views_were_taken(trained):
    def variant(taps, loss, **more):
        return Variant(taps, ("plain",), "means", loss, 0.9, 0.8, 0.95, 60, **more)

    def fit(name, loss):
        return variant(("final",), loss, fit=name, size=64)

    every = variant(("blocks.1", "final"), 0.2)
    found = Evidence(
        (every, variant(("final",), 0.3)), (), None, 0.3, (fit("crop", 0.5), fit("pad", 0.4)), ("no time",)
    )
    plan = dataclasses.replace(trained.plan, evidence=found, further=("all blocks: not trained, the time is over",))
    lines = display.summary(dataclasses.replace(trained, plan=plan), "pictures").splitlines()
    assert [line for line in lines if line.startswith("why:")] == [
        "why:   log-loss by fit and size in pixels: crop 64 0.500, pad 64 0.400: pad 64 is taken",
        "why:   means on blocks.1 + final: 0.900 [0.800, 0.950], log-loss 0.200",
        "why:   distance from the pretraining pictures 0.33, of 0 to 1: the pictures are of another kind",
        "why:   no time",
        "why:   all blocks: not trained, the time is over",
    ]
    without = dataclasses.replace(trained, plan=dataclasses.replace(plan, evidence=None, further=()))
    assert "why:" not in display.summary(without, "pictures")


def test_commands_that_a_summary_ends_with_can_be_pasted(trained):
    noted = dataclasses.replace(trained.audit, findings=(Finding("odd", "note", "it is odd", "Look at it."),))
    run = dataclasses.replace(trained, path=Path("my runs") / "a", audit=noted)
    *_, audit, predict = display.summary(run, "the pictures").splitlines()
    assert shlex.split(audit) == ["headstart", "audit", "the pictures"]
    assert shlex.split(predict) == ["headstart", "predict", str(Path("my runs") / "a"), "PICTURE..."]


@pytest.mark.parametrize(("count", "told"), [(0, "0 notes"), (1, "1 note"), (2, "2 notes")])
def test_a_summary_counts_findings_as_people_do(trained, count, told):
    note = Finding("odd", "note", "it is odd", "Look at it.")
    audit = dataclasses.replace(trained.audit, findings=(note,) * count)
    shown = display.summary(dataclasses.replace(trained, audit=audit), "pictures")
    assert f"audit: 0 errors, 0 warnings, {told}\n" in shown


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("heed_interrupts")
def test_an_interrupted_run_goes_on_with_the_same_command(sent, status, tmp_path, make_shapes, tiny_weights):
    pictures = make_shapes(tmp_path / "pictures", 150)
    words = [sys.executable, "-m", "headstart", "train", str(pictures), "--out", str(tmp_path / "run")]
    words += ["--weights", str(tiny_weights)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "config.toml").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "interrupted" in last_line(err)
    assert not (tmp_path / "run" / "metrics.json").exists()
    subprocess.run(words, check=True, capture_output=True)
    assert (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(("verb", "told"), [("train", "goes on from there"), ("predict", "begins anew")])
def test_what_an_interrupted_command_does_again_is_said(capsys, verb, told):
    assert cli._report(KeyboardInterrupt(), [verb, "x"]) == 130
    assert last_line(capsys.readouterr().err).endswith(f"the same command {told}")


def test_a_killed_run_goes_on_with_the_same_command(tmp_path, make_shapes, tiny_weights):
    pictures = make_shapes(tmp_path / "pictures", 100)
    words = [sys.executable, "-m", "headstart", "train", str(pictures), "--out", str(tmp_path / "run")]
    words += ["--weights", str(tiny_weights)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "config.toml").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    process.kill()
    process.wait()
    subprocess.run(words, check=True, capture_output=True)
    assert (tmp_path / "run" / "metrics.json").exists()


# Prediction


@pytest.fixture
def oddly_named(tmp_path, shapes):
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in ODD_NAMES:
        (folder / name).write_bytes((shapes / "circle" / "0.png").read_bytes())
    return folder


def test_json_has_one_object_a_line_whatever_the_names(capsys, run, oddly_named):
    status, out, _ = call(capsys, "predict", run, oddly_named, "--format", "json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert {Path(row["source"]).name for row in rows} == set(ODD_NAMES)
    for row in rows:
        assert set(row) == {"source", "label", "confidence", "probabilities"}
        assert row["probabilities"][row["label"]] == row["confidence"] == max(row["probabilities"].values())
        assert sum(row["probabilities"].values()) == pytest.approx(1)


def test_csv_comes_back_as_it_went_out_whatever_the_names(capsys, run, oddly_named, tmp_path):
    status, _, _ = call(capsys, "predict", run, oddly_named, "--format", "csv", "--out", tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert status == 0
    assert {Path(row["source"]).name for row in rows} == set(ODD_NAMES)
    assert list(rows[0]) == ["source", "label", "confidence", "error", "p:circle", "p:square", "p:triangle"]


def test_a_table_has_one_line_a_picture_whatever_the_names(run, oddly_named):
    words = [sys.executable, "-m", "headstart", "predict", str(run), str(oddly_named)]
    out = subprocess.run(words, check=True, capture_output=True).stdout
    assert len(out.splitlines()) == len(ODD_NAMES)
    assert b"bytes\xff\xfe.png" in out


def test_train_and_evaluate_work_with_odd_names_of_files_and_classes(tmp_path, tiny_weights, make_shapes):
    data = make_shapes(tmp_path / "data", 6, ("circle", "square"))
    names = {'圆 "o" 🙂\n', os.fsdecode(b"sq\xffare")}
    for kind, name in zip(("circle", "square"), names, strict=True):
        (data / kind).rename(data / name)
        for path, odd in zip(sorted((data / name).iterdir()), ODD_NAMES, strict=True):
            path.rename(data / name / odd)
    words = [sys.executable, "-m", "headstart"]
    train = [*words, "train", data, "--out", tmp_path / "run", "--weights", tiny_weights]
    trained = subprocess.run(train, check=True, capture_output=True)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics["classes"]) == names
    with (tmp_path / "run" / "split.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert {Path(row["source"]).name for row in csv.DictReader(file)} == set(ODD_NAMES)
    measured = subprocess.run([*words, "evaluate", tmp_path / "run"], check=True, capture_output=True)
    assert measured.stdout.splitlines()[0] in trained.stdout


def test_top_shortens_what_is_given(capsys, run, shapes):
    picture = shapes / "circle" / "0.png"
    _, out, _ = call(capsys, "predict", run, picture, "--top", "2", "--format", "json")
    assert len(json.loads(out)["probabilities"]) == 2
    _, out, _ = call(capsys, "predict", run, picture, "--top", "1", "--format", "csv")
    assert out.splitlines()[0] == "source,label,confidence,error,class_1,p_1"
    _, out, _ = call(capsys, "predict", run, picture, "--top", "1")
    assert out.count("%") == 1


def test_unreadable_pictures_are_reported_and_one_good_one_is_enough(capsys, run, shapes, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no")
    good = shapes / "circle" / "0.png"
    status, out, err = call(capsys, "predict", run, tmp_path / "broken.jpg", good, "--format", "json")
    assert status == 0
    first, second = map(json.loads, out.splitlines())
    assert set(first) == {"source", "error"}
    assert second["source"] == str(good)
    assert "1 of 2 could not be read" in err
    assert call(capsys, "predict", run, tmp_path / "broken.jpg")[0] == 1


def test_folders_and_globs_hold_pictures_and_named_files_get_a_row_in_any_case(capsys, run, shapes, tmp_path):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "notes.txt").write_text("words")
    (tmp_path / "mixed" / "a.png").write_bytes((shapes / "circle" / "0.png").read_bytes())
    _, out, err = call(capsys, "predict", run, tmp_path / "mixed", "--format", "json")
    assert len(out.splitlines()) == 1
    assert "1 files that are no pictures were passed over" in err
    _, out, _ = call(
        capsys, "predict", run, f"{tmp_path}/mixed/*.png", tmp_path / "mixed" / "notes.txt", "--format", "json"
    )
    assert ["error" in json.loads(line) for line in out.splitlines()] == [False, True]


def test_output_that_nobody_reads_to_its_end_is_no_error(run, shapes):
    command = f"{sys.executable} -m headstart predict {run} {shapes} --format json | head -n 1"
    finished = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in finished.stderr
    assert finished.returncode == 0


# Evaluation and audit


def test_evaluate_gives_the_run_s_own_figures_again_and_writes_nothing(capsys, run, tmp_path):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in run.iterdir())
    status, _, _ = call(capsys, "evaluate", run, "--json", tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert status == 0
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in run.iterdir())
    assert again == json.loads((run / "metrics.json").read_text())


def test_evaluate_on_other_data_counts_what_was_trained_on(capsys, run, shapes, make_shapes, tmp_path):
    _, _, err = call(capsys, "evaluate", run, "--data", shapes)
    assert "30 of these pictures were used for training" in err
    fresh = make_shapes(tmp_path / "fresh", 3, first_seed=500)
    status, out, err = call(capsys, "evaluate", run, "--data", fresh)
    assert status == 0
    assert "used for training" not in err
    assert "n=9" in out


def test_audit_prints_findings_and_writes_json(capsys, shapes, tmp_path):
    data = tmp_path / "data"
    for kind in ("circle", "square"):
        (data / kind).mkdir(parents=True)
        for path in (shapes / kind).iterdir():
            (data / kind / path.name).write_bytes(path.read_bytes())
    (data / "square" / "copy.png").write_bytes((shapes / "circle" / "0.png").read_bytes())
    (data / "square" / "broken.png").write_bytes(b"\x89PNG nothing")
    status, out, _ = call(capsys, "audit", data, "--json", tmp_path / "audit.json")
    found = json.loads((tmp_path / "audit.json").read_text())
    assert status == 0
    assert found["counts"]["error"] == 1
    kinds = [finding["kind"] for finding in found["findings"]]
    assert kinds[:2] == ["unreadable", "duplicate with another label"]
    assert all(kind in out for kind in kinds)


def test_models_lists_what_is_here(capsys):
    status, out, _ = call(capsys, "models", "efficientnet_lite0")
    assert status == 0
    assert re.search(r"^efficientnet_lite0 +here +3\.4 M parameters +224 px$", out, re.M)


# The demonstration


def test_demo_trains_measures_draws_and_says_what_next(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(demonstration, "PER_CLASS", 20)
    status, out, err = call(capsys, "demo", "--out", tmp_path / "demo")
    assert status == 0, err
    accuracy = float(re.search(r"^accuracy +(\d\.\d+)", out, re.M).group(1))
    assert accuracy > 0.8
    assert "headstart train PICTURES" in out
    assert len(list((tmp_path / "demo" / "digits" / "7").glob("*.png"))) == 20
    first = np.asarray(Image.open(tmp_path / "demo" / "digits" / "7" / "000.png"))
    assert first.shape == (32, 32)
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 0  # a second run is no error
