"""Losses against PyTorch's own; class weights against their formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy import special
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from headstart import losses

# The function-scoped fixture of all tests, an own cache for each, holds nothing that examples could share.
bounded = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

NAMES = ("cross-entropy", "nll", "bce", "bce-with-logits", "focal")
WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5, 1.3])

counts = st.lists(st.integers(0, 5000), min_size=1, max_size=8)
shares = st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.9])


def draw(seed: int, pictures: int = 7, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, class numbers)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(pictures, classes, generator=generator)
    return logits, torch.randint(classes, (pictures,), generator=generator)


def draw_shares(seed: int, pictures: int = 7, classes: int = 5) -> torch.Tensor:
    """Targets as mixing leaves them: rows of shares that sum to one."""
    return torch.rand(pictures, classes, generator=torch.Generator().manual_seed(seed)).softmax(1)


def draw_labels(seed: int, pictures: int = 7, classes: int = 5) -> torch.Tensor:
    """Targets of several labels a picture, the first picture without any."""
    targets = torch.rand(pictures, classes, generator=torch.Generator().manual_seed(seed)).round()
    targets[0] = 0
    return targets


def one_hot(numbers: torch.Tensor, classes: int = 5) -> torch.Tensor:
    return functional.one_hot(numbers, classes).float()


# Against PyTorch's own


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("seed", range(3))
def test_cross_entropy_is_torchs_with_classes_and_with_shares(seed, weights):
    logits, numbers = draw(seed)
    soft = draw_shares(seed)
    expected = functional.cross_entropy(logits, numbers, weight=weights, reduction="none")
    torch.testing.assert_close(losses.cross_entropy(logits, one_hot(numbers), weights), expected)
    expected = functional.cross_entropy(logits, soft, weight=weights, reduction="none")
    torch.testing.assert_close(losses.cross_entropy(logits, soft, weights), expected)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_nll_takes_logits_and_is_torchs_nll_of_their_log_softmax(weights):
    logits, numbers = draw(0)
    expected = functional.nll_loss(logits.log_softmax(1), numbers, weight=weights, reduction="none")
    torch.testing.assert_close(losses.make_loss("nll", False, weights)(logits, one_hot(numbers)), expected)


@pytest.mark.parametrize("name", ["bce", "bce-with-logits"])
@pytest.mark.parametrize("targets", [draw_labels(1), draw_shares(1), one_hot(draw(1)[1])])
def test_binary_cross_entropy_takes_logits_and_is_torchs_mean_over_classes(name, targets):
    logits, _ = draw(1)
    for weights in (None, WEIGHTS):
        expected = functional.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=weights, reduction="none"
        ).mean(1)
        torch.testing.assert_close(losses.make_loss(name, True, weights)(logits, targets), expected)
    logits, targets = logits.double(), targets.double()
    expected = functional.binary_cross_entropy(logits.sigmoid(), targets, reduction="none").mean(1)
    torch.testing.assert_close(losses.make_loss(name, True)(logits, targets), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("targets", [draw_labels(2), draw_shares(2)])
def test_focal_loss_of_several_labels_is_torchvisions_without_its_alpha(gamma, targets):
    logits, _ = draw(2)
    terms = sigmoid_focal_loss(logits, targets, alpha=-1, gamma=gamma)
    focal = losses.make_loss("focal", True, gamma=gamma)
    torch.testing.assert_close(focal(logits, targets), terms.mean(1))
    if set(targets.unique().tolist()) == {0, 1}:
        weighted = losses.make_loss("focal", True, WEIGHTS, gamma)
        torch.testing.assert_close(weighted(logits, targets), torch.where(targets > 0, terms * WEIGHTS, terms).mean(1))


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("name", ["bce", "bce-with-logits", "focal"])
def test_weights_of_several_labels_are_those_of_positives_and_leave_negatives_alone(name, gamma):
    logits, targets = draw(2)[0], draw_labels(2)
    for label in range(5):
        weights = torch.ones(5)
        weights[label] = 7.0
        plain, weighted = (losses.make_loss(name, True, w, gamma)(logits, targets) for w in (None, weights))
        has = targets[:, label] > 0
        assert has.any() and not has.all()
        assert torch.equal(plain[~has], weighted[~has])
        own = logits[:, label].sigmoid()
        term = -((1 - own) ** (gamma if name == "focal" else 0.0)) * own.log()
        torch.testing.assert_close(weighted[has], (plain + 6.0 * term / 5)[has])


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_loss_of_one_label_is_its_formula(gamma):
    logits, numbers = draw(3)
    right = special.softmax(logits.double().numpy(), axis=1)[range(len(numbers)), numbers]
    expected = -((1 - right) ** gamma) * np.log(right)
    found = losses.make_loss("focal", False, gamma=gamma)(logits, one_hot(numbers))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    weighted = losses.make_loss("focal", False, WEIGHTS, gamma)(logits, one_hot(numbers))
    np.testing.assert_allclose(weighted, expected * WEIGHTS[numbers].numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_focal_loss_with_gamma_zero_is_the_plain_loss(weights):
    logits, numbers = draw(4)
    for targets in (one_hot(numbers), draw_shares(4)):
        plain = losses.cross_entropy(logits, targets, weights)
        torch.testing.assert_close(losses.focal(logits, targets, weights, gamma=0.0), plain)
    plain = losses.binary_cross_entropy(logits, draw_labels(4), weights)
    torch.testing.assert_close(losses.focal(logits, draw_labels(4), weights, gamma=0.0, multi=True), plain)


def test_focal_loss_with_gamma_zero_is_the_plain_loss_also_with_weights_and_shares():
    logits, targets = draw(4)[0], draw_shares(4)
    plain = losses.binary_cross_entropy(logits, targets, WEIGHTS)
    torch.testing.assert_close(losses.focal(logits, targets, WEIGHTS, gamma=0.0, multi=True), plain)


def test_focal_loss_plays_down_what_is_right_more_than_what_is_wrong():
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    targets = one_hot(torch.tensor([0, 0]), 2)
    right, wrong = (losses.focal(logits, targets) / losses.cross_entropy(logits, targets)).tolist()
    assert right < 0.01 and wrong > 0.9


# The mistake: sigmoid before cross-entropy, with which the loss of ten classes cannot fall under 1.461.


@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_logit_gives_a_loss_near_zero(name):
    targets = torch.eye(10)
    logits = 60 * targets - 30
    assert losses.make_loss(name, multi=False)(logits, targets).max() < 1e-6


@pytest.mark.parametrize("name", ["cross-entropy", "nll"])
def test_logits_are_used_as_they_are(name):
    targets = torch.eye(10)
    squashed = losses.make_loss(name, multi=False)((60 * targets - 30).sigmoid(), targets)
    assert squashed.min() == pytest.approx(1.461, abs=1e-3)  # what the mistake would give
    logits = torch.zeros(1, 10)
    assert losses.make_loss(name, multi=False)(logits, targets[:1]).item() == pytest.approx(math.log(10))


# One number a picture


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_is_one_number_a_picture_that_no_other_picture_changes(name, multi):
    # The mistake: means of batch means. Sums over pictures are exact, however pictures are batched.
    loss = losses.make_loss(name, multi, WEIGHTS)
    logits, numbers = draw(5)
    targets = draw_labels(5) if multi else one_hot(numbers)
    whole = loss(logits, targets)
    assert whole.shape == (7,)
    parts = [loss(logits[part], targets[part]) for part in (slice(0, 4), slice(4, 6), slice(6, 7))]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("name, gamma", [*((name, 2.0) for name in NAMES), ("focal", 0.0), ("focal", 1.0)])
def test_loss_and_gradients_are_finite_for_logits_of_any_size(name, multi, gamma):
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 30.0], [40.0, 0.0, -40.0]], requires_grad=True)
    targets = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.95, 0.025, 0.025]])
    each = losses.make_loss(name, multi, gamma=gamma)(logits, targets)
    assert each.isfinite().all() and (each >= 0).all()
    each.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("gamma", [0.25, 0.5, 0.9])
def test_the_focal_loss_of_a_sure_and_right_picture_has_a_finite_gradient_for_every_gamma(gamma, multi):
    logits = torch.tensor([[40.0, 0.0, -40.0]], requires_grad=True)
    losses.focal(logits, torch.tensor([[1.0, 0.0, 0.0]]), gamma=gamma, multi=multi).sum().backward()
    assert logits.grad.isfinite().all()


def test_a_step_against_the_gradient_makes_each_loss_smaller():
    for name in NAMES:
        for multi in (False, True):
            logits, numbers = draw(6)
            targets = draw_labels(6) if multi else one_hot(numbers)
            loss = losses.make_loss(name, multi)
            logits.requires_grad_()
            before = loss(logits, targets).sum()
            before.backward()
            assert loss(logits.detach() - 0.1 * logits.grad, targets).sum() < before


# Smoothing


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.9])
def test_smoothing_is_torchs_label_smoothing(share):
    logits, numbers = draw(7)
    expected = functional.cross_entropy(logits, numbers, label_smoothing=share, reduction="none")
    smoothed = losses.smooth(one_hot(numbers), share, multi=False)
    torch.testing.assert_close(losses.cross_entropy(logits, smoothed), expected)


@bounded
@given(shares, st.integers(0, 99))
def test_smoothed_shares_of_one_label_still_sum_to_one(share, seed):
    smoothed = losses.smooth(draw_shares(seed), share, multi=False)
    torch.testing.assert_close(smoothed.sum(1), torch.ones(7))


def test_smoothing_of_several_labels_is_spread_over_yes_and_no_of_each():
    targets = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.9, 0.1, 0.9], [0.1, 0.1, 0.1]])
    torch.testing.assert_close(losses.smooth(targets, 0.2, multi=True), expected)


def test_smoothing_leaves_the_given_targets_alone():
    targets = torch.eye(3)
    losses.smooth(targets, 0.1, multi=False)
    assert torch.equal(targets, torch.eye(3))


# Class weights


def test_no_weights_are_none():
    assert losses.weigh_classes("none", [5, 1]) is None


@bounded
@given(st.sampled_from(["counts", "effective"]), counts)
@example("counts", [0, 0])
@example("effective", [1, 1_000_000])
def test_the_mean_weight_over_the_pictures_is_one_and_an_empty_class_has_one(kind, counts):
    weights = losses.weigh_classes(kind, counts)
    assert weights.dtype == torch.float32 and weights.shape == (len(counts),)
    assert weights.isfinite().all() and (weights > 0).all()
    assert all(weight == 1 for weight, count in zip(weights.tolist(), counts) if count == 0)
    if sum(counts):
        mean = sum(w * n for w, n in zip(weights.tolist(), counts)) / sum(counts)
        assert mean == pytest.approx(1, rel=1e-5)


def test_weights_by_counts_are_inverse_to_them_so_that_every_class_has_the_same_say():
    weights = losses.weigh_classes("counts", [10, 20, 70])
    np.testing.assert_allclose(weights, 100 / (3 * np.array([10, 20, 70])), rtol=1e-6)


def test_weights_by_effective_numbers_are_those_of_cui_and_others():
    counts, beta = np.array([1, 30, 4000]), 0.999
    expected = (1 - beta) / (1 - beta**counts)
    expected *= counts.sum() / (expected * counts).sum()
    np.testing.assert_allclose(losses.weigh_classes("effective", counts.tolist()), expected, rtol=1e-6)


def test_effective_numbers_weigh_small_classes_less_than_counts_do():
    rarest, largest = losses.weigh_classes("counts", [10, 5000]).tolist()
    assert rarest / largest == pytest.approx(500)
    rarest, largest = losses.weigh_classes("effective", [10, 5000]).tolist()
    assert 1 < rarest / largest < 200


@pytest.mark.parametrize("kind", ["counts", "effective"])
def test_classes_of_one_size_weigh_the_same(kind):
    torch.testing.assert_close(losses.weigh_classes(kind, [40, 40, 40]), torch.ones(3))


def test_with_weights_by_counts_the_mean_loss_is_the_mean_of_the_classes_means():
    numbers = torch.tensor([0] * 9 + [1] * 3 + [2])
    logits, _ = draw(8, len(numbers), 3)
    weights = losses.weigh_classes("counts", [9, 3, 1])
    plain = losses.cross_entropy(logits, one_hot(numbers, 3))
    expected = torch.stack([plain[numbers == number].mean() for number in range(3)]).mean()
    torch.testing.assert_close(losses.cross_entropy(logits, one_hot(numbers, 3), weights).mean(), expected)
