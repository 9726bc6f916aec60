"""Files are there whole or not at all, and what a file system refuses is told apart from what it cannot do."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from headstart.files import mark_used, recall, remember, sync, write_whole


@dataclass(frozen=True)
class Facts:
    count: int


def refuse(number):
    def fsync(_):
        raise OSError(number, os.strerror(number))

    return fsync


@pytest.mark.skipif(os.name != "posix", reason="a folder cannot be opened there")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_wait_for_a_folder_is_not_asked_for_more(tmp_path, monkeypatch, number):
    asked = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: asked.append(descriptor) or refuse(number)(descriptor))
    sync(tmp_path)
    assert len(asked) == 1


@pytest.mark.skipif(os.name != "posix", reason="a folder cannot be opened there")
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_folder_that_may_not_have_reached_the_disk_is_an_error(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refuse(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        sync(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="nobody counts open files there")
@pytest.mark.parametrize("number", [0, errno.EINVAL, errno.EIO])
def test_a_folder_that_was_waited_for_is_closed(tmp_path, monkeypatch, number):
    if number:
        monkeypatch.setattr(os, "fsync", refuse(number))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        try:
            sync(tmp_path)
        except OSError as error:
            assert error.errno == errno.EIO == number
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_is_gone_is_an_error(tmp_path):
    if os.name == "posix":
        with pytest.raises(FileNotFoundError):
            sync(tmp_path / "gone")


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "file"
    for content in (b"first", b"", b"second"):
        write_whole(file, content)
        assert file.read_bytes() == content
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["file"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_whole_stays_as_it_was_and_is_named(tmp_path, monkeypatch, failing):
    file = tmp_path / "file"
    write_whole(file, b"before")
    with monkeypatch.context() as patch:
        if failing == "fsync":
            patch.setattr(os, "fsync", refuse(errno.ENOSPC))
        else:
            patch.setattr(Path, "replace", lambda *_: refuse(errno.ENOSPC)(0))
        with pytest.raises(OSError) as caught:
            write_whole(file, b"after")
    assert caught.value.filename == str(file)
    assert file.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["file"]


def test_what_was_remembered_is_recalled(tmp_path, caplog):
    caplog.set_level("INFO")
    file = tmp_path / "new" / "facts.json"
    assert recall(file, lambda values: values, "it is found out") is None and not caplog.messages
    remember(file, Facts(3), "it will be found out again")
    assert recall(file, lambda values: Facts(**values), "it is found out") == Facts(3)
    file.write_text("{")
    assert recall(file, lambda values: values, "it is found out") is None and "it is found out" in caplog.text


def test_nothing_is_recalled_from_where_one_may_not_look(tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    caplog.set_level("INFO")
    for name in ("stat", "open", "read_text"):
        monkeypatch.setattr(Path, name, refuse)
    assert recall(tmp_path / "facts.json", lambda values: values, "it is found out") is None
    assert "Permission denied" in caplog.text


def test_marking_a_file_as_used_changes_its_time_and_makes_none(tmp_path):
    file = tmp_path / "graph"
    mark_used(file)
    assert not file.exists()
    file.write_bytes(b"content")
    os.utime(file, (1000, 1000))
    mark_used(file)
    assert file.stat().st_mtime > 1000
