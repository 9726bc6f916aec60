import os

import pytest

from headstart.config import DataConfig
from headstart.reading import read
from test_reading import ODD_NAMES, bytes_in_names, fill, labels, refusal, roles, table

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


def test_a_picture_may_be_named_without_its_ending_or_with_backslashes(tmp_path):
    fill(tmp_path, "train/000b.jpg", "train/001c.jpg")
    path = table(tmp_path, "id,breed", "000b,cat", "pictures\\train\\001c.jpg,dog")
    assert labels(read(path)) == {"train/000b.jpg": "cat", "train/001c.jpg": "dog"}
