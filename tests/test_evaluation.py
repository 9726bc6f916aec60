"""The figures of a classifier: their names, their JSON and CSV, and that they are those of the whole split."""

import csv
import io
import json
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as reference
from torch import nn

from headstart import backbones, metrics
from headstart.data import Sample
from headstart.evaluation import assess, encode
from headstart.model import Classifier

ESTIMATE = {"value", "low", "high", "n"}
SIX = ("ant", "bee", "cat", "dog", "eel", "fox")


@pytest.fixture(scope="module")
def backbone(tiny_weights):
    return backbones.load(backbones.locate("auto", str(tiny_weights)))


@pytest.fixture
def make(backbone):
    """A function that makes a classifier whose features are its logits."""

    def make(classes=SIX, **settings):
        head = nn.Linear(len(classes), len(classes))
        head.load_state_dict({"weight": torch.eye(len(classes)), "bias": torch.zeros(len(classes))})
        return Classifier(backbone, head.requires_grad_(False), tuple(classes), **settings)

    return make


def pictures(n=60, classes=SIX, seed=0, groups=False):
    """Logits that are often right, and the samples they are of."""
    random = np.random.default_rng(seed)
    targets = np.arange(n) % len(classes)
    logits = (random.normal(size=(n, len(classes))) + 1.5 * np.eye(len(classes))[targets]).astype(np.float32)
    names = [f"person {number // 5}" if groups else "" for number in range(n)]
    samples = [Sample(f"{i}.png", (classes[t],), names[i]) for i, t in enumerate(targets)]
    return logits, samples, targets


def several(n=40, seed=0):
    """Logits and samples of four labels, the third of which no picture has and the fourth all have."""
    random = np.random.default_rng(seed)
    targets = random.random((n, 4)) < 0.4
    targets[:, 2], targets[:, 3] = False, True
    logits = (random.normal(size=(n, 4)) + 2 * targets - 1).astype(np.float32)
    samples = [Sample(f"{i}.png", tuple(np.array([*"abcd"])[row])) for i, row in enumerate(targets)]
    return logits, samples, targets


def rows_of(evaluation):
    return list(csv.reader(io.StringIO(evaluation.to_csv(), newline="")))


# metrics.json


def test_metrics_json_of_one_label_a_picture_has_exactly_the_documented_shape(make):
    logits, samples, _ = pictures()
    found = json.loads(json.dumps(assess(make(), logits, samples, resamples=50).to_json(), allow_nan=False))
    assert set(found) == {"role", "n", "metrics", "classes"}
    assert found["role"] == "report" and found["n"] == 60
    names = ["accuracy", "balanced_accuracy", "macro_f1", "top_5_accuracy", "log_loss", "ece"]
    assert list(found["metrics"]) == names
    assert all(set(estimate) == ESTIMATE for estimate in found["metrics"].values())
    assert all(estimate["n"] == 60 for estimate in found["metrics"].values())
    assert list(found["classes"]) == list(SIX)
    for row in found["classes"].values():
        assert set(row) == {"precision", "recall", "f1", "support"} and row["support"] == 10
        assert all(set(row[name]) == ESTIMATE for name in ("precision", "recall", "f1"))


def test_metrics_json_of_several_labels_has_exactly_the_documented_shape(make):
    logits, samples, _ = several()
    classifier = make("abcd", task="multi", thresholds=(0.5,) * 4)
    found = json.loads(json.dumps(assess(classifier, logits, samples, resamples=50).to_json(), allow_nan=False))
    assert list(found["metrics"]) == ["map", "micro_f1", "macro_f1", "subset_accuracy"]
    assert all(set(estimate) == ESTIMATE for estimate in found["metrics"].values())
    assert all(set(row) == {"precision", "recall", "f1", "support"} for row in found["classes"].values())


@pytest.mark.parametrize(("number", "there"), [(2, False), (5, False), (6, True)])
def test_top_5_accuracy_is_there_from_six_classes_on(make, number, there):
    logits, samples, _ = pictures(classes=SIX[:number])
    assert ("top_5_accuracy" in assess(make(SIX[:number]), logits, samples, resamples=5).metrics) is there


# Values


def test_the_figures_of_one_label_a_picture_are_scikit_learns(make):
    logits, samples, targets = pictures(seed=3)
    classifier = make(temperature=1.7)
    found = assess(classifier, logits, samples, resamples=20)
    probabilities = classifier.probabilities(logits)
    predicted = probabilities.argmax(1)
    precision, recall, f1, support = reference.precision_recall_fscore_support(targets, predicted, zero_division=0)
    values = {name: estimate.value for name, estimate in found.metrics.items()}
    confidences, correct = probabilities.max(1), predicted == targets
    ece = metrics.expected_calibration_error(confidences, correct)(np.ones((1, 60)))[0]
    assert values == pytest.approx(
        {
            "accuracy": reference.accuracy_score(targets, predicted),
            "balanced_accuracy": reference.balanced_accuracy_score(targets, predicted),
            "macro_f1": reference.f1_score(targets, predicted, average="macro"),
            "top_5_accuracy": reference.top_k_accuracy_score(targets, probabilities, k=5),
            "log_loss": reference.log_loss(targets, probabilities),
            "ece": ece,
        }
    )
    for number, row in enumerate(found.by_class.values()):
        assert row["precision"].value == pytest.approx(precision[number])
        assert row["recall"].value == pytest.approx(recall[number])
        assert row["f1"].value == pytest.approx(f1[number])
        assert row["support"] == support[number]
        assert row["precision"].n == (predicted == number).sum() and row["recall"].n == support[number]


def test_the_figures_of_several_labels_are_scikit_learns_over_the_labels_that_are_defined(make):
    logits, samples, targets = several()
    classifier = make("abcd", task="multi", thresholds=(0.3, 0.6, 0.5, 0.5))
    found = assess(classifier, logits, samples, resamples=20)
    probabilities = classifier.probabilities(logits)
    decisions, defined = probabilities >= (0.3, 0.6, 0.5, 0.5), [0, 1]
    assert {name: estimate.value for name, estimate in found.metrics.items()} == pytest.approx(
        {
            "map": reference.average_precision_score(targets[:, defined], probabilities[:, defined], average="macro"),
            "micro_f1": reference.f1_score(targets, decisions, average="micro"),
            "macro_f1": reference.f1_score(targets[:, defined], decisions[:, defined], average="macro"),
            "subset_accuracy": reference.accuracy_score(targets, decisions),
        }
    )


def test_labels_without_positives_or_without_negatives_are_null_and_named(make):
    logits, samples, _ = several()
    found = assess(make("abcd", task="multi", thresholds=(0.5,) * 4), logits, samples, resamples=20)
    assert found.undefined == ("c", "d")
    classes = found.to_json()["classes"]
    nothing = {"value": None, "low": None, "high": None, "n": 40}
    for label, support in (("c", 0), ("d", 40)):
        assert classes[label] == {"precision": nothing, "recall": nothing, "f1": nothing, "support": support}
    assert classes["a"]["f1"]["value"] is not None


def test_a_class_without_pictures_is_null_and_left_out_of_means(make):
    logits, samples, targets = pictures()
    kept = [number for number, target in enumerate(targets) if target != 2]
    found = assess(make(), logits[kept], [samples[number] for number in kept], resamples=20)
    predicted = logits[kept].argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of the class that is predicted and never true
        balanced = reference.balanced_accuracy_score(targets[kept], predicted)
    f1 = reference.f1_score(targets[kept], predicted, labels=[0, 1, 3, 4, 5], average="macro")
    assert found.undefined == ("cat",)
    assert found.metrics["balanced_accuracy"].value == pytest.approx(balanced)
    assert found.metrics["macro_f1"].value == pytest.approx(f1)
    assert found.by_class["cat"]["recall"].to_json()["value"] is None and found.by_class["cat"]["support"] == 0


def test_a_class_that_is_never_predicted_has_no_precision_and_an_f1_of_zero(make):
    logits, samples, _ = pictures()
    logits[:, 2] = -50
    row = assess(make(), logits, samples, resamples=20).by_class["cat"]
    assert math.isnan(row["precision"].value) and row["precision"].n == 0
    assert row["recall"].value == 0 and row["f1"].value == 0


def test_features_computed_in_uneven_batches_give_the_figures_of_the_whole(make):
    logits, samples, _ = pictures()
    classifier = make()
    pieces = (slice(0, 32), slice(32, 57), slice(57, 60))
    whole = assess(classifier, logits, samples, resamples=50)
    joined = assess(classifier, np.concatenate([logits[piece] for piece in pieces]), samples, resamples=50)
    assert joined.metrics == whole.metrics
    apart = [assess(classifier, logits[piece], samples[piece], resamples=2).metrics["accuracy"] for piece in pieces]
    assert sum(part.value * part.n for part in apart) / 60 == pytest.approx(whole.metrics["accuracy"].value)


def test_the_order_of_pictures_does_not_change_a_value(make):
    logits, samples, _ = pictures()
    order = np.random.default_rng(0).permutation(60)
    there = assess(make(), logits, samples, resamples=5).metrics
    back = assess(make(), logits[order], [samples[number] for number in order], resamples=5).metrics
    assert {k: v.value for k, v in there.items()} == pytest.approx({k: v.value for k, v in back.items()})


# Intervals


def test_proportions_have_wilsons_intervals_and_the_rest_the_bootstraps(make):
    logits, samples, targets = pictures()
    found = assess(make(), logits, samples, resamples=200)
    hits = int((logits.argmax(1) == targets).sum())
    assert found.metrics["accuracy"] == metrics.wilson(hits, 60)
    own = int((logits[targets == 1].argmax(1) == 1).sum())
    assert found.by_class["bee"]["recall"] == metrics.wilson(own, 10)
    weights = metrics.draw_weights(targets, [""] * 60, 200, 0)
    probabilities = make().probabilities(logits)
    expected = metrics.bootstrap(metrics.log_loss(probabilities, targets), weights, 60)
    assert found.metrics["log_loss"] == expected


def test_the_same_seed_gives_the_same_figures_and_another_seed_other_intervals(make):
    logits, samples, _ = pictures()
    first, again, other = (assess(make(), logits, samples, resamples=100, seed=seed).metrics for seed in (1, 1, 2))
    assert first == again
    assert first["log_loss"] != other["log_loss"] and first["accuracy"] == other["accuracy"]


def test_where_groups_exist_accuracy_is_drawn_by_group_too(make):
    logits, samples, _ = pictures(n=60, groups=True)
    logits[:30] *= -1  # half of the people are hard
    alone = [Sample(sample.source, sample.labels) for sample in samples]
    by_group = assess(make(), logits, samples, resamples=500).metrics
    by_picture = assess(make(), logits, alone, resamples=500).metrics

    def width(estimate):
        return estimate.high - estimate.low

    assert by_group["accuracy"].value == by_picture["accuracy"].value
    assert width(by_group["accuracy"]) > 1.2 * width(by_picture["accuracy"])
    assert width(by_group["log_loss"]) > 1.2 * width(by_picture["log_loss"])


# predictions.csv


def test_predictions_csv_has_the_documented_columns_and_a_row_for_each_picture_in_order(make):
    logits, samples, targets = pictures(n=12)
    classifier = make()
    header, *rows = rows_of(assess(classifier, logits, samples, resamples=5))
    assert header == ["source", "target", "label", "confidence", *(f"p:{label}" for label in SIX)]
    probabilities = classifier.probabilities(logits)
    for number, row in enumerate(rows):
        predicted = int(probabilities[number].argmax())
        assert row[:3] == [f"{number}.png", SIX[targets[number]], SIX[predicted]]
        assert float(row[3]) == pytest.approx(probabilities[number].max(), rel=1e-5)
        assert [float(value) for value in row[4:]] == pytest.approx(probabilities[number], rel=1e-5)
    assert len(rows) == 12


@pytest.mark.parametrize(
    "name", ["a,b.png", 'say "x".png', "line\nbreak.png", " lead.png", "über/猫.png", "\udcff.png", "-1.png"]
)
def test_odd_names_come_back_out_of_predictions_csv(make, name):
    logits, samples, _ = pictures(n=2, classes=("x,y", 'q"z'))
    samples = [Sample(name, samples[0].labels), samples[1]]
    evaluation = assess(make(("x,y", 'q"z')), logits, samples, resamples=5)
    header, row, _ = rows_of(evaluation)
    assert row[0] == name and row[1] == "x,y"
    assert header[4:] == ["p:x,y", 'p:q"z']
    assert evaluation.to_csv().encode("utf-8", "surrogateescape")  # as every file of text is written


def test_several_labels_stand_in_one_cell_with_a_confidence_each_and_none_is_an_empty_cell(make):
    logits = np.array([[3, 3, -3], [-3, -3, -3]], np.float32)
    samples = [Sample("both.png", ("a", "c")), Sample("none.png", ())]
    classifier = make("abc", task="multi", thresholds=(0.5,) * 3)
    _, both, none = rows_of(assess(classifier, logits, samples, resamples=5))
    assert both[:3] == ["both.png", "a|c", "a|b"]
    assert [float(value) for value in both[3].split("|")] == pytest.approx([1 / (1 + math.exp(-3))] * 2, rel=1e-5)
    assert none[:4] == ["none.png", "", "", ""]


def test_the_accuracy_can_be_counted_again_from_predictions_csv(make):
    logits, samples, _ = pictures()
    evaluation = assess(make(), logits, samples, resamples=5)
    right = [row[1] == row[2] for row in rows_of(evaluation)[1:]]
    assert np.mean(right) == evaluation.metrics["accuracy"].value


# Targets


def test_labels_are_mapped_by_name_and_not_by_place(make):
    samples = [Sample("1.png", ("fox",)), Sample("2.png", ("ant", "eel")), Sample("3.png", ())]
    found = encode(samples, SIX)
    assert found.tolist() == [[0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 1, 0], [0] * 6]


def test_a_role_and_the_probabilities_are_kept_in_order(make):
    logits, samples, _ = pictures(n=10)
    classifier = make()
    found = assess(classifier, logits, samples, role="select", resamples=5)
    assert found.role == found.to_json()["role"] == "select"
    assert found.sources == tuple(sample.source for sample in samples)
    assert (found.probabilities == classifier.probabilities(logits)).all()
    assert (found.decisions.argmax(1) == logits.argmax(1)).all() and (found.decisions.sum(1) == 1).all()


# Figures to compare epochs by


def scored(logits, samples, classes, task="single"):
    from headstart.evaluation import score

    return score(logits, samples, classes, task)


def with_best_temperature(make, logits, samples, classes, task):
    """The classifier of these logits whose temperature is the best for them."""
    targets = encode(samples, classes)
    temperature, _ = metrics.find_temperature(
        logits, targets if task == "multi" else targets.argmax(1), task == "multi"
    )
    settings = {"task": "multi", "thresholds": (0.5,) * len(classes)} if task == "multi" else {}
    return make(classes, temperature=temperature, **settings)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("number", [2, 5, 6])
def test_epochs_of_one_label_a_picture_are_compared_by_the_figures_of_the_report(make, seed, number):
    classes = SIX[:number]
    logits, samples, _ = pictures(n=40, classes=classes, seed=seed)
    found = scored(3 * logits, samples, classes)
    classifier = with_best_temperature(make, 3 * logits, samples, classes, "single")
    reported = assess(classifier, 3 * logits, samples, resamples=5).metrics
    assert found == pytest.approx({name: estimate.value for name, estimate in reported.items()}, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_epochs_of_several_labels_are_compared_by_the_figures_of_the_report_and_the_log_loss(make, seed):
    logits, samples, targets = several(seed=seed)
    found = scored(3 * logits, samples, "abcd", "multi")
    classifier = with_best_temperature(make, 3 * logits, samples, "abcd", "multi")
    reported = assess(classifier, 3 * logits, samples, resamples=5).metrics
    probabilities = classifier.probabilities(3 * logits)
    loss = np.mean([reference.log_loss(targets[:, c], probabilities[:, c], labels=[0, 1]) for c in range(4)])
    expected = {"log_loss": loss} | {name: estimate.value for name, estimate in reported.items()}
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("task", ["single", "multi"])
def test_how_large_logits_are_does_not_decide_between_epochs(task):
    logits, samples, _ = pictures() if task == "single" else several()
    classes = SIX if task == "single" else "abcd"
    first, *others = [scored(np.float32(factor) * logits, samples, classes, task) for factor in (1, 0.01, 100)]
    for other in others:
        assert other == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("task", ["single", "multi"])
def test_by_every_figure_an_epoch_that_tells_pictures_apart_is_better_than_one_that_does_not(task):
    logits, samples, targets = pictures() if task == "single" else several()
    classes = SIX if task == "single" else "abcd"
    # The one knows every label; the other has the answers of other pictures.
    truth = (np.eye(6)[targets] if task == "single" else targets).astype(np.float32)
    good, bad = (scored(wanted, samples, classes, task) for wanted in (20 * truth - 10, logits[::-1].copy()))
    assert good.keys() == bad.keys() and "log_loss" in good
    assert not [name for name in good if not metrics.is_better(name, good[name], bad[name])]
    assert not [name for name in good if metrics.is_better(name, bad[name], good[name])]


def test_logits_of_nothing_can_be_scored(make):
    # Before a run, to learn which figures there will be.
    _, samples, _ = pictures()
    found = scored(np.zeros((60, 6), np.float32), samples, SIX)
    assert list(found) == ["log_loss", "accuracy", "balanced_accuracy", "macro_f1", "top_5_accuracy", "ece"]
    assert found["log_loss"] == pytest.approx(math.log(6)) and found["accuracy"] == pytest.approx(1 / 6)
    _, samples, _ = several()
    found = scored(np.zeros((40, 4), np.float32), samples, "abcd", "multi")
    assert list(found) == ["log_loss", "map", "micro_f1", "macro_f1", "subset_accuracy"]
    assert found["log_loss"] == pytest.approx(math.log(2))


@pytest.mark.parametrize("task", ["single", "multi"])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_figures_of_a_network_that_has_diverged_are_all_there_and_none_is_a_number(task, odd):
    logits, samples, _ = pictures() if task == "single" else several()
    classes = SIX if task == "single" else "abcd"
    names = list(scored(logits, samples, classes, task))
    logits[7, 1] = odd
    found = scored(logits, samples, classes, task)
    assert list(found) == names and all(math.isnan(value) for value in found.values())
