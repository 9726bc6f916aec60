"""One meaning, one home: whoever asks the same question gets the same answer."""

import csv
import io
import json

import numpy as np
import pytest
import torch

import headstart
from headstart import cli, images, training

# Batches of other sizes may take other routines of the same arithmetic; more than rounding it may not be.
ROUNDING = 2e-3


@pytest.fixture(scope="module")
def run(shapes, tiny_weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "shapes"
    cache = str(tmp_path_factory.mktemp("cache"))
    return training.train(shapes, folder, weights=str(tiny_weights), cache=cache)


@pytest.fixture(scope="module")
def evaluated(run):
    """(files of the report pictures, their probabilities as the run measured them)."""
    root = headstart.read(training.runs.RunFolder(run.path).facts()["data"]).root
    return [root / source for source in run.evaluation.sources], run.evaluation.probabilities


def as_matrix(predictions, classes):
    return np.array([[prediction.probabilities[label] for label in classes] for prediction in predictions])


def test_prediction_in_a_batch_agrees_with_evaluation(run, evaluated):
    files, expected = evaluated
    found = as_matrix(headstart.predict(run.path, files), run.classifier.classes)
    assert np.abs(found - expected).max() < ROUNDING


def test_prediction_one_by_one_agrees_with_evaluation(run, evaluated):
    files, expected = evaluated
    classifier = headstart.load(run.path)
    found = as_matrix([next(classifier.predict(file)) for file in files], classifier.classes)
    assert np.abs(found - expected).max() < ROUNDING


def test_features_and_head_agree_with_prediction(run, evaluated):
    files, expected = evaluated
    classifier = headstart.load(run.path / "model.safetensors")
    embed = classifier.embedder()
    pixels = np.stack([classifier.preprocess.apply(images.open_image(file)) for file in files])
    assert np.abs(classifier.classify(embed(pixels)) - expected).max() < ROUNDING


def test_plain_pytorch_agrees_with_prediction(run, evaluated):
    """The network and head as anybody would run them: float32, batch norms unfolded."""
    files, expected = evaluated
    classifier = headstart.load(run.path)
    pixels = np.stack([classifier.preprocess.apply(images.open_image(file)) for file in files])
    with torch.inference_mode():
        features = classifier.backbone.network(classifier.preprocess.normalise(torch.from_numpy(pixels)))
        probabilities = (classifier.head(features) / classifier.temperature).softmax(1)
    assert np.abs(probabilities.numpy() - expected).max() < 0.05  # bfloat16 is used where the processor has it


def test_command_line_agrees_with_python(run, evaluated, capsys):
    files, _ = evaluated
    assert cli.main(["predict", str(run.path), *map(str, files), "--format", "json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [prediction.to_json() for prediction in headstart.predict(run.path, files)]


def test_the_run_s_files_agree_with_its_figures(run):
    rows = list(csv.DictReader(io.StringIO((run.path / "predictions.csv").read_text())))
    stored = json.loads((run.path / "metrics.json").read_text())["metrics"]["accuracy"]
    assert stored["value"] == pytest.approx(np.mean([row["target"] == row["label"] for row in rows]))
    assert stored["n"] == len(rows)
    for row in rows:
        assert float(row["confidence"]) == max(float(row[f"p:{label}"]) for label in run.evaluation.classes)


def test_evaluation_again_agrees_with_the_run(run):
    again = headstart.evaluate(run.path)
    assert np.abs(again.probabilities - run.evaluation.probabilities).max() < ROUNDING
    assert again.metrics["accuracy"] == run.evaluation.metrics["accuracy"]


def test_a_second_run_is_the_first(run, tmp_path, shapes, tiny_weights):
    again = training.train(shapes, tmp_path / "again", weights=str(tiny_weights))
    assert (again.path / "split.csv").read_bytes() == (run.path / "split.csv").read_bytes()
    assert np.abs(again.evaluation.probabilities - run.evaluation.probabilities).max() < ROUNDING


def test_prediction_leaves_the_classifier_as_it_was(run, evaluated):
    files, _ = evaluated
    classifier = headstart.load(run.path)
    before = {name: tensor.clone() for name, tensor in classifier.backbone.state_dict().items()}
    list(classifier.predict(files))
    after = classifier.backbone.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not classifier.backbone.network.training
