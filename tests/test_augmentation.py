"""Augmentations against torchvision's, pixel by pixel where nothing is drawn and by their distributions where it is."""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from conftest import draw_shape
from headstart import augmentation
from headstart.augmentation import parse
from headstart.errors import UsageError
from headstart.images import Preprocess
from headstart.loading import Album, ahead
from headstart.sampling import Draw

# The function-scoped fixture of all tests, an own cache for each, holds nothing that examples could share.
bounded = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SIDE = 48
PLAIN = Preprocess(size=SIDE, crop=1.0, interpolation="bilinear", mean=(0.0, 0.0, 0.0))  # corners that appear are black
MEAN = Preprocess(size=SIDE, crop=1.0)  # ImageNet's mean
GREY = (124, 116, 104)  # in levels
BILINEAR = v2.InterpolationMode.BILINEAR
SPACES = {"RandAugment": v2.RandAugment, "TrivialAugmentWide": v2.TrivialAugmentWide}
OPERATIONS = list(v2.RandAugment._AUGMENTATION_SPACE)


def draw_noise(width: int = SIDE, height: int = SIDE, low: int = 0, high: int = 255) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(low, high + 1, (height, width, 3), dtype=np.uint8))


def vary(text, image, seed=0, preprocess=PLAIN, symmetry="any"):
    """A varied view (size, size, 3) as numbers that can be subtracted."""
    view = parse(text, symmetry, preprocess.size).apply(image, preprocess, np.random.default_rng(seed))
    assert view.dtype == np.uint8
    assert view.shape == (preprocess.size, preprocess.size, 3)
    return view.astype(int)


def as_numbers(image) -> np.ndarray:
    return np.asarray(image).astype(int)


# Where a view starts from


@pytest.mark.parametrize("preprocess", [Preprocess(40), Preprocess(40, 1.0, "pad"), Preprocess(40, 1.0, "squash")])
@pytest.mark.parametrize("text", ["none", "", "RandomHorizontalFlip(0)", "RandomCrop", "RandAugment(0)", "ColorJitter"])
def test_all_but_random_resized_crop_start_from_what_evaluation_sees(text, preprocess):
    # The mistake: train crops without resizing, while validation squashes.
    image = draw_shape("circle", 0, (150, 90))
    np.testing.assert_array_equal(vary(text, image, preprocess=preprocess), preprocess.apply(image))


@pytest.mark.parametrize("size", [(150, 90), (90, 150), (9, 7), (48, 48)])
def test_a_flip_mirrors_what_evaluation_sees(size):
    image = draw_noise(*size)
    view = vary("RandomHorizontalFlip(p=1)", image, preprocess=MEAN)
    np.testing.assert_array_equal(view, MEAN.apply(image)[:, ::-1])


def test_random_resized_crop_cuts_from_the_whole_picture():
    image = draw_noise(100, 75)
    whole = vary("RandomResizedCrop(scale=(1, 1), ratio=(4/3, 4/3))".replace("4/3", repr(4 / 3)), image)
    np.testing.assert_array_equal(whole, as_numbers(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_random_resized_crop_does_not_depend_on_how_evaluation_fits_a_picture(fit):
    image, plain = draw_noise(100, 75), Preprocess(SIDE, 0.875)
    view = vary("RandomResizedCrop", image, preprocess=Preprocess(SIDE, 1.0, fit))
    np.testing.assert_array_equal(view, vary("RandomResizedCrop", image, preprocess=plain))


def test_a_picture_is_not_changed_by_being_varied():
    image = draw_noise()
    before = image.tobytes()
    for text in (
        "auto",
        "ColorJitter(0.5, 0.5, 0.5, 0.5), RandAugment(3, 30)",
        "RandomQuarterTurn, RandomCrop(padding=4)",
    ):
        for seed in range(10):
            vary(text, image, seed)
    assert image.tobytes() == before


# Against torchvision, pixel by pixel


@pytest.mark.parametrize("text, expected", [("RandomHorizontalFlip", "hflip"), ("RandomVerticalFlip", "vflip")])
def test_flips_are_torchvisions(text, expected):
    image = draw_noise()
    np.testing.assert_array_equal(vary(f"{text}(1.0)", image), as_numbers(getattr(functional, expected)(image)))
    np.testing.assert_array_equal(vary(f"{text}(p=0.0)", image), as_numbers(image))


@pytest.mark.parametrize("p", [0.5, 0.1])
@pytest.mark.parametrize("text", ["RandomHorizontalFlip", "RandomVerticalFlip"])
def test_a_flip_comes_as_often_as_its_probability_says(text, p):
    image = draw_noise()
    call = text if p == 0.5 else f"{text}(p={p})"  # torchvision's default
    flipped = sum((vary(call, image, seed) != as_numbers(image)).any() for seed in range(400))
    assert stats.binomtest(int(flipped), 400, p).pvalue > 1e-3


def test_quarter_turns_are_exact_and_equally_often():
    image = draw_noise()
    turned = [np.rot90(as_numbers(image), number) for number in range(4)]
    found = [
        [number for number in range(4) if np.array_equal(vary("RandomQuarterTurn", image, seed), turned[number])]
        for seed in range(400)
    ]
    assert all(len(numbers) == 1 for numbers in found)
    assert stats.chisquare(np.bincount([numbers[0] for numbers in found], minlength=4)).pvalue > 1e-3


@pytest.mark.parametrize("degrees", [-30.0, -0.5, 0.0, 10.0, 45.0, 90.0, 180.0])
def test_a_turn_is_torchvisions_with_corners_in_the_networks_mean_colour(degrees):
    image = draw_noise()
    view = vary(f"RandomRotation(({degrees}, {degrees}))", image, preprocess=MEAN)
    np.testing.assert_array_equal(view, as_numbers(functional.rotate(image, degrees, BILINEAR, fill=list(GREY))))


def test_corners_that_a_turn_brings_into_view_have_the_mean_colour():
    view = vary("RandomRotation((30, 30))", Image.new("RGB", (SIDE, SIDE), "white"), preprocess=MEAN)
    assert view[0, 0].tolist() == list(GREY)


@pytest.mark.parametrize(
    "text, low, high", [("RandomRotation(20)", -20, 20), ("RandomRotation(degrees=(-5, 40))", -5, 40)]
)
def test_turns_are_spread_evenly_over_their_range(text, low, high):
    image = Image.new("RGB", (SIDE, SIDE))
    image.paste("white", (0, 0, SIDE, SIDE // 2))  # the line between the halves shows the angle
    across, down = np.meshgrid(np.arange(SIDE) - (SIDE - 1) / 2, np.arange(SIDE) - (SIDE - 1) / 2)
    disc = np.hypot(across, down) < SIDE / 2 - 2
    angles = []
    for seed in range(300):
        white = vary(text, image, seed)[..., 0] * disc
        angles.append(np.degrees(np.arctan2(-(white * across).sum(), -(white * down).sum())))
    assert low - 1 < min(angles) and max(angles) < high + 1
    assert stats.kstest(angles, stats.uniform(low, high - low).cdf).pvalue > 1e-3


@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize("padding", [1, 4])
def test_random_crops_are_all_those_of_torchvisions_padded_picture_equally_often(padding, mode):
    image = draw_noise(16, 16)
    preprocess = Preprocess(16, 1.0)
    padded = functional.pad(image, [padding] * 4, padding_mode=mode)
    places = list(np.ndindex(2 * padding + 1, 2 * padding + 1))
    crops = {functional.crop(padded, top, left, 16, 16).tobytes(): n for n, (top, left) in enumerate(places)}
    text = f"RandomCrop(padding={padding}, padding_mode={mode!r})"
    found = [crops[vary(text, image, seed, preprocess).astype(np.uint8).tobytes()] for seed in range(40 * len(places))]
    assert stats.chisquare(np.bincount(found, minlength=len(places))).pvalue > 1e-3


def test_random_crop_takes_torchvisions_arguments_by_place():
    image = draw_noise()
    named = vary(f"RandomCrop(size={SIDE}, padding=4, padding_mode='reflect')", image)
    np.testing.assert_array_equal(vary(f"RandomCrop({SIDE}, 4, 'reflect')", image), named)


JITTERS = {
    "brightness": functional.adjust_brightness,
    "contrast": functional.adjust_contrast,
    "saturation": functional.adjust_saturation,
    "hue": functional.adjust_hue,
}


@pytest.mark.parametrize("name, factors", [(name, (0.3, 0.95, 1.7)) for name in list(JITTERS)[:3]])
def test_jitter_of_one_kind_is_torchvisions(name, factors):
    image = draw_noise()
    for factor in factors:
        expected = as_numbers(JITTERS[name](image, factor))
        np.testing.assert_array_equal(vary(f"ColorJitter({name}=({factor}, {factor}))", image), expected)


@pytest.mark.parametrize("turn", [-0.5, -0.3, -0.05, -0.001, 0.001, 0.02, 0.25, 0.5])
def test_jitter_of_hue_is_torchvisions(turn):
    image = draw_noise()
    np.testing.assert_array_equal(
        vary(f"ColorJitter(hue=({turn}, {turn}))", image), as_numbers(functional.adjust_hue(image, turn))
    )


def test_hue_turns_colours_and_leaves_greys():
    colours = Image.new("RGB", (SIDE, SIDE), (200, 40, 40))
    green = vary(f"ColorJitter(hue=({1 / 3}, {1 / 3}))", colours)[0, 0]
    assert green.argmax() == 1
    grey = Image.new("RGB", (SIDE, SIDE), (90, 90, 90))
    np.testing.assert_array_equal(vary("ColorJitter(hue=0.5)", grey), as_numbers(grey))


def test_jitter_of_all_kinds_runs_them_in_every_order():
    image, factors = draw_noise(), {"brightness": 1.4, "contrast": 0.6, "saturation": 1.5, "hue": 0.2}
    expected = {}
    for order in permutations(JITTERS):
        changed = image
        for name in order:
            changed = JITTERS[name](changed, factors[name])
        expected[changed.tobytes()] = order
    text = f"ColorJitter({', '.join(f'{name}=({value}, {value})' for name, value in factors.items())})"
    found = [expected[vary(text, image, seed).astype(np.uint8).tobytes()] for seed in range(300)]
    assert len(expected) == 24 == len(set(found))


@pytest.mark.parametrize(
    "text, low, high",
    [("ColorJitter(0.5)", 0.5, 1.5), ("ColorJitter((1.1, 1.9))", 1.1, 1.9), ("ColorJitter(1.5)", 0, 2.5)],
)
def test_factors_of_jitter_are_spread_evenly_over_torchvisions_range(text, low, high):
    image = Image.new("RGB", (SIDE, SIDE), (100, 100, 100))
    levels = np.array([vary(text, image, seed).mean() for seed in range(300)])
    transform = v2.ColorJitter(float(text[12:-1]) if text[12] != "(" else (1.1, 1.9))
    assert transform.brightness == (low, high)
    assert stats.kstest(levels / 100 + 0.005, stats.uniform(low, high - low).cdf).pvalue > 1e-3


@pytest.mark.parametrize("text", ["ColorJitter", "ColorJitter(0, 0, 0, 0)", "ColorJitter((1.0, 1.0), hue=(0, 0))"])
def test_jitter_of_nothing_changes_nothing(text):
    image = draw_noise()
    np.testing.assert_array_equal(vary(text, image), as_numbers(image))


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_a_factor_of_zero_takes_everything_away(name):
    image = draw_noise()
    np.testing.assert_array_equal(vary(f"ColorJitter({name}=(0, 0))", image), as_numbers(JITTERS[name](image, 0.0)))


# RandomResizedCrop


def coordinates(width: int, height: int) -> Image.Image:
    """A picture whose red is the place across and whose green the place down; at most 256 pixels each way."""
    down, across = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([across, down, 0 * down], 2).astype(np.uint8))


READ = Preprocess(size=256, interpolation="nearest")  # larger than every crop, so that its first and last pixels show


def find_boxes(text, width, height, seeds):
    """(left, top, width, height) of what is cut out."""
    image, varied, boxes = coordinates(width, height), parse(text, "any", 256), []
    for seed in seeds:
        view = varied.apply(image, READ, np.random.default_rng(seed)).astype(int)
        (left, top), (right, bottom) = view[0, 0, :2], view[-1, -1, :2]
        boxes.append((left, top, right - left + 1, bottom - top + 1))
    return np.array(boxes)


def draw_torchvisions_boxes(width, height, count, **arguments):
    image, transform = Image.new("RGB", (width, height)), v2.RandomResizedCrop(8, **arguments)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        found = [transform.make_params([image]) for _ in range(count)]
    return np.array([(box["left"], box["top"], box["width"], box["height"]) for box in found])


@pytest.mark.parametrize(
    "width, height, arguments",
    [
        (160, 120, {}),
        (90, 200, {"scale": (0.25, 1.0)}),
        (120, 120, {"scale": (0.3, 0.5), "ratio": (0.5, 3.0)}),
        (240, 60, {"scale": (0.5, 1.0)}),  # often none of ten tries fits
    ],
)
def test_boxes_of_random_resized_crop_are_distributed_as_torchvisions(width, height, arguments):
    text = f"RandomResizedCrop({', '.join(f'{name}={value}' for name, value in arguments.items())})"
    own = find_boxes(text, width, height, range(1000))
    theirs = draw_torchvisions_boxes(width, height, 4000, **arguments)
    for measure in (
        lambda boxes: boxes[:, 2] * boxes[:, 3],  # area
        lambda boxes: boxes[:, 2] / boxes[:, 3],  # aspect
        lambda boxes: boxes[:, 0] / (width - boxes[:, 2] + 1),  # place in its room
        lambda boxes: boxes[:, 1] / (height - boxes[:, 3] + 1),
    ):
        assert stats.ks_2samp(measure(own), measure(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("width, height", [(250, 10), (10, 250), (200, 1), (1, 200), (1, 1), (120, 100)])
def test_where_no_box_fits_the_middle_is_cut_as_torchvision_does(width, height):
    arguments = {"scale": (1.0, 1.0), "ratio": (0.9, 1.1)}
    (own,) = np.unique(
        find_boxes("RandomResizedCrop(scale=(1, 1), ratio=(0.9, 1.1))", width, height, range(20)), axis=0
    )
    (theirs,) = np.unique(draw_torchvisions_boxes(width, height, 20, **arguments), axis=0)
    assert own.tolist() == theirs.tolist()


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_pixels_of_random_resized_crop_are_torchvisions_of_the_same_box(interpolation):
    preprocess = Preprocess(size=40, interpolation=interpolation)
    for width, height in ((100, 75), (30, 41)):
        image = draw_noise(width, height)
        for seed, (left, top, wide, high) in enumerate(find_boxes("RandomResizedCrop", width, height, range(10))):
            mode = v2.InterpolationMode(interpolation)
            expected = functional.resized_crop(image, top, left, high, wide, [40, 40], mode)
            np.testing.assert_array_equal(vary("RandomResizedCrop", image, seed, preprocess), as_numbers(expected))


# RandAugment and TrivialAugmentWide


def theirs(name, magnitude, image, space="RandAugment"):
    transform = SPACES[space](interpolation=BILINEAR, fill=0)
    return transform._apply_image_or_video_transform(image, name, magnitude, transform.interpolation, transform._fill)


def strengths_of(name, space="RandAugment", side=SIDE):
    """torchvision's 31 magnitudes of an operation, with both signs where it has them; our part of the largest."""
    make, signed = SPACES[space]._AUGMENTATION_SPACE[name]
    magnitudes = make(31, side, side)
    for number in range(31):
        for sign in (1, -1) if signed else (1,):
            yield sign * number / 30, 0.0 if magnitudes is None else sign * float(magnitudes[number])


def ours(name, part, image, space="RandAugment"):
    operation = augmentation._OPERATIONS[name]
    most = operation.most if space == "RandAugment" else operation.most_wide
    preprocess = Preprocess(size=image.width, mean=(0.0, 0.0, 0.0))
    return as_numbers(operation.change(image, part * most, preprocess))


def test_the_operations_are_torchvisions():
    assert list(augmentation._OPERATIONS) == OPERATIONS == list(v2.TrivialAugmentWide._AUGMENTATION_SPACE)
    for space in SPACES.values():
        assert {name: signed for name, (_, signed) in space._AUGMENTATION_SPACE.items()} == {
            name: operation.signed for name, operation in augmentation._OPERATIONS.items()
        }


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("ShearX", "ShearY", "Solarize")])
def test_an_operation_is_torchvisions_at_every_strength(name, space):
    image = draw_noise()
    for part, magnitude in strengths_of(name, space):
        if space == "TrivialAugmentWide" and name.startswith("Translate"):
            magnitude *= SIDE / 224  # there 32 pixels of whatever side
        difference = ours(name, part, image, space) - as_numbers(theirs(name, magnitude, image, space))
        # torchvision's strengths have single precision, so that a few pixels round to the next level.
        allowed = name in ("Brightness", "Color", "Contrast", "Sharpness")
        assert abs(difference).max() <= allowed, (part, magnitude)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", ["ShearX", "ShearY"])
def test_a_shear_is_torchvisions_at_every_strength(name, space):
    image = Image.fromarray(as_numbers(draw_noise()).astype(np.uint8) | 1)  # no black, so that corners can be told
    for part, magnitude in strengths_of(name, space):
        found, expected = ours(name, part, image, space), as_numbers(theirs(name, magnitude, image, space))
        # The same matrix but for the last bits: a level here and there, and single pixels at the edge.
        assert ((found == 0) != (expected == 0)).any(2).sum() <= SIDE // 4, part
        both = (found > 0) & (expected > 0)
        assert abs(found - expected)[both].max() <= 1, part


@pytest.mark.parametrize("space", SPACES)
def test_solarize_is_torchvisions_but_for_the_level_at_its_threshold(space):
    image = draw_noise()
    for part, magnitude in strengths_of("Solarize", space):
        differs = ours("Solarize", part, image, space) != as_numbers(theirs("Solarize", magnitude, image, space))
        assert np.all(abs(as_numbers(image)[differs] - 255 * (1 - part)) < 1), part


def test_solarize_turns_the_levels_that_torchvisions_turns():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    image = Image.fromarray(levels)
    for part, magnitude in list(strengths_of("Solarize"))[1::2]:  # thresholds between two levels, 178.5 the default's
        expected = as_numbers(theirs("Solarize", magnitude, image))
        np.testing.assert_array_equal(ours("Solarize", part, image), expected, str(part))


@pytest.mark.parametrize("name", ["TranslateX", "TranslateY"])
def test_a_translation_of_whole_pixels_is_not_one_less(name):
    image = draw_noise(224, 224)
    for part, magnitude in strengths_of(name, "TrivialAugmentWide"):
        # 16 pixels are 15.999999 in torchvision's float32
        expected = as_numbers(theirs(name, round(magnitude, 4), image))
        np.testing.assert_array_equal(ours(name, part, image, "TrivialAugmentWide"), expected, str(part))


@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_what_comes_into_view_has_the_networks_mean_colour(name):
    image = Image.new("RGB", (SIDE, SIDE), "white")
    operation = augmentation._OPERATIONS[name]
    view = np.asarray(operation.change(image, operation.most, MEAN)).reshape(-1, 3)
    assert {tuple(pixel) for pixel in view.tolist()} >= {GREY, (255, 255, 255)}
    assert not (view == 0).any()


TINY = Preprocess(size=24, crop=1.0, mean=(0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def dull() -> Image.Image:
    """Noise without the darkest and lightest levels, so that every operation but Identity changes it."""
    return draw_noise(24, 24, 30, 220)


def references(space, image, magnitude=None):
    """(operation, part) -> torchvision's result, of one magnitude or all of 31.

    Turns end at 45 degrees, and TrivialAugment's shifts are those of 224 pixels made smaller.
    """
    found = {}
    for name in OPERATIONS:
        for part, strength in strengths_of(name, space, image.width):
            if magnitude not in (None, round(30 * abs(part))):
                continue
            if space == "TrivialAugmentWide" and name.startswith("Translate"):
                strength *= image.width / 224
            if name == "Rotate":
                strength = max(-45.0, min(45.0, strength))
            found[name, part] = np.asarray(theirs(name, strength, image, space)).ravel().astype(np.int16)
    return found


def find_nearest(views, expected):
    """For each view what is nearest to it, and the share of its values that differ by more than a level."""
    keys, rows = list(expected), np.stack(list(expected.values()))
    for view in views:
        shares = (abs(rows - view.ravel().astype(np.int16)) > 1).mean(1)
        yield keys[shares.argmin()], shares.min()


def test_rand_augment_draws_each_operation_equally_often_with_the_strength_and_signs_of_torchvision(dull):
    views = [vary("RandAugment(1, 20)", dull, seed, TINY) for seed in range(700)]
    found, shares = zip(*find_nearest(views, references("RandAugment", dull, 20)))
    assert max(shares) < 0.02
    names = [name for name, _ in found]
    assert stats.chisquare([names.count(name) for name in OPERATIONS]).pvalue > 1e-3
    signed = [part > 0 for name, part in found if augmentation._OPERATIONS[name].signed]
    assert stats.binomtest(sum(signed), len(signed)).pvalue > 1e-3
    for name in OPERATIONS:
        both = {part for other, part in found if other == name}
        assert len(both) == (2 if augmentation._OPERATIONS[name].signed else 1)


def test_trivial_augment_draws_every_strength_and_turns_no_further_than_45_degrees(dull):
    views = [vary("TrivialAugmentWide", dull, seed, TINY, symmetry="none") for seed in range(600)]
    found, shares = zip(*find_nearest(views, references("TrivialAugmentWide", dull)))
    assert max(shares) < 0.02
    told_apart = ("Brightness", "Color", "Contrast", "Sharpness", "ShearX", "ShearY")  # by their results
    parts = [abs(part) for name, part in found if name in told_apart]
    assert {round(30 * part) for part in parts} >= set(range(1, 31))
    assert stats.kstest(parts, stats.uniform(-1 / 60, 31 / 30).cdf).pvalue > 1e-3
    counts = [sum(other == name for other, _ in found) for name in ("Brightness", "Sharpness", "Equalize", "Solarize")]
    assert stats.chisquare([*counts, 600 - sum(counts)], np.array([1, 1, 1, 1, 10]) * 600 / 14).pvalue > 1e-3


def test_rand_augment_has_torchvisions_defaults():
    image, default = draw_noise(), v2.RandAugment()
    for seed in range(10):
        explicit = vary(f"RandAugment(num_ops={default.num_ops}, magnitude={default.magnitude})", image, seed)
        np.testing.assert_array_equal(vary("RandAugment", image, seed), explicit)


def test_rand_augment_carries_out_as_many_operations_as_it_is_told(dull):
    once = references("RandAugment", dull, 20)
    for number, allowed in ((1, 0.0), (2, 0.35), (3, 0.1)):  # of two, one may be Identity, or undo the other
        views = [vary(f"RandAugment({number}, 20)", dull, seed, TINY) for seed in range(100)]
        alike = np.mean([share < 0.02 for _, share in find_nearest(views, once)])
        assert alike == 1 if number == 1 else alike < allowed
    np.testing.assert_array_equal(vary("RandAugment(0, 20)", dull, 0, TINY), as_numbers(dull))


# Reading the text


@pytest.mark.parametrize(
    "text, names",
    [
        ("none", ()),
        ("", ()),
        ("RandomHorizontalFlip", ("RandomHorizontalFlip",)),
        ("RandomHorizontalFlip()", ("RandomHorizontalFlip",)),
        (
            "RandomResizedCrop(scale=(0.5, 1)), ColorJitter(0.05, 0.05, 0.05, 0.05)",
            ("RandomResizedCrop", "ColorJitter"),
        ),
        ("  RandomRotation( 10 ) ,\n RandomHorizontalFlip", ("RandomRotation", "RandomHorizontalFlip")),
        ("RandomCrop(padding=4), RandomCrop(padding=2)", ("RandomCrop", "RandomCrop")),
    ],
)
def test_names_are_read_in_their_order_with_and_without_arguments(text, names):
    varied = parse(text, "mirror", 64)
    assert varied.names == names
    assert len(varied.steps) == len(names)


def test_steps_run_in_the_order_in_which_they_are_written():
    image, mirrored = draw_noise(), draw_noise().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    flip_first = vary("RandomHorizontalFlip(1), RandomRotation((20, 20))", image)
    turn_first = vary("RandomRotation((20, 20)), RandomHorizontalFlip(1)", image)
    np.testing.assert_array_equal(flip_first, vary("RandomRotation((20, 20))", mirrored))
    np.testing.assert_array_equal(turn_first[:, ::-1], vary("RandomRotation((20, 20))", image))


@pytest.mark.parametrize(
    "text", ["ColorJitter(0.3, 0.2, 0.1, 0.05)", "RandomRotation(10)", "RandomHorizontalFlip(0.3)"]
)
def test_arguments_by_name_and_by_place_are_the_same(text):
    named = {
        "ColorJitter(0.3, 0.2, 0.1, 0.05)": "ColorJitter(hue=0.05, saturation=0.1, contrast=0.2, brightness=0.3)",
        "RandomRotation(10)": "RandomRotation(degrees=(-10, 10))",
        "RandomHorizontalFlip(0.3)": "RandomHorizontalFlip(p=0.3)",
    }[text]
    image = draw_noise()
    for seed in range(20):
        np.testing.assert_array_equal(vary(text, image, seed), vary(named, image, seed))


@pytest.mark.parametrize(
    "text", ["RandomErasing", "horizontal_flip", "randomhorizontalflip", "RandomHorizontalFlip, Cutout(3)"]
)
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(text):
    with pytest.raises(UsageError, match="unknown") as error:
        parse(text, "any", 64)
    assert all(name in error.value.remedy for name in ("RandomResizedCrop", "RandAugment", "TrivialAugmentWide"))


WRONG = [
    "RandomRotation",
    "RandomRotation()",
    "RandomRotation('far')",
    "RandomRotation((1, 2, 3))",
    "RandomRotation(10, 20)",
    "RandomRotation(angle=10)",
    "RandomHorizontalFlip(0.5, 0.5)",
    "RandomQuarterTurn(0.5)",
    "RandomResizedCrop(scale=0.5)",
    "RandomResizedCrop(scale=(0, 1))",
    "RandomResizedCrop(scale=(0.5, 1.5))",
    "RandomResizedCrop(scale=(1.0, 0.5))",
    "RandomResizedCrop(ratio=(0, 1))",
    "RandomResizedCrop(ratio=(2, 1))",
    "RandomCrop(padding=-1)",
    "RandomCrop(padding='4')",
    "RandomCrop(padding=(4, 4))",
    "RandomCrop(padding_mode='edge')",
    "ColorJitter(hue=0.6)",
    "ColorJitter(hue=(-0.6, 0.1))",
    "ColorJitter(brightness=(-0.5, 1))",
    "ColorJitter(0.1, 0.1, 0.1, 0.1, 0.1)",
    "ColorJitter((1, 2, 3))",
    "ColorJitter(None)",
    "RandAugment(-1)",
    "RandAugment(magnitude=31)",
    "RandAugment(magnitude=-1)",
    "RandAugment('two')",
    "RandAugment(N=2)",
    "TrivialAugmentWide(31)",
]


@pytest.mark.parametrize("text", WRONG)
def test_wrong_arguments_are_an_error_that_names_the_augmentation_and_what_it_takes(text):
    with pytest.raises(UsageError) as error:
        parse(text, "any", 64)
    name = text.partition("(")[0]
    assert error.value.why.startswith(f"{name}: ")
    assert "It takes (" in error.value.remedy


@pytest.mark.parametrize(
    "text",
    [
        "RandomRotation(-10)",
        "RandomRotation((10, -10))",
        "RandomRotation(1e999)",
        "RandomHorizontalFlip(p=2)",
        "RandomHorizontalFlip(p=-0.5)",
        "RandomHorizontalFlip(p='often')",
        "RandomCrop(padding=1.5)",
        "RandAugment(2.5)",
        "ColorJitter(-0.5)",
        "ColorJitter((0.5, 0.2))",
        "ColorJitter(hue=-0.1)",
        "ColorJitter(1e999)",
    ],
)
def test_arguments_that_cannot_work_are_an_error_before_anything_is_varied(text):
    with pytest.raises(UsageError):
        parse(text, "any", 64)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').mkdir('ran')",
        "RandomRotation(__import__('os').mkdir('ran'))",
        "RandomRotation(degrees=__import__('os').mkdir('ran'))",
        "RandomRotation([__import__('os').mkdir('ran') for _ in 'x'])",
        "RandomRotation(*[__import__('os').mkdir('ran')])",
        "RandomRotation(**{'degrees': __import__('os').mkdir('ran')})",
        "(lambda: __import__('os').mkdir('ran'))()",
        'RandomRotation(f\'{open("ran", "w")}\')',
        "(RandomRotation := open('ran', 'w'))",
        "RandomRotation(10)); __import__('os').mkdir('ran'); (1",
        "RandomRotation.__init__.__globals__",
        "[RandomRotation(10)]",
        "'RandomRotation(10)'",
        "RandomRotation(10)(10)",
        "RandomRotation(10) RandomHorizontalFlip",
        "RandomRotation(",
        "RandomHorizontalFlip, , RandomHorizontalFlip",
        "\0",
        "(" * 500,
        ",",
        " ",
    ],
)
def test_what_is_no_list_of_names_with_values_is_refused_and_never_run(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.listdir()
    with pytest.raises(UsageError):
        parse(text, "any", 64)
    assert os.listdir() == before


WORDS = ("RandomRotation", "RandAugment", "ColorJitter", "p", "10", "0.5", "degrees", "size", "padding", "None", "if")
pieces = st.sampled_from([*WORDS, "lambda", *"-+*()[]{},=:.' \n#\\µ"])


@bounded
@given(st.one_of(st.text(max_size=30), st.lists(pieces, max_size=12).map("".join)))
@example("RandAugment) + (RandAugment")
@example("RandomRotation({[]: 1})")
def test_any_text_gives_an_augmentation_or_one_kind_of_error(text):
    try:
        parse(text, "any", 64)
    except UsageError as error:
        assert error.why and error.remedy and "\n" not in str(error)


# Size


@pytest.mark.parametrize("text", ["RandomResizedCrop(224)", "RandomResizedCrop(size=32)", "RandomCrop(32, padding=4)"])
def test_a_crop_of_another_size_than_the_networks_is_an_error_that_names_both(text):
    with pytest.raises(UsageError) as error:
        parse(text, "any", 64)
    assert "64 pixels" in error.value.why
    side = "224" if "224" in text else "32"
    assert f"({side})" in error.value.why and f"--size {side}" in error.value.remedy


def test_a_crop_of_the_networks_size_is_the_same_as_one_without():
    image = draw_noise(80, 60)
    for seed in range(5):
        expected = vary("RandomResizedCrop", image, seed)
        np.testing.assert_array_equal(vary(f"RandomResizedCrop({SIDE})", image, seed), expected)


@pytest.mark.parametrize("text", ["RandomHorizontalFlip, RandomResizedCrop", "RandomResizedCrop, RandomResizedCrop"])
def test_random_resized_crop_must_come_first(text):
    with pytest.raises(UsageError, match="must come first"):
        parse(text, "any", 64)


# Symmetry. The mistake: vertical flips of street scenes.


@pytest.mark.parametrize(
    "text, needs",
    [
        ("RandomHorizontalFlip", "mirror"),
        ("RandomResizedCrop, RandomHorizontalFlip(p=0.1)", "mirror"),
        ("RandomVerticalFlip", "any"),
        ("RandomRotation(10), RandomVerticalFlip(p=0.01)", "any"),
        ("RandomQuarterTurn", "any"),
        ("RandomRotation(45.5)", "any"),
        ("RandomRotation(degrees=90)", "any"),
        ("RandomRotation((-60, 10))", "any"),
        ("RandomRotation(degrees=(0, 180))", "any"),
        ("RandomRotation((-90, -80))", "any"),
        ("RandomRotation(45)", "none"),
        ("RandomRotation(degrees=(-45, 30))", "none"),
        ("RandomResizedCrop, RandomCrop(padding=4), ColorJitter(0.1), RandAugment, TrivialAugmentWide", "none"),
    ],
)
def test_flips_and_large_turns_need_the_symmetry_that_allows_them(text, needs):
    order = ["none", "mirror", "any"]
    for symmetry in order:
        if order.index(symmetry) >= order.index(needs):
            assert parse(text, symmetry, 64).steps
            continue
        with pytest.raises(UsageError) as error:
            parse(text, symmetry, 64)
        assert repr(symmetry) in error.value.why and f"--symmetry {needs}" in error.value.remedy


def leans(text, symmetry, image, count=60):
    """Of varied views: (whether any is upside down, whether any is mirrored) of a picture bright at the top left."""
    upside_down = mirrored = False
    for seed in range(count):
        view = vary(text, image, seed, symmetry=symmetry).mean(2)
        half = SIDE // 2
        upside_down |= bool(view[half:].mean() > view[:half].mean() + 1)
        mirrored |= bool(view[:, half:].mean() > view[:, :half].mean() + 1)
    return upside_down, mirrored


@pytest.mark.parametrize(
    "symmetry, expected", [("none", (False, False)), ("mirror", (False, True)), ("any", (True, True))]
)
def test_auto_flips_and_turns_only_as_the_symmetry_allows(symmetry, expected):
    down, across = np.mgrid[:60, :80]
    ramp = 250 - down - 1.5 * across
    image = Image.fromarray(ramp.round().astype(np.uint8)[..., None].repeat(3, 2))
    assert leans("auto", symmetry, image) == expected


# A function of (seed, epoch, draw)


@pytest.fixture
def album(tmp_path) -> Album:
    paths = []
    for number in range(12):
        paths.append(Path(tmp_path / f"{number}.png"))
        draw_shape("circle", number, (60 + number, 50)).save(paths[-1])
    return Album(paths, PLAIN)


RICH = "RandomResizedCrop, RandomHorizontalFlip, ColorJitter(0.3, 0.3, 0.3, 0.1), RandAugment"


def test_a_view_does_not_depend_on_the_order_or_the_number_of_threads(album):
    varied = parse(RICH, "mirror", SIDE)
    draws = [Draw(sample, turn) for sample in range(12) for turn in range(2)]
    expected = {draw: album.vary(draw, varied, 7, 3).tobytes() for draw in draws}
    again = Album(album.paths, PLAIN, room_bytes=0)
    for workers in (1, 2, 5):
        shuffled = [draws[place] for place in np.random.default_rng(workers).permutation(len(draws))]
        views = ahead(lambda draw: again.vary(draw, varied, 7, 3).tobytes(), shuffled, workers, 8)
        assert dict(zip(shuffled, views)) == expected
    with ThreadPoolExecutor(8) as executor:  # of one picture at the same time, one parsed text for all
        views = list(executor.map(lambda _: album.vary(draws[0], varied, 7, 3).tobytes(), range(16)))
    assert set(views) == {expected[draws[0]]}


def test_global_random_generators_change_nothing_and_are_not_changed(album):
    varied = parse(RICH, "mirror", SIDE)
    np.random.seed(1)
    first = album.vary(Draw(0), varied, 0, 0)
    after = np.random.random()
    np.random.seed(1)
    assert np.random.random() == after
    np.testing.assert_array_equal(album.vary(Draw(0), varied, 0, 0), first)


def test_every_seed_epoch_sample_and_turn_has_a_view_of_its_own(album):
    # The mistake: augmentation that is frozen after the first epoch.
    for path in album.paths[1:]:
        path.write_bytes(album.paths[0].read_bytes())
    varied = parse("RandomResizedCrop, ColorJitter(0.3)", "mirror", SIDE)
    places = list(np.ndindex(2, 4, 4, 2))
    views = {album.vary(Draw(sample, turn), varied, seed, epoch).tobytes() for seed, epoch, sample, turn in places}
    assert len(views) == len(places)


def test_views_of_an_epoch_are_independent_of_the_epochs_before(album):
    varied = parse(RICH, "mirror", SIDE)
    late = album.vary(Draw(3), varied, 0, 9)
    for epoch in range(9):
        album.vary(Draw(3), varied, 0, epoch)
    np.testing.assert_array_equal(album.vary(Draw(3), varied, 0, 9), late)
