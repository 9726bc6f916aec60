"""Every picture of a data set looked at once, shared out among processes that all see the whole."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

import headstart
from headstart import loading, views
from headstart.config import RunConfig, TrainConfig
from headstart.processes import World


class Together(World):
    """Threads in place of processes: they wait for each other, and hear what the first one says."""

    def join(self, shared):
        object.__setattr__(self, "shared", shared)
        return self

    def tell(self, value):
        if self.first:
            self.shared["said"] = value
        self.wait()
        said = self.shared["said"]
        self.wait()
        return said

    def wait(self):
        self.shared["barrier"].wait(20)


def in_each(size, call):
    """What a function of a world gives in each of several threads that stand for processes."""
    shared, found = {"barrier": threading.Barrier(size)}, {}

    def run(world):
        try:
            found[world.rank] = call(world)
        except BaseException as error:
            shared["barrier"].abort()
            found[world.rank] = error

    threads = [threading.Thread(target=run, args=(Together(rank, size, rank).join(shared),)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[rank] for rank in range(size)]


@pytest.fixture(scope="module")
def dataset(shapes):
    return headstart.read(shapes)


def config_with(cache):
    return RunConfig(train=TrainConfig(cache=cache))


def assert_same_survey(one, other):
    assert (one.sources, one.digests, one.unreadable) == (other.sources, other.digests, other.unreadable)
    assert one.facts.keys() == other.facts.keys()
    assert all(np.array_equal(one.facts[name], other.facts[name]) for name in one.facts)


@pytest.mark.parametrize("cache", ["none", "auto"])
@pytest.mark.parametrize("late", [0, 1, 2])
def test_processes_survey_a_share_each_and_all_get_the_whole(dataset, monkeypatch, cache, late):
    # The temporary cache of `none` is the first one's: it may not take it away before all others have read.
    alone = views.survey(dataset, config_with("none"), lambda items, _: items)
    described, plainly = [], loading.describe
    monkeypatch.setattr(loading, "describe", lambda image: described.append(1) or plainly(image))

    def survey(world):
        def track(items, total):
            time.sleep(0.2 * (world.rank == late))
            return items

        return views.survey(dataset, config_with(cache), track, world=world)

    for found in in_each(3, survey):
        assert not isinstance(found, BaseException), found
        assert_same_survey(found, alone)
    assert len(described) == len(dataset.samples)  # every picture once


def test_a_process_that_is_slow_to_read_still_finds_the_temporary_cache(dataset, monkeypatch):
    alone = views.survey(dataset, config_with("none"), lambda items, _: items)
    plainly, calls = views.features.survey, []

    def slowly(paths, sources, *given):
        if len(sources) == len(dataset.samples):  # the whole, after the share
            calls.append(1)
            time.sleep(0.3 * (len(calls) > 1))
        return plainly(paths, sources, *given)

    monkeypatch.setattr(views.features, "survey", slowly)
    for found in in_each(2, lambda world: views.survey(dataset, config_with("none"), lambda i, _: i, world=world)):
        assert not isinstance(found, BaseException), found
        assert_same_survey(found, alone)


def test_one_process_alone_looks_at_each_picture_once_and_shows_its_progress(dataset):
    shown = []
    found = views.survey(dataset, config_with("none"), lambda items, total: shown.append(total) or items)
    assert shown == [len(dataset.samples)] and found.sources == dataset.sources
