"""The maker of batches: order, how far it runs ahead, when it builds the network, how it ends."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import draw_shape
from headstart import loading
from headstart.images import Limits, Preprocess, open_image
from headstart.loading import BATCH_SIZE, Picture, Wanted, batches, process

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
