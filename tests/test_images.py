"""What a file's bytes become: an upright RGB picture or a reason, and then a network's input."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from headstart.errors import UnreadableImage
from headstart.images import Limits, Preprocess, check_limits, describe, open_image, read_bytes

# No row, column or diagonal is an axis of symmetry: each of the eight orientations looks different.
ASYMMETRIC = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def opened(image: Image.Image, format: str = "PNG", **options: object) -> np.ndarray:
    picture = open_image(encoded(image, format, **options))
    assert picture.mode == "RGB"
    return np.asarray(picture)


def stored_as(orientation: int, upright: np.ndarray) -> np.ndarray:
    """The rows and columns a camera stores: EXIF 2.3, tag 0x0112, says which side of the scene they begin at."""
    row_0, column_0 = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    turned = upright[::-1] if "bottom" in (row_0, column_0) else upright
    turned = turned[:, ::-1] if "right" in (row_0, column_0) else turned
    return turned if row_0 in ("top", "bottom") else turned.transpose(1, 0, 2)


def oriented(orientation: int, format: str) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(stored_as(orientation, ASYMMETRIC)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    return encoded(image, format, exif=exif, **options)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int) -> bytes:
    """A PNG file that announces a size and has no pixels: decoding it could only fail."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b""))


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_every_exif_orientation_comes_out_upright(orientation, format):
    # The mistake: Image.open without conversion or EXIF turn.
    np.testing.assert_array_equal(open_image(oriented(orientation, format)), ASYMMETRIC)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_of_a_jpeg_comes_out_upright(orientation):
    found = np.asarray(open_image(oriented(orientation, "JPEG")))
    assert found.shape == ASYMMETRIC.shape
    assert np.abs(found.astype(int) - ASYMMETRIC).mean() < 12  # what JPEG loses at the blocks' borders


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_leaves_the_picture_as_stored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(opened(Image.fromarray(ASYMMETRIC), exif=exif), ASYMMETRIC)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\x00\x00rubbish",
        b"Exif\x00\x00",
        b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff",
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x02\x00\x00\x00\x04abc\x00\x00\x00\x00\x00",
    ],
)
def test_a_damaged_exif_block_does_not_spoil_the_picture(exif):
    found = opened(Image.fromarray(ASYMMETRIC), "JPEG", exif=exif, quality=95)
    assert found.shape == ASYMMETRIC.shape


# Modes


@pytest.mark.parametrize("alpha, expected", [(0, (255, 255, 255)), (255, (10, 60, 200)), (51, (206, 216, 244))])
def test_transparency_is_laid_on_white(alpha, expected):
    # The mistake: the alpha channel is dropped, and what was transparent shows its hidden colour.
    found = opened(Image.new("RGBA", (4, 3), (10, 60, 200, alpha)))
    assert found.shape == (3, 4, 3)
    np.testing.assert_allclose(found[0, 0], expected, atol=1)


@pytest.mark.parametrize("alpha, expected", [(0, 255), (255, 40), (128, 147)])
def test_grey_with_transparency_is_laid_on_white(alpha, expected):
    np.testing.assert_allclose(opened(Image.new("LA", (4, 3), (40, alpha)))[1, 1], [expected] * 3, atol=1)


def paletted() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    return image


@pytest.mark.parametrize("format, transparency", [("PNG", 0), ("PNG", b"\x00\xff"), ("GIF", 0)])
def test_the_transparent_colour_of_a_palette_is_white(format, transparency):
    found = opened(paletted(), format, transparency=transparency)
    assert found.tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_a_palette_without_transparency_keeps_its_colours():
    assert opened(paletted()).tolist() == [[[255, 0, 0], [0, 0, 255]]]


@pytest.mark.parametrize("mode, colour, kept", [("RGB", (9, 8, 7), (1, 2, 3)), ("L", 9, 200)])
def test_a_transparent_colour_of_a_picture_without_alpha_is_white(mode, colour, kept):
    image = Image.new(mode, (2, 1), colour)
    image.putpixel((1, 0), kept)
    found = opened(image, transparency=colour)
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 1].tolist() == list(kept if isinstance(kept, tuple) else (kept,) * 3)


def test_the_transparent_level_of_a_16_bit_grey_picture_is_white():
    rows = b"".join(b"\x00" + struct.pack(">2H", 1000, 30000) for _ in range(2))  # each row: no filter, two levels
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 0, 0, 0, 0))
    parts = header, png_chunk(b"tRNS", struct.pack(">H", 1000)), png_chunk(b"IDAT", zlib.compress(rows))
    found = np.asarray(open_image(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + png_chunk(b"IEND", b"")))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert abs(int(found[0, 1, 0]) - round(30000 / 257)) <= 1


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
@pytest.mark.parametrize(
    "inks, colour",
    [((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))],
)
def test_cmyk_is_converted(format, inks, colour):
    np.testing.assert_allclose(opened(Image.new("CMYK", (16, 16), inks), format)[8, 8], colour, atol=6)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(format):
    levels = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    found = opened(Image.fromarray(levels), format)
    np.testing.assert_allclose(found[..., 0], levels / 257, atol=1)
    assert (found[..., 0] == found[..., 2]).all()


def test_dark_16_bit_grey_stays_dark():
    assert opened(Image.fromarray(np.full((4, 4), 2570, np.uint16))).max() == 10


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, 32768.0, 65535.0], [0, 128, 255]),
        ([0.0, 1e6, 2e6], [0, 128, 255]),
        ([float("nan"), 0.0, 1.0], [0, 0, 255]),
        ([float("inf"), float("-inf"), 1.0], [0, 0, 255]),
    ],
)
def test_a_float_tiff_is_scaled_by_the_range_its_values_suggest(values, expected):
    found = opened(Image.fromarray(np.array([values], np.float32)), "TIFF")
    np.testing.assert_allclose(found[0, :, 0], expected, atol=1)


def test_a_32_bit_grey_tiff_is_scaled():
    found = opened(Image.fromarray(np.array([[0, 30000, 60000]], np.int32)), "TIFF")
    np.testing.assert_allclose(found[0, :, 0], [0, 117, 233], atol=1)


def test_a_bilevel_picture_is_black_and_white():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert opened(image)[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_several_is_taken(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    found = opened(frames[0], format, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(found[4, 4], (255, 0, 0), atol=4)


def test_the_picture_can_be_changed_and_outlives_its_content():
    picture = open_image(encoded(Image.new("RGB", (4, 4), "red")))
    picture.putpixel((0, 0), (1, 2, 3))
    assert picture.getpixel((0, 0)) == (1, 2, 3)


# What cannot be read


def unreadable(kind: str, folder: Path) -> Path:
    path = folder / "picture.jpg"
    jpeg = encoded(Image.fromarray(ASYMMETRIC), "JPEG")
    content = {
        "truncated": jpeg[: len(jpeg) * 2 // 3],
        "header only": jpeg[:30],
        "empty": b"",
        "text": b"these are words, not a picture\n" * 20,
        "zeros": bytes(1000),
        "bomb": png_header(60_000, 60_000),
        "no pixels": png_header(0, 5),
        "header and no pixels": png_header(8, 8),
    }
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        path.write_bytes(content[kind])
    return path


REASONS = {
    "truncated": "decoded",
    "header only": "decoded",
    "empty": "empty",
    "text": "not a picture",
    "zeros": "not a picture",
    "bomb": "limit",
    "no pixels": "",
    "header and no pixels": "decoded",
    "folder": "folder",
    "pipe": "no regular file",
    "missing": "no such file",
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_cannot_be_read_says_why_and_which_file_in_one_line(kind, tmp_path):
    path = unreadable(kind, tmp_path)
    with pytest.raises(UnreadableImage) as caught:
        open_image(path)
    error = caught.value
    assert error.subject == str(path)
    assert error.why.strip() and REASONS[kind] in error.why
    assert error.remedy and "\n" not in str(error) and "BytesIO" not in str(error)


def test_given_content_is_called_by_the_given_name():
    with pytest.raises(UnreadableImage, match=r"upload\.png"):
        open_image(b"rubbish", name="upload.png")


def test_a_name_that_no_file_can_have_is_unreadable():
    with pytest.raises(UnreadableImage) as caught:
        read_bytes("a\0b.png")
    assert caught.value.why


def test_more_pixels_than_the_limit_are_told_from_the_header():
    with pytest.raises(UnreadableImage, match=r"8000x7000 is over the limit of 50 megapixels\. .*--limit-megapixels"):
        open_image(png_header(8000, 7000))


@pytest.mark.parametrize("side", [10_000, 13_000, 20_000])
def test_pixels_far_over_the_limit_are_told_in_the_same_words_whatever_pillow_does(side):
    with warnings.catch_warnings(), pytest.raises(UnreadableImage) as error:
        warnings.simplefilter("error")  # Pillow warns of such pictures, and refuses still larger ones by itself
        open_image(png_header(side, side))
    assert "is over the limit of 50 megapixels" in error.value.why
    assert "--limit-megapixels" in error.value.remedy


def test_a_raised_limit_counts_even_above_the_one_of_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    picture = open_image(encoded(Image.new("RGB", (60, 60), "red")), Limits(pixels=5000))
    assert picture.size == (60, 60)


def test_exactly_the_limit_is_not_over_it():
    content = encoded(Image.new("RGB", (10, 10)))
    assert open_image(content, Limits(pixels=100)).size == (10, 10)
    with pytest.raises(UnreadableImage, match="limit"):
        open_image(content, Limits(pixels=99))


def test_more_bytes_than_the_limit_are_told_without_reading_them(tmp_path):
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(2**36)  # a hole on disk; reading it would need 64 GiB
    with pytest.raises(UnreadableImage, match=r"65536\.0 MiB is over the limit of 64 MiB\. .*--limit-mebibytes"):
        open_image(tmp_path / "large.png")


def test_exactly_the_limit_of_bytes_is_not_over_it(tmp_path):
    content = encoded(Image.new("RGB", (10, 10)))
    (tmp_path / "a.png").write_bytes(content)
    assert read_bytes(tmp_path / "a.png", Limits(bytes=len(content))) == content
    with pytest.raises(UnreadableImage, match="limit"):
        read_bytes(tmp_path / "a.png", Limits(bytes=len(content) - 1))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_damaged_picture_either_opens_as_rgb_or_says_why(data):
    format = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"]))
    content = bytearray(encoded(Image.fromarray(ASYMMETRIC), format))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks about what it skipped
            assert open_image(bytes(content)).mode == "RGB"
    except UnreadableImage as error:
        assert error.why.strip()


def test_every_nasty_file_opens_as_rgb_or_says_why(real_data):
    files = [file for file in sorted((real_data / "nasty").rglob("*")) if file.is_file()]
    assert len(files) > 100
    count = 0
    for file in files:
        try:
            picture = open_image(file)
        except UnreadableImage as error:
            assert error.why.strip() and error.subject == str(file)
            continue
        count += 1
        assert picture.mode == "RGB" and min(picture.size) > 0
        assert Preprocess(size=32).apply(picture).shape == (32, 32, 3)
        assert describe(picture).hash.shape == (32,)
    assert count > 100


# Preprocess


def drawn(width: int, height: int) -> Image.Image:
    random = np.random.default_rng([width, height])
    small = random.integers(0, 256, (max(1, height // 8), max(1, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size, crop", [(224, 0.875), (64, 1.0), (96, 0.95)])
@pytest.mark.parametrize(
    "picture", [(500, 375), (375, 500), (640, 427), (256, 256), (20, 31), (1, 40), (40, 1), (1, 1), (7, 300)]
)
def test_cropping_agrees_with_resize_and_center_crop_of_torchvision(picture, size, crop, interpolation):
    image = drawn(*picture)
    mode = transforms.InterpolationMode(interpolation)
    reference = transforms.Compose([transforms.Resize(int(size / crop), mode), transforms.CenterCrop(size)])
    found = Preprocess(size, crop, "crop", interpolation).apply(image)
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    difference = np.abs(found.astype(int) - np.asarray(reference(image)))
    assert (difference <= 1).mean() > 0.999
    assert difference.max() <= 4


def test_cropping_a_photograph_agrees_with_torchvision(real_data):
    reference = transforms.Compose([transforms.Resize(256, transforms.InterpolationMode.BICUBIC)])
    for file in sorted((real_data / "hymenoptera" / "val").rglob("*.jpg"))[::20]:
        image = open_image(file)
        expected = np.asarray(transforms.CenterCrop(224)(reference(image)))
        difference = np.abs(Preprocess().apply(image).astype(int) - expected)
        assert (difference <= 1).mean() > 0.999, file


def test_padding_shows_the_whole_picture_on_the_mean_colour():
    found = Preprocess(size=40, fit="pad", mean=(0.5, 0.25, 1.0)).apply(Image.new("RGB", (200, 100), (10, 20, 30)))
    assert found.shape == (40, 40, 3)
    assert (found[10:30] == (10, 20, 30)).all()
    assert (found[:10] == (128, 64, 255)).all() and (found[30:] == (128, 64, 255)).all()


def test_squashing_shows_the_whole_picture_without_its_shape():
    image = Image.new("RGB", (200, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    found = Preprocess(size=40, fit="squash").apply(image)
    assert (found[:, :18] == (255, 0, 0)).all() and (found[:, 22:] == (0, 0, 255)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60))
@example(33, 64, 32)
@example(31, 90, 32)
@example(5, 7, 32)
@example(32, 32, 32)
def test_the_centre_at_the_pictures_own_scale_is_torchvisions_centre_crop_on_black(width, height, size):
    noise = np.random.default_rng([width, height]).integers(1, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    found = Preprocess(size=size, crop=0.5, fit="center").apply(image)
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(transforms.CenterCrop(size)(image)))
    assert (found == 0).all(2).sum() == size * size - min(size, width) * min(size, height)


def test_the_centre_of_a_large_picture_cuts_off_what_a_resize_would_show():
    # The mistake: a centre crop without a resize, which cuts the animal off. It is to be had, and never the default.
    image = Image.new("RGB", (400, 300), "green")
    image.paste("red", (180, 130, 220, 170))
    assert (Preprocess(size=40, fit="center").apply(image) == (255, 0, 0)).all()
    whole = Preprocess(size=40, crop=1.0).apply(image)
    assert {tuple(whole[0, 0]), tuple(whole[20, 20])} == {(0, 128, 0), (255, 0, 0)}
    assert Preprocess().fit == "crop"


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("picture", [(1, 1), (1, 500), (500, 1), (3000, 2)])
def test_every_fit_makes_a_square_of_any_picture(fit, picture):
    image = Image.new("RGB", picture, (200, 100, 50))
    found = Preprocess(size=32, fit=fit, mean=(200 / 255, 100 / 255, 50 / 255)).apply(image)
    assert found.shape == (32, 32, 3)
    assert (found == (200, 100, 50)).all()


def test_normalising_subtracts_mean_and_divides_by_deviation_and_stays_channels_last():
    preprocess = Preprocess(size=5, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    found = preprocess.normalise(torch.from_numpy(pixels))
    expected = ((pixels / 255 - preprocess.mean) / preprocess.std).transpose(0, 3, 1, 2)
    assert found.dtype == torch.float32 and found.shape == (2, 3, 5, 5)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_normalising_leaves_the_pixels_as_they_were():
    pixels = torch.full((1, 2, 2, 3), 7, dtype=torch.uint8)
    Preprocess(size=2).normalise(pixels)
    assert (pixels == 7).all()


# Facts


def test_facts_hold_the_size_a_hash_of_256_bits_and_a_thumbnail():
    facts = describe(drawn(200, 90))
    assert (facts.width, facts.height) == (200, 90)
    assert facts.hash.shape == (32,) and facts.hash.dtype == np.uint8
    assert facts.thumbnail.shape == (16, 16) and facts.thumbnail.dtype == np.uint8


def test_facts_do_not_depend_on_the_format_of_the_file():
    image = drawn(120, 90)
    facts = [describe(open_image(encoded(image, format))) for format in ("PNG", "BMP", "TIFF")]
    assert all((other.hash == facts[0].hash).all() for other in facts)
    assert all((other.thumbnail == facts[0].thumbnail).all() for other in facts)


@pytest.mark.parametrize("size", [(80, 64), (33, 200), (500, 375), (1000, 40)])
def test_the_hash_is_the_perceptual_hash_of_imagehash(size):
    imagehash = pytest.importorskip("imagehash")
    noise = np.random.default_rng(size).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    grey = picture.convert("L").resize((128, 128), Image.Resampling.BOX)
    expected = imagehash.phash(grey, hash_size=16).hash
    assert (np.unpackbits(describe(picture).hash).reshape(16, 16) == expected).all()


def test_a_header_alone_is_held_against_the_limits_that_were_given_rather_than_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # it takes pictures of twice that
    content = encoded(Image.new("RGB", (40, 30)))
    check_limits(content, Limits(pixels=1200))
    with pytest.raises(UnreadableImage, match="40x30 is over the limit"):
        check_limits(content, Limits(pixels=1199))
