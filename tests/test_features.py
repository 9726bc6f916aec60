"""Features are computed once and kept by content: what is a hit, what survives damage, interrupts and company."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import draw_shape
from headstart import features
from headstart.errors import RunError
from headstart.features import FACTS_KEY, DamagedShard, Store, extract, key_of, open_cache, survey, tidy
from headstart.images import Preprocess, describe, open_image
from headstart.zoo import Spec

SPEC = Spec("net", "timm", "net", {}, Preprocess(size=16, crop=1.0), "somewhere", "d" * 64)


class Network:
    """A stand-in for a network: the mean colour of each picture, with a count of what it was asked to compute."""

    def __init__(self) -> None:
        self.built, self.computed = 0, 0

    def make(self):
        self.built += 1
        return self

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        self.computed += len(pixels)
        return pixels.mean((1, 2)).astype(np.float32)


@pytest.fixture
def network() -> Network:
    return Network()


def write_pictures(folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        draw_shape("square", number, (40, 36)).save(path)
    return paths


def features_of(paths, network, cache, spec=SPEC, format="float32-cpu", **options):
    return extract(paths, [path.name for path in paths], spec, lambda: format, network.make, cache, **options)


def expected_of(paths) -> np.ndarray:
    return np.stack([SPEC.preprocess.apply(open_image(path)).mean((0, 1)) for path in paths]).astype(np.float32)


def shards(cache: Path, facts: bool = False) -> list[Path]:
    return sorted(file for file in cache.glob("*/*.safetensors") if (file.parent.name == FACTS_KEY) == facts)


# Hits and misses


def test_features_and_facts_come_in_the_order_of_the_sources(tmp_path, own_cache, network):
    paths = write_pictures(tmp_path / "p", 20)[::-1]
    found, seen = features_of(paths, network, own_cache)
    assert found.sources == seen.sources == tuple(path.name for path in paths)
    assert found.matrix.dtype == np.float32
    np.testing.assert_allclose(found.matrix, expected_of(paths), atol=1e-4)
    for row, path in enumerate(paths):
        facts = describe(open_image(path))
        for field in dataclasses.fields(facts):
            np.testing.assert_array_equal(seen.facts[field.name][row], getattr(facts, field.name))


def test_a_second_extraction_computes_nothing_and_gives_the_same(tmp_path, own_cache, network, monkeypatch):
    paths = write_pictures(tmp_path / "p", 20)
    first, seen = features_of(paths, network, own_cache)
    monkeypatch.setattr("headstart.loading.open_image", lambda *given: pytest.fail("decoded again"))
    second, again = features_of(paths, network, own_cache)
    assert (network.built, network.computed) == (1, 20)
    np.testing.assert_array_equal(first.matrix, second.matrix)
    assert second.key == first.key and again.digests == seen.digests
    assert all((seen.facts[name] == again.facts[name]).all() for name in seen.facts)


def test_a_renamed_copy_is_a_hit_and_a_changed_picture_is_a_miss(tmp_path, own_cache, network):
    paths = write_pictures(tmp_path / "p", 6)
    first, _ = features_of(paths, network, own_cache)
    copy = tmp_path / "p" / "copy.png"
    copy.write_bytes(paths[2].read_bytes())
    draw_shape("circle", 99, (40, 36)).save(paths[0])
    second, _ = features_of([*paths, copy], network, own_cache)
    assert network.computed == 7
    np.testing.assert_array_equal(second.matrix[6], first.matrix[2])
    np.testing.assert_allclose(second.matrix, expected_of([*paths, copy]), atol=1e-4)


def test_the_same_picture_twice_has_two_equal_rows(tmp_path, own_cache, network):
    path = write_pictures(tmp_path / "p", 1)[0]
    found, seen = features_of([path, path], network, own_cache)
    assert found.matrix.shape == (2, 3) and (found.matrix[0] == found.matrix[1]).all()
    assert seen.digests[0] == seen.digests[1]


def test_unreadable_pictures_have_a_reason_and_no_row(tmp_path, own_cache, network):
    paths = write_pictures(tmp_path / "p", 10)
    for number in (0, 4):
        paths[number].write_bytes(b"")
    found, seen = features_of(paths, network, own_cache)
    assert seen.unreadable == {"0.png": "is empty", "4.png": "is empty"}
    assert (
        found.sources == seen.sources and len(found.matrix) == len(seen.digests) == 8 and "4.png" not in found.sources
    )
    np.testing.assert_allclose(
        found.matrix, expected_of([p for i, p in enumerate(paths) if i not in (0, 4)]), atol=1e-4
    )


def test_nothing_but_unreadable_pictures_gives_an_empty_matrix(tmp_path, own_cache, network):
    (tmp_path / "a.png").write_bytes(b"rubbish")
    found, seen = features_of([tmp_path / "a.png"], network, own_cache)
    assert found.matrix.shape[0] == 0 and found.sources == () and network.built == 0
    assert list(seen.unreadable) == ["a.png"]


def test_another_number_format_is_kept_apart(tmp_path, own_cache, network):
    paths = write_pictures(tmp_path / "p", 5)
    one, _ = features_of(paths, network, own_cache, format="float32-cpu")
    two, _ = features_of(paths, network, own_cache, format="bfloat16-cpu")
    assert network.computed == 10 and one.key != two.key
    features_of(paths, network, own_cache, format="float32-cpu")
    features_of(paths, network, own_cache, format="bfloat16-cpu")
    assert network.computed == 10


def test_another_network_is_computed_while_the_facts_are_shared(tmp_path, own_cache, network, monkeypatch):
    paths = write_pictures(tmp_path / "p", 5)
    features_of(paths, network, own_cache)
    monkeypatch.setattr("headstart.loading.describe", lambda image: pytest.fail("described again"))
    features_of(paths, network, own_cache, dataclasses.replace(SPEC, digest="e" * 64))
    assert network.computed == 10


@pytest.mark.parametrize(
    ("sizes", "ratio"),
    [([(80, 64), (64, 100), (50, 50)], 100 / 64), ([(90, 60), (70, 60)], 1.5), ([(9, 9)], 1), ([], 1)],
)
def test_how_far_pictures_are_from_a_square_is_told_by_the_farthest(sizes, ratio):
    wide, high = np.array(sizes, np.uint16).reshape(-1, 2).T
    names = tuple(str(number) for number in range(len(sizes)))
    assert features.Survey(names, names, {"width": wide, "height": high}, {}, {}).ratio == pytest.approx(ratio)


def test_a_survey_gives_the_facts_of_an_extraction_and_shares_them(tmp_path, own_cache, network, monkeypatch):
    paths = write_pictures(tmp_path / "p", 7)
    paths[3].write_bytes(b"")
    alone = survey(paths, [path.name for path in paths], own_cache)
    assert alone.unreadable == {"3.png": "is empty"} and len(alone.sources) == 6
    monkeypatch.setattr("headstart.loading.describe", lambda image: pytest.fail("described again"))
    _, beside = features_of(paths, network, own_cache)
    assert alone.digests == beside.digests and alone.sources == beside.sources
    assert all((alone.facts[name] == beside.facts[name]).all() for name in alone.facts)


def test_progress_is_shown_for_every_picture(tmp_path, own_cache, network):
    totals = []

    def track(pictures, total):
        totals.append(total)
        count = 0
        for picture in pictures:
            count += 1
            yield picture
        totals.append(count)

    features_of(write_pictures(tmp_path / "p", 11), network, own_cache, track=track)
    assert totals == [11, 11]


# The key


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": "e" * 64},
        {"architecture": "other"},
        {"library": "torchvision"},
        {"arguments": {"pad_type": "same"}},
        *({"preprocess": dataclasses.replace(SPEC.preprocess, **change)} for change in (
            {"size": 32}, {"crop": 0.875}, {"fit": "pad"}, {"interpolation": "bilinear"}, {"mean": (0.0, 0.0, 0.0)},
            {"std": (1.0, 1.0, 1.0)},
        )),
    ],
)  # fmt: skip
def test_whatever_changes_a_feature_changes_the_key(changes):
    assert key_of(dataclasses.replace(SPEC, **changes)) != key_of(SPEC)


def test_another_name_for_the_same_weights_has_the_same_key():
    assert key_of(dataclasses.replace(SPEC, name="alias", weights="elsewhere")) == key_of(SPEC)


def test_the_key_outlives_json():
    assert key_of(Spec.from_json(json.loads(json.dumps(SPEC.to_json())))) == key_of(SPEC)


# Interrupts and damage


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_extraction_keeps_what_came(tmp_path, own_cache, network, interrupt):
    paths = write_pictures(tmp_path / "p", 120)

    def track(pictures, total):
        for number, picture in enumerate(pictures):
            if number == 30:
                raise interrupt
            yield picture

    with pytest.raises(interrupt):
        features_of(paths, network, own_cache, track=track)
    network.computed = 0
    found, _ = features_of(paths, network, own_cache)
    assert network.computed == 90
    np.testing.assert_allclose(found.matrix, expected_of(paths), atol=1e-4)


def test_a_network_that_fails_half_way_keeps_what_came(tmp_path, own_cache, network, monkeypatch):
    monkeypatch.setattr("headstart.loading.count_cpus", lambda: 1)
    paths = write_pictures(tmp_path / "p", 100)

    class Failing(Network):
        def __call__(self, pixels):
            if self.computed >= 64:
                raise RuntimeError("out of memory")
            return super().__call__(pixels)

    with pytest.raises(RuntimeError, match="out of memory"):
        features_of(paths, Failing(), own_cache)
    features_of(paths, network, own_cache)
    assert 0 < network.computed < 100


def test_long_extractions_are_written_shard_by_shard(tmp_path, own_cache, network, monkeypatch):
    monkeypatch.setattr(features, "SHARD_ROWS", 8)
    paths = write_pictures(tmp_path / "p", 30)
    found, _ = features_of(paths, network, own_cache)
    assert len(shards(own_cache)) == len(shards(own_cache, facts=True)) == 4
    np.testing.assert_allclose(found.matrix, expected_of(paths), atol=1e-4)


def damage(file: Path, share: float) -> None:
    """Flip one bit, at a place given as a share of the file's length."""
    content = bytearray(file.read_bytes())
    content[min(len(content) - 1, int(share * len(content)))] ^= 1
    file.write_bytes(bytes(content))


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1), facts=st.booleans())
def test_one_flipped_bit_anywhere_in_a_shard_is_noticed_and_computed_again(share, facts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flip")
    paths, network, cache = write_pictures(folder / "p", 6), Network(), folder / "cache"
    first, seen = features_of(paths, network, cache)
    (file,) = shards(cache, facts)
    damage(file, share)
    second, again = features_of(paths, network, cache)
    np.testing.assert_array_equal(first.matrix, second.matrix)
    assert all((seen.facts[name] == again.facts[name]).all() for name in seen.facts)
    assert network.computed == (6 if facts else 12)
    features_of(paths, network, cache)
    assert network.computed == (6 if facts else 12)  # and it is whole again


@pytest.mark.parametrize(
    "change", [Path.unlink, lambda file: os.truncate(file, 100), lambda file: os.truncate(file, 0)]
)
@pytest.mark.parametrize("facts", [False, True])
def test_a_deleted_or_truncated_shard_is_computed_again(tmp_path, own_cache, network, change, facts):
    paths = write_pictures(tmp_path / "p", 6)
    first, _ = features_of(paths, network, own_cache)
    (file,) = shards(own_cache, facts)
    change(file)
    second, seen = features_of(paths, network, own_cache)
    np.testing.assert_array_equal(first.matrix, second.matrix)
    assert len(seen.facts["width"]) == 6


def test_only_the_rows_of_a_damaged_shard_are_computed_again(tmp_path, own_cache, network, monkeypatch):
    monkeypatch.setattr(features, "SHARD_ROWS", 8)
    paths = write_pictures(tmp_path / "p", 24)
    features_of(paths, network, own_cache)
    damage(shards(own_cache)[0], 0.99)
    features_of(paths, network, own_cache)
    assert network.computed == 24 + 8


def test_a_shard_that_goes_while_pictures_are_read_is_computed_again(tmp_path, own_cache, network):
    paths = write_pictures(tmp_path / "p", 6)
    first, _ = features_of(paths, network, own_cache)
    rounds = []

    def track(pictures, total):
        yield from pictures
        if not rounds:  # as another process does that tidies the cache
            for file in own_cache.glob("*/*.safetensors"):
                file.unlink()
        rounds.append(total)

    second, seen = features_of(paths, network, own_cache, track=track)
    np.testing.assert_array_equal(first.matrix, second.matrix)
    assert len(seen.facts["hash"]) == 6


def test_a_damaged_shard_is_named_in_the_log(tmp_path, own_cache, network, caplog):
    paths = write_pictures(tmp_path / "p", 3)
    features_of(paths, network, own_cache)
    (file,) = shards(own_cache)
    damage(file, 0.99)
    features_of(paths, network, own_cache)
    assert any("damaged" in record.message and str(file) in record.message for record in caplog.records)


# The store


def digests_of(*numbers: int) -> list[str]:
    return [f"{number:064x}" for number in numbers]


def test_rows_come_back_in_the_order_asked_for_from_several_shards(tmp_path):
    store = Store(tmp_path / "s")
    store.append(digests_of(1, 2, 3), {"vector": np.array([[1.0], [2.0], [3.0]], np.float32)})
    store.append(digests_of(4, 5), {"vector": np.array([[4.0], [5.0]], np.float32)})
    found = store.gather(digests_of(5, 1, 4, 1, 3), store.index())
    assert found["vector"].ravel().tolist() == [5, 1, 4, 1, 3] and found["vector"].dtype == np.float32


def test_a_row_that_is_not_there_is_told(tmp_path):
    store = Store(tmp_path / "s")
    store.append(digests_of(1), {"vector": np.ones((1, 1), np.float32)})
    with pytest.raises(DamagedShard):
        store.gather(digests_of(1, 2), store.index())


def test_a_shard_that_went_after_the_index_was_read_is_told(tmp_path):
    store = Store(tmp_path / "s")
    store.append(digests_of(1), {"vector": np.ones((1, 1), np.float32)})
    places = store.index()
    next(store.folder.iterdir()).unlink()
    with pytest.raises(DamagedShard):
        store.gather(digests_of(1), places)


def test_a_store_without_a_folder_is_empty(tmp_path):
    store = Store(tmp_path / "nowhere")
    assert store.index() == {} and store.gather([], {}) == {}


def test_rows_that_cannot_be_written_are_an_error_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot be written"):
        Store(tmp_path / "file" / "s").append(digests_of(1), {"vector": np.ones((1, 1), np.float32)})


def test_threads_may_write_the_same_and_other_rows_at_once(tmp_path, monkeypatch):
    store, errors, barrier = Store(tmp_path / "s"), [], threading.Barrier(4)
    replace = Path.replace
    # Between writing and renaming there is time for another thread to do the same.
    monkeypatch.setattr(Path, "replace", lambda one, other: time.sleep(0.005) or replace(one, other))

    def write(own: int) -> None:
        try:
            for turn in range(25):
                barrier.wait(timeout=30)
                store.append(digests_of(turn), {"vector": np.full((1, 2000), turn, np.float32)})
                store.append(digests_of(1000 * own + turn), {"vector": np.full((1, 2000), own, np.float32)})
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    wanted = [*range(25), *(1000 * own + turn for own in range(1, 5) for turn in range(25))]
    rows = store.gather(digests_of(*wanted), store.index())["vector"][:, 0]
    assert rows.tolist() == [number if number < 1000 else number // 1000 for number in wanted]
    assert not list(store.folder.glob("*.partial"))


WRITER = """
import sys
from pathlib import Path
import numpy as np
from headstart.features import Store
for turn in range(30):
    for number in (turn, int(sys.argv[2]) * 1000 + turn):
        Store(Path(sys.argv[1])).append([f"{number:064x}"], {"vector": np.full((1, 4), number, np.float32)})
"""


def test_two_processes_may_write_the_same_and_other_rows_at_once(tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "s"), own]) for own in ("1", "2")]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    store = Store(tmp_path / "s")
    wanted = [*range(30), *range(1000, 1030), *range(2000, 2030)]
    assert store.gather(digests_of(*wanted), store.index())["vector"][:, 0].tolist() == wanted
    assert not list(store.folder.glob("*.partial"))


def test_two_extractions_at_once_agree(tmp_path, own_cache):
    paths = write_pictures(tmp_path / "p", 40)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(features_of(paths, Network(), own_cache)[0])) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    np.testing.assert_allclose(results[0].matrix, expected_of(paths), atol=1e-4)
    np.testing.assert_array_equal(results[0].matrix, results[1].matrix)


# Tidying


def test_the_least_recently_used_shards_are_the_first_to_go(tmp_path):
    store = Store(tmp_path / ("0" * 32 + "-float32-cpu"))
    for number in range(4):
        store.append(digests_of(number), {"vector": np.full((1, 1000), number, np.float32)})
    places = store.index()
    for number in range(4):
        file, _ = places[digests_of(number)[0]]
        os.utime(file, (1000 + number, 1000 + number))
    store.gather(digests_of(0), places)  # the oldest is used, and is now the newest
    size = places[digests_of(0)[0]][0].stat().st_size
    tidy(tmp_path, 2 * size)
    assert sorted(store.index()) == sorted(digests_of(0, 3))


def test_a_cache_within_its_limit_stays_whole(tmp_path):
    store = Store(tmp_path / ("0" * 32 + "-float32-cpu"))
    store.append(digests_of(1), {"vector": np.ones((1, 10), np.float32)})
    store.append(digests_of(2), {"vector": np.ones((1, 10), np.float32)})
    tidy(tmp_path, sum(file.stat().st_size for file in store.folder.iterdir()))
    assert len(store.index()) == 2


def test_what_killed_runs_left_behind_goes_and_what_is_being_written_stays(tmp_path):
    folder = tmp_path / ("0" * 32 + "-float32-cpu")
    folder.mkdir()
    old, new = (f".{letter * 64}.safetensors.1-2.partial" for letter in "ab")
    for name, age in ((old, 2 * 3600), (new, 10), ("notes.txt", 10**6), ("old.partial", 10**6)):
        (folder / name).write_text("x")
        os.utime(folder / name, (time.time() - age,) * 2)
    tidy(tmp_path, 0)
    assert sorted(file.name for file in folder.iterdir()) == sorted([new, "notes.txt", "old.partial"])


def test_tidying_a_named_folder_leaves_what_is_not_ours(tmp_path):
    model = tmp_path / "llama" / "model.safetensors"
    model.parent.mkdir()
    model.write_bytes(b"x" * 1000)
    tidy(tmp_path, 10)
    assert model.exists()


def test_an_extraction_keeps_the_cache_within_its_limit(tmp_path, own_cache, network, monkeypatch):
    tidied = []
    monkeypatch.setattr(features, "tidy", tidied.append)
    features_of(write_pictures(tmp_path / "p", 2), network, own_cache)
    assert tidied == [own_cache]


# Where the cache is


def test_the_default_folder_is_made_and_used(tmp_path):
    with open_cache("auto", tmp_path / "a" / "b") as folder:
        assert folder == tmp_path / "a" / "b" and folder.is_dir() and not list(folder.iterdir())


def test_no_cache_is_a_folder_that_is_gone_afterwards(tmp_path):
    with open_cache("none", tmp_path / "default") as folder:
        (folder / "file").write_text("x")
    assert not folder.exists() and not (tmp_path / "default").exists()


def test_a_named_folder_is_used_instead_of_the_default(tmp_path):
    with open_cache(str(tmp_path / "mine"), tmp_path / "default") as folder:
        assert folder == tmp_path / "mine" and folder.is_dir()
    assert not (tmp_path / "default").exists()


def test_a_default_that_cannot_be_written_gives_way_to_the_spare_one_and_that_is_said(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with open_cache("auto", tmp_path / "file" / "cache", tmp_path / "run") as folder:
        assert folder == tmp_path / "run"
    assert any(str(tmp_path / "file") in record.message and "run" in record.message for record in caplog.records)


@pytest.mark.parametrize("choice, spare", [("auto", None), ("named", "spare")])
def test_a_folder_that_cannot_be_written_and_has_no_substitute_is_an_error(tmp_path, choice, spare):
    (tmp_path / "file").write_text("in the way")
    place = tmp_path / "file" / "cache"
    named = "auto" if choice == "auto" else str(place)
    with (
        pytest.raises(RunError, match=r"cannot be written .*--cache"),
        open_cache(named, place, spare and tmp_path / spare),
    ):
        pytest.fail("was opened")


def test_features_are_kept_in_a_spare_folder_too(tmp_path, network):
    (tmp_path / "file").write_text("in the way")
    paths = write_pictures(tmp_path / "p", 3)
    for _ in range(2):
        with open_cache("auto", tmp_path / "file" / "cache", tmp_path / "run" / "cache") as folder:
            features_of(paths, network, folder)
    assert network.computed == 3


def test_a_shard_that_cannot_be_read_is_no_damage_and_stays(tmp_path, monkeypatch, caplog):
    import safetensors

    store = Store(tmp_path / "store")
    store.append(["ab" * 32], {"x": np.zeros((1, 2), np.float32)})
    (file,) = store.folder.glob("*.safetensors")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors, "safe_open", refuse)
        assert store.index() == {} and file.exists()
    assert "damaged" not in caplog.text and list(store.index()) == ["ab" * 32]


def test_a_shard_that_may_not_be_marked_as_used_is_as_good(tmp_path, network, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")  # another user's file

    monkeypatch.setattr(os, "utime", refuse)
    paths = write_pictures(tmp_path / "p", 3)
    first, second = (features_of(paths, network, tmp_path / "cache")[0] for _ in range(2))
    assert network.computed == 3 and np.array_equal(first.matrix, second.matrix)


def test_a_shard_that_is_there_and_cannot_be_read_ends_the_run(tmp_path, network, monkeypatch):
    paths = write_pictures(tmp_path / "p", 3)
    features_of(paths, network, tmp_path / "cache")

    def refuse(file):
        if file.suffix == ".safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return read_bytes(file)

    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(RunError, match=r"safetensors: cannot be read \(Input/output error\)\. Delete it"):
        features_of(paths, network, tmp_path / "cache")
