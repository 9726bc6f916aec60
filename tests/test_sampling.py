"""Which pictures an epoch shows and which are mixed: functions of (seed, epoch, step) and of nothing else."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy import stats

from headstart import sampling
from headstart.sampling import Draw

# The function-scoped fixture of all tests, an own cache for each, holds nothing that examples could share.
bounded = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

KINDS = ("plain", "weighted", "over", "under")
sizes = st.lists(st.integers(1, 30), min_size=1, max_size=5)
seeds = st.integers(0, 2**40)
epochs = st.integers(0, 200)
alphas = st.sampled_from([1e-3, 0.1, 0.2, 1.0, 5.0, 10.0])
label_sets = st.lists(st.sets(st.integers(0, 3), max_size=3), min_size=1, max_size=40)


def labels_of(sizes):
    """Class numbers of classes with so many pictures each."""
    return np.repeat(np.arange(len(sizes)), sizes)


def several(label_sets, classes=4):
    """Booleans (n, classes)."""
    return np.array([[number in labels for number in range(classes)] for labels in label_sets])


def shown(labels, kind, seed=0, epoch=0):
    """How often each picture is shown."""
    counts = Counter(draw.sample for draw in sampling.draw_epoch(labels, kind, seed, epoch))
    return np.array([counts[sample] for sample in range(len(labels))])


# Epochs


@bounded
@given(sizes, seeds, epochs)
def test_plain_shows_each_picture_once(sizes, seed, epoch):
    draws = sampling.draw_epoch(labels_of(sizes), "plain", seed, epoch)
    assert sorted(draw.sample for draw in draws) == list(range(sum(sizes)))
    assert all(draw.turn == 0 for draw in draws)


def test_plain_puts_every_picture_at_every_place_equally_often():
    labels = np.zeros(6, np.int64)
    places = np.array([[d.sample for d in sampling.draw_epoch(labels, "plain", 0, epoch)] for epoch in range(3000)])
    for place in range(6):
        assert stats.chisquare(np.bincount(places[:, place], minlength=6)).pvalue > 1e-4


@bounded
@given(sizes, st.sampled_from(KINDS), seeds, epochs)
def test_a_turn_counts_how_often_the_picture_came_before_in_the_epoch(sizes, kind, seed, epoch):
    before = Counter()
    for draw in sampling.draw_epoch(labels_of(sizes), kind, seed, epoch):
        assert draw.turn == before[draw.sample]
        before[draw.sample] += 1


def test_weighted_draws_each_class_equally_often_and_within_a_class_each_picture():
    labels = labels_of([2700, 250, 50])
    counts = sum(shown(labels, "weighted", epoch=epoch) for epoch in range(20))
    assert counts.sum() == 20 * 3000
    assert stats.chisquare(np.bincount(labels, counts)).pvalue > 1e-3
    for number in range(3):
        assert stats.chisquare(counts[labels == number]).pvalue > 1e-3


def test_weighted_draws_with_replacement_as_many_as_there_are():
    counts = shown(labels_of([90, 10]), "weighted")
    assert counts.sum() == 100
    assert counts.max() > 1 and counts.min() == 0


def test_weighted_draws_a_picture_of_several_labels_as_its_rarest_one_deserves():
    labels = several([{0}] * 60 + [{0, 1}] * 30 + [{0, 1, 2}] * 10, 3)
    counts = sum(shown(labels, "weighted", epoch=epoch) for epoch in range(400))
    rarity = np.array([1 / 100] * 60 + [1 / 40] * 30 + [1 / 10] * 10)
    assert stats.chisquare(counts, rarity / rarity.sum() * counts.sum()).pvalue > 1e-3


@bounded
@given(sizes, seeds, epochs)
def test_over_shows_every_class_as_often_as_the_largest_and_its_pictures_in_turn(sizes, seed, epoch):
    labels = labels_of(sizes)
    counts = shown(labels, "over", seed, epoch)
    for number in range(len(sizes)):
        own = counts[labels == number]
        assert own.sum() == max(sizes)
        assert own.max() - own.min() <= 1


@bounded
@given(sizes, seeds, epochs)
def test_under_shows_as_many_of_every_class_as_the_smallest_has_and_none_twice(sizes, seed, epoch):
    labels = labels_of(sizes)
    counts = shown(labels, "under", seed, epoch)
    assert np.bincount(labels, counts).tolist() == [min(sizes)] * len(sizes)
    assert counts.max() == 1


@pytest.mark.parametrize("kind", ["over", "under"])
def test_what_is_shown_more_often_or_left_out_changes_with_the_epoch_and_all_have_their_turn(kind):
    labels = labels_of([10, 7, 4])
    epochs = [shown(labels, kind, epoch=epoch) for epoch in range(300)]
    assert len({tuple(counts) for counts in epochs}) > 100
    together = sum(epochs)
    for number in range(3):
        own = together[labels == number]
        assert own.max() / own.min() < 1.4


def test_classes_are_mixed_in_the_order_of_every_kind():
    labels = labels_of([200, 100, 100])
    for kind in KINDS:
        drawn = labels[[draw.sample for draw in sampling.draw_epoch(labels, kind, 0, 0)]]
        half = len(drawn) // 2
        first, second = np.bincount(drawn[:half], minlength=3) / half, np.bincount(drawn[-half:], minlength=3) / half
        assert abs(first - second).max() < 0.15


@bounded
@given(label_sets, st.sampled_from(KINDS), seeds)
@example([set(), set()], "weighted", 0)
@example([set(), {1}], "over", 0)
@example([set(), {1}], "under", 0)
def test_several_labels_a_picture_are_drawn_by_the_rarest_one_and_none_are_a_class_of_their_own(label_sets, kind, seed):
    labels = several(label_sets)
    frequency = labels.sum(0)
    rarest = [min(own, key=lambda label: (frequency[label], label)) if own else 4 for own in label_sets]
    sizes = Counter(rarest)
    counts = shown(labels, kind, seed)
    found = Counter({number: counts[np.array(rarest) == number].sum() for number in sizes})
    if kind == "plain":
        assert counts.tolist() == [1] * len(labels)
    elif kind == "weighted":
        assert counts.sum() == len(labels)
    else:
        wanted = (max if kind == "over" else min)(sizes.values())
        assert set(found.values()) == {wanted}


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_is_a_function_of_seed_and_epoch_alone(kind):
    labels = labels_of([12, 9, 20])
    first = {(seed, epoch): sampling.draw_epoch(labels, kind, seed, epoch) for seed in range(3) for epoch in range(3)}
    np.random.seed(5)  # what others draw changes nothing
    for (seed, epoch), draws in sorted(first.items(), reverse=True):
        assert sampling.draw_epoch(labels, kind, seed, epoch) == draws
    orders = {tuple(draw.sample for draw in draws) for draws in first.values()}
    assert len(orders) == 9


def test_another_process_with_other_hashes_draws_the_same():
    code = (
        "import numpy as np; from headstart import sampling; labels = np.repeat([0, 1, 2], [5, 9, 2]);"
        "print(sampling.draw_epoch(labels, 'over', 3, 4), sampling.draw_mixes(5, 1, 1, 3, 4, 5))"
    )
    texts = set()
    for number in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": number}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        texts.add(run.stdout)
    draws = sampling.draw_epoch(np.repeat([0, 1, 2], [5, 9, 2]), "over", 3, 4)
    assert texts == {f"{draws} {sampling.draw_mixes(5, 1, 1, 3, 4, 5)}\n"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_has_as_many_pictures(kind):
    for labels in (labels_of([12, 9, 20]), several([{0}, {0, 1}, set(), {2, 3}, {3}] * 3)):
        assert len({len(sampling.draw_epoch(labels, kind, 1, epoch)) for epoch in range(20)}) == 1


# Windows


@bounded
@given(st.integers(0, 50), st.integers(1, 60))
def test_windows_hold_all_pictures_in_order_and_only_the_last_is_short(count, size):
    draws = [Draw(sample) for sample in range(count)]
    found = sampling.windows(draws, size)
    assert [draw for window in found for draw in window] == draws
    assert all(len(window) == size for window in found[:-1])
    assert all(0 < len(window) <= size for window in found)


# Mixing


def test_without_an_alpha_nothing_is_mixed():
    assert sampling.draw_mixes(8, 0.0, 0.0, 0, 0, 0) is None


@bounded
@given(st.integers(1, 40), alphas, alphas, seeds, epochs, st.integers(0, 1000))
def test_partners_are_a_permutation_shares_lie_between_0_and_1_and_boxes_in_the_picture(
    count, mixup, cutmix, seed, epoch, step
):
    partners, mixes = sampling.draw_mixes(count, mixup, cutmix, seed, epoch, step)
    assert sorted(partners) == list(range(count))
    assert len(mixes) == count
    for mix in mixes:
        assert 0 <= mix.share <= 1
        if mix.box is not None:
            left, top, right, bottom = mix.box
            assert 0 <= left <= right <= 1 and 0 <= top <= bottom <= 1
            assert (right - left) * (bottom - top) <= 1 - mix.share + 1e-9  # what is over the edge is lost


@bounded
@given(st.integers(1, 40), alphas, alphas, seeds, epochs, st.integers(0, 1000))
def test_the_same_seed_epoch_and_step_mix_the_same(count, mixup, cutmix, seed, epoch, step):
    given = (count, mixup, cutmix, seed, epoch, step)
    first = sampling.draw_mixes(*given)
    sampling.draw_mixes(count, mixup, cutmix, seed, epoch, step + 1)
    assert sampling.draw_mixes(*given) == first


def test_each_seed_epoch_and_step_mixes_otherwise():
    every = [sampling.draw_mixes(6, 1.0, 0.0, *place) for place in np.ndindex(4, 4, 4)]
    assert len({tuple(mix.share for mix in mixes) for _, mixes in every}) == 64


def test_only_one_kind_is_in_a_step_and_with_both_each_has_half_the_steps():
    kinds = [{mix.box is None for mix in sampling.draw_mixes(8, 0.4, 1.0, 0, 0, step)[1]} for step in range(1000)]
    assert all(len(kind) == 1 for kind in kinds)
    assert stats.binomtest(sum(kind == {True} for kind in kinds), 1000).pvalue > 1e-3


@pytest.mark.parametrize("mixup, cutmix, blends", [(0.4, 0.0, True), (0.0, 0.4, False)])
def test_one_alpha_mixes_in_its_way_only(mixup, cutmix, blends):
    for step in range(50):
        assert all((mix.box is None) == blends for mix in sampling.draw_mixes(8, mixup, cutmix, 0, 0, step)[1])


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_beta_distributed_by_their_own_alpha(alpha, cut):
    given = (0.0, alpha) if cut else (alpha, 0.0)
    shares = [mix.share for step in range(60) for mix in sampling.draw_mixes(50, *given, 0, 0, step)[1]]
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_with_both_each_kind_keeps_its_own_alpha():
    blended, cut = [], []
    for step in range(200):
        for mix in sampling.draw_mixes(20, 0.2, 5.0, 0, 0, step)[1]:
            (blended if mix.box is None else cut).append(mix.share)
    assert stats.kstest(blended, stats.beta(0.2, 0.2).cdf).pvalue > 1e-3
    assert stats.kstest(cut, stats.beta(5.0, 5.0).cdf).pvalue > 1e-3


def test_a_box_within_the_picture_is_a_square_of_the_other_share_and_its_middle_lies_anywhere():
    mixes = [mix for step in range(100) for mix in sampling.draw_mixes(50, 0.0, 1.0, 0, 0, step)[1]]
    middles = []
    for mix in mixes:
        left, top, right, bottom = mix.box
        if min(left, top) > 0 and max(right, bottom) < 1:
            assert right - left == pytest.approx(bottom - top)
            assert (right - left) * (bottom - top) == pytest.approx(1 - mix.share)
        if mix.share > 0.99:  # small boxes: few touch the edge
            middles.append(((left + right) / 2, (top + bottom) / 2))
    assert len(middles) > 20
    for axis in np.transpose(middles):
        assert stats.kstest(axis, "uniform").pvalue > 1e-3


def test_a_box_at_the_edge_is_cut_there():
    cut = 0
    for step in range(100):
        for mix in sampling.draw_mixes(50, 0.0, 1.0, 0, 0, step)[1]:
            left, top, right, bottom = mix.box
            side = np.sqrt(1 - mix.share)
            assert right - left <= side + 1e-9 and bottom - top <= side + 1e-9
            if right - left < side - 1e-9:
                cut += 1
                assert left == 0 or right == 1
    assert cut > 1000


def test_order_and_mixing_draw_from_different_numbers():
    labels = np.zeros(30, np.int64)
    for seed in range(5):
        order = [draw.sample for draw in sampling.draw_epoch(labels, "plain", seed, 0)]
        partners, _ = sampling.draw_mixes(30, 1.0, 0.0, seed, 0, 0)
        assert order != partners
