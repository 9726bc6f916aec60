import dataclasses
import functools
import hashlib
import http.server
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from headstart import archives, downloads, tutorial_sets
from headstart.errors import DataError, UsageError
from headstart.reading import read
from headstart.tutorial_sets import SETS, fetch

NOWHERE = "http://127.0.0.1:1/"


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(os, "sync", lambda: None)  # nobody waits for the disk
    return tmp_path / "here"


@pytest.fixture
def published(tmp_path, make_shapes):
    """The archive of a small set, in a folder of its own."""
    make_shapes(tmp_path / "shapes" / "small_data" / "train", 3)
    make_shapes(tmp_path / "shapes" / "small_data" / "val", 1, first_seed=9)
    return Path(shutil.make_archive(str(tmp_path / "published" / "small_data"), "zip", tmp_path / "shapes"))


@pytest.fixture
def small(published, monkeypatch):
    """The table with the small set alone; its address leads nowhere."""
    content = published.read_bytes()
    entry = dataclasses.replace(
        SETS[0],
        name="small",
        recipe="small-recipe",
        address=NOWHERE + "small_data.zip",
        file="small_data.zip",
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        folder="small_data",
    )
    monkeypatch.setattr(tutorial_sets, "SETS", (entry,))
    return entry


@pytest.fixture
def online(small, published, monkeypatch):
    """The same, and the address leads to a server on this machine; the paths asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *given):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=published.parent)
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        address = f"http://127.0.0.1:{server.server_port}/small_data.zip"
        monkeypatch.setattr(tutorial_sets, "SETS", (dataclasses.replace(small, address=address),))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield asked
        server.shutdown()
        thread.join()


def everything_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# The table


@pytest.mark.parametrize("entry", SETS, ids=lambda entry: entry.name)
def test_the_table_says_all_that_fetching_needs(entry):
    assert entry.address.startswith("https://") and entry.file in entry.address
    assert archives.strip_ending(entry.file) != entry.file  # a kind that is unpacked
    assert re.fullmatch("[0-9a-f]{64}", entry.sha256) or re.fullmatch("[0-9a-f]{32}", entry.md5)
    assert entry.bytes > 10**7 and entry.folder and entry.contents and entry.terms
    assert entry.checksum in (f"sha256:{entry.sha256}", f"md5:{entry.md5}")


def test_every_tutorial_that_has_a_set_is_served_and_no_name_means_two():
    assert {entry.recipe for entry in SETS} == {"ants-bees", "imagewoof", "dogs-cats", "birds"}
    for entry in SETS:
        assert tutorial_sets._find(entry.name) == tutorial_sets._find(entry.recipe) == entry


# Fetching


def test_a_set_is_fetched_checked_unpacked_and_ready_to_train_on(online, in_own_folder, caplog):
    caplog.set_level(logging.INFO, "headstart")
    folder = fetch("small")
    assert folder == Path("data/small/small_data")
    dataset = read(folder)
    assert dataset.classes == ("circle", "square", "triangle") and dataset.has_roles and len(dataset.samples) == 12
    assert sorted(os.listdir("data")) == ["small"]  # the archive has gone
    assert len(online) == 1
    assert "terms: " in caplog.text and "fetching" in caplog.text


def test_a_second_call_finds_the_set_and_asks_nobody(online, monkeypatch):
    folder = fetch("small")
    before = everything_below(folder)
    monkeypatch.setattr(downloads, "download", None)
    monkeypatch.setattr(archives, "unpack", None)
    assert fetch("small") == fetch("small-recipe") == folder and everything_below(folder) == before


def test_files_that_went_missing_since_are_said(online, caplog):
    folder = fetch("small")
    next(folder.rglob("*.png")).unlink()
    fetch("small")
    assert "11 of its 12 files are there" in caplog.text


def test_the_place_can_be_chosen(online, tmp_path):
    assert fetch("SMALL", tmp_path / "deep" / "mine") == tmp_path / "deep" / "mine" / "small_data"
    assert sorted(os.listdir(tmp_path / "deep")) == ["mine"]
    (tmp_path / "empty").mkdir()
    assert len(read(fetch("small", str(tmp_path / "empty"))).samples) == 12


def test_progress_is_shown_of_both_parts(online):
    seen = []

    def track(items, total):
        seen.append((total, len(list(kept := list(items)))))
        return kept

    fetch("small", track=track)
    assert seen == [(1, 1), (12, 12)]


# Without a connection


def test_offline_the_error_names_the_file_and_where_to_put_it_and_a_file_put_there_is_used(
    small, published, in_own_folder
):
    with pytest.raises(DataError) as caught:
        fetch("small")
    place = in_own_folder / "data" / "small_data.zip"
    assert f"put {small.address} at {place}," in caught.value.remedy and "\n" not in str(caught.value)
    assert "Connection refused" in caught.value.why
    assert everything_below(in_own_folder) == ["data"]
    shutil.copy(published, place)
    assert len(read(fetch("small")).samples) == 12
    assert place.read_bytes() == published.read_bytes()  # what somebody laid there stays


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_that_was_put_there_is_refused_and_stays(small, published, in_own_folder, damage):
    content = published.read_bytes()
    place = in_own_folder / "data" / "small_data.zip"
    place.parent.mkdir()
    place.write_bytes(content[:-1] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DataError, match=r"small_data\.zip: .*(bytes instead of|checksum).* Delete it, and fetch again"):
        fetch("small")
    assert everything_below(in_own_folder) == ["data", "data/small_data.zip"]


def test_what_the_server_gives_instead_is_refused(online, published, in_own_folder):
    content = published.read_bytes()
    published.write_bytes(content[:-1] + b"x")
    with pytest.raises(DataError, match=r"could not be fetched \(the checksum"):
        fetch("small")
    published.write_bytes(content + b"x")
    with pytest.raises(DataError, match=r"could not be fetched \(the file there has"):
        fetch("small")
    assert everything_below(in_own_folder) == ["data"]


# Interrupted


@pytest.mark.parametrize("part", [0, 1])
def test_an_interrupted_fetch_leaves_no_half_set_and_the_next_one_is_whole(online, in_own_folder, part):
    calls = []

    def track(items, total):
        calls.append(total)
        for item in items:
            yield item
            if len(calls) == part + 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("small", track=track)
    assert not (in_own_folder / "data" / "small").exists()
    assert len(read(fetch("small")).samples) == 12


def test_a_killed_fetch_leaves_no_half_set_and_the_next_one_is_whole(small, published, in_own_folder):
    place = in_own_folder / "data" / "small_data.zip"
    place.parent.mkdir()
    shutil.copy(published, place)
    code = (
        "import sys, time\n"
        "from headstart import tutorial_sets as sets\n"
        "sets.SETS = (sets.TutorialSet(*sys.argv[1:5], int(sys.argv[5]), *sys.argv[6:]),)\n"
        "def slowly(items, total):\n"
        "    for number, item in enumerate(items):\n"
        "        yield item\n"
        "        if number == 5:\n"
        "            print('now', flush=True); time.sleep(60)\n"
        "sets.fetch('small', track=slowly)\n"
    )
    command = [sys.executable, "-c", code, *map(str, dataclasses.astuple(small))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "now\n"
        with pytest.raises(DataError, match="another process is fetching it"):
            fetch("small")
        process.send_signal(signal.SIGKILL)
    assert not (in_own_folder / "data" / "small").exists()
    assert len(read(fetch("small")).samples) == 12
    assert sorted(os.listdir("data")) == ["small", "small_data.zip"]


# Refusals


def test_a_folder_that_holds_something_else_is_not_touched(online, in_own_folder):
    (in_own_folder / "data" / "small").mkdir(parents=True)
    (in_own_folder / "data" / "small" / "mine.txt").write_text("kept")
    with pytest.raises(DataError, match="is there already, and was not made by"):
        fetch("small")
    assert everything_below(in_own_folder / "data") == ["small", "small/mine.txt"] and online == []


def test_another_sets_folder_is_not_touched(online, small, monkeypatch):
    folder = fetch("small")
    other = dataclasses.replace(small, name="other", recipe="other", sha256="0" * 64)
    monkeypatch.setattr(tutorial_sets, "SETS", (other,))
    with pytest.raises(DataError, match="was not made by `headstart fetch other`"):
        fetch("other", folder.parent)


@pytest.mark.parametrize(("name", "hint"), [("hymenopetra", ", did you mean 'hymenoptera'?"), ("mnist", ""), ("", "")])
def test_an_unknown_name_is_told_the_known_ones(name, hint):
    with pytest.raises(UsageError) as caught:
        fetch(name)
    assert caught.value.why.endswith(f"is no tutorial's data set{hint}")
    assert "hymenoptera, imagewoof, dogs-cats, birds" in caught.value.remedy


@pytest.mark.parametrize("name", ["scenes", "Scenes", "places365", "ai-challenger"])
def test_the_scenes_that_cannot_be_had_are_told_with_what_to_do_instead(name, in_own_folder):
    with pytest.raises(DataError, match=r"scenes: cannot be fetched.* 30 GB.* give it as data"):
        fetch(name)
    assert everything_below(in_own_folder) == []


@pytest.mark.parametrize("out", ["", ".", "..", "/"])
def test_a_place_without_a_name_is_refused(small, out):
    with pytest.raises(UsageError, match="new folder"):
        fetch("small", out)


def test_a_place_that_cannot_be_written_is_told(online, in_own_folder):
    (in_own_folder / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be made"):
        fetch("small", in_own_folder / "file" / "data")
