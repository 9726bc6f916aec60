import io
import os
import pickle
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from headstart import data
from headstart.config import DataConfig
from headstart.data import read
from headstart.errors import DataError

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


def test_classes_come_from_training_alone(tmp_path):
    dataset = read(fill(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "test/b/2.jpg"))
    assert dataset.classes == ("a", "b", "c")


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_training_lacks_is_refused_by_name(tmp_path, split):
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


@pytest.mark.parametrize("name", ["data.zip", "data.tar.gz", "DATA.TGZ", "data.7z", "data.rar"])
def test_an_archive_is_refused_with_the_advice_to_unpack_it(tmp_path, name):
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
    found, others = data.find_pictures([tmp_path / "a", f"{tmp_path}/b/*.png", tmp_path / "b" / "x [1].png"])
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
    assert data.find_pictures([tmp_path / name]) == ([tmp_path / name], 0)


# Tables

ROWS = ("a.jpg,cat", "b.jpg,dog")


@pytest.fixture
def pictures(tmp_path):
    """A folder with two pictures, a.jpg and b.jpg."""
    return fill(tmp_path / "data", "a.jpg", "b.jpg")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_tables_are_read_in_every_usual_delimiter_and_encoding(pictures, delimiter, encoding):
    lines = ("image,label", "a.jpg,猫", "b.jpg,狗")
    path = table(pictures, *(line.replace(",", delimiter) for line in lines), encoding=encoding)
    assert labels(read(path)) == {"a.jpg": "猫", "b.jpg": "狗"}


def test_a_tsv_is_split_at_tabs_whatever_else_its_header_holds(pictures):
    path = table(pictures, "image\tlabel\tx,y,z", "a.jpg\tcat, big\t", "b.jpg\tdog\t", name="t.tsv")
    assert labels(read(path)) == {"a.jpg": "cat, big", "b.jpg": "dog"}


@pytest.mark.parametrize("ending", ["\r\n", "\r", "\n"])
def test_a_table_may_end_its_lines_in_any_way(pictures, ending):
    path = pictures / "table.csv"
    path.write_bytes(ending.join(("image,label", *ROWS)).encode())
    assert labels(read(path)) == {"a.jpg": "cat", "b.jpg": "dog"}


def test_blank_lines_are_passed_over(pictures):
    path = table(pictures, "image,label", "", ROWS[0], ",", ROWS[1], "", "")
    assert labels(read(path)) == {"a.jpg": "cat", "b.jpg": "dog"}


def test_blank_lines_before_the_header_are_passed_over(pictures):
    assert labels(read(table(pictures, "", "", "image,label", *ROWS))) == {"a.jpg": "cat", "b.jpg": "dog"}


def test_quoted_cells_hold_delimiters_quotes_and_newlines(tmp_path):
    names = ("with, comma.jpg", 'say ""hi"".jpg', "two\nlines.jpg")
    fill(tmp_path, *(name.replace('""', '"') for name in names))
    path = table(tmp_path, "image,label", *(f'"{name}","{label}"' for name, label in zip(names, "xyx", strict=True)))
    assert labels(read(path)) == {"with, comma.jpg": "x", 'say "hi".jpg': "y", "two\nlines.jpg": "x"}


def test_a_table_with_a_broken_quote_is_refused(pictures):
    assert "is not a table" in refusal(table(pictures, "image,label", 'a.jpg,"cat"x', "b.jpg,dog"))


@pytest.mark.parametrize("image", ["image", "Source", "path", "FILE_NAME", "filename", "image_id", " img "])
@pytest.mark.parametrize("label", ["label", "Class", "CATEGORY", "breed"])
def test_columns_are_found_by_name_in_any_order_and_case(pictures, image, label):
    path = table(pictures, f"{label},other,{image}", "cat,1,a.jpg", "dog,2,b.jpg")
    assert labels(read(path)) == {"a.jpg": "cat", "b.jpg": "dog"}


def test_columns_named_by_settings_win_over_those_found_by_name(pictures):
    path = table(pictures, "image,label,Was,What", "x.jpg,x,a.jpg,cat", "y.jpg,y,b.jpg,dog")
    dataset = read(path, DataConfig(image_column="was", label_column="What"))
    assert labels(dataset) == {"a.jpg": "cat", "b.jpg": "dog"}


@pytest.mark.parametrize("setting", ["image_column", "label_column", "split_column", "group_column"])
def test_a_column_that_is_not_there_is_refused_with_the_nearest_name(pictures, setting):
    path = table(pictures, "image,label,fancy", "a.jpg,cat,1", "b.jpg,dog,2")
    message = refusal(path, DataConfig(**{setting: "fency"}))
    assert "'fency', did you mean 'fancy'?" in message
    assert "image, label, fancy" in message


@pytest.mark.parametrize(("header", "flag"), [("x,label", "--image-column"), ("image,x", "--label-column")])
def test_a_table_without_known_columns_is_refused_with_the_flag_that_helps(pictures, header, flag):
    message = refusal(table(pictures, header, *ROWS))
    assert flag in message
    assert "x" in message


@pytest.mark.parametrize("lines", [(), ("image,label",), ("image,label", "", ",")])
def test_a_table_without_rows_is_refused(pictures, lines):
    assert refusal(table(pictures, *lines)).startswith(f"data: {pictures}")


@pytest.mark.parametrize("column", ["label", "class", "category"])
def test_a_single_label_is_never_split(pictures, column):
    path = table(pictures, f"image\t{column}", "a.jpg\tblack | white; a, b", "b.jpg\tdog", name="t.tsv")
    dataset = read(path)
    assert dataset.task == "single"
    assert dataset.classes == ("black | white; a, b", "dog")


@pytest.mark.parametrize("column", ["labels", "tags"])
@pytest.mark.parametrize("cell", ["sky|old tree", "sky;old tree", "sky, old tree", " old tree | sky |sky"])
def test_several_labels_are_split_at_the_strongest_mark(pictures, column, cell):
    dataset = read(table(pictures, f"image\t{column}", f"a.jpg\t{cell}", "b.jpg\tsky", name="t.tsv"))
    assert dataset.task == "multi"
    assert dataset.classes == ("old tree", "sky")
    assert dataset.samples[0].labels == ("old tree", "sky")


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("sky tree  sea", ("sea", "sky", "tree")),
        ("a, b|c, d", ("a, b", "c, d")),
        ("a b;c", ("a b", "c")),
        ("", ()),
        ("|", ()),
        ("10 9", ("9", "10")),
    ],
)
def test_the_labels_in_a_cell(pictures, cell, expected):
    rows = ("image\ttags", f"a.jpg\t{cell}", "b.jpg\tx|y")
    assert read(table(pictures, *rows, name="t.tsv")).samples[0].labels == expected


def test_a_given_separator_wins(pictures):
    path = table(pictures, "image,tags", "a.jpg,a|b/c", "b.jpg,c")
    assert read(path, DataConfig(separator="/")).classes == ("a|b", "c")


def test_the_task_that_is_set_wins_over_the_column_name(pictures):
    single = read(table(pictures, "image,labels", "a.jpg,x|y", "b.jpg,z"), DataConfig(task="single"))
    multi = read(table(pictures, "image,label", "a.jpg,x|y", "b.jpg,z"), DataConfig(task="multi"))
    assert (single.task, single.classes) == ("single", ("x|y", "z"))
    assert (multi.task, multi.classes) == ("multi", ("x", "y", "z"))


def test_repeated_rows_are_merged_and_counted(pictures):
    dataset = read(table(pictures, "image,label", *ROWS, ROWS[0], f"./{ROWS[0]}"))
    assert labels(dataset) == {"a.jpg": "cat", "b.jpg": "dog"}
    assert any(notice.startswith("2 rows") for notice in dataset.notices)


def test_repeated_rows_of_several_labels_are_united(pictures):
    dataset = read(table(pictures, "image,labels", "a.jpg,x", "b.jpg,z", "a.jpg,y"))
    assert labels(dataset) == {"a.jpg": "x+y", "b.jpg": "z"}


def test_contradicting_labels_are_refused_by_row_number(pictures):
    message = refusal(table(pictures, "image,label", *ROWS, "a.jpg,dog"))
    assert "row 4" in message
    assert "'dog'" in message
    assert "'cat'" in message


def test_a_second_split_for_a_picture_is_refused(pictures):
    message = refusal(table(pictures, "image,label,split", "a.jpg,x,train", "b.jpg,y,train", "a.jpg,x,test"))
    assert "row 4" in message
    assert "second group or split" in message


def test_missing_pictures_are_named_by_row_number_the_first_three_of_them(pictures):
    message = refusal(table(pictures, "image,label", *ROWS, *(f"gone{n}.jpg,cat" for n in range(5))))
    assert "row 4: 'gone0.jpg' is not found" in message
    assert "row 6" in message
    assert "row 7" not in message
    assert "2 more" in message
    assert "--images" in message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a.jpg", "row 3: has 1 cells"),
        (",cat,", "row 3: names no picture"),
        ("a.jpg, ,", "row 3: has no label"),
        ("a.jpg,cat,holdout", "unknown split 'holdout'"),
        ("x" * 300 + ".jpg,cat,", "row 3: 'xxx"),
    ],
    ids=["short", "no picture", "no label", "unknown split", "a name that no file can have"],
)
def test_a_wrong_row_is_refused_by_number(pictures, row, words):
    assert words in refusal(table(pictures, "image,label,split", "b.jpg,dog,", row))


def test_pictures_are_found_below_the_images_folder(tmp_path):
    fill(tmp_path / "elsewhere", "x/a.jpg", "b.jpg")
    path = table(tmp_path / "data", "image,label", "x/a.jpg,cat", "b.jpg,dog")
    dataset = read(path, DataConfig(images=str(tmp_path / "elsewhere")))
    assert sorted(labels(dataset).values()) == ["cat", "dog"]
    assert all(dataset.path(source).is_file() for source in dataset.sources)


def test_relative_paths_are_read_from_where_the_command_runs(tmp_path, monkeypatch):
    fill(tmp_path / "elsewhere", "a.jpg")
    table(fill(tmp_path / "data", "b.jpg"), "image,label", *ROWS)
    monkeypatch.chdir(tmp_path)
    for path, images in (("data/table.csv", "elsewhere"), ("./data/../data/table.csv", "./elsewhere/")):
        dataset = read(path, DataConfig(images=images))
        assert {dataset.path(source).resolve() for source in dataset.sources} == {
            tmp_path / "elsewhere" / "a.jpg",
            tmp_path / "data" / "b.jpg",
        }


def test_an_images_folder_that_is_none_is_refused(pictures):
    assert "is no folder" in refusal(table(pictures, "image,label", *ROWS), DataConfig(images=str(pictures / "a.jpg")))


def test_an_absolute_path_in_a_table_is_taken_as_it_is(tmp_path):
    fill(tmp_path / "elsewhere", "a.jpg", "b.jpg")
    elsewhere = tmp_path / "elsewhere"
    dataset = read(table(tmp_path / "data", "image,label", f"{elsewhere}/a.jpg,cat", f"{elsewhere}/b.jpg,dog"))
    assert labels(dataset) == {f"{elsewhere}/a.jpg": "cat", f"{elsewhere}/b.jpg": "dog"}
    assert dataset.path(dataset.sources[0]) == elsewhere / "a.jpg"


def test_a_name_that_only_one_file_below_has_is_found(tmp_path):
    fill(tmp_path, "deep/deeper/a.jpg", "deep/b.jpg")
    assert labels(read(table(tmp_path, "image,label", *ROWS))) == {"deep/deeper/a.jpg": "cat", "deep/b.jpg": "dog"}


def test_a_name_that_several_files_have_is_refused(tmp_path):
    fill(tmp_path, "x/a.jpg", "y/a.jpg", "b.jpg")
    assert "row 2: 'a.jpg' may be any of 2 files" in refusal(table(tmp_path, "image,label", *ROWS))


def test_a_path_beside_the_table_wins_over_the_same_name_elsewhere(tmp_path):
    fill(tmp_path, "a.jpg", "x/a.jpg", "b.jpg")
    assert set(labels(read(table(tmp_path, "image,label", *ROWS)))) == {"a.jpg", "b.jpg"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train", "val", "test"), ("fit", "select", "report")),
        (("Training", "VALID", "Testing"), ("fit", "select", "report")),
        (("fit", "select", "report"), ("fit", "select", "report")),
        (("train", "train", "val"), ("fit", "fit", "report")),
        (("train", "train", "test"), ("fit", "fit", "report")),
        (("fit", "fit", "report"), ("fit", "fit", "report")),
        (("train", "train", "train"), ("", "", "")),
        (("", "", ""), ("", "", "")),
    ],
)
@pytest.mark.parametrize("column", ["split", "Subset", "role"])
def test_the_split_column_gives_the_roles(tmp_path, names, expected, column):
    fill(tmp_path, *(f"{number}{kind}.jpg" for number in range(3) for kind in "xy"))
    rows = [f"{number}{kind}.jpg,{kind},{name}" for number, name in enumerate(names) for kind in "xy"]
    dataset = read(table(tmp_path, f"image,label,{column}", *rows))
    assert roles(dataset) == {f"{number}{kind}.jpg": expected[number] for number in range(3) for kind in "xy"}


@pytest.mark.parametrize(
    ("splits", "words"),
    [(("train", "train", ""), "for some pictures only"), (("val", "test", "test"), "no labels for")],
)
def test_splits_that_make_no_sense_are_refused(tmp_path, splits, words):
    fill(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    rows = [f"{number}.jpg,{'xyx'[number]},{name}" for number, name in enumerate(splits)]
    assert words in refusal(table(tmp_path, "image,label,split", *rows))


def test_classes_of_a_table_come_from_its_training_rows(tmp_path):
    fill(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    rows = ("0.jpg,a,train", "1.jpg,b,train", "2.jpg,zebra,test")
    assert "'zebra'" in refusal(table(tmp_path, "image,label,split", *rows))


@pytest.mark.parametrize("column", ["group", "patient", "Subject_ID"])
def test_the_group_column_gives_the_groups(pictures, column):
    dataset = read(table(pictures, f"image,label,{column}", "a.jpg,cat, p1", "b.jpg,dog,"))
    assert [sample.group for sample in dataset.samples] == ["p1", ""]


def test_split_and_group_columns_may_be_named(pictures):
    path = table(pictures, "image,label,part,owner,split", "a.jpg,cat,train,o1,x", "b.jpg,dog,train,o2,x")
    dataset = read(path, DataConfig(split_column="part", group_column="owner"))
    assert [sample.group for sample in dataset.samples] == ["o1", "o2"]


def test_known_classes_measure_a_table_with_one_class(pictures):
    dataset = read(table(pictures, "image,label", "a.jpg,dog", "b.jpg,dog"), classes=("cat", "dog"))
    assert dataset.classes == ("cat", "dog")


def test_a_folder_of_one_table_and_a_folder_of_images_is_read_as_the_table(tmp_path):
    fill(tmp_path, "images/a.jpg", "images/b.jpg")
    dataset = read(table(tmp_path, "image,label", *ROWS).parent)
    assert labels(dataset) == {"images/a.jpg": "cat", "images/b.jpg": "dog"}


def test_a_folder_of_pictures_and_one_table_that_names_its_columns_by_settings_is_read_as_the_table(pictures):
    path = table(pictures, "was,what", *ROWS)
    dataset = read(path.parent, DataConfig(image_column="was", label_column="what"))
    assert labels(dataset) == {"a.jpg": "cat", "b.jpg": "dog"}


def test_class_folders_with_a_stray_table_are_read_as_class_folders(tmp_path):
    fill(tmp_path, "x/a.jpg", "y/b.jpg")
    table(tmp_path, "image,label", *ROWS)
    dataset = read(tmp_path)
    assert dataset.classes == ("x", "y")
    assert [source for source, _ in dataset.ignored] == ["table.csv"]


def test_a_table_beside_folders_that_only_hold_the_parts_of_its_pictures_is_read_as_the_table(tmp_path):
    # No class folders: train and test hold pictures directly, and the table says what they show.
    fill(tmp_path, "train/a.jpg", "train/b.jpg", "test/c.jpg")
    table(tmp_path, "image,label", "train/a.jpg,cat", "train/b.jpg,dog", name="train.csv")
    assert labels(read(tmp_path)) == {"train/a.jpg": "cat", "train/b.jpg": "dog"}


@pytest.mark.parametrize("extra", ["second.csv", "second.tsv"])
def test_two_tables_in_a_folder_are_not_chosen_from(tmp_path, extra):
    fill(tmp_path, "images/a.jpg", "images/b.jpg")
    table(tmp_path, "image,label", *ROWS)
    table(tmp_path, "image,label", *ROWS, name=extra)
    assert "only the class 'images'" in refusal(tmp_path)


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES.keys())
def test_odd_names_in_a_table_are_kept_as_they_are(tmp_path, name):
    fill(tmp_path, f"{name}.jpg", "b.jpg")
    quoted = name.replace('"', '""')
    dataset = read(table(tmp_path, "image,label", f'"{quoted}.jpg","{quoted}"', "b.jpg,dog"))
    assert labels(dataset) == {f"{name}.jpg": name, "b.jpg": "dog"}


def test_names_with_spaces_at_their_ends_are_found(tmp_path):
    fill(tmp_path, " a.jpg", "b ")
    assert set(labels(read(table(tmp_path, "image,label", " a.jpg,cat", "b ,dog")))) == {" a.jpg", "b "}


@bytes_in_names
@pytest.mark.parametrize("place", ["beside", "images", "below"])
def test_names_in_a_table_that_are_no_text_are_found(tmp_path, place):
    # These bytes can be read as GB18030 too; that the file is there tells what is meant.
    name = os.fsdecode(b"\xe9t\xe9s.jpg")
    folder = {"beside": tmp_path / "data", "images": tmp_path / "images", "below": tmp_path / "data" / "below"}[place]
    fill(folder, name, "b.jpg")
    (tmp_path / "data").mkdir(exist_ok=True)
    path = tmp_path / "data" / "table.csv"
    path.write_bytes(b"image,label\n\xe9t\xe9s.jpg,summer\nb.jpg,winter\n")
    dataset = read(path, DataConfig(images=str(folder) if place == "images" else ""))
    assert sorted(labels(dataset).values()) == ["summer", "winter"]
    assert all(dataset.path(source).is_file() for source in dataset.sources)
