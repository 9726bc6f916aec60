"""Every picture of a data set looked at once, shared out among processes that all see the whole."""

from __future__ import annotations

import threading
import time
import zipfile

import numpy as np
import pytest

import headstart
from headstart import backbones, embedders, features, files, loading, views
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


# What the cache has


@pytest.mark.parametrize(
    ("held", "missing"),
    [
        (lambda ours, others: [], 70),
        (lambda ours, others: others, 70),  # however many they are
        (lambda ours, others: ours, 0),
        (lambda ours, others: [*others, *ours], 0),
        (lambda ours, others: [*others, *ours[:35]], 35),
    ],
)
def test_how_many_features_are_missing_is_told_by_the_content_of_some_pictures(tmp_path, held, missing):
    paths = [tmp_path / f"{number}.png" for number in range(70)]
    for number, path in enumerate(paths):
        path.write_bytes(b"%d" % number)
    others = [f"{number:064x}" for number in range(200)]
    opened, plainly = [], files.digest
    ours = [plainly(path) for path in paths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "digest", lambda path: opened.append(path) or plainly(path))
        found = views._count_missing(paths, held(ours, others))
    assert found == pytest.approx(missing, abs=2) and (found == missing or 0 < missing < 70)
    assert views.SAMPLED <= len(opened) < 2 * views.SAMPLED


def test_pictures_that_are_not_there_are_not_missing_from_the_cache(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    assert views._count_missing([tmp_path / "gone.png", tmp_path / "a.png"], {"others"}) == 1
    assert views._count_missing([], {"others"}) == 0


def test_a_member_that_is_damaged_in_its_archive_is_not_missing_from_the_cache(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("a.png", b"content that is stored as it is")
    content = bytearray((tmp_path / "p.zip").read_bytes())
    content[content.index(b"content") + 3] ^= 1
    (tmp_path / "p.zip").write_bytes(content)
    assert views._count_missing([tmp_path / "p.zip::a.png"], {"others"}) == 0


def test_features_of_other_pictures_in_the_cache_do_not_count(
    dataset, make_shapes, tiny_weights, tmp_path, monkeypatch
):
    asked = []

    def find(spec, load, device, precision, folder, count_missing, looks, workshop):
        asked.append([count_missing(engine) for engine in ("torch", "openvino")])
        return "torch"

    monkeypatch.setattr(embedders, "find_engine", find)
    backbone = backbones.load(backbones.locate("auto", str(tiny_weights)))
    others = headstart.read(make_shapes(tmp_path / "others", 14, first_seed=100))
    for pictures in (others, dataset, dataset, others):
        views.look(pictures, backbone.spec, lambda: backbone, config_with("auto"), lambda items, _: items)
    assert asked == [[42, 42], [36, 36], [0, 36], [0, 42]]  # those of OpenVINO are kept apart


def test_it_is_told_how_many_looks_there_will_be_and_who_makes_the_network_ready(dataset, tiny_weights, monkeypatch):
    asked = []
    monkeypatch.setattr(embedders, "find_engine", lambda *given: asked.append(given[-2:]) or "torch")
    backbone, workshop = backbones.load(backbones.locate("auto", str(tiny_weights))), embedders.Workshop()
    given = (dataset, backbone.spec, lambda: backbone, config_with("auto"), lambda items, _: items)
    for looks in (3, 5):
        views.look(*given, workshop=workshop, looks=looks)
    assert asked == [(3, workshop), (5, workshop)] and len(workshop.made) == 1


def test_whoever_has_no_workshop_gets_one_for_each_look(dataset, tiny_weights, monkeypatch):
    asked = []
    monkeypatch.setattr(embedders, "find_engine", lambda *given: asked.append(given[-1]) or "torch")
    backbone = backbones.load(backbones.locate("auto", str(tiny_weights)))
    for _ in range(2):
        views.look(dataset, backbone.spec, lambda: backbone, config_with("auto"), lambda items, _: items)
    assert asked[0] is not asked[1] and [type(one) for one in asked] == [embedders.Workshop] * 2


def test_how_long_a_picture_took_is_told_where_any_was_computed(dataset, tiny_weights, monkeypatch):
    backbone = backbones.load(backbones.locate("auto", str(tiny_weights)))
    given = (dataset, backbone.spec, lambda: backbone, config_with("auto"), lambda items, _: items)
    first, second = views.look(*given).survey, views.look(*given).survey
    assert (first.computed, second.computed) == (36, 0) and 0 < first.pace < 1 and second.pace == 0


def test_of_several_processes_each_tells_its_share_of_how_long_a_picture_took(dataset, tiny_weights, monkeypatch):
    class Second(World):
        def share(self, items):
            return items[1::2]

        def tell(self, value):
            return value

        def wait(self):
            pass

    backbone = backbones.load(backbones.locate("auto", str(tiny_weights)))
    given = (dataset, backbone.spec, lambda: backbone, config_with("auto"), lambda items, _: items)
    extract, paces = features.extract, []

    def watch(*given):
        extracted, survey = extract(*given)
        paces.append(survey.pace)
        return extracted, survey

    monkeypatch.setattr(features, "extract", watch)
    seen = views.look(*given, world=Second(1, 2, 1)).survey
    assert seen.computed == 18 and 0 < seen.pace == paces[0] / 2  # with the others' shares computed meanwhile
