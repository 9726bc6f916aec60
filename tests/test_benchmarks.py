"""The benchmarks run by hand, for minutes to hours: here what they call of headstart is tried."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_what_the_memory_of_reading_is_measured_by_fills_the_cache(benchmark, shapes, own_cache):
    benchmark("memory").look(shapes)
    assert sum(file.stat().st_size for file in own_cache.rglob("*") if file.is_file()) > 36 * 1280 * 2  # of 36 pictures


def test_an_unseen_set_has_each_picture_once_on_white_in_both_parts(benchmark, tmp_path, monkeypatch):
    unseen = benchmark("unseen")
    monkeypatch.setattr(unseen, "FOLDER", tmp_path / "data")
    folder = tmp_path / "root/usr/pictures/animals/below"
    folder.mkdir(parents=True)
    for number in range(20):
        Image.new("RGBA", (600, 300), (number, 0, 0, 0 if number else 255)).save(folder / f"{number}.png")
    (folder / "again.png").write_bytes((folder / "3.png").read_bytes())
    (folder / "linked.png").symlink_to(folder / "4.png")
    counts = unseen.write("things", unseen.Source("usr/pictures", ("animals",)), str(tmp_path / "root"))
    assert counts == {"val": 8, "train": 12}
    files = [*(tmp_path / "data/things").rglob("*.png")]
    assert {file.parent.name for file in files} == {"animals"} and len(files) == 20
    corners = []
    for file in files:
        with Image.open(file) as image:
            assert (image.mode, image.size) == ("RGB", (512, 256))
            corners.append(image.getpixel((0, 0)))
    assert sorted(corners) == [(0, 0, 0), *[(255, 255, 255)] * 19]


def test_packages_are_downloaded_in_the_versions_that_the_contest_has(benchmark, tmp_path, monkeypatch):
    unseen, commands = benchmark("unseen"), []

    def run(command, cwd, check):
        commands.append(command)
        file = command[-1].replace("=", "_").replace(":", "%3a") + "_all.deb"
        (cwd / file).touch()
        (cwd / file.replace("_all", "9_all")).touch()  # of another version
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(unseen, "FOLDER", tmp_path / "data")
    monkeypatch.setattr(unseen.subprocess, "run", run)
    files = [file.name for file in unseen.download()]
    assert files == ["openclipart-png_1%3a0.18+dfsg-19_all.deb", "tuxpaint-stamps-default_2022.06.04-1_all.deb"]
    assert [command[:2] for command in commands] == [("apt-get", "download")] * 2
    assert all(f"{name} {version}" in unseen.__doc__ for name, version in unseen.PACKAGES.items())


def test_a_version_that_is_not_to_be_had_and_a_tool_that_is_missing_are_told(benchmark, tmp_path, monkeypatch):
    unseen = benchmark("unseen")
    monkeypatch.setattr(unseen, "FOLDER", tmp_path / "data")
    monkeypatch.setattr(unseen.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 100))
    with pytest.raises(SystemExit, match=r"openclipart-png 1:0\.18.+could not be downloaded: run `apt-get update`"):
        list(unseen.download())
    monkeypatch.setattr(unseen.shutil, "which", lambda tool: None)
    monkeypatch.setattr(unseen.sys, "argv", ["unseen.py"])
    with pytest.raises(SystemExit, match="apt-get and dpkg-deb not found"):
        unseen.main()
