import hashlib
import io
import logging
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from headstart import archives, loading, quality, reading, views
from headstart.archives import unpack
from headstart.config import DataConfig, RunConfig
from headstart.errors import DataError, UnreadableImage
from headstart.images import Limits, Preprocess, read_bytes
from headstart.members import Bounds
from headstart.reading import read

KINDS = {".zip": "zip", ".tar": "tar", ".tar.gz": "gztar", ".tgz": "gztar", ".tar.bz2": "bztar", ".tar.xz": "xztar"}
UNSAFE = ["../up.jpg", "cat/../../up.jpg", "/top.jpg", "cat\\1.jpg", "C:1.jpg", "C:/1.jpg", "./..", "cat/..", "."]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Nobody waits for the disk; the test that is about that is told when one would have."""
    waits = []
    monkeypatch.setattr(os, "sync", lambda: waits.append(sorted(Path.cwd().iterdir())))
    return waits


def png(colour=0):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (colour % 256, colour // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


def make_zip(path, contents, compression=zipfile.ZIP_DEFLATED):
    """A zip of (name, content) pairs, or of entries (ZipInfo) instead of names, as they stand."""
    with zipfile.ZipFile(path, "w", compression) as opened:
        for name, content in dict(contents).items() if isinstance(contents, dict) else contents:
            entry = name
            if isinstance(name, str):
                entry = zipfile.ZipInfo("x")
                entry.filename = entry.orig_filename = name  # the constructor would mend it
                entry.compress_type = compression
            opened.writestr(entry, content)
    return path


def make_tar(path, contents, mode="w", **changes):
    """A tar of (name, content) pairs; the changes are made to every header."""
    with tarfile.open(path, mode) as opened:
        for name, content in dict(contents).items() if isinstance(contents, dict) else contents:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            for key, value in changes.items():
                setattr(entry, key, value)
            opened.addfile(entry, io.BytesIO(content))
    return path


MAKERS = {"zip": make_zip, "tar": make_tar}


def make(kind, folder, contents):
    return MAKERS[kind](folder / f"data.{kind}", contents)


def pack(folder, archive):
    """The folder's content as an archive, by the standard library."""
    kind = next(KINDS[ending] for ending in KINDS if archive.name.endswith(ending))
    made = Path(shutil.make_archive(str(archive.parent / "packed"), kind, folder))
    made.rename(archive)
    return archive


def inner(source):
    return source.partition("::")[2]


def refusal(path, config=None):
    with pytest.raises(DataError) as caught:
        read(path, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading as from a folder


@pytest.mark.parametrize("ending", KINDS)
@pytest.mark.parametrize("wrapper", ["", "pictures of shapes/"])
@pytest.mark.parametrize("classes", ["folder", "leaf"])
def test_an_archive_is_read_as_the_folder_that_was_packed(tmp_path, make_shapes, ending, wrapper, classes):
    folder = tmp_path / "folder"
    make_shapes(folder / wrapper / "train", 2)
    make_shapes(folder / wrapper / "val", 1, first_seed=9)
    (folder / "read me.txt").write_text("no picture")
    packed, plain = (
        read(pack(folder, tmp_path / f"x{ending}"), DataConfig(classes=classes)),
        read(folder, DataConfig(classes=classes)),
    )
    assert [inner(source) for source in packed.sources] == list(plain.sources)
    assert [(sample.labels, sample.role) for sample in packed.samples] == [(s.labels, s.role) for s in plain.samples]
    assert packed.classes == plain.classes == ("circle", "square", "triangle")
    assert [(inner(source), why) for source, why in packed.ignored] == list(plain.ignored)
    assert packed.notices == plain.notices
    for one, other in zip(packed.sources, plain.sources, strict=True):
        assert archives.digest(packed.path(one)) == hashlib.sha256(plain.path(other).read_bytes()).hexdigest()
        assert archives.digest(plain.path(other)) == archives.digest(packed.path(one))


def test_what_an_independent_packer_made_is_read(tmp_path, make_shapes):
    if shutil.which("tar") is None:
        pytest.skip("needs tar")
    make_shapes(tmp_path / "folder" / ("a long name " * 12), 1)
    for flag, name in (("--format=gnu", "gnu.tar"), ("--format=pax", "pax.tar"), ("-z", "gnu.tgz"), ("-J", "gnu.txz")):
        subprocess.run(["tar", flag, "-cf", tmp_path / name, "-C", tmp_path / "folder", "."], check=True)
        dataset = read(tmp_path / name)
        assert dataset.classes == ("circle", "square", "triangle")
        assert (
            read_bytes(dataset.path(dataset.sources[0]))
            == next((tmp_path / "folder").glob("*/circle/0.png")).read_bytes()
        )


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tgz"])
def test_a_survey_of_an_archive_gives_the_facts_of_the_folders_pictures(tmp_path, shapes, ending):
    dataset = read(pack(shapes, tmp_path / f"x{ending}"))
    packed = views.survey(dataset, RunConfig(), lambda pictures, total: pictures)
    plain = views.survey(read(shapes), RunConfig(), lambda pictures, total: pictures)
    assert packed.digests == plain.digests and not packed.unreadable
    assert all((packed.facts[name] == plain.facts[name]).all() for name in plain.facts)


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tgz"])
def test_many_threads_read_the_right_content_each(tmp_path, ending):
    contents = {f"{number % 7}/{number}.jpg": os.urandom(20_000 + number) for number in range(200)}
    for name, content in contents.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    archive = pack(tmp_path / "folder", tmp_path / f"x{ending}")
    names = [*contents] * 4
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda name: read_bytes(f"{archive}::{name}"), names))
    assert all(content == contents[name] for name, content in zip(names, found, strict=True))


def test_pictures_without_a_known_ending_are_told_by_content(tmp_path):
    archive = make_zip(
        tmp_path / "x.zip", {"a/1": PNG, "a/notes": b"not a picture at all", "b/1.odd": PNG, "b/empty": b""}
    )
    dataset = read(archive)
    assert [inner(source) for source in dataset.sources] == ["a/1", "b/1.odd"]
    assert {inner(source) for source, why in dataset.ignored if "not a picture" in why} == {"a/notes", "b/empty"}


def test_what_the_system_keeps_is_passed_over(tmp_path):
    names = ["a/1.jpg", "b/1.jpg", "__MACOSX/a/._1.jpg", "a/.DS_Store", "b/Thumbs.db", ".hidden/1.jpg"]
    dataset = read(make_zip(tmp_path / "x.zip", dict.fromkeys(names, PNG)))
    assert [inner(source) for source in dataset.sources] == ["a/1.jpg", "b/1.jpg"]
    assert dataset.ignored == () and dataset.notices == ()


def test_classes_and_pictures_stand_in_natural_order(tmp_path):
    names = [f"{number}/{name}.jpg" for number in (10, 1, 2) for name in ("x10", "x9")]
    dataset = read(make_tar(tmp_path / "x.tar", dict.fromkeys(names, PNG)))
    assert dataset.classes == ("1", "2", "10")
    assert [inner(source) for source in dataset.sources[:3]] == ["1/x9.jpg", "1/x10.jpg", "2/x9.jpg"]


def test_a_file_with_the_very_name_of_a_member_wins(tmp_path):
    make_zip(tmp_path / "x.zip", {"a.jpg": PNG})
    assert read_bytes(tmp_path / "x.zip::a.jpg") == PNG
    (tmp_path / "x.zip::a.jpg").write_bytes(b"a file")
    assert read_bytes(tmp_path / "x.zip::a.jpg") == b"a file"
    assert archives.size(tmp_path / "x.zip::a.jpg") == 6


@pytest.mark.parametrize("name", ["x.zip", "odd::name.tar", "a.tar::b.zip", "名 字.TAR"])
def test_members_are_found_whatever_the_archive_and_its_folder_are_called(tmp_path, name):
    folder = tmp_path / "x.zip::folder.tar"
    folder.mkdir()
    MAKERS["zip" if name.endswith("zip") else "tar"](folder / name, {"aa::b/1.zip::2.jpg": PNG, "c/3.jpg": PNG})
    dataset = read(folder / name)
    assert dataset.sources == (f"{name}::aa::b/1.zip::2.jpg", f"{name}::c/3.jpg")
    assert all(archives.is_file(dataset.path(source)) for source in dataset.sources)
    assert [read_bytes(dataset.path(source)) for source in dataset.sources] == [PNG, PNG]


def test_a_folder_that_is_named_like_an_archive_is_a_folder(tmp_path):
    for name in ("x.zip/a/1.jpg", "x.zip/b/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(PNG)
    assert read(tmp_path / "x.zip").sources == ("a/1.jpg", "b/1.jpg")


def test_a_member_that_is_not_there_is_unreadable_with_the_reason(tmp_path):
    make_zip(tmp_path / "x.zip", {"a.jpg": PNG})
    with pytest.raises(UnreadableImage, match="no such file in the archive"):
        read_bytes(tmp_path / "x.zip::b.jpg")
    with pytest.raises(UnreadableImage, match="no such file"):
        read_bytes(tmp_path / "gone.zip::a.jpg")
    assert not archives.is_file(tmp_path / "x.zip::b.jpg") and not archives.is_file(tmp_path / "gone.zip::a.jpg")


def test_a_member_over_the_limit_of_bytes_is_set_aside_and_named(tmp_path):
    archive = make_zip(tmp_path / "x.zip", {"a.jpg": bytes(3 * 2**20)})
    with pytest.raises(UnreadableImage, match=r"3\.0 MiB is over the limit of 2 MiB"):
        read_bytes(f"{archive}::a.jpg", Limits(bytes=2 * 2**20))


def test_the_fingerprint_changes_with_a_members_size(tmp_path):
    marks = [
        read(make_zip(tmp_path / "x.zip", {"a/1.jpg": content, "b/1.jpg": PNG})).fingerprint
        for content in (PNG, PNG, PNG + b"more")
    ]
    assert marks[0] == marks[1] != marks[2]


def test_an_archive_that_was_replaced_is_read_anew(tmp_path):
    for colour in (1, 2):
        archive = make_tar(tmp_path / "x.tgz", {"a/1.jpg": png(colour)}, "w:gz")
        os.utime(archive, (colour, colour))
        assert read_bytes(f"{archive}::a/1.jpg") == png(colour)


# Predictions


@pytest.mark.parametrize("ending", [".zip", ".tar"])
def test_archives_and_folders_in_them_are_looked_through_for_predictions(tmp_path, ending):
    contents = {"a/10.jpg": PNG, "a/2.jpg": PNG, "a/notes.txt": b"text", "b/1.jpg": PNG, "ab/1.jpg": PNG}
    archive = make(ending[1:], tmp_path, contents)
    found = [f"{archive}::{name}" for name in ("a/2.jpg", "a/10.jpg", "ab/1.jpg", "b/1.jpg")]
    assert reading.find_pictures([archive]) == ([Path(path) for path in found], 1)
    for folder in ("a", "a/"):
        assert reading.find_pictures([f"{archive}::{folder}"]) == ([Path(path) for path in found[:2]], 1)
    for name in ("b/1.jpg", "gone.jpg", "a[b"):
        assert reading.find_pictures([f"{archive}::{name}"]) == ([Path(f"{archive}::{name}")], 0)


def test_a_damaged_archive_is_told_before_any_prediction(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"x\.zip: cannot be read as an archive"):
        reading.find_pictures([tmp_path / "x.zip"])


@pytest.mark.parametrize("ending", [".zip", ".tgz"])
def test_pixels_of_members_are_those_of_files(tmp_path, shapes, ending):
    archive = pack(shapes, tmp_path / f"x{ending}")
    files, _ = reading.find_pictures([shapes])
    members, _ = reading.find_pictures([archive])
    wanted = loading.Wanted(Preprocess(size=32))
    streams = [
        loading.process(paths, wanted, lambda: lambda pixels: pixels.reshape(len(pixels), -1))
        for paths in (files, members)
    ]
    plain, packed = map(list, streams)
    assert len(plain) == 36 and all(
        (one.vector == other.vector).all() for one, other in zip(plain, packed, strict=True)
    )


# Compressed tars


def test_a_compressed_tar_is_unpacked_once_and_that_is_said(tmp_path, own_cache, caplog):
    archive = make_tar(tmp_path / "x.tgz", {"a/1.jpg": PNG, "b/1.jpg": PNG}, "w:gz")
    caplog.set_level(logging.INFO, "headstart")
    for _ in range(2):
        archives._opened.cache_clear()  # as in another process
        assert read(archive).classes == ("a", "b")
        assert read_bytes(f"{archive}::a/1.jpg") == PNG
    assert len([record for record in caplog.records if "unpacked once" in record.message]) == 1
    assert len(list((own_cache / "archives").glob("*.tar"))) == 1
    assert not list((own_cache / "archives").glob("*.partial"))


def test_several_processes_that_need_a_compressed_tar_unpack_it_once(tmp_path, own_cache):
    archive = make_tar(tmp_path / "x.tgz", {"a.jpg": os.urandom(5_000_000)}, "w:gz")
    code = (
        "import logging, sys; logging.basicConfig(level='INFO')\n"
        "from headstart import archives; print(archives.digest(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, f"{archive}::a.jpg"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate() for process in running]
    assert len({out for out, _ in answers}) == 1
    assert sum(err.count("unpacked once") for _, err in answers) == 1


def test_the_cache_of_unpacked_tars_is_bounded_and_what_goes_can_still_be_read(tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr(archives, "CACHE_BYTES", 25_000)
    left_over = own_cache / "archives" / "x.tar.1.partial"
    left_over.parent.mkdir(parents=True)
    left_over.write_bytes(b"of a killed process")
    os.utime(left_over, (1, 1))
    made = [make_tar(tmp_path / f"{number}.tgz", {"a.jpg": png(number)}, "w:gz") for number in range(4)]
    for number, archive in enumerate(made):
        assert read_bytes(f"{archive}::a.jpg") == png(number)
        for tar in (own_cache / "archives").glob("*.tar"):
            os.utime(tar, (tar.stat().st_mtime - 10,) * 2)
    assert len(list((own_cache / "archives").glob("*.tar"))) == 2  # of 10,240 bytes each
    assert not left_over.exists()
    assert [read_bytes(f"{archive}::a.jpg") for archive in made] == [png(number) for number in range(4)]


def test_a_plain_tar_under_a_compressed_ones_name_is_read_in_place(tmp_path, own_cache):
    archive = make_tar(tmp_path / "x.tar.gz", {"a.jpg": PNG})
    assert read_bytes(f"{archive}::a.jpg") == PNG
    assert not own_cache.exists()


@pytest.fixture
def small_disk():
    """No file can grow beyond a MiB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_with_what_is_needed_and_leaves_nothing_behind(tmp_path, own_cache, request):
    archive = make_tar(tmp_path / "x.tgz", {"a/1.jpg": os.urandom(8 * 2**20)}, "w:gz")
    request.getfixturevalue("small_disk")
    message = refusal(archive)
    needed = re.search(r"needs about (\d+) MiB in (\S+), which cannot be written", message)
    assert 5 <= int(needed[1]) <= 11 and needed[2] == str(own_cache / "archives")
    assert "HEADSTART_CACHE" in message
    assert not [file for file in (own_cache / "archives").iterdir() if file.suffix != ".lock"]


def test_a_cache_that_cannot_be_written_is_told(tmp_path, own_cache):
    archive = make_tar(tmp_path / "x.tgz", {"a/1.jpg": PNG}, "w:gz")
    own_cache.write_text("in the way")
    assert "cannot be unpacked into" in refusal(archive)


# Damage


@pytest.mark.parametrize("ending", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.98])
def test_a_truncated_archive_is_refused_with_the_reason(tmp_path, make_shapes, ending, share):
    archive = pack(make_shapes(tmp_path / "folder", 3), tmp_path / f"x{ending}")
    content = archive.read_bytes()
    archive.write_bytes(content[: int(share * len(content))] if ending != ".tar" else content[: int(share * 20_000)])
    assert re.search(r"x\S+: cannot be read as an archive \(.+\)\. Get it again", refusal(archive))


def test_a_tar_that_was_cut_anywhere_before_its_end_is_refused(tmp_path):
    content = make_tar(tmp_path / "x.tar", {"a/1.jpg": PNG, "b/2.jpg": bytes(600)}).read_bytes()
    end = 512 + 512 + 512 + 1024  # two headers and their contents
    for length in (*range(0, end + 512, 100), *range(0, end + 512, 512), end + 511):
        (tmp_path / f"{length}.tar").write_bytes(content[:length])
        refusal(tmp_path / f"{length}.tar")
    (tmp_path / "whole.tar").write_bytes(content[: end + 512])
    assert len(read(tmp_path / "whole.tar").samples) == 2


def test_a_tar_with_a_damaged_header_is_refused_and_not_cut_short_silently(tmp_path):
    archive = make_tar(tmp_path / "x.tar", {f"{kind}/1.jpg": PNG for kind in "abc"})
    content = bytearray(archive.read_bytes())
    content[2 * 1024 + 3] ^= 1  # in the third header
    archive.write_bytes(content)
    assert "damaged or cut short at byte 2048" in refusal(archive)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_alone_is_unreadable(tmp_path, compression):
    contents = {f"{kind}/{number}.jpg": os.urandom(3000) for kind in "ab" for number in range(2)}
    archive = make_zip(tmp_path / "x.zip", contents, compression)
    assert all(read_bytes(f"{archive}::{name}") == content for name, content in contents.items())
    with zipfile.ZipFile(archive) as opened:
        place = opened.getinfo("a/1.jpg").header_offset + 1500
    content = bytearray(archive.read_bytes())
    content[place] ^= 0x55
    archive.write_bytes(content)
    dataset = read(archive)
    survey = views.survey(dataset, RunConfig(), lambda pictures, total: pictures)
    assert "is damaged in its archive (" in survey.unreadable["x.zip::a/1.jpg"]
    assert "damaged in its archive" not in "".join(why for name, why in survey.unreadable.items() if "a/1" not in name)


def test_an_encrypted_member_is_named_with_the_reason_and_the_rest_is_read(tmp_path):
    archive = make_zip(tmp_path / "x.zip", {"a/1.png": PNG, "b/1.png": PNG}, zipfile.ZIP_STORED)
    content = bytearray(archive.read_bytes())
    content[6] |= 1  # the flags of the first local header
    content[content.index(b"PK\x01\x02") + 8] |= 1  # and of the first entry in the directory
    archive.write_bytes(content)
    dataset = read(archive)
    survey = views.survey(dataset, RunConfig(), lambda pictures, total: pictures)
    assert survey.unreadable == {"x.zip::a/1.png": "is encrypted"} and survey.sources == ("x.zip::b/1.png",)
    audit = quality.inspect(dataset, survey.digests, survey.facts, survey.unreadable, strict=False)
    assert any("is encrypted" in finding.message for finding in audit.findings)
    with pytest.raises(DataError, match=r"'a/1\.png' is encrypted"):
        unpack(archive, tmp_path / "out")


def test_a_size_that_is_told_too_small_or_too_large_is_noticed(tmp_path):
    for wrong in (10, 4000):
        archive = make_zip(tmp_path / f"{wrong}.zip", {"a.jpg": bytes(3000)})
        content = bytearray(archive.read_bytes())
        place = content.index(b"PK\x01\x02") + 24
        content[place : place + 4] = wrong.to_bytes(4, "little")
        archive.write_bytes(content)
        with pytest.raises(UnreadableImage, match=r"is damaged|is cut short"):
            read_bytes(f"{archive}::a.jpg")


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tgz", "x.tar.xz"])
@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(40), b"\x1f\x8b\x08" + bytes(20), bytes(300)])
def test_what_is_no_archive_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert re.search(rf"{name}: cannot be read as an archive \(.+\)", refusal(tmp_path / name))


def test_an_archive_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "x.zip", {"a.jpg": PNG})

    def refuse(*given, **named):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    assert "Permission denied" in refusal(archive)


@pytest.mark.parametrize("kind", MAKERS)
def test_an_empty_archive_and_one_class_are_refused_as_folders_are(tmp_path, kind):
    assert "holds no pictures in class folders" in refusal(make(kind, tmp_path, {}))
    assert "only the class 'cat'" in refusal(make(kind, tmp_path, {"cat/1.jpg": PNG, "cat/2.jpg": PNG}))
    assert "holds no pictures in class folders" in refusal(make(kind, tmp_path, {"1.jpg": PNG, "2.jpg": PNG}))


def test_a_table_without_class_folders_in_an_archive_is_refused_with_what_to_do(tmp_path):
    contents = {
        "labels.csv": b"image,label\nimages/1.jpg,a\nimages/2.jpg,b\n",
        "images/1.jpg": PNG,
        "images/2.jpg": PNG,
    }
    message = refusal(make_zip(tmp_path / "x.zip", contents))
    assert "'labels.csv'" in message and "Unpack it" in message


# Names


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", UNSAFE)
def test_a_name_that_leads_elsewhere_is_left_out_named_and_never_unpacked(tmp_path, kind, name):
    archive = make(kind, tmp_path, {"cat/1.jpg": PNG, name: PNG, "dog/1.jpg": PNG})
    dataset = read(archive)
    assert [inner(source) for source in dataset.sources] == ["cat/1.jpg", "dog/1.jpg"]
    assert [inner(source) for source, why in dataset.ignored if "name" in why] == [name]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="is refused"):
        unpack(archive, tmp_path / "deep" / "out")
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before] == [tmp_path / "deep"]


def test_a_name_with_a_zero_byte_is_left_out(tmp_path):
    archive = make_zip(tmp_path / "x.zip", {"a/1.jpg": PNG, "a/2.jpg\0.txt": PNG, "b/1.jpg": PNG})
    dataset = read(archive)
    assert dataset.sources == ("x.zip::a/1.jpg", "x.zip::b/1.jpg")
    assert dataset.ignored == (("x.zip::a/2.jpg\0.txt", "has a name with a zero byte"),)


PARTS = st.text(st.sampled_from("ab.:\\ é名\x7f\n*"), min_size=1, max_size=4) | st.sampled_from(["..", ".", "", "C:"])


@given(names=st.lists(st.lists(PARTS, min_size=1, max_size=4).map("/".join), max_size=6, unique=True))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("kind", MAKERS)
def test_no_name_leads_out_of_the_folder(kind, names):
    # The mistake: `extractall` of a downloaded archive.
    names = [name for name in names if name and not name.endswith("/")]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        archive = make(kind, folder, [(name, PNG) for name in names])
        listed = archives.list_names(archive)
        left_out = [name for name, _ in archives.list_ignored(archive)]
        for name in listed:
            inside = os.path.normpath(folder / "out" / name)
            assert inside == str(folder / "out" / name) and inside.startswith(f"{folder}/out/")
            assert read_bytes(f"{archive}::{name}") == PNG
        assert len(listed) + len(left_out) == len(names)
        try:
            count = unpack(archive, folder / "out")
        except DataError:
            assert sorted(folder.iterdir()) == [archive]
        else:
            written = {str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*") if path.is_file()}
            assert written == {*listed, archives.NOTE} and count == len(listed) and not left_out


@pytest.mark.parametrize("kind", MAKERS)
def test_of_members_with_one_name_the_last_counts_and_that_is_said(tmp_path, kind):
    archive = make(kind, tmp_path, [("a/1.png", png(1)), ("./a//1.png", png(2)), ("b/1.png", PNG)])
    dataset = read(archive)
    assert len(dataset.samples) == 2 and read_bytes(dataset.path(dataset.sources[0])) == png(2)
    assert "more than once" in dict(dataset.ignored)[f"{archive.name}::a/1.png"]
    with pytest.raises(DataError, match="more than once"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["狗与猫/🐱‍👤 1.jpg", "Käse/é.jpg", "a 'b' \"c\", =1+1/100%s.jpg", "two\nlines/x.jpg"])
def test_names_in_any_script_are_kept_as_they_are(tmp_path, kind, name):
    archive = make(kind, tmp_path, {name: PNG, "other/1.jpg": PNG})
    dataset = read(archive)
    assert name.split("/")[0] in dataset.classes and f"{archive.name}::{name}" in dataset.sources
    unpack(archive, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == PNG


@pytest.mark.parametrize(
    ("raw", "system", "name"),
    [
        ("狗/1.jpg".encode(), 3, "狗/1.jpg"),
        ("狗/1.jpg".encode(), 0, "狗/1.jpg"),
        ("Käse/1.jpg".encode("cp437"), 0, "Käse/1.jpg"),
        (b"caf\xe9/1.jpg", 3, os.fsdecode(b"caf\xe9/1.jpg")),
    ],
)
def test_names_that_a_zip_does_not_mark_as_unicode_are_read_as_they_were_meant(tmp_path, raw, system, name):
    place_holder = "x" * (len(raw) - 6) + "/1.jpg"
    entry = zipfile.ZipInfo(place_holder)
    entry.create_system = system
    archive = make_zip(tmp_path / "x.zip", [(entry, PNG), ("other/1.jpg", PNG)])
    archive.write_bytes(archive.read_bytes().replace(place_holder.encode(), raw))
    dataset = read(archive)
    assert f"x.zip::{name}" in dataset.sources and len(dataset.fingerprint) == 64
    assert read_bytes(dataset.path(f"x.zip::{name}")) == PNG


def test_names_that_are_no_text_are_kept_in_tars(tmp_path):
    name = os.fsdecode(b"caf\xe9/\xff.jpg")
    archive = make_tar(tmp_path / "x.tar", {name: PNG, "other/1.jpg": PNG})
    assert f"x.tar::{name}" in read(archive).sources
    unpack(archive, tmp_path / "out")
    assert os.listdir(os.fsencode(tmp_path / "out" / os.path.dirname(name))) == [b"\xff.jpg"]


# Links and devices


SPECIAL = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "pipe": tarfile.FIFOTYPE, "device": tarfile.CHRTYPE}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_plain_file_in_a_tar_is_left_out_named_and_never_unpacked(tmp_path, kind):
    (tmp_path / "secret.jpg").write_bytes(PNG)
    archive = tmp_path / "x.tar"
    with tarfile.open(archive, "w") as opened:
        for name in ("cat/1.jpg", "dog/1.jpg"):
            entry = tarfile.TarInfo(name)
            entry.size = len(PNG)
            opened.addfile(entry, io.BytesIO(PNG))
        entry = tarfile.TarInfo("cat/odd.jpg")
        entry.type, entry.linkname = SPECIAL[kind], str(tmp_path / "secret.jpg")
        opened.addfile(entry)
    dataset = read(archive)
    ((source, why),) = dataset.ignored
    assert source == "x.tar::cat/odd.jpg" and ("link" in why if "link" in kind else "no regular file" in why)
    with pytest.raises(UnreadableImage, match="no such file"):
        read_bytes(dataset.path(source))
    with pytest.raises(DataError, match=r"'cat/odd\.jpg' is "):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_behind_a_link_that_the_archive_brings_along_is_not_written(tmp_path):
    (tmp_path / "outside").mkdir()
    archive = tmp_path / "x.tar"
    with tarfile.open(archive, "w") as opened:
        link = tarfile.TarInfo("door")
        link.type, link.linkname = tarfile.SYMTYPE, "../outside"
        opened.addfile(link)
        entry = tarfile.TarInfo("door/1.jpg")
        entry.size = len(PNG)
        opened.addfile(entry, io.BytesIO(PNG))
    with pytest.raises(DataError, match="'door' is a link"):
        unpack(archive, tmp_path / "deep" / "out")
    assert not list((tmp_path / "outside").iterdir()) and not list((tmp_path / "deep").iterdir())


def test_a_link_in_a_zip_is_left_out(tmp_path):
    entry = zipfile.ZipInfo("cat/2.jpg")
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    archive = make_zip(tmp_path / "x.zip", [("cat/1.jpg", PNG), (entry, b"/etc/passwd"), ("dog/1.jpg", PNG)])
    assert dict(read(archive).ignored) == {"x.zip::cat/2.jpg": "is a link, which is not followed"}
    with pytest.raises(DataError, match="is a link"):
        unpack(archive, tmp_path / "out")


def test_a_sparse_file_is_left_out(tmp_path):
    if shutil.which("tar") is None:
        pytest.skip("needs tar")
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.truncate(10**9)
        file.write(PNG)
    subprocess.run(["tar", "--sparse", "-cf", tmp_path / "x.tar", "-C", tmp_path, "sparse.jpg"], check=True)
    assert archives.list_names(tmp_path / "x.tar") == []
    assert dict(archives.list_ignored(tmp_path / "x.tar")) == {"sparse.jpg": "is a sparse file"}


# Bounds


@pytest.mark.parametrize("kind", MAKERS)
def test_too_many_members_are_refused(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(archives, "BOUNDS", Bounds(members=3))
    archive = make(kind, tmp_path, {f"{kind}/{number}.jpg": PNG for kind in "ab" for number in range(2)})
    assert "holds more than 3 files" in refusal(archive)
    with pytest.raises(DataError, match="holds more than 3 files"):
        unpack(archive, tmp_path / "out", bounds=Bounds(members=3))


@pytest.mark.parametrize("kind", MAKERS)
def test_too_many_bytes_are_refused(tmp_path, kind):
    archive = make(kind, tmp_path, {"a.jpg": bytes(600_000), "b.jpg": bytes(600_000)})
    with pytest.raises(DataError, match=r"unpacks to more than 0\.001 GB"):
        unpack(archive, tmp_path / "out", bounds=Bounds(bytes=10**6))


@pytest.mark.parametrize("ending", [".zip", ".tgz", ".tar.bz2", ".tar.xz"])
def test_a_bomb_is_refused_before_it_fills_anything(tmp_path, own_cache, monkeypatch, ending):
    bounds = Bounds() if ending in (".zip", ".tgz") else Bounds(harmless_bytes=10**6)
    monkeypatch.setattr(archives, "BOUNDS", bounds)
    zeros = bytes(bounds.harmless_bytes + 5 * 10**6)
    archive = tmp_path / f"x{ending}"
    if ending == ".zip":
        make_zip(archive, {"a/1.jpg": zeros})
    else:
        make_tar(archive, {"a/1.jpg": zeros}, f"w:{ {'.tgz': 'gz', '.tar.bz2': 'bz2', '.tar.xz': 'xz'}[ending] }")
    assert archive.stat().st_size < 150_000
    assert "more than 200 times its size" in refusal(archive)
    with pytest.raises(DataError, match="more than 200 times its size"):
        unpack(archive, tmp_path / "out", bounds=bounds)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    assert not [file for file in own_cache.rglob("*") if file.is_file() and file.suffix != ".lock"]


def test_blank_pictures_up_to_a_harmless_size_are_no_bomb(tmp_path):
    contents = {f"{kind}/1.bmp": bytes(20 * 10**6) for kind in "ab"}
    archive = make_zip(tmp_path / "x.zip", contents)
    assert archive.stat().st_size < 40 * 10**6 / 500
    assert len(read(archive).samples) == 2


def test_a_header_that_claims_to_be_huge_is_not_read_into_memory(tmp_path):
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.XHDTYPE, 50 * 2**30
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(entry.tobuf(tarfile.GNU_FORMAT))
        file.truncate(51 * 2**30)
    assert "a header of " in refusal(tmp_path / "x.tar")


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_headers_that_lead_backwards_are_refused_and_not_read_for_ever(tmp_path, kind):
    first = tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT)
    header = bytearray(first)
    header[156:157] = kind
    header[124:136] = b"\xff" * 8 + (2**32 - 512).to_bytes(4, "big")  # a size of -512
    header[483:495] = b"00000000144\0"  # of a sparse file: its whole size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(first + bytes(header) + first + bytes(1024))
    assert "cannot be read as an archive" in refusal(tmp_path / "x.tar")


def test_a_zip_with_fields_of_64_bits_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)  # so that few members are counted in 64 bits too
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as opened:
        for number in range(5):
            with opened.open(f"{number}.png", "w", force_zip64=True) as member:
                member.write(png(number))
    assert b"PK\x06\x06" in (tmp_path / "x.zip").read_bytes()
    assert [read_bytes(tmp_path / f"x.zip::{number}.png") for number in range(5)] == [
        png(number) for number in range(5)
    ]


# Unpacking


@pytest.mark.parametrize("ending", KINDS)
def test_unpacking_gives_the_files_and_a_note_of_what_they_came_from(tmp_path, make_shapes, ending):
    folder = make_shapes(tmp_path / "folder", 2)
    archive = pack(folder, tmp_path / f"x{ending}")
    shown = []
    count = unpack(archive, tmp_path / "out", checksum="md5:1", track=lambda items, total: shown.append(total) or items)
    assert count == 6 and shown == [6]
    for file in folder.rglob("*.png"):
        assert (tmp_path / "out" / file.relative_to(folder)).read_bytes() == file.read_bytes()
    assert archives.read_note(tmp_path / "out") == {"archive": f"x{ending}", "checksum": "md5:1", "files": 6}
    assert read(tmp_path / "out").ignored == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "out", archive.name]


def test_what_was_unpacked_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch, quick_disk):
    monkeypatch.chdir(tmp_path)
    unpack(make_zip(Path("x.zip"), {"a.jpg": PNG}), Path("out"))
    assert quick_disk == [[tmp_path / ".out.partial", tmp_path / "x.zip"]]


def test_a_folder_that_was_not_unpacked_has_no_note(tmp_path):
    assert archives.read_note(tmp_path) == {}
    for text in ("[]", "{", "1"):
        (tmp_path / archives.NOTE).write_text(text)
        assert archives.read_note(tmp_path) == {}


def test_permissions_are_not_taken_over(tmp_path):
    archive = make_tar(tmp_path / "x.tar", {"a.jpg": PNG}, mode="w", uid=1234)
    with tarfile.open(archive, "w") as opened:
        entry = tarfile.TarInfo("a.jpg")
        entry.size, entry.mode, entry.uid = len(PNG), 0o7777, 1234
        opened.addfile(entry, io.BytesIO(PNG))
    unpack(archive, tmp_path / "out")
    status = (tmp_path / "out" / "a.jpg").stat()
    assert not status.st_mode & 0o7111 and status.st_uid == os.getuid()


def test_nothing_is_unpacked_over_what_is_there(tmp_path):
    archive = make_zip(tmp_path / "x.zip", {"a.jpg": PNG})
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="is there already"):
        unpack(archive, tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is there already"):
        unpack(archive, tmp_path / "link")


@pytest.mark.parametrize("contents", [[("a", b"1"), ("a/b", b"2")], [("a/b", b"1"), ("a", b"2")]])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_name_that_is_file_and_folder_at_once_is_refused_whole(tmp_path, kind, contents):
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(make(kind, tmp_path, contents), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_damaged_member_leaves_nothing_unpacked(tmp_path):
    archive = make_zip(tmp_path / "x.zip", {"a.jpg": PNG, "b.jpg": os.urandom(1000)}, zipfile.ZIP_STORED)
    content = bytearray(archive.read_bytes())
    content[500] ^= 1
    archive.write_bytes(content)
    with pytest.raises(DataError, match="is damaged in its archive"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "x.zip", {"a.jpg": bytes(3 * 2**20)})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 2**20}))
    with pytest.raises(DataError, match=r"unpacks to 3 MiB, and \S+ has 1 MiB free"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("ending", [".zip", ".tgz"])
def test_a_disk_that_fills_up_leaves_nothing_unpacked(tmp_path, ending, request):
    contents = {"a.jpg": PNG, "b.jpg": os.urandom(3 * 2**20)}
    archive = tmp_path / f"x{ending}"
    make_zip(archive, contents) if ending == ".zip" else make_tar(archive, contents, "w:gz")
    request.getfixturevalue("small_disk")
    with pytest.raises(DataError, match="File too large"):
        unpack(archive, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [archive]


SLOW_UNPACKING = """
import sys, time
from pathlib import Path
from headstart import archives

def slowly(members, total):
    for number, member in enumerate(members):
        print(number, flush=True)
        time.sleep(0.01 if number < 20 else 60)
        yield member

archives.unpack(Path(sys.argv[1]), Path(sys.argv[2]), track=slowly)
"""


@pytest.mark.parametrize("ending", [".zip", ".tgz"])
def test_a_kill_while_unpacking_leaves_nothing_under_the_targets_name_and_the_next_attempt_is_whole(tmp_path, ending):
    contents = {f"{number % 3}/{number}.jpg": os.urandom(1000) for number in range(40)}
    archive = tmp_path / f"x{ending}"
    make_zip(archive, contents) if ending == ".zip" else make_tar(archive, contents, "w:gz")
    command = [sys.executable, "-c", SLOW_UNPACKING, archive, tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 20:
                break
        process.kill()
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / ".out.partial").rglob("*.jpg"))) == 20
    assert unpack(archive, tmp_path / "out") == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", archive.name]
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in contents.items())


def test_an_interrupt_while_unpacking_leaves_nothing_behind(tmp_path):
    archive = make_zip(tmp_path / "x.zip", {"a.jpg": PNG, "b.jpg": PNG})

    def interrupted(members, total):
        yield next(iter(members))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(archive, tmp_path / "out", track=interrupted)
    assert sorted(tmp_path.iterdir()) == [archive]


# Speed


def test_opening_an_archive_again_costs_nothing_and_members_are_read_in_place(tmp_path, monkeypatch):
    archive = make_tar(tmp_path / "x.tar", {f"{number}.jpg": PNG for number in range(2000)})
    archives.list_names(archive)
    monkeypatch.setattr(tarfile, "open", None)  # whoever opened it again would fail
    start = time.perf_counter()
    assert all(archives.read(f"{archive}::{number}.jpg") == PNG for number in range(2000))
    assert time.perf_counter() - start < 2


def test_names_of_archives_lose_their_endings():
    names = {"a.zip": "a", "a.b.tar.gz": "a.b", "A.TGZ": "A", "a.txt": "a.txt", "a.tar.xz": "a", "tar.gz": "tar.gz"}
    assert {name: archives.strip_ending(name) for name in names} == names
