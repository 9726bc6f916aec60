"""Drawings: the pixels that a network got, labels in any script, right and wrong told apart, fonts that lack."""

from __future__ import annotations

import base64
import io
import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from headstart import pictures
from headstart.errors import UnreadableImage, UsageError
from headstart.images import Limits, Preprocess, open_image
from headstart.model import Prediction
from headstart.pictures import MOST_BARS, denormalise, draw_answer, draw_batch, draw_predictions

SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
TILE, GAP = 224, 16  # pixels of a PNG


def noise(count, side=TILE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def texts_of(file):
    """What is written in an SVG, as text that can be found and read aloud."""
    return ["".join(text.itertext()) for text in ElementTree.parse(file).getroot().iter(f"{SVG}text")]


def images_of(file):
    """The pictures in an SVG, upright."""
    found = []
    for image in ElementTree.parse(file).getroot().iter(f"{SVG}image"):
        content = base64.b64decode(image.get(LINK).split("base64,")[1])
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        found.append(pixels[::-1] if "scale(1 -1)" in image.get("transform") else pixels)
    return found


def pixels_of(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def answer(source="a.jpg", label="ants", probability=0.75, other="bees"):
    return Prediction(source, (label,), {label: probability, other: 1 - probability})


def no_answer(source, error):
    return Prediction(source, error=error)


@pytest.fixture
def photo(tmp_path):
    """A function that saves a picture of noise and gives its file."""

    def save(name="a.png", size=(300, 200)):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, instead of files."""
    found = []
    monkeypatch.setattr(pictures, "_save", lambda figure, file: found.append(figure))
    return found


# The way back from a network's input


@given(
    st.tuples(*[st.floats(0, 1)] * 3),
    st.tuples(*[st.floats(0.05, 1)] * 3),
    st.integers(0, 2**32 - 1),
)
def test_denormalising_is_the_exact_way_back_from_normalising(mean, std, seed):
    pixels, preprocess = noise(2, 16, seed), Preprocess(mean=mean, std=std)
    values = preprocess.normalise(torch.from_numpy(pixels))
    for given_as in (values, values.contiguous(), values.numpy(), values.double()):
        back = denormalise(given_as, preprocess)
        assert back.dtype == np.uint8 and np.array_equal(back, pixels)


def test_every_level_comes_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    preprocess = Preprocess()
    assert np.array_equal(denormalise(preprocess.normalise(torch.from_numpy(pixels)), preprocess), pixels)


def test_what_a_network_in_half_precision_got_comes_back_nearly():
    pixels, preprocess = noise(1, 16), Preprocess()
    values = preprocess.normalise(torch.from_numpy(pixels)).bfloat16().requires_grad_()
    assert np.abs(denormalise(values, preprocess).astype(int) - pixels).max() <= 1


def test_values_beyond_black_and_white_are_black_and_white():
    values = np.array([-9, 9], np.float32).reshape(2, 1, 1, 1).repeat(3, 1)
    assert denormalise(values, Preprocess())[:, 0, 0].tolist() == [[0] * 3, [255] * 3]


# A batch


def test_a_batch_of_the_usual_size_is_drawn_pixel_for_pixel(tmp_path):
    batch = noise(5)
    for ending in ("png", "svg"):
        draw_batch(batch, list("abcde"), tmp_path / f"batch.{ending}", columns=3)
    assert all(map(np.array_equal, images_of(tmp_path / "batch.svg"), batch))
    drawn, row_high = pixels_of(tmp_path / "batch.png"), TILE + GAP + 22
    assert drawn.shape == (GAP + 2 * row_high, GAP + 3 * (TILE + GAP), 3)
    for number, pixels in enumerate(batch):
        top, left = GAP + number // 3 * row_high, GAP + number % 3 * (TILE + GAP)
        assert np.array_equal(drawn[top : top + TILE, left : left + TILE], pixels), number


def test_pixels_of_small_pictures_become_blocks_and_large_pictures_are_shrunk(tmp_path):
    draw_batch(noise(1, 28), ["digit"], tmp_path / "small.svg")
    (small,) = images_of(tmp_path / "small.svg")
    assert np.array_equal(small, noise(1, 28)[0].repeat(8, 0).repeat(8, 1))
    draw_batch(noise(1, 448), ["large"], tmp_path / "large.svg")
    (large,) = images_of(tmp_path / "large.svg")
    expected = Image.fromarray(noise(1, 448)[0]).resize((TILE, TILE), Image.Resampling.LANCZOS)
    assert np.array_equal(large, np.asarray(expected))


def test_a_grid_is_about_square_unless_columns_are_given(tmp_path):
    widths = {}
    for count, columns in ((1, None), (4, None), (7, None), (4, 1), (4, 9)):
        draw_batch(noise(count, 8), ["x"] * count, tmp_path / "grid.png", columns)
        widths[count, columns] = (pixels_of(tmp_path / "grid.png").shape[1] - GAP) / (TILE + GAP)
    assert widths == {(1, None): 1, (4, None): 2, (7, None): 3, (4, 1): 1, (4, 9): 4}


def test_of_many_pictures_the_first_are_drawn_and_the_others_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_TILES", 6)
    draw_batch(noise(9, 8), list("abcdefghi"), tmp_path / "batch.svg")
    assert texts_of(tmp_path / "batch.svg") == [*"abcdef", "... and 3 more"]
    assert len(images_of(tmp_path / "batch.svg")) == 6
    draw_batch(noise(6, 8), list("abcdef"), tmp_path / "all.svg")
    assert texts_of(tmp_path / "all.svg") == [*"abcdef"]


@pytest.mark.parametrize(
    ("batch", "labels", "columns", "why"),
    [
        pytest.param(noise(2, 8), ["one"], None, "labels 1", id="fewer labels"),
        pytest.param(noise(1, 8), ["one", "two"], None, "labels 2", id="more labels"),
        pytest.param(noise(1, 8).astype(np.float32), ["x"], None, "float32", id="not uint8"),
        pytest.param(noise(1, 8).transpose(0, 3, 1, 2), ["x"], None, r"\(1, 3, 8, 8\)", id="channels first"),
        pytest.param(noise(0, 8), [], None, "no pictures", id="none"),
        pytest.param(noise(1, 8), ["x"], 0, "columns", id="no columns"),
    ],
)
def test_what_is_no_batch_is_refused_with_a_remedy(tmp_path, batch, labels, columns, why):
    with pytest.raises(UsageError, match=why) as caught:
        draw_batch(batch, labels, tmp_path / "batch.png", columns)
    assert caught.value.remedy and not (tmp_path / "batch.png").exists()


# Labels


ODD = ["$x^2$", "$\\frac{", "<b>&amp;\"'", "муравей", "نملة", "蚂蚁", "🐜", "é e\u0301", "  spaces  ", ""]


def test_labels_of_any_script_are_text_in_an_svg(tmp_path):
    draw_batch(noise(len(ODD), 8), ODD, tmp_path / "batch.svg")
    assert texts_of(tmp_path / "batch.svg") == [label for label in ODD if label]
    style = re.search('style="([^"]*font[^"]*)"', (tmp_path / "batch.svg").read_text(encoding="utf-8"))[1]
    for family in ("'Noto Sans CJK SC'", "'Microsoft YaHei'", "'PingFang SC'", ", sans-serif"):
        assert family in style


def test_labels_of_any_script_are_drawn_in_a_png(tmp_path):
    draw_batch(noise(len(ODD), 8), ODD, tmp_path / "batch.png")
    assert len(np.unique(pixels_of(tmp_path / "batch.png"))) > 10


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_what_cannot_be_written_is_escaped(tmp_path, ending):
    labels = ["a\nb", "\x00\x1b[31m", "\udcff", "\ufffe", "\u202e"]
    draw_batch(noise(len(labels), 8), labels, tmp_path / f"batch.{ending}")
    if ending == "svg":
        assert texts_of(tmp_path / "batch.svg") == ["a\\nb", "\\x00\\x1b[31m", "\\udcff", "\\ufffe", "\\u202e"]


@pytest.mark.parametrize("label", ["W" * 100, "i" * 200, "a label with words " * 5, "é" * 70, "m_0123456789.jpg" * 3])
def test_a_long_label_is_shortened_in_its_middle_to_the_width_of_its_picture(tmp_path, label):
    draw_batch(noise(1, 8), [label], tmp_path / "batch.svg")
    (short,) = texts_of(tmp_path / "batch.svg")
    head, tail = short.split("…")
    assert label.startswith(head) and label.endswith(tail) and 0 <= len(head) - len(tail) <= 1
    assert 0.85 * TILE < width_of(short) < TILE + GAP / 2


def width_of(text):
    """How wide matplotlib draws text of the size used here, in pixels."""
    figure = Figure(dpi=144)
    drawn = figure.text(0, 0, text, fontsize=7.5, family="DejaVu Sans", parse_math=False)
    return drawn.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width


def test_a_label_that_fits_is_left_alone_and_chinese_counts_as_squares(tmp_path):
    draw_batch(noise(3, 8), ["W" * 14, "蚁" * 14, "蚁" * 15], tmp_path / "batch.svg")
    assert texts_of(tmp_path / "batch.svg") == ["W" * 14, "蚁" * 14, "蚁" * 7 + "…" + "蚁" * 6]


# Predictions


def test_right_and_wrong_are_told_by_mark_and_frame_and_nothing_is_said_where_the_truth_is_unknown(tmp_path, photo):
    file = photo()
    entries = [
        (file, answer("x/right.jpg"), "ants"),
        (file, answer("x/wrong.jpg", probability=0.8125), ("bees",)),
        (file, answer("x/unknown.jpg"), None),
    ]
    draw_predictions(entries, tmp_path / "drawn.svg")
    assert texts_of(tmp_path / "drawn.svg") == [
        *("✓ ants 75.0%", "right.jpg"),
        *("✗ ants 81.2%", "true: bees", "wrong.jpg"),
        *("ants 75.0%", "unknown.jpg"),
        "✓ right, ✗ wrong",
    ]
    styles = re.findall('style="(fill: none; [^"]*)"', (tmp_path / "drawn.svg").read_text(encoding="utf-8"))
    assert len(styles) == 3 and len(set(re.findall("stroke: (#......)", " ".join(styles)))) == 3
    assert ["dasharray" in style for style in styles] == [False, True, False]


def test_several_labels_are_right_only_where_all_are(tmp_path, photo):
    both = Prediction("a.jpg", ("ants", "bees"), {"ants": 0.9, "bees": 0.6, "wasps": 0.1}, multi=True)
    none = replace(both, labels=())
    entries = [(photo(), both, ("bees", "ants")), (photo(), both, ("ants",)), (photo(), none, ()), (photo(), none, "x")]
    draw_predictions(entries, tmp_path / "drawn.svg")
    assert [text for text in texts_of(tmp_path / "drawn.svg")[:-1] if text != "a.jpg"] == [
        "✓ ants 90.0%, bees 60.0%",
        *("✗ ants 90.0%, bees 60.0%", "true: ants"),
        "✓ (none)",
        *("✗ (none)", "true: x"),
    ]


def test_the_probability_of_a_long_label_stays(tmp_path, photo):
    draw_predictions([(photo(), answer(label="a label with words " * 5), "other " * 20)], tmp_path / "drawn.svg")
    predicted, true, *_ = texts_of(tmp_path / "drawn.svg")
    assert re.fullmatch("✗ a label.*….* 75.0%", predicted) and re.fullmatch("true: other.*….*", true)
    assert max(width_of(predicted), width_of(true)) < TILE + GAP / 2


def test_pictures_are_opened_upright_and_in_rgb_from_files_and_contents(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.linspace(0, 255, 40 * 80).astype(np.uint8).reshape(40, 80)
    Image.fromarray(grey).save(tmp_path / "turned.png", exif=exif)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    files = [tmp_path / "turned.png", str(tmp_path / "clear.png"), (tmp_path / "turned.png").read_bytes()]
    draw_predictions([(file, answer(), None) for file in files], tmp_path / "drawn.svg")
    turned, clear, content = images_of(tmp_path / "drawn.svg")
    assert turned.shape == (TILE, TILE // 2, 3) and np.array_equal(turned, content)
    assert turned[0, -1].max() < 10 and turned[-1, 0].min() > 245 and (clear == 255).all()


@pytest.mark.parametrize("size", [(1000, 1), (1, 1000), (1, 1), (900, 600)])
def test_a_picture_of_any_shape_fits_into_its_tile(tmp_path, photo, size):
    draw_predictions([(photo(size=size), answer(), None)], tmp_path / "drawn.svg")
    (drawn,) = images_of(tmp_path / "drawn.svg")
    assert max(drawn.shape) == TILE


def test_a_picture_that_cannot_be_read_is_named_with_the_reason_and_not_left_out(tmp_path, photo):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    entries = [
        (photo(size=(100, 100)), answer("good.jpg"), "ants"),
        (tmp_path / "broken.jpg", no_answer("x/broken.jpg", "cannot be decoded (truncated)"), "ants"),
        (tmp_path / "broken.jpg", answer("x/changed.jpg"), "ants"),
        (tmp_path / "gone.jpg", answer("x/gone.jpg"), None),
        (photo("large.png", (300, 200)), answer("x/large.jpg"), None),
    ]
    draw_predictions(entries, tmp_path / "drawn.svg", limits=Limits(pixels=10_000))
    texts = texts_of(tmp_path / "drawn.svg")
    assert len(images_of(tmp_path / "drawn.svg")) == 1
    assert {"broken.jpg", "changed.jpg", "gone.jpg", "large.jpg", "true: ants"} <= set(texts)
    reasons = " ".join(texts)
    assert "unreadable: cannot be decoded (truncated)" in reasons and "unreadable: no such file" in reasons
    assert "unreadable: is not a picture in a known format" in reasons and "over the limit" in reasons
    assert texts.count("✓ ants 75.0%") == 2  # what was answered is still said where only the picture has gone since


def test_where_nothing_can_be_read_a_drawing_says_so(tmp_path):
    reason = "because of a long chain of events, " * 20
    for ending in ("png", "svg"):
        draw_predictions([("x", no_answer("x", reason), None)] * 2, tmp_path / f"drawn.{ending}")
    assert images_of(tmp_path / "drawn.svg") == []
    assert np.array_equal(pixels_of(tmp_path / "drawn.png")[GAP + TILE - 8, GAP + TILE - 8], [0xD9] * 3)


def test_of_many_predictions_the_first_are_drawn_and_the_others_counted_without_being_opened(
    tmp_path, photo, monkeypatch
):
    monkeypatch.setattr(pictures, "MOST_TILES", 6)
    missing = [(tmp_path / "gone.png", answer("gone.png"), "ants")] * 5
    draw_predictions([(photo(), answer(), "ants")] * 6 + missing, tmp_path / "drawn.svg")
    texts = texts_of(tmp_path / "drawn.svg")
    assert texts[-2:] == ["✓ right", "... and 5 more"] and "gone.png" not in texts


# One answer


RANKED = Prediction("x/ant.jpg", ("ant",), {"ant": 0.75, "harvestman": 0.125, "stick insect": 0.0625, "x": 0.0625})


def test_bars_run_from_zero_to_one_the_most_probable_first(figures, photo):
    draw_answer(photo(), RANKED, "answer.png")
    _, chart = figures[0].axes
    assert chart.get_xlim() == (0, 1) and chart.get_xlabel() == "probability"
    assert [bar.get_width() for bar in chart.patches] == [0.75, 0.125, 0.0625]
    assert [bar.get_x() for bar in chart.patches] == [0, 0, 0]
    downwards = [-chart.transData.transform((0, bar.get_y()))[1] for bar in chart.patches]
    assert downwards == sorted(downwards)
    colours = [bar.get_facecolor() for bar in chart.patches]
    assert colours[0] != colours[1] == colours[2]


@pytest.mark.parametrize(("top", "bars"), [(1, 1), (3, 3), (9, 4)])
def test_as_many_classes_are_drawn_as_are_asked_for_and_there_are(tmp_path, photo, top, bars):
    draw_answer(photo(), RANKED, tmp_path / "answer.svg", top=top)
    expected = [("75.0%", "ant"), ("12.5%", "harvestman"), ("6.2%", "stick insect"), ("6.2%", "x")][:bars]
    texts = [text for text in texts_of(tmp_path / "answer.svg") if not re.fullmatch(r"[01]\.\d", text)]
    assert texts == ["ant.jpg", "probability", *(text for pair in expected for text in pair)]


def test_there_is_a_most_of_bars(tmp_path, photo):
    many = {f"class {number}": 0.01 for number in range(100)}
    draw_answer(photo(), Prediction("a", ("class 0",), many), tmp_path / "answer.svg", top=100)
    assert sum(text.startswith("class") for text in texts_of(tmp_path / "answer.svg")) == MOST_BARS


def test_a_second_name_stands_after_the_first_where_there_is_one(tmp_path, photo):
    draw_answer(photo(), RANKED, tmp_path / "answer.svg", names={"ant": "蚂蚁", "stick insect": "竹节虫"})
    texts = texts_of(tmp_path / "answer.svg")
    assert texts[texts.index("75.0%") :] == [
        "75.0%",
        "ant",
        "蚂蚁",
        "12.5%",
        "harvestman",
        "6.2%",
        "stick insect",
        "竹节虫",
    ]


def test_long_names_do_not_run_into_each_other(figures, photo):
    long = "a long name, another long name, and one more"
    draw_answer(photo(), Prediction("a", (long,), {long: 1.0}), "answer.png", names={long: long[::-1]})
    _, chart = figures[0].axes
    renderer = FigureCanvasAgg(figures[0]).get_renderer()
    percent, first, second = (text.get_window_extent(renderer) for text in chart.texts)
    assert first.x1 < second.x0 and second.x1 < percent.x0 and percent.x1 < figures[0].bbox.x1


def test_the_picture_is_drawn_as_it_is_opened(tmp_path, photo):
    file = photo(size=(448, 300))
    draw_answer(file, RANKED, tmp_path / "answer.png")
    drawn = pixels_of(tmp_path / "answer.png")
    assert np.array_equal(drawn[GAP : GAP + 300, GAP : GAP + 448], np.asarray(open_image(file)))


def test_an_answer_without_a_picture_or_bars_is_refused(tmp_path, photo):
    with pytest.raises(UnreadableImage, match="gone"):
        draw_answer(tmp_path / "gone.jpg", RANKED, tmp_path / "answer.png")
    with pytest.raises(UnreadableImage, match=r"x/a\.jpg: is empty"):
        draw_answer(photo(), no_answer("x/a.jpg", "is empty"), tmp_path / "answer.png")
    with pytest.raises(UsageError, match="top"):
        draw_answer(photo(), RANKED, tmp_path / "answer.png", top=0)
    assert not (tmp_path / "answer.png").exists()


# Fonts


@pytest.fixture
def only_latin(monkeypatch):
    """Only the fonts that come with matplotlib."""
    own = [entry for entry in font_manager.fontManager.ttflist if "mpl-data" in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)


@pytest.fixture
def installed(tmp_path, only_latin, monkeypatch):
    """A function that installs a font whose glyph for each given character is a full square."""

    def install(family, characters):
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        for corner in ((0, 1000), (1000, 1000), (1000, 0)):
            pen.lineTo(corner)
        pen.closePath()
        font = FontBuilder(1000, isTTF=True)
        font.setupGlyphOrder([".notdef", "square"])
        font.setupCharacterMap({ord(c): "square" for c in characters})
        font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
        font.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
        font.setupHorizontalHeader(ascent=1000, descent=0)
        font.setupNameTable({"familyName": family, "styleName": "Regular"})
        font.setupOS2()
        font.setupPost()
        file = tmp_path / f"{family}.ttf"
        font.save(file)
        before = font_manager.findSystemFonts()
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [*before, str(file)])
        monkeypatch.setattr(pictures, "_CHINESE", (*pictures._CHINESE, family))

    return install


def test_fonts_are_chosen_by_the_characters_that_they_have(installed):
    assert pictures._choose_fonts(set("ants, Ameisen, муравей ✓✗…")) == (["DejaVu Sans"], set())
    assert pictures._choose_fonts(set("ant 蚂蚁")) == (["DejaVu Sans"], {"蚂", "蚁"})
    installed("One Square", "蚂")
    assert pictures._choose_fonts(set("ant 蚂蚁")) == (["DejaVu Sans", "One Square"], {"蚁"})
    assert pictures._choose_fonts(set("ant")) == (["DejaVu Sans"], set())


def test_a_font_that_was_installed_since_draws_what_the_first_one_lacks(tmp_path, installed, caplog):
    installed("Two Squares", "蚂蚁")
    draw_batch(noise(1), ["蚂蚁"], tmp_path / "batch.png")
    below = pixels_of(tmp_path / "batch.png")[GAP + TILE + 1 :]
    assert (below.max(2) < 100).sum() > 2 * 13 * 13  # two squares of 15 pixels
    assert not caplog.records


def test_characters_that_no_font_has_become_question_marks_and_the_log_says_what_to_install(
    tmp_path, only_latin, caplog
):
    draw_batch(noise(2), ["ant 蚂", "蚁"], tmp_path / "batch.png")
    draw_batch(noise(2), ["ant ?", "?"], tmp_path / "marks.png")
    assert np.array_equal(pixels_of(tmp_path / "batch.png"), pixels_of(tmp_path / "marks.png"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for words in ("batch.png", "蚁", "蚂", "fonts-noto-cjk", "fonts-wqy-microhei", ".svg"):
        assert words in record.getMessage()


def test_a_second_name_that_no_font_has_is_left_out_and_the_log_says_so(tmp_path, photo, only_latin, caplog):
    file = photo()
    draw_answer(file, RANKED, tmp_path / "answer.png", names={"ant": "蚂蚁"})
    assert "left out" in caplog.text
    caplog.clear()
    draw_answer(file, RANKED, tmp_path / "english.png")
    assert np.array_equal(pixels_of(tmp_path / "answer.png"), pixels_of(tmp_path / "english.png"))
    assert not caplog.records


def test_an_svg_needs_no_fonts(tmp_path, only_latin, caplog):
    draw_batch(noise(1, 8), ["蚂蚁"], tmp_path / "batch.svg")
    assert texts_of(tmp_path / "batch.svg") == ["蚂蚁"] and not caplog.records


def test_a_file_that_is_no_font_is_passed_over(tmp_path, installed, monkeypatch):
    installed("A Square", "蚁")
    (tmp_path / "0.ttf").write_bytes(b"no font")
    found = [str(tmp_path / "0.ttf"), *font_manager.findSystemFonts()]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: found)
    assert pictures._choose_fonts({"蚁"}) == (["DejaVu Sans", "A Square"], set())


def test_a_font_that_was_removed_is_not_chosen(tmp_path, installed, monkeypatch):
    installed("Gone", "蚁")
    assert pictures._choose_fonts({"蚁"})[1] == set()
    (tmp_path / "Gone.ttf").unlink()
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    assert pictures._choose_fonts({"蚁"}) == (["DejaVu Sans"], {"蚁"})


def test_chinese_is_drawn_with_an_installed_font(tmp_path, caplog):
    families, missing = pictures._choose_fonts(set("蚂蚁"))
    if missing:
        pytest.skip("needs a Chinese font, such as fonts-wqy-microhei")
    draw_batch(noise(1), ["蚂蚁"], tmp_path / "batch.png")
    below = pixels_of(tmp_path / "batch.png")[GAP + TILE + 1 :]
    assert len(families) == 2 and (below.max(2) < 128).sum() > 50 and not caplog.records


# Files


@pytest.mark.parametrize("name", ["drawn.jpg", "drawn", "drawn.png.gz", ".png"])
def test_another_ending_is_refused_before_any_work_and_the_error_names_both(tmp_path, name):
    calls = [
        lambda file: draw_batch(noise(1, 8), ["x"], file),
        lambda file: draw_predictions([("gone.jpg", answer(), None)], file),
        lambda file: draw_answer("gone.jpg", RANKED, file),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=r"\.png.*\.svg"):
            call(tmp_path / name)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_endings_are_known_in_any_case(tmp_path):
    draw_batch(noise(1, 8), ["x"], tmp_path / "batch.PNG")
    draw_batch(noise(1, 8), ["x"], str(tmp_path / "batch.Svg"))
    assert (tmp_path / "batch.PNG").read_bytes()[:4] == b"\x89PNG" and texts_of(tmp_path / "batch.Svg") == ["x"]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_same_input_gives_the_same_bytes(tmp_path, photo, ending):
    file, contents = photo(), set()
    for number in range(2):
        draw_answer(file, RANKED, tmp_path / f"{number}.{ending}", names={"ant": "蚂蚁"})
        contents.add((tmp_path / f"{number}.{ending}").read_bytes())
    assert len(contents) == 1


def test_a_drawing_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    draw_batch(noise(1, 8), ["x"], tmp_path / "batch.png")
    before = (tmp_path / "batch.png").read_bytes()

    def fail(figure, file, **settings):
        file.write(b"half of it")
        raise OSError("disk")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk"):
        draw_batch(noise(1, 8), ["y"], tmp_path / "batch.png")
    assert (tmp_path / "batch.png").read_bytes() == before


def test_drawing_leaves_no_trace_in_the_settings_of_matplotlib(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_batch(noise(1, 8), ["蚁"], tmp_path / "batch.svg")
    assert dict(matplotlib.rcParams) == before


# The mistake held off here: drawing functions that leave the network in another mode.
def test_drawing_has_nothing_to_do_with_networks():
    code = """
import sys, tempfile, pathlib, numpy
from headstart.pictures import denormalise, draw_batch
from headstart.images import Preprocess
batch = denormalise(numpy.zeros((1, 3, 8, 8), numpy.float32), Preprocess())
with tempfile.TemporaryDirectory() as folder:
    draw_batch(batch, ["x"], pathlib.Path(folder, "batch.png"))
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_real_pictures_are_drawn_as_they_are_opened(real_data, tmp_path):
    folder = real_data / "hymenoptera" / "val"
    files = sorted(folder.glob("ants/*.jpg"))[:2] + sorted(folder.glob("bees/*.jpg"))[:2]
    draw_predictions([(file, answer(str(file)), file.parent.name) for file in files], tmp_path / "drawn.svg")
    for file, drawn in zip(files, images_of(tmp_path / "drawn.svg"), strict=True):
        size = drawn.shape[1::-1]
        assert np.array_equal(drawn, np.asarray(open_image(file).resize(size, Image.Resampling.LANCZOS)))
    marks = [text[0] for text in texts_of(tmp_path / "drawn.svg") if "75.0%" in text]
    assert marks == ["✓", "✓", "✗", "✗"]
    draw_predictions([(file, answer(str(file)), None) for file in files], tmp_path / "drawn.png")
    assert Path(tmp_path / "drawn.png").stat().st_size > 50_000
