import io
import os
import pickle
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from headstart import data, reading
from headstart.config import DataConfig
from headstart.errors import DataError
from headstart.reading import read

# Only some file systems hold names that are no text.
bytes_in_names = pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any bytes as name")
ODD_NAMES = {
    "spaces": "my cat  2",
    "chinese": "狗与猫",
    "emoji": "🐱‍👤",
    "quotes": "a \"quoted\" 'cat', really; yes|no",
    "newline": "two\nlines",
    "formula": "=1+1",
    "percent": "100%s {x} *?[a]",
}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


def fill(folder, *sources):
    """Put a small picture at each place below a folder."""
    for source in sources:
        path = folder / source
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
    return folder


def table(folder, *lines, name="table.csv", encoding="utf-8"):
    """A table of lines below a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes("".join(line + "\n" for line in lines).encode(encoding))
    return path


def labels(dataset):
    """Source -> label, or labels joined by +."""
    return {sample.source: "+".join(sample.labels) for sample in dataset.samples}


def roles(dataset):
    return {sample.source: sample.role for sample in dataset.samples}


def refusal(path, config=None, classes=None):
    """The text of the error that reading ends with."""
    with pytest.raises(DataError) as caught:
        read(path, config, classes)
    return str(caught.value)


# Folders


def test_flat_class_folders_are_read_without_roles(tmp_path):
    dataset = read(fill(tmp_path, "cat/1.jpg", "cat/2.jpg", "dog/1.jpg"))
    assert labels(dataset) == {"cat/1.jpg": "cat", "cat/2.jpg": "cat", "dog/1.jpg": "dog"}
    assert dataset.classes == ("cat", "dog")
    assert (dataset.task, dataset.root) == ("single", tmp_path)
    assert not dataset.has_roles
    assert dataset.path("cat/1.jpg").read_bytes() == PNG


@pytest.mark.parametrize("train", ["train", "training", "Train", "TRAINING"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "Valid", "VALIDATION"])
@pytest.mark.parametrize("test", ["test", "testing", "Test", "TESTING"])
def test_split_folders_are_known_by_every_name_in_any_case(tmp_path, train, val, test):
    dataset = read(fill(tmp_path, *(f"{split}/{kind}/1.png" for split in (train, val, test) for kind in "ab")))
    assert dataset.classes == ("a", "b")
    expected = {train: "fit", val: "select", test: "report"}
    assert roles(dataset) == {f"{split}/{kind}/1.png": role for split, role in expected.items() for kind in "ab"}


@pytest.mark.parametrize("second", ["val", "test"])
def test_the_second_of_two_given_splits_is_the_report_whole(tmp_path, second):
    dataset = read(fill(tmp_path, "train/a/1.jpg", "train/b/1.jpg", f"{second}/a/2.jpg", f"{second}/b/2.jpg"))
    assert {sample.role for sample in dataset.samples if sample.source.startswith("train")} == {"fit"}
    assert {sample.role for sample in dataset.samples if sample.source.startswith(second)} == {"report"}
    assert dataset.has_roles
    assert [sample.source for sample in dataset.of_role("report")] == [f"{second}/a/2.jpg", f"{second}/b/2.jpg"]


def test_a_lone_train_folder_leaves_the_roles_open(tmp_path):
    dataset = read(fill(tmp_path, "train/a/1.jpg", "train/b/1.jpg"))
    assert dataset.classes == ("a", "b")
    assert set(roles(dataset).values()) == {""}


def test_two_folders_for_one_split_are_read_as_one(tmp_path):
    # The mistake: `start = len(strlabels)`, with which classes of two folders collide.
    dataset = read(fill(tmp_path, "train/a/1.jpg", "Training/b/1.jpg", "test/a/2.jpg"))
    assert roles(dataset) == {"train/a/1.jpg": "fit", "Training/b/1.jpg": "fit", "test/a/2.jpg": "report"}


@pytest.mark.parametrize("split", ["", "train/"])
def test_deeper_folders_belong_to_the_class_above(tmp_path, split):
    dataset = read(fill(tmp_path, f"{split}cat/1.jpg", f"{split}cat/tabby/old/2.jpg", f"{split}dog/3.jpg"))
    assert labels(dataset) == {
        f"{split}cat/1.jpg": "cat",
        f"{split}cat/tabby/old/2.jpg": "cat",
        f"{split}dog/3.jpg": "dog",
    }


@pytest.mark.parametrize("split", ["", "train/"])
def test_leaf_makes_each_folder_with_pictures_a_class(tmp_path, split):
    fill(tmp_path, f"{split}cat/1.jpg", f"{split}cat/tabby/2.jpg", f"{split}dog/pug/3.jpg")
    dataset = read(tmp_path, DataConfig(classes="leaf"))
    assert dataset.classes == ("cat", "cat/tabby", "dog/pug")
    assert labels(dataset)[f"{split}cat/tabby/2.jpg"] == "cat/tabby"


@pytest.mark.parametrize("kinds", [("train", "bus"), ("train", "test", "bus"), ("Training", "validation", "bus")])
def test_a_folder_named_like_a_split_that_holds_pictures_directly_is_a_class(tmp_path, kinds):
    dataset = read(fill(tmp_path, *(f"{kind}/1.jpg" for kind in kinds)))
    assert set(dataset.classes) == set(kinds)
    assert not dataset.has_roles


def test_a_folder_beside_the_splits_is_left_out_and_said(tmp_path):
    dataset = read(fill(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "extra/a/2.jpg", "test/3.jpg", "cover.jpg"))
    assert set(labels(dataset)) == {"train/a/1.jpg", "train/b/1.jpg"}
    assert {source for source, _ in dataset.ignored} == {"extra/a/2.jpg", "test/3.jpg", "cover.jpg"}
    assert any("'extra'" in notice for notice in dataset.notices)
    assert any("'test'" in notice for notice in dataset.notices)


HIDDEN = [".DS_Store", "Thumbs.db", "THUMBS.DB", "desktop.ini", "._1.jpg", ".1.jpg", ".git/1.jpg", "@eaDir/1.jpg"]


@pytest.mark.parametrize("name", [*HIDDEN, "__MACOSX/1.jpg"])
def test_what_the_system_keeps_is_neither_picture_nor_class_nor_worth_a_word(tmp_path, name):
    fill(tmp_path, "a/1.jpg", "b/1.jpg", name, f"a/{name}")
    for config in (DataConfig(), DataConfig(classes="leaf")):
        dataset = read(tmp_path, config)
        assert set(labels(dataset)) == {"a/1.jpg", "b/1.jpg"}
        assert dataset.classes == ("a", "b")
        assert dataset.ignored == ()


def test_a_packed_mac_folder_does_not_hide_the_splits(tmp_path):
    dataset = read(fill(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "__MACOSX/train/a/._1.jpg", "test/a/2.jpg"))
    assert set(labels(dataset)) == {"train/a/1.jpg", "train/b/1.jpg", "test/a/2.jpg"}
    assert dataset.notices == ()


def test_pictures_are_told_by_content_where_the_ending_says_nothing(tmp_path):
    fill(tmp_path, "a/no_suffix", "a/odd.suffix", "b/1.jpg")
    (tmp_path / "a" / "notes.txt").write_text("not a picture at all")
    (tmp_path / "a" / "empty").write_bytes(b"")
    dataset = read(tmp_path)
    assert set(labels(dataset)) == {"a/no_suffix", "a/odd.suffix", "b/1.jpg"}
    ignored = dict(dataset.ignored)
    assert set(ignored) == {"a/notes.txt", "a/empty"}
    assert all("not a picture" in why for why in ignored.values())


@pytest.mark.parametrize("name", ["1.JPG", "1.Jpeg", "1.jpg", "1.PNG", "1.webp", "1.TIFF", "1.gif", "1.bmp"])
def test_pictures_with_a_known_ending_in_any_case_are_found_without_being_opened(tmp_path, name):
    # The mistake: only `*.jpg`, which misses .jpeg, .JPG and .png.
    fill(tmp_path, f"a/{name}", "b/1.jpg")
    (tmp_path / "a" / name).write_bytes(b"a broken picture is reported later, not lost here")
    assert f"a/{name}" in labels(read(tmp_path))


def test_a_broken_link_to_a_picture_is_kept_for_the_audit_to_name(tmp_path):
    fill(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert "a/gone.jpg" in labels(read(tmp_path))


def test_a_pipe_is_named_and_never_opened(tmp_path):
    fill(tmp_path, "a/1.jpg", "b/1.jpg")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    assert read(tmp_path).ignored == (("a/pipe.jpg", "not a regular file"),)


def test_classes_and_pictures_stand_in_natural_order(tmp_path):
    # The mistake: numeric folder names sorted as text.
    fill(tmp_path, *(f"{number}/{name}.jpg" for number in ("10", "1", "2") for name in ("x10", "x9")))
    dataset = read(tmp_path)
    assert dataset.classes == ("1", "2", "10")
    assert dataset.sources[:3] == ("1/x9.jpg", "1/x10.jpg", "2/x9.jpg")


@given(st.lists(st.text(alphabet="ab1²०-_ Éß", max_size=6), max_size=8))
@settings(max_examples=50, deadline=None)
def test_natural_order_is_total_and_tells_all_names_apart(names):
    ordered = sorted(names, key=data.natural_key)
    assert ordered[::-1] == sorted(names, key=data.natural_key, reverse=True)
    assert len({repr(data.natural_key(name)) for name in names}) == len(set(names))
    assert all(data.natural_key(one) <= data.natural_key(other) for one, other in pairwise(ordered))


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES.keys())
def test_odd_names_of_classes_and_pictures_are_kept_as_they_are(tmp_path, name):
    dataset = read(fill(tmp_path, f"{name}/{name}.jpg", "plain/1.jpg"))
    assert labels(dataset)[f"{name}/{name}.jpg"] == name
    assert name in dataset.classes
    assert dataset.path(f"{name}/{name}.jpg").is_file()


@bytes_in_names
def test_names_that_are_no_text_are_kept_as_they_are(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    dataset = read(fill(tmp_path, f"{name}/{name}.jpg", "plain/1.jpg"))
    assert dataset.classes == (name, "plain")
    assert dataset.path(f"{name}/{name}.jpg").is_file()
    assert len(dataset.fingerprint) == 64


def test_a_linked_class_folder_is_read_under_the_name_of_the_link(tmp_path):
    fill(tmp_path / "elsewhere", "1.jpg", "deep/2.jpg")
    folder = fill(tmp_path / "data", "dog/1.jpg")
    (folder / "cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert labels(read(folder)) == {"cat/1.jpg": "cat", "cat/deep/2.jpg": "cat", "dog/1.jpg": "dog"}


def test_a_linked_data_folder_is_read(tmp_path):
    fill(tmp_path / "real", "cat/1.jpg", "dog/1.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert read(tmp_path / "link").classes == ("cat", "dog")


@pytest.mark.parametrize("place", ["back", "cat/back", "cat/deep/back"])
def test_a_cycle_of_links_is_cut(tmp_path, place):
    fill(tmp_path, "cat/1.jpg", "cat/deep/2.jpg", "dog/1.jpg")
    (tmp_path / place).symlink_to(tmp_path, target_is_directory=True)
    assert set(labels(read(tmp_path))) == {"cat/1.jpg", "cat/deep/2.jpg", "dog/1.jpg"}


def test_a_link_to_itself_is_no_picture_and_no_reason_to_stop(tmp_path):
    fill(tmp_path, "cat/1.jpg", "dog/1.jpg")
    (tmp_path / "cat" / "loop").symlink_to(tmp_path / "cat" / "loop")
    assert set(labels(read(tmp_path))) == {"cat/1.jpg", "dog/1.jpg"}


def test_a_folder_that_is_reached_in_two_ways_is_not_lost_without_a_word(tmp_path):
    # A test folder that links into the training folder is a leak that the audit must see, not pictures that vanish.
    fill(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "test/dog/2.jpg")
    (tmp_path / "test" / "cat").symlink_to(tmp_path / "train" / "cat", target_is_directory=True)
    dataset = read(tmp_path)
    said = [*labels(dataset), *(source for source, _ in dataset.ignored), *dataset.notices]
    assert any("train/cat" in text for text in said)
    assert any("test/cat" in text for text in said)


@pytest.mark.parametrize("inside", ["", "train/", "a/b/c/"])
@pytest.mark.parametrize("classes", ["folder", "leaf"])
def test_one_folder_that_alone_holds_all_classes_is_looked_through_and_said(tmp_path, inside, classes):
    (tmp_path / "read me.txt").write_text("a file beside it is no picture")
    dataset = read(fill(tmp_path, f"pets/{inside}cat/1.jpg", f"pets/{inside}dog/2.jpg"), DataConfig(classes=classes))
    assert labels(dataset) == {f"pets/{inside}cat/1.jpg": "cat", f"pets/{inside}dog/2.jpg": "dog"}
    assert any("'pets" in notice for notice in dataset.notices)
    assert ("read me.txt", "outside the class folders") in dataset.ignored


def test_splits_are_found_in_one_folder_that_holds_them_all(tmp_path):
    fill(tmp_path, *(f"set/{split}/{kind}/1.jpg" for split in ("train", "val") for kind in "ab"), "set/extra/a/3.jpg")
    dataset = read(tmp_path)
    expected = {"train": "fit", "val": "report"}
    assert roles(dataset) == {f"set/{split}/{kind}/1.jpg": role for split, role in expected.items() for kind in "ab"}
    assert any("'extra'" in notice for notice in dataset.notices)


def test_a_folder_that_holds_a_picture_itself_is_no_place_to_look_through(tmp_path):
    assert "only the class 'cat'" in refusal(fill(tmp_path, "cat/1.jpg", "cat/tabby/2.jpg", "cat/pug/2.jpg"))


@pytest.mark.parametrize("classes", [("cat", "dog"), ("cat/tabby", "dog/pug")])
def test_a_folder_that_a_classifier_knows_as_a_class_is_not_looked_through(tmp_path, classes):
    fill(tmp_path, "cat/tabby/1.jpg")
    kind = "leaf" if "/" in classes[0] else "folder"
    assert labels(read(tmp_path, DataConfig(classes=kind), classes)) == {"cat/tabby/1.jpg": classes[0]}


def test_a_table_is_preferred_to_folders_within_one_folder(tmp_path):
    fill(tmp_path, "images/a/1.jpg", "images/b/2.jpg")
    table(tmp_path, "image,label", "images/a/1.jpg,x", "images/b/2.jpg,y")
    assert labels(read(tmp_path)) == {"images/a/1.jpg": "x", "images/b/2.jpg": "y"}


def test_a_table_is_found_in_the_one_folder_that_holds_everything(tmp_path):
    fill(tmp_path, "set/images/1.jpg", "set/images/2.jpg")
    table(tmp_path / "set", "image,label", "images/1.jpg,x", "images/2.jpg,y")
    assert read(tmp_path).classes == ("x", "y")


def test_a_folder_without_pictures_is_refused_with_what_it_holds_instead(tmp_path):
    fill(tmp_path, "1.jpg", "2.jpg")
    assert "2 other files; '1.jpg' outside the class folders" in refusal(tmp_path)


def test_classes_come_from_training_alone(tmp_path):
    dataset = read(fill(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "test/b/2.jpg"))
    assert dataset.classes == ("a", "b", "c")


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_training_lacks_is_refused_by_name(tmp_path, split):
    # The mistake: the class list taken from train alone.
    fill(tmp_path, "train/a/1.jpg", "train/b/1.jpg", f"{split}/a/2.jpg", f"{split}/zebra/2.jpg")
    message = refusal(tmp_path)
    assert "'zebra'" in message
    assert "'a'" not in message


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (["cat/1.jpg", "cat/2.jpg"], ["only the class 'cat'"]),
        (["train/cat/1.jpg", "test/cat/1.jpg"], ["only the class 'cat'"]),
        ([], ["no pictures"]),
        (["1.jpg", "2.jpg"], ["no pictures in class folders"]),
    ],
)
def test_a_folder_with_less_than_two_classes_is_refused(tmp_path, sources, words):
    message = refusal(fill(tmp_path, *sources))
    assert message.startswith(f"data: {tmp_path}: ")
    assert all(word in message for word in words)


def test_a_missing_folder_is_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["data.7z", "data.rar", "table.csv.gz", "DATA.ZST"])
def test_an_archive_of_another_kind_is_refused_with_the_advice_to_unpack_it(tmp_path, name):
    fill(tmp_path, name)
    message = refusal(tmp_path / name)
    assert "archive" in message
    assert "Unpack" in message


def test_a_file_that_is_neither_folder_nor_table_is_refused(tmp_path):
    fill(tmp_path, "1.jpg")
    assert "neither a folder nor a table" in refusal(tmp_path / "1.jpg")


def test_a_folder_that_may_not_be_read_is_refused_by_name(tmp_path, monkeypatch):
    # Permissions do not bind every user that runs tests, so the refusal is played.
    fill(tmp_path, "cat/1.jpg", "dog/1.jpg")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("dog"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert refusal(tmp_path).startswith(f"data: {tmp_path / 'dog'}: ")


def test_known_classes_measure_a_folder_with_fewer_classes_in_their_order(tmp_path):
    dataset = read(fill(tmp_path, "dog/1.jpg"), classes=("dog", "cat", "bird"))
    assert dataset.classes == ("dog", "cat", "bird")
    assert labels(dataset) == {"dog/1.jpg": "dog"}


def test_known_classes_refuse_others_by_name(tmp_path):
    message = refusal(fill(tmp_path, "dog/1.jpg", "wolf/1.jpg"), classes=("dog", "cat"))
    assert "'wolf'" in message
    assert "It knows: 'dog', 'cat'" in message


def test_known_classes_take_all_splits_without_roles(tmp_path):
    dataset = read(fill(tmp_path, "train/a/1.jpg", "test/b/1.jpg"), classes=("a", "b"))
    assert roles(dataset) == {"train/a/1.jpg": "", "test/b/1.jpg": ""}


def test_the_fingerprint_is_the_same_again_and_changes_with_names_labels_and_sizes(tmp_path):
    fill(tmp_path, "a/1.jpg", "b/1.jpg", "b/2.jpg")
    marks = [read(tmp_path).fingerprint, read(tmp_path).fingerprint]
    assert marks[0] == marks[1]
    (tmp_path / "a" / "1.jpg").write_bytes(PNG + b"more")
    marks.append(read(tmp_path).fingerprint)
    (tmp_path / "b" / "2.jpg").rename(tmp_path / "a" / "2.jpg")
    marks.append(read(tmp_path).fingerprint)
    (tmp_path / "a" / "2.jpg").rename(tmp_path / "a" / "3.jpg")
    marks.append(read(tmp_path).fingerprint)
    assert len(set(marks)) == 4


def test_the_fingerprint_does_not_depend_on_where_the_folder_lies(tmp_path):
    one, other = (read(fill(tmp_path / name, "a/1.jpg", "b/1.jpg")) for name in ("one", "other"))
    assert one.fingerprint == other.fingerprint


def test_a_data_set_travels_to_another_process(tmp_path):
    dataset = read(fill(tmp_path, "a/1.jpg", "b/1.jpg"))
    assert pickle.loads(pickle.dumps(dataset)) == dataset


# Paths for predictions


def test_find_pictures_takes_files_folders_and_globs_in_natural_order(tmp_path):
    fill(tmp_path, "a/10.jpg", "a/2.jpg", "a/.hidden.jpg", "b/x [1].png")
    (tmp_path / "a" / "notes.txt").write_text("text")
    found, others = reading.find_pictures([tmp_path / "a", f"{tmp_path}/b/*.png", tmp_path / "b" / "x [1].png"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "a/2.jpg",
        "a/10.jpg",
        "b/x [1].png",
        "b/x [1].png",
    ]
    assert others == 1


@pytest.mark.parametrize("name", ["absent.jpg", "absent*.jpg", "notes.txt"])
def test_find_pictures_keeps_a_path_that_was_named_there_or_not(tmp_path, name):
    (tmp_path / "notes.txt").write_text("text")
    assert reading.find_pictures([tmp_path / name]) == ([tmp_path / name], 0)


def test_split_folders_without_class_folders_are_no_classes(tmp_path):
    fill(tmp_path, "train/1.jpg", "train/2.jpg", "test/3.jpg")
    assert "no class folders below them" in refusal(tmp_path)


def test_several_labels_a_picture_need_a_table(tmp_path):
    fill(tmp_path, "cat/1.jpg", "dog/2.jpg")
    assert "which gives each picture one label" in refusal(tmp_path, DataConfig(task="multi"))
