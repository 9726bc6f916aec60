"""Every head against scikit-learn at the same strength, and what cross-validation promises."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.svm import LinearSVC
from torch import nn

from headstart import heads, metrics

CLASSES = 3
GRIDS = {"logistic": [1e-3, 1e-1, 10.0], "svm": [1e-2, 1.0], "means": [0.01, 0.3, 1.0]}
AT = [(kind, strength) for kind, strengths in GRIDS.items() for strength in strengths]


def blobs(n: int = 150, dim: int = 12, seed: int = 0, apart: float = 1.2):
    """Features of three overlapping classes, each on a scale and level of its own, with folds dealt in turn."""
    random = np.random.default_rng(seed)
    targets = np.arange(n) % CLASSES
    centres = apart * random.normal(size=(CLASSES, dim)) / np.sqrt(dim / 8)
    plain = centres[targets] + random.normal(size=(n, dim))
    features = plain * random.uniform(0.1, 5, dim) + random.normal(0, 3, dim)
    return features.astype(np.float32), targets, np.arange(n) // CLASSES % 5


def several_labels(n: int = 200, dim: int = 8, seed: int = 0):
    random = np.random.default_rng(seed)
    features = random.normal(size=(n, dim)).astype(np.float32) * 2 + 1
    targets = features @ random.normal(size=(dim, 4)) + random.normal(size=(n, 4)) > 0.5
    return features, targets, np.arange(n) % 5


@pytest.fixture
def fit_at(monkeypatch):
    """`fit_head` with one head at one strength in place of its search."""

    def fit(kind, strength, features, targets, folds, classes=CLASSES):
        monkeypatch.setitem(heads._TUNERS, kind, heads._tune_linear(kind, [strength], 0))
        return heads.fit_head(features, targets, list(folds), classes, (kind,))

    return fit


def scale_of(features):
    """Standard deviations, whose squares the median of all counts in as thirty pictures: `blobs` has few features."""
    variance = features.astype(np.float64).var(0)
    padded = np.pad(variance, min(32, len(variance) // 2), "symmetric")
    width = min(65, len(variance) | 1)
    beside = np.array([np.median(padded[place : place + width]) for place in range(len(variance))])
    return np.sqrt((len(features) * variance + 30 * beside) / (len(features) + 30))


def scaled(features, like=None):
    like = (features if like is None else like).astype(np.float64)
    return (features - like.mean(0)) / scale_of(like)


def logits_of(fitted, features):
    with torch.inference_mode():
        return fitted.module(torch.from_numpy(features)).numpy()


def softmax(logits):
    return torch.from_numpy(logits).double().softmax(1).numpy()


# The heads themselves


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0, 30.0])
def test_logistic_regression_is_scikit_learns(fit_at, strength):
    features, targets, folds = blobs()
    fitted = fit_at("logistic", strength, features, targets, folds)
    expected = LogisticRegression(C=1 / (len(targets) * strength), tol=1e-8, max_iter=5000)
    expected.fit(scaled(features), targets)
    assert softmax(logits_of(fitted, features)) == pytest.approx(expected.predict_proba(scaled(features)), abs=0.005)


@pytest.mark.parametrize("strength", [1e-2, 1e-1, 1.0, 10.0])
def test_the_linear_svm_is_scikit_learns_and_no_worse_in_what_both_minimise(fit_at, strength):
    features, targets, folds = blobs()
    fitted, x = fit_at("svm", strength, features, targets, folds), scaled(features)
    # liblinear punishes the intercept too; scaled by a hundred, the punishment is nothing.
    expected = LinearSVC(
        C=1 / (len(x) * strength), loss="squared_hinge", intercept_scaling=100, tol=1e-8, max_iter=200_000
    ).fit(x, targets)

    def objective(logits, weights):
        sign = 2 * np.eye(CLASSES)[targets] - 1
        return (np.maximum(1 - sign * logits, 0) ** 2).sum(1).mean() + strength / 2 * (weights**2).sum()

    own = logits_of(fitted, features)
    weights = fitted.module.weight.numpy() * scale_of(features)
    best = objective(expected.decision_function(x), expected.coef_)
    assert objective(own, weights) == pytest.approx(best, rel=1e-3)
    assert (own.argmax(1) == expected.predict(x)).mean() > 0.98


def test_class_means_at_strength_1_are_the_nearest_mean(fit_at):
    features, targets, folds = blobs(apart=0.5)
    fitted = fit_at("means", 1.0, features, targets, folds)
    expected = NearestCentroid().fit(scaled(features), targets).predict(scaled(features))
    assert (logits_of(fitted, features).argmax(1) == expected).all()


def test_class_means_near_strength_0_are_linear_discriminant_analysis_with_classes_as_likely_as_frequent(fit_at):
    features, targets, folds = blobs(apart=0.5)
    lopsided = np.flatnonzero((targets > 0) | (np.arange(len(targets)) % 2 == 0))
    features, targets, folds = features[lopsided], targets[lopsided], folds[lopsided]
    fitted = fit_at("means", 1e-6, features, targets, folds)
    expected = LinearDiscriminantAnalysis(solver="svd").fit(scaled(features), targets)
    assert (logits_of(fitted, features).argmax(1) == expected.predict(scaled(features))).all()
    found = softmax(logits_of(fitted, features))
    assert found == pytest.approx(expected.predict_proba(scaled(features)), abs=1e-2)


def test_where_a_class_is_rare_class_means_are_no_worse_than_logistic_regression_by_much(fit_at):
    # With equal priors the rare class would be told far too often, and no temperature could mend that.
    random = np.random.default_rng(0)
    targets = (np.arange(600) % 20 == 0).astype(np.int64)
    features = random.normal(size=(600, 30)).astype(np.float32)
    features[:, 0] += 2 * targets
    folds = np.arange(600) // 20 % 5
    losses = {
        kind: heads.fit_head(features, targets, folds, 2, (kind,)).candidates[0] for kind in ("means", "logistic")
    }
    assert losses["means"].log_loss < 1.1 * losses["logistic"].log_loss
    assert losses["means"].accuracy >= 0.95  # that of always saying the frequent one


def test_moments_of_folds_are_those_of_their_training_pictures():
    features, targets, folds = blobs(apart=0.5)
    folds = np.where(np.arange(len(folds)) % 7 == 0, -1, folds)  # some are never held out
    x, y, fold = torch.from_numpy(features), torch.from_numpy(targets), torch.from_numpy(folds)
    problem = heads._Problem(x, y, fold, CLASSES)
    for number, moments in enumerate(problem.moments):
        rows = folds != number  # the last number is no fold: all pictures
        own = [features[rows & (targets == label)] for label in range(CLASSES)]
        centred = np.concatenate([part - part.mean(0) for part in own])
        assert moments.counts.tolist() == [len(part) for part in own]
        np.testing.assert_allclose(moments.means, np.stack([part.mean(0) for part in own]), atol=1e-4)
        np.testing.assert_allclose(moments.covariance, centred.T @ centred / rows.sum(), atol=1e-3)
    assert len(problem.moments) == folds.max() + 2


@pytest.mark.parametrize("strength", [0.1, 0.6])
def test_class_means_in_between_are_scikit_learns_shrinkage(fit_at, strength):
    features, targets, folds = blobs(apart=0.5)
    fitted, x = fit_at("means", strength, features, targets, folds), scaled(features)
    centred = x - np.stack([x[targets == number].mean(0) for number in range(CLASSES)])[targets]
    covariance = centred.T @ centred / len(x)
    shrunk = (1 - strength) * covariance + strength * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    means = np.stack([x[targets == number].mean(0) for number in range(CLASSES)])
    gaps = x[:, None] - means
    distances = np.einsum("ncd,de,nce->nc", gaps, np.linalg.inv(shrunk), gaps)
    assert softmax(logits_of(fitted, features)) == pytest.approx(softmax(-distances / 2), abs=1e-3)


def test_neighbours_vote_as_scikit_learns_by_cosine_and_their_logits_are_logs_of_smoothed_votes():
    features, targets, folds = blobs(apart=0.5)
    new = blobs(40, seed=1)[0]
    fitted = heads.fit_head(features, targets, list(folds), CLASSES, ("knn",))
    k = int(fitted.strength)
    expected = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(scaled(features), targets)
    for pictures in (features, new):
        votes = expected.predict_proba(scaled(pictures, features)) * k
        found = logits_of(fitted, pictures)
        assert found == pytest.approx(np.log((votes + 1) / (k + CLASSES)), abs=1e-5)
        assert softmax(found) == pytest.approx((votes + 1) / (k + CLASSES), abs=1e-5)


def test_several_labels_are_one_logistic_regression_a_label_as_scikit_learns(fit_at):
    features, targets, folds = several_labels()
    fitted = fit_at("logistic", 0.02, features, targets, folds, classes=4)
    one = LogisticRegression(C=1 / (len(targets) * 0.02), tol=1e-8, max_iter=5000)
    expected = OneVsRestClassifier(one).fit(scaled(features), targets.astype(int))
    found = torch.from_numpy(logits_of(fitted, features)).double().sigmoid().numpy()
    assert found == pytest.approx(expected.predict_proba(scaled(features)), abs=0.005)


def test_several_labels_are_fitted_by_logistic_regression_alone_whatever_was_asked_for():
    fitted = heads.fit_head(*[np.asarray(part) for part in several_labels()], 4)
    assert fitted.kind == "logistic" and len(fitted.candidates) == 1
    assert fitted.logits.shape == (200, 4)


# Scaling and rotation


@pytest.mark.parametrize("kind", ["logistic", "svm", "means"])
def test_linear_heads_are_one_linear_layer_on_raw_features_however_these_are_scaled(fit_at, kind):
    features, targets, folds = blobs()
    fitted = fit_at(kind, 0.1, features, targets, folds)
    stretched = (features * 1000 + 5).astype(np.float32)
    again = fit_at(kind, 0.1, stretched, targets, folds)
    assert isinstance(fitted.module, nn.Linear)
    assert logits_of(again, stretched) == pytest.approx(logits_of(fitted, features), abs=0.02)


@pytest.mark.parametrize("kind", ["logistic", "svm", "means"])
def test_the_folded_layer_is_the_weights_on_scaled_features(kind):
    features, targets, folds = blobs()
    mean, scale = heads._moments(features, len(features))
    x = torch.from_numpy((features - mean) / scale)
    problem = heads._Problem(x, torch.from_numpy(targets), torch.from_numpy(folds), CLASSES)
    weights = heads._SOLVERS[kind](problem, 0.1)[:, -1]
    folded = heads._fold_scaling(weights, mean, scale)
    expected = (x @ weights[:-1] + weights[-1]).numpy()
    assert folded(torch.from_numpy(features)).numpy() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("kind", "strength"), AT)
def test_with_fewer_pictures_than_features_the_solution_is_the_same_as_without_the_rotation(
    fit_at, monkeypatch, kind, strength
):
    features, targets, folds = blobs(45, 80)
    rotated = fit_at(kind, strength, features, targets, folds)
    monkeypatch.setattr(heads, "_rotate", lambda problem: (problem, None))
    plain = fit_at(kind, strength, features, targets, folds)
    new = blobs(30, 80, seed=5)[0]
    assert softmax(logits_of(rotated, new)) == pytest.approx(softmax(logits_of(plain, new)), abs=0.03)
    assert softmax(rotated.logits) == pytest.approx(softmax(plain.logits), abs=0.03)


def test_logistic_regression_with_fewer_pictures_than_features_is_scikit_learns(fit_at):
    features, targets, folds = blobs(45, 80)
    fitted = fit_at("logistic", 0.05, features, targets, folds)
    expected = LogisticRegression(C=1 / (45 * 0.05), tol=1e-8, max_iter=5000).fit(scaled(features), targets)
    new = blobs(30, 80, seed=5)[0]
    assert softmax(logits_of(fitted, new)) == pytest.approx(expected.predict_proba(scaled(new, features)), abs=0.01)


@pytest.mark.parametrize("kind", heads.KINDS)
def test_a_feature_that_hardly_varied_on_few_pictures_does_not_drown_the_others(kind):
    features, targets, folds = blobs(330, 200, apart=4.0)
    few, new = slice(0, 30), slice(30, 330)
    features[few, 7] *= 1e-4
    level = features[few, 7].mean()
    features[new, 7] = level
    shifted = features[new].copy()
    shifted[:, 7] = level + 3 * features[few].std(0).mean()  # what it may be on other pictures
    fitted = heads.fit_head(features[few], targets[few], list(folds[few]), CLASSES, (kind,))
    before, after = ((logits_of(fitted, part).argmax(1) == targets[new]).mean() for part in (features[new], shifted))
    assert before > 0.85 and after > before - 0.03


def test_variances_are_shrunk_towards_those_of_the_features_beside_them_and_the_less_the_more_pictures_there_are():
    random = np.random.default_rng(0)
    plain = random.normal(size=(1000, 400)).astype(np.float32) * np.repeat([1.0, 100.0], 200).astype(np.float32)
    plain[:, [50, 250]] /= 100
    few, many = (heads._moments(plain[:n], n)[1] for n in (10, 1000))
    own = np.sqrt(30 / 40)
    assert few[50] == pytest.approx(own, rel=0.2) and few[250] == pytest.approx(100 * own, rel=0.2)
    assert few[:50] == pytest.approx(np.full(50, 1.0), rel=0.3) and few[210:250] == pytest.approx(
        np.full(40, 100.0), rel=0.3
    )
    assert few[190:200].max() < 2 and few[200:210].min() > 50  # at the seam of two depths
    assert many[50] == pytest.approx(np.sqrt(30 / 1030), rel=0.1) and many[:50] == pytest.approx(1.0, rel=0.1)
    views = np.repeat(plain[:10], 4, 0)  # of a picture tell no more of how pictures vary
    assert heads._moments(views, 10)[1] == pytest.approx(few, rel=1e-5)


def test_features_that_do_not_vary_do_not_count_among_those_beside_a_feature():
    features = np.random.default_rng(0).normal(size=(20, 65)).astype(np.float32)
    features[:, :50] = 7.0
    features[:, 60] *= 1e-3
    scale = heads._moments(features, 20)[1]
    assert (scale[:50] == 1).all()
    assert scale[60] == pytest.approx(np.sqrt(30 / 50), rel=0.3)


@pytest.mark.parametrize("kind", ["logistic", "means", "blend"])
def test_a_class_that_cannot_be_held_out_changes_nothing_of_how_sure_a_head_is_of_the_others(kind):
    features, targets, folds = blobs(90, apart=1.0)
    plain = heads.fit_head(features, targets, list(folds), CLASSES, (kind,))
    more, label = np.concatenate((features, features.mean(0)[None] + 9 * features.std(0))), np.append(targets, CLASSES)
    fitted = heads.fit_head(more, label, [*folds, -1], CLASSES + 1, (kind,))
    assert fitted.candidates[0].log_loss == pytest.approx(plain.candidates[0].log_loss, rel=0.2)
    assert logits_of(fitted, more[-1:]).argmax() == CLASSES


@pytest.mark.parametrize("kind", heads.KINDS)
def test_views_of_a_picture_are_fitted_on_and_their_answers_averaged(kind):
    features, targets, folds = blobs(60, apart=1.0)
    noise = np.random.default_rng(1).normal(0, 0.3, (60, 4, 12)) * features.std(0)
    fitted = heads.fit_head((features[:, None] + noise).astype(np.float32), targets, list(folds), CLASSES, (kind,))
    assert fitted.logits.shape == (60, CLASSES) and fitted.rows.tolist() == list(range(60))
    same = np.repeat(features[:, None], 4, 1)  # four times the same view says what one says
    one, four = (heads.fit_head(part, targets, list(folds), CLASSES, (kind,)) for part in (features, same))
    if kind != "knn":  # whose neighbours are four times as many
        assert softmax(logits_of(four, features)) == pytest.approx(softmax(logits_of(one, features)), abs=0.02)
        assert four.temperature == pytest.approx(one.temperature, rel=0.05)


def test_with_fewer_pictures_than_features_nothing_is_solved_in_the_space_of_all_features(monkeypatch):
    features, targets, folds = blobs(60, 500)
    folds = np.where(np.arange(60) == 0, -1, folds)
    means, seen = heads._solve_means, []
    monkeypatch.setitem(
        heads._SOLVERS, "means", lambda problem, *rest: (seen.append(problem.x.shape[1]), means(problem, *rest))[1]
    )
    heads.fit_head(features, targets, list(folds), CLASSES, ("blend",))
    assert max(seen) <= 60


@pytest.mark.parametrize("kind", heads.KINDS)
def test_features_that_do_not_vary_give_no_number_that_is_none(kind):
    features, targets, folds = blobs()
    features[:, 3], features[:, 5] = 0.0, 123.456
    fitted = heads.fit_head(features, targets, list(folds), CLASSES, (kind,))
    assert np.isfinite(logits_of(fitted, features)).all() and np.isfinite(fitted.logits).all()
    assert (logits_of(fitted, features).argmax(1) == targets).mean() > 0.8


@pytest.mark.parametrize("kind", ["logistic", "svm", "means"])
def test_a_linear_head_does_not_look_at_a_feature_that_did_not_vary(fit_at, kind):
    features, targets, folds = blobs()
    features[:, 3] = 123.456
    fitted = fit_at(kind, 0.1, features, targets, folds)
    assert fitted.module.weight[:, 3].abs().max() < 1e-4


@pytest.mark.parametrize("kind", heads.KINDS)
def test_features_none_of_which_varies_still_give_a_head(kind):
    fitted = heads.fit_head(np.full((30, 6), 2.5, np.float32), np.arange(30) % 3, [0, 1] * 15, 3, (kind,))
    assert np.isfinite(logits_of(fitted, np.full((2, 6), 2.5, np.float32))).all()


# Cross-validation


@pytest.mark.parametrize(("kind", "strength"), AT)
def test_logits_out_of_fold_come_from_a_head_that_was_fitted_without_the_fold(fit_at, kind, strength):
    features, targets, folds = blobs()
    fitted = fit_at(kind, strength, features, targets, folds)
    mean, scale = heads._moments(features, len(features))
    x, y = torch.from_numpy((features - mean) / scale), torch.from_numpy(targets)
    for fold in range(5):
        out = folds == fold
        kept = heads._Problem(x[~out], y[~out], torch.full((int((~out).sum()),), -1), CLASSES)
        weights = heads._SOLVERS[kind](kept, strength)[:, -1]
        expected = (x[out] @ weights[:-1] + weights[-1]).numpy()
        assert softmax(fitted.logits[out]) == pytest.approx(softmax(expected), abs=0.01)
    assert fitted.logits.shape == (150, CLASSES)


def test_logistic_regression_out_of_fold_is_scikit_learns_without_the_fold(fit_at):
    features, targets, folds = blobs()
    fitted, x = fit_at("logistic", 0.05, features, targets, folds), scaled(features)
    for fold in range(5):
        out = folds == fold
        expected = LogisticRegression(C=1 / ((~out).sum() * 0.05), tol=1e-8, max_iter=5000).fit(x[~out], targets[~out])
        assert softmax(fitted.logits[out]) == pytest.approx(expected.predict_proba(x[out]), abs=0.01)


def test_many_pictures_ask_their_neighbours_in_parts_and_get_the_same_answers(monkeypatch):
    features, targets, folds = blobs(apart=0.5)
    whole = heads.fit_head(features, targets, list(folds), CLASSES, ("knn",))
    expected = logits_of(whole, features)
    monkeypatch.setattr(heads, "QUERIES", 7)
    parted = heads.fit_head(features, targets, list(folds), CLASSES, ("knn",))
    assert (parted.strength, parted.logits.tolist()) == (whole.strength, whole.logits.tolist())
    assert logits_of(whole, features).tolist() == expected.tolist()
    assert logits_of(whole, features[:0]).shape == (0, CLASSES)


def test_neighbours_out_of_fold_are_of_other_folds():
    features, targets, folds = blobs(apart=0.5)
    fitted, x = heads.fit_head(features, targets, list(folds), CLASSES, ("knn",)), scaled(features)
    k = int(fitted.strength)
    for fold in range(5):
        out = folds == fold
        expected = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(x[~out], targets[~out])
        votes = expected.predict_proba(x[out]) * k
        assert fitted.logits[out] == pytest.approx(np.log((votes + 1) / (k + CLASSES)), abs=1e-5)


@pytest.mark.parametrize("kind", ["logistic", "svm", "means"])
@settings(max_examples=10, deadline=None)
@given(picture=st.integers(0, 59), other=st.integers(1, 2))
def test_a_pictures_own_label_has_no_say_in_its_logits_out_of_fold(kind, picture, other):
    features, targets, folds = blobs(60)
    changed = targets.copy()
    changed[picture] = (changed[picture] + other) % CLASSES
    tune = heads._tune_linear(kind, [0.1], 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(heads._TUNERS, kind, tune)
        before, after = (heads.fit_head(features, y, list(folds), CLASSES, (kind,)) for y in (targets, changed))
    same_fold = folds == folds[picture]
    assert softmax(after.logits[same_fold]) == pytest.approx(softmax(before.logits[same_fold]), abs=0.005)
    assert abs(after.logits[~same_fold] - before.logits[~same_fold]).max() > 0.01


@pytest.mark.parametrize("kind", heads.KINDS)
def test_random_labels_are_not_found_out_of_fold_better_than_by_luck(kind):
    random = np.random.default_rng(0)
    features, targets = random.normal(size=(300, 40)).astype(np.float32), random.integers(0, 3, 300)
    fitted = heads.fit_head(features, targets, [number % 5 for number in range(300)], 3, (kind,))
    assert (fitted.logits.argmax(1) == targets).mean() < 0.45
    assert fitted.candidates[0].log_loss > 0.97 * np.log(3)


def test_pictures_without_a_fold_are_fitted_on_and_not_tuned_on(fit_at):
    features, targets, folds = blobs()
    folds = np.where(np.arange(150) >= 100, -1, folds)
    fitted = fit_at("logistic", 0.1, features, targets, folds)
    assert fitted.rows.tolist() == list(range(100)) and fitted.logits.shape == (100, CLASSES)
    expected = LogisticRegression(C=1 / (150 * 0.1), tol=1e-8, max_iter=5000).fit(scaled(features), targets)
    assert softmax(logits_of(fitted, features)) == pytest.approx(expected.predict_proba(scaled(features)), abs=0.005)
    changed = targets.copy()
    changed[100:] = 0
    again = fit_at("logistic", 0.1, features, changed, folds)
    assert (again.logits == fitted.logits).all() and again.candidates == fitted.candidates
    assert abs(logits_of(again, features) - logits_of(fitted, features)).max() > 0.1


@pytest.mark.parametrize(
    ("kind", "strength"), [("logistic", 0.1), ("logistic", 10.0), ("svm", 1.0), *(at for at in AT if at[0] == "means")]
)
def test_pictures_without_a_fold_are_fitted_on_at_the_strength_that_was_tuned(fit_at, kind, strength):
    # Fewer pictures than features: tuned in the pictures' own span, fitted in the space of all features.
    features, targets, folds = blobs(60, 100)
    whole = fit_at(kind, strength, features, targets, folds)
    one_out = np.where(np.arange(60) == 0, -1, folds)
    fitted = fit_at(kind, strength, features, targets, one_out)
    new = blobs(30, 100, seed=5)[0]
    assert softmax(logits_of(fitted, new)) == pytest.approx(softmax(logits_of(whole, new)), abs=0.03)


@pytest.mark.parametrize("kind", heads.KINDS)
def test_a_class_all_of_whose_pictures_are_without_a_fold_can_still_be_predicted(kind):
    features, targets, folds = blobs(150, apart=4.0)
    folds = np.where(targets == 2, -1, folds)
    fitted = heads.fit_head(features, targets, list(folds), CLASSES, (kind,))
    predicted = logits_of(fitted, features).argmax(1)
    assert (predicted[targets == 2] == 2).mean() > 0.9
    assert np.isfinite(fitted.logits).all()


@pytest.mark.parametrize(("lead", "taken"), [(0.0, "means"), (heads.LEAD, "blend"), (0.99, "blend")])
def test_the_blend_is_taken_unless_another_leads_and_all_are_told_the_taken_one_first(monkeypatch, lead, taken):
    monkeypatch.setattr(heads, "LEAD", lead)
    features, targets, folds = blobs(seed=2, apart=0.5)  # class means lead by little
    fitted = heads.fit_head(features, targets, list(folds), CLASSES)
    best, *others = fitted.candidates
    losses = {candidate.kind: candidate.log_loss for candidate in fitted.candidates}
    assert losses.keys() == set(heads.KINDS)
    assert [other.log_loss for other in others] == sorted(other.log_loss for other in others)
    assert best.kind == taken and losses["means"] < losses["blend"]
    assert (fitted.kind, fitted.strength) == (best.kind, best.strength)
    assert best.accuracy == pytest.approx((fitted.logits.argmax(1) == targets).mean())
    assert best.log_loss == pytest.approx(
        metrics.mean_loss(fitted.logits / fitted.temperature, targets, False), abs=1e-5
    )


@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0])
def test_the_loss_by_which_strengths_are_compared_is_that_of_scikit_learns_solution(strength):
    # A strong penalty makes logits small and the temperature makes them large again, and with them what a solution
    # that was left too early lacks.
    features, targets, folds = blobs(90, 30, apart=0.7)
    x, expected, start = scaled(features), np.zeros((90, CLASSES)), strength / 10**0.5
    for fold in range(5):
        out = folds == fold
        alone = LogisticRegression(C=1 / ((~out).sum() * strength), tol=1e-8, max_iter=5000)
        expected[out] = alone.fit(x[~out], targets[~out]).decision_function(x[out])
    mean, scale = heads._moments(features, len(features))
    fold_numbers = torch.from_numpy(folds)
    problem = heads._Problem(torch.from_numpy((features - mean) / scale), torch.from_numpy(targets), fold_numbers, 3)
    neighbour = heads._solve_logistic(problem, start)  # the search starts from the solution beside it
    weights = heads._solve_logistic(problem, strength, neighbour)
    found = problem.held_out(torch.tensordot(problem.x, weights[:-1], 1) + weights[-1])
    losses = [metrics.find_temperature(logits, targets, False)[1] for logits in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], abs=0.003)


@pytest.mark.parametrize("kind", ["logistic", "svm", "means"])
def test_the_search_ends_at_a_strength_that_no_neighbour_on_the_grid_betters(fit_at, kind):
    grid = [0.003, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0] if kind == "means" else heads._HALF_DECADES
    features, targets, folds = blobs(240, 12)
    fitted = heads.fit_head(features, targets, list(folds), CLASSES, (kind,))
    place = grid.index(fitted.strength)
    for other in grid[max(place - 1, 0) : place + 2]:
        loss = fit_at(kind, other, features, targets, folds).candidates[0].log_loss
        assert fitted.candidates[0].log_loss <= loss + 0.002


def test_the_number_of_neighbours_is_the_best_of_all_and_never_more_than_there_are():
    features, targets, _ = blobs(12, apart=3.0)
    fitted = heads.fit_head(features, targets, [number // 3 % 2 for number in range(12)], CLASSES, ("knn",))
    assert fitted.strength <= 6
    assert logits_of(fitted, features).shape == (12, CLASSES)


def test_features_are_not_written_to():
    features, targets, folds = blobs()
    features.setflags(write=True)
    before = features.copy()
    heads.fit_head(features, targets, list(folds), CLASSES)
    assert (features == before).all()


# The blend


def alone(kind, *given):
    return heads.fit_head(*given, CLASSES, (kind,))


@pytest.mark.parametrize(("n", "dim"), [(150, 12), (45, 80)])
def test_a_blend_is_the_mean_of_two_heads_each_as_sure_as_its_answers_out_of_fold_allow(n, dim):
    features, targets, folds = blobs(n, dim, apart=0.7)
    new = blobs(40, dim, seed=3)[0]
    parts = [alone(kind, features, targets, list(folds)) for kind in heads.BLENDED]
    blend = alone("blend", features, targets, list(folds))
    expected = sum(logits_of(part, new) / part.temperature for part in parts) / 2
    assert logits_of(blend, new) == pytest.approx(expected, abs=1e-3)
    assert blend.logits == pytest.approx(sum(part.logits / part.temperature for part in parts) / 2, abs=1e-4)
    assert (blend.kind, blend.strength) == ("blend", 0.5) and isinstance(blend.module, nn.Linear)
    told = [candidate.kind for candidate in blend.candidates]
    assert told[0] == "blend" and set(told) == {"blend", *heads.BLENDED}


def test_a_blends_parts_are_fitted_on_pictures_without_a_fold_too():
    features, targets, folds = blobs(apart=0.7)
    folds = np.where(np.arange(150) >= 100, -1, folds)
    parts = [alone(kind, features, targets, list(folds)) for kind in heads.BLENDED]
    blend = alone("blend", features, targets, list(folds))
    expected = sum(logits_of(part, features) / part.temperature for part in parts) / 2
    assert logits_of(blend, features) == pytest.approx(expected, abs=1e-3)


# What is saved


@pytest.mark.parametrize("kind", heads.KINDS)
def test_a_heads_state_brings_it_back(kind):
    features, targets, folds = blobs()
    module = heads.fit_head(features, targets, list(folds), CLASSES, (kind,)).module
    if kind == "knn":
        empty = [torch.zeros_like(module.state_dict()[name]) for name in ("vectors", "labels", "mean", "scale")]
        again = heads.NearestNeighbours(*empty, classes=CLASSES, k=module.k)
    else:
        again = nn.Linear(12, CLASSES)
    again.load_state_dict(module.state_dict())
    given_features = torch.from_numpy(features)
    assert torch.equal(again(given_features), module(given_features))
    assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())


MEASURE = """
import json, resource
import numpy as np
import scipy.optimize, threadpoolctl
from headstart import heads

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

random, targets = np.random.default_rng(0), np.arange(20_000) % 10
features = random.standard_normal((20_000, 1280), dtype=np.float32)
features[np.arange(20_000), targets] += 2
heads.fit_head(features[:200], targets[:200], [number // 10 % 5 for number in range(200)], 10)
before = peak_bytes()
heads.fit_head(features, targets, [number // 10 % 5 for number in range(20_000)], 10)
print(json.dumps((peak_bytes() - before) / features.nbytes))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the unit of ru_maxrss is another elsewhere")
def test_fitting_takes_at_most_six_times_the_memory_of_the_features():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) <= 6


def test_class_means_of_one_picture_a_class_are_finite():
    features = np.random.default_rng(0).normal(0, 1, (6, 40)).astype(np.float32)
    fitted = heads.fit_head(features, np.array([0, 1] * 3), [0, 0, 1, 1, -1, -1], 2, ("means",))
    assert fitted.candidates[0].log_loss < 10
    few = heads.fit_head(features[:4], np.array([0, 1, 0, 1]), [0, 0, 1, 1], 2, ("means",))
    assert few.candidates[0].log_loss < 2


# Heads that are to be trained


def made(kind, dim=6, classes=4, **settings):
    torch.manual_seed(0)
    return heads.make_head(kind, dim, classes, **settings)


@pytest.mark.parametrize("kind", ["linear", "mlp", "batch-norm"])
@pytest.mark.parametrize(("dim", "classes", "hidden"), [(6, 4, 512), (1280, 2, 16), (1, 1000, 1)])
def test_a_new_head_takes_features_to_as_many_logits_as_there_are_classes(kind, dim, classes, hidden):
    head = made(kind, dim, classes, hidden=hidden)
    assert head(torch.randn(5, dim)).shape == (5, classes)
    matrices = [tuple(p.shape) for p in head.parameters() if p.ndim == 2]
    assert matrices == ([(classes, dim)] if kind == "linear" else [(hidden, dim), (classes, hidden)])
    assert all(parameter.requires_grad for parameter in head.parameters())


def test_the_layers_of_new_heads_are_those_that_are_documented():
    assert type(made("linear")) is nn.Linear
    assert [type(layer) for layer in made("mlp")] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    layers = [nn.BatchNorm1d, nn.Dropout, nn.Linear, nn.BatchNorm1d, nn.ELU, nn.Dropout, nn.Linear]
    assert [type(layer) for layer in made("batch-norm")] == layers


@pytest.mark.parametrize(("kind", "places"), [("mlp", [2]), ("batch-norm", [1, 5])])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_is_before_the_linear_layers_and_as_large_as_asked_for(kind, places, dropout):
    head = made(kind, dropout=dropout)
    assert [head[place].p for place in places] == [dropout] * len(places)
    if not dropout:
        features = torch.randn(5, 6)
        assert torch.equal(head(features), head(features))  # nothing is left to chance while it trains


@pytest.mark.parametrize("kind", ["mlp", "batch-norm"])
def test_a_new_heads_logits_are_those_of_plain_torch(kind):
    head, features = made(kind, hidden=9).double(), torch.randn(8, 6, dtype=torch.float64)
    state = head.state_dict()
    if kind == "mlp":
        expected = (features @ state["0.weight"].T + state["0.bias"]).clamp_min(0) @ state["3.weight"].T
        expected += state["3.bias"]
    else:
        expected = features / (1 + 1e-5) ** 0.5  # a new batch norm has seen nothing
        expected = (expected @ state["2.weight"].T + state["2.bias"]) / (1 + 1e-5) ** 0.5
        expected = torch.where(expected > 0, expected, expected.exp() - 1) @ state["6.weight"].T + state["6.bias"]
    torch.testing.assert_close(head.eval()(features), expected)


@pytest.mark.parametrize("kind", ["linear", "mlp", "batch-norm"])
def test_a_new_head_gives_logits_and_no_probabilities(kind):
    # The mistake: log-softmax inside the network.
    head = made(kind).eval()
    with torch.no_grad():
        logits = head(50 * torch.randn(64, 6))
    assert logits.min() < 0 < logits.max()
    assert logits.exp().sum(1).std() > 1e-3 and logits.sum(1).std() > 1e-3


@pytest.mark.parametrize("kind", ["linear", "mlp", "batch-norm"])
def test_a_new_head_begins_with_torchs_random_weights_by_the_seed(kind):
    first, again = made(kind), made(kind)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    another = heads.make_head(kind, 6, 4)  # the generator has gone on
    assert not torch.equal([*first.parameters()][-1], [*another.parameters()][-1])
    if kind == "linear":
        torch.manual_seed(0)
        assert torch.equal(first.weight, nn.Linear(6, 4).weight)


@pytest.mark.parametrize("kind", ["linear", "mlp", "batch-norm"])
def test_a_new_head_learns_what_can_be_told_apart(kind):
    features, targets, _ = blobs(apart=4.0)
    x, y = torch.from_numpy(scaled(features).astype(np.float32)), torch.from_numpy(targets)
    head = made(kind, 12, CLASSES, hidden=16)
    optimizer = torch.optim.SGD(head.parameters(), 0.3)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x), y).backward()
        optimizer.step()
    assert (head.eval()(x).argmax(1) == y).float().mean() > 0.98
