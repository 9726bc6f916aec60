"""The maker of batches: order, how far it runs ahead, when it builds the network, how it ends."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import draw_shape
from headstart import loading, sampling
from headstart.augmentation import parse
from headstart.errors import UnreadableImage
from headstart.images import Limits, Preprocess, open_image
from headstart.loading import BATCH_SIZE, Album, Picture, Wanted, ahead, batches, mix, process
from headstart.sampling import Draw, Mix

PREPROCESS = Preprocess(size=16, crop=1.0)


class Everything:
    """Knows every picture."""

    def __contains__(self, digest: object) -> bool:
        return True


def mean_colours(pixels: np.ndarray) -> np.ndarray:
    return pixels.mean((1, 2)).astype(np.float32)


def never() -> loading.Compute:
    raise AssertionError("no picture needs the network")


def write_pictures(folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        draw_shape("circle", number, (24, 20)).save(path)
    return paths


def threads_of_loading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("headstart")]


def wait_until(condition, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """The files read so far; the threads run ahead by no more than 32 pictures and two of them work."""
    done: list[Path] = []
    read_bytes = loading.read_bytes

    def read(path, limits):
        content = read_bytes(path, limits)
        done.append(path)
        return content

    monkeypatch.setattr(loading, "read_bytes", read)
    monkeypatch.setattr(loading, "LOOK_AHEAD_BYTES", 0)
    monkeypatch.setattr(loading, "count_cpus", lambda: 2)
    return done


# What comes


def test_pictures_come_in_the_order_of_their_paths_with_unreadable_ones_in_their_places(tmp_path):
    paths = write_pictures(tmp_path, 45)
    broken = {0, 7, 8, 9, 10, 11, 12, 13, 14, 15, 30, 44}  # the first, the last, and a whole batch
    for number in broken:
        paths[number].write_bytes(b"no picture")
    pictures = list(process(paths, Wanted(PREPROCESS), lambda: mean_colours))
    assert [picture.index for picture in pictures] == list(range(45))
    assert {picture.index for picture in pictures if picture.error} == broken
    for picture in pictures:
        content = paths[picture.index].read_bytes()
        assert picture.digest == hashlib.sha256(content).hexdigest()
        if picture.index in broken:
            assert picture.vector is None and "not a picture" in picture.error
        else:
            expected = mean_colours(PREPROCESS.apply(open_image(content))[None])[0]
            np.testing.assert_array_equal(picture.vector, expected)


def test_order_is_kept_when_some_pictures_take_much_longer(tmp_path, monkeypatch):
    paths = write_pictures(tmp_path, 40)
    plain = loading.open_image
    monkeypatch.setattr(
        loading, "open_image", lambda *given: time.sleep(0.02 * (hash(given[2]) % 3 == 0)) or plain(*given)
    )
    expected = [mean_colours(PREPROCESS.apply(plain(path))[None])[0].tolist() for path in paths]
    assert [p.vector.tolist() for p in process(paths, Wanted(PREPROCESS), lambda: mean_colours)] == expected


def test_pixels_are_not_kept_once_they_are_computed(tmp_path):
    assert all(p.pixels is None for p in process(write_pictures(tmp_path, 9), Wanted(PREPROCESS), lambda: mean_colours))


def test_facts_come_only_where_they_are_wanted_and_not_known(tmp_path):
    paths = write_pictures(tmp_path, 3)
    known = hashlib.sha256(paths[1].read_bytes()).hexdigest()
    wanted = Wanted(PREPROCESS, facts=True, known_facts={known})
    assert [p.facts is not None for p in process(paths, wanted, lambda: mean_colours)] == [True, False, True]
    assert all(p.facts is None for p in process(paths, Wanted(PREPROCESS), lambda: mean_colours))


def test_known_pictures_are_read_and_neither_decoded_nor_computed(tmp_path, monkeypatch):
    paths = write_pictures(tmp_path, 20)
    known = {hashlib.sha256(path.read_bytes()).hexdigest() for path in paths[5:]}
    opened = []
    plain = loading.open_image
    monkeypatch.setattr(loading, "open_image", lambda *given: opened.append(given[2]) or plain(*given))
    rows = []
    compute = lambda pixels: rows.append(len(pixels)) or mean_colours(pixels)  # noqa: E731
    pictures = list(process(paths, Wanted(PREPROCESS, known_pixels=known), lambda: compute))
    assert sorted(opened) == sorted(paths[:5]) and sum(rows) == 5
    assert [picture.vector is not None for picture in pictures] == [True] * 5 + [False] * 15
    assert all(picture.digest for picture in pictures)


def test_limits_hold(tmp_path):
    paths = write_pictures(tmp_path, 2)
    pictures = list(process(paths, Wanted(PREPROCESS, Limits(pixels=100)), never))
    assert ["limit" in picture.error for picture in pictures] == [True, True]


def test_no_paths_give_no_pictures():
    assert list(process([], Wanted(PREPROCESS), never)) == []


def test_a_missing_file_is_a_picture_with_a_reason(tmp_path):
    (picture,) = process([tmp_path / "gone.png"], Wanted(PREPROCESS), never)
    assert "no such file" in picture.error and picture.digest == ""


# The network


def test_the_network_is_built_once_in_the_callers_thread(tmp_path):
    builders = []
    make = lambda: builders.append(threading.current_thread()) or mean_colours  # noqa: E731
    assert len(list(process(write_pictures(tmp_path, 60), Wanted(PREPROCESS), make))) == 60
    assert builders == [threading.current_thread()]


def test_the_network_is_not_built_when_every_picture_is_known(tmp_path):
    pictures = list(process(write_pictures(tmp_path, 20), Wanted(PREPROCESS, known_pixels=Everything()), never))
    assert len(pictures) == 20 and not any(picture.error for picture in pictures)


def test_the_network_is_not_built_when_no_picture_can_be_read(tmp_path):
    paths = write_pictures(tmp_path, 20)
    for path in paths:
        path.write_bytes(b"")
    assert all(picture.error == "is empty" for picture in process(paths, Wanted(PREPROCESS), never))


def test_the_network_is_built_for_the_first_picture_that_needs_it(tmp_path):
    paths = write_pictures(tmp_path, 60)
    known = {hashlib.sha256(path.read_bytes()).hexdigest() for path in paths[:-1]}
    pictures = list(process(paths, Wanted(PREPROCESS, known_pixels=known), lambda: mean_colours))
    assert [picture.index for picture in pictures if picture.vector is not None] == [59]


def test_a_batch_is_never_larger_than_its_size(tmp_path):
    sizes = []
    compute = lambda pixels: sizes.append(len(pixels)) or mean_colours(pixels)  # noqa: E731
    list(process(write_pictures(tmp_path, 21), Wanted(PREPROCESS), lambda: compute))
    assert sorted(sizes) == [21 % BATCH_SIZE, BATCH_SIZE, BATCH_SIZE]


# How far it runs ahead


def test_reading_begins_at_the_call_and_stops_at_the_window(tmp_path, reads):
    stream = process(write_pictures(tmp_path, 1) * 400, Wanted(PREPROCESS), lambda: mean_colours)
    assert wait_until(lambda: len(reads) == 32)
    time.sleep(0.1)
    assert len(reads) == 32
    next(stream)
    stream.close()


def test_reading_stays_within_a_window_ahead_of_who_takes_the_pictures(tmp_path, reads):
    stream = process(write_pictures(tmp_path, 1) * 600, Wanted(PREPROCESS), lambda: mean_colours)
    for taken, _ in enumerate(stream, 1):
        if taken % 50 == 0:
            time.sleep(0.05)  # let them run as far as they may
            assert len(reads) <= taken + 32 + 6 * BATCH_SIZE  # 5 batches being computed, and the one being taken
        if taken == 300:
            break
    stream.close()


# How it ends


@pytest.mark.parametrize("taken", [0, 1, 20])
def test_closing_early_stops_the_threads_and_the_reading(tmp_path, reads, monkeypatch, taken):
    plain = loading.open_image
    monkeypatch.setattr(loading, "open_image", lambda *given: time.sleep(0.01) or plain(*given))
    stream = process(write_pictures(tmp_path, 1) * 400, Wanted(PREPROCESS), lambda: mean_colours)
    for _ in range(taken):
        next(stream)
    stream.close()
    count = len(reads)
    time.sleep(0.1)
    assert len(reads) <= count + 2  # at most what either thread was about to read
    assert wait_until(lambda: not threads_of_loading(), 1.0)


def test_the_threads_are_gone_at_the_end(tmp_path):
    list(process(write_pictures(tmp_path, 30), Wanted(PREPROCESS), lambda: mean_colours))
    assert not threads_of_loading()


def test_an_error_in_the_network_reaches_the_caller_and_stops_the_threads(tmp_path):
    def compute(pixels):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(process(write_pictures(tmp_path, 60), Wanted(PREPROCESS), lambda: compute))
    assert wait_until(lambda: not threads_of_loading())


def test_an_error_in_building_the_network_reaches_the_caller_and_stops_the_threads(tmp_path):
    with pytest.raises(AssertionError, match="needs the network"):
        list(process(write_pictures(tmp_path, 60), Wanted(PREPROCESS), never))
    assert wait_until(lambda: not threads_of_loading())


def test_a_network_that_gives_too_few_rows_is_an_error(tmp_path):
    with pytest.raises(ValueError):
        list(process(write_pictures(tmp_path, 8), Wanted(PREPROCESS), lambda: lambda pixels: mean_colours(pixels)[:-1]))


# Batches


@pytest.mark.parametrize("count, sizes", [(0, []), (1, [1]), (8, [8]), (9, [8, 1]), (24, [8, 8, 8])])
def test_batches_hold_all_pictures_in_order(count, sizes):
    pictures = [Picture(number) for number in range(count)]
    found = list(batches(pictures))
    assert [len(batch) for batch in found] == sizes
    assert [picture for batch in found for picture in batch] == pictures


def test_the_processors_are_counted():
    assert loading.count_cpus() >= 1


# Training: the album


VARIED = parse("RandomResizedCrop, RandomHorizontalFlip", "mirror", PREPROCESS.size)
KEPT_BYTES = 4 * 24 * 20  # of one of the pictures that are written here


@pytest.fixture
def decoded(monkeypatch) -> list[Path]:
    """The files decoded so far."""
    done: list[Path] = []
    plain = loading.open_image
    monkeypatch.setattr(loading, "open_image", lambda path, *given: done.append(path) or plain(path, *given))
    return done


def test_an_album_decodes_each_picture_once_while_there_is_room(tmp_path, decoded):
    paths = write_pictures(tmp_path, 5)
    album = Album(paths, PREPROCESS)
    assert len(album) == 5 and decoded == []  # nothing is opened before it is asked for
    for epoch in range(3):
        for index in (3, 0, 4, 1, 2):
            album.vary(Draw(index), VARIED, 0, epoch)
            album.view(index)
            album.open(index)
    assert sorted(decoded) == sorted(paths)


@pytest.mark.parametrize("room, kept", [(0, 0), (KEPT_BYTES - 1, 0), (KEPT_BYTES, 1), (3 * KEPT_BYTES, 3)])
def test_pictures_beyond_the_room_are_decoded_each_time_and_those_within_it_stay(tmp_path, decoded, room, kept):
    paths = write_pictures(tmp_path, 5)
    album = Album(paths, PREPROCESS, room_bytes=room)
    for _ in range(3):
        for index in range(5):
            album.view(index)
    assert [decoded.count(path) for path in paths] == [1] * kept + [3] * (5 - kept)
    assert album.room_bytes == room - kept * KEPT_BYTES


def test_a_smaller_picture_still_finds_room_after_a_larger_one_did_not(tmp_path, decoded):
    large, small = write_pictures(tmp_path, 2)
    draw_shape("square", 0, (100, 100)).save(large)
    album = Album([large, small], PREPROCESS, room_bytes=2 * KEPT_BYTES)
    for _ in range(2):
        album.view(0)
        album.view(1)
    assert decoded.count(large) == 2 and decoded.count(small) == 1


def test_what_an_album_gives_does_not_depend_on_its_room(tmp_path):
    paths = write_pictures(tmp_path, 4)
    albums = [Album(paths, PREPROCESS, room_bytes=room) for room in (0, 2 * KEPT_BYTES, 2**30)]
    for index in range(4):
        for epoch in range(3):
            first, *others = (album.vary(Draw(index), VARIED, 5, epoch) for album in albums)
            assert all(np.array_equal(first, other) for other in others)


def test_an_album_shows_what_evaluation_sees(tmp_path):
    (path,) = write_pictures(tmp_path, 1)
    expected = PREPROCESS.apply(open_image(path))
    album = Album([path], PREPROCESS)
    for _ in range(2):  # decoded, then kept
        np.testing.assert_array_equal(album.view(0), expected)
        np.testing.assert_array_equal(album.vary(Draw(0), parse("none", "none", 16), 0, 0), expected)


def test_an_album_keeps_pictures_as_they_were_before_any_augmentation(tmp_path, decoded):
    # The mistake: a cache of augmented pictures, which freezes augmentation after the first epoch.
    paths = write_pictures(tmp_path, 6)
    album = Album(paths, PREPROCESS)
    epochs = [[album.vary(Draw(index), VARIED, 0, epoch).tobytes() for index in range(6)] for epoch in range(5)]
    for views in zip(*epochs):
        assert len(set(views)) >= 4
    assert len(decoded) == 6
    for index, path in enumerate(paths):
        assert album.open(index).tobytes() == open_image(path).tobytes()


def test_several_turns_of_a_picture_in_an_epoch_are_varied_each_by_itself(tmp_path):
    album = Album(write_pictures(tmp_path, 1), PREPROCESS)
    assert len({album.vary(Draw(0, turn), VARIED, 0, 0).tobytes() for turn in range(6)}) >= 5


def test_a_picture_of_an_album_that_cannot_be_read_raises_each_time_with_its_path(tmp_path):
    # Never swapped for another one, never black.
    paths = write_pictures(tmp_path, 2)
    paths[0].write_bytes(b"no picture")
    album = Album([*paths, tmp_path / "gone.png"], PREPROCESS)
    for index in (0, 2, 0):
        for ask in (album.open, album.view, lambda number: album.vary(Draw(number), VARIED, 0, 0)):
            with pytest.raises(UnreadableImage) as error:
                ask(index)
            assert error.value.subject == str(album.paths[index])
    assert album.view(1).shape == (16, 16, 3)


def test_the_limits_of_an_album_hold(tmp_path):
    album = Album(write_pictures(tmp_path, 1), PREPROCESS, Limits(pixels=100))
    with pytest.raises(UnreadableImage, match="limit"):
        album.open(0)


@pytest.mark.parametrize("rows", [[], [2], list(range(20)), [19, 3, 3, 0, 11]])
def test_an_album_embeds_the_views_of_rows_in_their_order(tmp_path, rows):
    album = Album(write_pictures(tmp_path, 20), PREPROCESS)
    parts = list(album.embed(rows, mean_colours))
    assert [len(part) for part in parts] == [len(rows[start : start + BATCH_SIZE]) for start in range(0, len(rows), 8)]
    for row, vector in zip(rows, [vector for part in parts for vector in part], strict=True):
        np.testing.assert_array_equal(vector, mean_colours(album.view(row)[None])[0])


def test_threads_that_share_an_album_see_the_same_as_one_alone(tmp_path):
    paths = write_pictures(tmp_path, 8)
    draws = [Draw(number % 8, number // 8) for number in range(64)]
    album = Album(paths, PREPROCESS)
    expected = [album.vary(draw, VARIED, 0, 0).tobytes() for draw in draws]
    for room in (0, 4 * KEPT_BYTES, 2**30):
        shared = Album(paths, PREPROCESS, room_bytes=room)
        found = ahead(lambda draw, album=shared: album.vary(draw, VARIED, 0, 0).tobytes(), draws, 6, 24)
        assert list(found) == expected


def test_a_picture_that_two_threads_open_at_once_takes_its_room_once(tmp_path, monkeypatch):
    plain, both, calls = loading.open_image, threading.Event(), []

    def open_slowly(*given):
        calls.append(given)
        if len(calls) == 2:
            both.set()
        both.wait(0.5)
        return plain(*given)

    monkeypatch.setattr(loading, "open_image", open_slowly)
    album = Album(write_pictures(tmp_path, 1), PREPROCESS, room_bytes=10 * KEPT_BYTES)
    list(ahead(album.open, [0, 0], 2, 2))
    assert album.room_bytes == 9 * KEPT_BYTES


# Ahead of whoever asks


@pytest.mark.parametrize("workers, window", [(1, 1), (2, 4), (8, 3), (3, 100)])
def test_results_come_in_order_though_later_ones_are_ready_first(workers, window):
    def work(number):
        time.sleep(0.003 * (number % 4 == 0))
        return number * number

    assert list(ahead(work, range(40), workers, window)) == [number * number for number in range(40)]


def test_no_items_give_no_results():
    assert list(ahead(never, [], 2, 4)) == []
    assert not threads_of_loading()


def test_several_threads_work_at_the_same_time():
    meet = threading.Barrier(3, timeout=5)
    assert list(ahead(lambda number: meet.wait() >= 0 and number, range(6), 3, 6)) == list(range(6))


@pytest.mark.parametrize("window", [1, 2, 7])
def test_no_more_than_a_window_is_begun_ahead_of_who_asks(window):
    begun = []
    results = ahead(lambda number: begun.append(number) or number, itertools.count(), 4, window)
    assert begun == []  # nothing before the first is asked for
    for taken, number in enumerate(results, 1):
        assert number == taken - 1
        time.sleep(0.01)  # let them run as far as they may
        assert len(begun) <= taken - 1 + window
        if taken == 12:
            break
    assert wait_until(lambda: len(begun) == 11 + window)
    results.close()
    assert len(begun) == 11 + window


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_comes_in_its_place_and_ends_the_threads(workers):
    def work(number):
        if number == 5:
            raise UnreadableImage("5.png", "is broken", "Replace it.")
        return number

    results, taken = ahead(work, range(30), workers, 8), []
    with pytest.raises(UnreadableImage, match="is broken"):
        taken.extend(results)
    assert taken == [0, 1, 2, 3, 4]
    assert not threads_of_loading()
    assert list(results) == []


def test_an_error_of_the_items_comes_through_and_ends_the_threads():
    def items():
        yield from range(3)
        raise RuntimeError("no more of them")

    with pytest.raises(RuntimeError, match="no more of them"):
        list(ahead(lambda number: number, items(), 2, 4))
    assert not threads_of_loading()


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_early_ends_the_threads_and_begins_nothing_more(taken):
    begun = []

    def work(number):
        begun.append(number)
        time.sleep(0.005)
        return number

    results = ahead(work, itertools.count(), 2, 50)
    for _ in range(taken):
        next(results)
    results.close()
    assert not threads_of_loading()
    count = len(begun)
    time.sleep(0.05)
    assert len(begun) == count <= taken + 4  # those under way are finished, the rest of the window is cancelled


def test_leaving_a_loop_with_an_error_ends_the_threads():
    with pytest.raises(KeyboardInterrupt), contextlib.closing(ahead(str, range(100), 2, 10)) as results:
        for _ in results:
            raise KeyboardInterrupt
    assert not threads_of_loading()


# Mixing


def draw_pixels(seed: int, count: int = 6, side: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.float32)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7, 1.0])
def test_mixup_blends_by_the_share(share):
    first, second = draw_pixels(0), draw_pixels(1)
    mixed, shares = mix(first, second, [Mix(share)] * 6)
    np.testing.assert_allclose(mixed, share * first + (1 - share) * second, rtol=1e-5, atol=1e-4)
    assert shares.dtype == np.float32 and shares == pytest.approx([share] * 6)


def test_each_picture_is_mixed_in_its_own_way():
    first, second = draw_pixels(0, 3), draw_pixels(1, 3)
    mixed, shares = mix(first, second, [Mix(1.0), Mix(0.5), Mix(0.75, (0.0, 0.0, 0.5, 0.5))])
    np.testing.assert_array_equal(mixed[0], first[0])
    np.testing.assert_allclose(mixed[1], (first[1] + second[1]) / 2)
    np.testing.assert_array_equal(mixed[2, :6, :6], second[2, :6, :6])
    np.testing.assert_array_equal(mixed[2, 6:], first[2, 6:])
    assert shares.tolist() == [1.0, 0.5, 0.75]


def test_cutmix_takes_the_box_from_the_partner_and_its_share_is_what_is_left():
    first, second = np.zeros((1, 20, 20, 3), np.float32), np.ones((1, 20, 20, 3), np.float32)
    for _, (one,) in (sampling.draw_mixes(1, 0.0, 1.0, 0, 0, step) for step in range(200)):
        mixed, (share,) = mix(first, second, [one])
        left, top, right, bottom = (20 * edge for edge in one.box)
        for y in range(20):
            for x in range(20):
                if left + 1 < x < right - 2 and top + 1 < y < bottom - 2:
                    assert mixed[0, y, x, 0] == 1
                elif x < left - 1 or x > right or y < top - 1 or y > bottom:
                    assert mixed[0, y, x, 0] == 0
        assert share == pytest.approx(1 - mixed.mean(), abs=1e-6)  # the label is mixed as the pixels are


def test_mixing_leaves_the_given_pictures_alone():
    first, second = draw_pixels(0), draw_pixels(1)
    mix(first, second, [Mix(0.3), Mix(0.7, (0.0, 0.0, 1.0, 0.5))] * 3)
    np.testing.assert_array_equal(first, draw_pixels(0))
    np.testing.assert_array_equal(second, draw_pixels(1))


@pytest.mark.parametrize("box", [(0.0, 0.0, 0.0, 0.0), (0.5, 0.5, 0.501, 0.501), (0.0, 0.0, 1.0, 1.0)])
def test_boxes_of_nothing_and_of_everything(box):
    first, second = draw_pixels(0, 1), draw_pixels(1, 1)
    mixed, (share,) = mix(first, second, [Mix(0.5, box)])
    np.testing.assert_array_equal(mixed, second if box[2] == 1 else first)
    assert share == (0 if box[2] == 1 else 1)


def test_mixed_levels_are_rounded():
    # As they are after `Album.vary`.
    first, second = draw_pixels(0).astype(np.uint8), draw_pixels(1).astype(np.uint8)
    mixed, _ = mix(first, second, [Mix(0.3)] * 6)
    exact = 0.3 * first.astype(float) + 0.7 * second
    assert abs(mixed - exact).max() <= 0.5 + 1e-6
    assert abs((mixed - exact).mean()) < 0.02
