"""Every metric against scikit-learn or a plain loop, and its interval against what an interval promises."""

import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference

from headstart import metrics

bounded = settings(max_examples=40, deadline=None)


def single(seed: int, n: int = 80, classes: int = 5, missing: bool = True):
    """Probabilities in eighths, so with many ties, and targets, one class of which may have no picture at all."""
    random = np.random.default_rng(seed)
    targets = random.integers(0, classes - missing, n)
    skewed = random.dirichlet(np.ones(classes), n) + 0.7 * np.eye(classes)[targets]
    counts = np.stack([random.multinomial(8, row / row.sum()) for row in skewed])
    return counts / 8, targets


def multi(seed: int, n: int = 60, labels: int = 4):
    """Scores in tenths, so with many ties, and targets that go along with them."""
    random = np.random.default_rng(seed)
    targets = random.random((n, labels)) < 0.35
    scores = np.round(np.clip(0.4 * random.random((n, labels)) + 0.4 * targets * random.random((n, labels)), 0, 1), 1)
    return scores, targets


def value_of(metric, n: int) -> float:
    return float(metric(np.ones((1, n), np.float32))[0])


# Values


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("missing", [False, True])
def test_single_label_metrics_are_scikit_learns(seed, missing):
    probabilities, targets = single(seed, missing=missing)
    n, predicted, present = len(targets), probabilities.argmax(1), np.unique(targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of classes that are predicted and never true
        balanced = reference.balanced_accuracy_score(targets, predicted)
    f1 = reference.f1_score(targets, predicted, labels=present, average="macro", zero_division=0)
    floored = np.maximum(probabilities, metrics.TINY)
    loss = -np.log(floored[np.arange(n), targets]).mean()
    hits = metrics.top_k_hits(probabilities, targets, 1)
    assert hits.mean() == pytest.approx(reference.accuracy_score(targets, predicted))
    assert value_of(metrics.balanced_accuracy(probabilities, targets), n) == pytest.approx(balanced)
    assert value_of(metrics.macro_f1(probabilities, targets), n) == pytest.approx(f1)
    assert value_of(metrics.log_loss(probabilities, targets), n) == pytest.approx(loss)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_loss_is_scikit_learns(dtype):
    random = np.random.default_rng(3)
    probabilities = random.dirichlet(np.ones(6), 100).astype(dtype)
    targets = random.integers(0, 5, 100)
    exact = probabilities.astype(np.float64)
    expected = reference.log_loss(targets, exact / exact.sum(1, keepdims=True), labels=range(6))
    assert value_of(metrics.log_loss(probabilities, targets), 100) == pytest.approx(expected, rel=1e-5)


def test_log_loss_of_a_certain_mistake_is_large_but_finite():
    loss = value_of(metrics.log_loss(np.array([[1.0, 0.0]]), np.array([1])), 1)
    assert loss == pytest.approx(-math.log(metrics.TINY))


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_top_k_is_scikit_learns_where_nothing_ties(k):
    random = np.random.default_rng(k)
    probabilities, targets = random.dirichlet(np.ones(7), 200), random.integers(0, 7, 200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns that all of 7 classes are a perfect score
        expected = reference.top_k_accuracy_score(targets, probabilities, k=k, labels=range(7))
    assert metrics.top_k_hits(probabilities, targets, k).mean() == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_k_looks_at_exactly_k_classes_where_probabilities_tie(k):
    probabilities, targets = single(0)
    ranked = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    expected = [target in row for target, row in zip(targets, ranked, strict=True)]
    assert metrics.top_k_hits(probabilities, targets, k).tolist() == expected
    assert sum(metrics.top_k_hits(np.ones((5, 5)), np.arange(5), k)) == k


def test_top_one_has_one_row_a_picture_and_is_the_plain_comparison_with_the_largest():
    # The mistake: topk(1) equals max. Compared as (n, 1) against (n,), it would broadcast to n x n: a false accuracy.
    probabilities, targets = single(1, n=33)
    hits = metrics.top_k_hits(probabilities, targets, 1)
    assert hits.shape == (33,) and hits.dtype == bool
    assert (hits == (probabilities.argmax(1) == targets)).all()


def test_uneven_batches_give_the_number_of_the_whole_and_the_mean_of_batch_means_does_not():
    # The mistake: mean of batch means.
    probabilities, targets = single(2, n=50)
    probabilities[-2:] = np.roll(np.eye(5), 1, axis=1)[targets[-2:]]  # the last, small batch is all wrong
    pieces = [slice(0, 32), slice(32, 48), slice(48, 50)]
    whole = value_of(metrics.log_loss(probabilities, targets), 50)
    of_batch = [metrics.log_loss(probabilities[piece], targets[piece]) for piece in pieces]
    means = [value_of(metric, piece.stop - piece.start) for metric, piece in zip(of_batch, pieces, strict=True)]
    joined = np.concatenate([probabilities[piece] for piece in pieces])
    assert value_of(metrics.log_loss(joined, targets), 50) == whole
    assert np.average(means, weights=[32, 16, 2]) == pytest.approx(whole)
    assert np.mean(means) > 2 * whole


def straightforward_ece(confidences, correct, bins=15):
    total = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        inside = (confidences >= low) & ((confidences < high) | (number == bins - 1))
        if inside.any():
            total += inside.sum() * abs(correct[inside].mean() - confidences[inside].mean())
    return total / len(confidences)


@pytest.mark.parametrize("seed", range(4))
def test_calibration_error_is_the_plain_loops(seed):
    random = np.random.default_rng(seed)
    confidences = random.random(300)
    correct = random.random(300) < confidences**2
    confidences[:3], correct[:3] = 1.0, [True, False, True]  # the last bin is closed on both sides
    found = value_of(metrics.expected_calibration_error(confidences, correct), 300)
    assert found == pytest.approx(straightforward_ece(confidences, correct))


def test_calibration_error_of_what_is_certain_and_right_is_zero_and_certain_and_wrong_is_one():
    certain = np.ones(10)
    assert value_of(metrics.expected_calibration_error(certain, np.ones(10, bool)), 10) == 0
    assert value_of(metrics.expected_calibration_error(certain, np.zeros(10, bool)), 10) == 1


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_scikit_learns_with_ties_and_with_weights(seed):
    scores, targets = multi(seed)
    weights = np.random.default_rng(seed).integers(0, 4, (3, len(scores))).astype(np.float32)
    metric = metrics.average_precision(scores[:, 0], targets[:, 0])
    assert value_of(metric, 60) == pytest.approx(reference.average_precision_score(targets[:, 0], scores[:, 0]))
    expected = [reference.average_precision_score(targets[:, 0], scores[:, 0], sample_weight=row) for row in weights]
    assert metric(weights) == pytest.approx(expected)


def test_mean_average_precision_leaves_out_labels_without_positives_or_without_negatives():
    scores, targets = multi(7)
    targets[:, 1], targets[:, 2] = False, True
    expected = reference.average_precision_score(targets[:, [0, 3]], scores[:, [0, 3]], average="macro")
    assert value_of(metrics.mean_average_precision(scores, targets), 60) == pytest.approx(expected)
    assert math.isnan(value_of(metrics.mean_average_precision(scores[:, 1:3], targets[:, 1:3]), 60))


@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize("seed", range(4))
def test_multi_label_f1_is_scikit_learns(average, seed):
    scores, targets = multi(seed)
    decisions = scores >= 0.4
    expected = reference.f1_score(targets, decisions, average=average, zero_division=0)
    assert value_of(metrics.multi_label_f1(decisions, targets, average), 60) == pytest.approx(expected)


def test_macro_f1_counts_a_label_that_is_never_given_as_zero_and_leaves_out_one_that_is_never_true():
    decisions = np.array([[True, False, True]] * 4)
    targets = np.array([[True, True, False]] * 4)
    assert value_of(metrics.multi_label_f1(decisions, targets, "macro"), 4) == pytest.approx(0.5)


def test_share_is_precision_among_the_given_and_recall_among_the_true():
    scores, targets = multi(3)
    given_label, true = scores[:, 0] >= 0.4, targets[:, 0]
    precision, recall = metrics.hit_share(true, given_label), metrics.hit_share(given_label, true)
    assert value_of(precision, 60) == pytest.approx(reference.precision_score(true, given_label))
    assert value_of(recall, 60) == pytest.approx(reference.recall_score(true, given_label))
    assert math.isnan(value_of(metrics.hit_share(true, np.zeros(60, bool)), 60))


# Weights are repetitions


BUILDERS = {
    "balanced_accuracy": lambda p, t: metrics.balanced_accuracy(p, t),
    "macro_f1": lambda p, t: metrics.macro_f1(p, t),
    "log_loss": lambda p, t: metrics.log_loss(p, t),
    "ece": lambda p, t: metrics.expected_calibration_error(p.max(1), p.argmax(1) == t),
}
MULTI_BUILDERS = {
    "map": lambda s, t: metrics.mean_average_precision(s, t),
    "average_precision": lambda s, t: metrics.average_precision(s[:, 0], t[:, 0]),
    "micro_f1": lambda s, t: metrics.multi_label_f1(s >= 0.4, t, "micro"),
    "macro_f1": lambda s, t: metrics.multi_label_f1(s >= 0.4, t, "macro"),
    "hit_share": lambda s, t: metrics.hit_share(t[:, 0], s[:, 0] >= 0.4),
}
repetitions = st.lists(st.integers(0, 4), min_size=12, max_size=12).filter(any)


@pytest.mark.parametrize("name", BUILDERS)
@bounded
@given(seed=st.integers(0, 10_000), repeats=repetitions)
def test_weighing_pictures_is_repeating_them(name, seed, repeats):
    probabilities, targets = single(seed, n=12)
    weighed = BUILDERS[name](probabilities, targets)(np.array([repeats], np.float32))[0]
    repeated = BUILDERS[name](np.repeat(probabilities, repeats, 0), np.repeat(targets, repeats))
    assert weighed == pytest.approx(value_of(repeated, sum(repeats)), nan_ok=True)


@pytest.mark.parametrize("name", MULTI_BUILDERS)
@bounded
@given(seed=st.integers(0, 10_000), repeats=repetitions)
def test_weighing_pictures_of_several_labels_is_repeating_them(name, seed, repeats):
    scores, targets = multi(seed, n=12)
    weighed = MULTI_BUILDERS[name](scores, targets)(np.array([repeats], np.float32))[0]
    repeated = MULTI_BUILDERS[name](np.repeat(scores, repeats, 0), np.repeat(targets, repeats, 0))
    assert weighed == pytest.approx(value_of(repeated, sum(repeats)), nan_ok=True)


def test_a_resample_without_a_labels_only_negative_leaves_the_label_out_as_repeating_would():
    scores, targets = multi(0, n=12, labels=2)
    targets[:, 1] = True
    targets[0, 1] = False
    repeats = np.array([0, *[1] * 11])
    weighed = metrics.mean_average_precision(scores, targets)(repeats[None].astype(np.float32))[0]
    repeated = metrics.mean_average_precision(np.repeat(scores, repeats, 0), np.repeat(targets, repeats, 0))
    assert weighed == pytest.approx(value_of(repeated, 11))


@pytest.mark.parametrize("name", BUILDERS)
def test_rows_of_weights_do_not_touch_each_other(name):
    metric = BUILDERS[name](*single(4, n=30))
    weights = np.random.default_rng(0).integers(0, 3, (6, 30)).astype(np.float32)
    assert metric(weights) == pytest.approx(np.concatenate([metric(row[None]) for row in weights]))


# Intervals


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),  # the values of statsmodels' proportion_confint(method="wilson")
        (10, 10, 0.722467, 1.0),
        (5, 10, 0.236593, 0.763407),
        (1, 1, 0.206549, 1.0),
        (90, 100, 0.825634, 0.944771),
    ],
)
def test_wilson_has_the_known_limits(successes, n, low, high):
    found = metrics.wilson(successes, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)
    assert found.value == successes / n and found.n == n


@bounded
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys_and_holds_its_own_value(counts):
    successes, n = counts
    found = metrics.wilson(successes, n)
    expected = stats.binomtest(successes, n).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1


# Two on the same pictures


def pairs(both, only_first, only_second, neither):
    """Whether each of two is right, on so many pictures of each kind, mixed up."""
    kinds = np.repeat([(1, 1), (1, 0), (0, 1), (0, 0)], (both, only_first, only_second, neither), axis=0)
    first, second = np.random.default_rng(0).permutation(kinds).astype(bool).T
    return first, second


def test_a_comparison_has_the_published_limits():
    # The airways of 21 children, in Fagerland and others, Statistical Analysis of Contingency Tables (2017), chapter 8.
    found = metrics.compare(*pairs(1, 1, 7, 12)).difference
    assert (found.low, found.high) == pytest.approx((-0.507, -0.026), abs=6e-4)


def newcombe(both, only_first, only_second, neither):
    """Newcombe's tenth method, written as the cosine rule: two sides of a triangle, and phi the cosine between."""
    n = both + only_first + only_second + neither
    one, other = (stats.binomtest(both + only, n).proportion_ci(0.95, "wilson") for only in (only_first, only_second))
    p, q = (both + only_first) / n, (both + only_second) / n
    table = np.array([[both, only_first], [only_second, neither]], float)
    phi, product = 0.0, table.sum(0).prod() * table.sum(1).prod()
    excess = round(np.linalg.det(table))
    if product and excess:
        phi = (excess if excess < 0 else max(0.0, excess - n / 2)) / math.sqrt(product)
    turn = np.exp(1j * math.acos(phi))
    return p - q - abs(p - one.low - (other.high - q) * turn), p - q + abs(one.high - p - (q - other.low) * turn)


cells = st.tuples(*[st.integers(0, 60)] * 4).filter(any)


@bounded
@given(cells)
@example((0, 0, 0, 9))
@example((9, 0, 0, 0))
@example((0, 9, 0, 0))
@example((0, 5, 5, 0))
@example((30, 0, 0, 30))
def test_a_comparison_is_newcombes_interval_and_mcnemars_exact_test(counts):
    found = metrics.compare(*pairs(*counts))
    low, high = newcombe(*counts)
    difference, (_, only_first, only_second, _) = found.difference, counts
    assert (difference.value, difference.n) == (pytest.approx((only_first - only_second) / sum(counts)), sum(counts))
    assert (difference.low, difference.high) == pytest.approx((max(-1, low), min(1, high)), abs=1e-6)
    assert -1 <= difference.low <= difference.value + 1e-9 and difference.value - 1e-9 <= difference.high <= 1
    odd = only_first + only_second
    assert found.p_value == pytest.approx(stats.binomtest(only_first, odd).pvalue if odd else 1.0)


@bounded
@given(cells)
def test_the_other_way_round_a_comparison_is_the_same_with_its_sign_turned(counts):
    first, second = pairs(*counts)
    one, other = metrics.compare(first, second), metrics.compare(second, first)
    assert (other.difference.value, other.difference.low, other.difference.high) == pytest.approx(
        (-one.difference.value, -one.difference.high, -one.difference.low)
    )
    assert other.p_value == one.p_value


def test_what_is_compared_is_paired_by_picture():
    # The mistake: one run, no interval, two bare numbers. Of the same two accuracies, those tell more whose classifiers
    # agree on most pictures.
    agreeing, scattered = metrics.compare(*pairs(80, 10, 0, 10)), metrics.compare(*pairs(72, 18, 8, 2))
    assert agreeing.difference.value == scattered.difference.value == pytest.approx(0.1)
    widths = [found.difference.high - found.difference.low for found in (agreeing, scattered)]
    assert widths[0] < 0.75 * widths[1]
    assert agreeing.p_value < 0.01 < scattered.p_value


def test_comparisons_cover_the_truth_about_95_times_in_100():
    random, n, covered = np.random.default_rng(0), 80, 0
    for both, only_first, only_second in ((0.7, 0.12, 0.05), (0.4, 0.1, 0.3), (0.9, 0.03, 0.03)):
        chances = (both, only_first, only_second, 1 - both - only_first - only_second)
        for counts in random.multinomial(n, chances, 500):
            found = metrics.compare(*pairs(*counts)).difference
            covered += found.low <= only_first - only_second <= found.high
    assert 0.94 < covered / 1500 < 0.985


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 4)])
def test_only_results_of_the_same_pictures_are_compared(first, second):
    with pytest.raises(ValueError, match="of the same pictures"):
        metrics.compare(np.ones(first, bool), np.ones(second, bool))


def test_a_comparison_prints_its_sign_interval_and_p_value():
    assert str(metrics.compare(*pairs(80, 15, 0, 5))) == "+0.150 [+0.080, +0.232], p = 6.1e-05"


def test_an_estimate_outlives_json():
    for estimate in (metrics.wilson(3, 7), metrics.wilson(0, 0), metrics.Estimate(0.5, math.nan, math.nan, 2)):
        again = metrics.Estimate.from_json(json.loads(json.dumps(estimate.to_json())))
        assert str(again) == str(estimate) and again.to_json() == estimate.to_json()


def test_wilson_of_nothing_is_not_defined():
    found = metrics.wilson(0, 0)
    assert math.isnan(found.value) and math.isnan(found.low) and math.isnan(found.high)
    assert found.to_json() == {"value": None, "low": None, "high": None, "n": 0}
    assert str(found) == "not defined, n=0"


def test_an_estimate_prints_its_interval_and_its_n_and_is_json():
    found = metrics.Estimate(0.9412, 0.9209, 0.9571, 540)
    assert str(found) == "0.941 [0.921, 0.957] n=540"
    assert json.loads(json.dumps(found.to_json())) == {"value": 0.9412, "low": 0.9209, "high": 0.9571, "n": 540}


def test_drawing_within_classes_keeps_the_size_of_each_class():
    strata = np.array([2] * 7 + [0] * 20 + [5] * 1)
    weights = metrics.draw_weights(strata, [""] * 28, 200, seed=0)
    assert weights.shape == (200, 28)
    for stratum, size in ((2, 7), (0, 20), (5, 1)):
        assert (weights[:, strata == stratum].sum(1) == size).all()
    assert weights[:, strata == 0].var() > 0.5  # and it is drawn, with replacement


def test_every_picture_is_drawn_equally_often():
    weights = metrics.draw_weights(np.zeros(10, np.int64), [""] * 10, 20_000, seed=1)
    assert weights.mean(0) == pytest.approx(np.ones(10), abs=0.04)
    assert weights.var(0) == pytest.approx(np.full(10, 0.9), abs=0.06)  # multinomial: 1 - 1/n


def test_drawing_groups_draws_whole_groups_and_a_picture_without_one_is_its_own():
    groups = ["a", "b", "a", "", "b", "", "a"]
    weights = metrics.draw_weights(np.zeros(7, np.int64), groups, 500, seed=0)
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 0] == weights[:, 6]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, 3] != weights[:, 5]).any()
    assert (weights[:, [0, 1, 3, 5]].sum(1) == 4).all()  # four groups, drawn four times


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    probabilities, targets = single(5)
    metric = metrics.balanced_accuracy(probabilities, targets)
    drawn = [metrics.draw_weights(targets, [""] * 80, 300, seed) for seed in (0, 0, 1)]
    first, again, other = (metrics.bootstrap(metric, weights, 80) for weights in drawn)
    assert first == again
    assert first.value == other.value and (first.low, first.high) != (other.low, other.high)


@pytest.mark.parametrize("name", ["balanced_accuracy", "macro_f1", "log_loss"])
@pytest.mark.parametrize("seed", range(3))
def test_a_bootstrap_interval_holds_its_value(name, seed):
    probabilities, targets = single(seed, n=150)
    found = metrics.bootstrap(
        BUILDERS[name](probabilities, targets), metrics.draw_weights(targets, [""] * 150, 500, seed), 150
    )
    assert found.low < found.value < found.high
    assert found.n == 150


def test_a_bootstrap_interval_is_the_quantiles_of_the_resamples_however_they_are_cut(monkeypatch):
    probabilities, targets = single(6, n=40)
    metric = metrics.macro_f1(probabilities, targets)
    weights = metrics.draw_weights(targets, [""] * 40, 101, 0)
    expected = metrics.bootstrap(metric, weights, 40)
    assert (expected.low, expected.high) == pytest.approx(np.quantile(metric(weights), (0.025, 0.975)))
    monkeypatch.setattr(metrics, "_CHUNK_VALUES", 300)
    assert metrics.bootstrap(metric, weights, 40) == expected


def test_a_bootstrap_of_what_is_not_defined_is_not_defined():
    never = metrics.hit_share(np.ones(5, bool), np.zeros(5, bool))
    found = metrics.bootstrap(never, metrics.draw_weights(np.zeros(5, np.int64), [""] * 5, 20, 0), 5)
    assert found.to_json() == {"value": None, "low": None, "high": None, "n": 5}


def test_a_proportion_is_wilsons_and_by_group_the_bootstraps_which_is_wider_where_groups_agree():
    groups = [f"person {number // 10}" for number in range(200)]
    hits = np.random.default_rng(0).random(20).repeat(10) < 0.7  # all ten pictures of a person right, or all wrong
    weights = metrics.draw_weights(np.zeros(200, np.int64), groups, 1000, 0)
    alone, grouped = metrics.proportion(hits, weights, False), metrics.proportion(hits, weights, True)
    assert alone == metrics.wilson(hits.sum(), 200)
    assert grouped.value == alone.value and grouped.n == 200
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_proportion_among_some_pictures_counts_only_those(grouped):
    hits, among = np.array([1, 1, 0, 0, 1], bool), np.array([1, 0, 1, 0, 1], bool)
    weights = metrics.draw_weights(np.zeros(5, np.int64), [*"abcde"], 100, 0)
    found = metrics.proportion(hits, weights, grouped, among)
    assert found.value == pytest.approx(2 / 3) and found.n == 3
    assert math.isnan(metrics.proportion(hits, weights, grouped, np.zeros(5, bool)).value)


def test_wilson_intervals_cover_the_truth_about_95_times_in_100():
    n, truth = 100, 0.85
    covered = [found.low <= truth <= found.high for found in (metrics.wilson(k, n) for k in range(n + 1))]
    assert stats.binom.pmf(np.arange(n + 1), n, truth)[covered].sum() == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("by_group", [False, True])
def test_bootstrap_intervals_cover_the_truth_about_95_times_in_100(by_group):
    # Mean log-loss of pictures whose classes, or groups of five, are given; the truth is known by construction.
    random, rounds, covered = np.random.default_rng(0), 250, 0
    groups = [str(number // 5) for number in range(200)] if by_group else [""] * 200
    targets = np.arange(200) % 2
    for seed in range(rounds):
        loss = np.repeat(random.normal(1.0, 0.2, 40), 5) if by_group else random.normal(1.0, 0.2, 200)
        own = np.exp(-loss)
        probabilities = np.where(np.eye(2, dtype=bool)[targets], own[:, None], 1 - own[:, None])
        weights = metrics.draw_weights(targets, groups, 200, seed)
        found = metrics.bootstrap(metrics.log_loss(probabilities, targets), weights, 200)
        covered += found.low <= 1.0 <= found.high
    assert 0.90 <= covered / rounds <= 0.985


# Temperature


def sampled(seed: int, n: int = 3000, classes: int = 4):
    """Honest logits: targets are drawn with the very probabilities that they give."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (n, classes)).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    targets = (probabilities.cumsum(1) < random.random((n, 1))).sum(1).clip(max=classes - 1)
    return logits, targets


@pytest.mark.parametrize("factor", [0.2, 1.0, 4.0, 30.0])
def test_the_temperature_brings_over_and_under_confident_logits_back(factor):
    logits, targets = sampled(0)
    temperature, loss = metrics.find_temperature(logits * factor, targets, multi=False)
    assert temperature == pytest.approx(factor, rel=0.08)
    assert loss == pytest.approx(metrics.mean_loss(logits, targets, False), abs=0.002)


@pytest.mark.parametrize("factor", [0.3, 5.0])
def test_the_temperature_of_several_labels_brings_logits_back(factor):
    random = np.random.default_rng(1)
    logits = random.normal(0, 2, (2000, 3)).astype(np.float32)
    targets = random.random(logits.shape) < 1 / (1 + np.exp(-logits))
    temperature, _ = metrics.find_temperature(logits * factor, targets, multi=True)
    assert temperature == pytest.approx(factor, rel=0.08)


@bounded
@given(st.integers(0, 10_000), st.floats(0.01, 50), st.booleans())
def test_the_temperature_makes_the_loss_no_worse_than_its_doubt_costs(seed, factor, several):
    random = np.random.default_rng(seed)
    logits = (random.normal(0, 1, (20, 3)) * factor).astype(np.float32)
    targets = random.random((20, 3)) < 0.4 if several else random.integers(0, 3, 20)
    temperature, loss = metrics.find_temperature(logits, targets, several)
    assert temperature > 0
    assert loss <= metrics.mean_loss(logits, targets, several) + 0.01
    assert loss == pytest.approx(metrics.mean_loss(logits / temperature, targets, several), abs=1e-5)


@pytest.mark.parametrize("repeats", [1, 5, 100])
def test_logits_that_are_all_right_leave_the_doubt_of_one_picture(repeats):
    logits = 10 * np.tile(np.eye(4, dtype=np.float32), (repeats, 1))
    temperature, _ = metrics.find_temperature(logits, np.tile(np.arange(4), repeats), multi=False)
    wrong = 3 / (np.exp(10 / temperature) + 3)
    assert wrong == pytest.approx(0.75 / (4 * repeats + 2), rel=0.02)


def test_mean_loss_is_scikit_learns_and_does_not_overflow():
    logits, targets = sampled(2, n=100)
    probabilities = np.exp(logits.astype(np.float64))
    expected = reference.log_loss(targets, probabilities / probabilities.sum(1, keepdims=True))
    assert metrics.mean_loss(logits, targets, False) == pytest.approx(expected, rel=1e-5)
    assert metrics.mean_loss(np.array([[1e4, -1e4]], np.float32), np.array([1]), False) == pytest.approx(2e4)
    several = np.array([[1e4, -1e4]], np.float32), np.array([[False, False]])
    assert metrics.mean_loss(*several, True) == pytest.approx(5e3)


# Thresholds


@bounded
@given(st.integers(0, 10_000))
def test_thresholds_reach_the_best_f1_that_any_threshold_reaches(seed):
    scores, targets = multi(seed, n=60, labels=3)
    found = metrics.find_thresholds(scores, targets, fewest=1)
    for label, threshold in enumerate(found):
        if not 0 < targets[:, label].sum() < 60:
            continue
        candidates = [*np.unique(scores[:, label]), 1.1]
        f1 = [
            reference.f1_score(targets[:, label], scores[:, label] >= candidate, zero_division=0)
            for candidate in candidates
        ]
        assert reference.f1_score(targets[:, label], scores[:, label] >= threshold) == pytest.approx(max(f1))


def test_thresholds_lie_between_scores_so_that_rounding_moves_nothing():
    scores = np.array([[0.9], [0.8], [0.3], [0.1]] * 10)
    targets = np.array([[True], [True], [False], [False]] * 10)
    assert metrics.find_thresholds(scores, targets) == pytest.approx((0.55,))


def test_rare_labels_keep_one_half():
    random = np.random.default_rng(0)
    scores, targets = random.random((40, 4)), np.zeros((40, 4), bool)
    targets[:9, 0], targets[:10, 1], targets[:30, 2], targets[:31, 3] = True, True, True, True
    found = metrics.find_thresholds(scores, targets)
    assert found[0] == 0.5 and found[3] == 0.5  # nine positives, nine negatives
    assert found[1] != 0.5 and found[2] != 0.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_threshold_between_two_neighbouring_numbers_still_parts_them(dtype):
    # Halfway between neighbouring floating-point numbers there is none, and the middle is rounded to one of them.
    for start in np.linspace(0.3, 0.9, 20, dtype=dtype):
        low, high = start, np.nextafter(start, dtype(1))
        scores = np.array([[high]] * 10 + [[low]] * 10, dtype)
        (threshold,) = metrics.find_thresholds(scores, np.array([[True]] * 10 + [[False]] * 10))
        assert float(low) < threshold <= float(high)


# Which of two epochs is better

LOWER, HIGHER = ["log_loss", "ece"], ["accuracy", "balanced_accuracy", "macro_f1", "top_5_accuracy", "map", "micro_f1"]
finite = st.floats(-1e6, 1e6)


@bounded
@given(st.sampled_from(LOWER + HIGHER), finite, finite)
def test_less_loss_is_better_and_more_of_everything_else(name, value, best):
    assert metrics.is_better(name, value, best) == (value < best if name in LOWER else value > best)


@pytest.mark.parametrize("name", LOWER + HIGHER)
def test_the_first_figure_is_better_than_none_and_an_equal_one_is_not_better(name):
    assert metrics.is_better(name, 0.0, math.nan) and metrics.is_better(name, 1e9, math.nan)
    assert not metrics.is_better(name, 0.5, 0.5)


@pytest.mark.parametrize("name", LOWER + HIGHER)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("best", [math.nan, 0.5, math.inf])
def test_what_is_no_finite_number_is_never_better(name, value, best):
    assert not metrics.is_better(name, value, best)


@bounded
@given(st.sampled_from(LOWER + HIGHER), st.lists(st.one_of(finite, st.just(math.nan)), min_size=1, max_size=20))
def test_going_through_a_course_the_first_of_the_best_epochs_is_kept(name, course):
    best, kept = math.nan, None
    for number, value in enumerate(course):
        if metrics.is_better(name, value, best):
            best, kept = value, number
    known = [value for value in course if not math.isnan(value)]
    expected = (min(known) if name in LOWER else max(known)) if known else None
    assert kept == (course.index(expected) if known else None)


def test_of_groups_on_which_both_are_alike_nothing_can_be_told():
    hits = np.array([True, False, True, True])
    weights = metrics.draw_weights(np.zeros(4, np.int64), ["a", "a", "b", "b"], 200, 0)
    found = metrics.compare_drawn(hits, hits, weights)
    assert str(found) == "+0.000 [too few pictures to tell]"
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told == {"difference": {"value": 0.0, "low": None, "high": None, "n": 4}, "p_value": None}
