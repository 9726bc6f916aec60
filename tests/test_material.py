"""The batches of every optimiser step: one process's, several processes' shares of them, mixed and smoothed."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import headstart
from headstart import sampling
from headstart.config import EngineConfig
from headstart.errors import UsageError
from headstart.material import Material, draw_windows, make_window
from headstart.processes import World
from headstart.sampling import Draw

# The function-scoped fixture of all tests, an own cache for each, holds nothing that examples could share.
bounded = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SIDE = 8
PLAIN = EngineConfig(batch_size=4, augment="none")
MIXED = dataclasses.replace(PLAIN, mixup=0.8)
CUT = dataclasses.replace(PLAIN, cutmix=0.8)

counts = st.integers(1, 24)
seeds = st.integers(0, 2**40)
mixings = st.sampled_from([PLAIN, MIXED, CUT, dataclasses.replace(MIXED, cutmix=0.8)])


def paint(draw: Draw, epoch: int) -> np.ndarray:
    """A picture all of whose pixels are its own number, so that what is mixed into it can be told."""
    return np.full((SIDE, SIDE, 3), float(draw.sample), np.float32)


def own_class(count: int) -> Material:
    """Pictures each of which has a class of its own."""
    return Material(paint, lambda pixels: pixels, np.eye(count, dtype=bool), "single")


def of_targets(targets, task="single", show=paint) -> Material:
    return Material(show, lambda pixels: pixels, np.array(targets, dtype=bool), task)


def whole_window(material, configured, step=0, seed=0, epoch=0, world=World()):
    return make_window(material, configured, seed, epoch, step, draw_windows(material, configured, seed, epoch), world)


def draws_of(count: int) -> list[Draw]:
    """An epoch's pictures in the order of their numbers, where all are in one step."""
    return [Draw(sample) for sample in range(count)]


def rows_of(batches, name):
    """A field of batches, of the pictures that count."""
    return np.concatenate([np.asarray(getattr(batch, name))[batch.weights.numpy() > 0] for batch in batches])


# What is drawn


@bounded
@given(counts, st.integers(1, 9), st.integers(1, 4), seeds, st.integers(0, 9))
def test_windows_hold_every_picture_once_in_the_order_of_the_epoch(count, size, accumulate, seed, epoch):
    configured = EngineConfig(batch_size=size, accumulate=accumulate)
    material = own_class(count)
    windows = draw_windows(material, configured, seed, epoch)
    assert [draw for window in windows for draw in window] == sampling.draw_epoch(material.labels, "plain", seed, epoch)
    assert len(windows) == -(-count // (size * accumulate))
    assert len(windows) == len(draw_windows(material, configured, seed, epoch + 1))


@pytest.mark.parametrize("kind", ["plain", "weighted", "over", "under"])
def test_windows_are_drawn_as_the_settings_say(kind):
    material = of_targets([[1, 0]] * 9 + [[0, 1]] * 3)
    windows = draw_windows(material, dataclasses.replace(PLAIN, sampling=kind), 1, 2)
    expected = sampling.draw_epoch(np.array([0] * 9 + [1] * 3), kind, 1, 2)
    assert [draw for window in windows for draw in window] == expected


def test_labels_are_class_numbers_or_the_targets_of_several_labels():
    targets = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=bool)
    assert of_targets(targets).labels.tolist() == [1, 2, 0]
    np.testing.assert_array_equal(of_targets(targets, "multi").labels, targets)


# One process


@bounded
@given(counts, st.integers(1, 9), st.integers(1, 4), seeds)
def test_a_window_holds_its_pictures_in_order_in_batches_of_the_right_size(count, size, accumulate, seed):
    configured = EngineConfig(batch_size=size, accumulate=accumulate)
    material = own_class(count)
    windows = draw_windows(material, configured, seed, 3)
    for step, draws in enumerate(windows):
        window = make_window(material, configured, seed, 3, step, windows)
        samples = [draw.sample for draw in draws]
        assert window.count == len(draws)
        assert [len(batch.pixels) for batch in window.batches][:-1] == [size] * (len(window.batches) - 1)
        assert all(torch.equal(batch.weights, torch.ones(len(batch.pixels))) for batch in window.batches)
        assert rows_of(window.batches, "pixels")[:, 0, 0, 0].tolist() == samples
        assert rows_of(window.batches, "targets").argmax(1).tolist() == samples
        np.testing.assert_array_equal(rows_of(window.batches, "targets"), rows_of(window.batches, "truth"))


def test_pictures_are_shown_for_their_epoch_and_turn():
    asked = []

    def show(draw, epoch):
        asked.append((draw, epoch))
        return paint(draw, epoch)

    material = of_targets([[1, 0]] * 6 + [[0, 1]], show=show)
    configured = EngineConfig(batch_size=64, sampling="over")
    windows = draw_windows(material, configured, 0, 5)
    make_window(material, configured, 0, 5, 0, windows)
    assert asked == [(draw, 5) for draw in windows[0]]
    assert max(draw.turn for draw, _ in asked) == 5


def test_accumulated_batches_are_one_large_batch_cut_up():
    material = own_class(23)
    for mixing in (PLAIN, MIXED, CUT):
        small = dataclasses.replace(mixing, batch_size=4, accumulate=3, label_smoothing=0.1)
        large = dataclasses.replace(mixing, batch_size=12, accumulate=1, label_smoothing=0.1)
        for step in range(2):
            parts, whole = whole_window(material, small, step), whole_window(material, large, step)
            assert len(parts.batches) == 3 and len(whole.batches) == 1 and parts.count == whole.count
            for name in ("pixels", "targets", "truth", "weights"):
                np.testing.assert_array_equal(rows_of(parts.batches, name), rows_of(whole.batches, name))


def test_targets_are_numbers_and_shapes_are_as_documented():
    (batch,) = whole_window(own_class(3), MIXED).batches
    assert batch.pixels.shape == (3, SIDE, SIDE, 3)
    for tensor in (batch.targets, batch.truth):
        assert tensor.dtype == torch.float32 and tensor.shape == (3, 3)
    assert batch.weights.shape == (3,)


# Several processes


@bounded
@given(counts, st.integers(1, 9), st.integers(1, 4), st.integers(2, 5), mixings, seeds)
@example(1, 4, 2, 2, PLAIN, 0)
@example(5, 4, 1, 2, MIXED, 0)
def test_the_shares_of_several_processes_are_together_one_processs_window(
    count, size, accumulate, processes, mixing, seed
):
    material = own_class(count)
    configured = dataclasses.replace(mixing, batch_size=size, accumulate=accumulate, label_smoothing=0.1)
    windows = draw_windows(material, configured, seed, 0)
    for step in range(len(windows)):
        alone = make_window(material, configured, seed, 0, step, windows)
        shares = [
            make_window(material, configured, seed, 0, step, windows, World(rank, processes))
            for rank in range(processes)
        ]
        for share in shares:  # all must take part in every pass, and divide by the same number
            assert share.count == alone.count
            assert len(share.batches) == len(alone.batches)
        for number, batch in enumerate(alone.batches):
            theirs = [share.batches[number] for share in shares]
            sizes = [int(own.weights.sum()) for own in theirs]
            assert max(sizes) - min(sizes) <= 1 and sum(sizes) == len(batch.pixels)
            for name in ("pixels", "targets", "truth"):
                together, whole = rows_of(theirs, name), rows_of([batch], name)
                order = np.lexsort(rows_of(theirs, "truth").T), np.lexsort(rows_of([batch], "truth").T)
                np.testing.assert_array_equal(together[order[0]], whole[order[1]])


def test_a_process_without_a_picture_of_a_short_batch_shows_one_that_does_not_count():
    material = own_class(5)
    shares = [make_window(material, PLAIN, 0, 0, 0, [draws_of(5)], World(rank, 2)) for rank in range(2)]
    assert [batch.weights.tolist() for batch in shares[0].batches] == [[1, 1], [1]]
    assert [batch.weights.tolist() for batch in shares[1].batches] == [[1, 1], [0]]
    padding = shares[1].batches[1]
    assert padding.pixels.shape == (1, SIDE, SIDE, 3) and padding.targets.shape == (1, 5)
    assert [share.count for share in shares] == [5, 5]


NORMS = [dataclasses.replace(PLAIN, batch_norm="train"), dataclasses.replace(PLAIN, head="batch-norm")]


@pytest.mark.parametrize("configured", NORMS)
@pytest.mark.parametrize("count, processes", [(1, 1), (5, 1), (5, 2), (6, 2), (9, 4), (3, 4)])
def test_where_batch_norms_are_trained_no_pass_sees_a_lone_picture_and_what_is_added_does_not_count(
    configured, count, processes
):
    material, windows = own_class(count), [draws_of(count)]
    shares = [make_window(material, configured, 0, 0, 0, windows, World(rank, processes)) for rank in range(processes)]
    batches = [batch for share in shares for batch in share.batches]
    assert all(len(batch.pixels) == len(batch.targets) == len(batch.weights) >= 2 for batch in batches)
    assert sorted(rows_of(batches, "truth").argmax(1).tolist()) == list(range(count))
    assert {share.count for share in shares} == {count}


@pytest.mark.parametrize("configured", NORMS)
def test_the_company_of_a_lone_picture_is_another_one(configured):
    last = make_window(own_class(5), configured, 0, 0, 0, [draws_of(5)]).batches[-1]
    assert len(set(last.truth.argmax(1).tolist())) == 2


@bounded
@given(counts, st.integers(1, 9), st.integers(1, 3), st.integers(1, 5), st.sampled_from([PLAIN, *NORMS]), seeds)
@example(9, 4, 1, 1, NORMS[0], 0)  # the last step has one picture: its company comes from the step before
@example(9, 4, 2, 1, NORMS[1], 0)
@example(3, 1, 1, 1, NORMS[0], 0)  # and so has every step, the first too
@example(5, 4, 1, 3, NORMS[0], 0)
def test_company_is_never_one_of_the_processs_own_pictures_where_there_is_another(
    count, size, accumulate, processes, norms, seed
):
    material = own_class(count)
    configured = dataclasses.replace(norms, batch_size=size, accumulate=accumulate)
    windows = draw_windows(material, configured, seed, 0)
    for step in range(len(windows)):
        for rank in range(processes):
            for batch in make_window(material, configured, seed, 0, step, windows, World(rank, processes)).batches:
                counts_in, shown = batch.weights > 0, batch.truth.argmax(1)
                own, company = set(shown[counts_in].tolist()), shown[~counts_in].tolist()
                assert not own & set(company) or count == len(own)
                assert len(company) == max(0, (1 if norms is PLAIN else 2) - len(own))


@pytest.mark.parametrize("configured", NORMS)
def test_the_company_of_a_lone_last_picture_is_of_the_step_before(configured):
    windows = [draws_of(8)[:4], draws_of(8)[4:], [Draw(8)]]
    (batch,) = make_window(own_class(9), configured, 0, 0, 2, windows).batches
    assert batch.weights.tolist() == [1, 0]
    assert batch.truth.argmax(1).tolist()[1] in (4, 5, 6, 7)


def test_pictures_that_are_drawn_again_are_no_company_for_themselves():
    windows = [[Draw(0), Draw(0, 1), Draw(1), Draw(0, 2)], [Draw(0, 3)]]
    (batch,) = make_window(own_class(2), NORMS[0], 0, 0, 1, windows).batches
    assert batch.truth.argmax(1).tolist() == [0, 1] and batch.weights.tolist() == [1, 0]


def test_where_there_is_one_picture_alone_it_keeps_itself_company():
    (batch,) = make_window(own_class(1), NORMS[0], 0, 0, 0, [draws_of(1)]).batches
    assert batch.truth.argmax(1).tolist() == [0, 0] and batch.weights.tolist() == [1, 0]


def test_losses_weighted_and_divided_by_the_count_are_the_mean_over_pictures():
    # The mistake: means of batch means, in which the pictures of a short batch weigh more.
    material = own_class(11)
    for processes in (1, 2, 3):
        total = 0.0
        for rank in range(processes):
            window = make_window(material, PLAIN, 0, 0, 0, [draws_of(11)], World(rank, processes))
            for batch in window.batches:
                losses = torch.from_numpy(batch.pixels[:, 0, 0, 0])  # a loss for each picture: its number
                total += float((losses * batch.weights).sum()) / window.count
        assert total == pytest.approx(5.0)


# Mixing


@bounded
@given(st.integers(2, 24), st.sampled_from([MIXED, CUT]), seeds, st.integers(0, 9))
def test_targets_are_mixed_as_the_pixels_are(count, mixing, seed, epoch):
    material, values = own_class(count), np.arange(count)
    windows = draw_windows(material, mixing, seed, epoch)
    for step, draws in enumerate(windows):
        window = make_window(material, mixing, seed, epoch, step, windows)
        targets, pixels = rows_of(window.batches, "targets"), rows_of(window.batches, "pixels")
        np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
        np.testing.assert_allclose(targets @ values, pixels.mean((1, 2, 3)), rtol=1e-4, atol=1e-4)
        assert rows_of(window.batches, "truth").argmax(1).tolist() == [draw.sample for draw in draws]
        np.testing.assert_array_equal(np.sort(rows_of(window.batches, "truth"))[:, -1], 1)


def test_pictures_are_mixed_with_those_of_the_whole_step_and_not_of_their_pass_alone():
    material = own_class(16)
    configured = dataclasses.replace(MIXED, batch_size=2, accumulate=8)
    window = whole_window(material, configured)
    across = 0
    for batch in window.batches:
        own = set(batch.truth.argmax(1).tolist())
        shown = {int(number) for row in batch.targets for number in torch.nonzero(row)}
        across += bool(shown - own)
    assert len(window.batches) == 8 and across >= 6


def test_each_picture_is_a_partner_once():
    window = whole_window(own_class(16), dataclasses.replace(MIXED, batch_size=16))
    (batch,) = window.batches
    shares = batch.targets - batch.truth * batch.targets  # what comes of others
    alone = int((shares.sum(1) == 0).sum())  # mixed with themselves
    assert int((shares > 0).sum(1).max()) == 1
    assert int((shares > 0).sum()) == 16 - alone
    assert int((shares > 0).sum(0).max()) == 1


def test_cutmix_puts_a_box_of_the_partner_into_a_picture():
    material = own_class(12)
    for step in range(3):
        (batch,) = whole_window(material, dataclasses.replace(CUT, batch_size=4), step).batches
        for picture, truth, target in zip(batch.pixels, batch.truth, batch.targets):
            own = int(truth.argmax())
            from_other = picture[..., 0] != own
            assert (picture == picture[..., :1]).all()
            if from_other.any():
                rows, columns = np.flatnonzero(from_other.any(1)), np.flatnonzero(from_other.any(0))
                assert from_other[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            assert target[own] == pytest.approx(1 - from_other.mean(), abs=1e-6)


def test_a_step_mixes_otherwise_in_the_next_epoch_and_the_same_again():
    material, windows = own_class(8), [draws_of(8)] * 2
    first = make_window(material, MIXED, 0, 0, 0, windows)
    again = make_window(material, MIXED, 0, 0, 0, windows)
    np.testing.assert_array_equal(rows_of(first.batches, "targets"), rows_of(again.batches, "targets"))
    for place in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        other = make_window(material, MIXED, *place, windows)
        assert (rows_of(other.batches, "targets") != rows_of(first.batches, "targets")).any()


def test_several_labels_are_mixed_in_shares():
    targets = [[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 0, 0]]
    material = of_targets(targets, "multi")
    (batch,) = make_window(material, MIXED, 0, 0, 0, [draws_of(4)]).batches
    partners, mixes = sampling.draw_mixes(4, 0.8, 0.0, 0, 0, 0)
    for row, (partner, one) in enumerate(zip(partners, mixes)):
        expected = one.share * np.array(targets[row]) + (1 - one.share) * np.array(targets[partner])
        np.testing.assert_allclose(batch.targets[row], expected, rtol=1e-6)
    np.testing.assert_array_equal(batch.truth, targets)


def test_partners_are_shown_as_their_own_epoch_and_turn_show_them():
    def show(draw, epoch):
        return np.full((SIDE, SIDE, 3), 100 * epoch + 10 * draw.turn + draw.sample, np.float32)

    material = of_targets(np.eye(3), show=show)
    draws = [Draw(0), Draw(0, 1), Draw(1), Draw(2)]
    (batch,) = make_window(material, MIXED, 0, 2, 0, [draws]).batches
    partners, mixes = sampling.draw_mixes(4, 0.8, 0.0, 0, 2, 0)
    values = np.array([200, 210, 201, 202])
    expected = [one.share * values[row] + (1 - one.share) * values[partners[row]] for row, one in enumerate(mixes)]
    np.testing.assert_allclose(batch.pixels[:, 0, 0, 0], expected, rtol=1e-6)


# Smoothing


def test_smoothing_spreads_a_share_over_all_classes_and_leaves_the_truth():
    (batch,) = whole_window(own_class(4), dataclasses.replace(PLAIN, label_smoothing=0.2)).batches
    np.testing.assert_allclose(batch.targets, 0.8 * batch.truth + 0.05, rtol=1e-6)
    assert sorted(batch.truth.unique().tolist()) == [0, 1]


def test_smoothing_of_several_labels_is_over_yes_and_no():
    material = of_targets([[1, 1, 0], [0, 0, 0]], "multi")
    (batch,) = whole_window(material, dataclasses.replace(PLAIN, label_smoothing=0.2)).batches
    np.testing.assert_allclose(batch.targets, 0.8 * batch.truth + 0.1, rtol=1e-6)


def test_smoothing_comes_after_mixing():
    for mixing in (MIXED, CUT):
        (mixed,) = whole_window(own_class(4), mixing).batches
        (both,) = whole_window(own_class(4), dataclasses.replace(mixing, label_smoothing=0.2)).batches
        np.testing.assert_allclose(both.targets, 0.8 * mixed.targets + 0.05, rtol=1e-6)
        np.testing.assert_array_equal(both.pixels, mixed.pixels)


# Features instead of pictures


def test_features_are_batched_and_blended_like_pictures():
    matrix = np.random.default_rng(0).normal(size=(10, 5)).astype(np.float32)
    material = of_targets(np.eye(10), show=lambda draw, _: matrix[draw.sample])
    plain = make_window(material, PLAIN, 0, 0, 0, [draws_of(10)])
    np.testing.assert_array_equal(rows_of(plain.batches, "pixels"), matrix)
    blended = make_window(material, MIXED, 0, 0, 0, [draws_of(10)])
    targets = rows_of(blended.batches, "targets")
    np.testing.assert_allclose(rows_of(blended.batches, "pixels"), targets @ matrix, rtol=1e-4, atol=1e-5)


def test_cutmix_of_a_head_on_features_is_refused_or_left_out(shapes, tiny_weights, tmp_path):
    given = {"strategy": "probe", "head": "mlp", "epochs": 1, "cutmix": 1.0, "weights": str(tiny_weights)}
    try:
        headstart.train(shapes, tmp_path / "run", **given)
    except UsageError as error:
        assert "cutmix" in str(error)
