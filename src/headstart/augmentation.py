"""How training pictures are varied: torchvision's augmentations by their names, drawn for each picture by itself.

torchvision draws from one generator for the whole process, so that its augmentations change with the number of workers
and their order. Here every picture of every epoch has its own generator. The pixels are Pillow's work, as they are in
torchvision for pictures that are no tensors; tests hold the two together.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from headstart.config import AUTOMATIC_AUGMENT
from headstart.errors import UsageError
from headstart.images import INTERPOLATIONS, Preprocess

Symmetry = Literal["none", "mirror", "any"]
Random = np.random.Generator
Pair = Sequence[float]
Step = Callable[[Image.Image, Random, Preprocess], Image.Image]
_Change = Callable[[Image.Image, float, Preprocess], Image.Image]

LEANING = 45.0  # degrees; a picture turned further stands no longer upright


@dataclass(frozen=True)
class Augmentation:
    """Steps from an upright picture to a varied view of it; each takes (picture, generator, preprocess)."""

    names: tuple[str, ...]
    steps: tuple[Step, ...]

    def apply(self, image: Image.Image, preprocess: Preprocess, random: Random) -> NDArray[np.uint8]:
        """A varied view, uint8 (size, size, 3).

        RandomResizedCrop cuts from the whole picture; all else varies the view that evaluation sees, so that both have
        one geometry.
        """
        if "RandomResizedCrop" not in self.names[:1]:
            image = Image.fromarray(preprocess.apply(image))
        for step in self.steps:
            image = step(image, random, preprocess)
        return np.array(image)


def parse(text: str, symmetry: Symmetry, size: int) -> Augmentation:
    """The augmentation of a text such as `RandomResizedCrop(scale=(0.5, 1)), RandomHorizontalFlip`; `auto`, `none`.

    Args:
        text: names of torchvision's, with their arguments where they are not the default.
        symmetry: what leaves a picture's meaning alone.
        size: side of the network's input in pixels; a crop that names another is an error.

    Raises:
        UsageError: for an unknown name, wrong arguments, or a flip or turn that the declared symmetry forbids.
    """
    names: list[str] = []
    steps: list[Step] = []
    for name, positional, named in _read_calls(AUTOMATIC_AUGMENT[symmetry] if text == "auto" else text):
        make = _MAKERS[name]
        try:
            step = make(*positional, **named)
        except (TypeError, ValueError) as error:
            raise UsageError("augment", f"{name}: {error}", f"It takes {inspect.signature(make)}.") from error
        _check_symmetry(name, positional, named, symmetry)
        side = inspect.signature(make).bind(*positional, **named).arguments.get("size")
        if side not in (None, size):
            why = f"{name}({side}) does not fit the network's {size} pixels"
            raise UsageError("augment", why, f"Leave its size out, or give --size {side}.")
        if name == "RandomResizedCrop" and names:
            raise UsageError("augment", "RandomResizedCrop must come first", "It cuts from the whole picture.")
        names.append(name)
        steps.append(step)
    return Augmentation(tuple(names), tuple(steps))


def _read_calls(text: str) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """(name, positional arguments, named ones) of each call in a text; only literal values are read."""
    if text in ("none", ""):
        return []
    remedy = f"Known: {', '.join(_MAKERS)}; write them as RandomHorizontalFlip, RandomRotation(10)."
    calls = []
    try:
        tree = ast.parse(f"[{text}]", mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            raise ValueError("no list")
        for node in tree.elts:
            name = node.func if isinstance(node, ast.Call) else node
            if not isinstance(name, ast.Name):
                raise UsageError("augment", f"{ast.unparse(node)} is no augmentation", remedy)
            if name.id not in _MAKERS:
                raise UsageError("augment", f"{name.id} is unknown", remedy)
            arguments = node.args if isinstance(node, ast.Call) else []
            keywords = node.keywords if isinstance(node, ast.Call) else []
            named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}
            calls.append((name.id, [ast.literal_eval(value) for value in arguments], named))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise UsageError("augment", f"{text[:100]!r} cannot be read", remedy) from error
    return calls


def _check_symmetry(name: str, positional: list[Any], named: dict[str, Any], symmetry: Symmetry) -> None:
    needs: Symmetry = "none"
    if name == "RandomHorizontalFlip":
        needs = "mirror"
    elif name in ("RandomVerticalFlip", "RandomQuarterTurn"):
        needs = "any"
    elif name == "RandomRotation":
        degrees = positional[0] if positional else named["degrees"]
        needs = "any" if max(map(abs, _as_range("degrees", degrees))) > LEANING else "none"
    order = ("none", "mirror", "any")
    if order.index(needs) > order.index(symmetry):
        why = f"{name} changes what a picture means where its symmetry is {symmetry!r}"
        raise UsageError("augment", why, f"Leave it out, or declare --symmetry {needs}.")


def _as_range(
    name: str, value: float | Pair, middle: float = 0.0, least: float = -math.inf, most: float = math.inf
) -> tuple[float, float]:
    """A number as the range around a middle, a pair as it is; torchvision's arguments are written so.

    Raises:
        ValueError: for what is neither, or lies beyond the limits; a number alone is cut at them.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
        low, high = max(middle - value, least), middle + value
    elif isinstance(value, (tuple, list)) and len(value) == 2 and all(type(one) in (int, float) for one in value):
        low, high = value
    else:
        raise ValueError(f"{name} must be a number, 0 or more, or a pair of numbers, not {value!r}")
    if not (least <= low <= high <= most) or math.isinf(low) or math.isinf(high):
        raise ValueError(f"{name} {value!r} is no range from small to large within {least:g} to {most:g}")
    return float(low), float(high)


def _check_whole(name: str, value: object, least: int = 0) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number, {least} or more, not {value!r}")


# Each maker takes torchvision's arguments, with its defaults, and gives a step.


def _random_resized_crop(size: int | None = None, scale: Pair = (0.08, 1.0), ratio: Pair = (3 / 4, 4 / 3)) -> Step:
    if not (isinstance(scale, (tuple, list)) and isinstance(ratio, (tuple, list))):
        raise ValueError("scale and ratio must be pairs of numbers")
    (least, most), (narrow, wide) = _as_range("scale", scale, 0, 1e-6, 1), _as_range("ratio", ratio, 0, 0.01, 100)

    def draw_box(width: int, height: int, random: Random) -> tuple[int, int, int, int]:
        for _ in range(10):  # as torchvision does: ten tries, then the middle
            area = width * height * random.uniform(least, most)
            aspect = math.exp(random.uniform(math.log(narrow), math.log(wide)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
                return left, top, left + w, top + h
        w, h = max(1, min(width, round(height * wide))), max(1, min(height, round(width / narrow)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def step(image: Image.Image, random: Random, preprocess: Preprocess) -> Image.Image:
        box = draw_box(*image.size, random)
        return image.crop(box).resize((preprocess.size,) * 2, INTERPOLATIONS[preprocess.interpolation])

    return step


def _random_crop(
    size: int | None = None, padding: int = 0, padding_mode: Literal["constant", "reflect"] = "constant"
) -> Step:
    _check_whole("padding", padding)
    if padding_mode not in ("constant", "reflect"):
        raise ValueError(f"padding_mode must be 'constant' or 'reflect', not {padding_mode!r}")

    def step(image: Image.Image, random: Random, preprocess: Preprocess) -> Image.Image:
        pixels = np.pad(np.asarray(image), ((padding, padding), (padding, padding), (0, 0)), padding_mode)
        top, left = random.integers(2 * padding + 1, size=2)
        return Image.fromarray(pixels[top : top + image.height, left : left + image.width])

    return step


def _flip(method: Image.Transpose) -> Callable[..., Step]:
    def make(p: float = 0.5) -> Step:
        if type(p) not in (int, float) or not 0 <= p <= 1:
            raise ValueError(f"p must be a number from 0 to 1, not {p!r}")
        return lambda image, random, _: image.transpose(method) if random.random() < p else image

    return make


def _random_quarter_turn() -> Step:
    turns = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)

    def step(image: Image.Image, random: Random, _: Preprocess) -> Image.Image:
        turn = turns[random.integers(4)]
        return image if turn is None else image.transpose(turn)

    return step


def _random_rotation(degrees: float | Pair) -> Step:
    low, high = _as_range("degrees", degrees)
    return lambda image, random, preprocess: _rotate(image, random.uniform(low, high), preprocess)


def _color_jitter(
    brightness: float | Pair = 0, contrast: float | Pair = 0, saturation: float | Pair = 0, hue: float | Pair = 0
) -> Step:
    names = ("brightness", "contrast", "saturation")
    given = zip(names, (brightness, contrast, saturation), strict=True)
    ranges = [*(_as_range(name, value, 1.0, 0.0) for name, value in given), _as_range("hue", hue, 0.0, -0.5, 0.5)]
    unchanged = (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (0.0, 0.0)

    def step(image: Image.Image, random: Random, _: Preprocess) -> Image.Image:
        factors = [random.uniform(low, high) for low, high in ranges]
        changes = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for number in random.permutation(4):
            if ranges[number] == unchanged[number]:
                continue
            factor = factors[number]
            image = changes[number](image).enhance(factor) if number < 3 else _shift_hue(image, factor)
        return image

    return step


def _shift_hue(image: Image.Image, turn: float) -> Image.Image:
    """A picture with its colours turned on the colour wheel, by -0.5 to 0.5 of a full turn."""
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(turn * 255) % 256)  # wraps around, as the wheel does
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def _rotate(image: Image.Image, degrees: float, preprocess: Preprocess) -> Image.Image:
    """A picture turned counter-clockwise; corners that come into view have the network's mean colour."""
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=_mean_colour(preprocess))


def _mean_colour(preprocess: Preprocess) -> tuple[int, int, int]:
    red, green, blue = (round(255 * value) for value in preprocess.mean)
    return red, green, blue


# RandAugment (Cubuk et al., 2020) and TrivialAugment (Mueller and Hutter, 2021): operations and their largest strengths
# are those of torchvision; an operation takes (picture, strength, preprocess).


def _shear(across: float, down: float) -> _Change:
    """Lines leaning across or down by the strength."""

    def change(image: Image.Image, strength: float, preprocess: Preprocess) -> Image.Image:
        # Output to input, with pixels' middles at halves; the top left corner stays.
        x, y = across * strength, down * strength
        return _transform(image, (1.0, x, 0.0, y, 1.0, 0.0), preprocess)

    return change


def _shift(across: float, down: float) -> _Change:
    """Moved by the strength in parts of the side, by whole pixels."""

    def change(image: Image.Image, strength: float, preprocess: Preprocess) -> Image.Image:
        x, y = (float(int(round(part * strength * image.width, 6))) for part in (across, down))
        return _transform(image, (1.0, 0.0, -x, 0.0, 1.0, -y), preprocess)

    return change


def _transform(
    image: Image.Image, matrix: tuple[float, float, float, float, float, float], preprocess: Preprocess
) -> Image.Image:
    colour = _mean_colour(preprocess)
    method = Image.Transform.AFFINE
    return image.transform(image.size, method, matrix, Image.Resampling.BILINEAR, fillcolor=colour)


def _enhance(kind: Callable[[Image.Image], Any]) -> _Change:
    """Brightness, colour, contrast or sharpness times 1 + strength."""

    def change(image: Image.Image, strength: float, _: Preprocess) -> Image.Image:
        result: Image.Image = kind(image).enhance(1.0 + strength)
        return result

    return change


@dataclass(frozen=True)
class _Operation:
    """An operation, its largest strength for RandAugment and TrivialAugment's wide space, and whether it has a sign."""

    change: _Change
    most: float
    most_wide: float
    signed: bool = True


_OPERATIONS = {
    "Identity": _Operation(lambda image, *_: image, 0.0, 0.0, False),
    "ShearX": _Operation(_shear(1, 0), 0.3, 0.99),
    "ShearY": _Operation(_shear(0, 1), 0.3, 0.99),
    "TranslateX": _Operation(_shift(1, 0), 150 / 331, 32 / 224),
    "TranslateY": _Operation(_shift(0, 1), 150 / 331, 32 / 224),
    "Rotate": _Operation(_rotate, 30.0, 135.0),
    "Brightness": _Operation(_enhance(ImageEnhance.Brightness), 0.9, 0.99),
    "Color": _Operation(_enhance(ImageEnhance.Color), 0.9, 0.99),
    "Contrast": _Operation(_enhance(ImageEnhance.Contrast), 0.9, 0.99),
    "Sharpness": _Operation(_enhance(ImageEnhance.Sharpness), 0.9, 0.99),
    "Posterize": _Operation(lambda image, s, _: ImageOps.posterize(image, 8 - round(s)), 4.0, 6.0, False),
    "Solarize": _Operation(
        lambda image, s, _: ImageOps.solarize(image, math.ceil(255 * (1 - s) - 1e-6)), 1.0, 1.0, False
    ),
    "AutoContrast": _Operation(lambda image, *_: ImageOps.autocontrast(image), 0.0, 0.0, False),
    "Equalize": _Operation(lambda image, *_: ImageOps.equalize(image), 0.0, 0.0, False),
}


def _vary(image: Image.Image, random: Random, preprocess: Preprocess, part: float, wide: bool = False) -> Image.Image:
    """One operation by lot, at a part (0 to 1) of its largest strength."""
    name = list(_OPERATIONS)[random.integers(len(_OPERATIONS))]
    operation = _OPERATIONS[name]
    strength = part * (operation.most_wide if wide else operation.most)
    if name == "Rotate":
        strength = min(strength, LEANING)
    if operation.signed and random.random() < 0.5:
        strength = -strength
    return operation.change(image, strength, preprocess)


def _rand_augment(num_ops: int = 2, magnitude: float = 9) -> Step:
    """`magnitude` is on torchvision's scale of 0 to 30; the paper's 0 to 10 is a third of it."""
    _check_whole("num_ops", num_ops)
    if type(magnitude) not in (int, float) or not 0 <= magnitude <= 30:
        raise ValueError(f"magnitude must be a number on torchvision's scale, 0 to 30, not {magnitude!r}")

    def step(image: Image.Image, random: Random, preprocess: Preprocess) -> Image.Image:
        for _ in range(num_ops):
            image = _vary(image, random, preprocess, magnitude / 30)
        return image

    return step


def _trivial_augment_wide() -> Step:
    """One operation of a strength by lot, of 31. Turns end at 45 degrees rather than torchvision's 135."""

    def step(image: Image.Image, random: Random, preprocess: Preprocess) -> Image.Image:
        return _vary(image, random, preprocess, random.integers(31) / 30, wide=True)

    return step


_MAKERS: dict[str, Callable[..., Step]] = {
    "RandomResizedCrop": _random_resized_crop,
    "RandomCrop": _random_crop,
    "RandomHorizontalFlip": _flip(Image.Transpose.FLIP_LEFT_RIGHT),
    "RandomVerticalFlip": _flip(Image.Transpose.FLIP_TOP_BOTTOM),
    "RandomQuarterTurn": _random_quarter_turn,
    "RandomRotation": _random_rotation,
    "ColorJitter": _color_jitter,
    "RandAugment": _rand_augment,
    "TrivialAugmentWide": _trivial_augment_wide,
}
