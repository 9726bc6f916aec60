"""The run folder: what killed writers left behind goes, and nothing else."""

from __future__ import annotations

import pytest

import headstart
from headstart.config import RunConfig
from headstart.errors import RunError
from headstart.runs import LOCK, open_run


@pytest.fixture
def opened(shapes):
    """A function that opens a folder as the run of the drawn pictures."""
    dataset = headstart.read(shapes)
    return lambda folder, resume=False: open_run(folder, shapes, dataset, RunConfig(), resume)


PARTIAL = (".model.safetensors.123-456.partial", ".config.toml.99-1.partial", ".metrics.json.7-7.partial")


def names_in(folder):
    return {path.name for path in folder.iterdir()} - {LOCK}


def test_what_killed_writers_left_behind_goes_when_a_run_goes_on(opened, tmp_path):
    with opened(tmp_path / "run"):
        pass
    for name in (*PARTIAL, "notes.partial", ".hidden", "model.safetensors"):
        (tmp_path / "run" / name).write_bytes(b"half")
    with opened(tmp_path / "run"):
        assert names_in(tmp_path / "run") == {"config.toml", "notes.partial", ".hidden", "model.safetensors"}


def test_a_run_that_was_killed_while_its_settings_were_written_begins_again(opened, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / PARTIAL[1]).write_bytes(b"[tra")
    with opened(tmp_path / "run") as folder:
        assert names_in(folder.path) == {"config.toml"}


def test_a_finished_run_is_rid_of_them_too(opened, tmp_path):
    with opened(tmp_path / "run") as folder:
        folder.write_json("metrics.json", {})
    (tmp_path / "run" / PARTIAL[0]).write_bytes(b"half")
    with opened(tmp_path / "run", resume=True) as folder:
        assert folder.finished and names_in(folder.path) == {"config.toml", "metrics.json"}


@pytest.mark.parametrize("others", [["film.mkv"], ["config.toml"]], ids=["no run", "another run"])
def test_a_folder_that_is_refused_keeps_all_its_files(opened, tmp_path, others):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in others:
        (folder / name).write_text("")
    (folder / ".film.mkv.partial").write_bytes(b"half of a film")
    with pytest.raises(RunError), opened(folder):
        pass
    assert (folder / ".film.mkv.partial").exists()
